"""compile: a function that holds a window, captured whole, rewritten by passes and run by torch.compile's backends.

explain: what such a function becomes, what it will cost, and where its gradients go.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .compiler.capture import intercept
from .compiler.ir.retention import Retention, check_count
from .compiler.ir.step import Lowering
from .compiler.lower.compile_graph import waiting
from .compiler.passes.options import Options
from .errors import WindowError
from .functions.guards import Dependencies
from .functions.specialization import (
    Specialization,
    StepSpecialization,
    compare,
    name_of,
    specialize,
)
from .functions.specializations import Specializations
from .report.explain import report_of
from .report.report import Report
from .runtime.windows.recording_session import RecordedSession
from .runtime.windows.session import current_session


class Method:
    """A function that is a method where a class holds it."""

    _instance: tuple[Any, ...]  # whose method it is

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None or self._instance:
            return self
        method = copy.copy(self)  # with the same specializations
        method._instance = (instance,)
        return method


class CompiledFunction(Method):
    """What `compile` returns: called like the function itself."""

    def __init__(self, fn: Callable, options: Options) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._options, self._name, self._instance = fn, options, name_of(fn), ()
        self._specializations = Specializations(fn)

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """What a call with these arguments compiles to and costs; see `metaoptim.explain`."""
        return report_of(self._fn, self._options, (*self._instance, *args), kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function: capture and compile it on first use, and whenever a guard fails."""
        recorder, session, args = intercept.recording.get(), current_session(), (*self._instance, *args)
        if recorder is not None and recorder.symbolic:
            return self._fn(*args, **kwargs)
        if session is None or isinstance(session, RecordedSession):
            found, dependencies = self._found(session, args, kwargs)
            return found.run(dependencies, session)
        return self._fn(*args, **kwargs)  # full_tape: the oracle is not compiled

    def compile_now(self, *args: Any, **kwargs: Any) -> None:
        """Capture and compile the function for these arguments, and wait until that is done; nothing is run.

        A call does not wait: its graphs run as they are until their compiled forms, which other processes make, are
        there. After this, calls with such arguments run compiled from the beginning. A compiled step, which runs in
        the window of its caller, cannot be compiled beforehand.

        Raises:
            WindowError: inside a window.
            CaptureError: as in a call.
        """
        if current_session() is not None:
            raise WindowError(
                f"{self._name}.compile_now() was called inside a window: it is for functions that hold their windows, "
                "and called before them. A compiled step is compiled while its window goes on"
            )
        found, _ = self._found(None, (*self._instance, *args), kwargs)
        assert isinstance(found, Specialization)  # outside of windows
        found.begin()
        with waiting(f"compiling {self._name} ..."):
            for step in found.program.step_graphs:
                for coming in step.derived.coming.values():
                    coming.wait()

    def _found(
        self, window: RecordedSession | None, args: tuple, kwargs: dict
    ) -> tuple[Specialization | StepSpecialization, Dependencies]:
        """The specialization for a call, captured where there is none yet."""
        fn, options = self._fn, self._options
        if window is not None:
            self._check_retention()
        capture = functools.partial(specialize, fn, options, window)
        found, dependencies, new = self._specializations.serve(args, kwargs, capture, window)
        if options.recapture and not new:
            compare(self._name, found, capture(dependencies, args, kwargs))
        return found, dependencies

    def _check_retention(self) -> None:
        said = self._options.retention
        told = ("memory_budget", said.memory_budget, "the budget"), ("offload", said.place, "offload")
        for name, value, short in told:
            if value is not None:
                raise WindowError(
                    f"{name}={value!r} of {self._name}, a compiled step: the window it is called in decides what is "
                    f"kept; give {short} to SlidingWindow"
                )


def compiled_of(fn: Callable) -> CompiledFunction:
    """A function as a compiled one, with the options of `compile` by default."""
    return fn if isinstance(fn, CompiledFunction) else CompiledFunction(fn, Options())


