"""The inner gradient of a step, and the update that it goes into: one way for every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.modules import take_apart
from metaoptim.compiler.ir.update import Clip, HyperRef, ModuleRef, UpdatePlan
from metaoptim.compiler.ir.values import Number, Spy
from metaoptim.compiler.passes.build import GradientHooks
from metaoptim.errors import LossError, MetaOptimError

from .networks import Networks

if TYPE_CHECKING:
    from .session import Session

_NUMBERS = (int, float, Tensor)


class InnerOptimizer(torch.optim.Optimizer):
    """What a window asks of an optimizer that steps in it: the base of `metaoptim.MetaOptimizer`."""

    first_order: bool
    symbolic: bool  # made while a function is captured, with which it ends
    _networks: list[nn.Module]
    _whole: list[nn.Module | None]  # per group, the module all of whose parameters are in it
    _normalizer: tuple[Any, float, bool] | None  # largest norm, its order, whether one not finite is an error
    _tape: list[tuple[str, Tensor]]  # what ``record_grad_tape`` keeps
    _session: Session | None  # the window that it is in use by

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """The optimizer state of a parameter before its first step, by name."""
        raise NotImplementedError

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``(param', state')``; pure, and differentiable by ``param``, ``grad``, ``state`` and tensors in ``hyper``."""
        raise NotImplementedError

    @property
    def networks(self) -> list[nn.Module]:
        """The networks, in the order they were given."""
        return list(self._networks)

    @property
    def whole_networks(self) -> list[nn.Module]:
        """Those that are groups of their own, with all of their parameters."""
        return [network for network in self._whole if network is not None]

    def refresh(self) -> bool:
        """Look again at networks that are groups of their own; whether their parameters are others than they were."""
        raise NotImplementedError


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Hyper(NamedTuple):
    """An optimizer's hyper-parameters: what is constant, and what a step is given."""

    groups: tuple  # per parameter group, names with constants and `HyperRef`s
    clip: Clip | None
    slots: list[Any]  # the values that the references stand for
    roots: list[Any]  # what stands for the values in a recording


def hyper_of(optimizer: InnerOptimizer, value_of: Callable[[Tensor], Any], lifts: bool) -> Hyper:
    """The hyper-parameters as they are now; ``lifts``: whether numbers may become inputs of the step."""
    slots: list[Any] = []
    roots: list[Any] = []

    def template(value: Any) -> Any:
        if isinstance(value, Tensor):
            roots.append(value_of(value))
        elif type(value) is float and value != 0 and lifts:
            roots.append(Number(value))
        elif isinstance(value, (tuple, list)):
            return tuple([template(v) for v in value])
        elif isinstance(value, nn.Module):
            form, tensors = take_apart(value)
            return ModuleRef(form, tuple([template(t) for t in tensors]))
        else:
            return value
        slots.append(value)
        return HyperRef(len(slots) - 1)

    groups: list[tuple] = []
    defaults = optimizer.defaults.items()
    for k, group in enumerate(optimizer.param_groups):
        found = []
        for name, default in defaults:
            value = group[name]
            if type(default) in _NUMBERS and not isinstance(value, _NUMBERS):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {value!r}, expected a number or "
                    "a tensor"
                )
            if isinstance(default, nn.Module) and not isinstance(value, nn.Module):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {value!r}, expected an nn.Module"
                )
            found.append(
                (name, value if value is None or type(value) in (bool, int, str) else template(value))
            )
        groups.append(tuple(found))
    normalizer = optimizer._normalizer
    clip = None if normalizer is None else Clip(template(normalizer[0]), normalizer[1])
    return Hyper(tuple(groups), clip, slots, roots)


