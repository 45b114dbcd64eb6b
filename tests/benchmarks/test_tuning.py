"""`errata tune` and `editor.layers=auto`: from traces to layers, and from a few facts to settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typed_commands import run

from errata import models
from errata.benchmarks.bench import auto_layers
from errata.benchmarks.bench.config import BenchConfig, ModelConfig, editor_config
from errata.benchmarks.bench.preparation import prepare
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.reports import panels
from errata.benchmarks.tracing import traced_layers as tracing
from errata.benchmarks.tracing.traced_layers import TracedLayers
from errata.benchmarks.tuning import pictures, tune
from errata.benchmarks.tuning.candidates import fields_to_search, layer_candidates, value_candidates
from errata.benchmarks.tuning.setting_scores import fact_values, gain_of, score_of
from errata.cli.tune import _summary
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.model.model_settings import read_model_settings

EFFECTS = TracedLayers("swap", {"a": [0.0, 0.5, 0.25, 0.1], "b": [0.0, 0.25, 0.75, 0.1]})
QUICK: dict[str, Any] = {
    "editor": {
        "name": "rome",
        "layers": None,
        "context_templates": ["{}"],
        "v_num_grad_steps": 8,
        "mom2_adjustment": False,
    },
    "model": {"name": "world"},
    "dataset": {"name": "world", "split": "dev", "probes": 1, "shuffle": True},
    "n_edits": 2,
    "n_unseen": 2,
    "n_traced": 2,
    "layers": [0, 5],
    "fields": ["layers", "v_lr"],
    "values": {"v_lr": [1e-4]},
    "collapse": {"n_texts": 2, "known_facts": 0},
    "device": "cpu",
}


def config(out: Path, **values: Any) -> TuneConfig:
    return TuneConfig.of({**QUICK, "out": str(out), **values})


def record(target: float, other: float | None, **values: Any) -> dict[str, Any]:
    """The record of an edit with one probe of each kind."""
    said = {"nll_target": target, "nll_other": other, "text": None}
    said |= {"target_correct": [], "other_correct": [], "target_choice": []}
    kinds = ("rewrite", "paraphrase", "neighborhood")
    probes = [
        {"kind": kind, "prompt": "x", "target": "y", "other": "z", "before": said, "after": said} for kind in kinds
    ]
    damage = {"perplexity": 2.0, "perplexity_before": 2.0, "retention": None}
    return {"status": "ok", "probes": probes, **damage, **values}


# --- scores and candidates ------------------------------------------------------------------------------------------


def test_a_probe_counts_with_the_probability_of_its_answer_against_the_other_one() -> None:
    wins = fact_values(record(0.0, math.log(3)))
    assert wins == pytest.approx(dict.fromkeys(("reliability", "generalization", "locality"), 0.75))
    assert fact_values(record(math.log(4), None))["reliability"] == pytest.approx(0.25)
    for lost in ({"status": "failed"}, {"perplexity": 5.0}):
        assert set(fact_values(record(0.0, 9.0, **lost)).values()) == {0.0}
    assert fact_values(record(math.inf, math.inf))["locality"] == 0.0


def test_scores_are_harmonic_means_and_gains_are_paired() -> None:
    base = [{"reliability": 1.0, "generalization": 0.5, "locality": 0.5}, {"reliability": 1.0, "generalization": 0.5}]
    more = [{**base[0], "generalization": 1.0}, {**base[1], "generalization": 1.0}]
    assert score_of(base).mean == pytest.approx(3 / (1 + 2 + 2))
    gain = gain_of(more, base)
    assert gain.mean == pytest.approx(3 / 4 - 3 / 5)
    assert gain.low == pytest.approx(gain.high)
    same = gain_of(base, base)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_windows_are_chosen_by_the_sum_of_their_effects() -> None:
    assert EFFECTS.best_window(1) == (2,)
    assert EFFECTS.best_window(2) == (1, 2)
    assert EFFECTS.best_window(4) == (0, 1, 2, 3)
    assert TracedLayers("swap", {"a": [1.0, 1.0]}).best_window(1) == (0,)


def test_layers_to_try_are_those_of_the_trace_its_neighbours_and_those_of_the_rule() -> None:
    def tried(
        traced: TracedLayers | None, n_layers: int, start: tuple[int, ...], **values: Any
    ) -> list[tuple[int, ...]]:
        return layer_candidates(config(Path("x"), **{"layers": [], **values}), traced, n_layers, start, start)

    assert tried(EFFECTS, 4, (0,), neighbors=1) == [(1,), (2,), (3,)]
    assert tried(EFFECTS, 4, (0,), neighbors=0) == [(2,)]
    assert tried(None, 9, (4,), neighbors=1) == [(3,), (5,)]
    assert tried(EFFECTS, 4, (0, 1), layers="all") == [(1, 2), (2, 3)]
    assert tried(EFFECTS, 4, (0, 1), layers=[2]) == [(2, 3)]
    with pytest.raises(ConfigError, match="layers from 0 to 2, got 3"):
        tried(EFFECTS, 4, (0, 1), layers=[3])


def test_values_to_try_are_a_smaller_and_a_larger_one_or_those_that_are_given() -> None:
    plain = config(Path("x"), values={})
    assert value_candidates(plain, "v_lr", 0.5) == [0.25, 1.0]
    assert value_candidates(plain, "lr", None) == []
    given = config(Path("x"), values={"v_lr": [0.5, 0.7]})
    assert value_candidates(given, "v_lr", 0.5) == [0.7]
    known = ("layers", "v_lr", "clamp_norm_factor", "stop_loss")
    everything = config(Path("x"), fields=[], values={"stop_loss": [0.1]})
    assert fields_to_search(everything, known, has_layers=True) == ["layers", "v_lr", "clamp_norm_factor", "stop_loss"]
    turned = config(Path("x"), fields=["v_lr", "layers"], values={})
    assert fields_to_search(turned, known, has_layers=True) == ["layers", "v_lr"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"fields": ["v_l"]}, "did you mean 'v_lr'"),
        ({"fields": ["stop_loss"], "values": {}}, "give values.stop_loss="),
        ({"values": {"layers": [1]}}, "as layers="),
        ({"values": {"v_lr": 1.0}}, "expected a list of values"),
        ({"layers": [9]}, "layers from 0 to 5, got [9]"),
        ({"n_edits": 1}, "n_edits: expected at least 2"),
        ({"n_unseen": 1}, "n_unseen: expected 0"),
        ({"n_unseen": 10**6}, "n_unseen=1000000, but only"),
        ({"dataset": {"name": "world", "known": "exact"}}, "dataset.known is for errata bench"),
        ({"editor": {"name": "ice"}, "fields": [], "values": {}}, "none of the fields that are searched"),
        ({"editor": {"name": "ice"}}, "ice has no field 'layers'"),
        ({"out": str(models.locate("world"))}, "another folder than the model's own"),
    ],
)
def test_mistakes_are_refused(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DatasetError)) as error:
        tune.run(TuneConfig.of({**QUICK, "n_traced": 0, "out": str(tmp_path), **values}))
    assert told in str(error.value)


# --- a search -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of two layers and one rate."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(panels, "saved", lambda _: b"a picture")
        return tune.run(config(tmp_path_factory.mktemp("tuned")))


def test_a_search_finds_settings_says_what_they_gain_and_writes_them(searched: Path) -> None:
    found = tune.read(searched)
    assert [entry["name"] for entry in found["tried"]][:4] == ["start", "layers", "layers", "v_lr"]
    development, unseen = (json.loads((searched / name).read_text()) for name in (tune.DEVELOPMENT, tune.UNSEEN))
    assert len(development) == len(unseen) == 2
    assert not {*found["trace"]["facts"]} & {*unseen}
    by_layer = found["localisation"]
    assert by_layer["layers"] == [[0], [1], [5]]
    assert by_layer["score"][2]["mean"] < by_layer["score"][1]["mean"]  # the last layer of six can write nothing
    assert not next(entry["kept"] for entry in found["tried"] if entry["name"] == "v_lr")  # nor can a rate of 1e-4
    assert found["unseen"]["n"] == 2
    kept = found["unseen"]["gain"]["mean"] > 0 or not found["is_changed"]
    assert found["is_kept"] == kept
    written = read_model_settings(searched).editors["rome"]
    assert written == found["settings"]
    assert written["layers"] in by_layer["layers"]  # also where the rule by depth stays, since the model has its own
    assert written["mom2_adjustment"] is False
    assert (searched / tune.PICTURE).read_bytes()
    assert pictures.picture(found).startswith(b"\x89PNG")
    without = {**found, "trace": None, "unseen": None}
    assert [panel.title for panel in pictures.panels(without)] == ["ROME: scores"]
    assert len(set(pictures._corners([(0.0, 0.2), (0.0, 0.2), (1.0, 1.0)])[:2])) == 2  # points at one place


def test_unseen_facts_share_no_subject_with_others() -> None:
    wanted = config(Path("x"), n_edits=8, n_unseen=24, seed=2)
    development, unseen, rest = tune._parts(wanted, tune._base(wanted))
    subjects = {subject for case in unseen for subject in case.subjects}
    assert len(unseen) == 24
    assert not any(case.subjects & subjects for case in rest)
    assert {case.id for case in development} < {case.id for case in rest}


def test_a_correlation_of_few_facts_says_so(searched: Path) -> None:
    found = tune.read(searched)
    rho = {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    there = {**found["localisation"], "correlations": {"score": rho}}
    said = "\n".join(_summary({**found, "localisation": there}))
    assert "4 choices of layers, 2 facts: rank correlation +1.000" in said
    assert "within one fact: not known; it takes 3 facts" in said
    assert "2 facts are few" in said


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_same_command_finds_every_run_done(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (searched / tune.NUMBERS).read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a run was made again")

    monkeypatch.setattr("errata.benchmarks.bench.execution._carry_out", refuse)
    monkeypatch.setattr(tracing, "_trace", refuse)
    assert tune.run(config(searched)) == searched
    assert (searched / tune.NUMBERS).read_bytes() == before


def test_settings_that_were_found_are_handed_over_to_other_commands(tmp_path: Path) -> None:
    (tmp_path / "errata.json").write_text('{"editors": {"rome": {"layers": [3], "v_lr": 0.7}, "memit": {"v_lr": 0.1}}}')
    model = ModelConfig("world", settings=str(tmp_path))
    assert (
        editor_config({"name": "rome"}, model).to_dict() | {"layers": (3,), "v_lr": 0.7}
        == editor_config({"name": "rome"}, model).to_dict()
    )
    assert editor_config({"name": "rome", "v_lr": 0.2}, model).to_dict()["v_lr"] == 0.2
    with pytest.raises(ConfigError, match=r"no .*gone/errata\.json is there"):
        editor_config({"name": "rome"}, ModelConfig("world", settings=str(tmp_path / "gone")))
    # They are a part of the method's fields, so that the folder that they came from makes no other run.
    values = {"editor": {"name": "rome", "layers": [3], "v_lr": 0.7}, "dataset": {"name": "world"}, "n_edits": 2}
    runs = [
        BenchConfig.of({**values, "model": {"name": "world", **more}}) for more in ({}, {"settings": str(tmp_path)})
    ]
    assert len({prepare(one).folder.path for one in runs}) == 1
    tune._write_settings(tmp_path, "rome", {"layers": [1]})
    assert read_model_settings(tmp_path).editors == {"rome": {"layers": [1]}, "memit": {"v_lr": 0.1}}


# --- layers=auto ----------------------------------------------------------------------------------------------------


def test_auto_means_the_layers_of_the_trace_before_the_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_layers, "N_FACTS", 2)
    values = {"editor": {"name": "memit", "layers": "auto"}, "model": {"name": "world"}, "dataset": {"name": "world"}}
    prepared = prepare(BenchConfig.of({**values, "n_edits": 2}))
    layers = list(prepared.config.editor["layers"])
    assert len(layers) == 3  # as many as by MEMIT's rule, which follow each other
    assert layers == list(range(layers[0], layers[0] + 3))
    assert prepared.settings["config"]["editor"]["layers"] == tuple(layers)
    monkeypatch.setattr(tracing, "_trace", lambda *_: pytest.fail("it is traced again"))
    assert prepare(BenchConfig.of({**values, "n_edits": 2})).folder.path == prepared.folder.path


def test_auto_needs_a_dataset() -> None:
    with pytest.raises(ConfigError, match=r"errata bench does.*model.settings=FOLDER"):
        editor_config({"name": "rome", "layers": "auto"}, ModelConfig("world"))
    with pytest.raises(ConfigError, match=r"such as \[3,4,5\].*or auto.*got 'automatic'; did you mean 'auto'"):
        editor_config({"name": "rome", "layers": "automatic"}, ModelConfig("world"))


def test_what_the_cache_holds_of_another_form_is_traced_again(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    for content in ("", "[]", '{"effects": {}}', '{"corruption": "swap", "effects": {"a": 1}}'):
        path.write_text(content)
        assert tracing._read(path) is None


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_command_says_what_was_found(searched: Path) -> None:
    fields = (
        "editor.layers=null",
        "editor.context_templates=['{}']",
        "editor.v_num_grad_steps=8",
        "editor.mom2_adjustment=false",
    )
    few = ("n_edits=2", "n_unseen=2", "n_traced=2", "dataset.probes=1", "collapse.n_texts=2", "device=cpu")
    words = (*fields, *few, "layers=0,5", "fields=layers,v_lr", "values.v_lr=[1e-4]", "collapse.tokens=2048")
    shown = run("tune", "model=world", "dataset=world", *words, f"out={searched}")
    assert "gain over the beginning, 2 unseen facts" in shown
    assert shown.count("development facts: score") == 4
