"""Tables of cases that tests go through by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Case = TypeVar("Case", bound=Callable[..., Any])


def into(table: dict[str, Any]) -> Callable[[Case], Case]:
    """A decorator: the function or class gets its place in ``table``, by its name."""

    def add(case: Case) -> Case:
        assert case.__name__ not in table, case.__name__
        table[case.__name__] = case
        return case

    return add
