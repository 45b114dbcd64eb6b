"""What is installed: the whole tree, one set of modules wherever Python starts, and a light `import errata`."""

from __future__ import annotations

import json
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


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(tmp_path / "clone")]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    missing = {f"errata/{name}" for name in tracked() if not name.endswith(".md")} - held
    assert not missing
    assert {"errata/__init__.py", "errata/cli/main.py", "errata/py.typed"} <= held
    assert not {name for name in held if "__pycache__" in name or name.startswith("errata/tests")}
