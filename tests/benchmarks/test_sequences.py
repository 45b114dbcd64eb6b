"""Sequences of edits on the bundled testbed: all edits so far are scored, on what they left, against the untouched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_runs import draw

from errata.benchmarks import bench
from errata.benchmarks.bench import sequences
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.datasets.selection import without_conflicts
from errata.editors.core.errors import LedgerError, NumericalError
from errata.editors.memit import MEMIT
from errata.evaluate.probes import Case, Probe

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

FAST = {"generation": {"tokens": 3, "fluency_tokens": 0}, "collapse": {"n_texts": 4, "known_facts": 20}}


def config(out: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "memit", "v_num_grad_steps": 12},
        "model": {"name": "world"},
        "dataset": {"name": "world", "shuffle": True},
        "protocol": {"name": "sequential"},
        "device": "cpu",
        "n_edits": 7,
        "batch_size": 2,
        "eval_every": 3,
        "out": str(out),
        **FAST,
    }
    return BenchConfig.of({**values, **changes})


def read(folder: Path, name: str) -> Any:
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.run(config(tmp_path_factory.mktemp("sequence")))


def test_checkpoints_score_all_edits_so_far(finished: Path) -> None:
    checkpoints = read(finished, "curve.json")
    assert [point["edits"] for point in checkpoints] == [4, 6, 7]
    assert [point["summary"]["probability"]["reliability"]["n"] for point in checkpoints] == [4, 6, 7]
    assert all(0 <= point["retention"] <= 1 and point["perplexity_ratio"] > 0 for point in checkpoints)
    last, results = checkpoints[-1], read(finished, "results.json")
    for metric, entry in last["summary"]["probability"].items():
        assert entry == results["summary"]["probability"][metric]
    draw(config(finished.parent))
    assert (finished / "curves.png").stat().st_size > 5_000


def test_records_hold_every_edit_as_the_last_one_left_it(finished: Path) -> None:
    """Against the same edits applied and scored by hand."""
    from errata import models
    from errata.evaluate.scoring import score

    settings = config(finished.parent)
    prepared = bench.prepare(settings)
    model, tokenizer = models.load("world", device="cpu")
    editor = MEMIT(model, tokenizer, prepared.editor)  # type: ignore[arg-type]
    for start in range(0, 7, 2):
        editor.apply([case.request for case in prepared.cases[start : start + 2]])
    for record, case in zip(read(finished, "records.jsonl"), prepared.cases, strict=True):
        assert record["case"] == case.id
        for probe, scored in zip(record["probes"], score(model, tokenizer, case.probes), strict=True):
            if scored.nll_target is not None:
                assert probe["after"]["nll_target"] == pytest.approx(scored.nll_target, abs=2e-4)


def test_a_sequence_repeats_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = bench.run(config(tmp_path))
    for out in (tmp_path, finished.parent):
        draw(config(out))
    for name in ("records.jsonl", "curve.json", "curves.png"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_size_of_batches_makes_other_runs_of_a_sequence_and_none_of_a_batch(tmp_path: Path) -> None:
    def key(protocol: str, size: int) -> str:
        return bench.prepare(config(tmp_path, protocol={"name": protocol}, batch_size=size)).folder.key

    assert key("batch", 2) == key("batch", 3) != key("sequential", 2)
    assert key("sequential", 2) != key("sequential", 3)


def test_a_batch_is_one_edit_of_all_requests(tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path, protocol={"name": "batch"}, eval_every=None))
    (checkpoint,) = read(folder, "curve.json")
    assert checkpoint["edits"] == 7
    norms = {record["diagnostics"]["update_norm"] for record in read(folder, "records.jsonl")}
    assert len(norms) == 1


@pytest.mark.parametrize("error", [NumericalError, LedgerError])
def test_a_refused_edit_of_a_sequence_is_counted_and_the_others_are_made(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = MEMIT.solve_batch
    refused = bench.prepare(config(tmp_path)).cases[2].request

    def choosy(self: MEMIT, requests: Any) -> Any:
        if refused in requests:
            raise error("injected")
        return solve(self, requests)

    monkeypatch.setattr(MEMIT, "solve_batch", choosy)
    folder = bench.run(config(tmp_path))
    records = read(folder, "records.jsonl")
    assert [record["status"] for record in records] == ["ok", "ok", "failed", "ok", "ok", "ok", "ok"]
    assert records[2]["reason"] == f"{error.__name__}: injected"
    results = read(folder, "results.json")
    assert results["counts"]["failed"] == 1
    assert any("as it stands" in warning for warning in results["warnings"])
    assert not any("untouched" in warning for warning in results["warnings"])


def test_checkpoints_have_the_runs_confidence_and_seed(finished: Path, tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path, confidence=0.5))
    last, results = read(folder, "curve.json")[-1], read(folder, "results.json")
    for metric, entry in last["summary"]["probability"].items():
        assert entry == results["summary"]["probability"][metric]
    assert last["summary"] != read(finished, "curve.json")[-1]["summary"]


def test_as_many_edits_are_made_as_were_asked_for_although_some_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = datasets.load

    def repeated(*args: Any, **options: Any) -> Loaded:
        limit = options.pop("limit")
        loaded = load(*args, **options)
        first = loaded.cases[0]
        cases = [first, dataclasses.replace(first, id="again"), *loaded.cases[1:]]
        return Loaded(cases[:limit], loaded.dropped)

    monkeypatch.setattr(datasets, "load", repeated)
    prepared = bench.prepare(config(tmp_path))
    assert len(prepared.cases) == 7
    assert [entry.record for entry in prepared.loaded.dropped] == ["again"]


def test_probes_that_are_left_out_are_counted(finished: Path) -> None:
    plain = config(finished.parent, protocol={"name": "single"})
    asked = sum(len(case.probes) for case in bench.prepare(plain).cases)
    recorded = sum(len(record["probes"]) for record in read(finished, "records.jsonl"))
    assert read(finished, "results.json")["counts"]["probes_apart"] == asked - recorded
    assert bench.prepare(plain).probes_apart == 0


def test_the_model_is_rolled_back_when_a_sequence_ends_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata import models

    loaded: list[Any] = []
    load = models.load

    def kept(*args: Any, **options: Any) -> Any:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(models, "load", kept)
    bench.run(config(tmp_path, n_edits=2))
    fresh = load("world", device="cpu")[0].state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in loaded[0][0].state_dict().items())

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(sequences, "scored_point", broken)
    with pytest.raises(RuntimeError, match="injected"):
        bench.run(config(tmp_path, n_edits=3))
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in loaded[1][0].state_dict().items())


def test_probes_of_others_do_not_mention_subjects_that_the_sequence_edits() -> None:
    cases = world.cases()[:60]
    subjects = {case.request.subject for case in cases}
    kept = sequences.without_edited_subjects(cases)
    dropped = 0
    for case, before in zip(kept, cases, strict=True):
        dropped += len(before.probes) - len(case.probes)
        for probe in case.probes:
            if probe.kind == "neighborhood":
                words = set(probe.prompt.replace("?", " ").replace(",", " ").replace(".", " ").split())
                assert not (subjects - {case.request.subject}) & words
        of_own = [probe for probe in before.probes if probe.kind in ("rewrite", "paraphrase", "portability")]
        assert [p for p in case.probes if p.kind in ("rewrite", "paraphrase", "portability")] == of_own
    assert dropped > 0


def test_subjects_are_found_as_whole_words() -> None:
    request = world.cases()[0].request
    near = (
        Probe("neighborhood", "The capital of Annland is", "x", "y"),
        Probe("neighborhood", "Ann, who is", "x", "y"),
    )
    import dataclasses

    one = Case("1", request, near)
    other = Case("2", dataclasses.replace(request, subject="Ann", prompt="{} is", id="other"), ())
    assert [probe.prompt for probe in sequences.without_edited_subjects([one, other])[0].probes] == [
        "The capital of Annland is"
    ]
    assert sequences.never_edited(near, [other]) == [near[0]]


def test_of_edits_of_one_prompt_only_the_first_is_made() -> None:
    first, second = world.cases()[:2]
    again = dataclasses.replace(first, id="again")
    loaded = without_conflicts(Loaded([first, second, again], []))
    assert [case.id for case in loaded.cases] == [first.id, second.id]
    assert len(loaded.dropped) == 1


def test_a_prompt_is_edited_again_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = {"name": "world_again", "repeats": True}
    cases = world.again_cases()  # takes seconds
    monkeypatch.setattr(world, "again_cases", lambda *_, **__: cases)
    subject = cases[0].request.subject
    chosen = [case.id for case in cases if case.request.subject == subject][:60]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(chosen))
    prepared = bench.prepare(config(tmp_path, dataset={**again, "ids": str(ids)}, n_edits=None))
    prompts = [case.request.text for case in prepared.cases]
    assert len(prompts) == len(chosen) > len(set(prompts))
    once = bench.prepare(config(tmp_path, dataset={**again, "ids": str(ids), "repeats": False}, n_edits=None))
    assert [case.request.text for case in once.cases] == list(dict.fromkeys(prompts))
