"""PyTorch's own module database, module by module, inside an inner loop, in every form, against a tape by hand.

``python tests/helpers/modules.py`` goes through all of them and writes docs/modules.md; with names, it prints what it
finds of these.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing._internal.common_modules import module_db

from sweep_pages import main
from sweeps import Fed, Found, compared, found_of

MODULES = {info.name: info for info in module_db}
TABLE = Path(__file__).parents[2] / "docs" / "modules.md"
SHARE = 24  # tests take every so manieth module by default
_FORMS = ("A", "B", "C")


class Run:
    """A module made with arguments of the database, and run on others."""

    def __init__(self, module: nn.Module, given: Any, reach: float) -> None:
        self.module = module
        self.arguments = Fed(given.args, given.kwargs, reach)

    def inside(self) -> list[nn.Module]:
        """The module, as it was made."""
        return [copy.deepcopy(self.module)]

    def __call__(self, inside: Iterator[nn.Module], z: Tensor) -> Any:
        """What the module gives."""
        args, kwargs = self.arguments(z)
        return next(inside)(*args, **kwargs)


def runs(info: Any, training: bool) -> list[list[Run]]:
    """The samples of a module; each also close to what it was, where it may be at its domain's bounds."""
    torch.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    tries = []
    for sample in samples:
        if sample.forward_input is None:  # only to be made
            continue
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).to(torch.float64).train(training)
        if isinstance(module, LazyModuleMixin):  # it has no parameters before its first run
            module(*copy.deepcopy(given.args), **given.kwargs)
        tries.append([Run(module, given, reach) for reach in (1.0, 1e-3)])
    return [
        both
        for both in tries
        if both[0].arguments.any or [p for p in both[0].module.parameters() if p.requires_grad]
    ]


def sweep(
    name: str, forms: Iterable[str] | None = None, most: int | None = None, cannot: Counter[str] | None = None
) -> Iterator[Found]:
    """What forms do with the samples of a module, or with ``most`` of them, in each mode that makes a difference.

    ``cannot`` counts the samples that eager PyTorch cannot differentiate twice.
    """
    info = MODULES[name]
    for training in (True, False) if info.train_and_eval_differ else (True,):
        full = name if training else f"{name} in eval mode"
        samples, left_out = compared(runs(info, training), most)
        if cannot is not None and left_out:
            cannot[full] = left_out
        if samples:
            yield from found_of(full, samples, _FORMS if forms is None else forms)


HEAD = """# Modules

PyTorch's database of modules (`module_db`), all samples of each, float64, in training mode and, where that is another
thing, in eval mode. The module is part of an inner network: its parameters are inner parameters, beside one from which
its inputs are made. Two inner steps with a learnt rate. `python tests/helpers/modules.py` compares the meta-gradients
with a plain tape and writes this page; `tests/exact/test_operators.py` holds it to that, for a share of the modules, or
for all of them with `--whole-sweep`. Lazy modules have been run once before. Operators have a page of their own:
[operators.md](operators.md).
"""

if __name__ == "__main__":
    main(MODULES, sweep, HEAD, TABLE)
