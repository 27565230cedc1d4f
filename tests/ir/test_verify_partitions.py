"""The verifier on what the compiler makes: every stage of real functions passes, and spoilt partitions do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.ir.step import EAGER
from metaoptim.compiler.ir.tensors import TensorSpec
from metaoptim.compiler.ir.traces.trace import Partition
from metaoptim.compiler.ir.verify import verify_partition, verify_program, verify_step
from metaoptim.compiler.passes.options import Options
from metaoptim.compiler.passes.pipeline import PIPELINE, compile_trace
from metaoptim.compiler.passes.traces.canonicalize import canonicalize
from metaoptim.compiler.passes.traces.prune import prune
from metaoptim.compiler.passes.traces.split import split
from metaoptim.errors import ProgramError
from metaoptim.functions.specialization import trace_of
from oracle import leaves
from problems import NETWORKS, problem

OPTIONS = Options(lowering=EAGER)
TWO = TensorSpec((2,), torch.float64, (1,), torch.device("cpu"))


def traced() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    xs = torch.randn(6, 5, 3)

    def fn(net: nn.Module, xs: Tensor) -> Tensor:
        inner = metaoptim.MetaAdam([net], lr=0.1)
        with metaoptim.SlidingWindow(offline=True) as window:
            for x in window.scan(xs):
                inner.step(F.mse_loss(net(x), torch.ones(5, 2)))
            return net(xs[0]).square().mean()

    return trace_of(fn, (net, xs), {})[0]


def partitioned() -> Partition:
    partition, _ = split(traced(), OPTIONS)
    canonicalize(partition, OPTIONS)
    prune(partition, OPTIONS)
    return partition


def test_a_real_function_passes_at_every_stage() -> None:
    partition, _ = split(traced(), OPTIONS)
    verify_partition(partition, outlined=False)
    canonicalize(partition, OPTIONS)
    verify_partition(partition)
    prune(partition, OPTIONS)
    verify_partition(partition)
    rolled, records = compile_trace(traced(), OPTIONS)
    verify_program(rolled)
    names = [p.name for p in PIPELINE[:-1]]
    assert [r.name for r in records] == ["capture", *names, "verify"]


def _swap_parts(partition: Partition) -> None:
    partition.parts[0], partition.parts[1] = partition.parts[1], partition.parts[0]
    partition.part_of = {id(e): n for n, u in enumerate(partition.parts) for e in u.segment.entries}


def _lose_part(partition: Partition) -> None:
    lost = partition.parts.pop(0)
    partition.part_of = {id(e): n for n, u in enumerate(partition.parts) for e in u.segment.entries}
    lost.kind.parts.remove(lost)


def _mislabel(partition: Partition) -> None:
    partition.part_of[id(partition.parts[1].segment.entries[0])] = 0


def _respecify(partition: Partition) -> None:
    outputs = partition.parts[0].kind.outputs
    place = next(iter(outputs))
    outputs[place] = TWO


PARTITIONS: dict[str, tuple[Callable[[Partition], Any], str]] = {
    "parts out of order": (
        _swap_parts,
        r"part 0: call .* reads an output of .* in part 1, which comes later",
    ),
    "a lost part": (_lose_part, r"which is part of the program no more"),
    "a call listed elsewhere": (_mislabel, r"part 1: call 0 .* is listed in part 0"),
    "a value that is not given": (
        lambda d: d.parts[0].kind.outputs.clear(),
        r"in part 0, which that part does not give",
    ),
    "a value of another shape": (_respecify, r"in part 0: got float64 2 "),
    "unequal parts taken for equal": (
        lambda d: (d.parts[0].kind.parts.append(d.parts[1]), setattr(d.parts[1], "kind", d.parts[0].kind)),
        r"part 1 shares its kind with a part of another structure",
    ),
}


@pytest.mark.parametrize("rule", PARTITIONS)
def test_an_unsound_partition_is_rejected(rule: str) -> None:
    spoil, match = PARTITIONS[rule]
    partition = partitioned()
    spoil(partition)
    with pytest.raises(ProgramError, match=match):
        verify_partition(partition)


@pytest.mark.parametrize("network", NETWORKS)
def test_step_graphs_of_ordinary_windows_pass(network: str) -> None:
    case = problem(network, "amsgrad", 3, offline=True, carry=network != "lstm")
    torch.manual_seed(3)
    net, metas = case.build(), leaves(case.metas)
    inner = case.optimizer_class([net], **case.hyper(metas), **case.options)
    carried: dict[str, Any] = {}
    with metaoptim.SlidingWindow(offline=True) as window:
        for t in range(case.steps):
            inner.step(case.loss(net, t, metas, carried), allow_unused=case.allow_unused)
        graphs = window.program.step_graphs
    assert len(graphs) >= 2
    for g in graphs:
        verify_step(g)
