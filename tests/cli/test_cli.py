"""The command line: values arrive as they were typed, errors take one line, and files stay where they belong."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from errata import editors, models
from errata.benchmarks.bench import prepare
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.compose import choices, compose
from errata.benchmarks.bench.config import BenchConfig, ModelConfig, editor_config
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.reports.terminal import show_table
from errata.benchmarks.runs.hydra_grammar import quoted
from errata.cli import edit, main, overrides
from errata.cli.commands import COMMANDS
from errata.editors.core.errors import ConfigError, ExportError
from errata.editors.core.loading import load_edit
from errata.editors.core.storage.edit_folder import Edits

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


def run(*arguments: str, code: int = 0) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    assert main.run(list(arguments), console, console) == code
    return out.getvalue()


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails, and return its one line of complaint."""
    monkeypatch.setattr(sys, "argv", ["errata", *arguments])
    assert main.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("errata: ")
    return lines[0]


# --- text arrives as it was typed ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab'\"\\${}=,:[]() #\n😀"), max_size=12))
def test_a_quoted_text_comes_through_hydras_grammar_unchanged(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

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
    from omegaconf import OmegaConf

    shown = run("bench", "-m", "editor=memit,rome", "n_edits=3,4", "model=world", "--cfg")
    assert "  name: memit\n" in shown
    assert OmegaConf.create(shown).n_edits == 3


def test_every_method_has_a_yaml_and_every_yaml_a_method() -> None:
    assert sorted(editors.METHODS) == choices("editor")
    for name in editors.METHODS:
        assert compose("bench", [f"editor={name}"])["editor"] == {"name": name}


@pytest.mark.parametrize("model", [name for name in choices("model") if name != "custom"])
@pytest.mark.parametrize("method", editors.METHODS)
def test_every_model_yaml_configures_every_method(model: str, method: str) -> None:
    values = compose("bench", [f"model={model}", f"editor={method}"])
    config = BenchConfig.of(values)
    assert editor_config(config.editor, config.model).to_dict()
    by_rule = (
        "grace",
        "ultraedit",
        "stableedit",
        "locft",
        "ice",
        "ike",
        "scr",
    )  # whose own rules know these models by their depths
    assert model == "world" or method in (*config.model.editors, *by_rule), "no settings named"


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["n_edits=3", "seed=4"],
        [
            "editor=r_rome",
            "dataset=world_first",
            "editor.layers=[1]",
            "editor.v_lr=0.25",
            "n_edits=2",
            "precision=float64",
        ],
        [
            "editor.context_templates=['{}','Well, then. {}']",
            "out=a b/c's",
            "collapse.n_texts=5",
            "generation.tokens=0",
        ],
        [
            "dataset=world_counterfact",
            "dataset.shuffle=true",
            "n_edits=2",
            "batch_size=3",
            "confidence=0.9",
            "device=cpu",
        ],
    ],
)
def test_the_printed_command_repeats_the_run(arguments: list[str]) -> None:
    def prepared(given: list[str]) -> Any:
        return prepare(BenchConfig.of(compose("bench", overrides.translated(given, "bench"))))

    first = prepared(arguments)
    words = shlex.split(command(first.config, first.editor))
    assert words[:2] == ["errata", "bench"]
    assert prepared(words[2:]).folder == first.folder


def test_the_printed_command_names_the_file_of_a_real_dataset(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps(world.records()[:5]))
    given = ["dataset=counterfact", f"dataset.path={tmp_path / 'records.json'}"]
    first = prepare(BenchConfig.of(compose("bench", overrides.translated(given, "bench"))))
    words = shlex.split(command(first.config, first.editor))
    assert set(given) <= set(words)
    assert prepare(BenchConfig.of(compose("bench", overrides.translated(words[2:], "bench")))).folder == first.folder


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "editors":
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


