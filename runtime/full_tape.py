"""The full tape: plain eager PyTorch with `create_graph=True`. The oracle, and the way out for what cannot be recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from metaoptim.errors import WindowError

from ..compiler.capture.recorder import Recorder
from ..compiler.update import UpdatePlan, clip_gradients
from .bridge import as_parameter
from .session import Options, Session


class _Show(torch.autograd.Function):
    """A tensor as a parameter of its own, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return as_parameter(value.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class FullTapeSession(Session):
    """A window whose inner steps stay on autograd's tape."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.recorder = Recorder(self, record=False)
        self._versions: list[list[Tensor]] = []  # what the networks have shown, oldest first

    def _enter(self, ordinals: list[int], late: bool) -> None:
        for i in ordinals:
            p = self.networks.originals[i]
            with torch.enable_grad():
                shown = _Show.apply(p) if self.options.offline else as_parameter(p.detach().clone()).requires_grad_()
            self.networks.show(i, shown)
        if late and self._versions:
            raise WindowError("an optimizer of another thread joined a full_tape window late; make it in its own thread")
        before = [list(self.networks.originals)] if late else []
        self._versions += [*before, list(self.networks.shown)]

    def _step(self, optimizer: Any, loss: Tensor, allow_unused: bool) -> None:
        ordinals = self.ordinals(optimizer)
        thetas = self._read_by(loss, ordinals)
        grads = self.gradients(optimizer, loss, ordinals, thetas, not optimizer.first_order, allow_unused)
        used = [(i, g) for i, g in zip(ordinals, grads, strict=True) if g is not None]
        hook = self.options.backward_hook
        group_of = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        originals = [self.networks.originals[i] for i, _ in used]
        with torch.enable_grad():
            inner = []
            for _, g in used:
                if hook is not None and g.requires_grad:
                    g = g.view_as(g)
                    g.register_hook(hook)
                inner.append(g)
            states = []
            for (i, _), p in zip(used, originals, strict=True):
                state = optimizer.state[p]
                if not state:
                    state.update(optimizer.init_state(self.networks.shown[i].detach(), optimizer.param_groups[group_of[id(p)]]))
                states.append(dict(state))
            if optimizer._normalizer is not None:
                inner = clip_gradients(inner, *optimizer._normalizer[:2])
            groups = tuple(tuple((k, group[k]) for k in optimizer.defaults) for group in optimizer.param_groups)
            plan = UpdatePlan(type(optimizer).update, groups, tuple(group_of[id(p)] for p in originals),
                              tuple(map(tuple, states)))
            new, new_states = plan.run([self.networks.shown[i] for i, _ in used], inner, states, ())
            shown = [_Show.apply(value) if value.requires_grad else as_parameter(value).requires_grad_() for value in new]
        for (i, _), p, value, state in zip(used, originals, shown, new_states, strict=True):
            optimizer.state[p] = state
            self.networks.show(i, value)
        self._versions.append(list(self.networks.shown))

    def _read_by(self, loss: Tensor, ordinals: list[int]) -> list[Tensor]:
        """The newest version of the optimizer's parameters that the loss depends on."""
        newest = [self._versions[-1][i] for i in ordinals]
        for version in reversed(self._versions):
            thetas = [version[i] if i < len(version) else newest[k] for k, i in enumerate(ordinals)]
            found = torch.autograd.grad(loss, thetas, retain_graph=True, allow_unused=True)
            if any(g is not None for g in found):
                return thetas
        return newest

    def _close(self) -> None:
        self._versions.clear()

    # -- the recorder's guard ------------------------------------------------------------------------------------

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        """Ordinals of the parameters about to be overwritten."""
        storages = {t.untyped_storage()._cdata: i for i, t in enumerate(self.networks.shown)}
        hit = [storages[s] for t in targets if (s := t.untyped_storage()._cdata) in storages]
        if hit and torch.is_grad_enabled() and any(t.requires_grad for t in targets):
            raise WindowError(f"parameter {self.networks.names[hit[0]]!r} was changed in place by {op} with grad mode on; "
                              "wrap the change in torch.no_grad()")
        return hit

    def after_write(self, hit: list[int]) -> None:
        """A history cut: the overwritten parameters are new leaves."""
        with self.recorder.paused(), enable_reentrant_dispatch():
            for i in hit:
                shown = self.networks.shown[i]
                if not shown.is_leaf:
                    shown.detach_()
                    shown.requires_grad_()
