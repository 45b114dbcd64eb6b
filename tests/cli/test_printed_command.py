"""The command that a run prints repeats that run, whatever fields it was given."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from errata import editors, models
from errata.benchmarks.bench import prepare
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.cli import overrides


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
            "protocol=compose",
            "compose.compress.name=gptq",
            "compose.compress.group=null",
            "compose.compress.text='a b, c'",
            "n_edits=2",
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
    "model.settings": "FOLDER",
    "dataset.name": "world_counterfact",
    "dataset.path": str(models.locate("world")),
    "dataset.chat": True,
    "dataset.target": "alt",
    "dataset.split": None,
    "dataset.ids": "IDS",
    "dataset.order": "ids",
    "dataset.shuffle": False,
    "dataset.repeats": True,
    "dataset.known": "absent",
    "dataset.probes": 2,
    "dataset.references": "world",
    "protocol.name": "sequential",
    "n_edits": 3,
    "batch_size": 3,
    "eval_every": 2,
    "eval_at": [1, 3],
    "eval_sample": 2,
    "seed": 4,
    "precision": "float64",
    "device": "cpu",
    "out": "a b/c's, ${x} ü",
    "time_limit": 90.5,
    "generation.tokens": 0,
    "generation.fluency_tokens": 7,
    "generation.fluency": "papers",
    "generation.overlap": True,
    "wild.tokens": 9,
    "wild.stop": [".", "\n", ";"],
    "wild.instruction": "Q: {} 'so'",
    "wild.judge": "model",
    "wild.judge_model": "world",
    "wild.trust_judge_code": True,
    "scoring.batch_tokens": 100,
    "collapse.text": "TEXT",
    "collapse.n_texts": 5,
    "collapse.tokens": 100,
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
    "dial.strengths": [0.0, 0.5],
    "league.caps": [0.01],
    "league.steps": 7,
    "league.margin": 1.5,
    "league.tokens": 99,
    "compose.order": "compress-edit",
    "compose.end": "keep",
    "priming.n_prompts": 3,
    "confidence": 0.875,
}
# The same for a method's fields; "editor.layers" goes back to the method's default, which is not the testbed's.
OTHER_EDITOR: dict[str, Any] = {
    "seed": 9,
    "max_norm_ratio": 1e-7,
    "sparsify": "ignore_top:0.5",
    "as_published": True,
    "weak_key": "refuse",
    "layers": None,
    "fact_token": "last",
    "v_num_grad_steps": 3,
    "v_lr": 1e-5,
    "v_relative": True,
    "v_loss_layer": 1,
    "v_weight_decay": 0.0,
    "clamp_norm_factor": 1.5,
    "kl_factor": 0.0,
    "stop_loss": 0.0,
    "stop_when_top": 2,
    "stop_rule": "published",
    "rect": 0.4,
    "sphere": 0.5,
    "sphere_energy": 0.25,
    "prune": "log",
    "nas": 20.0,
    "nas_facts": "TEXT",
    "nas_beyond": "scale",
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
        "as_published": True,
        "eps": 0.1,
        "eps_share": 0.5,
        "value_at": "module",
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
    assert {field.name for field in dataclasses.fields(editors.get("rome").Config)} == set(OTHER_EDITOR)
    for method, fields in OTHER_METHODS.items():
        assert not editors.get(method).writes_weights  # so that `sparsify` has only one value
        assert {field.name for field in dataclasses.fields(editors.get(method).Config)} == {*fields, "sparsify"}


@pytest.fixture(scope="module")
def remembered() -> tuple[Any, Any]:
    return functools.cache(datasets.load), functools.cache(models.fingerprint)


@pytest.fixture
def read_once(remembered: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read datasets and the files of models once for many preparations."""
    monkeypatch.setattr(datasets, "load", remembered[0])
    monkeypatch.setattr(models, "fingerprint", remembered[1])


def defaults(dataset: str) -> dict[str, Any]:
    """A run by default, of two edits: all cases would take half of the time of these tests."""
    return compose("bench", [f"dataset={dataset}"]) | {"n_edits": 2}


@functools.cache
def key_of_defaults(dataset: str) -> str:
    return prepare(BenchConfig.of(defaults(dataset))).folder.key


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize(
    ("name", "dataset"),
    [(name, "world") for name in [*OTHER, *(f"editor.{name}" for name in OTHER_EDITOR)]]
    + [(name, "world_counterfact") for name in OTHER if name.startswith("dataset.")],
)
def test_the_printed_command_repeats_every_field(name: str, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([case.id for case in datasets.load(dataset, split="test").cases]))
    (tmp_path / "text.txt").write_text("One text.\nAnother text.")
    (tmp_path / "errata.json").write_text('{"editors": {"rome": {"v_lr": 0.3}}}')
    value = OTHER.get(name, OTHER_EDITOR.get(name.removeprefix("editor.")))
    there = {"IDS": str(tmp_path / "ids.json"), "TEXT": str(tmp_path / "text.txt"), "FOLDER": str(tmp_path)}
    value = there.get(str(value), value)
    values = defaults(dataset)
    if name == "ability.tasks":  # which are of sequences
        values["protocol"]["name"] = "sequential"
    if name == "dataset.order":  # which is that of the ids
        values["dataset"] |= {"ids": there["IDS"], "shuffle": False}
    if name == "dataset.shuffle":
        value = not values["dataset"]["shuffle"]
    if name == "dataset.target":  # which zsRE has alone
        record = dict.fromkeys(("subject", "src", "rephrase", "alt", "loc", "loc_ans"), "Varland") | {"answers": ["a"]}
        (tmp_path / "zsre.json").write_text(json.dumps([record, record | {"subject": "Quelm", "src": "Quelm"}]))
        values["dataset"] |= {"name": "zsre", "path": str(tmp_path / "zsre.json"), "split": None}
    if name in ("wild.judge", "wild.judge_model"):  # which need each other, and answers
        values["wild"] |= {"tokens": 9, "judge": "model", "judge_model": "world"}
    if name == "dataset.split" and dataset == "world_counterfact":
        value = "dev"
    *groups, last = name.split(".")
    (values[groups[0]] if groups else values)[last] = value
    first = prepare(BenchConfig.of(values))
    words = shlex.split(command(first.config, first.editor))
    again = prepare(BenchConfig.of(compose("bench", overrides.translated(words[2:], "bench"))))
    assert again.folder == first.folder
    is_same = name in ("out", "time_limit", "trackers") or (name == "dataset.name" and value == dataset)
    assert (first.folder.key == key_of_defaults(dataset)) is is_same


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, found in OTHER_METHODS.items() for field in found]
)
def test_the_printed_command_repeats_every_field_of_other_methods(method: str, field: str) -> None:
    values = defaults("world") | {"editor": {"name": method}}
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