# For every field, a value that is not its default.
OTHER: dict[str, Any] = {
    "editor.name": "r_rome",
    "model.name": str(models.locate("world")),
    "model.revision": "some/branch-1.0",
    "model.trust_remote_code": True,
    "model.device_map": "auto",
    "model.editors": {"rome": {"v_lr": 0.3}},
    "dataset.name": "world_counterfact",
    "dataset.path": str(models.locate("world")),
    "dataset.chat": True,
    "dataset.target": "alt",
    "dataset.split": None,
    "dataset.ids": "IDS",
    "dataset.shuffle": False,
    "dataset.repeats": True,
    "dataset.known": "absent",
    "protocol.name": "sequential",
    "n_edits": 3,
    "batch_size": 3,
    "eval_every": 2,
    "seed": 4,
    "precision": "float64",
    "device": "cpu",
    "out": "a b/c's, ${x} ü",
    "time_limit": 90.5,
    "generation.tokens": 0,
    "generation.fluency_tokens": 7,
    "scoring.batch_tokens": 100,
    "collapse.text": "TEXT",
    "collapse.n_texts": 5,
    "collapse.perplexity_each": False,
    "collapse.known_facts": 0,
    "trackers": ["tensorboard"],
    "ability.tasks": ["world_facts"],
    "ability.path": "FOLDER",
    "ability.limit": 7,
    "ability.num_fewshot": 1,
    "ability.batch_size": 4,
    "guard.name": "perplexity",
    "guard.ratio": 3.5,
    "guard.facts": 0.25,
    "guard.action": "stop",
    "guard.n_texts": 4,
    "confidence": 0.875,
}
# The same for a method's fields; "editor.layers" goes back to the method's default, which is not the testbed's.
OTHER_EDITOR: dict[str, Any] = {
    "seed": 9,
    "max_norm_ratio": 1e-7,
    "layers": None,
    "fact_token": "last",
    "v_num_grad_steps": 3,
    "v_lr": 1e-5,
    "v_loss_layer": 1,
    "v_weight_decay": 0.0,
    "clamp_norm_factor": 1.5,
    "kl_factor": 0.0,
    "stop_loss": 0.0,
    "context_templates": ["{}", "Well, 'so' \\ {}"],
    "context_template_length_params": [[3, 2]],
    "mom2_adjustment": False,
    "mom2_dataset": "name:config:train",
    "mom2_n_samples": 10,
    "mom2_file": "TEXT",
    "mom2_dtype": "float32",
    "batch_tokens": 64,
}
# The same for methods with fields of their own.
OTHER_METHODS: dict[str, dict[str, Any]] = {
    "grace": {
        "seed": 9,
        "max_norm_ratio": 1e-7,
        "layers": [2],
        "module": "down",
        "key_token": "first_label",
        "replacement": "replace_prompt",
        "eps": 0.1,
        "eps_expand": "moving_average",
        "val_init": "warm",
        "n_iter": 3,
        "edit_lr": 1e-5,
        "batch_tokens": 64,
    },
}


def test_every_field_has_another_value_in_the_tests_below() -> None:
    values = dataclasses.asdict(BenchConfig.of(compose("bench", [])))
    assert set(flat(values)) == set(OTHER)
    assert set(editors.get("rome").Config().to_dict()) == set(OTHER_EDITOR)
    for method, fields in OTHER_METHODS.items():
        assert set(editors.get(method).Config().to_dict()) == set(fields)


@pytest.fixture(scope="module")
def remembered() -> tuple[Any, Any]:
    return functools.cache(datasets.load), functools.cache(models.fingerprint)


