"""What a call of a compiled function costs, at some horizon and in some budget, and at any other budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..compiler.cost.model import SIZES, CostModel
from ..compiler.cost.polynomials import size_text
from ..compiler.ir.program import Program, plural, readable_bytes
from ..compiler.ir.step import Loop
from ..runtime.budget.planner import Plan, Planner, with_residuals


@dataclass(frozen=True)
class Cost:
    """What a call of a compiled function and its backward would cost.

    Attributes:
        function: its name.
        horizon: T.
        batch: size of the batch, where the formulas are in it too; None where they are not.
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
            f"{s} = {size_text(self.model.sizes[s])} ({word})"
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
class Setting:
    """A function at some horizon, of which costs are asked.

    Attributes:
        name: of the function.
        program: with so many iterations of its loop.
        alone, tier: planners without and with a lower tier; the latter None where none was asked for.
        longest: the loop that the formulas are of.
        model: the formulas.
        least: room beside every state from which on residuals are saved at all.
        batch: size of the batch, where they are in it.
    """

    name: str
    program: Program
    alone: Planner
    tier: Planner | None
    longest: Loop
    model: CostModel
    least: int
    batch: int | None = None

    @property
    def offload(self) -> bool:
        """Whether costs with a lower tier can be asked of it."""
        return self.tier is not None

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
