"""The bench on the bundled testbed: bits that repeat, runs that survive being killed, and refusals that are counted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from drawn_runs import draw
from forked import ForkedProcess, command

import errata
from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench import protocols, run_results
from errata.benchmarks.bench.baseline import baseline
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.runs import environment, summary
from errata.benchmarks.runs.run_folder import RECORDS, RunFolder
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, DisablingEditWarning, NumericalError
from errata.editors.core.request import EditRequest
from errata.editors.rome import RROME
from errata.evaluate.probes import Case, Probe

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

FAST = {"generation": {"tokens": 4, "fluency_tokens": 4}, "collapse": {"n_texts": 4, "known_facts": 10}}


def config(out: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "r_rome", "v_num_grad_steps": 5},
        "model": {"name": "world"},
        "dataset": {"name": "world", "shuffle": True},
        "device": "cpu",
        "n_edits": 4,
        "batch_size": 2,
        "out": str(out),
        **FAST,
    }
    return BenchConfig.of({**values, **changes})


def live(editor: Editor, cases: Sequence[Case], **changes: Any) -> Bench:
    """A bench on an editor's model; without free texts, unless `generation` asks for some."""
    quiet = {"generation": {"tokens": 0, "fluency_tokens": 0}, "batch_size": 16}
    return Bench(config(Path("runs"), **{**quiet, **changes}), editor, cases)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    return bench.run(config(tmp_path_factory.mktemp("reference")))


def lines(folder: Path) -> list[bytes]:
    return (folder / "records.jsonl").read_bytes().splitlines(keepends=True)


# --- bits and resume ----------------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_bits(reference: Path, tmp_path: Path) -> None:
    again = bench.run(config(tmp_path))
    assert again.name == reference.name
    for folder in (reference, again):
        draw(config(folder.parent))
    for name in ("records.jsonl", "curve.json", "scores.png", "damage.png"):
        assert (again / name).read_bytes() == (reference / name).read_bytes(), name


def test_another_seed_is_another_run(reference: Path, tmp_path: Path) -> None:
    assert bench.prepare(config(tmp_path, seed=1)).folder.path.name != reference.name


def test_what_numbers_are_computed_with_and_from_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One text.")
    settings = config(tmp_path, editor={"name": "r_rome", "mom2_dataset": str(text)})
    keys = [bench.prepare(settings).folder.key, bench.prepare(settings).folder.key]
    assert keys[0] == keys[1]
    text.write_text("Two texts")
    keys.append(bench.prepare(settings).folder.key)
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patched:
            real = environment.version
            patched.setattr(environment, "version", lambda name, p=package, r=real: "0" if name == p else r(name))
            keys.append(bench.prepare(settings).folder.key)
    with monkeypatch.context() as patched:
        patched.setattr(models, "resolved_device", lambda _: torch.device("meta"))
        keys.append(bench.prepare(settings).folder.key)
    with monkeypatch.context() as patched:
        patched.setattr(models, "resolved_dtype", lambda *_, **__: torch.bfloat16)
        keys.append(bench.prepare(settings).folder.key)
    assert len(set(keys)) == 6


def test_precision_is_resolved_as_the_model_is_loaded() -> None:
    for asked in (None, "float64"):
        assert models.resolved_dtype("world", asked) == models.load("world", dtype=asked, device="cpu")[0].dtype


