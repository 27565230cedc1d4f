"""Inner optimizers as functions of trees of tensors, for code without networks and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaoptim.compiler.ir.operators import is_named, is_several
from metaoptim.compiler.ir.update import State, UpdatePlan, initial_state
from metaoptim.runtime.windows.session import outside
from metaoptim.runtime.windows.updates.hyper import schedules_of

from .base.alive import live_optimizers
from .optimizer import MetaOptimizer

#: A tensor, or a dictionary, list or tuple of trees.
Tree: TypeAlias = Any


class _Nothing(nn.Module):
    """The network of optimizers that have none: its parameter is of no consequence."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1, 1))


_NOTHING = _Nothing()


class FunctionalOptimizer:
    """An inner optimizer as two pure functions, `init` and `update`; `functional` makes it."""

    def __init__(self, optimizer: MetaOptimizer) -> None:
        self._optimizer = optimizer
        group = optimizer.param_groups[0]
        self._hyper = {name: group[name] for name in optimizer.defaults}

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self._hyper.items())
        return f"functional({type(self._optimizer).__name__}, {said})"

    def init(self, params: Tree) -> Tree:
        """The state before the first step: ``params`` with a dictionary of tensors in the place of each tensor."""
        init = self._optimizer.init_state
        return _mapped(lambda path, p: initial_state(init, p, self._hyper), "params", params)

    def update(self, grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """One step: new parameters, and the new state.

        Args:
            grads: the gradient of the inner loss by ``params``, in the same structure; None where there is none, so
                that a parameter and its state stay as they are.
            state: what `init` or the last step gave.
            params: tensors, in dictionaries, lists and tuples.

        Returns:
            ``(params', state')``: new tensors, nothing is changed in place.

        Raises:
            TypeError: for what is no tree of tensors, or none of the structure of ``params``.
            ValueError: for a gradient of another shape than its parameter.
        """
        given: list[tuple[Tensor, Tensor | None, State]] = []
        _mapped(lambda path, *leaf: given.append(_leaf(path, *leaf)), "params", params, grads, state)
        moved = [(p, g, s) for p, g, s in given if g is not None]
        optimizer = self._optimizer
        plan = UpdatePlan(
            optimizer.update,
            (tuple(self._hyper.items()),),
            (0,) * len(moved),
            tuple(tuple(s) for *_, s in moved),
            init=optimizer.init_state,
        )
        results = plan([p for p, *_ in moved], [g for _, g, _ in moved], [s for *_, s in moved], ())
        news = zip(*results, strict=True)
        after = [(p, s) if g is None else next(news) for p, g, s in given]
        thetas, states = iter([p for p, _ in after]), iter([s for _, s in after])
        return _refilled(params, thetas), _refilled(params, states)


def functional(optimizer: Callable[..., MetaOptimizer], **options: Any) -> FunctionalOptimizer:
    """The update rule of an inner optimizer as functions ``init(params)`` and ``update(grads, state, params)``.

    (θ', s') = Υ(g, s, θ): the rule of the class itself, for parameters in dictionaries, lists and tuples. There is
    no window: gradients are those that autograd or `torch.func` (grad, vmap, jvp) takes through all steps, whose memory
    grows with their number. Hyper-parameters may be tensors, and are differentiated.

    The arguments are in optax's and TorchOpt's order. What comes back are the new parameters, not differences that are
    still to be added: Υ gives θ' itself, and θ + (θ' - θ) would be rounded once more. So there is no ``apply_updates``.

    Args:
        optimizer: a class of inner optimizers, or a function that makes one from a list of networks and ``options``.
        options: as for the class: ``lr``, ``betas`` and so on, checked as there.

    Returns:
        A `FunctionalOptimizer`. It costs little: make it anew where hyper-parameters are arguments.

    Raises:
        TypeError: for an option that the class does not know, for ``networks`` and ``params``, for ``first_order=True``
            (detach the gradients instead), transforms and schedules.
        ValueError: for an option's value, as the class does.

    Example:
        >>> def after(lr, theta):
        ...     opt = metaoptim.functional(metaoptim.MetaAdam, lr=lr)
        ...     state = opt.init(theta)
        ...     for _ in range(3):
        ...         grads = torch.func.grad(lambda t: (t["w"] - 1).square().sum())(theta)
        ...         theta, state = opt.update(grads, state, theta)
        ...     return theta["w"].square().sum()
        >>> torch.func.grad(after)(torch.tensor(0.1), {"w": torch.zeros(2)}).shape
        torch.Size([])
    """
    name = getattr(optimizer, "__name__", repr(optimizer))
    if given := [k for k in ("params", "networks") if k in options]:
        raise TypeError(
            f"functional({name}): got {given[0]}=, but parameters are given to init(params) and update instead"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or (
        isinstance(optimizer, type) and not issubclass(optimizer, MetaOptimizer)
    ):
        raise TypeError(
            f"functional: got {name}, expected a class of inner optimizers such as metaoptim.MetaAdam, which has the "
            "arguments of torch.optim.Adam, and not an optimizer that is made already"
        )
    if options.get("first_order"):
        raise TypeError(
            f"functional({name}): got first_order=True; detach the gradients that are given to update instead"
        )
    with outside():
        made = optimizer([_NOTHING], **options)
    if not isinstance(made, MetaOptimizer):
        raise TypeError(
            f"functional: got {name}, which makes {type(made).__name__}, expected a class of inner optimizers such as "
            "metaoptim.MetaAdam"
        )
    if made.transforms or schedules_of(made):
        raise TypeError(
            f"functional({name}): got {'transforms' if made.transforms else 'a schedule'}, which act in windows only; "
            "transform the gradients that are given to update, and make functional(...) anew with the rate of each step"
        )
    live_optimizers.discard(made)  # it steps in no window
    return FunctionalOptimizer(made)


def _leaf(path: str, p: Tensor, grad: Any, state: Any) -> tuple[Tensor, Tensor | None, State]:
    if grad is not None and not isinstance(grad, Tensor):
        raise TypeError(
            f"grads at {path}: got {type(grad).__name__}, expected a tensor or None, as params has one"
        )
    if grad is not None and grad.shape != p.shape:
        raise ValueError(f"grads at {path}: got shape {tuple(grad.shape)}, expected {tuple(p.shape)}")
    if not is_named(state):
        raise TypeError(
            f"state at {path}: got {type(state).__name__}, expected a dictionary of tensors by name, as init(params) "
            "gives for each tensor of params"
        )
    return p, grad, state


def _mapped(fn: Callable[..., Any], path: str, tree: Tree, *others: Tree) -> Tree:
    """What ``fn`` makes of each tensor's path, the tensor, and what the ``others`` have in its place."""
    if isinstance(tree, Tensor):
        return fn(path, tree, *others)
    keys = _keys(path, tree)
    for name, other in zip(("grads", "state"), others, strict=False):
        alike = is_named(other) if is_named(tree) else is_several(other)
        if not alike or set(_keys(path, other)) != set(keys):
            raise TypeError(
                f"{name} at {path}: got {_outline(other)}, expected the structure of params: {_outline(tree)}"
            )
    found = {k: _mapped(fn, f"{path}[{k!r}]", tree[k], *(other[k] for other in others)) for k in keys}
    return _like(tree, found)


def _refilled(tree: Tree, values: Iterator[Any]) -> Tree:
    """A tree of that structure, with ``values`` in the place of its tensors."""
    return _mapped(lambda path, _: next(values), "params", tree)


def _keys(path: str, tree: Tree) -> list[Any]:
    if is_named(tree):
        return list(tree)
    if is_several(tree):
        return list(range(len(tree)))
    hint = "; write dict(net.named_parameters())" if isinstance(tree, nn.Module) else ""
    hint = "; make a list of it" if isinstance(tree, Iterator) else hint
    raise TypeError(
        f"{path}: got {type(tree).__name__}, expected tensors in dictionaries, lists and tuples{hint}"
    )


def _like(tree: Tree, found: dict[Any, Any]) -> Tree:
    if is_named(tree):
        return found
    if hasattr(tree, "_fields"):
        return type(tree)(*found.values())
    return tuple(found.values()) if isinstance(tree, tuple) else list(found.values())


def _outline(tree: Tree) -> str:
    if is_named(tree):
        return f"a dictionary of {', '.join(map(repr, tree)) or 'nothing'}"
    return f"a {type(tree).__name__} of {len(tree)}" if is_several(tree) else type(tree).__name__
