"""`wrap`: any `torch.optim.Optimizer` as the inner one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaoptim.compiler.derive.flat import tracing
from metaoptim.errors import CaptureError, WindowError, warn
from metaoptim.runtime.windows.session import Session
from metaoptim.runtime.windows.updates.schedule import Schedule

from ..adam import MetaAdam
from ..base.groups import NO_OPTIONS, Given
from ..base.hyper import has_values, plain
from ..optimizer import MetaOptimizer, Params, Transforms
from ..rmsprop import MetaRMSprop
from ..sgd import MetaSGD
from .captured import HOW, INSTEAD, Source, State, as_tensors, initial, step, step_of, widened
from .examined import base, examine_options, examined, surroundings

_REFUSED = {
    torch.optim.LBFGS: "its step takes the loss several times",
    torch.optim.SparseAdam: "inner gradients are dense; use torch.optim.Adam",
}


_REST_OF_DOC = """
    Args:
        params: list of `nn.Module` (one parameter group each), or of dicts ``{{"params": module, "lr": ...}}``; with
            ``networks``, dicts may list some of their parameters. The others are meta-parameters.
        lr: learning rate. Like every number here it may be a tensor, and then receives a meta-gradient.
        **options: those of `torch.optim.{theirs}`, with its defaults. ``foreach``, ``fused``, ``capturable`` and
            ``differentiable``, which say how torch runs a step, are kept for ``state_dict`` and mean nothing here.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward.
        transforms: what is done to the inner gradients first, in order (`metaoptim.transforms`).

    Raises:
        ValueError: for what `torch.optim.{theirs}` refuses, or overlapping parameters.

    Example:
        >>> net, lr = torch.nn.Linear(2, 1, bias=False), torch.tensor(0.1, requires_grad=True)
        >>> inner = metaoptim.{ours}([net], lr=lr)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> lr.grad.shape
        torch.Size([])
    """


def _check_numbers(name: str, hyper: dict[str, Any]) -> None:
    """Raise for tensors that a step of a complex parameter would take for those of its real and imaginary parts."""
    for key, value in hyper.items():
        if isinstance(value, Tensor) and value.dim():
            raise WindowError(
                f"{name}: {key!r} is a tensor of shape {tuple(value.shape)}, and a parameter is complex; expected a "
                "scalar. MetaSGD, MetaAdam and MetaRMSprop take one number for each entry of a complex parameter"
            )


class Wrapped(MetaOptimizer):
    """An inner optimizer whose update is the step of a `torch.optim.Optimizer`: see `wrap`."""

    source: ClassVar[Source]

    def __init_subclass__(
        cls, of: type[torch.optim.Optimizer] | Source | None = None, **options: Any
    ) -> None:
        super().__init_subclass__(**options)
        if of is None:
            return
        source = cls.source = of if isinstance(of, Source) else Source(of)
        cls.torch_class = source.cls

        def init_state(param: Tensor, hyper: dict[str, Any]) -> State:
            """The state of a parameter before its first step."""
            return initial(source, param, hyper)

        def update(param: Tensor, grad: Tensor, state: State, hyper: dict[str, Any]) -> tuple[Tensor, State]:
            """One step for one parameter."""
            if not isinstance(of, type):
                examine_options(source, param.shape, hyper)
            if param.is_complex():
                _check_numbers(cls.__name__, hyper)
            return step(source, param, grad, state, hyper)

        cls.init_state, cls.update = staticmethod(init_state), staticmethod(update)
        for function in (init_state, update):
            function.__qualname__ = f"{cls.__name__}.{function.__name__}"
        if not isinstance(of, Source):
            cls.__signature__ = _signature(of, cls.extra)
            rest = _REST_OF_DOC.format(theirs=of.__name__, ours=cls.__name__)
            cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{rest}"
            _named[of] = cls

    def __init__(
        self,
        params: Params = None,
        *args: Any,
        networks: Iterable[nn.Module] | None = None,
        first_order: bool = False,
        transforms: Transforms = (),
        **options: Any,
    ) -> None:
        extra = {name: options.pop(name, default) for name, default in self.extra.items()}
        given = inspect.signature(self.source.cls).bind(None, *args, **options).arguments
        given.pop("params")
        defaults = self._defaults(given) | extra
        super().__init__(params, defaults, networks=networks, first_order=first_order, transforms=transforms)

    def _defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options with their defaults, after torch's own checks of them."""
        cls = self.source.cls
        learnt = {k for k, v in given.items() if any(isinstance(n, (Tensor, Schedule)) for n in _flat(v))}
        usual = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
        defaults: dict[str, Any] = {}
        for least in (True, False):
            numbers = {k: _number(v, usual[k], least) if k in learnt else v for k, v in given.items()}
            with tracing():
                defaults = cls([torch.zeros(1, 1, requires_grad=True)], **numbers).defaults
        for name in learnt:
            if name not in defaults:
                raise TypeError(
                    f"{type(self).__name__}: {name} got a tensor, expected a number: it is no option of groups"
                )
            defaults[name] = given[name]
        return defaults

    def _stepping_in(self, name: str, allow_unused: bool) -> Session:
        """As the base, for steps that the optimizer's own step can take."""
        ours = type(self).__name__
        for counted, _ in self.source.counted:
            if allow_unused or self._lags(counted):
                raise ValueError(
                    f"{ours}.step: {self.source.cls.__name__} counts steps in its groups ({counted!r}), also for "
                    "parameters without a gradient, and each must take part in all steps of its group or in none: "
                    "step without allow_unused=True (add 0 times a parameter to the loss), and freeze and unfreeze "
                    "none on the way"
                )
        if self.reads() != self.source.surroundings:
            raise CaptureError(
                f"{ours}.step: a global or an attribute of the class that {self.source.cls.__name__}.step reads has "
                "changed since it was wrapped; make it an option of the groups, or wrap the optimizer anew"
            )
        return super()._stepping_in(name, allow_unused)

    def reads(self) -> tuple[Any, ...]:
        """As the base: what the optimizer's own step reads."""
        return () if self.source.cls in _named else surroundings(self.source.cls)

    def _lags(self, name: str) -> bool:
        """Whether a parameter takes part in a group's steps from now on only, or not any more."""
        for group in self.param_groups:
            counted = {name in self.state.get(p, {}) for p in group["params"] if p.requires_grad}
            frozen = any(name in self.state.get(p, {}) for p in group["params"] if not p.requires_grad)
            if frozen or len(counted) > 1:
                return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, detached; loads into the torch optimizer."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            states = [packed["state"][n] for n in group["params"] if n in packed["state"]]
            group |= {name: first for name, first in self.source.counted if first is not None}
            for state in states:
                if self.source.cls in _named and "step" in state:
                    state["step"] = state["step"].float()  # as torch keeps it
                state.update({name: _count(state[name]) for name in self.source.numbers if name in state})
                group |= {name: _count(state.pop(name)) for name, _ in self.source.counted if name in state}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this or the torch optimizer."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            counts = {name: group.pop(name) for name, _ in self.source.counted if name in group}
            for p in group["params"]:
                self.state[p].update(_loaded(self.source.cls, self.state[p], counts, p))

    def _built(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = object.__new__(self.source.cls)
        torch.optim.Optimizer.__init__(made, groups, {k: plain(v) for k, v in self.defaults.items()})
        made.__dict__.update(self.source.attributes)
        return made


_BY_HAND: dict[type[torch.optim.Optimizer], type[MetaOptimizer]] = {
    torch.optim.SGD: MetaSGD,
    torch.optim.Adam: MetaAdam,
    torch.optim.RMSprop: MetaRMSprop,
}
_named: dict[type[torch.optim.Optimizer], type[Wrapped]] = {}


def wrap(
    optimizer: torch.optim.Optimizer,
    networks: Iterable[nn.Module],
    *,
    first_order: bool = False,
    transforms: Transforms = (),
) -> MetaOptimizer:
    """The inner optimizer with the update, groups, hyper-parameters and state of a `torch.optim.Optimizer`.

    θ', s' = Υ(∇_θ L, θ, s, η), where Υ is captured from the optimizer's own ``step``, once for tensors alike. Every
    number in its groups may be a tensor, and then receives a meta-gradient. The derivative of a square root at exactly
    0 is taken as 0. The optimizer given is not changed, and not used any more.

    Args:
        optimizer: configured, of torch or of another library. Its step must compute with tensors alone, each parameter
            by itself. This is checked here, on random numbers, for those of other libraries.
        networks: the modules its parameters belong to.
        first_order: take the inner gradient as a constant in the meta-backward.
        transforms: what is done to the inner gradients first, in order (`metaoptim.transforms`).

    Returns:
        A `MetaOptimizer`; one of the named classes (`MetaAdamW`) for those of torch.

    Raises:
        TypeError: for `torch.optim.LBFGS` and `torch.optim.SparseAdam`, or what is no optimizer.
        CaptureError: for a step that cannot be captured exactly: by what it decides, or keeps.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = metaoptim.wrap(torch.optim.AdamW(net.parameters(), lr=0.1), [net])
        >>> decay = inner.param_groups[0]["weight_decay"] = torch.tensor(0.1, requires_grad=True)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> decay.grad.shape
        torch.Size([])
    """
    cls = type(optimizer)
    if isinstance(optimizer, MetaOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"wrap: got {cls.__name__}, expected a torch.optim.Optimizer")
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise TypeError(f"wrap: {cls.__name__} cannot be an inner optimizer: {reason}")
    _refuse_hooks(optimizer)
    if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        warn(
            f"wrap: a scheduler sets the rates of this {cls.__name__}, and not those of what wrap returns; build it on "
            "that: inner = metaoptim.wrap(...), scheduler = StepLR(inner, ...)"
        )
    groups = [dict(g) for g in optimizer.param_groups]
    by_hand = _BY_HAND.get(cls)
    if by_hand is not None:
        made = _by_hand(by_hand, optimizer, groups, networks, first_order=first_order, transforms=transforms)
        if made is not None:
            made.given = Given.of(optimizer)
            return made
    made_by = _named.get(cls) or _class_for(optimizer, groups)
    counted = [name for name, _ in made_by.source.counted]
    defaults = dict(optimizer.defaults)
    for group in groups:
        defaults |= {k: v for k, v in group.items() if k not in NO_OPTIONS and k not in defaults}
    for name in counted:
        defaults.pop(name, None)
    counts = [{name: g.pop(name) for name in counted if name in g} for g in groups]
    inner = made_by.__new__(made_by)
    MetaOptimizer.__init__(
        inner, groups, defaults, networks=networks, first_order=first_order, transforms=transforms
    )
    for group, count in zip(inner.param_groups, counts, strict=True):
        for p in group["params"]:
            if state := _loaded(cls, optimizer.state.get(p, {}), count, p):
                inner.state[p] = state
    inner.given = Given.of(optimizer)
    return inner


def _loaded(cls: type, state: Mapping[str, Any], counts: Mapping[str, Any], param: Tensor) -> State:
    """The state of a parameter as tensors of its own, with the counts of its group."""
    there = {k: v for k, v in state.items() if v is not None}
    own = {k: v.detach().clone() for k, v in as_tensors(cls, {**there, **counts}).items()}
    return widened(own, param)


def _by_hand(
    cls: type[MetaOptimizer],
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    networks: Iterable[nn.Module],
    **options: Any,
) -> MetaOptimizer | None:
    """The optimizer written here, which is faster; None where it lacks an option that is used."""
    known = inspect.signature(cls).parameters
    beyond = {k: v for g in groups for k, v in g.items() if k not in {*known, *NO_OPTIONS, *HOW} and v}
    if beyond:
        return None
    ours = [{k: v for k, v in g.items() if k in known or k in NO_OPTIONS} for g in groups]
    inner = cls(ours, networks=networks, **options)
    inner.load_state_dict({**optimizer.state_dict(), "param_groups": inner.state_dict()["param_groups"]})
    return inner


def _refuse_hooks(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise TypeError(
            f"wrap: {name} has hooks of its steps, which act on .grad, where no inner gradient is; give wrap "
            "transforms=[...] (metaoptim.transforms), or register hooks on what wrap returns"
        )
    if step_of(optimizer) is not step_of(type(optimizer)):
        raise TypeError(
            f"wrap: {name} has a step of its own, set on the instance, expected that of its class; write it in a "
            "subclass"
        )


def _class_for(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> type[Wrapped]:
    """That of another library's optimizer, which is examined first."""
    cls = type(optimizer)
    attributes = tuple((k, _hashable(v)) for k, v in vars(optimizer).items() if k not in base())
    sizes = tuple(tuple(p.shape for p in g["params"]) for g in groups)
    options = tuple(
        tuple((k, _hashable(plain(v))) for k, v in g.items() if k not in NO_OPTIONS) for g in groups
    )
    return _class_of(examined(Source(cls, attributes, surroundings(cls)), sizes, options))


@functools.lru_cache(maxsize=256)
def _class_of(source: Source) -> type[Wrapped]:
    name = f"Meta{source.cls.__name__}"
    return type(name, (Wrapped,), {"__doc__": f"`{source.cls.__qualname__}` inside a window."}, of=source)


def _count(value: Tensor) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _number(value: Any, usual: Any, least: bool) -> Any:
    """The least or the largest number in a hyper-parameter; its default where it has no value yet."""
    if isinstance(value, (tuple, list)):
        return tuple(_number(v, u, least) for v, u in zip(value, usual, strict=True))
    if isinstance(value, Schedule) or (isinstance(value, Tensor) and not has_values()):
        return usual
    return (
        float(value.detach().min() if least else value.detach().max()) if isinstance(value, Tensor) else value
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    try:
        hash(value)
    except TypeError:
        raise CaptureError(
            f"wrap: the optimizer holds {value!r}, expected numbers, names and functions; {INSTEAD}"
        ) from None
    return value


def _signature(of: type[torch.optim.Optimizer], extra: dict[str, Any]) -> inspect.Signature:
    parameters = list(inspect.signature(of).parameters.values())
    parameters[0] = parameters[0].replace(default=None, annotation=Params)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = {**extra, "networks": None, "first_order": False, "transforms": ()}
    return inspect.Signature([*parameters, *(inspect.Parameter(k, kind, default=v) for k, v in more.items())])
