"""plan: what a compiled function would cost at another horizon or in another budget; nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .captured import device_of, stated, step_of, trace_of
from .compile import BoundFunction, CompiledFunction
from .compiler.cost import CostModel, step_flops
from .compiler.ir import Loop
from .compiler.passes.pipeline import Options, compile_trace
from .compiler.program import RolledProgram, nbytes, plural, readable_bytes
from .errors import BudgetError, WindowError
from .runtime.budget import budget_bytes, check_budget
from .runtime.planner import FEW_SLOTS, peaks_of
from .runtime.session import current_session


@dataclass(frozen=True)
class Cost:
    """What a call of a compiled function and its backward would cost.

    Attributes:
        function: its name.
        horizon: T.
        memory_budget: bytes, or None.
        slots: how many states are kept: T for all of them.
        peak_bytes: most bytes held at a time, beyond the caller's own tensors.
        minimum_budget: the smallest budget there is a plan for.
        extra_forwards: steps run a second time.
        time_factor: floating point operations, by those with every state kept; 1 where none are counted.
        model: the formulas behind it, in T and c.
    """

    function: str
    horizon: int
    memory_budget: int | None
    slots: int
    peak_bytes: int
    minimum_budget: int
    extra_forwards: int
    time_factor: float
    model: CostModel

    def __str__(self) -> str:
        budget = "no budget" if self.memory_budget is None else f"within {readable_bytes(self.memory_budget)}"
        kept = "every state" if self.slots >= self.horizon else plural(self.slots, "state")
        lines = [
            f"{self.function}: {self.horizon:,} inner steps, {budget}",
            f"  keeps {kept} of {readable_bytes(self.model.state_bytes)}, peak {readable_bytes(self.peak_bytes)} "
            f"(at least {readable_bytes(self.minimum_budget)})",
            f"  runs {self.extra_forwards:,} steps a second time: {self.time_factor:.2f} times the work",
            f"  peak = {self.model.peak} bytes",
        ]
        return "\n".join(lines)

    def curve(self, points: int = 40) -> Iterator[tuple[int, float]]:
        """(bytes, time factor) for budgets from the smallest to that which keeps every state."""
        slots = {max(1, round(self.horizon ** (k / (points - 1)))) for k in range(points)}
        for kept in sorted(slots):
            values = self.model.at(self.horizon, kept)
            yield values["peak_bytes"], _factor(self.model, self.horizon, values)

    def plot(self, axes: Any = None) -> Any:
        """Draw time against budget, with matplotlib.

        Args:
            axes: to draw on; None for new ones.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

        axes = plt.figure().subplots() if axes is None else axes
        budgets, factors = zip(*self.curve(), strict=True)
        axes.plot(
            [b / 2**20 for b in budgets], factors, drawstyle="steps-post", label=f"T = {self.horizon:,}"
        )
        axes.plot([self.peak_bytes / 2**20], [self.time_factor], "o")
        axes.set(xscale="log", xlabel="memory budget (MiB)", ylabel="work, relative to keeping every state")
        return axes


