"""CUDA graphs: the kernels of a flat graph, captured once and launched together from then on.

Kernels of small networks take less time than it takes to launch them one by one. A capture launches them all at once,
on the memory they were captured with: a call copies its inputs there, and its results from there. What is computed on
the CPU (step counts, learning rates) is no part of a capture: that part of the graph runs before it in every call.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from metaoptim.errors import CaptureError

from ..compat import FakeTensorMode
from ..derive.graphs import results_of
from ..derive.interpret import call_cotangent_hook
from ..ir.operators import is_operator, is_several, op_info
from ..ir.step import FlatGraph, Lowered
from ..ir.tensors import TensorSpec, in_the_layout, spanned, tensor_spec

#: A part of a graph -> how it runs, for inputs like these, the last so many of which are cotangents.
LowerPart = Callable[[FlatGraph, Sequence[Tensor], int], Lowered]


def check_captured(specs: Iterable[TensorSpec], budget: object, name: str) -> None:
    """Raise where the graphs of a function or step (``name``) with inputs like ``specs`` are not to be captured."""
    devices = sorted({str(spec.device) for spec in specs})
    if not any(d.startswith("cuda") for d in devices):
        raise CaptureError(
            f"mode='reduce-overhead' captures CUDA graphs, and all tensors of {name} are on "
            f"{', '.join(devices) or 'no device'}: leave mode out, or move its networks to a GPU"
        )
    if budget is not None:
        raise CaptureError(
            f"mode='reduce-overhead' with memory_budget={budget!r}: captured graphs hold memory of their own between "
            f"calls of {name}, which no budget counts. Leave one of them out; slots bounds the number of states"
        )


class _Refused(Exception):
    """Why a graph cannot be captured."""


class _Parts(NamedTuple):
    """A flat graph in two: what runs on the CPU, and then what runs on a GPU."""

    host: FlatGraph  # inputs on the CPU -> values that the other part reads, results on the CPU
    device: FlatGraph  # these values, inputs on the GPU -> results on the GPU
    read: int  # how many values these are
    inputs: list[bool]  # for each input of the whole: whether it is on the GPU
    results: list[bool | None]  # for each result: whether it is; None where there is none


def captured(graph: FlatGraph, inputs: Sequence[Tensor], cotangents: int, lower: LowerPart) -> Lowered:
    """``graph`` as a program that replays a capture of its part on the GPU.

    Args:
        graph: a flat graph.
        inputs: what it will be called with first.
        cotangents: how many of them, at the end, are cotangents.
        lower: makes a program of a part.
    """
    try:
        parts = _divided(graph, inputs)
    except _Refused as error:
        _tell(error)
        parts = None
    if parts is None:
        return lower(graph, inputs, cotangents)
    own = [t for t, there in zip(inputs, parts.inputs, strict=True) if there]
    device = next(t.device for t in own)
    read = parts.host(*_on_host(parts, inputs))[: parts.read]
    given = [*(_moved(t, device) for t in read), *own]
    program = lower(parts.device, given, sum(parts.inputs[len(inputs) - cotangents :]))
    return CapturedGraph(parts, program, device)


class CapturedGraph:
    """A graph whose part on the GPU is captured when it is called for the second time."""

    def __init__(self, parts: _Parts, program: Lowered, device: torch.device) -> None:
        self._parts, self._program, self._device = parts, program, device
        self._lock = threading.Lock()
        self._warm = False  # whether it has run: what libraries set up in a first call must not be captured
        self._capture: Capture | None = None
        self._inputs: list[Tensor] = []
        self._results: Sequence[Any] = ()
        self._switches: tuple = ()  # as they were when it was captured

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        parts = self._parts
        found = parts.host(*_on_host(parts, inputs))
        read, on_host = found[: parts.read], iter(found[parts.read :])
        own = [t for t, there in zip(inputs, parts.inputs, strict=True) if there]
        on_device = iter(self._run([*read, *own]))
        return [
            None if there is None else next(on_device) if there else next(on_host) for there in parts.results
        ]

    def _run(self, given: list[Tensor]) -> Sequence[Any]:
        with self._lock:
            if self._warm and self._switches != (now := switches()):
                self._switches = now
                self._begin(given)
            self._warm = True
            if self._capture is None:
                return self._program(*(_moved(t, self._device) for t in given))
            with self._capture.in_order():
                for own, t in zip(self._inputs, given, strict=True):
                    _fill(own, t)
                self._capture.replay()
                return [in_the_layout(r) if isinstance(r, Tensor) else r for r in self._results]

    def _begin(self, given: list[Tensor]) -> None:
        """Capture the program, on memory of its own."""
        self._capture, self._results = None, ()
        self._inputs = [in_the_layout(_moved(t, self._device)) for t in given]
        try:
            self._capture, self._results = Capture.of(lambda: self._program(*self._inputs), self._device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._inputs = []
            _tell(_Refused(str(error).partition("\n")[0]))


def _fill(own: Tensor, t: Tensor) -> None:
    """Copy an input to where a capture reads it; elements that share memory could not be written to one by one."""
    if own.stride() == t.stride():
        own, t = spanned(own), spanned(t)
    # pinned memory would be read later, when it may hold something else
    own.copy_(t, non_blocking=not t.is_pinned())


class Capture:
    """Kernels that have been captured on a device, and the order in which calls may use their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph, self._done = device, torch.cuda.CUDAGraph(), torch.cuda.Event()

    @staticmethod
    def of(run: Callable[[], Sequence[Any]], device: torch.device) -> tuple[Capture, Sequence[Any]]:
        """The kernels that ``run`` launches, and its results, which hold values after each replay."""
        with torch.cuda.device(device):
            made = Capture(device)
            with torch.cuda.graph(made._graph, capture_error_mode="thread_local"):  # others may go on
                results = run()
        return made, results

    def replay(self) -> None:
        """Launch the kernels."""
        self._graph.replay()

    def in_order(self) -> _InOrder:
        """A block on the current stream, after all such blocks before it, of whatever stream."""
        return _InOrder(self._device, self._done)


