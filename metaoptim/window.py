"""SlidingWindow: the `with` block an inner loop lives in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .compiler.capture.intercept import recording
from .compiler.ir.programs.program import Tape
from .compiler.ir.retention import Retention, check_count
from .compiler.ir.step import Lowering
from .contradictions import check_gradient, check_sync
from .errors import WindowError, warn
from .optim.base.alive import optimizers_here, refresh_optimizers
from .report.explain import explain_window
from .report.report import Report
from .runtime.engine.estimators.evolution import Evolution
from .runtime.engine.estimators.implicit import Implicit
from .runtime.functions.loops import Loop
from .runtime.functions.symbolic_session import CapturedSession
from .runtime.windows.ordinary_session import OrdinarySession
from .runtime.windows.recording_session import RecordedSession
from .runtime.windows.session import Options, Session, current_session
from .runtime.windows.taped.full_tape import FullTapeSession
from .runtime.windows.taped.nested import NestedSession, refuse_options

_STRATEGIES: dict[str, type[RecordedSession] | type[FullTapeSession]] = {
    "auto": RecordedSession,
    "full_tape": FullTapeSession,
}
_OF_FULL_TAPE = (
    "offline",
    "backward_hook",
    "record_grad_tape",
    "pickup_step",
    "sync",
    "check_finite",
    "strategy",
    "gradient",
)


class SlidingWindow:
    """Inner steps taken inside this block are differentiable: exactly, and without holding their tape.

    Offline (MAML): after the block the networks are back at θ₀, and θ₀ receives dL(θ_T)/dθ₀. Online (meta-gradient
    RL): the networks keep θ_T, and only meta-parameters receive gradients. Outer losses are computed inside the block;
    their backward may run inside or after it, and repeatedly (with ``retain_graph=True`` where torch asks for it: what
    the user's own code has put on autograd's tape follows torch's rule).

    Args:
        offline: which of the two.
        backward_hook: ``hook(grad) -> Tensor | None``, applied to the cotangent of each inner gradient during the
            meta-backward; None keeps it. `zero_nan_hook` is one.
        record_grad_tape: keep each step's parameters; `MetaOptimizer.named_parameters` then yields ``step_k:name``.
        pickup_step: online only: leave networks and optimizers as they were after step k (from 0) instead of the last.
        window: truncate: every outer loss sees only the last ``window`` super-steps before it. None sees all.
        memory_budget: keep as many states as fit: most bytes that the window may hold at its peak beyond the caller's
            own tensors, as a number, as text (``"512MiB"``), or as a fraction (a float) of the free memory.
        slots: keep at most this many states of the inner loop, counting the initial one, and replay the rest. None
            keeps the state of every step (no activations); without a budget, up to half of the memory that is free,
            with a warning beyond.
        offload: where states go for which there is no room on the device, instead of being given up: ``"host"`` (memory
            of the host, for networks on another device), ``"disk"`` (files in the temporary directory), or the path of
            a directory. With ``slots`` or ``memory_budget``. A step is then replayed once at most.
        check_finite: raise at the step whose loss, or whose new parameters, are not finite (anomaly mode does so too).
            Each step then waits for the device. Without, a warning at the end of the block names the steps after which
            the parameters are no longer finite.
        sync: a process group of torch.distributed (``torch.distributed.group.WORLD``), online only: at the end of the
            block the parameters become their mean over its ranks, which must all come there, with the same networks.
            Nothing is shared otherwise.
        backend: what the derivatives of steps run on: ``"eager"`` (nothing is compiled), or a backend of torch.compile
            such as ``"inductor"``, which compiles one graph for each distinct step. ``"auto"`` is ``"eager"``, and
            ``"inductor"`` for a derivative that has run for about a second by now, on the CPU and without a memory
            budget. Inductor compiles in other processes; until a compiled graph is there, the graph runs as it is (see
            docs/compile.md). The forward is eager PyTorch's own in any case.
        hvp: how a step's gradient is differentiated; see `compile`.
        self_check: compare every compiled graph with its uncompiled form on first use.
        gradient: ``"exact"``; ``"first_order"`` takes inner gradients as constants in the meta-backward (FOMAML), as
            ``first_order=True`` of each optimizer does; ``"forward"`` is the exact one, by derivatives of the state
            that are carried along with the steps, one for each entry of what a gradient is taken by, at most 100 in all
            (offline, those of the initial parameters are among them): memory does not depend on T, and nothing is run
            again; `Implicit` solves for the gradient at a solution of the inner problem, of which it needs the last
            step alone; `Evolution` runs the steps again with perturbed meta-parameters, where derivatives are no use.
        strategy: ``"auto"`` records; ``"full_tape"`` keeps autograd's own tape (the oracle; memory grows with T).

    Raises:
        WindowError: for pickup_step offline; inside another window, in a compiled function, and for options that
            concern the memory of its loop (see docs/constructs.md).
        TypeError: for an ``offline`` that is no bool, or an option of another type than said.
        ValueError: for an unknown strategy, backend or hvp, a window or slots below 1, both slots and a budget, an
            ``offload`` that is no directory or has nothing to do, or ``sync`` offline or without a process group.
        LossError: from a step, with ``check_finite``.
        BudgetError: from a step, for a budget in which not even one state can be kept.
        StoreError: from a step or a backward, where an offloaded state cannot be written, or is damaged.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> inner = metaoptim.MetaSGD([net], lr=0.1)
        >>> with metaoptim.SlidingWindow(offline=True, slots=4):
        ...     for t in range(20):
        ...         inner.step((net(torch.ones(1, 1)) - 1).square().sum())
        ...     net(torch.ones(1, 1)).square().sum().backward()
        >>> net.weight.grad is not None
        True

        The same with states that have no slot on disk instead of computed again:

        >>> with metaoptim.SlidingWindow(offline=True, slots=4, offload="disk"):
        ...     for t in range(20):
        ...         inner.step((net(torch.ones(1, 1)) - 1).square().sum())
        ...     net(torch.ones(1, 1)).square().sum().backward()

    References:
        MAML: Finn, Abbeel & Levine 2017, arXiv 1703.03400, eq. 1. Meta-gradient RL: Xu, van Hasselt & Silver 2018,
        arXiv 1805.09801, eq. 4-6.
    """

    def __init__(
        self,
        offline: bool = False,
        backward_hook: Callable[[Tensor], Tensor | None] | None = None,
        record_grad_tape: bool = False,
        pickup_step: int = -1,
        *,
        window: int | None = None,
        memory_budget: int | float | str | None = None,
        slots: int | None = None,
        offload: str | os.PathLike[str] | None = None,
        check_finite: bool = False,
        sync: Any = False,
        backend: str = "auto",
        hvp: str = "auto",
        self_check: bool = True,
        strategy: str = "auto",
        gradient: str | Implicit | Evolution = "exact",
    ) -> None:
        given = dict(locals())
        if not isinstance(offline, bool):
            raise TypeError(f"offline: got {type(offline).__name__}, expected True or False")
        if strategy not in _STRATEGIES:
            raise ValueError(
                f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, _STRATEGIES))}"
            )
        retention = Retention(slots, memory_budget, offload)
        check_count("window", window)
        check_sync(sync, offline)
        lowering = Lowering.stated(backend, hvp, self_check, replays=False)
        implicit = gradient if isinstance(gradient, Implicit) else None
        evolution = gradient if isinstance(gradient, Evolution) else None
        said = offline, backward_hook, record_grad_tape, pickup_step, 1 if implicit is not None else window
        way = gradient == "first_order", gradient == "forward", implicit, evolution
        self._options = Options(*said, retention, check_finite, sync, lowering, *way)
        self._said = {k: given[k] for k, default in _DEFAULTS.items() if given[k] != default}
        if retention.place is not None:
            self._said["offload"] = retention.place
        check_gradient(gradient, self._said)
        for name, value in self._said.items() if strategy == "full_tape" else ():
            if name not in _OF_FULL_TAPE:
                raise ValueError(
                    f"{name}={value!r}: a full_tape window keeps everything, on autograd's own tape; use "
                    "strategy='auto'"
                )
        if not isinstance(pickup_step, int) or pickup_step < -1:
            raise ValueError(
                f"pickup_step: got {pickup_step!r}, expected a step counted from 0, or -1 for the last"
            )
        if offline and pickup_step != -1:
            raise WindowError(
                f"pickup_step={pickup_step} with offline=True: offline, the networks return to where they "
                "began, so there is no step to pick up; use offline=False"
            )
        if backward_hook is not None and not callable(backward_hook):
            raise TypeError(
                f"backward_hook: got {type(backward_hook).__name__}, expected a function of one tensor"
            )
        self._strategy = strategy
        self._session: Session | None = None
        self._program: Tape | None = None

    def __enter__(self) -> SlidingWindow:
        around = current_session()
        if around is None:
            refresh_optimizers()
        session = self._session = self._new_session() if around is None else self._inside(around)
        session.open()
        try:
            for optimizer in optimizers_here():  # the same order on every rank
                if optimizer._session in (None, around):
                    with suppress(WindowError):  # raised where it steps, if it does
                        session.adopt(optimizer)
        except BaseException:
            session.close(failed=True)
            raise
        self._program = getattr(session, "program", None)
        return self

    def _inside(self, around: Session) -> Session:
        """The session of a window inside another."""
        if not isinstance(around, OrdinarySession):
            raise WindowError(
                "a window was opened inside a window of a compiled function; take the decorator off, or write the "
                "inner loop with metaoptim.functional"
            )
        refuse_options(self._said)
        return NestedSession(self._options, around)

    def _new_session(self) -> Session:
        recorder = recording.get()
        if recorder is None or not recorder.symbolic:
            return _STRATEGIES[self._strategy](self._options)
        if self._strategy == "full_tape":
            raise WindowError("strategy='full_tape' cannot be compiled; take the decorator off")
        if self._said.get("gradient", "exact") not in ("exact", "first_order"):
            raise WindowError(
                f"SlidingWindow(gradient={self._said['gradient']!r}) in a compiled function; take the decorator off: "
                "such a gradient is not one of the whole program"
            )
        if self._options.check_finite:
            raise WindowError(
                "SlidingWindow(check_finite=True) in a compiled function: values are not looked at there; take the "
                "decorator off to find the step where they stop being finite"
            )
        return CapturedSession(self._options, recorder)  # type: ignore[arg-type]

    def scan(self, *tensors: Tensor) -> Iterable[Any]:
        """Slices of ``tensors`` along their leading axis, one per inner step.

        In an ordinary window this iterates. In a compiled function the body of the loop is captured by a few of its
        iterations and stands for all of them, whatever the length: tensors may be carried from one iteration to the
        next, and what the last one leaves may be used after the loop.

        Args:
            tensors: of equal leading size T.

        Returns:
            What a `for` goes over: a slice of the tensor, or a tuple with one slice of each, T times.

        Raises:
            TypeError: for something else than tensors.
            ValueError: for no tensors, or leading sizes that differ.
            CaptureError: in a compiled function, when iterations differ or reach back more than one.

        Example:
            >>> net = torch.nn.Linear(3, 1)
            >>> inner = metaoptim.MetaSGD([net], lr=0.1)
            >>> with metaoptim.SlidingWindow() as window:
            ...     for x, y in window.scan(torch.ones(4, 2, 3), torch.zeros(4, 2, 1)):
            ...         inner.step((net(x) - y).square().mean())
        """
        for given in tensors:
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"window.scan: got {type(given).__name__}, expected tensors with one row for each step, as in "
                    "window.scan(xs, ys); make one of a list by torch.stack"
                )
        sizes = {t.shape[0] if t.dim() else -1 for t in tensors}
        if len(sizes) != 1 or -1 in sizes:
            raise ValueError(
                f"window.scan: got leading sizes {[tuple(t.shape[:1]) for t in tensors]}, expected the same "
                "number of rows, one for each inner step, in every tensor"
            )
        items = (items for _, items in self._iterations(tensors, sizes.pop()))
        return self._loop(rows[0] if len(rows) == 1 else tuple(rows) for rows in items)

    def range(self, count: int) -> Iterable[int]:
        """0, 1, ..., count - 1: `scan` for loops that index.

        In a compiled function the number is symbolic: it may index tensors (``xs[t]``, ``xs[2 * t + 1]``), and nothing
        else may depend on it.

        Args:
            count: how many.

        Returns:
            What a `for` goes over: the number of the step.
        """
        return self._loop(k for k, _ in self._iterations((), count))

    def _loop(self, iterations: Iterator[Any]) -> Iterable[Any]:
        return Loop(iterations) if isinstance(self._session, CapturedSession) else iterations

    def _iterations(self, tensors: tuple[Tensor, ...], count: int) -> Iterator[tuple[int, list[Tensor]]]:
        if self._session is None:
            raise WindowError("window.scan and window.range belong inside the window's block")
        if isinstance(self._session, CapturedSession):
            yield from self._session.loops.scan(tensors, count)
        else:
            for k in range(count):
                yield k, [t[k] for t in tensors]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        assert session is not None
        members = list(session.members.values())
        if isinstance(session, RecordedSession):
            self._program = session.program
        session.close(failed=kind is not None)
        if kind is not None or any(member.joined for member in members):
            return
        if isinstance(session, OrdinarySession) and session.held_inner:
            warn(
                "this window took no step of its own, and the steps in the window inside it ended with that one. "
                "Compute the query loss in the inner block, and take the outer step by it after the block"
            )
        elif not members:
            warn(
                "this window had no inner optimizer, so nothing in it was differentiated or put back; build one from "
                "the networks (inner = metaoptim.MetaSGD([net])) and call inner.step(loss) instead of torch.optim's"
            )

    def __repr__(self) -> str:
        return f"SlidingWindow({', '.join(f'{k}={v!r}' for k, v in self._said.items())})"

    def explain(self) -> Report:
        """What the steps taken so far have become, what a backward from here will cost, and who gets a gradient.

        Called inside the block. Nothing changes: the steps are gone through on sizes alone. After a backward, which
        gives up states, the report is about a second backward.

        Returns:
            A `Report` of the form ``"block"``: the states kept, the steps that a backward will run again, the peak that
            it will reach, the distinct step graphs, and what the passes have done to them.

        Raises:
            WindowError: outside the block, under full_tape, and in a compiled function (see `explain`).

        Example:
            >>> net, lr = torch.nn.Linear(3, 1), torch.tensor(0.1, requires_grad=True)
            >>> inner = metaoptim.MetaSGD([net], lr=lr)
            >>> with metaoptim.SlidingWindow(offline=True, slots=3) as window:
            ...     for t in range(20):
            ...         inner.step(net(torch.ones(2, 3)).square().mean())
            ...     report = window.explain()
            >>> report.horizon, report.num_programs, report.kept_states, "lr" in report.gradient_targets
            (20, 1, 3, True)
        """
        if not isinstance(self._session, RecordedSession):
            raise WindowError(
                "window.explain: call it inside the block of a window that records (strategy='auto'), after steps; a "
                "full_tape window keeps no record, and for a compiled function it is metaoptim.explain(fn)(*args)"
            )
        with self._session.recorder.paused():
            return explain_window(self._session, repr(self))

    @property
    def program(self) -> Tape | None:
        """What the window has recorded, as a printable Tape; None under full_tape."""
        return self._session.program if isinstance(self._session, RecordedSession) else self._program


_DEFAULTS = {name: option.default for name, option in signature(SlidingWindow).parameters.items()}


def zero_nan_hook(grad: Tensor) -> Tensor:
    """A `backward_hook` that replaces NaN entries of a cotangent by 0.

    Args:
        grad: cotangent of an inner gradient, any shape.

    Returns:
        A tensor like ``grad``.

    Example:
        >>> metaoptim.zero_nan_hook(torch.tensor([1.0, float("nan")]))
        tensor([1., 0.])
    """
    return torch.where(grad.isnan(), torch.zeros_like(grad), grad)
