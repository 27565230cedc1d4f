"""A transform of inner gradients: a pure function with numbers by name, and the parameters that it acts on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from metaoptim.compiler.ir.traces.slices import closed_over
from metaoptim.compiler.ir.update import name_of

#: ``(grads, params, hyper) -> grads'``, lists of tensors in the order of the optimizer's parameters.
Apply: TypeAlias = Callable[[list[Tensor], list[Tensor], dict[str, Any]], Sequence[Tensor]]
#: Patterns of names as in `fnmatch` (``"*.bias"``), or a function of the name.
Mask: TypeAlias = str | Sequence[str] | Callable[[str], bool]


class Transform:
    """What is done to the inner gradients of a `MetaOptimizer` before its update: g' = f(g, θ, numbers).

    Args:
        apply: f, a pure function ``(grads, params, hyper) -> grads'``. The first two are lists of tensors, one for each
            parameter that the step updates, in the order of the optimizer; the result is a list of tensors of the same
            shapes. It looks at nothing but its arguments, draws no random numbers and changes nothing in place.
        mask: parameters that it acts on; the gradients of the others stay. A pattern of names such as ``"*.bias"``
            (those of ``net.named_parameters()``, matched as by `fnmatch.fnmatchcase`), several of them, or a function
            ``name -> bool``. None for all.
        **hyper: what ``apply`` finds in ``hyper``, by name. A tensor that requires grad receives a meta-gradient; a
            float may change between steps without a new program; a schedule is evaluated at each step; anything else,
            integers too, is a constant.

    Attributes:
        hyper: these numbers, a dictionary. Values that are set in it hold from the next step on.

    Raises:
        TypeError: for something that cannot be called with three arguments, or a function that closes over tensors.

    Example:
        >>> def squash(grads, params, hyper):
        ...     return [torch.tanh(hyper["sharpness"] * g) for g in grads]
        >>> net, sharpness = torch.nn.Linear(2, 1), torch.tensor(3.0, requires_grad=True)
        >>> squashed = metaoptim.transforms.Transform(squash, sharpness=sharpness)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, transforms=[squashed])
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(torch.ones(1, 2)).square().sum())
        ...     net(torch.ones(1, 2)).square().sum().backward()
        >>> sharpness.grad.shape
        torch.Size([])
    """

    def __init__(self, apply: Apply, /, *, mask: Mask | None = None, **hyper: Any) -> None:
        name = name_of(apply)
        if not callable(apply) or isinstance(apply, (nn.Module, Transform)):
            raise TypeError(
                f"a transform of gradients: got {name}, expected a function (grads, params, hyper)"
            )
        if not _takes_three(apply):
            raise TypeError(
                f"a transform of gradients: {name} does not take three arguments, expected a function (grads, params, "
                f"hyper); a transform of metaoptim.transforms is called first: {name}(...)"
            )
        if any(isinstance(value, (Tensor, nn.Module)) for value in closed_over(apply)):
            raise TypeError(
                f"the transform {name} closes over a tensor or a module, whose gradient would be lost; hand it over by "
                f"name, Transform({name}, scale=scale), and read it from its argument hyper"
            )
        self.apply, self.mask, self.hyper = apply, mask, hyper
        self.inverted = False  # whether it acts on the parameters that the mask does not match
        # (grads, hyper) -> what is wrong with these values, or None: for the user's eyes, and no part of a program
        self.check: Callable[[list[Tensor], dict[str, Any]], str | None] | None = None

    def __repr__(self) -> str:
        masked = {} if self.mask is None else {"mask": self.mask}
        return f"{name_of(self.apply)}({', '.join(f'{k}={v!r}' for k, v in (self.hyper | masked).items())})"

    def matches(self, name: str) -> bool:
        """Whether the mask matches the name of a parameter."""
        if self.mask is None:
            return True
        if callable(self.mask):
            return bool(self.mask(name))
        patterns = [self.mask] if isinstance(self.mask, str) else self.mask
        return any(fnmatchcase(name, pattern) for pattern in patterns)


def _takes_three(function: Apply) -> bool:
    try:
        inspect.signature(function).bind([], [], {})
    except TypeError:
        return False
    except ValueError:  # one of C++, which tells nobody
        return True
    return True


def as_transforms(given: Iterable[Any], of: str) -> list[Transform]:
    """A list of transforms, in which bare functions are transforms without numbers; ``of``: who is given them."""
    if isinstance(given, Transform) or not isinstance(given, Iterable):
        raise TypeError(
            f"{of}.transforms: got {given!r}, expected a list of transforms: "
            f"transforms=[{'transform' if callable(given) or isinstance(given, Transform) else '...'}]"
        )
    return [t if isinstance(t, Transform) else Transform(t) for t in given]
