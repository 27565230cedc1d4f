"""What a recording or a trace is made of: calls, their values, and what stands for what they read from outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from metaoptim.errors import CaptureError, user_location

from .operators import aten, is_several, written
from .step import again
from .tensors import TensorSpec, tensor_spec
from .weak import ByStorage, WeakTable

T = TypeVar("T")
_DETACH = aten.detach.default


def version_of(t: Tensor) -> int:
    """The version counter of a tensor; inference tensors have none."""
    return 0 if t.is_inference() else t._version


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """One recorded call."""

    op: Any
    args: tuple[Any, ...]  # with what stands for tensors in their place
    kwargs: dict[str, Any]
    epoch: Epoch  # when; of no account in a trace
    seq: int  # its place in the order of calls
    deps: tuple[Entry, ...]  # earlier calls that have written into memory that it reads
    grad: bool  # whether grad mode was on
    shape: tuple[Any, ...] | None = None  # of its results, where they depend on values


@dataclass(slots=True, eq=False, repr=False)
class Value:
    """An output of an entry (the only one if ``index`` is None)."""

    entry: Entry
    index: int | None
    ref: Any = None  # weak reference to the tensor; in a trace, its spec
    hooks: list[tuple[Any, Spy]] | None = None  # of the tensor, with their handles
    # What steps read in its place, where autograd itself must see all of its gradient (a hook, retain_grad).
    apart: External | None = None
    steps: tuple[int, ...] = ()  # tape positions of the steps that have read it
    suspect: bool = False  # see `External`


@dataclass(slots=True, eq=False, repr=False)
class Number:
    """A Python number that may differ between otherwise equal steps."""

    value: float


# -- a window's recording --------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False, repr=False)
class Theta:
    """A version of one theta tensor: its state index, and the tensor the networks show for it."""

    index: int
    tensor: Tensor
    version: object  # equal for tensors that were shown for the same value
    hooks: list[tuple[Any, Spy]] | None = None  # of the tensor, with their handles
    suspect: bool = False  # it was overwritten behind autograd's back, which may have saved it


@dataclass(slots=True, eq=False, repr=False)
class Epoch:
    """The stretch of user code between two changes of theta."""

    position: int  # the tape position whose state the networks show
    superstep: int  # ordinal of the super-step it was opened in
    theta: dict[int, Theta]  # by the id of the tensor that the networks show
    writes: ByStorage[list[Entry]] = field(default_factory=lambda: ByStorage())  # in-place calls, in order
    # What stands for tensors read from outside, by their id.
    externals: WeakTable[External] = field(default_factory=lambda: WeakTable())
    apart: ByStorage[bool] = field(default_factory=lambda: ByStorage())  # memory of values that are set apart
    read: bool = False  # whether any theta has been read in it


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
    """A tensor that came from outside what is recorded, as it was read."""

    __slots__ = ("_source", "tensor", "version", "grad", "held", "written", "suspect", "__weakref__")

    def __init__(self, tensor: Tensor, held: Hold) -> None:
        self._source = weakref.ref(tensor)  # calls that write into it would keep it alive, and it them
        self.version = version_of(tensor)
        self.grad = tensor.requires_grad  # whether it could carry a gradient then
        # where its gradient goes: the source, or a copy with the history that the source had when it was read
        self.tensor = tensor if self.grad else None
        self.held = held
        self.written = False  # whether recorded in-place calls go into it: it is read anew from the recording
        self.suspect = (
            False  # whether its memory may have changed behind autograd's back, which may have saved it
        )

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
    """Each object that ``starts`` lead to, themselves included, once; depth first, the last ones first."""
    stack = list(starts)
    seen: dict[int, T] = {}  # held, so that no other object comes to lie at its address
    while stack:
        a = stack.pop()
        if id(a) not in seen:
            seen[id(a)] = a
            yield a
            stack += onwards(a)


def parents(a: Any) -> Iterable[Any]:
    """What a value, a call or a tuple of arguments comes from directly."""
    if isinstance(a, Value):
        return () if a.apart is not None else (a.entry,)
    if isinstance(a, Entry):
        return (*a.args, *a.deps, *a.kwargs.values())
    return (a.value,) if isinstance(a, Carried) else a if is_several(a) else ()


def is_cut(entry: Entry) -> bool:
    """Whether no gradient goes on from the results of a call to what it was given."""
    return not entry.grad or entry.op is _DETACH


def reaches_theta(value: Value) -> bool:
    """Whether a gradient of ``value`` may flow into theta."""

    def onwards(a: Any) -> Iterable[Any]:
        if isinstance(a, Value):
            t = a.ref and a.ref()
            if t is not None and not t.requires_grad:
                return ()
        return () if isinstance(a, Entry) and is_cut(a) else parents(a)

    start: list[Any] = [value]
    return any(isinstance(a, Theta) for a in reached(start, onwards))


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


# -- what a trace reads from outside ---------------------------------------------------------------------------------


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
    """Random numbers, drawn whenever the program runs."""

    op: Any  # takes a generator: it makes them, or fills a tensor in place
    args: tuple[Any, ...]  # what it is given besides, all numbers and options
    kwargs: dict[str, Any]
    spec: TensorSpec  # of the tensor they are
    tasks: int | None = None  # how many are drawn one after the other, and stacked
    grad: ClassVar[bool] = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two steps to draw alike."""
        return (self.op, self.args, self.tasks, tuple(sorted(self.kwargs.items(), key=lambda kv: kv[0])))


@dataclass(slots=True, eq=False, repr=False)
class ScanItem:
    """What one iteration of `window.scan` sees of a tensor: its slice at ``position`` along the leading axis."""

    source: Input
    position: int

    @property
    def spec(self) -> TensorSpec:
        """That of the slice."""
        return self.source.spec.row

    @property
    def grad(self) -> bool:
        """Whether it can carry a gradient."""
        return self.source.grad


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
    return entry.args[0] if shares_memory(entry.op) else None


def shares_memory(op: Any) -> bool:
    """Whether the result of a call lies in the memory of its first argument."""
    return op is again or op in _SHARING or getattr(op, "is_view", False)


def owner(ref: Any, inside: Callable[[Entry], bool] = lambda entry: True) -> Any:
    """What made the memory that ``ref`` lies in, as far back as calls are ``inside``."""
    while isinstance(ref, Value) and inside(ref.entry) and (of := origin(ref.entry)) is not None:
        ref = of
    return ref
