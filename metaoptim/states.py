"""States of an inner loop taken out and put back, by the names TorchOpt's users know."""

from __future__ import annotations

from torch import nn

from .errors import WindowError
from .optim.optimizer import MetaOptimizer
from .runtime.windows.positions import InnerState, cut, displacement, extract, recover
from .runtime.windows.session import current_session

_WAYS = ("reference", "copy", "detached")


def extract_state(*of: nn.Module | MetaOptimizer, by: str = "reference") -> InnerState:
    """What networks and inner optimizers are now, for `recover_state` to go back to.

    A network stands for its parameters and buffers, an optimizer for its state (moments, step counts): a position in
    the inner loop is both. Hyper-parameters, and what no inner step trains, are not part of it.

    Inside a window the state has its history: going back to θ₃ and adapting from there in another way gives a loss
    whose gradient flows through the new steps, then through the steps that led to θ₃. Outside, or by "detached", it
    is values.

    Args:
        of: networks of the window's inner optimizers (or parts of them), and inner optimizers. Those that have taken no
            step yet belong to the window from now on.
        by: "reference" takes no memory as long as the window holds these values anyway; "copy" copies them; "detached"
            copies them and leaves their history, and may be recovered anywhere.

    Returns:
        The state. It keeps the window's steps alive.

    Raises:
        TypeError: for anything else than networks and inner optimizers.
        ValueError: for another ``by``.
        WindowError: in a window that trains nothing of a network; with ``window=W``, unless it is detached.

    Example:
        >>> net, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1, momentum=0.9)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(x).square().sum())
        ...     start = metaoptim.extract_state(net, inner)
        ...     losses = []
        ...     for target in (1.0, 2.0):
        ...         metaoptim.recover_state(start)
        ...         inner.step((net(x) - target).square().sum())
        ...         losses.append(net(x).square().sum())
        ...     sum(losses).backward()
        >>> net.weight.grad.shape
        torch.Size([1, 2])
    """
    networks, optimizers = _sorted("extract_state", of)
    if by not in _WAYS:
        meant = "; TorchOpt's 'deepcopy' is 'detached' here" if by == "deepcopy" else ""
        raise ValueError(
            f"extract_state: got by={by!r}, expected one of {', '.join(map(repr, _WAYS))}{meant}"
        )
    return extract(current_session(), networks, optimizers, by)


def recover_state(state: InnerState) -> None:
    """Go back to what `extract_state` has returned; it may be gone back to any number of times.

    Inside the window that it was extracted in, what follows depends on it with its history, unless it is detached.
    Elsewhere its values are copied.

    Args:
        state: of networks and optimizers that are still there.

    Raises:
        TypeError: for anything else.
        WindowError: for a state that was extracted by reference or copy in another window.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> before = metaoptim.extract_state(net)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> metaoptim.recover_state(before)
        >>> bool(net.weight.any())
        True
    """
    if not isinstance(state, InnerState):
        raise TypeError(
            f"recover_state: got {type(state).__name__}, expected what metaoptim.extract_state(net, inner) returns, "
            "which knows the networks and optimizers it is of"
        )
    recover(current_session(), state)


def stop_gradient(*of: nn.Module | MetaOptimizer) -> None:
    """Cut the inner loop here: values stay, later losses do not differentiate into earlier steps.

    Losses that were computed before keep their gradient. A network stands for its parameters and buffers, an optimizer
    for its state: to cut all of the loop, give both.

    Args:
        of: as in `extract_state`.

    Raises:
        TypeError: for anything else than networks and inner optimizers.
        WindowError: outside a window, or in one that trains nothing of a network.

    Example:
        >>> net, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> inner = metaoptim.MetaSGD([net], lr=lr)
        >>> with metaoptim.SlidingWindow(offline=True):
        ...     inner.step(net(x).square().sum())
        ...     metaoptim.stop_gradient(net, inner)
        ...     inner.step(net(x).square().sum())
        ...     net(x).square().sum().backward()
        >>> net.weight.grad is None, lr.grad is None
        (True, False)
    """
    networks, optimizers = _sorted("stop_gradient", of)
    session = current_session()
    if session is None:
        raise WindowError(
            "stop_gradient was called outside a window, where there is no inner loop to cut; call it inside the block"
        )
    cut(session, networks, optimizers)


def reptile(*networks: nn.Module, scale: float = 1.0) -> None:
    """Add Reptile's outer gradient to the networks' own ``.grad``: scale · (θ₀ - θ_t), of the loop as it is now.

    There is no outer loss, and nothing is differentiated. An outer step with plain SGD of rate ε moves θ₀ by
    ε · scale · (θ_t - θ₀): with ``scale=1 / n`` for each of n tasks, to their mean. Nobody needs the states that lead
    there: give the window ``window=1``, which keeps one.

    Args:
        networks: of the window's inner optimizers, or parts of them.
        scale: of this loop among those of one outer step.

    Raises:
        TypeError: for anything else than networks.
        WindowError: outside an offline window, in a compiled function, or in a window that trains nothing of a network.

    Example:
        >>> net, xs = torch.nn.Linear(2, 1), torch.randn(4, 8, 2)
        >>> outer = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1)
        >>> for x in xs:
        ...     with metaoptim.SlidingWindow(offline=True, window=1):
        ...         for _ in range(5):
        ...             inner.step((net(x) - 1).square().mean())
        ...         metaoptim.reptile(net, scale=1 / len(xs))
        >>> outer.step()

    References:
        Nichol, Achiam & Schulman 2018, arXiv 1803.02999, Algorithm 2.
    """
    other = [type(x).__name__ for x in networks if not isinstance(x, nn.Module)]
    if other or not networks:
        raise TypeError(
            f"reptile: got {other[0] if other else 'nothing'}, expected networks, as in reptile(net)"
        )
    session = current_session()
    if session is None or not session.options.offline:
        where = "outside a window" if session is None else "in an online window, whose network keeps θ_t"
        raise WindowError(
            f"reptile was called {where}; call it at the end of a block SlidingWindow(offline=True)"
        )
    if session.recorder.symbolic:
        raise WindowError(
            "reptile was called in a compiled function, which fills no .grad; use an ordinary window"
        )
    for parameter, way in displacement(session, networks):
        way = scale * way
        parameter.grad = way if parameter.grad is None else parameter.grad + way


def _sorted(name: str, of: tuple[object, ...]) -> tuple[list[nn.Module], list[MetaOptimizer]]:
    networks = [x for x in of if isinstance(x, nn.Module)]
    optimizers = [x for x in of if isinstance(x, MetaOptimizer)]
    other = [type(x).__name__ for x in of if not isinstance(x, (nn.Module, MetaOptimizer))]
    if other or not of:
        raise TypeError(
            f"{name}: got {other[0] if other else 'nothing'}, expected networks and inner optimizers, as in "
            f"metaoptim.{name}(net, inner)"
        )
    return networks, optimizers
