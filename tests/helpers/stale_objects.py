"""What a compiled function reads by way of objects, and how it changes between calls."""

from __future__ import annotations

import array
import collections
import ctypes
import dataclasses
import enum
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import changing
import metaoptim
from stale import Case, Settings
from tables import into

CASES: dict[str, type[Case]] = {}
case = into(CASES)


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
