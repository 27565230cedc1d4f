"""The pages that sweeps write: how many samples each form does, and what it refuses, by name; and their command."""

from __future__ import annotations

import argparse
import logging
import math
import os
import pickle
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from metaoptim.compiler.lower.library import library
from sweeps import FORMS, OUTCOMES, Found


def summary(why: str) -> str:
    """An error's first clause, on one line."""
    why = re.sub(r"^of the inner step at \S+: ", "", " ".join(why.split()))
    return re.split(r"[;:.] |[;.]$", why)[0].replace("|", "\\|")


def rows(found: Iterable[Found]) -> list[str]:
    """Rows of the table of what is refused: by name, with the forms that do, how many samples and what they say."""
    table: dict[tuple[str, str, str], list[str]] = {}
    for f in found:
        reasons: Counter[str] = Counter()
        for (what, why), n in f.reasons.items():
            reasons[summary(why)] += n if what == "refused" else 0
        for why, n in reasons.items():
            if n:
                table.setdefault((f.name, f"{n} of {f.counts.total()}", why), []).append(f.form)
    return [f"| `{name}` | {', '.join(forms)} | {n} | {why} |" for (name, n, why), forms in table.items()]


def page(head: str, found: list[Found], cannot: Counter[str], gone: str) -> str:
    """A page of docs/: what was tried, how far, what eager PyTorch cannot do, what forms do, and what they refuse."""
    names = {f.name for f in found}
    never = [f"`{name}`" for name in cannot if name not in names]
    return f"""{head}
This page is of {gone}. {"; ".join(f"**{form}**: {FORMS[form]}" for form in _forms_in(found))}.

What is compared are the samples that eager PyTorch can differentiate twice, to finite numbers (with attention taken
apart). It cannot do so with {cannot.total()} samples of {len(cannot)} entries, among them all samples of these:
{", ".join(never)}.

{counted(found)}

Refused, by name:

| name | forms | samples | says |
|---|---|---|---|
""" + "".join(row + "\n" for row in rows(found))


def _forms_in(found: list[Found]) -> list[str]:
    return [form for form in FORMS if any(f.form == form for f in found)]


def counted(found: list[Found]) -> str:
    """The table of counts, by form: samples, and entries all of whose samples are equal."""
    forms = _forms_in(found)
    lines = [f"| | {' | '.join(forms)} |", "|---|" + "---|" * len(forms)]
    totals = {form: sum((f.counts for f in found if f.form == form), Counter()) for form in forms}
    for what in OUTCOMES:
        lines.append(f"| samples {what} | {' | '.join(str(totals[form][what]) for form in forms)} |")
    shares = [_share(totals[form]["equal"], totals[form].total()) for form in forms]
    lines.append(f"| share of samples that are equal | {' | '.join(shares)} |")
    for whole in (True, False):
        entries = [[f for f in found if f.form == form and f.counts] for form in forms]
        equal = [sum(f.counts["equal"] == f.counts.total() for f in of) for of in entries]
        cells = [_share(n, len(of)) if whole else f"{n} of {len(of)}" for n, of in zip(equal, entries)]
        title = "share of entries" if whole else "entries"
        lines.append(f"| {title} all of whose samples are equal | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{math.floor(1000 * part / whole) / 10:.1f}%" if whole else "-"


# -- what tests hold a page to ----------------------------------------------------------------------------------------


def refused_in(table: Path) -> list[tuple[str, str, str, str]]:
    """Of a page: the name of an entry, the forms that refuse it, how many of its samples, and what they say."""
    return re.findall(r"^\| `([^`]+)` \| (.+?) \| (\d+ of \d+) \| (.+) \|$", table.read_text(), re.MULTILINE)


def differences(name: str, found: list[Found], table: Path, whole: bool) -> list[str]:
    """What is wrong or crashes, and what the page does not say of what was found; of the ``whole``, says besides."""
    wrong = [bad for f in found for bad in f.bad()]
    if not torch.__version__.startswith("2.13"):  # which the pages are of
        return wrong
    text = table.read_text()
    if not found:
        return [] if f"`{name}`" in text else [f"nothing of {name} was compared"]
    if whole:
        names = tuple(f"| `{name}` |" for name in {f.name for f in found})
        return wrong + sorted({*rows(found)} ^ {line for line in text.splitlines() if line.startswith(names)})
    said = {(entry, form, why) for entry, forms, _, why in refused_in(table) for form in forms.split(", ")}
    refused = [(f.name, f.form, summary(why)) for f in found for what, why in f.reasons if what == "refused"]
    return wrong + [f"not in the page: {r}" for r in refused if r not in said]


def shares(table: Path, row: str) -> dict[str, str]:
    """A row of a page's table of counts, by form."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.read_text().splitlines()]
    head = next(line for line in lines if "A" in line)
    return dict(zip(head[1:], next(line for line in lines if line[:1] == [row])[1:], strict=True))


# -- the command ------------------------------------------------------------------------------------------------------


def main(names: Iterable[str], sweep: Callable[..., Iterator[Found]], head: str, table: Path) -> None:
    """Go through all ``names`` and write the page, or through those given and print what is found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="all of them if there are none")
    parser.add_argument("--forms", help=f"some of {','.join(FORMS)}")
    parser.add_argument("--most", type=int, help="samples of an entry, at most")
    parser.add_argument(
        "--keep", type=Path, help="a folder for what is found, from which a sweep can be resumed"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin with no further one after them"
    )
    options = parser.parse_args()
    prepare()
    found: list[Found] = []
    cannot: Counter[str] = Counter()
    names = options.names or [*names]
    began, gone = time.perf_counter(), 0
    for name in names:
        at = time.perf_counter()
        kept = options.keep and options.keep / f"{name}.pickle"
        if kept and kept.exists():
            of_name, left_out = pickle.loads(kept.read_bytes())
        elif at - began < options.seconds:
            left_out = Counter[str]()
            of_name = [*sweep(name, options.forms and options.forms.split(","), options.most, left_out)]
            library.clear()  # steps are many, and Python's collector goes through all objects
            if kept:
                kept.write_bytes(pickle.dumps((of_name, left_out)))
        else:
            continue
        gone += 1
        for f in of_name:
            print(f)
        print(f"{name} took {time.perf_counter() - at:.0f} s", file=sys.stderr)
        found += of_name
        cannot += left_out
    print(counted(found))
    print(f"eager cannot: {dict(cannot)}")
    if not options.names:
        table.write_text(page(head, found, cannot, f"{gone} of {len(names)} names in the database"))


def prepare() -> None:
    """What tests/conftest.py does, for the commands; and nothing is said of what samples warn of."""
    os.environ.setdefault("METAOPTIM_WAIT", "1")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
