"""What a compiled function reads by way of modules and functions, and writes itself, and how it changes."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
from torch import Tensor, nn

import changing
import metaoptim
from stale import Case, Settings
from tables import into

SCALE = 1.0
COUNT = 0
CASES: dict[str, type[Case]] = {}
case = into(CASES)


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
class ModulesInACircle(Case):
    """Two modules that have each other, as a package and what it is made of."""

    def set_up(self) -> None:
        circle: Any = types.ModuleType("circle")
        circle.changing, changing.circle = changing, circle  # type: ignore[attr-defined]
        changing.SCALE = 1.0

    def factor(self) -> Any:
        return changing.circle.changing.SCALE

    def change(self) -> None:
        changing.SCALE += 1


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