def compile(
    fn: Callable | None = None,
    *,
    window: int | None = None,
    memory_budget: int | float | str | None = None,
    slots: int | None = None,
    offload: str | os.PathLike[str] | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    hvp: str = "auto",
    self_check: bool = True,
    recapture: bool = False,
) -> Any:
    """Capture a function that holds a window, and run it through torch.compile.

    Args:
        fn: the function; None to use `compile` with options, as a decorator.
        window: W of windows inside that do not say theirs; see `SlidingWindow`.
        memory_budget: for windows inside that say nothing about what is kept: most that a call and its backward may
            hold at a time, beyond the caller's own tensors.
        slots: for the same windows, how many states are kept; instead of a budget.
        offload: with either: where states go for which there is no room on the device.
        backend: a backend of torch.compile: ``"inductor"``, ``"aot_eager"``, or ``"eager"``.
        mode: ``"reduce-overhead"``: on a GPU, the kernels of each graph are captured as a CUDA graph, and launched
            together from its second run on. For small networks, whose kernels take less time than their launches. It
            costs two copies of what goes into a graph and comes out, and memory that stays between calls. None or
            ``"default"``: kernels are launched one by one.
        hvp: how a step's gradient is differentiated: ``"reverse"`` (over reverse), ``"mixed"`` (forward over reverse,
            with layers made again: less memory for about a third more work), or ``"auto"``.
        self_check: compare every compiled graph with its uncompiled form on first use.
        recapture: for debugging: capture again in every call, and compare. What is frozen at capture must not change.

    Returns:
        A function of the same arguments and results. Its results can be differentiated once, any number of times.

    Raises:
        TypeError: for something else than a function.
        ValueError: for an unknown backend, mode, hvp or budget, a window or slots below 1, both slots and a budget, or
            an ``offload`` that is no directory or has nothing to do.
        BudgetError: on the first call, for a budget in which not even one state can be kept.
        StoreError: from a call or its backward, where an offloaded state cannot be written, or is damaged.
        CaptureError: on the first call, for what cannot be captured, and for CUDA graphs of a function that is on the
            CPU, or that a budget bounds; with ``recapture``, on a later call of a function
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
    lowering = Lowering.stated(backend, hvp, self_check, mode=mode)
    options = Options(window, Retention(slots, memory_budget, offload), lowering, recapture)
    if fn is None:
        return lambda f: CompiledFunction(f, options)
    return CompiledFunction(fn, options)


def explain(fn: Callable, *, measure: bool = False, verbose: bool = False) -> Callable[..., Report]:
    """Explain what `metaoptim.compile` makes of a function.

    ``explain(fn)(*args)`` captures ``fn`` as it would act on these arguments, takes it through the passes and goes
    through a run of it on sizes alone. Nothing is computed: networks, optimizers, their states and every ``.grad`` stay
    as they are, and the random generator stays where it is. Inside an ordinary window it explains a compiled step.

    Args:
        fn: a compiled function, or a plain one, which is then explained with the default options of `compile`.
        measure: run it too, forward and backward, and measure its peak beside the predicted one. Everything stays as it
            is all the same; a profiler makes the run slow.
        verbose: let the report's text show the program before and after each pass, too; `Report.programs` is that text.

    Returns:
        A function of the same arguments that returns a `Report`: text by ``str``, values by `Report.to_dict`, tables
        in a terminal if `rich` is installed.

    Raises:
        CaptureError: for what cannot be captured.
        BudgetError: for a memory budget in which not even one state can be kept.

    Example:
        >>> net, log_lr = torch.nn.Linear(3, 1), torch.tensor(-2.0, requires_grad=True)
        >>> @metaoptim.compile(backend="eager", slots=3)
        ... def meta_loss(net, log_lr, xs):
        ...     inner = metaoptim.MetaSGD([net], lr=log_lr.exp())
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> report = metaoptim.explain(meta_loss)(net, log_lr, torch.ones(20, 2, 3))
        >>> report.horizon, report.gradient_targets
        (20, ['net.weight', 'net.bias', 'log_lr'])
    """
    compiled = compiled_of(fn)

    def explained(*args: Any, **kwargs: Any) -> Report:
        found = report_of(compiled._fn, compiled._options, (*compiled._instance, *args), kwargs, measure)
        return replace(found, verbose=verbose)

    return explained
