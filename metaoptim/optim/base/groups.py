"""Parameter groups: which parameters of which networks an optimizer trains."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.modules import take_apart
from metaoptim.errors import WindowError
from metaoptim.runtime.windows.session import current_session
from metaoptim.runtime.windows.updates.update import InnerOptimizer, parameters_of

if TYPE_CHECKING:
    from ..optimizer import MetaOptimizer

# of a group: torch's own, and a name for the user
NO_OPTIONS = {"params", "param_names", "name", "initial_lr"}
_CLOSE = 0.85  # how alike a key and an option are where one is meant by the other
_ALSO = {"learning_rate": "lr", "wd": "weight_decay", "beta": "betas", "alpha": "lr"}


def check_network(optimizer: InnerOptimizer, network: Any) -> None:
    """Raise for what no optimizer can train: something else than a module, or one of torch.jit."""
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{type(optimizer).__name__}: got {type(network).__name__} among the networks, expected an nn.Module"
        )
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(optimizer).__name__}: {repr(name) if name else 'the network'} is scripted or traced by "
                "torch.jit, so that its parameters cannot be replaced; give the module it was made from"
            )


def group_of(optimizer: MetaOptimizer, given: Any) -> tuple[dict[str, Any], nn.Module | None]:
    """A parameter group of the user's own parameters, and the module all of whose parameters are in it."""
    cls = type(optimizer).__name__
    group = dict(given) if isinstance(given, dict) else {"params": given}
    for key in group.keys() - optimizer.defaults.keys() - NO_OPTIONS:
        raise _unknown(optimizer, key)
    params: Any = group.get("params")
    whole = params if isinstance(params, nn.Module) else None
    if whole is not None:
        optimizer._add_network(whole)
        params = list(whole.parameters())
    elif isinstance(params, dict):
        params = list(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, (Tensor, str, nn.Module)):
        params = list(params)
    else:
        params = [params]
    if whole is None and params and isinstance(params[0], tuple):
        group["param_names"] = [name for name, _ in params]
        params = [p for _, p in params]
    other = [type(p).__name__ for p in params if not isinstance(p, Tensor)]
    if other or (whole is None and not optimizer._networks):
        raise TypeError(
            f"{cls}: got {other[0] if other else 'parameters'}, expected networks: write {cls}([net]); to train "
            "some of its parameters, or each with options of its own, say which network they are in: "
            f"{cls}([{{'params': [p, ...], 'lr': 0.1}}, ...], networks=[net])"
        )
    names = {id(own(p)): name for n in optimizer._networks for name, p in n.named_parameters()}
    group["params"] = [own(p) for p in params]
    for p in group["params"]:
        if id(p) not in names:
            raise ValueError(
                f"{cls}: a parameter of shape {tuple(p.shape)} is in none of the networks; give "
                "the network it is in, as a group of its own or among networks=[...]"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"{cls}: parameter {names[id(p)]!r} is {p.dtype}, expected a floating-point or complex type"
            )
    seen = set(map(id, parameters_of(optimizer)))
    for p in group["params"]:
        if id(p) in seen:
            raise ValueError(
                f"{cls}: parameter {names[id(p)]!r} is in more than one place of the groups; list "
                "each network, and each parameter, once"
            )
        seen.add(id(p))
    for key, value in (optimizer.defaults | group).items():
        if isinstance(value, nn.Module):
            take_apart(value)
            for name, p in value.named_parameters():
                if id(own(p)) in names:
                    raise ValueError(
                        f"{cls}: {name!r} of the {key!r} is {names[id(own(p))]!r} of a network too; what steps train "
                        "cannot be what they are taken with, so give the two a tensor each"
                    )
    return group, whole


def check_misspelt(optimizer: InnerOptimizer) -> None:
    """Raise for a key that was put into a group afterwards and looks like an option; others may be the user's own."""
    known = optimizer.defaults.keys() | NO_OPTIONS
    for group in optimizer.param_groups:
        if group.keys() <= known:  # at every step, so in a fraction of a microsecond
            continue
        for key in group.keys() - known:
            if key in _ALSO or difflib.get_close_matches(key.lower(), optimizer.defaults, 1, _CLOSE):
                raise _unknown(optimizer, key)


class Given(NamedTuple):
    """The optimizer that `wrap` was given, and the learnt numbers that its groups had then."""

    ref: weakref.ref[torch.optim.Optimizer]
    learnt: frozenset[int]  # ids

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> Given:
        """It as it is now."""
        return Given(weakref.ref(optimizer), frozenset(id(v) for _, v in _learnt(optimizer)))

    def check(self, name: str) -> None:
        """Raise for a learnt number that was put into its groups afterwards, where no step of ``name`` reads it."""
        optimizer = self.ref()
        for key, value in () if optimizer is None else _learnt(optimizer):
            if id(value) not in self.learnt:
                raise WindowError(
                    f"{name}.step: {key!r} was set to a tensor that requires grad in a group of the "
                    f"{type(optimizer).__name__} that wrap was given, which takes no inner step; set it in the groups "
                    f"of what wrap returned: inner.param_groups[0][{key!r}] = ..."
                )


def _learnt(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor) and value.requires_grad:
                yield key, value


def _meant(optimizer: InnerOptimizer, key: str) -> str | None:
    close = difflib.get_close_matches(key.lower(), optimizer.defaults, 1)
    return close[0] if close else _ALSO.get(key)


def _unknown(optimizer: InnerOptimizer, key: str) -> TypeError:
    meant = _meant(optimizer, key)
    return TypeError(
        f"{type(optimizer).__name__}: got the group option {key!r}, expected some of "
        f"{', '.join(map(repr, optimizer.defaults))}" + (f"; did you mean {meant!r}?" if meant else "")
    )


def matching(optimizer: InnerOptimizer, values: Mapping[Any, Tensor]) -> list[Tensor]:
    """The parameters that `MetaOptimizer.start` is given values for, in their order."""
    cls = type(optimizer).__name__
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{cls}.start: got {type(values).__name__}, expected a dictionary {{name of a parameter: tensor}}"
        )
    mine = set(map(id, parameters_of(optimizer)))
    named: dict[Any, list[Tensor]] = {}
    for network in optimizer._networks:
        for name, p in network.named_parameters():
            if id(own(p)) in mine:
                named.setdefault(name, []).append(own(p))
    parameters = []
    for key, value in values.items():
        found = [own(key)] if isinstance(key, Tensor) and id(own(key)) in mine else named.get(key, [])
        if len(found) != 1:
            raise KeyError(
                f"{cls}.start: {key!r} is {'more than one' if found else 'no'} parameter that this optimizer trains, "
                f"of {', '.join(named)}; the key may also be the parameter itself"
            )
        (p,) = found
        like = (p.shape, p.dtype, p.device)
        if not isinstance(value, Tensor) or (value.shape, value.dtype, value.device) != like:
            tensor = isinstance(value, Tensor)
            got = f"{tuple(value.shape)} of {value.dtype}" if tensor else type(value).__name__
            raise ValueError(
                f"{cls}.start: {key!r} got {got}, expected a tensor of shape {tuple(p.shape)} and "
                f"{p.dtype}, on {p.device}"
            )
        parameters.append(p)
    return parameters


def own(p: Any) -> Any:
    """The user's own parameter behind one that a window shows."""
    session = current_session()
    return p if session is None else session.networks.original(p)
