"""What a compiled function reads by way of objects, modules and other functions: nothing of it is frozen in silence.

Each case is taken through calls between which something changes, and compared with the tape, step by step.
"""

from __future__ import annotations

import array
import collections
import ctypes
import dataclasses
import enum
import functools
import itertools
import random
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import changing
import metaoptim
from forms import full_tape
from oracle import agree

X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 1, 10).view(5, 2)
SCALE = 1.0
COUNT = 0


class Case:
    """A loss, and what changes of what it reads: subclasses say."""

    settings: Any = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.inner: Any = metaoptim.MetaSGD([self.net], lr=0.1, momentum=0.5)
        self.set_up()

    def set_up(self) -> None:
        """Make the rest."""

    def loss(self, x: Tensor) -> Tensor:
        """The inner loss."""
        return F.mse_loss(self.net(x), Y) * self.factor()

    def factor(self) -> Any:
        """What it is multiplied by."""
        return 1.0

    def change(self) -> None:
        """What happens between two calls."""


CASES: dict[str, type[Case]] = {}


def case(cls: type[Case]) -> type[Case]:
    CASES[cls.__name__] = cls
    return cls


# -- numbers, flags and strings behind objects ------------------------------------------------------------------------


@case
class Attribute(Case):
    k = 1

    def factor(self) -> Any:
        return self.k

    def change(self) -> None:
        self.k = 20


@case
class ClassAttribute(Case):
    k = 1.0

    def set_up(self) -> None:
        type(self).k = 1.0

    def factor(self) -> Any:
        return type(self).k

    def change(self) -> None:
        type(self).k += 1


@case
class Namespace(Case):
    def set_up(self) -> None:
        self.settings = types.SimpleNamespace(k=1.0, unread=object())

    def factor(self) -> Any:
        return self.settings.k

    def change(self) -> None:
        self.settings.k = 20.0


@dataclasses.dataclass
class Settings:
    k: float = 1.0
    square: bool = False
    name: str = "mean"
    rates: list = dataclasses.field(default_factory=lambda: [1.0, 2.0])
    inner: Any = None

    @property
    def doubled(self) -> float:
        return 2 * self.k


@case
class Dataclass(Case):
    def set_up(self) -> None:
        self.settings = Settings(inner=Settings())

    def factor(self) -> Any:
        s = self.settings
        return (s.inner.k + s.rates[1]) * (1 if s.square else 2) * (3 if s.name == "mean" else 4)

    def change(self) -> None:
        s = self.settings
        if s.inner.k == 1.0:
            s.inner.k = 3.0
        elif not s.square:
            s.square = True
        elif s.name == "mean":
            s.name = "sum"
        else:
            s.rates[1] += 1


@case
class Frozen(Case):
    def set_up(self) -> None:
        self.settings = dataclasses.make_dataclass("Frozen", [("k", float)], frozen=True)(1.0)

    def factor(self) -> Any:
        return self.settings.k

    def change(self) -> None:
        self.settings = dataclasses.replace(self.settings, k=self.settings.k + 1)


@case
class Slots(Case):
    def set_up(self) -> None:
        class Slotted:
            __slots__ = ("k",)

        self.settings = Slotted()
        self.settings.k = 1.0

    def factor(self) -> Any:
        return self.settings.k

    def change(self) -> None:
        self.settings.k += 1


@case
class Property(Case):
    def set_up(self) -> None:
        self.settings = Settings()

    def factor(self) -> Any:
        return self.settings.doubled

    def change(self) -> None:
        self.settings.k += 1


@case
class Delegating(Case):
    """What is read through ``__getattr__``, by a name made up when it runs, through ``vars``, and what is not there."""

    def set_up(self) -> None:
        class Wrapper:
            def __init__(self, inner: Any) -> None:
                self.wrapped = inner

            def __getattr__(self, name: str) -> Any:
                return getattr(self.wrapped, name)

        self.inside = Settings()
        self.settings = Wrapper(self.inside)

    def factor(self) -> Any:
        s = self.settings
        k = (
            getattr(s, "".join("k"))
            + vars(self.inside)["square"]
            + len(dataclasses.asdict(self.inside)["name"])
        )
        return k * (2 if hasattr(self, "absent") else 1)

    def change(self) -> None:
        if self.inside.k == 1.0:
            self.inside.k = 2.0
        elif not self.inside.square:
            self.inside.square = True
        elif self.inside.name == "mean":
            self.inside.name = "total"
        else:
            self.absent = True


