"""The order of packages: each imports only those before it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: In the order data flows. A name stands for everything below it that has no line of its own.
ORDER = [
    "metaoptim.errors",
    "metaoptim.compiler.compat",
    *(f"metaoptim.compiler.{name}" for name in ("ir", "capture", "derive", "lower", "passes", "cost")),
    *(f"metaoptim.runtime.{name}" for name in ("states", "engine", "budget", "windows", "functions")),
    *(f"metaoptim.{name}" for name in ("optim", "functions", "report")),
    "metaoptim",
]


def place(module: str) -> int:
    """Where a module stands in the order."""
    return next(i for i, name in enumerate(ORDER) if f"{module}.".startswith(f"{name}."))


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """The project's modules that a file imports, wherever in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` names a module, `from .x import y` names one already
            names = [f"{whole}.{alias.name}" for alias in node.names] if f"{whole}." in _PARENTS else [whole]
            yield from ((node.lineno, name) for name in names if name.startswith("metaoptim"))


_PARENTS = {"metaoptim.", "metaoptim.compiler.", "metaoptim.runtime."}


def test_no_package_imports_one_after_it() -> None:
    backwards, files = [], 0
    for folder, root in (
        ("metaoptim", "metaoptim"),
        *((f, f"metaoptim.{f}") for f in ("compiler", "runtime")),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "metaoptim" and inside.parts[0] in (
                "compiler",
                "runtime",
            ):  # links to the other folders
                continue
            package = ".".join([root, *inside.parts[:-1]])
            here = place(package if path.name == "__init__.py" else f"{package}.{path.stem}")
            files += 1
            for line, target in imported(path, package):
                if place(target) > here:
                    backwards.append(f"{folder}/{inside}:{line} imports {target}")
    assert files > 100 and not backwards, "\n".join(backwards)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs").glob("*.md")) + sorted(ROOT.glob("*.md")), ids=lambda p: p.name
)
def test_files_named_in_the_docs_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:metaoptim|compiler|runtime|tests|docs|benchmarks|examples)/[\w./-]+)`", page.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_import_leaves_dynamo_alone() -> None:
    """It takes as long to import as all else here, and an optimizer of torch that is made imports it."""
    code = "import sys, metaoptim; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
