"""Tables and plots of what run.py has measured.

python benchmarks/peers/report.py benchmarks/peers/results    # again, from its results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measure import PEERS

WRONG = 1e-2  # relative error from which on a gradient is called wrong: float32 through 1,000 steps stays far below


def worst_error(result: dict[str, Any]) -> tuple[float, str] | None:
    """The largest relative error and whose it is; infinite where a gradient is not finite; None where not checked."""
    by_name = result.get("warm", result.get("cold", {})).get("errors")
    if not by_name:
        return None
    return max((float("inf") if error is None else error, name) for name, error in by_name.items())


def remark(result: dict[str, Any]) -> str:
    """What is wrong with a measurement."""
    error, said = worst_error(result), []
    if result["failure"]:
        said.append(f"failed: {result['failure']}")
    if error is not None and error[0] == float("inf"):
        said.append(f"WRONG: the gradient of {error[1]} is not finite")
    elif error is not None and error[0] > WRONG:
        said.append(f"WRONG: the gradient of {error[1]} is off")
    if result["unchecked"]:
        said.append(f"not checked, as the reference failed: {result['unchecked']}")
    return "; ".join(said).replace("|", "\\|")


def numbers(result: dict[str, Any]) -> dict[str, float | None]:
    """What the table shows: seconds, MiB, and the error."""
    cold, warm = result.get("cold", {}), result.get("warm", {})
    last, error = warm or cold, worst_error(result)
    above = last.get("memory", {}).get("above")
    clock = "cpu" if result.get("device", "cpu") == "cpu" else "wall"
    bound = result["peer"] == "products"  # no gradient and no loop
    now = result.get("now", cold)  # by default
    return {
        "now": None if bound else now.get("first", {}).get("wall"),
        "cold": cold.get("first", {}).get("wall") if "now" in result else None,
        "warm": None if bound else warm.get("first", {}).get("wall"),
        "steady": last.get("steady", {}).get(clock),
        "memory": None if bound or above is None else above - (result["imports"] if clock == "cpu" else 0.0),
        "error": error[0] if error and not bound else None,
    }


def summary(result: dict[str, Any]) -> str:
    """One line, while it goes on."""
    units = {
        "now": "s cold",
        "cold": "s waiting",
        "warm": "s second process",
        "steady": "s steady",
        "memory": "MiB",
        "error": "error",
    }
    said = [f"{_short(value)} {units[key]}" for key, value in numbers(result).items() if value is not None]
    return ", ".join([*said, *filter(None, [remark(result)])])


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    if value != 0 and abs(value) < 1e-2:
        return f"{value:.0e}" if abs(value) < 1e-3 else f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"


def tables(found: dict[str, Any]) -> str:
    """A table for each problem and T, as Markdown."""
    about = found["machine"]
    on = "" if about.get("device", "cpu") == "cpu" else f"; **torch's peers on {about['device']}**"
    text = [
        f"{about['cpu']}, {about['cores']} cores, one thread, float32{on}; Python {about['python']}; {about['date']}, "
        f"commit {about['commit']}" + ("; **tiny sizes: a rehearsal**" if found["small"] else ""),
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions(found).items()))
        + ".",
    ]
    for (problem, horizon), results in by_point(found).items():
        tape = next((numbers(r)["steady"] for r in results if r["peer"] == "eager-tape"), None)
        rows = [
            "| peer | first call, s | waiting | second process | steady, s | × eager tape | peak MiB | error | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for result in results:
            n = numbers(result)
            ratio = n["steady"] / tape if n["steady"] is not None and tape else None
            cells = [n["now"], n["cold"], n["warm"], n["steady"], ratio, n["memory"], n["error"]]
            label = PEERS[result["peer"]].label
            label = f"**{label}**" if result["peer"].startswith("ours") else label
            rows.append(f"| {label} | {' | '.join(map(_short, cells))} | {remark(result)} |")
        text.append(f"### {problem}, T = {horizon:,}\n\n" + "\n".join(rows))
    return "\n\n".join(text) + "\n"


def versions(found: dict[str, Any]) -> dict[str, str]:
    """Of all packages that ran."""
    return {k: v for r in found["results"] for k, v in r.get("cold", {}).get("versions", {}).items()}


def by_point(found: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Results by problem and T, peers in their usual order."""
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    order = list(PEERS)
    for result in sorted(found["results"], key=lambda r: order.index(r["peer"])):
        points.setdefault((result["problem"], result["T"]), []).append(result)
    return points


