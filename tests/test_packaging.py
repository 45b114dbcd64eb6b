"""What is installed: the whole tree, one set of modules wherever Python starts, and a light `import errata`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import errata

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("editors", "hparams", "benchmarks", "evaluate")


def python(code: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def clone(folder: Path, *options: str) -> Path:
    """Clone what is committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    subprocess.run(["git", "clone", "--quiet", *options, str(ROOT), str(folder)], check=True)
    return folder


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z", *FOLDERS], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listing.stdout.split("\0") if name]


def test_import_errata_brings_in_no_heavy_package() -> None:
    heavy = [
        "torch",
        "numpy",
        "transformers",
        "datasets",
        "hydra",
        "omegaconf",
        "matplotlib",
        "pandas",
        "scipy",
        "rich",
    ]
    code = f"import sys, errata; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, ROOT).strip() == "[]"
    control = f"import sys, errata; errata.EditRequest; import numpy; print([m for m in {heavy} if m in sys.modules])"
    assert "numpy" in python(control, ROOT)


def test_every_public_name_resolves_and_is_listed() -> None:
    assert set(errata.__all__) <= set(dir(errata))
    for name in errata.__all__:
        assert getattr(errata, name) is not None, name
    home = errata.EditRequest.__module__
    assert home == "errata.editors.core.request"


def test_an_unknown_name_is_an_attribute_error_that_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="EditRequest"):
        errata.edit_request  # type: ignore[attr-defined]  # noqa: B018


def test_root_and_elsewhere_give_the_same_modules(tmp_path: Path) -> None:
    code = (
        "import json, errata, errata.editors.core.request as r, errata.evaluate.probes as p;"
        "print(json.dumps([errata.__file__, r.__file__, p.__file__, r.EditRequest.__module__]))"
    )
    here, elsewhere = json.loads(python(code, ROOT)), json.loads(python(code, tmp_path))
    assert here == elsewhere


WITHOUT_LINKS = """
import sys
from pathlib import Path

import errata
import errata.evaluate.probes
from errata import editors, hparams
from errata.benchmarks import world
from errata.benchmarks.bench.compose import choices, compose
from errata.cli.main import main
from errata.editors import ROME

root = Path(sys.argv[1]).resolve()
for module in (errata, editors, hparams, world, errata.evaluate.probes):
    assert Path(module.__file__).resolve().is_relative_to(root), module.__file__
assert "evaluate" not in sys.modules

case = world.cases()[0]
model, tokenizer = errata.load("world")
edit = ROME(model, tokenizer, {"v_num_grad_steps": 2}).apply(case.request)
assert edit.is_applied
edit.undo()
assert compose("bench", ["editor=grace"])["editor"]["name"] == "grace"
assert "memit" in choices("editor")
sys.argv = ["errata", "--version"]
sys.exit(main())
"""


def test_a_checkout_without_symbolic_links_is_imported_edits_and_answers_at_the_command_line(tmp_path: Path) -> None:
    root = clone(tmp_path / "clone", "--config", "core.symlinks=false")
    links = [root / "src" / "errata" / name for name in FOLDERS]
    assert all(link.is_file() and not link.is_symlink() for link in links)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LINKS, str(root)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["errata", errata.__version__]


def test_where_links_are_folders_the_package_has_one_place() -> None:
    assert [Path(path).resolve() for path in errata.__path__] == [(ROOT / "src" / "errata").resolve()]


def test_every_tracked_file_is_code_or_matches_the_package_data() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = config["tool"]["setuptools"]["package-data"]["*"]
    files = tracked()
    assert len(files) > 20
    data = [name for name in files if not name.endswith((".py", ".md"))]
    lost = [name for name in data if not any(fnmatch(Path(name).name, pattern) for pattern in patterns)]
    assert not lost, f"the wheel would not hold {lost}; extend [tool.setuptools.package-data]"
    assert any(name.endswith(".yaml") for name in data), "no YAML seen: the check proves nothing"
    assert any(name.endswith(".safetensors") for name in data), "no weights seen: the check proves nothing"


NOT_IN_THE_WHEEL = "benchmarks/speed/"  # times errata against itself: python -m errata.benchmarks.speed in a checkout


def test_the_packages_of_the_wheel_are_all_but_the_one_that_times_errata_itself() -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    find = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]
    # In a process of its own: its import was once refused late in a long test run, over the distutils it found there.
    code = "import json, sys, setuptools as s; print(json.dumps(s.find_namespace_packages(sys.argv[1], sys.argv[2:])))"
    command = [sys.executable, "-c", code, str(ROOT / "src"), *find["exclude"]]
    packed = set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    folders = {str(Path(name).parent) for name in tracked() if name.endswith(".py")}
    wanted = {f"errata/{folder}".replace("/", ".") for folder in folders if f"{folder}/" != NOT_IN_THE_WHEEL}
    assert "errata.benchmarks.runs" in wanted
    assert wanted <= packed
    assert not [name for name in packed if name.startswith("errata.benchmarks.speed")]


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file_but_what_times_errata_itself(tmp_path: Path) -> None:
    source = clone(tmp_path / "clone")
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    wanted = {name for name in tracked() if not name.endswith(".md") and not name.startswith(NOT_IN_THE_WHEEL)}
    assert not {f"errata/{name}" for name in wanted} - held
    assert not {name for name in held if name.startswith(f"errata/{NOT_IN_THE_WHEEL}")}
    assert {"errata/__init__.py", "errata/cli/main.py", "errata/py.typed"} <= held
    assert not {name for name in held if "__pycache__" in name or name.startswith("errata/tests")}
