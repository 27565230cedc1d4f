"""compile: a function that holds a window, captured whole, rewritten by passes and run by torch.compile's backends."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compiler.capture import intercept
from .compiler.ir.program import Kept
from .compiler.ir.retention import Retention, check_count
from .compiler.ir.step import Lowering
from .compiler.ir.trace import Input
from .compiler.lower.waiting import waiting
from .compiler.passes.checkpoint import checkpoint
from .compiler.passes.options import Options
from .errors import WindowError, warn
from .functions.captured import Specialization, StepSpecialization, capture, captured_step, retention_of
from .functions.changes import Change
from .functions.guards import Dependencies, Fact
from .functions.reads import Place, Reads, look
from .functions.recapture import compare
from .optim.optimizer import refresh_optimizers
from .report.of_function import report_of
from .runtime.budget.amounts import tell_default
from .runtime.budget.planner import decide
from .runtime.engine.function import Call, Run
from .runtime.windows.recording_session import RecordedSession
from .runtime.windows.session import current_session

_recompiles = logging.getLogger("metaoptim.recompiles")
_graphs = logging.getLogger("metaoptim.graphs")
_plans = logging.getLogger("metaoptim.plans")
#: After so many recompilations of one function a warning names what makes it compile anew.
RECOMPILE_LIMIT = 8


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)


class CompiledFunction:
    """What `compile` returns: called like the function itself."""

    def __init__(self, fn: Callable, options: Options) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._options = fn, options
        # (what a call depends on by itself, which of `_places`, what was found there) -> programs
        self._programs: dict[tuple[Any, int, Any], list[Any]] = {}
        self._places: dict[tuple[Fact, ...], list[list[Place]]] = {}  # of which programs have read
        self._last: Reads | None = None  # of the program that was compiled last

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else BoundFunction(self, instance)

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        """What a call with these arguments compiles to and costs; see `metaoptim.explain`."""
        return report_of(self._fn, self._options, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function: capture and compile it on first use, and whenever a guard fails."""
        recorder = intercept.recording.get()
        if recorder is not None and recorder.symbolic:
            return self._fn(*args, **kwargs)
        session = current_session()
        if isinstance(session, RecordedSession):
            return self._step(session, args, kwargs)
        if session is not None:
            return self._fn(*args, **kwargs)  # full_tape: the oracle is not compiled
        dependencies = Dependencies.of_call(self._fn, args, kwargs)
        program = self._find(dependencies)
        if program is None:
            if refresh_optimizers():
                dependencies = Dependencies.of_call(self._fn, args, kwargs)
                program = self._find(dependencies)
        if program is None:
            program = self._compile(dependencies, args, kwargs)
        elif self._options.recapture:
            compare(_name(self._fn), program, capture(self._fn, self._options, dependencies, args, kwargs))
        return self._run(program, dependencies)

    def _find(self, dependencies: Dependencies, window: RecordedSession | None = None) -> Any:
        """The program for ``dependencies``, which are extended by the facts at the places read."""
        key, mark = dependencies.key, dependencies.mark()
        for i, places in enumerate(self._places.get(key, ())):
            programs = self._programs.get((key, i, tuple(look(dependencies, places))), [])
            for program in list(programs):
                if all(ref() is o for ref, o in zip(program.remembered, dependencies.objects, strict=True)):
                    if window is None or program.step.fits(window):
                        return program
                    programs.remove(program)  # a layer is another one than in its last window
            dependencies.back_to(mark)
        return None

    def _compile(self, dependencies: Dependencies, args: tuple, kwargs: dict) -> Specialization:
        begun = time.perf_counter()
        key, reads = dependencies.key, Reads(self._fn, args, kwargs)
        with waiting(f"capturing {_name(self._fn)} ..."):
            program = capture(self._fn, self._options, dependencies, args, kwargs, reads)
        self._remember(key, reads, program, time.perf_counter() - begun)
        if _graphs.isEnabledFor(logging.INFO):
            text = program.rolled.text(operators=_graphs.isEnabledFor(logging.DEBUG))
            _graphs.info("%s: %s", _name(self._fn), text)
        return program

    def _remember(self, key: tuple[Fact, ...], reads: Reads, program: Any, seconds: float) -> None:
        """Keep a new program; say why it was needed, if another one was there."""
        name, recompilations = _name(self._fn), sum(map(len, self._programs.values()))
        if self._last is None:
            _recompiles.info("%s compiled in %.2f s", name, seconds)
        elif _recompiles.isEnabledFor(logging.INFO) or recompilations == RECOMPILE_LIMIT:
            change = self._last.change(reads) or Change("an object", "is another one than before")
            _recompiles.info("%s recompiled in %.2f s, since a guard failed: %s", name, seconds, change)
            if recompilations == RECOMPILE_LIMIT:
                warn(
                    f"{name} has been recompiled {RECOMPILE_LIMIT} times, the last time since a guard failed: "
                    f"{change}. {change.advice}"
                )
        self._last = reads
        known, at = self._places.setdefault(key, []), [place.identity for place in reads.places]
        i = next((i for i, places in enumerate(known) if [p.identity for p in places] == at), len(known))
        known[i:] = known[i:] or [reads.places]
        self._programs.setdefault((key, i, tuple(reads.found)), []).append(program)

    def _step(self, window: RecordedSession, args: tuple, kwargs: dict) -> Any:
        """One compiled inner step of the window that is open."""
        with window.recorder.paused():
            dependencies = Dependencies.of_call(self._fn, args, kwargs, window)
            program = self._find(dependencies, window)
        window.look_at(dependencies.tensors)
        if program is None:
            self._check_retention()
            begun = time.perf_counter()
            with window.recorder.paused():
                key, reads = dependencies.key, Reads(self._fn, args, kwargs, window)
            with waiting(f"capturing {_name(self._fn)} ..."):
                program = self._captured_step(window, dependencies, args, kwargs, reads)
            self._remember(key, reads, program, time.perf_counter() - begun)
            _graphs.info("%s: %s", _name(self._fn), program.step.step)
        elif self._options.recapture:
            compare(_name(self._fn), program, self._captured_step(window, dependencies, args, kwargs))
        results = program.step.run(window, lambda x: program.tensor(x, dependencies), self._options.lowering)
        return program.traced.restored(results)

    def _check_retention(self) -> None:
        said = self._options.retention
        for name, value, short in (
            ("memory_budget", said.memory_budget, "the budget"),
            ("offload", said.place, "offload"),
        ):
            if value is not None:
                raise WindowError(
                    f"{name}={value!r} of {_name(self._fn)}, a compiled step: the window it is called in decides what "
                    f"is kept; give {short} to SlidingWindow"
                )

    def _captured_step(
        self,
        window: RecordedSession,
        dependencies: Dependencies,
        args: tuple,
        kwargs: dict,
        reads: Reads | None = None,
    ) -> StepSpecialization:
        step, _, traced = captured_step(self._fn, window, args, kwargs, reads=reads)
        if reads is not None:
            with window.recorder.paused():
                reads.settle(dependencies)
        at = dependencies.place_of()
        sources = {
            x: at.get(id(x.tensor), x.tensor) for x in (*step.given, *step.left) if isinstance(x, Input)
        }
        return StepSpecialization(step, sources, dependencies.remembered(), traced)

    def _run(self, program: Specialization, dependencies: Dependencies) -> Any:
        tensors = program.tensors(dependencies)
        rolled, options = program.rolled, self._options
        differentiable = torch.is_grad_enabled() and bool(program.keys)
        kept = self._kept(program, tensors) if differentiable else Kept(1)
        written = [
            dependencies.tensors[t] if isinstance(t, int) else t
            for t in program.writes
            if not isinstance(t, tuple)
        ]
        run = Run(rolled, tensors, options.lowering, rolled.backward_hook, kept, written)
        if differentiable:
            found = Call.apply(run, program.keys, rolled.dead, *(tensors[x] for x in program.keys))
        else:
            found = run.forward()
        self._write(program, dependencies, run.last)
        return program.traced.restored(found)

    def _kept(self, program: Specialization, tensors: dict[Input, Tensor]) -> Kept:
        """What to keep for the backward, as the windows inside say, else the decorator."""
        rolled, lowering = program.rolled, self._options.lowering
        if rolled.kept is None:
            retention = retention_of(rolled, self._options)
            with waiting(f"planning what {_name(self._fn)} keeps ..."):
                kept, program.plan = decide(rolled, lowering, retention, _name(self._fn), tensors)
            checkpoint(rolled, replace(self._options, kept=kept))
            if program.plan is not None:
                if retention.memory_budget is None:
                    tell_default(_name(self._fn), program.plan.budget)
                _plans.info("%s: %s", _name(self._fn), program.plan)
        assert rolled.kept is not None
        return rolled.kept

    @torch.no_grad()
    def _write(
        self, program: Specialization, dependencies: Dependencies, last: list[tuple[Any, Tensor]]
    ) -> None:
        for target, (_, value) in zip(program.writes, last, strict=True):
            if isinstance(target, tuple):
                optimizer, p, name = target
                optimizer.state[p][name] = value.clone()
            else:
                (dependencies.tensors[target] if isinstance(target, int) else target).copy_(value)