def gradient(*args: Any, **options: Any) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of an inner loss, whose errors tell that they are of it."""
    try:
        return torch.autograd.grad(*args, allow_unused=True, **options)
    except (MetaOptimError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        freed = "second time" in str(error)
        raise LossError(
            "the graph of the inner loss has been freed by a backward: inner.step(loss) takes the gradient of the loss "
            "itself. Take loss.backward() before it out, or, if it is an outer loss too, say retain_graph=True"
            if freed
            else f"the gradient of the inner loss cannot be taken: {error}"
        ) from error


class Update(NamedTuple):
    """The update of a step, of the parameters that its loss has a gradient by."""

    ordinals: list[int]
    grads: list[Tensor]
    hooks: tuple[tuple, ...]  # for each, the hooks on the user's own parameter that change its gradient
    states: list[dict[str, Tensor]]  # before the update
    plan: UpdatePlan
    slots: list[Any]  # the values of the plan's hyper-references


def trained(optimizer: InnerOptimizer, networks: Networks) -> list[tuple[int, int]]:
    """Ordinals of an optimizer's trainable parameters, in order of its groups, each with the number of its group."""
    return [
        (i, k)
        for k, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if (i := networks.index_of(p)) is not None
    ]


def update_by(
    optimizer: InnerOptimizer,
    networks: Networks,
    members: list[tuple[int, int]],
    grads: Sequence[Tensor | None],
    hyper: Hyper,
    *,
    allow_unused: bool,
    create_graph: bool = False,
    prepare: Callable[[list[int]], bool] | None = None,
) -> Update:
    """The update by an inner gradient (None for parameters that the loss does not depend on).

    Hooks on the user's own parameters are applied, as the backward of a training loop would. ``prepare`` gives initial
    states to the parameters that are updated (by ordinal), where it can; it returns whether others are part of the
    update. All of them are if nobody prepares.
    """
    name = type(optimizer).__name__
    used: list[tuple[int, int, Tensor]] = []
    unused = []
    for (i, k), g in zip(members, grads, strict=True):
        if g is None:
            unused.append(networks.names[i])
            continue
        if g.layout is not torch.strided:
            raise LossError(
                f"{name}.step: the gradient of {networks.names[i]!r} is sparse; use sparse=False in its module"
            )
        used.append((i, k, g))
    if not used:
        raise LossError(
            f"{name}.step: the loss does not depend on the parameters of this optimizer's networks; "
            "compute it inside the window, from the networks as they are now"
        )
    if unused and not allow_unused:
        raise LossError(
            f"{name}.step: the loss does not depend on {', '.join(map(repr, unused))}; if that is meant, "
            "pass allow_unused=True: they keep their values"
        )
    ordinals, hooked = [i for i, *_ in used], [networks.originals[i]._backward_hooks for i, *_ in used]
    inner, hooks = _through_hooks([g for *_, g in used], hooked, create_graph)
    normalizer = optimizer._normalizer
    if normalizer is not None and normalizer[2]:
        norm = nn.utils.get_total_norm([g.detach() for g in inner], normalizer[1])
        if not bool(torch.isfinite(norm)):
            raise LossError(
                f"{name}.step: the norm of the inner gradient is {float(norm)} and error_if_nonfinite is "
                "set; fix the loss or clip without it"
            )
    initial = prepare is not None and prepare(ordinals)
    states = [dict(optimizer.state[networks.originals[i]]) for i in ordinals]
    if prepare is None:
        initial = not all(states)
    init = type(optimizer).init_state if initial else None
    group_of = tuple([k for _, k, _ in used])
    plan = UpdatePlan(
        type(optimizer).update, hyper.groups, group_of, tuple(map(tuple, states)), hyper.clip, init
    )
    return Update(ordinals, inner, hooks, states, plan, hyper.slots)


def _through_hooks(
    grads: list[Tensor], hooked: Sequence[Any], create_graph: bool
) -> tuple[list[Tensor], tuple[tuple, ...]]:
    """Gradients after the hooks on their parameters, and for each the hooks that have changed it."""
    changing: list[tuple] = [()] * len(grads)
    for k, hooks in enumerate(hooked):
        if hooks:
            spies = [Spy(hook) for hook in hooks.values()]
            with torch.set_grad_enabled(create_graph):
                grads[k] = GradientHooks(spies)(grads[k])
            changing[k] = tuple(spy.hook for spy in spies if spy.returned or spy.mutated)
    return grads, tuple(changing)
