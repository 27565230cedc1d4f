"""What a recording is made of: calls, their values, and what stands for tensors from outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from metaoptim.errors import CaptureError

from .operators import written
from .step import again
from .tensors import ByStorage, TensorSpec

aten = torch.ops.aten
T = TypeVar("T")
_DETACH = aten.detach.default


def version_of(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@dataclass(slots=True, eq=False, repr=False)
class Theta:
    """A version of one theta tensor: its state index, and the tensor the networks show for it.

    Attributes:
        index, tensor: these.
        version: equal for tensors that were shown for the same value.
        hooks: of the tensor, with their handles.
        suspect: it was overwritten behind autograd's back, which may have saved it.
    """

    index: int
    tensor: Tensor
    version: object
    hooks: list[tuple[Any, Spy]] | None = None
    suspect: bool = False


@dataclass(slots=True, eq=False, repr=False)
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

    position: int
    superstep: int
    theta: dict[int, Theta]
    writes: ByStorage[list[Entry]] = field(default_factory=ByStorage)
    externals: dict[int, weakref.ref[External]] = field(default_factory=dict)
    apart: ByStorage[bool] = field(default_factory=ByStorage)
    read: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """One recorded call.

    Attributes:
        op: what is called.
        args, kwargs: its arguments, with what stands for tensors in their place.
        epoch: when; of no account in a trace.
        seq: its place in the order of calls.
        deps: earlier calls that have written into memory that it reads.
        grad: whether grad mode was on.
        shape: shapes of its results, where they depend on values.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    epoch: Epoch
    seq: int
    deps: tuple[Any, ...]
    grad: bool
    shape: tuple[Any, ...] | None = None


@dataclass(slots=True, eq=False, repr=False)
class Value:
    """An output of an entry (the only one if ``index`` is None).

    Attributes:
        ref: weak reference to the tensor.
        hooks: of the tensor, with their handles.
        apart: what steps read in its place, where autograd itself must see all of its gradient (a hook, retain_grad).
        steps: tape positions of the steps that have read it.
        suspect: see `External`.
    """

    entry: Entry
    index: int | None
    ref: Any = None
    hooks: list[tuple[Any, Spy]] | None = None
    apart: External | None = None
    steps: tuple[int, ...] = ()
    suspect: bool = False


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


@dataclass(slots=True, eq=False, repr=False)
class Carried:
    """A value from before the last change of theta: part of the step if it is of the same super-step, else external."""

    value: Value
    external: External


def reached(starts: Iterable[T], onwards: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Each object that is reached from ``starts``, once; depth first, the last ones first.

    Args:
        starts: where the walk begins; they are reached.
        onwards: what one step from an object leads to.
    """
    stack = list(starts)
    seen: dict[int, T] = {}  # held, so that no other object comes to lie at its address
    while stack:
        a = stack.pop()
        if id(a) not in seen:
            seen[id(a)] = a
            yield a
            stack += onwards(a)


def thetas_below(value: Value, by_gradient: bool) -> Iterator[Theta]:
    """The thetas that ``value`` depends on; ``by_gradient``: those that a gradient of it may flow into."""

    def onwards(a: Any) -> Iterable[Any]:
        if isinstance(a, Value):
            t = a.ref() if a.ref and by_gradient else None
            return () if a.apart is not None or (t is not None and not t.requires_grad) else (a.entry,)
        if isinstance(a, Entry):
            passes = not by_gradient or (a.grad and a.op is not _DETACH)
            return (*a.args, *a.deps, *a.kwargs.values()) if passes else ()
        return (a.value,) if isinstance(a, Carried) else a if isinstance(a, tuple) else ()

    start: list[Any] = [value]
    return (a for a in reached(start, onwards) if isinstance(a, Theta))


@dataclass(slots=True, eq=False, repr=False)
class Number:
    """A Python number that may differ between otherwise equal steps."""

    value: float


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


# -- whose memory a value lies in, and which calls write into it -----------------------------------------------------

# Views that autograd takes for tensors of their own.
_SHARING = {
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten._unsafe_view.default,
}


def changed(entry: Entry) -> list[Any]:
    """What a call changes in place."""
    return written(entry.op, entry.args, entry.kwargs, object)


def identity(ref: Any) -> Any:
    """Equal for what stands for the same tensor."""
    return (id(ref.entry), ref.index) if isinstance(ref, Value) else id(ref)


def origin(entry: Entry) -> Any:
    """What a call is given that its results lie in the memory of; None where that is their own."""
    into = changed(entry)
    if len(into) == 1:
        return into[0]
    shares = entry.op is again or entry.op in _SHARING or getattr(entry.op, "is_view", False)
    return entry.args[0] if shares else None


def owner(ref: Any, inside: Callable[[Entry], bool] = lambda entry: True) -> Any:
    """What made the memory that ``ref`` lies in, as far back as calls are ``inside``."""
    while isinstance(ref, Value) and inside(ref.entry) and (of := origin(ref.entry)) is not None:
        ref = of
    return ref
