"""The inner gradient of a step, and the update that it goes into: one way for every strategy."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.update import Clip, HyperRef, UpdatePlan
from metaoptim.compiler.ir.values import Number, Spy
from metaoptim.compiler.passes.build import GradientHooks
from metaoptim.errors import LossError, MetaOptimError

from .networks import Networks

if TYPE_CHECKING:
    from .session import Session

_NUMBERS = (int, float, Tensor)


class InnerOptimizer(Protocol):
    """What a window asks of an optimizer that steps in it.

    Attributes:
        symbolic: whether it was made while a function is captured.
        _normalizer: largest norm, order of the norm, whether a norm that is not finite is an error.
        _tape: what ``record_grad_tape`` keeps.
        _session: the window that it is in use by.
    """

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    first_order: bool
    symbolic: bool
    _normalizer: tuple[Any, float, bool] | None
    _tape: list[tuple[str, Tensor]]
    _session: Session | None

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """Parameter -> its state by name."""
        ...

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that its parameters belong to."""
        ...

    @property
    def whole_networks(self) -> list[nn.Module]:
        """Those of which it trains every parameter."""
        ...

    @staticmethod
    def init_state(param: Tensor, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        ...

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The new parameter and its new state."""
        ...

    def refresh(self) -> bool:
        """Look again at the parameters of whole networks."""
        ...


class Hyper(NamedTuple):
    """An optimizer's hyper-parameters: what is constant, and what a step is given.

    Attributes:
        groups: per parameter group, names with constants and `HyperRef`s.
        clip: clipping of the gradient, or None.
        slots: the values that the references stand for.
        roots: what stands for these values in a recording.
    """

    groups: tuple
    clip: Clip | None
    slots: list[Any]
    roots: list[Any]


def hyper_of(optimizer: InnerOptimizer, value_of: Callable[[Tensor], Any], lifts: bool) -> Hyper:
    """The hyper-parameters of ``optimizer`` as they are now.

    Args:
        optimizer: an inner optimizer.
        value_of: what stands for a tensor in the recording.
        lifts: whether numbers may become inputs of the step.
    """
    slots: list[Any] = []
    roots: list[Any] = []

    def template(value: Any) -> Any:
        if isinstance(value, Tensor):
            roots.append(value_of(value))
        elif type(value) is float and value != 0 and lifts:
            roots.append(Number(value))
        elif isinstance(value, (tuple, list)):
            return tuple([template(v) for v in value])
        else:
            return value
        slots.append(value)
        return HyperRef(len(slots) - 1)

    for k, group in enumerate(optimizer.param_groups):
        for name, default in optimizer.defaults.items():
            if type(default) in _NUMBERS and not isinstance(group[name], (int, float, Tensor)):
                raise TypeError(
                    f"{type(optimizer).__name__}: param_groups[{k}][{name!r}] is {group[name]!r}, expected a number or "
                    "a tensor"
                )
    groups = tuple(
        tuple((name, template(group[name])) for name in optimizer.defaults)
        for group in optimizer.param_groups
    )
    normalizer = optimizer._normalizer
    clip = None if normalizer is None else Clip(template(normalizer[0]), normalizer[1])
    return Hyper(groups, clip, slots, roots)


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
    """The update of a step, of the parameters that its loss has a gradient by.

    Attributes:
        ordinals: of these parameters.
        grads: the inner gradient by them.
        hooks: for each, the hooks on the user's own parameter that change its gradient.
        states: the optimizer states before the update.
        plan: what it does.
        slots: the values of the plan's hyper-references.
    """

    ordinals: list[int]
    grads: list[Tensor]
    hooks: tuple[tuple, ...]
    states: list[dict[str, Tensor]]
    plan: UpdatePlan
    slots: list[Any]


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
    """The update by an inner gradient, with the complaints that a user understands.

    Hooks on the user's own parameters are applied, as the backward of a training loop would.

    Args:
        optimizer: takes the step.
        networks: of its window.
        members: its `trained` parameters.
        grads: the gradient by each of them; None where the loss does not depend on one.
        hyper: its hyper-parameters.
        allow_unused: whether there may be such parameters: they keep their values.
        create_graph: whether the gradient is to be differentiated.
        prepare: is told the ordinals of the parameters that are updated, and gives them initial states where it can;
            whether others are part of the update. All of them are if nobody prepares.
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
