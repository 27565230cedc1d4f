"""From a loss to the part of the recording it depends on, and to the signature equal steps share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, TypeGuard

from torch import Tensor

from ..operators import INDEXING, Function, is_named, is_operator, is_several, op_info
from ..tensors import memory_key
from ..values import (
    Carried,
    Entry,
    External,
    Number,
    Spy,
    Theta,
    Value,
    changed,
    identity,
    is_removed,
    origin,
)

Token = tuple[Any, ...]
_PLAIN = (int, float, str, bytes, bool, type(None), Tensor)


class Keyed:
    """Calls, in the order they were made, and their structure: what equal steps share."""

    indexed = False  # whether indices that may differ from step to step are `Number`s already

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.number_of = {id(e): i for i, e in enumerate(entries)}
        self.numbers: list[float] = []  # values of those that may be lifted
        # for each hooked value, the hooks that changed their gradient (known once they have run)
        self.hooks: dict[Token, list[Spy]] = {}
        self.spies: list[Spy] = []  # all hooks met
        self.values: list[Value] = []  # all values met
        self.opaque = False  # whether custom Functions or hooks occur (the step is then checked every time)

    def token(self, a: Any) -> Any:
        """A hashable stand-in for one argument: ("v", entry, output), ("n", k), ("()", ...) or a constant."""
        if isinstance(a, Value):
            where = ("v", self.number_of[id(a.entry)], a.index)
            self.values.append(a)
            if a.hooks:
                self._note_hooks(where, a.hooks)
            return where
        if isinstance(a, Number):
            self.numbers.append(a.value)
            return ("n", len(self.numbers) - 1)
        if isinstance(a, tuple):
            return ("()", *map(self.token, a))  # pyright: ignore[reportUnknownArgumentType]
        if is_named(a):
            return ("d", tuple((k, self.token(v)) for k, v in a.items()))
        if isinstance(a, float):
            return ("c", a.hex())  # -0.0 is not 0.0, and nan is nan
        if isinstance(a, int):
            return ("c", type(a), a)
        return a

    def memory_of(self, ref: Any) -> Any:
        """Equal for what may share memory, as far back as these calls go."""
        raise NotImplementedError

    @functools.cached_property
    def written(self) -> dict[Any, int]:
        """Memory that is written -> the place of the last call that does."""
        return {self.memory_of(ref): i for i, e in enumerate(self.entries) for ref in changed(e)}

    def _note_hooks(self, where: Token, hooks: list[tuple[Any, Spy]]) -> None:
        if where not in self.hooks:
            spies = [spy for handle, spy in hooks if not is_removed(handle)]
            self.spies += spies
            # one that has not run lies where only the meta-gradient passes
            changing = [spy for spy in spies if spy.returned or not spy.ran]
            if changing:
                self.hooks[where] = changing

    def hook_keys(self) -> Token:
        """What the hooks do, and where."""
        self.opaque |= bool(self.hooks)
        return tuple((at, tuple(hook_key(s.hook) for s in spies)) for at, spies in self.hooks.items())

    def entry_keys(self) -> tuple[Token, ...]:
        """What each call does to what: operator, tokens of its arguments, grad mode, shapes that values decide."""
        return tuple([self._entry_key(e) for e in self.entries])

    def _entry_key(self, entry: Entry) -> Token:
        op, args = entry.op, None
        if is_operator(op):
            what: Any = id(op)  # it is never forgotten, and its hash is a call of Python
            if op_info(op).particular:
                args = self._lift_index(entry)
        else:
            what = op
            self.opaque |= isinstance(op, Function)
        if args is None:
            args = tuple(self.token(a) for a in entry.args)
        kwargs = tuple((k, self.token(v)) for k, v in entry.kwargs.items()) if entry.kwargs else ()
        return (what, args, kwargs, entry.grad, entry.shape)

    def _lift_index(self, entry: Entry) -> Token | None:
        """The arguments of an index that is a number of the step, not of its program: it may be another in each step.

        In the place of the view there is then a copy, which will do where nobody writes into its memory after it.
        """
        if entry.op not in INDEXING or self.indexed:
            return None
        source, dim, start, *end = entry.args
        if self.written and self.written.get(self.memory_of(source), -1) > self.number_of[id(entry)]:
            return None
        token = self.token(source)
        self.numbers.append(start)
        where = (token, dim, ("n", len(self.numbers) - 1))
        return (*where, len(range(start, *end)), end[1]) if end else where


def restored(token: Any, found: Callable[[Token], Any]) -> Any:
    """The argument that `Keyed.token` has made ``token`` of; ``found``: values, inputs and numbers by their tokens."""
    if not is_several(token):
        return token
    kind, *parts = token
    if kind == "()":
        return tuple([restored(t, found) for t in parts])
    if kind == "d":
        return {k: restored(t, found) for k, t in parts[0]}
    if kind == "c":
        return float.fromhex(parts[0]) if len(parts) == 1 else parts[1]
    return found(tuple(token))


class Slice(Keyed):
    """The ancestor slice of some roots, its leaves numbered in the order they are met.

    Args:
        roots: values, externals and numbers.
        aliases: id of a tensor -> the theta it stands for (parameters of a network adopted by this very step).
        carry: whether values carried over from before another step of the super-step are followed.
    """

    def __init__(self, roots: list[Any], aliases: dict[int, Theta], carry: bool) -> None:
        super().__init__(_ancestors(roots, carry))
        self.aliases, self.carry = aliases, carry
        self.thetas: list[Theta] = []  # versions of theta tensors read
        self.consistent = True  # no theta tensor was read in two versions
        # place among the thetas -> other tensors that were shown for the same version and read
        self.twins: dict[int, list[Tensor]] = {}
        self.externals: list[External] = []  # tensors read from outside
        self._theta_at: dict[int, int] = {}
        self._external_at: dict[int, int] = {}
        body = self.entry_keys()
        self.roots = tuple(self.token(r) for r in roots)
        specs = tuple((x.held.spec, x.grad) for x in self.externals)
        self.key = (body, self.roots, specs, self.hook_keys())  # everything but `numbers`

    def _resolved(self, a: Any) -> Any:
        """What stands for ``a`` in this very step."""
        if isinstance(a, Carried):
            a = a.value if self.carry else a.external
        if isinstance(a, Value) and a.apart is not None:
            a = a.apart
        if isinstance(a, External) and self.aliases:
            return self.aliases.get(id(a.tensor), a)
        return a

    def token(self, a: Any) -> Any:
        """A hashable stand-in for one argument: ("v", entry, output), ("t", k), ("x", k), ("n", k) or a constant."""
        if type(a) is int:  # most are one of these
            return ("c", int, a)
        if a is None or (type(a) is Value and a.apart is None):
            return super().token(a)
        a = self._resolved(a)
        if isinstance(a, External):
            at = self._external_at.setdefault(id(a), len(self.externals))
            if at == len(self.externals):
                self.externals.append(a)
            return ("x", at)
        if isinstance(a, Theta):
            at = self._theta_at.setdefault(a.index, len(self.thetas))
            if at == len(self.thetas):
                self.thetas.append(a)
            elif (known := self.thetas[at]).tensor is not a.tensor:
                if known.version is not a.version or known.hooks or a.hooks:
                    self.consistent = False
                elif all(t is not a.tensor for t in self.twins.setdefault(at, [])):
                    self.twins[at].append(a.tensor)
            where = ("t", at)
            if a.hooks:
                self._note_hooks(where, a.hooks)
            return where
        return super().token(a)

    def memory_of(self, ref: Any) -> Any:
        """Equal for what may share memory: tensors from outside are seen to."""
        while isinstance(ref := self._resolved(ref), Value) and (of := origin(ref.entry)) is not None:
            ref = of
        t = None if isinstance(ref, Value) else ref.source if isinstance(ref, External) else ref.tensor
        # one from outside that is gone is written into by this name alone
        return identity(ref) if t is None else memory_key(t)


def _ancestors(roots: list[Any], carry: bool) -> list[Entry]:
    found: dict[int, Entry] = {}
    stack = list(roots)
    while stack:
        a = stack.pop()
        if isinstance(a, tuple):
            stack.extend(a)  # pyright: ignore[reportUnknownArgumentType]
            continue
        if isinstance(a, Carried) and carry:
            a = a.value
        if isinstance(a, Value) and a.apart is None:
            a = a.entry
        if isinstance(a, Entry) and id(a) not in found:
            found[id(a)] = a
            stack.extend(a.args)
            stack.extend(a.deps)
            if a.kwargs:
                stack.extend(a.kwargs.values())
    return sorted(found.values(), key=lambda e: e.seq)


def closed_over(hook: Any) -> list[Any]:
    """What a hook refers to besides its argument and globals."""
    found: list[Any] = []
    while _is_partial(hook):
        found += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    code = getattr(hook, "__func__", hook)
    found += [c.cell_contents for c in getattr(code, "__closure__", None) or ()]
    return found + [*(getattr(code, "__defaults__", None) or ())]


def hook_key(hook: Any) -> Any:
    """What must be equal for two hooks to do the same: code, whose method it is, defaults, and what they read."""
    over, names = closed_over(hook), list[str]()
    while _is_partial(hook):
        names += hook.keywords
        hook = hook.func
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    owner = id(getattr(hook, "__self__", None))
    return (code or id(hook), owner, *names, *map(_cell_key, over), *globals_read(hook))


def globals_read(function: Any, seen: frozenset[Any] = frozenset()) -> tuple[Any, ...]:
    """Numbers, texts and tensors that a function, and those that it calls, find in their modules now, by name.

    What torch and this package define does not change.
    """
    function = getattr(function, "__func__", function)
    if (
        not isinstance(function, FunctionType)
        or function in seen
        or is_of_torch(function.__globals__.get("__name__"))
    ):
        return ()
    found: list[Any] = []
    seen |= {function}
    for name in _names(function.__code__):
        value = function.__globals__.get(name, _PLAIN)
        if isinstance(value, FunctionType):
            found += globals_read(value, seen)
        elif isinstance(value, _PLAIN):
            found.append((function.__module__, name, _cell_key(value)))
    return tuple(found)


def is_of_torch(module: str | None) -> bool:
    """Whether a module is one of torch or of this package."""
    return (module or "").partition(".")[0] in ("torch", __name__.partition(".")[0])


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """What a function and those inside it may look up by name."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _is_partial(hook: Any) -> TypeGuard[functools.partial[Any]]:
    return isinstance(hook, functools.partial)


def _cell_key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    return hook_key(value) if callable(value) and hasattr(value, "__code__") else ("object", id(value))
