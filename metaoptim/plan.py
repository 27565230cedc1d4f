"""plan: what a compiled function would cost at another horizon or in another budget; nothing is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .captured import stated, step_of, trace_of
from .compile import BoundFunction, CompiledFunction
from .compiler.cost import SIZES, CostModel, step_flops
from .compiler.ir import Loop
from .compiler.passes.pipeline import Options, compile_trace
from .compiler.program import RolledProgram, nbytes, plural, readable_bytes
from .compiler.stepcost import residual_cost, step_cost
from .errors import WindowError
from .runtime.budget import budget_bytes, check_budget
from .runtime.offload import check_offload
from .runtime.planner import FEW_SLOTS, Plan, Planner, device_of, residuals_from, with_residuals
from .runtime.session import current_session


@dataclass(frozen=True)
class Cost:
    """What a call of a compiled function and its backward would cost.

    Attributes:
        function: its name.
        horizon: T.
        memory_budget: bytes, or None.
        plan: ``"unrolled"``, ``"all states"``, ``"scheduled"`` or ``"tiered"``, as in `metaoptim.explain`.
        slots: how many states are kept: T for all of them.
        saved_calls: over how many of the last calls residuals are saved, which spare their derivatives the forward.
        peak_bytes: most bytes held at a time, beyond the caller's own tensors.
        minimum_budget: the smallest budget there is a plan for.
        extra_forwards: steps run a second time.
        offloaded_bytes: bytes that go to a lower tier, and come back.
        time_factor: floating point operations, by those with every state kept; 1 where none are counted.
        model: the formulas behind it.
    """

    function: str
    horizon: int
    memory_budget: int | None
    plan: str
    slots: int
    saved_calls: int
    peak_bytes: int
    minimum_budget: int
    extra_forwards: int
    offloaded_bytes: int
    time_factor: float
    model: CostModel
    _setting: _Setting = field(repr=False, compare=False)

    def __str__(self) -> str:
        budget = "no budget" if self.memory_budget is None else f"within {readable_bytes(self.memory_budget)}"
        kept = "every state" if self.plan in ("unrolled", "all states") else plural(self.slots, "state")
        saved = f", residuals of the last {plural(self.saved_calls, 'call')}" if self.saved_calls else ""
        down = f", {readable_bytes(self.offloaded_bytes)} go down and up" if self.plan == "tiered" else ""
        peak = self.model.peak_with_residuals if self.saved_calls else self.model.peak
        peak = self.model.peak_with_tier if self.plan == "tiered" else peak
        sizes = [
            f"{s} = {readable_bytes(self.model.sizes[s])} ({word})"
            for s, word in SIZES.items()
            if s in peak.free_symbols
        ]
        lines = [
            f"{self.function}: {self.horizon:,} inner steps, {budget}: {self.plan}",
            f"  keeps {kept} of {readable_bytes(self.model.state_bytes)}{saved}{down}; peak "
            f"{readable_bytes(self.peak_bytes)}; the smallest budget is {readable_bytes(self.minimum_budget)}",
            f"  runs {self.extra_forwards:,} steps a second time: {self.time_factor:.2f} times the work of keeping "
            "every state",
            f"  peak = {peak}, with " + ", ".join(sizes),
        ]
        return "\n".join(lines)

    def curve(self, points: int = 40, *, offload: bool = False) -> Iterator[tuple[int, float]]:
        """(bytes, time factor) for budgets from the smallest to that which keeps every state and residuals.

        Args:
            points: how many budgets are tried, at most, up to every state, and beyond.
            offload: whether states without a slot go to a lower tier.
        """
        setting = self._setting
        planner = setting.planner(offload)
        powers = sorted({max(1, round(planner.states ** (k / (points - 1)))) for k in range(points)})
        budgets = {planner.peak(kept, tiered) for kept in (*powers, 2, 3) for tiered in {False, offload}}
        every = planner.every
        budgets |= {every, *(every + setting.residuals(saved) for saved in powers)}
        found = {}
        for budget in sorted(b for b in budgets if b >= planner.least(offload)):
            cost = setting.within(budget, offload)
            found[cost.peak_bytes] = cost.time_factor
        yield from sorted(found.items())

    def plot(self, axes: Any = None) -> Any:
        """Draw time against budget, with matplotlib; also with offloading, where the function offloads.

        Args:
            axes: to draw on; None for new ones.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

        axes = plt.figure().subplots() if axes is None else axes
        lines = [(False, f"T = {self.horizon:,}")]
        if self._setting.offload:
            lines.append((True, f"T = {self.horizon:,}, with offload"))
        for offload, label in lines:
            budgets, factors = zip(*self.curve(offload=offload), strict=True)
            axes.plot([b / 2**20 for b in budgets], factors, drawstyle="steps-post", label=label)
        axes.plot([self.peak_bytes / 2**20], [self.time_factor], "o", label=f"{self.plan}, as asked")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="memory budget (MiB)",
            ylabel="work, relative to keeping every state",
            title=self.function,
        )
        axes.legend()
        return axes


