"""What users get: every module once, under `metaoptim` only, the same from the tree and from the sdist."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parents[2]
# Import name of each source folder.
FOLDERS = {"metaoptim": "metaoptim", "compiler": "metaoptim.compiler", "runtime": "metaoptim.runtime"}


def sources() -> dict[str, Path]:
    """Path inside the wheel of every Python file, links not followed."""
    found = {"MetaOptim.py": ROOT / "MetaOptim.py"}
    for folder, name in FOLDERS.items():
        for where, _, files in os.walk(ROOT / folder, followlinks=False):
            inside = Path(name.replace(".", "/"), Path(where).relative_to(ROOT / folder))
            for file in files:
                if file.endswith(".py"):
                    found[(inside / file).as_posix()] = Path(where, file)
    return found


def build(tree: Path, out: Path, *what: str) -> Path:
    """Builds a tree with the tools that are installed here and returns the one file it made."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(tree)]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, str]:
    """Hash of every file of a wheel but its record of hashes."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        assert len(names) == len(set(names)), "the wheel holds a path twice"
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A clean copy of what a build reads, so that builds leave nothing behind and find no leftovers."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skipped)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build(tree, tree.parent / "wheel", "--wheel")


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    return build(tree, tree.parent / "sdist", "--sdist")


def test_wheel_holds_every_module_once(wheel):
    built = contents(wheel)
    modules = {name: digest for name, digest in built.items() if name.endswith(".py")}
    expected = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources().items()}
    assert modules == expected
    assert len(expected) > 10
    assert "metaoptim/py.typed" in built


def test_wheel_claims_no_other_names(wheel):
    tops = {name.split("/")[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"metaoptim", "MetaOptim.py"}


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "LICENSE").is_file()
    assert contents(build(unpacked, tmp_path / "out", "--wheel")) == contents(wheel)


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {
        name.rpartition("/")[0].replace("/", "."): path.parent.relative_to(ROOT).as_posix()
        for name, path in sources().items()
        if "/" in name
    }
    assert settings["package-dir"] == folders, "list new folders in pyproject.toml, under package-dir"
    assert sorted(settings["packages"]) == sorted(folders), (
        "list new folders in pyproject.toml, under packages"
    )
    for folder in folders.values():
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist has no links")
@pytest.mark.parametrize("name", ["compiler", "runtime"])
def test_links_are_relative(name):
    link = ROOT / "metaoptim" / name
    assert link.is_symlink()
    assert Path(os.readlink(link)) == Path("..", name)


@pytest.mark.parametrize("name", ["compiler", "runtime"])
def test_bare_import_is_refused(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"metaoptim.{name}"):
        importlib.import_module(name)
    assert name not in sys.modules


def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = [name[:-3].removesuffix("/__init__").replace("/", ".") for name in sources()]
    script = (
        "import importlib, sys\n"
        "modules = [importlib.import_module(name) for name in sys.argv[2:]]\n"
        "outside = [m.__file__ for m in modules if not m.__file__.startswith(sys.argv[1])]\n"
        "assert not outside, outside\n"
        "import metaoptim, MetaOptim\n"
        "assert MetaOptim.__all__ == metaoptim.__all__\n"
        "assert all(getattr(MetaOptim, n) is getattr(metaoptim, n) for n in metaoptim.__all__)\n"
    )
    # PYTHONPATH comes before any installed copy; the folder of the caller must not.
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *names],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
