"""What `explain` returns: values, text, and tables in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..compiler.cost.step import step_cost
from ..compiler.ir.programs.program import Calls
from ..compiler.ir.step import Lowering, StepGraph
from ..compiler.ir.tensors import nbytes
from ..compiler.ir.text import by_role, plural, readable_bytes, shapes_text
from ..compiler.lower.derivatives import compiled_since
from ..errors import WindowError
from ..runtime.states.streams import drawn, whole

# why something gets no gradient
CUT_OFF = "the window is online: its networks' own parameters are cut off at entry"
NO_FLOW = "only read under no_grad, through detach(), or where no gradient flows"
_MOST_NAMES = 8
_MOST_LINES = 30  # of a program, at its beginning and at its end


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `explain` found; see `to_dict` for the meaning of its attributes."""

    function: str
    form: str
    horizon: int
    calls: int
    num_programs: int
    window: int | None
    offline: bool
    slots: int | None
    memory_budget: int | None = None
    minimum_budget: int | None = None
    offload: str | None
    plan: str
    kept_states: int | None = None
    saved_calls: int | None = None
    extra_forwards: int | None = None
    recompute_factor: float | None = None
    state_bytes: int
    transient_bytes: int
    predicted_peak_bytes: int | None = None
    predicted_forward_bytes: int | None = None
    measured_peak_bytes: int | None = None
    gradient_targets: list[str]
    unreachable: list[str]
    paths: dict[str, str]
    passes: list[dict[str, Any]]
    shapes: dict[str, dict[str, Any]]
    program: str = field(repr=False)
    verbose: bool = field(default=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values.

        Returns:
            A dict with the keys

            * ``function``: its qualified name. ``form``: ``"window"`` for a function that holds its windows, ``"step"``
              for one called inside an ordinary window.
            * ``horizon``: T, the inner steps that a call takes. ``calls``: calls of step graphs it makes for that,
              with those before, between and after the steps.
            * ``num_programs``: distinct step graphs, each with its replay and its derivative. It does not depend on T.
            * ``window``: W where gradients are truncated, or None. ``offline``: whether θ₀ may receive gradients.
              ``slots``: c, or None. ``memory_budget``: bytes, where one decides on the slots, and ``minimum_budget``,
              the smallest there is a plan for; or None.
            * ``offload``: where states go that have no slot, or None.
            * ``plan``: ``"unrolled"`` (every state is kept, and residuals over every call), ``"all states"``,
              ``"scheduled"`` (c slots; other states are replayed), ``"tiered"`` (c slots; every c + 1 calls a state is
              offloaded, others are replayed once), ``"forward only"`` (nothing receives a gradient), or
              ``"streaming"`` (form ``"step"``: the window decides).
            * ``kept_states``: most states kept at a time. ``saved_calls``: over how many of the last calls residuals
              are saved, so that their derivatives do not run their forward again. ``extra_forwards``: calls made again
              during one backward.
              ``recompute_factor``: calls made in all, forward and backward, by those of the forward alone. None for a
              step.
            * ``state_bytes``: S, of one state. ``transient_bytes``: A, most that one call of a derivative allocates.
            * ``predicted_peak_bytes``: most bytes a call and its backward hold at once beyond the caller's tensors and
              the gradients it already has, by the live bytes of the graphs as they are run by the backend "eager";
              ``predicted_forward_bytes``: the same without the backward. None for a step: they depend on how many
              there will be.
            * ``measured_peak_bytes``: the same by the allocator's events, where ``explain`` was told to measure.
            * ``gradient_targets``: names of the tensors that will receive a gradient: arguments, what they hold
              (``net.0.weight``), closures and globals. ``unreachable``: names of those that require grad and will
              not. ``paths``: name -> through which step graphs its gradient comes, or why there is none.
            * ``passes``: for each pass ``name``, ``done`` (what it did), ``milliseconds``, ``before`` and ``after``
              (sizes of the program), and ``text``, the program after it (before it, that of the pass before). The
              first is ``capture``; ``verify`` is what the verifier takes between passes, and has no text.
            * ``shapes``: for each step graph ``calls``, ``steps``, ``operators`` (of its replay and of its
              derivative), ``bytes`` (the most alive at once in either), ``derivative`` (the mode), ``compiled``
              (``"replay"`` or ``"vjp"`` -> since when its compiled form has run, or that it is being compiled),
              ``inputs`` and ``outputs``: role -> ``count``, ``bytes``, ``shapes``.
            * ``program``: the program that runs, as text.
        """
        values = asdict(self)
        del values["verbose"]  # how it is shown
        return values

    def rows(self) -> list[tuple[str, str]]:
        """What the report says in a line each."""
        size = readable_bytes
        mode = "offline" if self.offline else "online"
        steps = f"{plural(self.horizon, 'inner step')} in {plural(self.calls, 'call')} of "
        steps += f"{plural(self.num_programs, 'step graph')}, {mode}"
        plan = self.plan
        if self.kept_states is not None:
            kept = plural(self.kept_states, "state")
            plan += f": at most {kept} kept, {self.extra_forwards} calls made again"
            plan += f", residuals saved over {plural(self.saved_calls, 'call')}" if self.saved_calls else ""
        if self.plan == "tiered":
            plan += f"; others go to {self.offload}"
        if self.window is not None:
            plan += f"; truncated to {self.window} super-steps"
        parts = f"a state {size(self.state_bytes)}, one derivative {size(self.transient_bytes)}"
        memory = parts
        if self.predicted_peak_bytes is not None and self.predicted_forward_bytes is not None:
            memory = f"peak {size(self.predicted_peak_bytes)}, forward {size(self.predicted_forward_bytes)}; {parts}"
        if self.measured_peak_bytes is not None:
            memory = f"measured peak {size(self.measured_peak_bytes)}, predicted {memory}"
        found = [("steps", steps), ("plan", plan), ("memory", memory)]
        for name, step in self.shapes.items():
            if step["compiled"]:
                found.append(
                    ("compiled", f"{name}: " + ", ".join(f"{k} {v}" for k, v in step["compiled"].items()))
                )
        for title, names in (("gradients", self.gradient_targets), ("no gradient", self.unreachable)):
            found += [(title, line) for line in _grouped(names, self.paths)] or [(title, "none")]
        return found

    def schedule(self) -> str:
        """A drawing of which states are kept when, and what is run again, in a call and its backward.

        From left to right the positions between the calls, downwards time, a line whenever calls have been made: ``█``
        is a state that is kept, ``▒`` one that is offloaded, ``>`` a call, ``<`` one that is pulled back. It is as wide
        as the loop is long.

        Raises:
            WindowError: where gradients are truncated by ``window=W``.
        """
        if self.window is not None:
            raise WindowError(
                f"schedule: gradients are truncated to window={self.window} super-steps; expected none, for the "
                "drawing is of a sweep over the whole loop"
            )
        actions = whole(self.calls, self.slots, tiered=self.plan == "tiered", known=self.form == "window")
        return drawn(actions)

    def programs(self) -> str:
        """The program before and after each pass, and the one that runs; long lists of calls are cut short here."""
        parts, previous = [], ""
        for p in self.passes:
            if p["text"]:
                text = "no change" if p["text"] == previous else _shortened(p["text"])
                parts.append(f"after {p['name']}: {text}")
                previous = p["text"]
        if self.program != previous:
            parts.append(f"what runs: {_shortened(self.program)}")
        return "\n".join(parts)

    def __str__(self) -> str:
        lines = [f"{self.function}"]
        previous = ""
        for title, text in self.rows():
            lines.append(f"  {title if title != previous else '':<13}{text}")
            previous = title
        lines.append("  passes, in ms")
        lines += [f"  {name:<14}{ms:>8}  {done}{sizes}" for name, ms, done, sizes in self._passes()]
        lines.append(self._ending())
        return "\n".join(lines)

    def _ending(self) -> str:
        if self.verbose:
            return self.programs()
        asked = "" if self.form == "block" else "explain(fn, verbose=True), or "
        return f"The program before and after each pass: {asked}.programs() of this report."

    def _passes(self) -> list[tuple[str, str, str, str]]:
        """For each pass its name, milliseconds, what it did and the sizes it changed; and the time of all."""
        found = [(p["name"], _milliseconds(p["milliseconds"]), p["done"], _sizes(p)) for p in self.passes]
        return [*found, ("in all", _milliseconds(sum(p["milliseconds"] for p in self.passes)), "", "")]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The same in a terminal, for `rich`."""
        from rich.panel import Panel  # pyright: ignore[reportMissingImports]
        from rich.table import Table  # pyright: ignore[reportMissingImports]
        from rich.text import Text  # pyright: ignore[reportMissingImports]

        summary = Table.grid(padding=(0, 2))
        for title, text in self.rows():
            summary.add_row(Text(title, style="bold"), Text(text))
        yield Panel(summary, title=self.function, title_align="left")
        passes = Table("pass", "what it did", title="passes", title_justify="left")
        passes.add_column("ms", justify="right")
        passes.add_column("sizes")
        for name, ms, done, sizes in self._passes():
            passes.add_row(name, Text(done), ms, Text(sizes.strip()))
        yield passes
        graphs = Table("step graph", "calls", "operators", "bytes alive", "derivative", title_justify="left")
        for name, step in self.shapes.items():
            graphs.add_row(
                name,
                str(step["calls"]),
                " + ".join(map(str, step["operators"])),
                " + ".join(map(readable_bytes, step["bytes"])),
                step["derivative"],
            )
        yield graphs
        yield Text(self._ending())


def _shortened(text: str) -> str:
    lines = text.splitlines()
    more = len(lines) - 2 * _MOST_LINES
    if more < 2:
        return text
    return "\n".join([*lines[:_MOST_LINES], f"  ... {more} lines more ...", *lines[-_MOST_LINES:]])


def _milliseconds(ms: float) -> str:
    return f"{ms:.1f}" if ms < 10 else f"{ms:.0f}"


def _sizes(p: dict[str, Any]) -> str:
    """What a pass changed of the sizes that the program has before and after it."""
    shared = [k for k in p["after"] if p["before"].get(k) and p["before"][k] != p["after"][k]]
    return "".join(f"; {k} {p['before'][k]} → {p['after'][k]}" for k in shared).replace(";", "  ", 1)


def _grouped(names: list[str], paths: Mapping[str, str]) -> list[str]:
    """Names with the same path, in one line each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(paths[name], []).append(name)
    lines = []
    for path, group in groups.items():
        more = len(group) - _MOST_NAMES + 1
        shown = group if more < 2 else [*group[: _MOST_NAMES - 1], f"and {more} more"]
        lines.append(f"{', '.join(shown)}: {path}")
    return lines


def calls_text(calls: Mapping[str, int]) -> str:
    """Step graphs, and how often each is called: left out where there is but one, once."""
    if list(calls.values()) == [1]:
        return next(iter(calls))
    return ", ".join(f"{name} ({plural(k, 'call')})" for name, k in calls.items())


def of_program(program: Calls, lowering_of: Callable[[StepGraph], Lowering]) -> dict[str, Any]:
    """The entries of a `Report` on the step graphs of a program."""
    calls: Counter[int] = Counter()
    for call, count in program.counted():
        calls[id(call.step)] += count
    graphs, names = program.step_graphs, program.names()
    return {
        "horizon": program.horizon,
        "calls": calls.total(),
        "num_programs": len(graphs),
        "transient_bytes": max((step_cost(g, lowering_of(g)).vjp_bytes for g in graphs), default=0),
        "shapes": {names[id(g)]: shape_of(g, calls[id(g)], lowering_of(g)) for g in graphs},
    }


def of_gradients(reached: Mapping[str, str], missed: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a `Report` on what requires grad: by name, where its gradient comes from, or why it gets none."""
    unreachable = [name for name in missed if name not in reached]
    return {"gradient_targets": list(reached), "unreachable": unreachable, "paths": {**missed, **reached}}


def shape_of(step: StepGraph, calls: int, lowering: Lowering) -> dict[str, Any]:
    """An entry of `Report.shapes`."""
    cost = step_cost(step, lowering)
    described: dict[str, Any] = {
        "calls": calls,
        "steps": step.steps,
        "operators": [cost.replay_operators, cost.vjp_operators],
        "bytes": [cost.replay_bytes, cost.vjp_bytes],
        "derivative": step.derivatives.get(lowering.hvp, ""),
        "compiled": compiled_since(step),
    }
    for key, ports in (("inputs", step.inputs), ("outputs", step.outputs)):
        described[key] = {
            role: {
                "count": len(group),
                "bytes": sum(nbytes(p.spec) for p in group),
                "shapes": shapes_text(p.spec for p in group),
            }
            for role, group in by_role(ports).items()
        }
    return described
