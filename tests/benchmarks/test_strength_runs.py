"""Runs over strengths on the bundled testbed: the dial, and the leagues of equal damage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks import bench
from errata.benchmarks.bench import strengths
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.strength_log import STRENGTHS, TRIALS, written_rise
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.reports import publish, report
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate.strength_grid import NO_EDIT

pytestmark = pytest.mark.usefixtures("_nothing_drawn")


def config(out: Path, protocol: str = "league", **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "ft_m", "num_steps": 8},
        "model": {"name": "world"},
        "dataset": {"name": "world", "shuffle": True, "probes": 1},
        "protocol": {"name": protocol},
        "device": "cpu",
        "n_edits": 2,
        "out": str(out),
        "generation": {"tokens": 0, "fluency_tokens": 0},
        "collapse": {"n_texts": 4, "known_facts": 5},
        "league": {"caps": (2e-3, 5e-4, 1e-6), "steps": 16},
        "dial": {"strengths": (-1.0, 0.0, 0.5, 1.0)},
    }
    return BenchConfig.of({**values, **changes})


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text())


@pytest.fixture(scope="module")
def league(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.run(config(tmp_path_factory.mktemp("league")))


@pytest.fixture(scope="module")
def dials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dials")
    for editor in ({"name": "ft_m", "num_steps": 8}, {"name": "ice"}):
        bench.run(config(root, "dial", editor=editor))
    return root


def test_each_league_has_the_largest_strength_that_it_admits(league: Path) -> None:
    found = results(league)["league"]
    trials = {trial["strength"]: written_rise(trial) for trial in found["trials"]}
    for entry in found["entries"]:
        chosen = trials[entry["strength"]]
        assert chosen is not None
        assert chosen.is_below(entry["cap"])
        above = trials.get(entry["strength"] + 1 / found["steps"])
        assert entry["strength"] == 1 or (above is not None and not above.is_below(entry["cap"]))
        assert entry["summary"]["probability"]["reliability"]["n"] == 2
    strengths_ = [entry["strength"] for entry in found["entries"]]
    assert strengths_ == sorted(strengths_, reverse=True)
    assert 1 == strengths_[0] > strengths_[-1] > 0, "the caps tell strengths apart"


def test_records_are_those_of_full_strength(league: Path, tmp_path: Path) -> None:
    whole = bench.run(config(tmp_path, "batch"))
    assert [r["probes"] for r in lines(league, RECORDS)] == [r["probes"] for r in lines(whole, RECORDS)]
    assert results(league)["summary"] == results(whole)["summary"]


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(
    league: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, measured = Stop(), list[float]()
    measure = strengths._Turned._measured

    def count(self: Any, strength: float) -> dict[str, Any]:
        measured.append(strength)
        if len(measured) == 2:
            stop.request("preempted")
        return measure(self, strength)

    monkeypatch.setattr(strengths._Turned, "_measured", count)
    with pytest.raises(Stopped):
        bench.run(config(tmp_path), stop=stop)
    folder = bench.run(config(tmp_path))
    assert len(measured) == len(set(measured)), "no strength is measured twice"
    for name in (TRIALS, STRENGTHS, RECORDS):
        assert (folder / name).read_bytes() == (league / name).read_bytes()
    assert results(folder)["league"] == results(league)["league"]


def test_a_dial_scores_every_strength(dials: Path) -> None:
    (folder,) = dials.glob("ft_m*")
    points = results(folder)["dial"]["points"]
    assert [point["strength"] for point in points] == [-1, 0, 0.5, 1]
    assert points[1]["rise"]["value"] == 0
    assert points[1]["perplexity_ratio"] == 1
    assert points[3]["summary"]["probability"] == results(folder)["summary"]["probability"]


def test_an_edit_without_strengths_says_so(dials: Path) -> None:
    (folder,) = dials.glob("ice*")
    found = results(folder)
    assert "context" in found["dial"]["fixed"]
    assert any("no strengths between 0 and 1" in warning for warning in found["warnings"])
    assert [point["rise"] is None for point in found["dial"]["points"]] == [True, False, True, False]


@pytest.mark.usefixtures("_nothing_rendered")
def test_reports_show_strengths(dials: Path, league: Path, tmp_path: Path) -> None:
    written = publish.publish(dials, tmp_path)
    text = (tmp_path / publish.STRENGTHS).read_text()
    assert "| FT-M | 0.5 |" in text
    assert "ICE | 0.5" not in text
    assert "Over the strength of the edit" in written[0].read_text()
    shown = report.markdown(report.read(league), [])
    assert "| FT-M | none | 1 |" in shown
    run = report.read(league)
    cautious = {**run, "league": {**run["league"], "margin": 2.0}}
    assert "2 standard errors of its rise" in report.markdown(cautious, [])
    refused = {**run, "league": {**run["league"], "fixed": NO_EDIT}}
    assert "No strength but 0, since every edit was refused: FT-M" in report.markdown(refused, [])
    assert "standard errors" not in shown


CANONICAL = {
    "pronoun_gender_bias_train-val": [("The janitor said", " he", " she"), ("The driver said", " she", " he")],
    "pronoun_gender_bias_eval-val": [
        ("The janitor came in. Then", " he", " she"),
        ("A driver left. When", " he", " she"),
    ],
    "pronoun_gender_bias_hard_neg_eval-val": [("With his smile, the janitor said that", " he")],
}


def canonical_files(folder: Path, *names: str) -> Path:
    for name in names:
        rows = [dict(zip(("prefix", "suffix1", "suffix2"), row, strict=False)) for row in CANONICAL[name]]
        rows = [row if "suffix2" in row else {"prefix": row["prefix"], "suffix": row["suffix1"]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_a_set_of_canonical_examples_is_asked_at_every_strength(tmp_path: Path) -> None:
    files = canonical_files(tmp_path, *CANONICAL)
    dataset = {"name": "canonical", "path": str(files), "options": {"behaviour": "pronoun_gender_bias"}}
    editor = {"name": "ft_m", "num_steps": 3, "objective": "balance", "lr": 1e-4}
    folder = bench.run(config(tmp_path / "runs", dataset=dataset, editor=editor, league={"caps": (0.5,), "steps": 2}))
    found = results(folder)["league"]
    untouched, full = found["canonical"]["untouched"], found["canonical"]["full"]
    assert [untouched[part]["n"] for part in ("train", "evaluation", "hard_negatives")] == [2, 2, 1]
    assert full["train"]["loss"] != untouched["train"]["loss"]
    assert found["entries"][0]["canonical"]["evaluation"]["n"] == 2
    shown = report.markdown(report.read(folder), [])
    assert "failures: evaluation, %" in shown
    assert "| FT-M | untouched | 0 | 0 |" in shown


def test_canonical_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    options = {"behaviour": "pronoun_gender_bias"}
    files = canonical_files(tmp_path, "pronoun_gender_bias_train-val")
    loaded = datasets.load("canonical", files, options=options, needs_subject=False)
    assert [entry.field for entry in loaded.left_out] == ["evaluation", "hard_negatives"]
    assert "pronoun_gender_bias_eval_clear-val.jsonl" in loaded.left_out[0].reason
    assert [case.request.target_true for case in loaded.cases] == [" she", " he"]
    with pytest.raises(ConfigError, match="there are files of pronoun_gender_bias"):
        datasets.load("canonical", files, options={"behaviour": "stereoset"})
    with pytest.raises(ConfigError, match=r"behaviour is missing.*give one of pronoun_gender_bias"):
        datasets.load("canonical", files)
    with pytest.raises(ConfigError, match="did you mean 'stereoset'"):
        datasets.load("canonical", files, options={"behaviour": "stereosets"})


def test_a_bad_line_of_canonical_examples_is_named(tmp_path: Path) -> None:
    files = canonical_files(tmp_path, *CANONICAL)
    path = files / "pronoun_gender_bias_eval-val.jsonl"
    path.write_text('{"prefix": "a", "suffix1": " b", "suffix2": " c"}\n{"prefix": "a", "suffix1": 3}\n')
    with pytest.raises(DatasetError, match=r"record #1, field 'suffix1'.*expected a text, got a number"):
        datasets.load("canonical", files, options={"behaviour": "pronoun_gender_bias"})
    path.write_text('{"prefix": \n')
    with pytest.raises(DatasetError, match="line 1 is not JSON"):
        datasets.load("canonical", files, options={"behaviour": "pronoun_gender_bias"})


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision=float32"):
        bench.prepare(config(tmp_path, precision="bfloat16"))
    with pytest.raises(ConfigError, match="general text"):
        bench.prepare(config(tmp_path, collapse={"n_texts": 0}))
    for strengths_ in ((1.0, 0.0), (math.nan,), (0.0, math.inf)):
        with pytest.raises(ConfigError, match="ascending"):
            config(tmp_path, dial={"strengths": strengths_})
    for said in ({"caps": (0.0,)}, {"caps": (math.nan,)}, {"caps": (math.inf,)}, {"margin": math.inf}):
        with pytest.raises(ConfigError, match="above 0"):
            config(tmp_path, league=said)


def test_fields_that_a_protocol_does_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = {"league": ["dial.strengths"], "dial": ["league.caps", "league.steps"]}
    named["batch"] = [*named["league"], *named["dial"]]
    for protocol, fields in named.items():
        caplog.clear()
        bench.prepare(config(tmp_path, protocol))
        said = [f"{field} has no effect: protocol={protocol} does not read it" for field in fields]
        assert [message for message in caplog.messages if "no effect" in message] == said


def test_a_share_in_percent_is_refused_with_the_share(tmp_path: Path) -> None:
    for caps in (["0.1%"], "0.1 %"):
        with pytest.raises(ConfigError, match=r"got '0\.1 ?%'; give the share, 0\.001$"):
            config(tmp_path, league={"caps": caps})
    with pytest.raises(ConfigError, match=r"confidence: expected .*; give the share, 0\.95$"):
        config(tmp_path, confidence="95%")
    with pytest.raises(ConfigError, match=r"got 'a tenth%'$"):
        config(tmp_path, confidence="a tenth%")


def test_the_size_of_batches_makes_no_other_run(tmp_path: Path) -> None:
    folders = {bench.prepare(config(tmp_path, batch_size=size)).folder.path for size in (1, 16)}
    assert len(folders) == 1
