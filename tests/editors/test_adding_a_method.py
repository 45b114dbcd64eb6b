"""The method of docs/adding-a-method.md, taken from the page, works as the page says; what else may be registered."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import installed_package
import pytest
from typed_commands import run

import errata
from errata import editors
from errata.cli import overrides
from errata.editors.core.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))


def install(folder: Path, name: str, points: dict[str, str]) -> None:
    """What pip leaves of a package with these methods."""
    installed_package.register(folder, name, editors.GROUP, points)


@pytest.fixture
def last_layer(installed: Path) -> Path:
    """The page's files, installed."""
    for name, text in FILES.items():
        (installed / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    install(installed, project["name"].replace("-", "_"), project["entry-points"]["errata.methods"])
    return installed


def test_the_page_counts_its_files_and_lines() -> None:
    lines = {name: len(text.splitlines()) for name, text in FILES.items()}
    body = FILES["last_layer.py"].partition("class LastLayer(Editor):")[2]
    said = re.search(r"three files and (\d+) lines; the method's own class has (\d+)", PAGE)
    assert sorted(lines) == ["last_layer.py", "pyproject.toml", "test_last_layer.py"]
    assert said is not None
    assert [int(number) for number in said.groups()] == [sum(lines.values()), 1 + len(body.strip().splitlines())]


def test_the_page_s_method_keeps_every_law_by_the_page_s_test(last_layer: Path) -> None:
    module = importlib.import_module("test_last_layer")
    assert module.__file__ == str(last_layer / "test_last_layer.py")
    (mark,) = module.test_last_layer_keeps_the_law.pytestmark
    trials = mark.args[1]
    assert len(trials) > 10
    for trial in trials:
        module.test_last_layer_keeps_the_law(trial)


def test_the_page_s_method_is_found_by_its_name(last_layer: Path) -> None:
    kind = editors.get("last_layer")
    assert kind.__module__ == "last_layer"
    assert editors.METHODS[-1] == "last_layer"
    assert "The answer's first token, written into the last MLP" in run("methods")
    assert "last_layer" in run("bench", "--help")
    about = run("methods", "last_layer")
    assert "Its own fields." in about
    assert re.search(r"editor.strength +2.0 +Length of what is added at the prompt's end", about)
    with pytest.raises(ConfigError, match="did you mean 'last_layer'"):
        editors.get("last_layers")
    assert last_layer.is_dir()


@pytest.mark.usefixtures("last_layer")
def test_a_bench_runs_the_page_s_method_and_its_command_repeats_it(tmp_path: Path) -> None:
    quick = ["generation.tokens=0", "generation.fluency_tokens=0", "collapse.n_texts=2", "collapse.known_facts=4"]
    line = ["bench", "editor=last_layer", "editor.strength=4", "n_edits=4", f"out={tmp_path / 'runs'}", *quick]
    shown = run(*line)
    (folder,) = (tmp_path / "runs").glob("last_layer-*")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["editor"] == {"name": "last_layer", "seed": 0, "max_norm_ratio": 1e6, "strength": 4.0}
    reliability = results["summary"]["probability"]["reliability"]
    assert reliability["n"] == 4
    assert reliability["mean"] >= 0.75
    assert "errata bench editor=last_layer" in shown
    assert len(errata.load_results(tmp_path / "runs")) > 0
    written = (folder / "records.jsonl").stat().st_mtime_ns
    run(*line)
    assert (folder / "records.jsonl").stat().st_mtime_ns == written


@pytest.mark.usefixtures("last_layer")
def test_a_sweep_may_name_methods_of_both_kinds() -> None:
    assert overrides.translated(["editor=rome,last_layer"], "bench", sweep=True) == ["editor.name=rome,last_layer"]
    assert overrides.translated(["editor=rome,memit"], "bench", sweep=True) == ["editor=rome,memit"]
    with pytest.raises(ConfigError, match="unknown choice 'last_leyer'; did you mean 'last_layer'"):
        overrides.translated(["editor=last_leyer"], "bench")


BAD: dict[str, tuple[str, str, str]] = {
    "gone": ("no_such_module:X", "", "registered as 'no_such_module:X', cannot be imported: No module named"),
    "nameless": ("plain:Missing", "", "cannot be imported: module 'plain' has no attribute 'Missing'"),
    "odd": ("plain:Odd", "Odd = 3", "is not a subclass of Editor but 3"),
    "other": ("plain:Other", "from errata.editors import ROME\nclass Other(ROME): ...", "has the name 'rome'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_method_is_said_when_it_is_asked_for(installed: Path, name: str) -> None:
    value, code, said = BAD[name]
    (installed / "plain.py").write_text(code, encoding="utf-8")
    install(installed, "bad", {name: value})
    assert name in editors.METHODS
    with pytest.raises(ConfigError, match=re.escape(said)):
        editors.get(name)
    shown = run("methods")
    assert f"the method {name!r}" in shown
    assert "Rank-one model editing" in shown


def test_a_name_of_ours_cannot_be_taken(installed: Path) -> None:
    install(installed, "thief", {"rome": "no_such_module:X"})
    assert editors.get("rome") is editors.ROME
    assert editors.METHODS.count("rome") == 1


@pytest.mark.slow
def test_pip_installs_the_page_s_files(tmp_path: Path) -> None:
    import subprocess

    target = installed_package.install(FILES, tmp_path / "source", tmp_path / "target")
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from errata import editors; print(editors.get('last_layer'))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout
    assert found.strip() == "<class 'last_layer.LastLayer'>"
