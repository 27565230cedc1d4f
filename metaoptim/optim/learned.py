"""MetaLearned: an inner optimizer whose update rule is a module, whose weights are meta-parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from metaoptim.compiler.ir.update import checked_result, checked_state
from metaoptim.errors import WindowError

from .base.hyper import Number, check_non_negative
from .base.parts import by_parts, parts
from .optimizer import MetaOptimizer, Params


class MetaLearned(MetaOptimizer):
    """A learned optimizer: the step of each parameter is what a module makes of its gradient.

    (Andrychowicz et al. 2016, arXiv 1606.04474, section 2.)

    θ' = θ - η d, where (d, s') = rule(θ, g, s).

    The weights of the rule are meta-parameters: a backward through the window gives each its gradient, and every step
    reads them as they are then. The rule is `PerParameterRule`, `PerTensorRule`, or any module with two methods:

    - ``init_state(param)`` returns the state of a parameter before its first step: a dictionary of tensors by name,
      ``{}`` for none.
    - ``forward(param, grad, state)`` returns (d, state'): d of the shape of ``param``, and a dictionary with every name
      of ``state``, maybe more.

    Both are called once for each parameter tensor, of whatever shape, and are pure: what the next step needs is state,
    not an attribute. Buffers are constants. Dropout and batch norm must be in evaluation mode.

    Args:
        params: list of `nn.Module` (one parameter group each), or of dicts ``{"params": module, "lr": ..., "rule":
            ...}``; with ``networks``, dicts may list some of their parameters. None: all of ``networks``.
        rule: the module, none of whose parameters is in the networks.
        lr: η, a number or a tensor, which then receives a meta-gradient.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward.

    Raises:
        TypeError: for a rule that is no module, or lacks a method.
        ValueError: for a negative lr, overlapping parameters, or a rule that shares some with a network.

    Example:
        >>> net, rule = torch.nn.Linear(2, 1), metaoptim.PerParameterRule(hidden=8)
        >>> inner = metaoptim.MetaLearned([net], rule, lr=0.1)
        >>> outer = torch.optim.Adam(rule.parameters())
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     for _ in range(3):
        ...         inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> outer.step()
    """

    def __init__(
        self,
        params: Params,
        rule: nn.Module,
        lr: Number = 1e-3,
        *,
        networks: Iterable[nn.Module] | None = None,
        first_order: bool = False,
    ) -> None:
        check_non_negative(lr=lr)
        super().__init__(params, dict(lr=lr, rule=rule), networks=networks, first_order=first_order)

    def add_param_group(self, param_group: nn.Module | dict[str, Any]) -> None:  # type: ignore[override]
        """Add a network, or parameters of those that are known: as one element of the constructor's list."""
        given = param_group if isinstance(param_group, dict) else {}
        _check_rule(given.get("rule", self.defaults["rule"]))
        super().add_param_group(param_group)

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """What the rule says."""
        rule = hyper["rule"]
        return checked_state(f"{type(rule).__name__}.init_state", rule.init_state(parts(param)))

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step for one parameter."""
        if param.is_complex():
            return by_parts(MetaLearned.update, param, grad, state, hyper)
        rule = hyper["rule"]
        name = f"{type(rule).__name__}.forward"
        step, new = checked_result(name, "the step of the parameter", state, rule(param, grad, state))
        if step.shape != param.shape:
            raise WindowError(
                f"{name}: got a step of shape {tuple(step.shape)} for a parameter of shape {tuple(param.shape)}, which "
                "must be its shape"
            )
        return param - hyper["lr"] * step, new


def _check_rule(rule: Any) -> None:
    contract = "see metaoptim.MetaLearned, or take metaoptim.PerParameterRule()"
    if not isinstance(rule, nn.Module):
        raise TypeError(
            f"MetaLearned: got {rule!r} as the rule, expected an nn.Module with the methods init_state(param) and "
            f"forward(param, grad, state): {contract}"
        )
    name = type(rule).__name__
    if not callable(getattr(rule, "init_state", None)):
        raise TypeError(
            f"MetaLearned: the rule {name} has no method init_state(param), which returns the state before the first "
            f"step, as a dictionary of tensors by name ({{}} for none): {contract}"
        )
    if type(rule).forward is nn.Module.forward and "forward" not in vars(rule):
        raise TypeError(
            f"MetaLearned: the rule {name} has no method forward(param, grad, state), which returns the step and the "
            f"new state: {contract}"
        )