class Kind(enum.Enum):
    SMALL, LARGE = "small", "large"


@case
class Values(Case):
    """An enumeration, a numpy number and array, a set, a deque, a dict in a list."""

    def set_up(self) -> None:
        self.kind, self.number, self.array = Kind.SMALL, np.float64(1.0), np.ones(3)
        self.set, self.deque, self.nested = {1}, collections.deque([1.0], maxlen=3), [{"a": 1.0}]

    def factor(self) -> Any:
        sizes = (
            float(self.array[1]) + len(self.set) + sum(self.deque) + self.nested[0]["a"] + float(self.number)
        )
        return sizes * (2 if self.kind is Kind.SMALL else 3)

    def change(self) -> None:
        if self.kind is Kind.SMALL:
            self.kind = Kind.LARGE
        elif self.array[1] == 1.0:
            self.array[1] = 2.0
        elif self.number == 1.0:
            self.number = np.float64(3.0)
        else:
            self.set.add(2)
            self.deque.append(3.0)
            self.nested[0]["a"] += 1


@case
class Buffers(Case):
    """What has its values in memory of its own, or shows another's: nothing of it is an attribute."""

    def set_up(self) -> None:
        self.array, self.number, self.table = array.array("d", [1.0]), ctypes.c_double(1.0), {"k": 1.0}
        self.view, self.shown = memoryview(bytearray([1])), types.MappingProxyType(self.table)

    def factor(self) -> Any:
        return self.array[0] + 3 * self.number.value + 5 * self.view[0] + 7 * self.shown["k"]

    def change(self) -> None:
        if self.array[0] == 1.0:
            self.array[0] = 2.0
        elif self.number.value == 1.0:
            self.number.value = 2.0
        elif self.view[0] == 1:
            self.view[0] = 2
        else:
            self.table["k"] += 1


class Hidden:
    k = 1.0

    def factor(self) -> Any:
        return 1.0

    @staticmethod
    def fixed() -> Any:
        return 1.0


class Hiding(Hidden):
    k = 100.0

    def factor(self) -> Any:
        return super().factor() + 3 * super().k + 5 * Hidden.fixed()


@case
class Classes(Case):
    """What a class hides and ``super()`` finds, and a function that is called by way of its class."""

    def set_up(self) -> None:
        self.settings, self.calls = Hiding(), 0
        Hidden.k, Hidden.factor, Hidden.fixed = 1.0, lambda self: 1.0, staticmethod(lambda: 1.0)

    def factor(self) -> Any:
        return self.settings.factor()

    def change(self) -> None:
        self.calls += 1
        if self.calls == 1:
            Hidden.k = 2.0
        elif self.calls == 2:
            Hidden.factor = lambda self: 2.0
        else:
            Hidden.fixed = staticmethod(lambda: 2.0)


@case
class ImportedInside(Case):
    def set_up(self) -> None:
        changing.SCALE = changing.Config.scale = 1.0

    def factor(self) -> Any:
        import changing as module
        from changing import SCALE as scale

        return scale + module.Config.scale

    def change(self) -> None:
        changing.SCALE, changing.Config.scale = 2 * changing.Config.scale, changing.SCALE


@case
class Weak(Case):
    def set_up(self) -> None:
        self.held = Settings()
        self.settings = weakref.ref(self.held)

    def factor(self) -> Any:
        return self.settings().k

    def change(self) -> None:
        self.held.k += 1


# -- tensors, networks and optimizers behind objects ------------------------------------------------------------------


@case
class TensorBehind(Case):
    def set_up(self) -> None:
        self.settings = types.SimpleNamespace(weight=torch.tensor(1.5))
        self.table = {"a": [torch.tensor(0.5)]}

    def factor(self) -> Any:
        return self.settings.weight + self.table["a"][0]

    def change(self) -> None:
        self.settings.weight = self.settings.weight + 1
        self.table["a"][0] = torch.tensor(2.5)


