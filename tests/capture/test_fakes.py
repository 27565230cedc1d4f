"""Remembered fake results: laid out, and sharing memory, as torch's own of the very call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaoptim.compiler.capture.symbolic.fakes import FakeCalls
from metaoptim.compiler.ir.operators import op_info
from metaoptim.compiler.ir.tensors import tensor_spec


def layout(out: Any, given: list[Tensor]) -> list[Any]:
    """All that matters of a fake result: specs, and which of what was given, or of itself, it shares memory with."""
    memory = {id(t): t.untyped_storage()._cdata for t in given}
    found: list[Any] = [type(out) if not isinstance(out, Tensor) else Tensor]
    seen: list[int] = []
    for t in tree_leaves(out):
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            found.append(str(t))
            continue
        storage = t.untyped_storage()
        within = [i for i, g in enumerate(given) if memory[id(g)] == storage._cdata]
        twins = [i for i, other in enumerate(seen) if other == storage._cdata]
        seen.append(storage._cdata)
        same = [i for i, g in enumerate(given) if g is t]
        found.append((tensor_spec(t), t.storage_offset(), storage.nbytes(), within, twins, same, t.is_conj()))
    return found


class Checked(TorchDispatchMode):
    """Makes every call three times: as torch does, not known yet, and remembered."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.calls, self.wrong = FakeCalls(fake), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not op_info(func).writes and not op_info(func).random:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if all(t.layout is torch.strided for t in given):
                expected = layout(out, given)
                for _ in range(2):
                    try:
                        got = layout(self.calls(func, args, kwargs), given)
                    except Exception as error:
                        got = [repr(error)]
                    if got != expected:
                        self.wrong.append(f"{func}: got {got}, expected {expected}")
        return out


@contextmanager
def checked() -> Iterator[tuple[Checked, FakeTensorMode]]:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Checked(fake) as mode:
        yield mode, fake
    assert not mode.wrong


NAMES = sorted({op.name for op in op_db if torch.float64 in op.supported_dtypes("cpu")})
NAMES = [name for name in NAMES if not name.startswith("jiterator")]  # which needs a GPU


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(8))
def test_operators_of_torchs_own_database(part: int, request: pytest.FixtureRequest) -> None:
    """Samples of every second operator, or of all, with a backward; what fake tensors cannot do is left out."""
    whole = request.config.getoption("--whole-sweep")
    done, samples, names = 0, 2 if whole else 1, NAMES[part :: 8 if whole else 16]
    for op in (op for op in op_db if op.name in names):
        for sample in islice(
            op.sample_inputs("cpu", torch.float64, requires_grad=op.supports_autograd), samples
        ):
            with checked() as (_, fake):
                try:
                    a, args, kwargs = torch.utils._pytree.tree_map_only(
                        Tensor, fake.from_tensor, (sample.input, tuple(sample.args), sample.kwargs)
                    )
                    out = op(a, *args, **kwargs)
                    loss = [t.sum() for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
                    if loss:
                        sum(t.real for t in loss).backward()
                    done += 1
                except (DataDependentOutputException, DynamicOutputShapeException):
                    continue
                except RuntimeError as error:
                    if "data is not allocated" not in str(error):  # values are asked for all the same
                        raise
    assert done > (50 if whole else 12)


CASES: dict[str, Callable[[Tensor], Any]] = {
    "rows, at other places in memory": lambda x: [row * 2 for row in x.unbind()],
    "views of views": lambda x: [r.t()[1:].unsqueeze(0).expand(3, -1, -1) for r in x],
    "promotion": lambda x: [x.int() + k for k in (1, 1.0, True, 1j)],
    "integers divided": lambda x: x.long() / x.long(),
    "pieces": lambda x: [*x.split(2), *torch.unsafe_split(x, 2), *x.chunk(2, 1)],
    "the default dtype changes": lambda x: [
        _under(d, lambda: x.long() / 2) for d in (torch.half, torch.double)
    ],
    "conjugates": lambda x: (x + 1j * x).conj() * 2,
    "as_strided": lambda x: [row.as_strided((2, 2), (1, 1), 3) for row in x],
    "one operand twice": lambda x: x[0] @ x[0].T,
    "nothing": lambda x: x[:0].sum(0),
}


def _under(dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    with checked() as (mode, fake):
        for _ in range(2):
            CASES[case](fake.from_tensor(torch.randn(4, 3, 5)))
    assert mode.calls._known


def test_a_remembered_call_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode() as fake:
        calls, x = FakeCalls(fake), torch.empty(4, 3)
        first = calls(torch.ops.aten.exp.default, (x,), {})
        monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *args, **kwargs: pytest.fail("made again"))
        again = calls(torch.ops.aten.exp.default, (x,), {})
        assert again is not first and tensor_spec(again) == tensor_spec(first)
        assert again.untyped_storage()._cdata != first.untyped_storage()._cdata


def test_a_result_that_is_an_operand() -> None:
    with FakeTensorMode() as fake:
        calls, x, y = FakeCalls(fake), torch.empty(4, 3), torch.empty(4, 3)
        for t in (x, x, y):
            assert calls(torch.ops.aten.to.dtype, (t, t.dtype), {}) is t
        assert list(calls._known.values()) == [(Tensor, [0])]


def test_what_is_not_remembered() -> None:
    """Results that share memory with one another, and nothing else does."""
    with FakeTensorMode() as fake:
        calls, x = FakeCalls(fake), torch.empty(4, 3)
        y = torch.empty(4, 3)
        assert calls._layout((y, y.view(-1)), [x]) is None
        assert calls._layout((y, x.t()), [x]) is not None
