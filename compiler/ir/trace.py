"""What a capture is made of: calls in order, and what stands for the tensors and random numbers they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaoptim.errors import user_location

from .retention import UNSAID, Retention
from .tensors import TensorSpec, tensor_spec
from .values import Entry, Spy, Value


class Input:
    """A real tensor that the function reads: an argument, a parameter, a constant."""

    __slots__ = ("tensor", "grad", "spec", "location")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.grad = tensor, tensor.requires_grad
        self.spec = tensor_spec(tensor)
        self.location = user_location()

    @classmethod
    def of(cls, spec: TensorSpec, grad: bool) -> Input:
        """One of which no more is known than this: a recorded step serves many tensors."""
        made = cls.__new__(cls)
        made.grad, made.spec, made.location = grad, spec, ""
        return made


@dataclass(slots=True, eq=False, repr=False)
class Noise:
    """Random numbers, drawn whenever the program runs.

    Attributes:
        op: an operator that takes a generator: it makes them, or fills a tensor in place.
        args, kwargs: what it is given besides, all numbers and options.
        spec: of the tensor they are.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: TensorSpec
    grad: ClassVar[bool] = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two steps to draw alike."""
        return (self.op, self.args, tuple(sorted(self.kwargs.items(), key=lambda kv: kv[0])))


@dataclass(slots=True, eq=False, repr=False)
class ScanItem:
    """What one iteration of `window.scan` sees of a tensor: its slice at ``position`` along the leading axis."""

    source: Input
    position: int
    spec: TensorSpec

    @property
    def grad(self) -> bool:
        """Whether it can carry a gradient."""
        return self.source.grad


@dataclass(slots=True, eq=False, repr=False)
class Scan:
    """A loop captured by a few of its iterations.

    Attributes:
        count: how many iterations it stands for.
        labels: which of them have been captured.
        begins: index of the first entry of each captured iteration.
        end: index after the last entry, once the loop has run out; -1 before.
    """

    count: int
    labels: list[int]
    location: str
    begins: list[int] = field(default_factory=list)
    end: int = -1


@dataclass
class WindowMark:
    """A window of the trace.

    Attributes:
        offline, window, retention, backward_hook: its options (``window`` is W, or None).
        adopted: the call that takes each parameter in.
        last: tensors that would keep a value after an online window, with what stands for it.
    """

    offline: bool
    window: int | None = None
    retention: Retention = UNSAID
    backward_hook: Callable[..., Any] | None = None
    adopted: list[Entry] = field(default_factory=list)
    last: list[tuple[Any, Value]] = field(default_factory=list)


@dataclass
class Trace:
    """What a captured function does.

    Attributes:
        entries: calls, in order.
        inputs: real tensors read.
        steps: index after each inner step's last entry, with the user's line.
        scans: loops of which only the first iterations are among the entries.
        windows: its windows.
        outputs: what stands for each tensor the function returns.
        left: tensors that the function was given and that have another value after it, with what stands for it.
        writes: tensors that keep a new value, and what stands for it, as the pass mode has decided.
        window: W, where gradients are truncated, as the pass mode has decided.
        hooks: id of a call -> its hooked outputs, each with the hooks that were there when a gradient passed.
        indexed: whether indices that may differ from step to step are `Number`s already.
        draws_on: the device that random numbers are drawn on; None if none are.
        milliseconds: how long the capture took.
    """

    entries: list[Entry] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    steps: list[tuple[int, str]] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    windows: list[WindowMark] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    left: list[tuple[Tensor, Value]] = field(default_factory=list)
    writes: list[tuple[Any, Value]] = field(default_factory=list)
    window: int | None = None
    hooks: dict[int, dict[Any, list[Spy]]] = field(default_factory=dict)
    indexed: bool = False
    draws_on: torch.device | None = None
    milliseconds: float = 0.0
