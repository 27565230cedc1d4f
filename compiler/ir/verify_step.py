"""The verifier of step graphs: what holds of every one of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from metaoptim.compiler.compat import OpOverload
from metaoptim.errors import ProgramError

from .operators import op_info, written
from .step import Role, StepGraph, show
from .walk import reached

aten = torch.ops.aten
_INPUT_RANK = {Role.THETA: 0, Role.THETA_NOW: 1, Role.OPT_STATE: 2, Role.CARRY: 2}
_INPUTS = (*_INPUT_RANK, Role.META, Role.SCAN, Role.NOISE)
_OUTPUTS = (Role.THETA, Role.OPT_STATE, Role.CARRY, Role.GRADIENT)


def verify_step(step: StepGraph, name: str = "a step graph", *, pruned: bool = True) -> None:
    """Check one step graph.

    Args:
        step: the graph.
        name: what errors call it.
        pruned: whether dead nodes and unused inputs are errors: canonicalize promises that there are none.

    Raises:
        ProgramError: it names the node or the port.
    """
    nodes = list(step.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    _verify_ports(step, name, placeholders)
    seen: set[fx.Node] = set()
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                raise ProgramError(
                    f"{name}: node {node.name} reads {used.name}, which is not defined before it"
                )
        seen.add(node)
        if node.op not in ("placeholder", "call_function", "output"):
            raise ProgramError(
                f"{name}: node {node.name} is a {node.op}; a step graph consists of calls of functions"
            )
        _verify_operator(node, name)
    if pruned:
        live = _live(nodes)
        # what is drawn is drawn as eager draws it, read or not: the random stream must not depend on who reads
        drawn = {n for n, p in zip(placeholders, step.inputs, strict=True) if p.role is Role.NOISE}
        for node in nodes:
            if node.target in (aten.alias.default, aten.clone.default) and drawn.issuperset(
                node.all_input_nodes
            ):
                drawn.add(node)
        live |= drawn
        for node in nodes:
            if node not in live:
                what = "input" if node.op == "placeholder" else "node"
                raise ProgramError(f"{name}: {what} {node.name} is dead: no output depends on it")


def _verify_ports(step: StepGraph, name: str, placeholders: list[fx.Node]) -> None:
    if len(placeholders) != len(step.inputs):
        raise ProgramError(f"{name}: got {len(placeholders)} placeholders for {len(step.inputs)} inputs")
    rank = 0
    for node, port in zip(placeholders, step.inputs, strict=True):
        if port.role not in _INPUTS:
            raise ProgramError(f"{name}: input {port.name} has the role of an output, {port.role.value}")
        if _INPUT_RANK.get(port.role, 3) < rank:
            raise ProgramError(
                f"{name}: input {port.name} ({port.role.value}) comes after inputs it must precede; expected theta, "
                "then state, then what is given from outside"
            )
        rank = _INPUT_RANK.get(port.role, 3)
        if node.meta.get("spec", port.spec) != port.spec:
            raise ProgramError(
                f"{name}: input {port.name} is declared as {port.spec}, its placeholder holds "
                f"{node.meta['spec']}"
            )
    results = step.graph.find_nodes(op="output")
    values = results[0].args[0] if len(results) == 1 else None
    if not isinstance(values, tuple) or len(values) != len(step.outputs):
        got = len(values) if isinstance(values, tuple) else "none"
        raise ProgramError(f"{name}: got {got} results for {len(step.outputs)} outputs")
    for value, port in zip(values, step.outputs, strict=True):
        if port.role not in _OUTPUTS:
            raise ProgramError(f"{name}: output {port.name} has the role of an input, {port.role.value}")
        if not isinstance(value, fx.Node):
            raise ProgramError(f"{name}: output {port.name} is not computed: got the constant {value!r}")


def _verify_operator(node: fx.Node, name: str) -> None:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return
    off = target is torch.ops.aten.native_dropout.default and not node.args[2]
    if op_info(target).random and not off:
        raise ProgramError(
            f"{name}: node {node.name} draws random numbers ({target}); a replay would draw others, so they must be "
            "inputs of the role noise"
        )
    for changed in _written(node):
        root = _memory_of(changed)
        if root.op == "placeholder":
            raise ProgramError(
                f"{name}: node {node.name} ({target}) writes into the input {root.name}, which belongs to the caller"
            )


def _written(node: fx.Node) -> list[fx.Node]:
    return written(node.target, node.args, node.kwargs, fx.Node)


def _memory_of(node: Any) -> fx.Node:
    """The node that made the memory ``node`` lies in."""
    while node.op == "call_function":
        target = node.target
        overload = isinstance(target, OpOverload)
        same = overload and (
            target.is_view or target is torch.ops.aten.type_as.default or op_info(target).writes
        )
        if not (same or target in (show, operator.getitem) or target.__class__.__name__ == "WithHooks"):
            break
        node = node.args[0]
    return node


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    roots = [n for n in nodes if n.op == "output" or _written(n)]
    return set(reached(roots, lambda node: node.all_input_nodes))


def op_text(op: Any) -> str:
    return str(op) if isinstance(op, OpOverload) else getattr(op, "__name__", None) or str(op)
