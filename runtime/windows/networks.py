"""Networks inside a window: which tensors they show as parameters, and how they get their own back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from metaoptim.errors import WindowError


class Networks:
    """The modules of optimizers that may step in a window, and of those that do (`join`).

    Attributes:
        originals: the user's own parameters, in order of adoption.
        names: a readable name for each.
        shown: what the modules show instead, in the same order.
        joined: ordinals of the parameters of optimizers that belong to the window.
    """

    def __init__(self) -> None:
        self.originals: list[nn.Parameter] = []
        self.names: list[str] = []
        self.shown: list[Tensor] = []
        self.joined: set[int] = set()
        self.recomputes = False  # whether a backward may run modules again
        self._index: dict[int, int] = {}
        self._at: dict[int, int] | None = (
            None  # memory of what is shown -> its ordinal; None to be found anew
        )
        self._places: list[list[tuple[nn.Module, str]]] = []
        self._modules: dict[int, nn.Module] = {}
        self._inner: set[int] = set()  # ids of modules of optimizers that belong to the window
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []  # with the user's own tensor
        self._copies: dict[int, Tensor] = {}  # id of a buffer of the user -> what the modules show
        self._frozen: dict[int, tuple[nn.Parameter, nn.Module]] = {}  # memory -> what no step trains
        self._lazy: dict[int, str] = {}  # id of a module -> its buffer that was not there at entry
        self._backups: list[tuple[nn.Parameter, nn.Module, Tensor]] = []
        self._read = WeakIdKeyDictionary()  # running statistics that autograd has saved

    def index_of(self, parameter: Tensor) -> int | None:
        """The ordinal of one of the user's own parameters."""
        return self._index.get(id(parameter))

    def trains(self, t: Tensor) -> bool:
        """Whether ``t`` is one of the user's own parameters that inner optimizers train, or shown for one."""
        return id(t) in self._index or any(t is shown for shown in self.shown)

    def at(self, t: Tensor) -> int | None:
        """The ordinal of the parameter shown in whose memory ``t`` lies."""
        if self._at is None:
            self._at = {t.untyped_storage()._cdata: i for i, t in enumerate(self.shown)}
        return self._at.get(t.untyped_storage()._cdata)

    def original(self, parameter: nn.Parameter) -> nn.Parameter:
        """The user's own parameter behind one that is shown."""
        found = (own for own, shown in zip(self.originals, self.shown, strict=True) if shown is parameter)
        return next(found, parameter)

    def strange(self, network: nn.Module, among: Collection[int] | None = None) -> Iterator[str]:
        """Names of trainable parameters (``among`` these ids) that the window neither shows nor has adopted."""
        known = {*self._index, *map(id, self.shown)}
        for name, p in network.named_parameters():
            if p.requires_grad and id(p) not in known and (among is None or id(p) in among):
                yield name

    def adopt(self, modules: Sequence[nn.Module], trained: Collection[int]) -> list[int]:
        """Take modules in, with copies of their buffers; the ordinals of parameters not known before.

        Args:
            modules: networks of an optimizer.
            trained: ids of the parameters that it trains.

        Raises:
            WindowError: for what inner steps cannot keep; nothing has been taken in then.
        """
        new: list[int] = []
        _check_memory(modules)
        self._copy_buffers(modules)
        for prefix, module in (named for root in modules for named in root.named_modules()):
            known = id(module) in self._modules
            self._modules[id(module)] = module
            for name, p in module._parameters.items():
                if p is None or (known and any(p is s for s in self.shown)):
                    continue
                if isinstance(p, UninitializedParameter):  # a lazy module makes it at its first call
                    continue
                if not p.requires_grad:
                    self._frozen[p.untyped_storage()._cdata] = p, module
                elif id(p) in trained:
                    i = self._index.setdefault(id(p), len(self.originals))
                    if i == len(self.originals):
                        self.originals.append(p)
                        self.names.append(f"{prefix}.{name}" if prefix else name)
                        self._places.append([])
                        self.shown.append(p)
                        new.append(i)
                    self._places[i].append((module, name))
                    module._parameters[name] = self.shown[i]  # type: ignore[assignment]
            for name, b in module._buffers.items():
                if b is not None and not b.requires_grad and not known and not is_lazy(b):
                    self._buffers.append((module, name, b))
                    module._buffers[name] = self._copies[id(b)]
        return new

    def join(self, modules: Sequence[nn.Module], parameters: Iterable[Tensor]) -> list[int]:
        """An optimizer belongs to the window from now on; the ordinals of its ``parameters`` that are adopted.

        Raises:
            WindowError: for a module with a buffer that was not there at entry, so that it cannot be put back.
        """
        inner = {id(m): m for root in modules for m in root.modules()}
        for key in inner.keys() & self._lazy.keys():
            raise WindowError(
                f"buffer {self._lazy[key]!r} of a {type(inner[key]).__name__} had no shape when the window opened; run "
                "the network once before the window, under torch.no_grad()"
            )
        self._inner.update(inner)
        ordinals = [i for p in parameters if (i := self._index.get(id(p))) is not None]
        self.joined.update(ordinals)
        for i in ordinals:
            self.shown[i].freeze = None  # type: ignore[attr-defined]
        return ordinals

    def _copy_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Copies of the modules' buffers, sharing memory with one another as the buffers do."""
        storages: dict[int, Any] = {}
        weights = {
            p.untyped_storage()._cdata: n
            for m in modules
            for n, p in m.named_parameters()
            if not isinstance(p, UninitializedParameter)
        }
        for module in (m for root in modules for m in root.modules() if id(m) not in self._modules):
            for name, b in module._buffers.items():
                if b is None or b.requires_grad or id(b) in self._copies:  # a learnt one is a meta-parameter
                    continue
                if is_lazy(b):
                    self._lazy.setdefault(id(module), name)
                    continue
                if b.layout is not torch.strided:
                    self._copies[id(b)] = b.detach().clone()
                    continue
                storage = b.untyped_storage()
                if storage._cdata in weights:
                    raise WindowError(
                        f"buffer {name!r} shares memory with parameter {weights[storage._cdata]!r}, which inner steps "
                        "replace; register a clone of it"
                    )
                if storage._cdata not in storages:
                    storages[storage._cdata] = storage.clone()
                at: Any = storages[storage._cdata], b.storage_offset(), b.shape, b.stride()
                with torch.no_grad():
                    self._copies[id(b)] = b.new_empty(0).set_(*at)

    def show(self, i: int, value: Tensor) -> None:
        """Let the modules show ``value`` as parameter ``i``."""
        self.shown[i], self._at = value, None
        if i not in self.joined:
            value.freeze = functools.partial(_freeze, weakref.ref(self), i)  # type: ignore[attr-defined]
        for module, name in self._places[i]:
            module._parameters[name] = value  # type: ignore[assignment]

    @contextmanager
    def showing(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block the modules have ``parameters``, by ordinal, and the window's buffers."""
        now = [(m, name, m._parameters.get(name)) for places in self._places for m, name in places]
        self._place(parameters)
        try:
            yield
        finally:
            for module, name, value in now:
                module._parameters[name] = value
            self._refresh()

    def bind(self, fn: Callable) -> Callable:
        """``fn`` for the recomputation of activation checkpointing: it sees the parameters of now."""
        then, self.recomputes = list(self.shown), True

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.showing(then):
                return fn(*args, **kwargs)

        return bound

    def _place(self, parameters: Sequence[Tensor]) -> None:
        for places, p in zip(self._places, parameters, strict=False):  # those that came later have none yet
            for module, name in places:
                module._parameters[name] = p  # type: ignore[assignment]
        self._refresh()

    def _refresh(self) -> None:
        for module in self._modules.values():
            refresh: Any = getattr(module, "_init_flat_weights", None)  # torch's RNNs cache their weights
            if refresh is not None:
                refresh()

    def is_buffer(self, t: Tensor) -> bool:
        """Whether ``t`` is a buffer of the networks."""
        return any(m._buffers.get(name) is t for m, name, _ in self._buffers)

    def buffers_of(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
        """The buffers as they are, with their places."""
        inside = {id(m) for root in modules for m in root.modules()}
        now = [(m, name, m._buffers.get(name)) for m, name, _ in self._buffers if id(m) in inside]
        return [(m, name, b) for m, name, b in now if b is not None]

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        """The running statistics for a batch norm to use: fresh ones if autograd has saved these.

        Batch norm in eval mode lets autograd save them, in training mode overwrites them without telling it.
        """
        if not training:
            if torch.is_grad_enabled():
                self._read.update((s, None) for s in stats)
            return list(stats)
        return [self._renew(s) if s in self._read else s for s in stats]

    def _renew(self, buffer: Tensor) -> Tensor:
        places = [(m, name) for m, name, _ in self._buffers if m._buffers.get(name) is buffer]
        if not places:
            raise WindowError(
                "running statistics that a batch norm in eval mode has used in a loss are about to be overwritten in "
                "training mode, and are no buffer of an inner network; give each of the two a clone"
            )
        new = buffer.clone()
        for module, name in places:
            module._buffers[name] = new
        return new

    def check(self) -> None:
        """Raise if a parameter that inner steps train was replaced behind our back."""
        for i in self.joined:
            shown = self.shown[i]
            for module, name in self._places[i]:
                if module._parameters.get(name) is not shown:
                    raise WindowError(
                        f"parameter {self.names[i]!r} was bound to another tensor inside the window; change its values "
                        "instead (`with torch.no_grad(): p.copy_(...)` or load_state_dict), or rebind it outside"
                    )

    def restore(self) -> None:
        """Give every module its own parameters and buffers back."""
        self._place(self.originals)
        for module, name, own in self._buffers:
            module._buffers[name] = own

    @property
    def copies(self) -> list[Tensor]:
        """The buffers that modules show in the place of the user's."""
        return list(self._copies.values())

    def back_up(self, targets: list[Tensor]) -> list[Tensor]:
        """``targets`` are about to be overwritten: copies, kept, of frozen parameters that `undo` must put back."""
        copies = []
        for t in targets if self._frozen else ():
            found = self._frozen.pop(t.untyped_storage()._cdata, None) if t.layout is torch.strided else None
            if found is not None:
                copies.append(found[0].detach().clone())
                self._backups.append((*found, copies[-1]))
        return copies

    @torch.no_grad()
    def undo(self) -> None:
        """Put frozen parameters back that were written into."""
        for p, _, value in self._backups:
            p.copy_(value)

    @torch.no_grad()
    def commit(self, values: Sequence[Tensor], offline: bool) -> None:
        """Restore, with ``values`` and the last buffers copied into the user's own tensors.

        Args:
            values: of the parameters.
            offline: whether networks that belong to the window are put back as they were at entry instead.
        """
        back = self._inner if offline else set()
        last = [(module, name, own, module._buffers.get(name)) for module, name, own in self._buffers]
        placed = [(m, name, i) for i, places in enumerate(self._places) for m, name in places]
        bound = [(m, name, p) for m, name, i in placed if (p := m._parameters.get(name)) is not self.shown[i]]
        self.restore()
        for module, name, value in bound:  # by the user, in a network that is none of this window's
            module._parameters[name] = value
        for i, (p, value) in enumerate(zip(self.originals, values, strict=True)):
            if self._places[i] and not (offline and i in self.joined):
                p.copy_(value)
        for p, module, value in self._backups:
            if id(module) in back:
                p.copy_(value)
        for module, name, own, value in last:
            if id(module) in back:
                continue
            if value is None or (value.shape, value.dtype) != (own.shape, own.dtype):
                module._buffers[name] = None if value is None else value.detach()  # as rebinding it would
            else:
                own.copy_(value)


def _freeze(ref: weakref.ref[Networks], i: int) -> None:
    """Parameter ``i``, of no optimizer that belongs to the window, is frozen: it is the user's own again."""
    networks = ref()
    if networks is not None:
        own = networks.originals[i]
        own.requires_grad_(False)
        for module, name in networks._places[i]:
            module._parameters[name] = own
            networks._frozen[own.untyped_storage()._cdata] = own, module
        networks._places[i] = []
        del networks._index[id(own)]


def _check_memory(modules: Sequence[nn.Module]) -> None:
    """Raise if two parameters overlap in memory: inner steps would tear them apart."""
    seen: dict[int, list[tuple[Any, Any, str, Tensor]]] = {}
    for root in modules:
        for name, p in root.named_parameters():
            if isinstance(p, UninitializedParameter) or p.layout is not torch.strided or not p.numel():
                continue
            sizes = zip(p.shape, p.stride(), strict=True)
            start: Any = p.storage_offset()
            end = start + 1 + sum((size - 1) * stride for size, stride in sizes)
            others = seen.setdefault(p.untyped_storage()._cdata, [])
            for low, high, other, q in others:
                if q is not p and start < high and low < end:
                    raise WindowError(
                        f"parameters {other!r} and {name!r} share memory, which inner steps cannot keep; let both "
                        "names hold the same nn.Parameter object (tying), or clone one"
                    )
            others.append((start, end, name, p))