@pytest.fixture
def read_once(remembered: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read datasets and the files of models once for many preparations."""
    monkeypatch.setattr(datasets, "load", remembered[0])
    monkeypatch.setattr(models, "fingerprint", remembered[1])


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize(
    ("name", "dataset"),
    [(name, "world") for name in [*OTHER, *(f"editor.{name}" for name in OTHER_EDITOR)]]
    + [(name, "world_counterfact") for name in OTHER if name.startswith("dataset.")],
)
def test_the_printed_command_repeats_every_field(name: str, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([case.id for case in datasets.load(dataset, split="test").cases]))
    (tmp_path / "text.txt").write_text("One text.\nAnother text.")
    value = OTHER.get(name, OTHER_EDITOR.get(name.removeprefix("editor.")))
    there = {"IDS": str(tmp_path / "ids.json"), "TEXT": str(tmp_path / "text.txt"), "FOLDER": str(tmp_path)}
    value = there.get(str(value), value)
    values = compose("bench", [f"dataset={dataset}"])
    if name == "ability.tasks":  # which are of sequences
        values["protocol"]["name"] = "sequential"
    if name == "dataset.shuffle":
        value = not values["dataset"]["shuffle"]
    if name == "dataset.target":  # which zsRE has alone
        record = dict.fromkeys(("subject", "src", "rephrase", "alt", "loc", "loc_ans"), "Varland") | {"answers": ["a"]}
        (tmp_path / "zsre.json").write_text(json.dumps([record]))
        values["dataset"] |= {"name": "zsre", "path": str(tmp_path / "zsre.json"), "split": None}
    if name == "dataset.split" and dataset == "world_counterfact":
        value = "dev"
    *groups, last = name.split(".")
    (values[groups[0]] if groups else values)[last] = value
    first = prepare(BenchConfig.of(values))
    words = shlex.split(command(first.config, first.editor))
    again = prepare(BenchConfig.of(compose("bench", overrides.translated(words[2:], "bench"))))
    assert again.folder == first.folder
    is_same = name in ("out", "time_limit", "trackers") or (name == "dataset.name" and value == dataset)
    assert (first.folder.key == prepare(BenchConfig.of(compose("bench", [f"dataset={dataset}"]))).folder.key) is is_same


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, found in OTHER_METHODS.items() for field in found]
)
def test_the_printed_command_repeats_every_field_of_other_methods(method: str, field: str) -> None:
    values = compose("bench", [f"editor={method}"])
    before = prepare(BenchConfig.of(values)).folder.key
    values["editor"][field] = OTHER_METHODS[method][field]
    first = prepare(BenchConfig.of(values))
    words = shlex.split(command(first.config, first.editor))
    again = prepare(BenchConfig.of(compose("bench", overrides.translated(words[2:], "bench"))))
    assert again.folder == first.folder
    assert first.folder.key != before


def test_an_id_that_is_spelt_like_a_yaml_is_not_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models.locate("world"), tmp_path / "gpt2-xl")
    monkeypatch.chdir(tmp_path)
    first = prepare(BenchConfig.of({**compose("bench", []), "model": {"name": "gpt2-xl"}}))
    words = shlex.split(command(first.config, first.editor))
    again = prepare(BenchConfig.of(compose("bench", overrides.translated(words[2:], "bench"))))
    assert again.folder == first.folder


# --- safety -------------------------------------------------------------------------------------------------------


class _Bomb:
    """Pickles to a call that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb is a dud: the test would prove nothing"
    marker.unlink()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ConfigError, match="safetensors"):
        models.load(folder)
    assert not marker.exists()


def test_code_that_comes_with_a_model_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        models.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["", "./nothing", "../x", "/x/y", "a/b/c", "a\x00b", "file:///x", Path("gone")])
def test_a_name_that_can_only_be_a_folder_is_not_asked_for_on_the_network(name: str | Path) -> None:
    with pytest.raises(ConfigError, match="no model at"):
        models.load(name)


@pytest.fixture
def folder_of_world(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(models.locate("world"), tmp_path / "copy"))


def test_one_changed_byte_in_the_middle_of_the_weights_changes_the_fingerprint(folder_of_world: Path) -> None:
    weights = folder_of_world / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(20 * 2**20)
    before = models.fingerprint(folder_of_world)
    with weights.open("r+b") as file:
        file.seek(10 * 2**20)
        file.write(b"\x01")
    assert models.fingerprint(folder_of_world) != before


