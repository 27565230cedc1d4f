"""What a compiled step takes for granted about its optimizers, and is not to be wrong about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from metaoptim.errors import CaptureError

from ..compiler.capture.trace import Input


class Premises:
    """Hyper-parameters and state of a step's optimizers, and whether their networks' modules are in training mode.

    Guards cover all of it where the function refers to optimizers and networks itself. Where it reaches them through
    an object of another kind (``agent.optimizer``) they see the object alone, and a change must not pass unnoticed.

    Args:
        optimizers: those that step.
        inputs: inputs of the step.
    """

    def __init__(self, optimizers: Sequence[Any], inputs: Sequence[Any]) -> None:
        self.optimizers = optimizers
        at = {id(x.tensor): x for x in inputs if isinstance(x, Input)}
        self.facts = [at.get(id(v)) if isinstance(v, Tensor) else v for _, v in self._now()]

    def check(self, tensor_of: Callable[[Input], Tensor]) -> None:
        """Raise if anything is not as it was; ``tensor_of`` gives the tensor behind an input, in this call."""
        now = list(self._now())
        for (name, value), then in zip(now, self.facts, strict=False):
            if isinstance(value, Tensor):
                same = tensor_of(then) is value if isinstance(then, Input) else then is None
            else:
                same = type(value) is type(then) and value == then
            if not same:
                _refuse(name)
        if len(now) != len(self.facts):
            _refuse("a parameter group")

    def _now(self) -> Iterator[tuple[str, Any]]:
        for optimizer in self.optimizers:
            yield "first_order", optimizer.first_order
            yield from _flat("the clipping", optimizer._normalizer)
            for group in optimizer.param_groups:
                for name, value in group.items():
                    if name != "params":
                        yield from _flat(f"{name!r}", value)
                for p in group["params"]:
                    yield "the optimizer's state", tuple(optimizer.state.get(p, ()))
            for network in optimizer.networks:
                for module in network.modules():
                    yield "the training mode of a module", module.training


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    for v in value if isinstance(value, tuple) else (value,):
        yield name, v


def _refuse(name: str) -> None:
    raise CaptureError(
        f"{name} is not what it was when the compiled step was captured, and its guards do not see it: the function "
        "reaches its optimizer or network through an object of another kind. Let the function refer to them itself, as "
        "arguments, closures or globals, so that it is captured again"
    )
