"""Networks inside a window: which tensors they show as parameters, and how they get their own back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metaoptim.errors import WindowError


class Networks:
    """The modules a window has adopted.

    Attributes:
        originals: the user's own parameters, in order of adoption.
        names: a readable name for each.
        shown: what the modules show instead, in the same order.
    """

    def __init__(self) -> None:
        self.originals: list[nn.Parameter] = []
        self.names: list[str] = []
        self.shown: list[Tensor] = []
        self._index: dict[int, int] = {}
        self._places: list[list[tuple[nn.Module, str]]] = []
        self._modules: dict[int, nn.Module] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def index_of(self, parameter: Tensor) -> int | None:
        """The ordinal of one of the user's own parameters."""
        return self._index.get(id(parameter))

    def original(self, parameter: nn.Parameter) -> nn.Parameter:
        """The user's own parameter behind one that is shown."""
        for i, shown in enumerate(self.shown):
            if shown is parameter:
                return self.originals[i]
        return parameter

    def adopt(self, modules: Iterable[nn.Module]) -> list[int]:
        """Take modules in: their buffers are swapped for copies; the ordinals of parameters not known before."""
        new: list[int] = []
        copies: dict[int, Tensor] = {id(own): copy for _, _, own, copy in self._buffers}
        for root in modules:
            for prefix, module in root.named_modules():
                if id(module) in self._modules:
                    continue
                self._modules[id(module)] = module
                for name, p in module._parameters.items():
                    if p is None or not p.requires_grad:
                        continue
                    i = self._index.get(id(p))
                    if i is None:
                        i = self._index[id(p)] = len(self.originals)
                        self.originals.append(p)
                        self.names.append(f"{prefix}.{name}" if prefix else name)
                        self._places.append([])
                        self.shown.append(p)
                        new.append(i)
                    self._places[i].append((module, name))
                    module._parameters[name] = self.shown[i]  # type: ignore[assignment]
                for name, b in module._buffers.items():
                    if b is not None:
                        if id(b) not in copies:
                            copies[id(b)] = b.detach().clone()
                        self._buffers.append((module, name, b, copies[id(b)]))
                        module._buffers[name] = copies[id(b)]
        return new

    def show(self, i: int, value: Tensor) -> None:
        """Let the modules show ``value`` as parameter ``i``."""
        self.shown[i] = value
        for module, name in self._places[i]:
            module._parameters[name] = value  # type: ignore[assignment]

    def is_buffer(self, t: Tensor) -> bool:
        """Whether ``t`` is a buffer of the networks."""
        return any(m._buffers.get(name) is t for m, name, _, _ in self._buffers)

    def check(self) -> None:
        """Raise if a parameter was replaced behind our back."""
        for i, places in enumerate(self._places):
            shown = self.shown[i]
            for module, name in places:
                if module._parameters.get(name) is not shown:
                    raise WindowError(
                        f"parameter {self.names[i]!r} was bound to another tensor inside the window; change its values "
                        "instead (`with torch.no_grad(): p.copy_(...)` or load_state_dict), or rebind it outside"
                    )

    def restore(self) -> None:
        """Give every module its own parameters and buffers back."""
        for i, p in enumerate(self.originals):
            for module, name in self._places[i]:
                module._parameters[name] = p
        for module, name, own, _ in self._buffers:
            module._buffers[name] = own
        for module in self._modules.values():
            refresh: Any = getattr(module, "_init_flat_weights", None)  # torch's RNNs cache their weights
            if refresh is not None:
                refresh()

    @torch.no_grad()
    def commit(self, values: list[Tensor]) -> None:
        """Restore, with ``values`` and the last buffers copied into the user's own tensors."""
        last = [(own, module._buffers.get(name)) for module, name, own, _ in self._buffers]
        self.restore()
        for p, value in zip(self.originals, values, strict=True):
            p.copy_(value)
        for own, value in last:
            if value is not None and value is not own:
                own.copy_(value)

    def bind(self, fn: Callable) -> Callable:
        """``fn`` for the recomputation of activation checkpointing: it sees the parameters of now."""
        then = [
            (module, name, value)
            for places, value in zip(self._places, self.shown, strict=True)
            for module, name in places
        ]

        def bound(*args: Any, **kwargs: Any) -> Any:
            now = [(module, name, module._parameters.get(name)) for module, name, _ in then]
            for module, name, value in then:
                module._parameters[name] = value  # type: ignore[assignment]
            try:
                return fn(*args, **kwargs)
            finally:
                for module, name, value in now:
                    module._parameters[name] = value

        return bound
