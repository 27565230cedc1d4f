"""metaoptim and its peers on the same inner loops: first call, steady time, memory, and whether the gradient is right.

    make bench-peers                                            # everything; hours
    make bench-peers ARGS="--problem digits-sgd --peer jax,ours-compiled --T 100"
    make bench-peers ARGS="--small --peer eager-tape,ours-window"    # a rehearsal with tiny sizes

Every measurement runs in processes of its own, on one thread: a first one with empty caches, and a second one that
finds the caches of the first and goes on to measure steady calls and memory. On a GPU (--device cuda) problems are
larger, steady calls are measured by the wall clock, and memory is the device's. Every meta-gradient is compared with
that of the eager tape in float64. Results go into one folder (--out): results.json, table.md, and plots; they are
written after each measurement, and --resume goes on where an earlier run ended.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
from measure import PEERS
from problems import PROBLEMS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHONS = {
    "main": Path(sys.executable),
    "torch": ROOT / ".venv-peers" / "torch" / "bin" / "python",
    "jax": ROOT / ".venv-peers" / "jax" / "bin" / "python",
}
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait for another run on this machine to end."""
    with open(Path(tempfile.gettempdir()) / "metaoptim-bench-peers.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another run is going on; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def caches(folder: Path) -> dict[str, str]:
    """Where compilers keep what they have made."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "xdg"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_process(command: list[str], environment: dict[str, str], limit: float) -> str | None:
    """Run a process, and end it with all that it has started after ``limit`` seconds; why it failed, or None."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"more than {limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code == 0:
            return None
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
        return lines[-1][:300] if lines else f"exit status {code}"


class Runner:
    """Measures peers on one problem.

    Args:
        folder: for the problem, the reference and the caches.
        limit: seconds for each process.
        repeats: steady calls.
        small: tiny sizes, one process for each peer, and the eager backend in place of inductor.
        device: what torch's peers run on.
    """

    def __init__(self, folder: Path, limit: float, repeats: int, small: bool, device: str) -> None:
        self.folder, self.limit, self.repeats, self.small = folder, limit, repeats, small
        self.device = device
        self.problem, self.reference = folder / "problem.npz", folder / "reference.npz"
        self.imports: dict[str, float] = {}  # MiB by peer

    def _process(self, peer: str, cache: Path, out: Path, *options: object, wait: bool = True) -> str | None:
        python = PYTHONS[PEERS[peer].environment if peer in PEERS else "main"]
        command = [python, HERE / "measure.py", peer, self.problem, self.reference, out, *options]
        environment = {**os.environ, **ENVIRONMENT, **caches(cache), "METAOPTIM_WAIT": str(int(wait))}
        return run_process([str(part) for part in command], environment, self.limit)

    def prepare(self, problem: str, horizon: int) -> str | None:
        """Make the data and the gradient in float64; why that failed, or None."""
        self.reference.unlink(missing_ok=True)
        size = "tiny" if self.small else "usual" if self.device == "cpu" else "gpu"
        replace(PROBLEMS[problem][0](horizon, size), device=self.device).save(self.problem)
        return self._process("reference", self.folder, self.folder / "none.json")

    def measure(self, name: str) -> dict[str, Any]:
        """Both processes of a peer, "cold" and "warm" (one if small), and why one failed.

        Ours wait for the compiler in these, or steady calls would be measured before they are steady; what the first
        call takes by default, where nobody waits, is measured in a process of its own, "now".
        """
        environment = PEERS[name].environment
        python = PYTHONS[environment]
        if self.device == "cpu" and PEERS[name].options.get("mode"):
            return {"failure": "the CPU has no CUDA graphs"}
        if self.device != "cpu" and environment == "jax":
            return {"failure": "make peers installs JAX for the CPU"}
        if not python.exists():
            return {"failure": f"no {python.relative_to(ROOT)}: run make peers"}
        result: dict[str, Any] = {"failure": None}
        plan = {"cold": self.repeats} if self.small else {"cold": 0, "warm": self.repeats}
        backend = ["--backend", "eager"] if self.small else []
        if PEERS[name].module == "ours" and not self.small:
            plan = {"now": 0, **plan}
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            for process, repeats in plan.items():
                out, now = Path(cache) / f"{process}.json", process == "now"
                at = Path(cache) / "now" if now else Path(cache)
                failure = self._process(name, at, out, "--repeats", repeats, *backend, wait=not now)
                if out.exists():
                    result[process] = json.loads(out.read_text())
                    failure = result[process].get("failure", failure)
                    result[process].pop("imported", None)
                if failure:
                    return {**result, "failure": failure}
            if not self.small and name not in self.imports:
                size = Path(cache) / "imports.json"
                result["failure"] = self._process(name, Path(cache), size, "--imports-of", out)
                self.imports[name] = json.loads(size.read_text()) if size.exists() else 0.0
        result["imports"] = self.imports.get(name, 0.0)
        return result


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def chosen(text: str | None, known: list[str], what: str) -> list[str]:
    """The names in a list separated by commas; all without one."""
    names = text.split(",") if text else known
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    return names


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", help=f"some of {', '.join(PROBLEMS)} (with --small: digits-sgd)")
    parser.add_argument("--peer", help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--T", help="horizons in place of each problem's own, as 10,100")
    parser.add_argument("--small", action="store_true", help="a rehearsal: tiny sizes, nothing compiled")
    parser.add_argument(
        "--device", default="cpu", help="what torch's peers run on; a GPU gets larger problems"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for each process (300)")
    parser.add_argument("--repeats", type=int, help="steady calls, of which the median counts (5)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for what comes out")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds, measure what is missing"
    )
    args = parser.parse_args()
    problems = chosen(args.problem or ("digits-sgd" if args.small else None), [*PROBLEMS], "problem")
    peers = chosen(args.peer, [*PEERS], "peer")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    found: dict[str, Any] = {"machine": machine(args.device), "small": args.small, "results": []}
    if args.resume and file.exists():
        found["results"] = json.loads(file.read_text())["results"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what has been started, as Ctrl-C does
    with alone(), tempfile.TemporaryDirectory() as temporary:
        repeats = args.repeats or (1 if args.small else 5)
        runner = Runner(Path(temporary), args.limit, repeats, args.small, args.device)
        for problem in problems:
            _, horizons, tiny = PROBLEMS[problem]
            for horizon in (
                [int(t) for t in args.T.split(",")] if args.T else [tiny] if args.small else horizons
            ):
                known = {r["peer"] for r in found["results"] if (r["problem"], r["T"]) == (problem, horizon)}
                missing = [peer for peer in peers if peer not in known]
                unchecked = runner.prepare(problem, horizon) if missing else None
                for peer in missing:
                    print(f"{problem}, T = {horizon}: {PEERS[peer].label} ... ", end="", flush=True)
                    result = {"problem": problem, "T": horizon, "peer": peer, "device": args.device}
                    result |= runner.measure(peer)
                    result["unchecked"] = unchecked  # why there is no reference
                    print(report.summary(result), flush=True)
                    found["results"].append(result)
                    file.write_text(json.dumps(found, indent=1))
    print(f"\n{report.write(found, args.out)}")


if __name__ == "__main__":
    main()
