"""What `plan` says: the cost of a call at some horizon and in some budget, and at any other budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from ..compiler.cost.model import SIZES, CostModel, step_flops
from ..compiler.cost.step import residual_cost, step_cost
from ..compiler.ir.programs.calls import Loop
from ..compiler.ir.programs.program import Kept, Program
from ..compiler.ir.step import Lowering
from ..compiler.ir.tensors import nbytes
from ..compiler.ir.text import plural, readable_bytes
from ..errors import WindowError
from ..runtime.budget.peaks import FEW_SLOTS
from ..runtime.budget.planner import (
    Plan,
    Planner,
    default_plan,
    residuals_from,
    with_default_residuals,
    with_residuals,
)


@dataclass(frozen=True)
class Cost:
    """What a call of a compiled function and its backward would cost.

    Attributes:
        function: its name.
        horizon: T.
        batch: the size that was asked for; None for that of the arguments.
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
    batch: int | None
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
    _setting: Setting = field(repr=False, compare=False)

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
        batches = "" if self.batch is None else f" on batches of {self.batch:,}"
        lines = [
            f"{self.function}: {self.horizon:,} inner steps{batches}, {budget}: {self.plan}",
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
        if self._setting.tier is not None:
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


class Setting:
    """A function at some horizon, of which costs are asked.

    Args:
        program: of the function.
        lowering: the backend and HVP mode of its graphs.
        name: of the function.
        horizon: T, in place of that of the program.
        offload: whether states without a slot may go to a lower tier.
        batch: the size of the batch that was asked for.

    Raises:
        ValueError: for a horizon below that of one iteration.
        WindowError: for a program without a loop, or with truncated gradients of losses between its steps.
    """

    def __init__(
        self,
        program: Program,
        lowering: Lowering,
        name: str,
        horizon: int | None = None,
        offload: bool = False,
        batch: int | None = None,
    ) -> None:
        loops = [x for x in program.calls if isinstance(x, Loop)]
        if not loops:
            raise WindowError("plan: the function has no loop; write it with window.scan or window.range")
        if program.window is not None and program.loss_between:
            raise WindowError(
                f"plan: with window={program.window}, each of the losses between the inner steps sweeps back over "
                "steps of its own, for which there are no formulas; fn.explain(...) goes through all of it"
            )
        longest = max(loops, key=lambda x: x.count)
        more = 0 if horizon is None else horizon - program.horizon
        each = sum(call.step.steps for call in longest.calls)
        count = longest.count + more // max(each, 1)
        if count < 1:
            least = program.horizon - each * (longest.count - 1)
            raise ValueError(f"horizon: got {horizon}, expected at least {least}")
        loop, learnt = _stretched(longest, count), _learnt_bytes(longest)
        self.program = replace(program, calls=[loop if x is longest else x for x in program.calls])
        self.name, self.batch, beside = name, batch, learnt * (count - longest.count)
        self.alone = Planner(self.program, lowering, name, beside=beside)
        self.tier = Planner(self.program, lowering, name, True, beside) if offload else None
        self.model = _model(self.alone, self.tier, loop, learnt // len(longest.calls))
        #: the smallest room beside every state with which residuals are saved at all
        self.least = residuals_from(self.program, lowering)

    def planner(self, offload: bool) -> Planner:
        """The planner for a call with a lower tier, or without."""
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
        plan = with_residuals(planner.plan(budget), self.program, planner.lowering)
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

    def with_nothing_said(self) -> Cost:
        """The cost of a call that states neither slots nor a budget."""
        plan = default_plan(self.alone)
        if plan is not None:
            return self.cost(plan, plan.budget)
        kept, more = with_default_residuals(Kept(), self.program, self.alone.lowering)
        peak = self.alone.every + more
        return self.cost(Plan(peak, None, peak, self.alone.least(), saved=kept.saved), None)

    def cost(self, plan: Plan, budget: int | None) -> Cost:
        """The cost of a call that keeps to ``plan``."""
        program, model = self.program, self.model
        states, positions = self.alone.states, program.positions
        kept = states if plan.slots is None else plan.slots
        values = model.at(positions, kept, plan.saved, plan.offload)
        once = positions * model.forward_flops + states * model.vjp_flops
        kind = "tiered" if plan.offload else "all states" if kept >= states else "scheduled"
        return Cost(
            function=self.name,
            horizon=program.horizon,
            batch=self.batch,
            memory_budget=budget,
            plan="unrolled" if plan.saved and plan.saved == program.swept else kind,
            slots=kept,
            saved_calls=plan.saved,
            peak_bytes=plan.peak_bytes,
            minimum_budget=plan.minimum,
            extra_forwards=values["extra_forwards"],
            offloaded_bytes=values["offloaded_bytes"],
            time_factor=float(values["flops"] / once) if once else 1.0,
            model=model,
            _setting=self,
        )


def _model(alone: Planner, tier: Planner | None, loop: Loop, step_bytes: int) -> CostModel:
    """The cost model with the formulas of ``loop``, each step of which adds ``step_bytes`` of gradients."""
    program, lowering = alone.program, alone.lowering
    few, per_slot = min(FEW_SLOTS, alone.states), alone.alone.per_slot
    transient = max(step_cost(call.step, lowering).vjp_bytes for call in loop.calls)
    residuals = {id(g): residual_cost(g, lowering) for g in program.step_graphs}
    kept = max(residuals[id(call.step)][0] for call in loop.calls)
    calls = list(program.counted())
    (end,) = (i for i, (call, _) in enumerate(calls, 1) if call is loop.calls[-1])
    after = sum(count * (residuals[id(call.step)][0] - kept) for call, count in calls[end:])
    flops = zip(*(step_flops(call.step, lowering) for call in loop.calls), strict=True)
    forward, vjp, saved = (_mean(of) for of in flops)
    return CostModel(
        fixed_bytes=alone.peak(few) - few * per_slot - step_bytes * program.positions - transient,
        transient_bytes=transient,
        state_bytes=per_slot,
        step_bytes=step_bytes,
        forward_flops=forward,
        vjp_flops=vjp,
        residual_bytes=kept,
        residual_fixed_bytes=after + max(more for _, more in residuals.values()) if kept else 0,
        saved_flops=saved,
        tier_bytes=0 if tier is None else tier.peak(few, True) - alone.peak(few),
        window=program.swept if program.swept < program.positions else None,
    )


def _mean(values: tuple[int, ...]) -> int | Fraction:
    """Of a round of several steps, their mean, which need not be whole."""
    mean = Fraction(sum(values), len(values))
    return int(mean) if mean.denominator == 1 else mean


def _stretched(loop: Loop, count: int) -> Loop:
    """A loop of so many iterations; a list that it reads begins anew where it ends."""
    times = -(-count // loop.count)
    calls = (
        replace(
            call, inputs=[replace(g, of=tuple(g.of) * times) if g.kind == "each" else g for g in call.inputs]
        )
        for call in loop.calls
    )
    return replace(loop, calls=tuple(calls), count=count)


def _learnt_bytes(loop: Loop) -> int:
    """Bytes that an iteration adds: a gradient and a copy of rows and of listed tensors that it alone reads."""
    moving = [g for call in loop.calls for g in call.inputs if g.stride]
    read = [x for g in moving for x in (g.of if g.kind == "each" else [g])]
    rows = {x.of for x in read if x.kind == "scan" and x.of.grad}
    listed = {x.of for x in read if x.kind == "input" and x.of.grad}
    of_rows = sum(nbytes(x.spec) // x.spec.shape[0] for x in rows)
    return 2 * (of_rows + sum(nbytes(x.spec) for x in listed) // loop.count)