class BoundFunction:
    """A compiled method of an object."""

    def __init__(self, function: CompiledFunction, instance: Any) -> None:
        functools.update_wrapper(self, function._fn)
        self.function, self.instance = function, instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        return self.function(self.instance, *args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        """What a call with these arguments compiles to and costs; see `metaoptim.explain`."""
        return self.function.explain(self.instance, *args, **kwargs)


def compile(
    fn: Callable | None = None,
    *,
    window: int | None = None,
    memory_budget: int | float | str | None = None,
    slots: int | None = None,
    offload: str | os.PathLike[str] | None = None,
    backend: str = "inductor",
    hvp: str = "auto",
    self_check: bool = True,
    recapture: bool = False,
) -> Any:
    """Capture a function that holds a window, and run it through torch.compile.

    Args:
        fn: the function; None to use `compile` with options, as a decorator.
        window: as of `SlidingWindow`, for windows inside that leave it unsaid.
        memory_budget: likewise: most that a call and its backward may hold at a time, beyond the caller's own tensors.
        slots: likewise; give one of the two.
        offload: likewise, with either: where states go for which there is no room on the device.
        backend: a backend of torch.compile: ``"inductor"``, ``"aot_eager"``, or ``"eager"``.
        hvp: how a step's gradient is differentiated: ``"reverse"`` (over reverse), ``"mixed"`` (forward over reverse,
            with layers made again: less memory for about a third more work), or ``"auto"``.
        self_check: compare every compiled graph with its uncompiled form on first use.
        recapture: for debugging: capture again in every call, and compare. What is frozen at capture must not change.

    Returns:
        A function of the same arguments and results. Its results can be differentiated once, any number of times.

    Raises:
        TypeError: for something else than a function.
        ValueError: for an unknown backend, hvp or budget, a window or slots below 1, both slots and a budget, or an
            ``offload`` that is no directory or has nothing to do.
        BudgetError: on the first call, for a budget in which not even one state can be kept.
        StoreError: from a call or its backward, where an offloaded state cannot be written, or is damaged.
        CaptureError: on the first call, for what cannot be captured; with ``recapture``, on a later call of a function
            that has changed behind its guards.

    Example:
        >>> net, log_lr = torch.nn.Linear(3, 1), torch.tensor(-2.0, requires_grad=True)
        >>> @metaoptim.compile(backend="eager")
        ... def meta_loss(net, log_lr, xs):
        ...     inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> meta_loss(net, log_lr, torch.ones(5, 2, 3)).backward()
        >>> log_lr.grad.shape
        torch.Size([])
    """
    if fn is not None and not callable(fn):
        hint = f"; did you mean backend={fn!r}?" if isinstance(fn, str) else ""
        raise TypeError(f"compile: got {type(fn).__name__}, expected a function{hint}")
    check_count("window", window)
    lowering = Lowering.stated(backend, hvp, self_check)
    options = Options(window, Retention(slots, memory_budget, offload), lowering, recapture)
    if fn is None:
        return lambda f: CompiledFunction(f, options)
    return CompiledFunction(fn, options)
