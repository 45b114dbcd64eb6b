"""The README is run: its Python, its command lines, its make targets; and its files exist."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

import errata
from errata import editors
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.job_plan import expand
from errata.cli import main, overrides

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if not language for line in code.splitlines() if line]
ERRATA = [line for line in COMMANDS if line.startswith("errata ")]
RESULTS = (ROOT / "docs" / "results-on-the-testbed.md").read_text(encoding="utf-8")
REAL = (ROOT / "docs" / "results-on-a-real-model.md").read_text(encoding="utf-8")
(SWEEP,) = [line for line in RESULTS.splitlines() if line.startswith("errata bench") and "mend,ft_l" in line]
# A command that speaks of the reader's own files is read, not run.
PLACEHOLDERS = ("FOLDER_OR_ID", "counterfact.json")
QUICK = ["editor.v_num_grad_steps=3", "generation.tokens=2", "generation.fluency_tokens=0", "collapse.known_facts=5"]
QUICK += ["collapse.n_texts=2", "dataset.probes=1"]
SAID = {"bench": "Reliability", "edit": "written to", "report": "index.html"}


def test_the_readme_has_what_these_tests_run() -> None:
    assert len(PYTHON) == 1
    assert len(ERRATA) >= 4
    assert "make demo" in README.split("![")[0]
    assert PYTHON[0].count("\n") <= 12


def test_the_readme_is_one_page_with_one_figure() -> None:
    prose = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(re.sub(r"\]\([^)]*\)", "", prose).split()) < 550
    assert README.count("![") == 1


def test_the_table_of_the_readme_is_part_of_the_long_one() -> None:
    rows = [line.rstrip("| ") for line in README.splitlines() if " · " in line and line.startswith("| ")]
    assert len(rows) >= 5
    long = RESULTS.splitlines()
    real = [line.rstrip("| ") for line in REAL.splitlines()]
    shown = [row for row in rows if row.count("|") == 3]
    assert len(shown) >= 5
    assert all(any(line.startswith(row + " |") for line in long) for row in rows if row not in shown)
    # The row of `ice` says in words what the method is.
    assert all(
        any(line.startswith("| " + row.split(" | ", 1)[1], line.find(" | ") + 1) for line in real) for row in shown
    )


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_block_runs_and_leaves_the_model_as_it_was(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    request = names["request"]
    assert isinstance(request, errata.EditRequest)
    assert f"{request.text} {request.target}" in capsys.readouterr().out
    untouched, _ = errata.load("world")
    edited = names["model"]
    assert isinstance(edited, torch.nn.Module)
    state = untouched.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in edited.state_dict().items())


def test_inputs_of_the_python_block_go_where_the_model_is() -> None:
    assert PYTHON[0].count("return_tensors=") == PYTHON[0].count(".to(model.device)") == 1


def last_values(argument: str, most: int) -> str:
    """An override of a sweep with the last of its values, this many at most."""
    name, equals, values = argument.partition("=")
    return name + equals + ",".join(values.split(",")[-most:])


@pytest.mark.parametrize("line", ERRATA)
def test_the_command_line_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)[1:]
    if any(name in line for name in PLACEHOLDERS):
        compose("bench", overrides.translated(arguments[1:], "bench"))
        return
    if arguments[0] == "report":
        quick = ["bench", "n_edits=1", *QUICK]
        assert main.run(quick, Console(file=io.StringIO()), Console(file=io.StringIO())) == 0
    if "-m" in arguments:  # six runs: that all are understood is checked, and two are carried out
        assert len(expand(overrides.translated(arguments[2:], "bench", sweep=True))) == 6
        arguments = [last_values(argument, 2 if argument.startswith("editor=") else 1) for argument in arguments]
    if arguments[0] == "bench":
        arguments = [re.sub(r"n_edits=\d+", "n_edits=1", argument) for argument in arguments] + QUICK
    out = io.StringIO()
    console = Console(file=out, width=160)
    assert main.run(arguments, console, console) == 0
    assert SAID[arguments[0]] in out.getvalue()


@pytest.mark.slow
def test_the_methods_of_the_table_run_in_one_sweep_and_the_page_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    console = Console(file=io.StringIO(), width=160)
    short = ["steps=2", "held_out=3", "n_cases=12", "editor.accumulate_bs=2"]
    assert main.run(["train", "editor=mend", "model=world", *short], console, console) == 0
    arguments = [re.sub(r"n_edits=\d+", "n_edits=1", argument) for argument in shlex.split(SWEEP)[1:]]
    asked = ["generation.tokens=2", "generation.fluency_tokens=0", "collapse.known_facts=5", "collapse.n_texts=4"]
    assert main.run([*arguments, *asked, "out=all"], console, console) == 0
    runs = errata.load_results(tmp_path / "all")
    (chosen,) = (word.removeprefix("editor=").split(",") for word in arguments if word.startswith("editor="))
    assert len(runs) == 3 * len(chosen)
    assert set(runs["editor"]) == set(chosen)
    (left_out,) = re.findall(r"^The table leaves out (.*?), which ", RESULTS, flags=re.MULTILINE | re.DOTALL)
    every = max((words.split(",") for words in re.findall(r"editor=([\w,]+)", RESULTS)), key=len)
    assert {*chosen, *every, *re.findall(r"`(\w+)`", left_out)} == set(editors.METHODS)


def test_make_targets_that_the_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)", texts, flags=re.MULTILINE))
    assert {"demo", "test", "promises"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_extras_are_installed_from_the_checkout_wherever_it_is_said_how() -> None:
    """As the package itself, which no index has."""
    folders = ("docs", "hparams", "editors", "evaluate", "benchmarks", "src/errata")
    found = [ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    files = [path for path in found if path.suffix in (".md", ".py", ".yaml")]
    said = [match for path in files for match in re.findall(r"pip install .*\[.*", path.read_text(encoding="utf-8"))]
    assert len(said) > 5
    assert [line for line in said if not re.search(r"-e '\.\[[a-z-]+\]'", line)] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())  # type: ignore[index]
    assert set(re.findall(r"^# make ([a-z-]+)  ", makefile, flags=re.MULTILINE)) == targets - {"help"}


def test_protocols_are_registered_where_contributing_says() -> None:
    from errata.benchmarks.bench import protocols
    from errata.benchmarks.bench.compose import choices

    assert "a line in protocols.py and hparams/protocol/" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sorted(protocols.PROTOCOLS) == choices("protocol")


def test_files_that_the_readme_links_exist_and_the_picture_is_small() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
    pictures = [ROOT / link for link in links if link.endswith(".png")]
    assert pictures
    assert all(picture.stat().st_size < 200_000 for picture in pictures)
