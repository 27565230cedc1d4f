"""What the first use of a compiled graph finds wrong with it, and what is no more than rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from metaoptim.compiler.lower import compile_graph


def test_an_ill_conditioned_derivative_is_not_taken_for_a_wrong_one() -> None:
    """Where rounding errors of the inputs do as much, a difference says nothing; elsewhere it does."""
    x = torch.tensor([1.0, 1.0 + 1e-12, 2.0])

    class Cancels(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (1e12 * (x[:1] - x[1:2]), x[2:] * 3)

    graph = fx.symbolic_trace(Cancels())
    moved = x * torch.tensor([1.0 + 1e-15, 1.0, 1.0])
    assert compile_graph.difference(graph, lambda x: graph(moved), [x]) is None
    wrong = lambda x: (graph(x)[0], graph(x)[1] * 1.06)
    assert compile_graph.difference(graph, wrong, [x]) == "output 1 differs in the first call"


def test_a_compiled_graph_that_cannot_run_is_not_taken() -> None:
    """Compilers take operators that what they have made of them then refuses."""
    graph, x = fx.symbolic_trace(lambda x: (x.sin(),)), torch.ones(2)

    def refuses(x: Tensor) -> Any:
        raise ValueError("expected a list\nbut got None")

    def has_no_room(x: Tensor) -> Any:
        raise torch.OutOfMemoryError("no room")

    found = compile_graph.difference(graph, refuses, [x])
    assert found == "it raises ValueError: expected a list"
    with pytest.raises(torch.OutOfMemoryError):
        compile_graph.difference(graph, has_no_room, [x])


def test_a_compiled_graph_is_held_to_the_precision_that_it_computes_in() -> None:
    """Compilers leave out roundings between operators in bfloat16, whatever the type of the results."""
    graph = fx.symbolic_trace(lambda x: ((x.to(dtype=torch.bfloat16) * 3).sin().to(dtype=torch.float32),))
    x = torch.linspace(0.1, 1, 50, dtype=torch.float32)
    assert compile_graph.difference(graph, lambda x: ((x.bfloat16().float() * 3).sin(),), [x]) is None
    assert (
        compile_graph.difference(graph, lambda x: ((x * 4).sin(),), [x])
        == "output 0 differs in the first call"
    )
