"""The inner gradient of a step, and the update that it goes into: one way for every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.traces.slices import globals_read, hook_key
from metaoptim.compiler.ir.update import TransformPlan, UpdatePlan
from metaoptim.compiler.ir.values import Spy
from metaoptim.compiler.passes.build import GradientHooks
from metaoptim.errors import LossError, MetaOptimError, WindowError

from ..networks import Networks
from .hyper import Hyper
from .transform import Transform

if TYPE_CHECKING:
    from ..session import Session


class InnerOptimizer(torch.optim.Optimizer):
    """What a window asks of an optimizer that steps in it: the base of `metaoptim.MetaOptimizer`."""

    first_order: bool
    symbolic: bool  # made while a function is captured, with which it ends
    _networks: list[nn.Module]
    _whole: list[nn.Module | None]  # per group, the module all of whose parameters are in it
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
    def transforms(self) -> list[Transform]:
        """What is done to the inner gradients before the update, in order."""
        raise NotImplementedError

    @property
    def networks(self) -> list[nn.Module]:
        """The networks, in the order they were given."""
        return list(self._networks)

    @property
    def whole_networks(self) -> list[nn.Module]:
        """Those that are groups of their own, with all of their parameters."""
        return [network for network in self._whole if network is not None]

    def reads(self) -> tuple[Any, ...]:
        """What the update finds outside of its arguments, as it is now: numbers, texts and tensors by name."""
        return globals_read(type(self).update)

    def refresh(self) -> bool:
        """Look again at networks that are groups of their own; whether their parameters are others than they were."""
        raise NotImplementedError


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


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


def added(known: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums of gradients; None where there is neither."""
    pairs = zip(known, grads, strict=True)
    return [g if k is None else k if g is None else k + g for k, g in pairs]


def sums_of_gradients(loss: Tensor, by: list[list[Tensor]]) -> list[Tensor | None]:
    """For each group of tensors, the sum of the gradients of ``loss`` by them."""
    flat = [t for group in by for t in group]
    found = iter(gradient(loss, flat, retain_graph=True))
    sums: list[Tensor | None] = []
    for group in by:
        parts = [g for _, g in zip(group, found, strict=False) if g is not None]
        sums.append(sum(parts[1:], parts[0]) if parts else None)
    return sums


class Update(NamedTuple):
    """The update of a step, of the parameters that its loss has a gradient by."""

    ordinals: list[int]
    grads: list[Tensor]
    hooks: tuple[tuple, ...]  # for each, the hooks on the user's own parameter that change its gradient
    states: list[dict[str, Tensor]]  # before the update
    plan: UpdatePlan
    hyper_values: list[Any]  # the values of the plan's hyper-references


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
    transforms = _transforms(name, hyper, networks, members, ordinals)
    if any(t.check is not None for t, _ in transforms):
        _check(name, transforms, inner, [networks.shown[i].detach() for i in ordinals], hyper.hyper_values)
    initial = prepare is not None and prepare(ordinals)
    states = [dict(optimizer.state[networks.originals[i]]) for i in ordinals]
    if prepare is None:
        initial = not all(states)
    init = type(optimizer).init_state if initial else None
    group_of = tuple([k for _, k, _ in used])
    plans = tuple([plan for _, plan in transforms])
    names, update = tuple(map(tuple, states)), type(optimizer).update
    plan = UpdatePlan(update, hyper.groups, group_of, names, plans, init, optimizer.reads())
    return Update(ordinals, inner, hooks, states, plan, hyper.hyper_values)


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


def _transforms(
    name: str, hyper: Hyper, networks: Networks, members: list[tuple[int, int]], ordinals: list[int]
) -> list[tuple[Transform, TransformPlan]]:
    """The transforms that act on gradients by these parameters, and how."""
    found: list[tuple[Transform, TransformPlan]] = []
    for k, (transform, values) in enumerate(hyper.transforms):
        places = None
        if transform.mask is not None:
            matched = {i for i, _ in members if transform.matches(networks.names[i])}
            if not matched:
                names = ", ".join(repr(networks.names[i]) for i, _ in members)
                raise WindowError(
                    f"{name}.transforms[{k}]: the mask {transform.mask!r} matches none of the parameters, whose names "
                    f"are {names}; a pattern is that of a whole name, as '*.bias'"
                )
            places = tuple([at for at, i in enumerate(ordinals) if (i in matched) is not transform.inverted])
        if places != ():
            found.append(
                (transform, TransformPlan(transform.apply, hook_key(transform.apply), values, places))
            )
    return found


@torch.no_grad()
def _check(
    name: str,
    transforms: list[tuple[Transform, TransformPlan]],
    grads: list[Tensor],
    thetas: list[Tensor],
    hyper_values: list[Any],
) -> None:
    """Raise for gradients that a transform is not to be given."""
    for transform, plan in transforms:
        at = range(len(grads)) if plan.places is None else plan.places
        wrong = transform.check and transform.check([grads[i] for i in at], plan.filled(hyper_values))
        if wrong:
            raise LossError(f"{name}.step: {wrong}")
        grads = plan(grads, thetas, hyper_values)