# -- plots ------------------------------------------------------------------------------------------------------------


_OURS = [name for name in PEERS if name.startswith("ours")]
_OTHERS = [name for name in PEERS if not name.startswith("ours")]
_COLOURS = ("black", "red", "darkorange", "gold", "hotpink", "sienna", "mediumpurple", "darkviolet", "indigo")


def style(peer: str) -> dict[str, Any]:
    """One marker and colour for a peer in all plots; ours are circles, from blue to green."""
    from matplotlib import colormaps

    if peer in _OURS:
        return {"color": colormaps["winter"](_OURS.index(peer) / (len(_OURS) - 1)), "marker": "o"}
    place = _OTHERS.index(peer)
    return {"color": _COLOURS[place], "marker": "v^<>sPXD*"[place]}


def shown(result: dict[str, Any], key: str) -> float | None:
    """A number that a plot may show: positive, and not that of a wrong gradient."""
    value = numbers(result)[key]
    return value if value and value > 0 and "WRONG" not in remark(result) else None


def against_horizon(found: dict[str, Any]) -> Any:
    """Time and memory against T, for problems with several; None if there are none."""
    from matplotlib.figure import Figure

    points = by_point(found)
    problems = list(dict.fromkeys(p for p, _ in points if len([1 for q, _ in points if q == p]) > 1))
    if not problems:
        return None
    figure = Figure(figsize=(13, 4 * len(problems)), layout="constrained")
    handles: dict[str, Any] = {}
    for row, problem in zip(figure.subplots(len(problems), 2, squeeze=False), problems):
        for ax, key, label in zip(row, ("steady", "memory"), ("CPU s", "peak MiB")):
            lines: dict[str, list[tuple[int, float]]] = {}
            for (name, horizon), results in sorted(points.items()):
                for result in results if name == problem else []:
                    if (value := shown(result, key)) is not None:
                        lines.setdefault(result["peer"], []).append((horizon, value))
            for peer, line in lines.items():
                (handles[peer],) = ax.plot(*zip(*line), **style(peer), markersize=5, lw=1)
            _finish(ax, xlabel="T", ylabel=label, title=problem)
    _legend(figure, handles)
    return figure


def time_against_memory(found: dict[str, Any]) -> Any:
    """All peers in one picture: a panel for each problem at its largest T."""
    from matplotlib.figure import Figure

    points = by_point(found)
    largest = {problem: max(t for p, t in points if p == problem) for problem, _ in points}
    figure = Figure(figsize=(3 + 4 * len(largest), 4.5), layout="constrained")
    handles: dict[str, Any] = {}
    for ax, (problem, horizon) in zip(figure.subplots(1, len(largest), squeeze=False)[0], largest.items()):
        for result in points[problem, horizon]:
            peer, steady, memory = result["peer"], shown(result, "steady"), shown(result, "memory")
            if steady and peer == "products":
                handles[peer] = ax.axvline(steady, color=style(peer)["color"], ls=":")
            elif steady and memory:
                handles[peer] = ax.scatter(steady, memory, **style(peer), s=60, edgecolor="black", lw=0.5)
        _finish(ax, xlabel="CPU s", ylabel="peak MiB", title=f"{problem}, T = {horizon:,}")
    _legend(figure, handles)
    return figure


def _finish(ax: Any, **labels: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set(xscale="log", yscale="log", **labels)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, handles: dict[str, Any]) -> None:
    known = [peer for peer in PEERS if peer in handles]
    labels = [("ours: " if peer.startswith("ours") else "") + PEERS[peer].label for peer in known]
    figure.legend([handles[peer] for peer in known], labels, loc="outside right upper", fontsize="small")


def write(found: dict[str, Any], folder: Path) -> str:
    """Write table.md and the plots into a folder; the table."""
    text = tables(found)
    (folder / "table.md").write_text(text)
    try:
        import matplotlib
    except ImportError as missing:
        return f"{text}\nNo plots: {missing}"
    matplotlib.use("agg")
    for name, figure in {
        "against-T.png": against_horizon(found),
        "time-against-memory.png": time_against_memory(found),
    }.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
    return text


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(write(json.loads((where / "results.json").read_text()), where))
