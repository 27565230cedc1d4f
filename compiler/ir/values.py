"""What a recording is made of: calls, their values, and what stands for tensors from outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from .tensors import ByStorage, TensorSpec
from .walk import reached

_DETACH = torch.ops.aten.detach.default


def version_of(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


class Theta:
    """A version of one theta tensor: its state index, and the tensor the networks show for it.

    Attributes:
        index, tensor: these.
        version: equal for tensors that were shown for the same value.
        hooks: of the tensor, with their handles.
        suspect: it was overwritten behind autograd's back, which may have saved it.
    """

    __slots__ = ("index", "tensor", "version", "hooks", "suspect")

    def __init__(self, index: int, tensor: Tensor, version: object) -> None:
        self.index, self.tensor, self.version, self.suspect = index, tensor, version, False
        self.hooks: list[tuple[Any, Spy]] | None = None


class Epoch:
    """The stretch of user code between two changes of theta.

    Attributes:
        position: the tape position whose state the networks show.
        superstep: ordinal of the super-step it was opened in.
        theta: id of a tensor the networks show -> its `Theta`.
        writes: memory -> in-place entries on it, oldest first.
        externals: id of a tensor read from outside -> weak reference to what stands for it.
        apart: memory of values that are set apart (see `Value`).
        read: whether any theta has been read in it.
    """

    __slots__ = ("position", "superstep", "theta", "writes", "externals", "apart", "read")

    def __init__(self, position: int, superstep: int, theta: dict[int, Theta]) -> None:
        self.position, self.superstep, self.theta = position, superstep, theta
        self.writes: ByStorage[list[Entry]] = ByStorage()
        self.externals: dict[int, weakref.ref[External]] = {}
        self.apart: ByStorage[bool] = ByStorage()
        self.read = False


class Entry:
    """One recorded call."""

    __slots__ = ("op", "args", "kwargs", "epoch", "seq", "deps", "grad", "shape")

    def __init__(
        self, op: Any, args: tuple, kwargs: dict, epoch: Epoch, seq: int, deps: tuple, grad: bool
    ) -> None:
        self.op, self.args, self.kwargs = op, args, kwargs
        self.epoch, self.seq, self.deps, self.grad = epoch, seq, deps, grad
        self.shape: tuple | None = None


class Value:
    """An output of an entry (the only one if ``index`` is None).

    Attributes:
        ref: weak reference to the tensor.
        hooks: of the tensor, with their handles.
        apart: what steps read in its place, where autograd itself must see all of its gradient (a hook, retain_grad).
        steps: tape positions of the steps that have read it.
        suspect: as of an `External`.
    """

    __slots__ = ("entry", "index", "ref", "hooks", "apart", "steps", "suspect")

    def __init__(self, entry: Entry, index: int | None) -> None:
        self.entry, self.index = entry, index
        self.ref: Any = None
        self.hooks: list[tuple[Any, Spy]] | None = None
        self.apart: External | None = None
        self.steps: tuple[int, ...] = ()
        self.suspect = False


class Hold(Protocol):
    """The hold on the value of a tensor from outside."""

    @property
    def spec(self) -> TensorSpec:
        """What the tensor is like."""
        ...

    @property
    def tensor(self) -> Tensor:
        """A tensor of the value held."""
        ...

    def is_current(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` still has the value held."""
        ...


class External:
    """A tensor that came from outside what is recorded, as it was read.

    Attributes:
        tensor: where its gradient goes, if it could carry one: the source, or a copy with the history that the source
            had when it was read.
        grad: whether it could carry a gradient then.
        held: the guard's hold on its value.
        written: whether recorded in-place calls go into it, so that it is read anew from the recording.
        suspect: whether its memory may have changed since behind autograd's back, which may have saved it.
    """

    __slots__ = ("_source", "tensor", "version", "grad", "held", "written", "suspect", "__weakref__")

    def __init__(self, tensor: Tensor, held: Hold) -> None:
        self._source = weakref.ref(tensor)  # calls that write into it would keep it alive, and it them
        self.version, self.grad = version_of(tensor), tensor.requires_grad
        self.tensor = tensor if self.grad else None
        self.held, self.written, self.suspect = held, False, False

    @property
    def source(self) -> Tensor | None:
        """The tensor object that was read, if it is alive."""
        return self._source()


class Carried:
    """A value from before the last change of theta: part of the step if it is of the same super-step, else external."""

    __slots__ = ("value", "external")

    def __init__(self, value: Value, external: External) -> None:
        self.value, self.external = value, external


def reaches_theta(value: Value) -> bool:
    """Whether a gradient of ``value`` may flow into theta."""

    def onwards(a: Any) -> Iterable[Any]:
        if isinstance(a, Value):
            t = a.ref and a.ref()
            return () if a.apart is not None or (t is not None and not t.requires_grad) else (a.entry,)
        if isinstance(a, Entry):
            return (*a.args, *a.deps, *a.kwargs.values()) if a.grad and a.op is not _DETACH else ()
        return (a.value,) if isinstance(a, Carried) else a if isinstance(a, tuple) else ()

    return any(isinstance(a, Theta) for a in reached([value], onwards))


class Number:
    """A Python number that may differ between otherwise equal steps."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Spy:
    """A tensor hook, with the note whether it changed its gradient when it ran.

    ``taken``: a step has it in its graph, where it acts on what the step gives the tensor. ``removed``: by the user.
    """

    __slots__ = ("hook", "ran", "returned", "mutated", "taken", "removed")

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self.hook = hook
        self.ran = self.returned = self.mutated = self.taken = self.removed = False

    def __call__(self, grad: Tensor) -> Tensor | None:
        if self.taken:
            raise CaptureError(
                f"a tensor of shape {tuple(grad.shape)} has a hook that changes its gradient, and was read by an inner "
                "step and by something else (another step or an outer loss): the hook would act on parts of the "
                "gradient, one by one. Give each reader a copy of its own (h.clone()) with its own hook, or open the "
                "window with strategy='full_tape'."
            )
        version = grad._version
        result = self.hook(grad)
        self.ran, self.returned = True, result is not None
        self.mutated = grad._version != version
        return result


def is_removed(handle: Any) -> bool:
    """Whether a tensor hook's handle has been removed since."""
    hooks = handle.hooks_dict_ref()
    return hooks is None or handle.id not in hooks


def exact(numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for numbers that are alike to the last bit: -0.0 is not 0.0, and nan is nan."""
    return tuple([n.hex() if isinstance(n, float) else n for n in numbers])
