"""explain: what a compiled function becomes, what it will cost, and where its gradients go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .compile import compiled_of
from .report.of_function import report_of
from .report.report import Report


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
    compiled, instance = compiled_of(fn)

    def explained(*args: Any, **kwargs: Any) -> Report:
        found = report_of(compiled._fn, compiled._options, (*instance, *args), kwargs, measure)
        return replace(found, verbose=verbose)

    return explained