@dataclass(frozen=True)
class _Setting:
    """A function at some horizon, of which costs are asked.

    Attributes:
        name: of the function.
        program: with so many iterations of its loop.
        alone, tier: planners without and with a lower tier; the latter None where none was asked for.
        model: the formulas.
        least: room beside every state from which on residuals are saved at all.
    """

    name: str
    program: RolledProgram
    alone: Planner
    tier: Planner | None
    model: CostModel
    least: int

    @property
    def offload(self) -> bool:
        return self.tier is not None

    def planner(self, offload: bool) -> Planner:
        if not offload:
            return self.alone
        if self.tier is None:
            raise ValueError("offload: the cost was asked for without; give offload to metaoptim.plan")
        return self.tier

    def residuals(self, saved: int) -> int:
        """The room beside every state that the residuals of the last ``saved`` calls take."""
        model = self.model
        return max(model.residual_bytes * saved + model.residual_fixed_bytes, self.least)

    def within(self, budget: int, offload: bool) -> Cost:
        """The cost of a call that may hold ``budget`` bytes."""
        planner = self.planner(offload)
        plan = with_residuals(planner.plan(budget), self.program, planner.how)
        return self.cost(plan, budget)

    def with_slots(self, slots: int | None, offload: bool) -> Cost:
        """The cost of a call that keeps ``slots`` states; None for all."""
        states = self.alone.states
        kept = None if slots is None or slots >= states else slots
        tiered = offload and kept is not None
        planner = self.planner(tiered)
        peak = planner.every if kept is None else planner.peak(kept, tiered)
        least = planner.least(tiered)
        return self.cost(Plan(peak, kept, peak, least, offload=tiered), None)

    def cost(self, plan: Plan, budget: int | None) -> Cost:
        program, model = self.program, self.model
        states, positions = self.alone.states, program.positions
        kept = states if plan.slots is None else plan.slots
        values = model.at(positions, kept, plan.saved, plan.offload)
        once = positions * model.forward_flops + states * model.vjp_flops
        kind = "tiered" if plan.offload else "all states" if kept >= states else "scheduled"
        return Cost(
            function=self.name,
            horizon=program.horizon,
            memory_budget=budget,
            plan="unrolled" if plan.saved and plan.saved == program.swept else kind,
            slots=kept,
            saved_calls=plan.saved,
            peak_bytes=plan.peak_bytes,
            minimum_budget=plan.minimum,
            extra_forwards=values["extra_forwards"],
            offloaded_bytes=values["offloaded_bytes"],
            time_factor=values["flops"] / once if once else 1.0,
            model=model,
            _setting=self,
        )


