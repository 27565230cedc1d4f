"""How an inner optimizer steps: by a loss, by the losses of chunks of a batch; and how it goes on from given values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaoptim.errors import WindowError
from metaoptim.runtime.engine.monitoring.times import part
from metaoptim.runtime.windows.session import Session, current_session
from metaoptim.runtime.windows.updates.update import InnerOptimizer

from .chunks import cut
from .groups import Given, check_misspelt, matching


class Stepping(InnerOptimizer):
    """What `MetaOptimizer` does in the window that is open."""

    given: Given | None = None  # by `wrap`

    def step(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        loss: Tensor | None = None,
        closure: Callable[[], Tensor] | None = None,
        allow_unused: bool = False,
    ) -> Tensor:
        """One inner step: θ' = Υ(∇_θ loss, θ, s).

        Args:
            loss: scalar that depends on the networks' parameters, computed inside the window.
            closure: computes the loss instead, as in `torch.optim`.
            allow_unused: let parameters that the loss does not depend on keep their values, instead of raising.

        Returns:
            The loss.

        Raises:
            WindowError: outside a window, or after a parameter was rebound.
            LossError: for a loss that is not a scalar, has no graph, or does not depend on the parameters.
            CaptureError: for a step that cannot be recorded exactly.
        """
        session = self._stepping_in("step", allow_unused)
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (loss,), {})
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session.step(self, loss, allow_unused)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (loss,), {})
        return loss  # type: ignore[return-value]

    def step_in_chunks(
        self,
        loss_fn: Callable[..., Tensor],
        *batch: Any,
        chunks: int,
        reduction: str = "mean",
        allow_unused: bool = False,
    ) -> Tensor:
        """One inner step by the loss of a batch that is computed in chunks: θ' = Υ(Σ_k w_k ∇_θ loss_k, θ, s).

        It is exact, as if the losses were added up and stepped by. The step, its replay and its derivative hold the
        activations of one chunk at a time; the derivative runs each chunk once more for it. Each chunk draws random
        numbers of its own, and batch norm sees one chunk at a time, as with accumulated gradients in any training loop.

        Args:
            loss_fn: scalar loss of a chunk; called with the arguments in ``batch``, of which tensors are cut. It reads
                the networks itself: not what was computed from them before.
            *batch: tensors with the examples along their first dimension, by themselves or in lists, tuples and dicts.
                They may require grad (weights of examples). Numbers, text and 0-dim tensors go to every chunk.
            chunks: how many, of sizes that differ by one at most.
            reduction: ``"mean"`` weighs the loss of each chunk by its share of the examples, so that a mean over
                examples becomes that of the whole batch. ``"sum"`` adds the losses up: for sums over examples, and for
                losses that are divided by a number of the whole batch (of tokens that are no padding, say).
            allow_unused: let parameters that no loss depends on keep their values, instead of raising.

        Returns:
            The loss of the batch, detached.

        Raises:
            WindowError: outside a window.
            TypeError, ValueError: for something else than a function, unlike numbers of examples, more chunks than
                examples, or another reduction.
            LossError: for a loss of a chunk that is not a scalar, has no graph, or reads a value that was computed from
                the parameters outside ``loss_fn``.

        Example:
            >>> net, x, y = torch.nn.Linear(2, 1), torch.randn(10, 2), torch.randn(10, 1)
            >>> inner = metaoptim.MetaSGD([net], lr=0.1)
            >>> with metaoptim.SlidingWindow(offline=True):
            ...     loss = inner.step_in_chunks(lambda x, y: (net(x) - y).square().mean(), x, y, chunks=4)
            ...     (net(x) - y).square().mean().backward()
            >>> loss.requires_grad, net.weight.grad is not None
            (False, True)
        """
        session = self._stepping_in("step_in_chunks", allow_unused)
        whole = cut(f"{type(self).__name__}.step_in_chunks", loss_fn, batch, chunks, reduction)
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (), {})
        with torch.enable_grad(), part("step"):
            loss = session.step_by_sum(self, whole.losses(), allow_unused)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (), {})
        return loss

    def _stepping_in(self, name: str, allow_unused: bool) -> Session:
        """The window that it is about to step in, by the method ``name``; raises where no step can be taken."""
        session = current_session()
        if session is None:
            raise WindowError(
                f"{type(self).__name__}.{name} was called outside a window; put the inner loop inside "
                "`with metaoptim.SlidingWindow(...):`"
            )
        check_misspelt(self)
        if self.given is not None:
            self.given.check(type(self).__name__)
        return session

    def start(self, values: Mapping[Any, Tensor]) -> None:
        """Begin at given values, or go on from them: parameters computed from meta-parameters, which get the gradient.

        Args:
            values: by the parameter's name in its network (or the parameter itself), a tensor like it. Parameters that
                are not named keep their values.

        Raises:
            WindowError: outside a window.
            TypeError: for something else than a dictionary.
            KeyError: for a name that no network has, or more than one.
            ValueError: for a tensor of another shape or dtype, or on another device.

        Example:
            >>> net, prototypes = torch.nn.Linear(2, 3, bias=False), torch.ones(3, 2, requires_grad=True)
            >>> inner = metaoptim.MetaSGD([net], lr=0.1)
            >>> with metaoptim.SlidingWindow(offline=True):
            ...     inner.start({"weight": 2 * prototypes})
            ...     inner.step(net(torch.ones(1, 2)).square().sum())
            ...     net(torch.ones(1, 2)).square().sum().backward()
            >>> prototypes.grad.shape, net.weight.grad
            (torch.Size([3, 2]), None)
        """
        session = current_session()
        if session is None:
            raise WindowError(
                f"{type(self).__name__}.start was called outside a window; call it in the block"
            )
        session.start(self, matching(self, values), list(values.values()))

    # torch's wrapper would open a profiler range per step, which costs more than the step's own bookkeeping
    step.hooked = True  # type: ignore[attr-defined]
