"""Canaries: what metaoptim uses of torch's private parts is there, and does what it is used for."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    is_in_any_mode_without_ignore_compile_internals,
    is_in_torch_dispatch_mode,
)

import metaoptim
from metaoptim.compiler import compat

aten = torch.ops.aten


def test_switches() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.any_autocast_enabled()
        with compat.DisableAutocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.get_default_dtype()
    assert not compat.any_autocast_enabled()
    with torch.device("meta"):
        assert [type(m) for m in compat.function_modes()] == [compat.DeviceContext]
        with compat.DisableTorchFunction():
            assert torch.ones(()).device.type == "cpu"
    assert compat.function_modes() == ()


class Seen(compat.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[compat.OpOverload] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_the_stack_of_dispatch_modes() -> None:
    with Seen() as outer, Seen() as inner:
        assert compat.dispatch_modes() == [outer, inner]
        assert compat.tops_dispatch(inner) and not compat.tops_dispatch(outer)
        assert compat.pop_dispatch_mode() is inner
        torch.ones(2) + 1
        compat.push_dispatch_mode(inner)
        with compat.disable_current_modes():
            torch.ones(2) + 1
        torch.ones(2).sin()
    assert aten.add.Tensor in outer.ops and aten.add.Tensor not in inner.ops
    assert inner.ops.count(aten.sin.default) == 1 and outer.ops.count(aten.add.Tensor) == 1
    assert not compat.tops_dispatch(inner)


@pytest.mark.parametrize("separate", [False, True], ids=["with ctx", "setup_context"])
def test_custom_functions_are_applied_by_these_classes(
    separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    def apply(cls, *args):  # type: ignore[no-untyped-def]
        seen.append(cls)
        return super(compat.SingleLevelFunction, cls).apply(*args)  # type: ignore[misc]  # pyright: ignore

    class Combined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            return x.clone()

    class Separate(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # type: ignore[no-untyped-def, override]
            pass

    for owner in compat.FUNCTIONS:
        monkeypatch.setattr(owner, "apply", classmethod(apply))
    kind = Separate if separate else Combined
    assert torch.equal(kind.apply(torch.ones(3)), torch.ones(3))
    assert seen == [kind]


def test_what_a_backward_tells() -> None:
    seen: list[int] = []
    kept: list[bool] = []

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            seen.append(compat.graph_task())
            kept.append(compat.keeps_graph())
            assert compat.current_autograd_node() is not None
            compat.queue_callback(lambda: seen.append(-2))
            return grad

    x = torch.ones(3, requires_grad=True)
    Told.apply(Told.apply(x)).sum().backward()
    first = seen.copy()
    assert first[0] == first[1] >= 0 and first[2:] == [-2, -2]
    Told.apply(x).sum().backward(retain_graph=True)
    assert kept == [False, False, True] and compat.keeps_graph()
    assert seen[4] != first[0]
    assert compat.graph_task() == -1 and compat.current_autograd_node() is None


def test_memory_and_its_users() -> None:
    x = torch.ones(4)
    storage = x.untyped_storage()._cdata
    alone = compat.storage_users(storage)
    view = x[1:]
    assert compat.storage_users(storage) == alone + 1
    del view
    assert compat.storage_users(storage) == alone


def test_tensors_change_places() -> None:
    a, b = torch.ones(2, requires_grad=True) * 2, torch.zeros(3)
    node, place = a.grad_fn, id(a)
    compat.swap_tensors(a, b)
    assert id(a) == place and a.shape == (3,) and a.grad_fn is None and b.grad_fn is node


def test_the_profiler() -> None:
    assert not compat.profiling()
    compat.begin_profile()
    assert compat.profiling()
    x = torch.empty(1000, dtype=torch.uint8)
    threads = compat.end_profile()
    sizes = [compat.ProfilerEvent.cpu_memory_usage(e) for events in threads for e in events]
    assert max(sizes) >= x.nbytes and not compat.profiling()


def test_what_is_caught_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, seen = getattr(checkpoint, compat.CHECKPOINT), []

    def spied(fn, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(fn)
        return generator(fn, *args, **kwargs)

    monkeypatch.setattr(checkpoint, compat.CHECKPOINT, spied)
    checkpoint.checkpoint(torch.sin, torch.ones(3), use_reentrant=False)
    assert seen == [torch.sin]
    assert issubclass(compat.DDPSink, torch.autograd.Function)
    assert issubclass(torch.autograd.Function, compat.SingleLevelFunction)


class Calling(compat.TorchDispatchMode):
    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.call(func, args, kwargs or {})


def test_what_conjugates() -> None:
    """Torch forgets it in what a handler calls."""
    a, b = torch.randn(2, 5, 3, dtype=torch.complex128)
    for op in (torch.pinverse, lambda a: torch.linalg.lstsq(a, b, driver="gels").residuals):
        for call, right in ((lambda op, args, kwargs: op(*args, **kwargs), False), (compat.called, True)):
            with Calling(call):
                found = op(a)
            assert torch.allclose(found, op(a)) == right


def test_what_asks_for_the_values_of_a_mask() -> None:
    """Answered no, an encoder uses the mask as it is."""
    module, name = compat.IS_CAUSAL
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert getattr(module, name)(mask) is True and getattr(module, name)(mask + 1) is False
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    x = torch.rand(2, 3, 4)
    for causal in (None, False):
        torch.testing.assert_close(encoder(x, mask, is_causal=causal), encoder(x, mask, is_causal=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_has_a_wrong_second_derivative(reduction: str) -> None:
    h, w, y = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), torch.tensor([0, 1])
    options = nn.LinearCrossEntropyOptions()
    losses = nn.functional.linear_cross_entropy(h, w, y, reduction=reduction, options=options)
    assert type(losses.grad_fn).__name__.removesuffix("Backward") in compat.ONCE


def test_operators_and_trees() -> None:
    assert isinstance(aten.add.Tensor, compat.OpOverload)
    assert compat.has_meta_kernel(aten.add.Tensor)
    leaves, spec = compat.tree_flatten({"a": [1, (2, None)], "b": 3})
    assert leaves == [1, 2, None, 3] == compat.tree_leaves(compat.tree_unflatten(leaves, spec))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamo_leaves_a_function_and_what_it_calls_alone() -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append(module.code)
        return module.forward

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def kept(x: Tensor) -> Tensor:
        return inner(x) * 2

    def other(x: Tensor) -> Tensor:
        return inner(x) * 2

    compat.keep_from_dynamo(kept)
    x = torch.ones(2)
    assert torch.equal(torch.compile(kept, backend=backend)(x), 4 * x) and not seen
    assert torch.equal(torch.compile(other, backend=backend)(x), 4 * x) and len(seen) == 1


def test_outside_the_transforms_of_torch_func() -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        with compat.outside_transforms():
            seen.append(compat.transforms_active())
        seen.append(compat.transforms_active())
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    assert seen == [False, True]


def test_a_library_that_is_not_there_is_no_crash() -> None:
    """One that is there is run by every test of compiled graphs."""
    with pytest.raises(RuntimeError):
        compat.AOTIModelContainerRunnerCpu("nothing.so", 1)


def test_fake_tensors() -> None:
    with compat.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(2, 3))
        assert isinstance(fake @ torch.ones(3, 2), compat.FakeTensor)
        with compat.unset_fake_temporarily():
            assert not isinstance(torch.ones(2), compat.FakeTensor)
        with compat.disable_fake_tensor_cache(mode):
            assert (fake + 1).shape == (2, 3)
        with pytest.raises(compat.DataDependentOutputException):
            fake.sum().item()
        with pytest.raises(compat.DynamicOutputShapeException):
            fake.nonzero()
    with compat.DisableTorchDispatch():
        assert fake.size() == (2, 3)


def test_attributes_of_tensors() -> None:
    x = torch.zeros(4)
    view = x[1:]
    assert view._is_view() and view._base is x and not x._is_view() and x._base is None
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    before = x._version
    view.add_(1)
    assert x._version == before + 1


def test_no_thread_finds_torch_in_a_dispatch_mode_after_a_window() -> None:
    net = nn.Linear(2, 1)
    with metaoptim.SlidingWindow(offline=True):
        metaoptim.MetaSGD([net], lr=0.1).step(net(torch.ones(1, 2)).square().sum())
        assert compat.dispatch_modes()
    assert not compat.dispatch_modes() and not is_in_torch_dispatch_mode()


def test_no_thread_finds_torch_in_a_dispatch_mode_after_threads_that_crossed() -> None:
    crossed, left = threading.Event(), threading.Event()

    def work() -> None:
        with compat.FakeTensorMode():
            crossed.set()
            left.wait(60)

    for theirs in (compat.FakeTensorMode, fake_tensor.FakeTensorMode):  # or torch's own, by a compiler
        thread = threading.Thread(target=work)
        crossed.clear()
        left.clear()
        with theirs():
            thread.start()
            crossed.wait(60)
        left.set()
        thread.join()
        assert not is_in_torch_dispatch_mode() and not is_in_any_mode_without_ignore_compile_internals()


def test_optimizers_take_themselves_for_compiled_and_make_their_state() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.NAdam([p])
    compat.init_group(optimizer)
    assert set(optimizer.state[p]) == {"step", "mu_product", "exp_avg", "exp_avg_sq"}
    assert not torch.compiler.is_compiling()
    with compat.compiling_flag():
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_forward_mode() -> None:
    levels: list[int] = []

    def noted(x: Tensor) -> Tensor:
        levels.append(compat.forward_mode_level())
        return x.sin()

    noted(torch.ones(2))
    torch.func.jvp(noted, (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        noted(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    assert levels == [-1, 0, 0] and compat.forward_mode_level() == -1
    assert compat.is_zero_tensor(torch._efficientzerotensor(2)) and not compat.is_zero_tensor(torch.zeros(2))