@case
class LearningRate(Case):
    def change(self) -> None:
        self.inner.param_groups[0]["lr"] *= 1.5


@case
class Clipping(Case):
    def change(self) -> None:
        self.inner.reset_grad_normalizer(0.01)


@case
class Training(Case):
    def set_up(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        self.inner = metaoptim.MetaSGD([self.net], lr=0.1)

    def change(self) -> None:
        self.net.train(not self.net.training)
        self.inner.param_groups[0]["lr"] += 0.01


@case
class Replaced(Case):
    """Between windows."""

    between = True

    def change(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
        self.inner = metaoptim.MetaAdam([self.net], lr=0.05)


class Scaled(nn.Module):
    """Has settings of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self._hidden = nn.Linear(3, 2), {"k": 1.0}, 1.0
        self.config = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.table["k"] * self._hidden * self.config.k


@case
class InsideAModule(Case):
    def set_up(self) -> None:
        self.net = Scaled()
        self.inner = metaoptim.MetaSGD([self.net], lr=0.1)

    def change(self) -> None:
        if self.net.table["k"] == 1.0:
            self.net.table["k"] = 2.0
        elif self.net._hidden == 1.0:
            self.net._hidden = 2.0
        else:
            self.net.config.k += 1


# -- functions that are called ----------------------------------------------------------------------------------------


def scaled(value: Any) -> Any:
    return value * SCALE


@case
class GlobalOfAHelper(Case):
    def set_up(self) -> None:
        globals()["SCALE"] = 1.0

    def factor(self) -> Any:
        return scaled(1.0)

    def change(self) -> None:
        globals()["SCALE"] += 1


@case
class AnotherModule(Case):
    def set_up(self) -> None:
        changing.SCALE = changing.Config.scale = 1.0

    def factor(self) -> Any:
        return changing.SCALE + changing.Config.scale

    def change(self) -> None:
        changing.SCALE, changing.Config.scale = changing.SCALE + 1, changing.Config.scale + 2


@case
class AMethodOfItsOwn(Case):
    def scale(self) -> float:
        return 1.0

    def factor(self) -> Any:
        return self.scale()

    def change(self) -> None:
        scale = self.scale() + 1
        self.scale = lambda: scale


@case
class NamesOfAttributes(Case):
    def set_up(self) -> None:
        self.more = Empty()

    def factor(self) -> Any:
        return 1.0 + len(vars(self.more))

    def change(self) -> None:
        setattr(self.more, f"k{len(vars(self.more))}", 0)


class Empty:
    """Whatever a test puts there."""


@case
class NamesAsText(Case):
    def set_up(self) -> None:
        changing.SCALE = 1.0
        globals()["SCALE"] = 1.0

    def factor(self) -> Any:
        return getattr(changing, "SCALE") + globals()["SCALE"]  # noqa: B009

    def change(self) -> None:
        changing.SCALE += 1
        globals()["SCALE"] += 2


@case
class ReloadedCode(Case):
    def set_up(self) -> None:
        def helper() -> float:
            return 1.0

        self.helper = helper

    def factor(self) -> Any:
        return self.helper()

    def change(self) -> None:
        value = self.helper() + 1
        self.helper.__code__ = self.helper.__code__.replace(co_consts=(None, value))


@case
class ClosureOfAHelper(Case):
    def set_up(self) -> None:
        k = 1.0

        def helper() -> float:
            return k

        def more() -> None:
            nonlocal k
            k += 1

        self.helper, self.more = helper, more

    def factor(self) -> Any:
        return self.helper()

    def change(self) -> None:
        self.more()


@case
class Defaults(Case):
    def set_up(self) -> None:
        table = self.table = {"k": 1.0}

        def helper(table: dict = table) -> float:
            return table["k"]

        self.helper = helper

    def factor(self) -> Any:
        return self.helper()

    def change(self) -> None:
        self.table["k"] += 1


@case
class Partial(Case):
    def set_up(self) -> None:
        self.table = [1.0]
        self.helper = functools.partial(lambda table, k: table[0] * k, self.table, k=2.0)

    def factor(self) -> Any:
        return self.helper()

    def change(self) -> None:
        self.table[0] += 1


@case
class BoundMethod(Case):
    def set_up(self) -> None:
        class Helper:
            k = 1.0

            def __call__(self) -> float:
                return self.k

            def method(self) -> float:
                return self.k + 1

        self.helper = Helper()
        self.method = self.helper.method

    def factor(self) -> Any:
        return self.helper() + self.method()

    def change(self) -> None:
        self.helper.k += 1


@case
class MethodReplaced(Case):
    def set_up(self) -> None:
        class Helper:
            def method(self) -> float:
                return 1.0

        self.helper = Helper()

    def factor(self) -> Any:
        return self.helper.method()

    def change(self) -> None:
        type(self.helper).method = lambda self: 3.0  # type: ignore[method-assign, assignment]


@functools.lru_cache
def remembered(k: int) -> float:
    return k * SCALE


@case
class Cached(Case):
    def set_up(self) -> None:
        globals()["SCALE"] = 1.0
        remembered.cache_clear()
        remembered(1)

    def factor(self) -> Any:
        return remembered(1)

    def change(self) -> None:
        globals()["SCALE"] += 1
        remembered.cache_clear()


# -- state that the function itself writes ----------------------------------------------------------------------------


class Counting(nn.Module):
    """The issue of a counter that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.calls)


@case
class Counter(Case):
    def set_up(self) -> None:
        self.net = Counting()
        self.inner = metaoptim.MetaSGD([self.net], lr=0.1)


@case
class CounterBehind(Case):
    def set_up(self) -> None:
        self.settings = Settings()

    def factor(self) -> Any:
        self.settings.k += 0.5
        return self.settings.k


@case
class Growing(Case):
    def set_up(self) -> None:
        self.values: list[float] = []

    def factor(self) -> Any:
        self.values.append(1.5)
        return sum(self.values)


@case
class Running(Case):
    def set_up(self) -> None:
        self.running = {"mean": 1.0}

    def factor(self) -> Any:
        self.running["mean"] = 0.9 * self.running["mean"] + 0.3
        return self.running["mean"]


@case
class GlobalCounter(Case):
    def set_up(self) -> None:
        globals()["COUNT"] = 0

    def factor(self) -> Any:
        global COUNT
        COUNT += 1
        return COUNT


@case
class ModuleCounter(Case):
    def set_up(self) -> None:
        changing.steps = 0

    def factor(self) -> Any:
        if self.net.training:
            changing.steps += 1
        return 1 + changing.steps


@case
class NonlocalCounter(Case):
    def set_up(self) -> None:
        count = 0

        def helper() -> int:
            nonlocal count
            count += 1
            return count

        self.helper = helper

    def factor(self) -> Any:
        return self.helper()


@case
class ClassCounter(Case):
    calls = 0

    def set_up(self) -> None:
        type(self).calls = 0

    def factor(self) -> Any:
        type(self).calls += 1
        return self.calls


@case
class FunctionCounter(Case):
    def set_up(self) -> None:
        def helper() -> int:
            helper.calls += 1  # type: ignore[attr-defined]
            return helper.calls  # type: ignore[attr-defined]

        helper.calls = 0  # type: ignore[attr-defined]
        self.helper = helper

    def factor(self) -> Any:
        return self.helper()


@case
class ArrayWritten(Case):
    def set_up(self) -> None:
        self.array = np.zeros(2)

    def factor(self) -> Any:
        self.array[0] += 1
        return float(self.array[0])


def gradients(made: Case, form: str, eta: Tensor, calls: int) -> list[dict[str, Any]]:
    """What each window gives: two steps, a change, two steps (form B), or a whole function and a change (C)."""

    def step() -> None:
        made.inner.step(made.loss(X) * eta)

    def whole(window: Any) -> Tensor:
        with window(offline=True):
            step()
            step()
            return F.mse_loss(made.net(X), Y)

    def steps(window: Any, step: Callable[[], None]) -> Tensor:
        with window(offline=True):
            for k in range(4):
                step()
                if k == 1 and not hasattr(made, "between"):
                    made.change()
            return F.mse_loss(made.net(X), Y)

    compiled = metaoptim.compile(step if form[0] == "B" else whole, backend="eager")
    found = []
    for _ in range(calls):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has been recompiled 8 times")
            if form == "C":
                outer = compiled(metaoptim.SlidingWindow)
            elif form == "C tape":
                outer = whole(full_tape)
            else:
                window, take = (full_tape, step) if "tape" in form else (metaoptim.SlidingWindow, compiled)
                outer = steps(window, take)
        leaves = {"eta": eta, **dict(made.net.named_parameters())}
        found.append(dict(zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True)))
        found[-1]["outer"] = outer.detach()
        made.change()
    return found


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_frozen(name: str, form: str) -> None:
    eta = torch.tensor(0.5, requires_grad=True)
    calls = 2 if form == "B" else 4
    expected = gradients(CASES[name](), f"{form} tape", eta, calls)
    for got, want in zip(gradients(CASES[name](), form, eta, calls), expected, strict=True):
        agree(got, want, rtol=1e-9)
    assert not torch.allclose(expected[0]["outer"], expected[-1]["outer"], rtol=1e-6)