class _Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does, without any of our handlers for errors."""


@pytest.mark.parametrize(
    ("survived", "torn"),
    [
        (0, True),
        pytest.param(3, False, marks=pytest.mark.slow),
        (3, True),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_between_records_resumes_to_identical_records(
    survived: int, torn: bool, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunFolder.append
    written: list[str] = []

    def dying(self: RunFolder, name: str, record: Any) -> None:
        if name == RECORDS:
            if len(written) == survived:
                if torn:
                    with self.file(name).open("ab") as file:
                        file.write(b'{"case": "torn')
                raise _Killed
            written.append(record["case"])
        append(self, name, record)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append", dying)
        with pytest.raises(_Killed):
            bench.run(config(tmp_path))
    folder = bench.prepare(config(tmp_path)).folder
    assert not folder.done
    assert not (folder.path / "results.json").exists()
    assert bench.run(config(tmp_path)) == folder.path
    assert lines(folder.path) == lines(reference)


def test_a_process_that_is_killed_resumes_to_identical_records(
    reference: Path, tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    rng, landed, kills = random.Random(0), [], trials(1, 50)
    overrides = "editor=r_rome editor.v_num_grad_steps=5 device=cpu n_edits=4 batch_size=2 dataset.split=null"
    overrides += " generation.tokens=4 generation.fluency_tokens=4 collapse.n_texts=4 collapse.known_facts=10"
    for trial in range(kills):
        out = tmp_path / str(trial)
        records = bench.prepare(config(out)).folder.path / "records.jsonl"
        process = ForkedProcess(command("bench", *overrides.split(), f"out={out}"), tmp_path / f"process{trial}")
        wanted = rng.randrange(1, 4)
        while process.poll() is None and (not records.exists() or records.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            landed.append(records.read_bytes().count(b"\n"))
        assert lines(bench.run(config(out))) == lines(reference)
    tried(3, kills, landed=len(landed), behind_so_many_records=landed)
    assert len(landed) >= 0.8 * kills, f"only {len(landed)} of {kills} kills landed in a run: {landed}"
    assert all(0 < count <= 4 for count in landed)


def test_a_finished_run_is_not_run_again(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    before = {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    monkeypatch.setattr(models, "load", forbidden)
    assert bench.run(config(reference.parent)) == reference
    assert before == {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    with pytest.raises(AssertionError, match="was loaded"):
        bench.run(config(reference.parent, seed=1))


@pytest.mark.parametrize("name", ["results.json", "curve.json", "records.jsonl"])
def test_damaged_data_of_a_finished_run_is_set_aside_and_made_again(
    name: str, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(reference, bench.prepare(config(tmp_path)).folder.path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) * 3 // 4] ^= 1
    (folder / name).write_bytes(content)
    assert not bench.prepare(config(tmp_path)).folder.done
    assert bench.run(config(tmp_path)) == folder
    assert "set aside" in caplog.text
    assert (folder / f"{name}.damaged").read_bytes() == content
    for data in ("curve.json", "records.jsonl"):
        assert (folder / data).read_bytes() == (reference / data).read_bytes()
    assert json.loads((folder / "results.json").read_text())["counts"]["edits"] == 4
    assert bench.prepare(config(tmp_path)).folder.done


def test_nothing_is_written_outside_out(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    words = ["bench", "-m", "editor=r_rome", "n_edits=1", "device=cpu"]
    words += ["generation.tokens=0", "generation.fluency_tokens=0", "collapse.n_texts=0", "collapse.known_facts=0"]
    words += ["editor.v_num_grad_steps=2", "out=my runs, all"]

    def carried_out() -> int:
        os.chdir(work)
        return command(*words)()

    done = ForkedProcess(carried_out, tmp_path / "process")
    assert done.wait() == 0, done.errors
    assert [path.name for path in work.iterdir()] == ["my runs, all"]
    assert len(errata.load_results(work)) == 1
    assert "Traceback" not in done.errors


# --- what is in the results ---------------------------------------------------------------------------------------


def test_results_say_what_was_run_and_how_it_went(reference: Path) -> None:
    results = json.loads((reference / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["trust_remote_code"] is False
    assert results["counts"]["edits"] == 4
    assert results["config"]["editor"]["v_num_grad_steps"] == 5
    assert set(results["summary"]) >= {"probability", "teacher_forced", "generation"}
    for metric in ("reliability", "generalization", "locality", "distracting_locality"):
        entry = results["summary"]["probability"][metric]
        assert set(entry) == {"mean", "low", "high", "n"}
        assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
    wanted = {"perplexity_before", "perplexity_after", "perplexity_ratio", "neighborhood_kl"}
    assert wanted <= set(results["collapse"])
    assert set(results["speed"]) >= {"seconds_per_edit", "edit_seconds", "evaluation_seconds", "peak_memory_bytes"}
    if sys.platform == "linux":
        peaks = results["peak_memory_by_phase"]
        assert {"loading", "untouched", "edits", "values", "evaluation"} <= set(peaks)
        assert max(peaks.values()) <= results["speed"]["peak_memory_bytes"]
    row = errata.load_results(reference.parent).iloc[0]
    assert row["summary.probability.reliability.mean"] == results["summary"]["probability"]["reliability"]["mean"]


def test_results_say_that_code_of_the_model_was_allowed(tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path, model={"name": "world", "trust_remote_code": True}, n_edits=1, batch_size=1))
    assert json.loads((folder / "results.json").read_text())["trust_remote_code"] is True


def test_the_untouched_model_is_what_before_means(reference: Path) -> None:
    from errata.evaluate.scoring import score

    model, tokenizer = models.load("world", device="cpu")
    for record in map(json.loads, lines(reference)):
        case = next(case for case in world.cases() if case.id == record["case"])
        for probe, found in zip(record["probes"], score(model, tokenizer, case.probes), strict=True):
            for name in ("nll_target", "nll_other"):
                value = getattr(found, name)
                assert probe["before"][name] == (value if value is None else pytest.approx(value, abs=1e-4))


def test_the_model_is_edited_while_it_is_scored_and_only_then(reference: Path) -> None:
    records = list(map(json.loads, lines(reference)))
    assert all(record["status"] == "ok" for record in records)
    rewrites = [record["probes"][0] for record in records]
    assert all(probe["after"]["nll_target"] < probe["before"]["nll_target"] - 1 for probe in rewrites)


def test_a_prompt_that_is_open_in_one_case_and_a_neighbour_in_another_has_two_texts() -> None:
    model, tokenizer = models.load("world", device="cpu")
    first, second = world.cases(split="test")[:2]
    prompt = next(probe.prompt for probe in first.probes if probe.kind == "neighborhood")
    cases = [
        Case(first.id, first.request, (Probe("neighborhood", prompt, "a", "b"),)),
        Case(second.id, second.request, (Probe("generation", prompt),)),
    ]
    editor = RROME(model, tokenizer, RROME.Config(layers=(1,)))
    told = live(editor, cases, generation={"tokens": 2, "fluency_tokens": 12})
    shared = baseline(told).observed
    alone = [baseline(dataclasses.replace(told, cases=[case])).observed[case.id] for case in cases]
    assert [shared[case.id][0]["text"] for case in cases] == [entry[0]["text"] for entry in alone]
    assert len(shared[first.id][0]["text"]) < len(shared[second.id][0]["text"])


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_refused_edit_is_recorded_counted_and_scored_as_untouched(tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path, editor={"name": "r_rome", "v_num_grad_steps": 3, "max_norm_ratio": 1e-9}))
    results = json.loads((folder / "results.json").read_text())
    assert results["counts"]["failed"] == results["counts"]["edits"] == 4
    assert all("NumericalError" in failure["reason"] for failure in results["failures"])
    assert results["summary"] == results["before"]
    assert any("refused" in warning for warning in results["warnings"])


def test_a_refused_edit_counts_in_the_damage_as_none(tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path, editor={"name": "r_rome", "v_num_grad_steps": 3, "max_norm_ratio": 1e-9}))
    collapse = json.loads((folder / "results.json").read_text())["collapse"]
    assert collapse["perplexity_ratio"] == collapse["perplexity_ratio_worst"] == 1
    assert collapse["neighborhood_kl"] == 0
    assert collapse["retention"] == 1


class _Unfit(RROME):
    """r-ROME whose reports JSON cannot hold, of one request each in its own way."""

    bad: ClassVar[dict[str, Any]] = {}

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        solutions = super().solve(requests)
        for solution in solutions:
            if solution.requests[0].id in self.bad:
                solution.diagnostics[0]["odd"] = self.bad[str(solution.requests[0].id)]
        return solutions


def test_an_edit_whose_report_json_cannot_hold_is_a_failed_record_and_costs_no_other(tmp_path: Path) -> None:
    model, tokenizer = models.load("world", device="cpu")
    cases = world.cases(split="test")[:4]
    editor = _Unfit(model, tokenizer, RROME.Config(layers=(1,), v_num_grad_steps=3))
    editor.bad = {str(cases[0].request.id): math.nan, str(cases[2].request.id): object()}  # type: ignore[misc]
    told = live(editor, cases, batch_size=4)
    folder = RunFolder.at(tmp_path, "x", {})
    folder.path.mkdir()
    protocols.single(told, baseline(told), (), lambda record, _: folder.append("records.jsonl", record))
    records = folder.records("records.jsonl")
    assert [record["status"] for record in records] == ["failed", "ok", "failed", "ok"]
    assert all("LedgerError" in records[i]["reason"] for i in (0, 2))


def test_a_case_that_does_not_fit_the_model_is_dropped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = bench.prepare(config(tmp_path)).cases[1]
    load = datasets.load

    def lengthened(*args: Any, **options: Any) -> Loaded:
        loaded = load(*args, **options)
        probe = Probe("paraphrase", "word " * 3000 + long.request.text, "a", "b")
        cases = [
            dataclasses.replace(case, probes=(*case.probes, probe)) if case.id == long.id else case
            for case in loaded.cases
        ]
        return Loaded(cases, loaded.dropped)

    monkeypatch.setattr(datasets, "load", lengthened)
    results = json.loads((bench.run(config(tmp_path)) / "results.json").read_text())
    assert results["counts"]["edits"] == 3
    assert results["counts"]["dropped"] == 1
    assert results["dropped"][0]["record"] == long.id
    assert "word word" in results["dropped"][0]["reason"]


def test_collecting_moments_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "moments"))
    seen: set[str] = set()
    bench.run(config(tmp_path, n_edits=1), progress=lambda done, total, what: seen.add(what))  # noqa: ARG005
    assert "edits" in seen
    assert len(seen) > 1, seen


class _Moody(RROME):
    """r-ROME that refuses one request and warns of another."""

    refused: str = ""
    foretold: str = ""

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        for request in requests:
            if request.id == self.refused:
                raise NumericalError(f"request {request.id}: no finite solution")
            if request.id == self.foretold:
                warnings.warn(f"request {request.id} (x): likely to disable", DisablingEditWarning, stacklevel=1)
        return super().solve(requests)


def test_one_refused_edit_costs_no_other_and_warnings_go_to_their_records() -> None:
    model, tokenizer = models.load("world", device="cpu")
    cases = world.cases(split="test")[:3]
    editor = _Moody(model, tokenizer, RROME.Config(layers=(1,), v_num_grad_steps=3))
    editor.refused, editor.foretold = str(cases[1].request.id), str(cases[2].request.id)
    told = live(editor, cases, batch_size=3)
    records: list[dict[str, Any]] = []
    protocols.single(told, baseline(told), (), lambda record, _: records.append(record))
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]
    assert "no finite solution" in records[1]["reason"]
    assert [len(record["warnings"]) for record in records] == [0, 0, 1]
    found = summary.summarise(records)
    expected = {"edits": 3, "failed": 1, "undone": 0, "guard_tripped": 0, "foretold_disabling": 1, "disabling": 0}
    assert found.counts == expected


def test_a_run_without_perplexity_says_whether_it_was_left_out_or_there_was_no_text() -> None:
    counts: dict[str, int] = dict.fromkeys(("failed", "undone", "not_made", "foretold_disabling", "disabling"), 0)
    prepared = bench.prepare(config(Path("runs"), n_edits=1, collapse={"n_texts": 0}))
    assert run_results._warnings(prepared, counts, {}) == [
        "perplexity was not measured: collapse.n_texts=0 leaves it out"
    ]
    none = dataclasses.replace(bench.prepare(config(Path("runs"), n_edits=1)), texts=())
    assert "the model's folder brings no text" in run_results._warnings(none, counts, {})[0]


# --- sweeps -------------------------------------------------------------------------------------------------------


def test_a_sweep_makes_one_table_and_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from errata.benchmarks.reports import report

    folders = [bench.run(config(tmp_path, n_edits=2, editor={"name": name})) for name in ("rome", "r_rome")]
    runs = [report.read(folder) for folder in folders]
    report.show(runs, Console(width=160))
    shown = capsys.readouterr().out
    assert shown.count("Probability comparison") == 1
    (picture,) = report.write_comparisons(runs, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.write_comparisons(runs[:1], tmp_path) == []


def test_more_edits_than_cases_is_an_error_that_says_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(errata.ErrataError, match="only"):
        bench.run(config(tmp_path, n_edits=10**6))
    with pytest.raises(ConfigError, match="protocol"):
        bench.run(config(tmp_path, protocol={"name": "batched"}))
