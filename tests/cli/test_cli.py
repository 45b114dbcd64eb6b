"""The command line: values arrive as they were typed, errors take one line, and help shows every name."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from typed_commands import complaint, run

from errata import editors
from errata.benchmarks.bench.compose import HPARAMS, choices, compose
from errata.benchmarks.bench.config import BenchConfig, ModelConfig, editor_config
from errata.benchmarks.reports.terminal import show_table
from errata.benchmarks.runs.hydra_grammar import quoted
from errata.cli import edit, main, overrides
from errata.cli.commands import COMMANDS
from errata.editors.core.errors import ConfigError

NASTY = [
    "The capital of {} is",
    "a,b, c",
    "a=b",
    "it's",
    'say "x"',
    "back\\slash\\",
    "\\'",
    "${oc.env:HOME}",
    "\\${x}",
    "{a: b}",
    "[1, 2]",
    "null",
    "true",
    "12",
    " spaces ",
    "ü 😀 \u202e",
    "line\nbreak",
    "'",
    "# no comment",
]


# --- text arrives as it was typed ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab'\"\\${}=,:[]() #\n😀"), max_size=12))
def test_a_quoted_text_comes_through_hydras_grammar_unchanged(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"out={quoted(text)}")
    assert OmegaConf.create({"out": override.value()}).out == text


@pytest.mark.parametrize("text", NASTY)
def test_a_path_reaches_the_configuration_as_it_was_typed(text: str) -> None:
    values = compose("bench", overrides.translated([f"out={text}", f"dataset.path={text}"], "bench"))
    assert values["out"] == text or text == "null"
    assert values["dataset"]["path"] == (None if text == "null" else text)


@pytest.mark.parametrize("text", NASTY)
def test_a_prompt_reaches_the_edit_as_it_was_typed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(values: Any, texts: Any, *, progress: Any) -> None:  # noqa: ARG001
        seen.update(texts)
        raise ConfigError("stop here")

    monkeypatch.setattr(edit, "make_edit", stop)
    with pytest.raises(ConfigError, match="stop here"):
        run("edit", f"prompt={text}", f"subject={text}", f"target={text}", "top=3")
    assert seen == {"prompt": text, "subject": text, "target": text}


# --- bad input ----------------------------------------------------------------------------------------------------

WRONG = {
    "bnech": "did you mean 'bench'",
    "methods rme": "did you mean 'rome'",
    "methods rome memit": "expected the name of one method",
    "bench n_edit=3": "did you mean 'n_edits'",
    "bench n_edits": "expected name=value, got 'n_edits'",
    "bench --verbose": "unknown option '--verbose'",
    "bench editor=rme": "did you mean 'rome'",
    "bench dataset=facts.json": "dataset.path=",
    "bench dataset=easyedit": "dataset.path is missing",
    "bench protocol=singel": "did you mean 'single'",
    "bench protocol.name=singel": "unknown protocol 'singel'; did you mean 'single'",
    "bench n_edits=many": "n_edits: expected int, got 'many'",
    "bench n_edits=0": "n_edits: expected at least 1, got 0",
    "bench batch_size=0": "batch_size",
    "bench guard=perplexty": "did you mean 'perplexity'",
    "bench guard.ratio=0.5": "guard.ratio: expected at least 1, got 0.5",
    "bench time_limit=-1": "time_limit: expected at least 0, got -1",
    "bench confidence=2": "confidence",
    "bench seed=1.5": "seed",
    "bench precision=flaot32": "did you mean 'float32'",
    "bench editor.v_lrr=1": "did you mean 'v_lr'",
    "bench editor.v_lr=fast": "v_lr",
    "bench editor.layers=[99]": "layers",
    "bench n_edits=[": "n_edits",
    "bench model=./absent": "no model at './absent'",
    "bench model=~no-such-user/m": "no model at '~no-such-user/m'",
    "bench model=tests": "tests",
    "bench dataset=counterfact dataset.path=absent.json": "absent.json",
    "bench n_edits=100000": "only",
    "bench guard=perplexity guard.facts=50": "guard.facts: expected a share from 0 to 1, got 50",
    "bench -m model=world,./absent": "not over both",
    "bench -m n_edits=1,2 out=facts.jsonl": "the folder facts.jsonl/sweeps/",
    "edit prompt={} subject=a target=b top=many": "top: expected int, got 'many'",
    "edit prompt={} subject=a target=b top=0": "top: expected at least 1, got 0",
    "edit prompt={} subject=a target=b generation.tokens=0": "generation.tokens: expected at least 1, got 0",
    "apply facts.jsonl batch_size=two": "batch_size: expected int, got 'two'",
    "apply facts.jsonl batch_size=0": "batch_size: expected at least 1, got 0",
    "apply facts.jsonl out=facts.jsonl/x": "cannot be made",
    "export edits lora=both merged=./both": "lora and merged are both both",
    "export edits merged=model rank=2": "rank= is for lora=",
    "export edits merged=model private=true": "private= is for hub=",
    "export edits hub=me/mine device=cpu": "device= is for lora= and merged=",
    "convert dataset facts.jsonl dataset.path=x out=y": "are two files",
    "convert dataset n_edits=0 out=y": "n_edits: expected at least 1, got 0",
    "convert dataset dataset=world_first dataset.split=tset out=y": "did you mean 'test'",
    "convert dataset dataset=world_again dataset.split=tset out=y": "did you mean 'test'",
    "edit subject=a target=b": "prompt is missing",
    "edit prompt=a promt=b": "did you mean 'prompt'",
    "edit prompt=a subject=b target=c": "prompt",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_no_file(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    fact = {"prompt": "{} is", "subject": "a", "target": "b"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    assert WRONG[arguments] in complaint(monkeypatch, capsys, *shlex.split(arguments))
    # A run that began before it failed leaves a note for `errata status`.
    notes = (".lock", "run.json", "failed.json", "traceback.txt", "facts.jsonl", ".facts.edits.lock")
    left = [path for path in tmp_path.rglob("*") if path.name not in notes and path.is_file()]
    assert left == []


@pytest.mark.parametrize(("command", "resumes"), [("bench", True), ("edit", False)])
def test_ctrl_c_ends_with_130_and_only_for_a_bench_it_says_that_the_command_continues(
    command: str, resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["errata", command])
    assert main.main() == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("the same command continues" in said) is resumes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_closed_disk_is_reported_in_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number), "runs/x/records.jsonl")

    monkeypatch.setattr(main, "run", full)
    said = complaint(monkeypatch, capsys, "bench")
    assert os.strerror(number) in said
    assert "records.jsonl" in said


@pytest.mark.parametrize("defect", [RuntimeError("a defect"), FileNotFoundError(errno.ENOENT, "a defect")])
def test_a_defect_of_ours_is_not_hidden(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise defect

    monkeypatch.setattr(main, "run", broken)
    with pytest.raises(type(defect), match="a defect"):
        main.main()


# --- configuration ------------------------------------------------------------------------------------------------


def test_help_and_methods_name_every_method() -> None:
    assert all(name in run("methods") for name in editors.METHODS)
    assert all(f"editor=  {', '.join(sorted(editors.METHODS))}" in run(name, "--help") for name in ("bench", "edit"))
    assert "errata bench" in run("--help")
    assert run("--version").startswith("errata ")


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_answers_help_with_its_own_usage(name: str) -> None:
    said = run(name, "--help")
    assert f"errata {name}" in said
    assert "errata --version" not in said  # the last line of the overview


def test_the_help_of_edit_names_the_texts_that_it_takes() -> None:
    assert all(f"{text}=" in run("edit", "--help") for text in edit.TEXT_NAMES)


@pytest.mark.parametrize("method", editors.METHODS)
def test_every_field_of_a_method_is_shown_with_its_default_and_its_meaning(method: str) -> None:
    from errata.editors.core.config_docs import documented

    kind = editors.get(method)
    fields, shown = documented(kind.Config), run("methods", method)
    assert {field.name: field.default for field in fields} == vars(kind.Config())
    for field in fields:
        assert field.meaning, f"{kind.Config.__name__}.{field.name} has no text below it"
        assert f"editor.{field.name} " in shown
        assert " ".join(field.meaning.split()[:6]) in " ".join(shown.split())


def test_the_configuration_of_a_sweep_is_that_of_its_first_run() -> None:
    shown = run("bench", "-m", "editor=memit,rome", "n_edits=3,4", "model=world", "--cfg")
    assert "  name: memit\n" in shown
    assert OmegaConf.create(shown).n_edits == 3


MODELS = [name for name in choices("model") if name != "custom"]


def test_every_method_has_a_yaml_and_every_yaml_a_method() -> None:
    assert sorted(editors.METHODS) == choices("editor")
    for name in editors.METHODS:
        written = OmegaConf.load(str(files(HPARAMS) / "editor" / f"{name}.yaml"))
        assert written == {"name": name}  # so that this is what is composed, as the next test sees


@pytest.mark.parametrize("place", range(max(len(MODELS), len(editors.METHODS))))
def test_a_model_and_a_method_are_composed_as_each_is_alone(place: int) -> None:
    """Every model and every method once; the test below takes this of the other pairs."""
    model, method = MODELS[place % len(MODELS)], list(editors.METHODS)[place % len(editors.METHODS)]
    values = compose("bench", [f"model={model}", f"editor={method}"])
    assert values == compose("bench", [f"model={model}"]) | {"editor": {"name": method}}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", editors.METHODS)
def test_every_model_yaml_configures_every_method(model: str, method: str) -> None:
    config = BenchConfig.of(compose("bench", [f"model={model}"]) | {"editor": {"name": method}})
    assert editor_config(config.editor, config.model).to_dict()
    # The presets of the papers' models name every method but those whose own rules know these models by their depths.
    # In the others each value has its origin beside it, and what no authors' file says follows our rules.
    by_depth = (
        "grace",
        "ultraedit",
        "stableedit",
        "locft",
        "ice",
        "ike",
        "scr",
        "wise",
        "memoir",
        "crispedit",
        "coar",
        "mint",
        "malmen",
        "rledit",
    )
    if model in ("gpt2-xl", "gpt-j", "llama-3-8b"):
        assert method in (*config.model.editors, *by_depth), "no settings named"


def test_a_model_that_no_yaml_names_is_taken_as_folder_or_id() -> None:
    lines = overrides.translated(["model=some/folder, with comma"], "bench")
    assert compose("bench", lines)["model"]["name"] == "some/folder, with comma"
    lines = overrides.translated(["model=org/a,org/b"], "bench", sweep=True)
    assert lines == ["model=custom", "model.name='org/a','org/b'"]


def test_a_field_comes_from_the_method_the_folder_the_yaml_and_the_command_line_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    notes = {"editors": {"rome": {"v_lr": 0.2, "kl_factor": 0.2, "v_weight_decay": 0.2}}}
    (tmp_path / "errata.json").write_text(json.dumps(notes))
    model = ModelConfig(str(tmp_path), editors={"rome": {"kl_factor": 0.3, "v_weight_decay": 0.3}})
    config = editor_config({"name": "rome", "v_weight_decay": 0.4}, model).to_dict()
    default = editors.get("rome").Config().to_dict()
    assert config["clamp_norm_factor"] == default["clamp_norm_factor"]
    assert [config[name] for name in ("v_lr", "kl_factor", "v_weight_decay")] == [0.2, 0.3, 0.4]


def test_a_narrow_terminal_cuts_no_number_of_a_table() -> None:
    table = Table("method", "reliability", "interval")
    table.add_row("a method with a long name", "100.0", "72.5 to 100.0")
    out = io.StringIO()
    show_table(Console(file=out, width=20), table)
    assert "72.5 to 100.0" in out.getvalue()
    assert "…" not in out.getvalue()