class _InOrder:
    def __init__(self, device: torch.device, done: torch.cuda.Event) -> None:
        self._guard, self._done, self._device = torch.cuda.device(device), done, device

    def __enter__(self) -> None:
        self._guard.__enter__()
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def __exit__(self, *error: object) -> None:
        self._done.record(torch.cuda.current_stream(self._device))
        self._guard.__exit__(*error)


def switches() -> tuple:
    """PyTorch's switches that decide which kernels a capture has."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    precision = torch.get_float32_matmul_precision(), *(b.allow_tf32 for b in backends)
    return (*precision, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)


def on_gpu(t: Tensor) -> bool:
    """Whether a tensor, real or fake, is on a GPU."""
    return t.device.type == "cuda"


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on the GPU."""
    return t if on_gpu(t) else t.to(device)


def _on_host(parts: _Parts, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t for t, there in zip(inputs, parts.inputs, strict=True) if not there]


class _Places(fx.Interpreter):
    """Runs a graph on fake tensors, and notes which nodes are on a GPU."""

    def __init__(self, flat: FlatGraph) -> None:
        super().__init__(flat.holder, graph=flat.graph)
        self.there: dict[fx.Node, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        found: Any = super().run_node(n)
        tensors = [t for t in (found if is_several(found) else (found,)) if isinstance(t, Tensor)]
        self.there[n] = any(map(on_gpu, tensors))
        return found


def _divided(flat: FlatGraph, inputs: Sequence[Tensor]) -> _Parts | None:
    """A flat graph in two; None where nothing of it is on a GPU.

    Raises:
        _Refused: for a graph that a capture would not do justice to.
    """
    if not any(map(on_gpu, inputs)):
        return None
    if any(t.layout is not torch.strided for t in inputs):
        raise _Refused("it is given a sparse tensor")
    if len(devices := {t.device for t in inputs if on_gpu(t)}) > 1:
        raise _Refused(f"it is on several devices, {', '.join(sorted(map(str, devices)))}")
    places = _Places(flat)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            places.run(*(tensor_spec(t).empty() for t in inputs))
    except Exception as error:  # of operators without a fake form
        raise _Refused(f"it cannot be run on fake tensors ({type(error).__name__})") from error
    host, device = fx.Graph(), fx.Graph()
    on_host, on_device = dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    read: dict[fx.Node, None] = {}  # values of the host that the other part reads
    for node in flat.graph.nodes:
        if node.op == "output":
            continue
        there = places.there[node]
        if node.op == "call_function":
            _check(node)
            if not there and any(places.there[n] for n in node.all_input_nodes):
                raise _Refused(f"{node.target} reads on the CPU what was computed on the GPU")
            if there:
                read |= dict.fromkeys(n for n in node.all_input_nodes if not places.there[n])
    for k, node in enumerate(read):
        on_device[node] = device.placeholder(f"read_{k}")
    for node in flat.graph.nodes:
        if node.op != "output":
            graph, env = (device, on_device) if places.there[node] else (host, on_host)
            env[node] = graph.node_copy(node, env.__getitem__)
    wanted = results_of(flat.graph)
    results = [places.there[r] if isinstance(r, fx.Node) else None for r in wanted]
    if not any(n.op == "call_function" for n in device.nodes):
        return None
    device.output(tuple(on_device[r] for r, there in zip(wanted, results, strict=True) if there))
    own = [on_host[r] for r, there in zip(wanted, results, strict=True) if there is False]
    host.output((*(on_host[n] for n in read), *own))
    at = [places.there[n] for n in flat.graph.find_nodes(op="placeholder")]
    constants = flat.constants
    return _Parts(FlatGraph(host, constants), FlatGraph(device, constants), len(read), at, results)


def _check(node: fx.Node) -> None:
    """Raise for what a capture would do once, and its replays not again."""
    target: Any = node.target
    if target is torch.ops.metaoptim.cotangent_hook.default or target is call_cotangent_hook:
        raise _Refused("it calls the window's backward_hook, which is Python")
    if is_operator(target) and op_info(target).random:
        raise _Refused(f"{target} draws random numbers")


_told: set[str] = set()


def _tell(why: _Refused) -> None:
    """Say that a graph runs without being captured, once for each reason."""
    if str(why) not in _told:
        _told.add(str(why))
        warnings.warn(
            f"mode='reduce-overhead': a part of the inner loop is no CUDA graph and runs as it is: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
