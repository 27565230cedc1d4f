"""The passes over a graph that inductor is about to lower."""

from __future__ import annotations

from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .scalars import make_scalars_once
from .small_products import sum_small_products


class Rewrites(CustomGraphPass):
    """All of them; inductor's `post_grad_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        sum_small_products(graph)
        make_scalars_once(graph)

    def uuid(self) -> object:
        """What inductor's cache of graphs knows them by."""
        return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py")))))