def plan(
    fn: Callable,
    *,
    horizon: int | None = None,
    memory_budget: int | float | str | None = None,
    offload: str | os.PathLike[str] | None = None,
) -> Callable[..., Cost]:
    """Say what a compiled function would cost at some horizon, in some memory, without running it.

    Args:
        fn: compiled, or a plain function that holds a window. Its loop is a ``window.scan`` or ``window.range``.
        horizon: T, in place of the length of its loop (the longest, if it has several); None for as it is.
        memory_budget: as of `compile`; None for what the function itself says.
        offload: as of `compile`, with ``memory_budget``; None for what the function itself says.

    Returns:
        A function of the same arguments that returns a `Cost`.

    Raises:
        BudgetError: from that function, for a budget too small for the horizon.
        CaptureError: likewise, for what cannot be captured.
        WindowError: likewise, for a function without a loop, or one whose gradients are truncated by ``window=W`` at
            losses between its inner steps.

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
    check_offload(offload, None, memory_budget)
    if current_session() is not None:
        raise WindowError(
            "plan was called inside a window: it takes a function that holds its window itself. For a compiled step "
            "use explain(step); to plan, put the loop into a function"
        )
    if isinstance(fn, BoundFunction):
        bound = plan(fn.function, horizon=horizon, memory_budget=memory_budget, offload=offload)
        return partial(bound, fn.instance)
    compiled: Any = fn if isinstance(fn, CompiledFunction) else CompiledFunction(fn, Options())

    def cost(*args: Any, **kwargs: Any) -> Cost:
        traced, tracer, _ = trace_of(compiled._fn, args, kwargs)
        tracer.trace.outputs = traced.tensors
        program, _ = compile_trace(tracer.trace, compiled._options, step_of)
        said = stated(program, compiled._options)
        slots, budget = said.slots, said.memory_budget
        tiered = offload is not None or said.offload is not None
        if memory_budget is not None:
            slots, budget = None, memory_budget
        setting = _setting(compiled, program, horizon, tiered)
        if budget is None:
            return setting.with_slots(slots, tiered)
        return setting.within(budget_bytes(budget, device_of(program)), tiered)

    return cost


def _setting(fn: CompiledFunction, program: RolledProgram, horizon: int | None, offload: bool) -> _Setting:
    loops = [x for x in program.calls if isinstance(x, Loop)]
    if not loops:
        raise WindowError("plan: the function has no loop; write it with window.scan or window.range")
    if program.limit is not None and program.loss_between:
        raise WindowError(
            f"plan: with window={program.limit}, each of the losses between the inner steps sweeps back over steps of "
            "its own, for which there are no formulas; fn.explain(...) goes through all of it"
        )
    longest = max(loops, key=lambda x: x.count)
    more = 0 if horizon is None else horizon - program.horizon
    each = sum(call.step.steps for call in longest.calls)
    count = longest.count + more // max(each, 1)
    if count < 1:
        raise ValueError(
            f"horizon: got {horizon}, expected at least {program.horizon - each * (longest.count - 1)}"
        )
    calls = [replace(x, count=count) if x is longest else x for x in program.calls]
    longer = replace(program, calls=calls)
    step_bytes = _learnt_bytes(longest) // len(longest.calls)
    beside = step_bytes * len(longest.calls) * (count - longest.count)
    name, how = getattr(fn, "__qualname__", "the function"), fn._options.lowering
    alone = Planner(longer, how, name, beside=beside)
    tier = Planner(longer, how, name, True, beside) if offload else None
    return _Setting(
        name, longer, alone, tier, _model(alone, tier, longest, step_bytes), residuals_from(longer, how)
    )


def _learnt_bytes(loop: Loop) -> int:
    """Bytes of the gradients that an iteration adds: of rows, and of listed tensors, that it alone reads."""
    moving = [
        g
        for call, strides in zip(loop.calls, loop.strides, strict=True)
        for g, stride in zip(call.inputs, strides, strict=True)
        if stride
    ]
    read = [x for g in moving for x in (g.of if g.kind == "each" else [g])]
    rows = {x.of for x in read if x.kind == "scan" and x.of.grad}
    listed = {x.of for x in read if x.kind == "input" and x.of.grad}
    return (
        sum(nbytes(x.spec) // x.spec[0][0] for x in rows) + sum(nbytes(x.spec) for x in listed) // loop.count
    )


def _model(alone: Planner, tier: Planner | None, longest: Loop, step_bytes: int) -> CostModel:
    program, how, steps = alone.program, alone.how, [call.step for call in longest.calls]
    few, per_slot = min(FEW_SLOTS, alone.states), alone.alone.per_slot
    transient = max(step_cost(g, how).vjp_bytes for g in steps)
    costs = {id(g): residual_cost(g, how) for g in program.step_graphs}
    kept = max(costs[id(g)][0] for g in steps)
    items = list(program.counted())
    at = next(i for i, (call, _) in enumerate(items) if call is longest.calls[-1])
    others = sum(count * (costs[id(call.step)][0] - kept) for call, count in items[at + 1 :])
    flops = [step_flops(g, how) for g in steps]  # of a round of several, their mean
    forward, vjp, spared = (sum(of) // len(flops) for of in zip(*flops, strict=True))
    return CostModel(
        fixed_bytes=alone.peak(few) - few * per_slot - step_bytes * program.positions - transient,
        transient_bytes=transient,
        state_bytes=per_slot,
        step_bytes=step_bytes,
        forward_flops=forward,
        vjp_flops=vjp,
        residual_bytes=kept,
        residual_fixed_bytes=others + max(more for _, more in costs.values()) if kept else 0,
        saved_flops=spared,
        tier_bytes=0 if tier is None else tier.peak(few, True) - alone.peak(few),
        window=program.swept if program.swept < program.positions else None,
    )