# -- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "counter": (itertools.count, next, r"made\.held.*iterator \(count\)"),
    "iterator": (lambda: iter([1.0, 2.0]), next, r"made\.held.*iterator \(list_iterator\)"),
    "generator": (lambda: (float(k) for k in range(9)), next, r"made\.held.*iterator \(generator\)"),
    "Random": (lambda: random.Random(0), lambda r: r.random(), r"made\.held.*random generator \(Random\)"),
    "numpy": (
        lambda: np.random.default_rng(0),
        lambda r: r.random(),
        r"made\.held.*random generator \(Generator\)",
    ),
}


@pytest.mark.parametrize("form", ["B", "C"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, form: str) -> None:
    make, use, message = REFUSED[name]

    class Held(Case):
        def set_up(self) -> None:
            self.held = make()

        def factor(self) -> Any:
            return 1 + use(self.held)

    with pytest.raises(metaoptim.CaptureError, match=message):
        gradients(Held(), form, torch.tensor(0.5, requires_grad=True), 1)


# -- what is neither stale nor compiled anew --------------------------------------------------------------------------


def test_what_is_not_read_makes_nothing_compile_anew() -> None:
    class Agent(Case):
        unread, calls = 0, 0

        def step(self, x: Tensor) -> None:
            self.calls += 1
            self.seen = x.shape
            self.inner.step(self.loss(x))

    agent = Agent()
    step = metaoptim.compile(Agent.step, backend="eager")
    with metaoptim.SlidingWindow():
        for _ in range(3):
            step(agent, X)
            agent.unread += 1
            agent.other = object()  # type: ignore[attr-defined]
    assert sum(map(len, step._specializations.known.values())) == 2  # with state, and without


def test_classes_are_as_before_after_a_capture() -> None:
    made = CASES["Dataclass"]()
    before = [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))]
    gradients(made, "C", torch.tensor(0.5, requires_grad=True), 2)
    assert [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))] == before
    with pytest.raises(metaoptim.CaptureError):
        metaoptim.compile(lambda: made.net(X).sum().item() * made.settings.k, backend="eager")()
    assert [vars(cls).get("__getattribute__") for cls in (nn.Module, Settings, type(made))] == before


def test_the_change_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "metaoptim.recompiles")
    for name, text in (
        ("Attribute", "self.k: was 1, is 20"),
        ("LearningRate", "self.inner.param_groups[0]['lr']: was 0.1, is 0.1500"),
        ("GlobalOfAHelper", "SCALE: was 1.0, is 2.0"),
        ("AnotherModule", "changing.SCALE: was 1.0, is 2.0"),
    ):
        made = CASES[name]()
        f = metaoptim.compile(CASES[name].loss, backend="eager")
        if name == "LearningRate":
            f = metaoptim.compile(_loss_after_a_step, backend="eager")
        f(made, X)
        made.change()
        f(made, X)
        assert text in caplog.records[-1].getMessage()


def _loss_after_a_step(self: Case, x: Tensor) -> Tensor:
    with metaoptim.SlidingWindow(offline=True):
        self.inner.step(self.loss(x))
        return self.loss(x)
