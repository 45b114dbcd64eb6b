"""Single edits that are scored in one batch have the records of edits that are scored one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench import single_edits
from errata.benchmarks.bench.baseline import baseline
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.datasets import world
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.editors import GRACE, RROME
from errata.evaluate.probes import Case
from errata.testing.tiny_models import SENTENCES

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

TEXTS = SENTENCES


@pytest.fixture(scope="module")
def live() -> tuple[Any, Any, list[Case]]:
    """The testbed's model and five of its cases, with four probes each."""
    model, tokenizer = models.load("world", device="cpu")
    cases = world.cases(split="test")[:5]
    kinds = {"rewrite": 1, "paraphrase": 1, "neighborhood": 2}
    few = [[p for kind, n in kinds.items() for p in [q for q in c.probes if q.kind == kind][:n]] for c in cases]
    return model, tokenizer, [replace(c, probes=tuple(probes)) for c, probes in zip(cases, few, strict=True)]


def make(live: tuple[Any, Any, list[Case]], method: str = "r_rome", **changes: Any) -> Bench:
    model, tokenizer, cases = live
    values = {
        "editor": {"name": method},
        "model": {"name": "world"},
        "dataset": {"name": "world"},
        "generation": {"tokens": 3, "fluency_tokens": 0},
        "batch_size": 3,
        **changes,
    }
    editors = {
        "r_rome": lambda: RROME(model, tokenizer, {"v_num_grad_steps": 3}),
        "grace": lambda: GRACE(model, tokenizer, {"n_iter": 3}),
    }
    known = world.known_facts(Path(models.locate("world")))[:6]
    return Bench(BenchConfig.of(values), editors[method](), cases, texts=TEXTS, known=known)


def records(told: Bench, done: Sequence[str] = ()) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    single_edits.single(told, baseline(told), done, lambda record, _: found.append(record))
    return found


def numbers(value: Any) -> list[float]:
    """Every number of a record that is not a count."""
    if isinstance(value, dict):
        return [x for key, part in value.items() if key != "together" for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [value] if isinstance(value, float) else []


def said(record: dict[str, Any]) -> Any:
    """Every text and every choice of a record."""
    return [(probe["after"]["text"], probe["after"]["target_choice"]) for probe in record["probes"]]


@pytest.mark.parametrize("method", ["r_rome", "grace"])
def test_records_of_a_group_are_those_of_single_edits(method: str, live: Any) -> None:
    together, alone = records(make(live, method)), records(make(live, method, batch_size=1))
    assert [record["together"] for record in together] == [3, 3, 3, 2, 2]
    assert [record["together"] for record in alone] == [1] * 5
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        assert said(ours) == said(theirs)
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=2e-3, abs=2e-4)


def test_groups_are_cut_by_the_index_of_a_case_so_that_a_run_that_goes_on_gives_the_same_bits(live: Any) -> None:
    whole = records(make(live))
    rest = records(make(live), done=[record["case"] for record in whole[:2]])
    assert json.dumps(rest) == json.dumps(whole[2:])


def test_a_group_that_memory_does_not_hold_is_scored_in_halves(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = records(make(live)), []
    scored = single_edits.score_edited

    def small(patches: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(patches.patches))
        if len(patches.patches) > 1:
            raise torch.OutOfMemoryError
        return scored(patches, *args, **kwargs)

    monkeypatch.setattr(single_edits, "score_edited", small)
    halved = records(make(live))
    assert [size for size in sizes if size > 1] == [3, 2, 2]
    assert [record["together"] for record in halved] == [1] * 5
    assert [said(record) for record in halved] == [said(record) for record in whole]


def test_edits_that_cannot_be_together_are_scored_one_by_one_and_say_so(
    live: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = records(make(live))
    monkeypatch.setattr(single_edits, "reason_alone", lambda *_: "they are shy")
    alone = records(make(live))
    assert {(record["together"], record["alone"]) for record in alone} == {(1, "they are shy")}
    assert [said(record) for record in alone] == [said(record) for record in whole]
    folder = bench.run(
        BenchConfig.of(
            {
                "editor": {"name": "r_rome", "v_num_grad_steps": 2},
                "model": {"name": "world"},
                "dataset": {"name": "world"},
                "generation": {"tokens": 0, "fluency_tokens": 0},
                "collapse": {"n_texts": 2, "tokens": 1, "known_facts": 0},
                "n_edits": 3,
                "batch_size": 2,
                "device": "cpu",
                "out": str(tmp_path),
            }
        )
    )
    results = json.loads((folder / "results.json").read_text())
    assert "2 edits were scored one by one: they are shy" in results["warnings"]
    assert results["evaluation"]["edits_scored_together"] == {"1": 3}
    text = results["evaluation"]["perplexity_tokens"]
    assert text > 0
    assert results["collapse"]["perplexity_before"] > 0


def test_perplexity_reads_as_many_tokens_as_it_may(live: Any) -> None:
    few, all_of = make(live, collapse={"tokens": 5}), make(live, collapse={"tokens": None})
    read = [baseline(told).perplexity_tokens for told in (few, all_of)]
    assert read[0] is not None
    assert read[1] is not None
    assert 5 <= read[0] < read[1]
    assert baseline(few).part is None  # a single edit is not measured again in full


def test_a_stop_between_groups_keeps_what_was_written(live: Any) -> None:
    told = make(live)
    stop, found = Stop(), []
    told = Bench(told.config, told.editor, told.cases, texts=told.texts, stop=stop)

    def write(record: dict[str, Any], _: dict[str, float]) -> None:
        found.append(record)
        stop.request("preempted")

    with pytest.raises(Stopped):
        single_edits.single(told, baseline(told), (), write)
    assert len(found) == 3