@pytest.mark.parametrize(("damage", "said"), [("cut", "damaged"), ("shape", "shapes")])
def test_damaged_or_foreign_weights_are_reported_in_one_line(
    damage: str, said: str, folder_of_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "cut":
        with (folder_of_world / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
    else:
        path = folder_of_world / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_inner": 96}))
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster"]
    assert said in complaint(monkeypatch, capsys, "edit", f"model={folder_of_world}", *texts)


# --- one edit -----------------------------------------------------------------------------------------------------


def test_edit_shows_before_and_after_and_writes_factors_that_give_the_same_edit(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    texts = [f"prompt={request.prompt}", f"subject={request.subject}", f"target={request.target}"]
    shown = run("edit", *texts, f"out={tmp_path / 'edits'}")
    assert "before" in shown
    assert "after" in shown
    (folder,) = (tmp_path / "edits").iterdir()
    (entry,) = Edits.read(folder).entries
    assert entry.info.requests[0].target == request.target
    (scores,) = Edits.read(folder).notes[entry.id]["scores"].values()
    assert scores["after"] > 0.5 > scores["before"]

    model, tokenizer = models.load("world")
    config = editors.get("rome").Config.from_dict(entry.info.config)
    edit = editors.get("rome")(model, tokenizer, config).apply(entry.info.requests[0])
    assert edit.id == entry.id
    edited = {name: model.get_parameter(name).clone() for name in entry.patch.updates}
    edit.undo()
    assert load_edit(folder, model, tokenizer).id == edit.id
    assert all((model.get_parameter(name) == edited[name]).all() for name in edited)


def test_the_same_edit_made_again_replaces_its_folder(tmp_path: Path) -> None:
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"out={tmp_path}"]
    quick = ["editor.v_num_grad_steps=3", "generation.tokens=2"]
    for _ in range(2):
        run("edit", *texts, *quick, code=3)
    (folder,) = tmp_path.iterdir()
    assert len(Edits.read(folder)) == 1


def test_edit_writes_an_adapter_of_the_edit_where_its_folder_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"lora={tmp_path / 'adapter'}"]
    quick = ["editor.v_num_grad_steps=3", "generation.tokens=2"]
    assert "as an adapter of rank 1" in run("edit", *texts, *quick, f"out={tmp_path / 'edits'}", code=3)
    (folder,) = (tmp_path / "edits").iterdir()
    ((name, update),) = Edits.read(folder).entries[0].patch.updates.items()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(update.tensors) == 2
    for matrix, tensor in zip("BA", update.tensors, strict=True):
        module = name.removesuffix(".weight")
        assert torch.equal(adapter[f"base_model.model.{module}.lora_{matrix}.weight"], tensor)
    said = complaint(monkeypatch, capsys, "edit", *texts, *quick, f"out={tmp_path / 'others'}")
    assert "is there already" in said
    assert not (tmp_path / "others").exists()


def _shown(tmp_path: Path, *fields: str, code: int = 0) -> str:
    case = world.cases(split="test")[0].request
    texts = [f"prompt={case.prompt}", f"subject={case.subject}", f"target={case.target}"]
    return run("edit", *texts, f"out={tmp_path}", *fields, code=code)


def test_an_edit_that_did_not_take_is_reported_as_failed(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    failed = _shown(tmp_path, "editor=ft_l", "editor.num_steps=1", "editor.lr=1e-9", code=3)
    assert f"The edit did not take: {request.target!r} is not what the model says after it, but " in failed
    assert "written to" in failed
    taken = _shown(tmp_path, "editor=ft_m")
    assert "did not take" not in taken
    assert "before the edit, too" not in taken


def test_an_edit_that_no_adapter_can_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"lora={tmp_path / 'adapter'}"]
    with pytest.raises(ExportError):
        run("edit", *texts, "editor=grace", "editor.n_iter=2", "generation.tokens=2", f"out={tmp_path / 'edits'}")
    assert list(tmp_path.iterdir()) == []


def test_more_answers_than_the_model_has_tokens_are_all_of_them(tmp_path: Path) -> None:
    _shown(tmp_path, "top=1000000", "editor=ft_m", "generation.tokens=2")


def test_an_edit_in_chat_or_without_a_blank_is_asked_in_that_form(
    tmp_path: Path, folder_of_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["prompt=Which city is the capital of Gavaria?", "target=Praminster", f"out={tmp_path / 'edits'}"]
    quick = ["editor=ft_m", "generation.tokens=4"]
    said = complaint(monkeypatch, capsys, "edit", *texts, "chat=true", *quick)
    assert "the tokenizer has no chat template" in said
    assert "subject is missing" in complaint(monkeypatch, capsys, "edit", *texts)
    assert "chat: expected true or false" in complaint(monkeypatch, capsys, "edit", *texts, "chat=2", *quick)
    (folder_of_world / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    run("edit", *texts, f"model={folder_of_world}", "chat=true", *quick)
    run("edit", "prompt=x_", "target=Praminster", "join=", f"out={tmp_path / 'edits'}", *quick, "editor.num_steps=60")
    forms = {Edits.read(folder).entries[0].info.requests[0] for folder in (tmp_path / "edits").iterdir()}
    assert {(request.chat, request.join) for request in forms} == {(True, None), (False, "")}


def test_an_edit_to_what_the_model_says_already_is_reported(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    assert request.target_true is not None
    texts = [f"prompt={request.prompt}", f"subject={request.subject}", f"target={request.target_true}"]
    shown = run("edit", *texts, f"out={tmp_path}", "editor=ft_m")
    assert f"The model said {request.target_true!r} before the edit, too." in shown


def test_a_narrow_terminal_cuts_no_number_of_a_table() -> None:
    table = Table("method", "reliability", "interval")
    table.add_row("a method with a long name", "100.0", "72.5 to 100.0")
    out = io.StringIO()
    show_table(Console(file=out, width=20), table)
    assert "72.5 to 100.0" in out.getvalue()
    assert "…" not in out.getvalue()
