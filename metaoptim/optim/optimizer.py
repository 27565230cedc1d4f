"""The base of inner optimizers: torch.optim's interface over networks, and two pure functions per subclass."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from metaoptim.runtime.windows.session import current_session
from metaoptim.runtime.windows.updates.hyper import scheduled
from metaoptim.runtime.windows.updates.transform import Apply, Transform, as_transforms
from metaoptim.runtime.windows.updates.update import parameters_of

from .base.alive import live_optimizers
from .base.groups import check_network, group_of, own
from .base.hyper import Number, as_number, detached, is_symbolic, learned, plain
from .base.steps import Stepping
from .transforms import clip_global_norm

#: What an optimizer trains: networks, or groups (see `MetaOptimizer`).
Params: TypeAlias = Iterable[nn.Module | dict[str, Any] | Tensor | tuple[str, Tensor]] | None
#: What is done to inner gradients: of `metaoptim.transforms`, or functions ``(grads, params, hyper) -> grads``.
Transforms: TypeAlias = Iterable[Transform | Apply]
_numbers = itertools.count()


class MetaOptimizer(Stepping):
    """Base class: a subclass states `init_state` and `update`, both pure, and passes its defaults on.

    Args:
        params: list of `nn.Module`, one parameter group each, or of dicts ``{"params": module, **options}``; with
            ``networks``, dicts may list some of their parameters, as in `torch.optim`. The others are not trained:
            in a window they are meta-parameters.
        defaults: options of groups that do not set them.
        networks: modules that the parameters belong to; alone, all of their parameters, one group each.
        first_order: take the inner gradient as a constant in the meta-backward.
        transforms: what is done to the inner gradients before the update, in order: of `metaoptim.transforms`, or
            functions ``(grads, params, hyper) -> grads``.

    Attributes:
        transforms: the list of them, which may be changed, and set anew; it holds from the next step on.

    Example:
        >>> class SignSGD(metaoptim.MetaOptimizer):  # θ' = θ - lr tanh(s g)
        ...     def __init__(self, networks, lr=1e-3, sharpness=10.0):
        ...         super().__init__(networks, dict(lr=lr, sharpness=sharpness))
        ...     @staticmethod
        ...     def init_state(param, hyper):
        ...         return {}
        ...     @staticmethod
        ...     def update(param, grad, state, hyper):
        ...         return param - hyper["lr"] * torch.tanh(hyper["sharpness"] * grad), state
        >>> net, sharpness = torch.nn.Linear(2, 1), torch.tensor(3.0, requires_grad=True)
        >>> inner = SignSGD([net], lr=0.1, sharpness=sharpness)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> sharpness.grad.shape
        torch.Size([])
    """

    #: The torch optimizer that makes the same steps.
    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    #: Options that it does not know, with their defaults.
    extra: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("init_state", "update"):
            if isinstance(cls.__dict__.get(name), FunctionType):
                raise TypeError(
                    f"{cls.__name__}.{name}: got a method, expected a function without self; write @staticmethod "
                    "above it, and read hyper-parameters from its argument hyper"
                )

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        networks: Iterable[nn.Module] | None = None,
        first_order: bool = False,
        transforms: Transforms = (),
    ) -> None:
        for name in ("init_state", "update"):
            if getattr(type(self), name) is getattr(MetaOptimizer, name):
                raise TypeError(f"{type(self).__name__} states no {name}; write it, as in docs/optimizers.md")
        self._networks, self._whole, self._tape = [], [], []
        self._normalizer: Transform | None = None  # the one that `reset_grad_normalizer` has put among them
        self.transforms, self._session = transforms, None
        self.first_order, self.symbolic = first_order, is_symbolic()
        self.thread, self.number = threading.get_ident(), next(_numbers)
        for network in [networks] if isinstance(networks, nn.Module) else networks or ():
            self._add_network(network)
        if params is None and self._networks:
            params = list(self._networks)
        if isinstance(params, dict) and "params" not in params:
            params = list(params.items())  # named parameters
        given: list[Any] = [params] if isinstance(params, (nn.Module, dict)) else list(params or ())
        if not given:
            raise ValueError(
                f"{type(self).__name__}: got {params!r}, expected networks, as in {type(self).__name__}([net])"
            )
        if isinstance(given[0], (Tensor, tuple)):
            given = [{"params": given}]
        super().__init__([n if isinstance(n, dict) else {"params": n} for n in given], defaults)
        live_optimizers.add(self)
        session = current_session()
        if session is not None:
            session.join(self)

    @property
    def transforms(self) -> list[Transform]:
        """What is done to the inner gradients before the update, in order."""
        return self._transforms

    @transforms.setter
    def transforms(self, transforms: Transforms) -> None:
        self._transforms = as_transforms(transforms, type(self).__name__)

    # -- torch.optim's interface ---------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the ``.grad`` of the networks' own parameters (inner steps never write them)."""
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: nn.Module | dict[str, Any]) -> None:  # type: ignore[override]
        """Add a network, or parameters of those that are known: as one element of the constructor's list."""
        group, whole = group_of(self, param_group)
        super().add_param_group(group)
        self._whole.append(whole)
        session = current_session()
        if session is not None and self in live_optimizers:
            session.join(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, since it belongs to its networks; build one for "
            "the copy and load this one's state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, detached; loads into the optimizer of the same name there.

        Schedules are in it as numbers, their values of now, and the count that they are evaluated at. Modules among the
        options are left out: they have a `state_dict` of their own.
        """
        packed = super().state_dict()
        packed["state"] = {k: {n: detached(v) for n, v in s.items()} for k, s in packed["state"].items()}
        with torch.no_grad():
            now = scheduled(self)
        packed["param_groups"] = [
            {
                k: v if k == "params" else as_number(v, now)
                for k, v in g.items()
                if not isinstance(v, nn.Module)
            }
            for g in packed["param_groups"]
        ]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this or `torch.optim`'s optimizer of the same name.

        Hyper-parameters that require grad, schedules and modules stay the user's own: loading must not cut them
        off. Inside a window the load is a history cut: values change, the gradient stops here.

        Raises:
            ValueError: when groups do not match.
        """
        kept = [{k: v for k, v in g.items() if k != "params" and learned(v)} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, hyper in zip(self.param_groups, kept, strict=True):
            group.update(hyper)
            for k, v in self.defaults.items():
                group.setdefault(k, v)
            if isinstance(group.get("betas"), list):
                group["betas"] = tuple(group["betas"])
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, (int, float)):
                    state[name] = torch.tensor(float(value), dtype=torch.float64)
            if state.get("momentum_buffer", 0) is None:  # torch.optim.SGD before its first step
                del state["momentum_buffer"]

    def to_torch(self) -> torch.optim.Optimizer:
        """The torch optimizer with the same groups, numbers and state, over the networks' own parameters.

        Learnt hyper-parameters become their values; options that torch does not know (``eps_root``) are left out.

        Raises:
            TypeError: for an optimizer that torch does not have.

        Example:
            >>> net = torch.nn.Linear(2, 1)
            >>> inner = metaoptim.MetaAdamW([net], lr=0.1)
            >>> with metaoptim.SlidingWindow():
            ...     inner.step(net(torch.ones(1, 2)).square().sum())
            >>> type(inner.to_torch()).__name__, len(inner.to_torch().state)
            ('AdamW', 2)
        """
        packed = self.state_dict()  # schedules are numbers in it
        groups = [
            {k: plain(v) for k, v in values.items() if k not in self.extra}
            | {"params": list(group["params"])}
            for values, group in zip(packed["param_groups"], self.param_groups, strict=True)
        ]
        made = self._built(groups)
        for n, p in enumerate(parameters_of(self)):
            if packed["state"].get(n):
                made.state[p] = {
                    k: v.clone() if isinstance(v, Tensor) else v for k, v in packed["state"][n].items()
                }
        return made

    def _built(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.torch_class is None:
            raise TypeError(f"{type(self).__name__}.to_torch: torch has no optimizer of these steps")
        return cast(Callable[..., torch.optim.Optimizer], self.torch_class)(groups)

    # -- Meta-Optim's interface ----------------------------------------------------------------------------------

    def reset_grad_normalizer(
        self, max_norm: Number | None, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> None:
        """Clip inner gradients to a total norm, as `torch.nn.utils.clip_grad_norm_` would, differentiably.

        This is `metaoptim.transforms.clip_global_norm` at the end of `transforms`, in the place of the one before.

        Args:
            max_norm: largest norm of all the optimizer's gradients together; None switches clipping off.
            norm_type: p of the p-norm.
            error_if_nonfinite: raise `LossError` when the norm is not finite.
        """
        new = None if max_norm is None else clip_global_norm(max_norm, norm_type, error_if_nonfinite)
        transforms, old = self.transforms, self._normalizer
        at = next((i for i, t in enumerate(transforms) if t is old), len(transforms))
        transforms[at : at + 1] = [] if new is None else [new]
        self._normalizer = new

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the networks' parameters; under ``record_grad_tape`` also ``step_k:name``.

        ``step_k:name`` is the (detached) value that step k started from.
        """
        yield from self._tape
        for network in self._networks:
            yield from network.named_parameters()

    def _add_network(self, network: Any) -> None:
        check_network(self, network)
        if not any(n is network for n in self._networks):
            self._networks.append(network)

    def refresh(self) -> bool:
        """Look again at networks that are groups of their own; whether their parameters are others than they were.

        What was put in (a new head, adapters) is trained from now on, what was taken out is forgotten.
        """
        changed = False
        for group, whole in zip(self.param_groups, self._whole, strict=True):
            if whole is None:
                continue
            others = {id(p) for g in self.param_groups if g is not group for p in g["params"]}
            now = [p for p in map(own, whole.parameters()) if id(p) not in others]
            if list(map(id, now)) != list(map(id, group["params"])):
                changed = True
                group["params"][:] = now
        if changed:
            known = set(map(id, parameters_of(self)))
            for p in [p for p in self.state if isinstance(p, Tensor) and id(p) not in known]:
                del self.state[p]
        return changed
