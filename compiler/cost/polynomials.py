"""Sizes that depend on a batch: polynomials in it, and the largest of several.

Bytes alive at one moment, and operations, are polynomials in the batch; a peak is the largest of such polynomials. So
four sizes of the batch tell what there is with any: three make the polynomials, and the fourth is held against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import sympy

from metaoptim.errors import WindowError

from ..ir.program import readable_bytes
from .model import b

TIMES = (1, 2, 3, 4)  # the batch, of which polynomials are made
Polynomial = tuple[Fraction, Fraction, Fraction]  # coefficients, that of 1 first
ZERO: Polynomial = (Fraction(0), Fraction(0), Fraction(0))


def fitted(values: Sequence[int], size: int, what: str) -> Polynomial:
    """The polynomial, of degree 2 or less, that has these values.

    Args:
        values: at `TIMES` times ``size``.
        size: of the batch.
        what: they are of, for errors.

    Raises:
        WindowError: where there is none.
    """
    first, second, third, last = values
    predicted = 3 * (third - second) + first
    if predicted != last:
        raise WindowError(
            f"plan: {what}: no polynomial of degree 2 or less in the batch: got {first:,}, {second:,}, {third:,} and "
            f"{last:,} with {batches(size)}, expected {predicted:,} for the last by the others. Plan without batch, "
            "or, if small batches alone are treated otherwise, with arguments of a larger one"
        )
    step, bend = Fraction(second - first), Fraction(third - 2 * second + first) / 2
    return first - step + 2 * bend, (step - 3 * bend) / size, bend / size**2  # Newton's, multiplied out


def batches(size: int) -> str:
    """The sizes of the batch that are looked at."""
    return f"batches of {', '.join(str(k * size) for k in TIMES)}"


def added(p: Polynomial, q: Polynomial) -> Polynomial:
    """p + q."""
    return p[0] + q[0], p[1] + q[1], p[2] + q[2]


def largest(polynomials: Iterable[Polynomial]) -> list[Polynomial]:
    """Those that are the largest for some batch of 1 or more, in that order."""
    rest: list[Polynomial] = []
    for p in sorted({*polynomials}, key=_about_1, reverse=True):
        if not any(_below(p, q) for q in rest):
            rest.append(p)
    turns = [1.0, *sorted({x for p, q in combinations(rest, 2) for x in _meet(p, q) if x > 1})]
    between = [(x + y) / 2 for x, y in pairwise(turns)] + [2 * turns[-1]]
    return list(dict.fromkeys(max(rest, key=lambda p, x=x: _at(p, Fraction(x))) for x in between))


def _about_1(p: Polynomial) -> Polynomial:
    return p[0] + p[1] + p[2], p[1] + 2 * p[2], p[2]


def _at(p: Polynomial, x: Fraction) -> Fraction:
    return p[0] + x * (p[1] + x * p[2])


def _meet(p: Polynomial, q: Polynomial) -> Iterator[float]:
    one, linear, square = (float(x - y) for x, y in zip(p, q))
    if not square:
        yield from [-one / linear] if linear else []
    elif (inner := linear**2 - 4 * square * one) >= 0:
        yield from ((-linear + sign * math.sqrt(inner)) / (2 * square) for sign in (1, -1))


def formula(polynomials: Sequence[Polynomial]) -> Any:
    """The largest of polynomials as an expression."""
    return sympy.Max(*(_expression(p) for p in polynomials))


def difference(of: Sequence[Polynomial], less: Sequence[Polynomial]) -> Any:
    """The largest of some less the largest of others: a polynomial where each of them differs by that."""
    apart = _apart(of, less)
    return formula(of) - formula(less) if apart is None else _expression(apart)


def largest_difference(pairs: Iterable[tuple[Sequence[Polynomial], Sequence[Polynomial]]]) -> Any:
    """The largest `difference` of several pairs; those that a polynomial among them surpasses are left out."""
    found = [(of, less, _apart(of, less)) for of, less in pairs]
    known = [apart for *_, apart in found if apart is not None]
    others = [
        formula(of) - formula(less)
        for of, less, apart in found
        if apart is None
        and not any(all(any(_below(p, added(q, most)) for q in less) for p in of) for most in known)
    ]
    return sympy.Max(*others, *(_expression(p) for p in known))


def _apart(of: Sequence[Polynomial], less: Sequence[Polynomial]) -> Polynomial | None:
    by = {added(p, (-q[0], -q[1], -q[2])) for p, q in zip(of, less)}
    return by.pop() if len(of) == len(less) and len(by) == 1 else None


def _below(p: Polynomial, q: Polynomial) -> bool:
    """Whether p is at most q from 1 on, as far as their coefficients tell."""
    return all(x <= y for x, y in zip(_about_1(p), _about_1(q)))


def _expression(p: Polynomial) -> Any:
    return sum(sympy.Rational(c.numerator, c.denominator) * b**k for k, c in enumerate(p))


def size_text(size: Any) -> str:
    """Bytes, or a formula for bytes in the size of a batch, as people write them."""
    parts = sympy.Add.make_args(sympy.sympify(size))
    rest = sympy.Add(*(x for x in parts if not x.has(sympy.Max)))
    peaks = [x for x in parts if x.has(sympy.Max)]
    text = ""
    for (power,), coefficient in reversed(sympy.Poly(rest, b).terms() if rest or not peaks else []):
        term = readable_bytes(abs(float(coefficient))) + ("", "·batch", "·batch²")[power]
        text += _signed(coefficient < 0, term, not text)
    for peak in peaks:
        times, of = peak.as_coeff_Mul()
        deep = any(x.has(sympy.Max) for x in of.args)
        inner = "max(...)" if deep else f"max({', '.join(map(size_text, of.args))})"
        text += _signed(times < 0, inner if abs(times) == 1 else f"{abs(times)}·{inner}", not text)
    return text


def _signed(negative: bool, text: str, first: bool) -> str:
    return ("-" if negative else "") + text if first else (" - " if negative else " + ") + text