def plan(
    fn: Callable, *, horizon: int | None = None, memory_budget: int | float | str | None = None
) -> Callable[..., Cost]:
    """Say what a compiled function would cost at some horizon, in some memory, without running it.

    Args:
        fn: compiled, or a plain function that holds a window. Its loop is a ``window.scan`` or ``window.range``.
        horizon: T, in place of the length of its loop (the longest, if it has several); None for as it is.
        memory_budget: as of `compile`; None for what the function itself says.

    Returns:
        A function of the same arguments that returns a `Cost`.

    Raises:
        BudgetError: from that function, for a budget too small for the horizon.
        CaptureError: likewise, for what cannot be captured.
        WindowError: likewise, for a function without a loop, or with ``offload``.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> @metaoptim.compile(backend="eager")
        ... def meta_loss(net, xs):
        ...     inner = metaoptim.MetaAdam([net])
        ...     with metaoptim.SlidingWindow(offline=True) as window:
        ...         for x in window.scan(xs):
        ...             inner.step(net(x).square().mean())
        ...         return net(xs[0]).square().mean()
        >>> cost = metaoptim.plan(meta_loss, horizon=50_000, memory_budget="64KiB")(net, torch.ones(20, 2, 3))
        >>> cost.horizon, cost.peak_bytes <= 64 * 1024
        (50000, True)

    References:
        Griewank & Walther 2000, "Algorithm 799: Revolve", ACM TOMS 26.
    """
    check_budget(memory_budget, None)
    if current_session() is not None:
        raise WindowError(
            "plan was called inside a window: it takes a function that holds its window itself. For a compiled step "
            "use explain(step); to plan, put the loop into a function"
        )
    if isinstance(fn, BoundFunction):
        return partial(plan(fn.function, horizon=horizon, memory_budget=memory_budget), fn.instance)
    compiled: Any = fn if isinstance(fn, CompiledFunction) else CompiledFunction(fn, Options())

    def cost(*args: Any, **kwargs: Any) -> Cost:
        traced, tracer, _ = trace_of(compiled._fn, args, kwargs)
        tracer.trace.outputs = traced.tensors
        program, _ = compile_trace(tracer.trace, compiled._options, step_of)
        said = stated(program, compiled._options)
        if said.offload is not None:
            raise WindowError(
                "plan: the function offloads states (offload=), and the formulas are those of recomputing them "
                "instead; fn.explain(...) goes through a run with offload, or leave it out to see what it saves"
            )
        slots, budget = said.slots, said.memory_budget
        if memory_budget is not None:
            slots, budget = None, memory_budget
        return _cost(compiled, program, horizon, slots, budget)

    return cost


def _cost(
    fn: CompiledFunction, program: RolledProgram, horizon: int | None, slots: int | None, budget: Any
) -> Cost:
    loops = [x for x in program.calls if isinstance(x, Loop)]
    if not loops:
        raise WindowError("plan: the function has no loop; write it with window.scan or window.range")
    longest = max(loops, key=lambda x: x.count)
    positions = program.positions if horizon is None else program.positions + horizon - program.horizon
    if positions < 1:
        raise ValueError(f"horizon: got {horizon}, expected at least 1")
    model = _model(fn, program, longest)
    name = getattr(fn, "__qualname__", "the function")
    bytes_ = None if budget is None else budget_bytes(budget, device_of(program))
    kept = (
        min(positions, positions if slots is None else slots)
        if bytes_ is None
        else model.slots(positions, bytes_)
    )
    minimum = model.minimum(positions)
    if kept < 1:
        raise BudgetError(
            f"memory_budget: {bytes_} bytes are too few for {name} and {positions} calls: the smallest feasible budget "
            f"is {minimum} bytes ({readable_bytes(minimum)})",
            minimum,
        )
    steps, values = program.horizon if horizon is None else horizon, model.at(positions, kept)
    factor = _factor(model, positions, values)
    return Cost(
        name, steps, bytes_, kept, values["peak_bytes"], minimum, values["extra_forwards"], factor, model
    )


def _factor(model: CostModel, horizon: int, values: dict[str, int]) -> float:
    once = horizon * (model.forward_flops + model.vjp_flops)
    return values["flops"] / once if once else 1.0


def _model(fn: CompiledFunction, program: RolledProgram, longest: Loop) -> CostModel:
    how = fn._options.lowering
    peaks = peaks_of(program, how)
    moving = [
        g
        for call, strides in zip(longest.calls, longest.strides, strict=True)
        for g, stride in zip(call.inputs, strides, strict=True)
        if stride
    ]
    read = [r for g in moving for r in (g.of if g.kind == "each" else [g])]
    scanned = {r.of for r in read if r.kind == "scan" and r.of.grad}
    listed = {r.of for r in read if r.kind == "input" and r.of.grad}
    step_bytes = sum(nbytes(x.spec) // x.spec[0][0] for x in scanned)
    step_bytes += sum(nbytes(x.spec) for x in listed) // max(longest.count, 1)
    step_bytes //= len(longest.calls)
    per_slot = peaks.per_slot
    fixed = peaks(FEW_SLOTS) - FEW_SLOTS * per_slot - step_bytes * program.positions
    flops = [step_flops(call.step, how) for call in longest.calls]
    forward, vjp = (sum(of) // len(flops) for of in zip(*flops, strict=True))
    return CostModel(fixed, per_slot, step_bytes, forward, vjp)
