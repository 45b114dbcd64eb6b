"""The guard: ROME's disabling edits are marked and undone, those of its repairs are not, and what is kept is exact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from errata import editors, models
from errata.benchmarks import bench
from errata.benchmarks.bench import guard
from errata.benchmarks.bench.config import BenchConfig, GuardConfig
from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.storage.journal import Journal

pytestmark = pytest.mark.usefixtures("_cases_read_once", "_nothing_drawn")

DISABLING = {"name": "disabling", "ratio": 2.0, "facts": 0.5}


def config(out: Path, editor: str = "rome", protocol: str = "single", **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": editor, "v_num_grad_steps": 12},
        "model": {"name": "world"},
        "dataset": {"name": "world_first", "shuffle": True, "split": "test", "probes": 1},
        "protocol": {"name": protocol},
        "generation": {"tokens": 0, "fluency_tokens": 0},
        "collapse": {"n_texts": 16, "known_facts": 40},
        "guard": DISABLING,
        "device": "cpu",
        "n_edits": 8,
        "batch_size": 8 if protocol == "single" else 1,
        "out": str(out),
    }
    return BenchConfig.of({**values, **changes})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def counts(folder: Path) -> dict[str, int]:
    return json.loads((folder / "results.json").read_text())["counts"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """ROME's edits, each by itself."""
    return records(bench.run(config(tmp_path_factory.mktemp("single"))))


def test_single_disabling_edits_are_named_with_their_key_and_are_those_that_trip_the_guard(
    alone: list[dict[str, Any]],
) -> None:
    disabling = [record for record in alone if record["disabling"]]
    assert 0 < len(disabling) < len(alone), "the cases show nothing"
    assert [record["case"] for record in alone if record["guard"]["tripped"]] == [r["case"] for r in disabling]
    for record in disabling:
        reason = record["disabling_reason"]
        assert set(reason) == {"perplexity_ratio", "retention", "key_cosine", "key_ratio", "denominator"}
        assert reason["perplexity_ratio"] > 2 or reason["retention"] < 0.5
        assert 0 < reason["denominator"] < 0.5
        assert record["guard"]["reason"]
    assert all(record["disabling_reason"] is None for record in alone if not record["disabling"])


@pytest.mark.parametrize("editor", ["r_rome", pytest.param("c_rome", marks=pytest.mark.slow)])
def test_the_repairs_of_rome_disable_nothing_and_trip_no_guard(editor: str, tmp_path: Path) -> None:
    found = counts(bench.run(config(tmp_path, editor)))
    assert (found["edits"], found["disabling"], found["guard_tripped"]) == (8, 0, 0)


@dataclass(frozen=True)
class GuardedSequence:
    """The folder of a sequence, and the weights behind its last edit."""

    folder: Path
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> GuardedSequence:
    """ROME's edits in a sequence, in batches of one."""
    seen: list[dict[str, torch.Tensor]] = []
    rollback = editors.get("rome").rollback

    def noted(self: Any) -> None:
        seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        rollback(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(editors.get("rome"), "rollback", noted)
        folder = bench.run(config(tmp_path_factory.mktemp("one_by_one"), protocol="sequential"))
    return GuardedSequence(folder, seen[0])


@pytest.mark.parametrize("size", [1, 4])
def test_of_a_sequence_every_edit_that_disables_is_undone_and_the_others_are_made_again_by_halves(
    size: int, alone: list[dict[str, Any]], one_by_one: GuardedSequence, tmp_path: Path
) -> None:
    asked_for = config(tmp_path, protocol="sequential", batch_size=size)
    folder = one_by_one.folder if size == 1 else bench.run(asked_for)
    made = records(folder)
    undone = {record["case"] for record in made if record["status"] == "undone"}
    # More than those can be undone: the limits are the untouched model's, and an edit meets what others have left.
    assert {record["case"] for record in alone if record["disabling"]} <= undone
    assert 0 < len(undone) < len(made)
    assert all("undone by the guard" in record["reason"] for record in made if record["case"] in undone)
    assert counts(folder)["undone"] == len(undone)
    last = json.loads((folder / "curve.json").read_text())[-1]
    assert last["perplexity_ratio"] <= 2
    assert last["retention"] >= 0.5
    asked = [
        q.id for record in Journal(folder / "journal").records() if record.entry for q in record.entry.info.requests
    ]
    assert asked == [record["request"]["id"] for record in made if record["status"] == "ok"]


def test_an_undone_edit_leaves_no_bit_behind(one_by_one: GuardedSequence) -> None:
    """The model behind a guarded sequence, against one that only the kept edits were ever put on."""
    assert counts(one_by_one.folder)["undone"] > 0
    model, _ = models.load("world", device="cpu")
    Ledger.of(model).extend(r.entry for r in Journal(one_by_one.folder / "journal").records() if r.entry is not None)
    assert all(torch.equal(tensor, one_by_one.weights[name]) for name, tensor in model.state_dict().items())


def test_a_guard_that_stops_ends_the_sequence_with_the_edit_that_broke_the_model(
    alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = bench.run(config(tmp_path, protocol="sequential", guard={**DISABLING, "action": "stop"}))
    made = records(folder)
    assert [record["guard"]["tripped"] for record in made] == [False] * (len(made) - 1) + [True]
    assert [record["case"] for record in made] == [record["case"] for record in alone][: len(made)]
    assert counts(folder)["not_made"] == len(alone) - len(made) > 0
    assert any("stopped" in warning for warning in json.loads((folder / "results.json").read_text())["warnings"])


def test_a_guard_that_stops_does_so_within_a_batch_that_is_made_again_by_halves(
    alone: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome = editors.get("rome")
    apply = rome.apply

    def one_at_a_time(self: Any, requests: Any) -> Any:
        if len(requests) > 1:
            raise NumericalError("made up")
        return apply(self, requests)

    monkeypatch.setattr(rome, "apply", one_at_a_time)
    stopping = {**DISABLING, "action": "stop"}
    made = records(bench.run(config(tmp_path, protocol="sequential", guard=stopping, batch_size=len(alone))))
    assert [record["guard"]["tripped"] for record in made] == [False] * (len(made) - 1) + [True]
    assert len(made) < len(alone)


def test_what_the_guard_costs_is_said(tmp_path: Path) -> None:
    guarded = config(tmp_path, "c_rome", "sequential", n_edits=2)
    free = config(tmp_path, "c_rome", "sequential", n_edits=2, guard={"name": "none"})
    speeds = [json.loads((bench.run(each) / "results.json").read_text())["speed"] for each in (guarded, free)]
    assert speeds[0]["guard_seconds"] > 0
    assert speeds[1]["guard_seconds"] is None


def test_a_guard_without_anything_to_measure_is_refused_before_the_first_edit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs texts"):
        bench.run(config(tmp_path, collapse={"n_texts": 0}))
    with pytest.raises(ConfigError, match=r"guard\.facts needs facts"):
        bench.run(config(tmp_path, collapse={"n_texts": 2, "known_facts": 0}))


@pytest.mark.parametrize(
    ("start", "ratio", "facts", "reason"),
    [
        (None, 3.0, 0.4, "3 times the untouched model's, above 2"),
        (guard.Start(8.0, 0.8), 1.5, 0.5, None),
        (guard.Start(4.0, 0.2), 3.0, 1.0, "3 times that of the model before the edits, above 2"),
        (guard.Start(8.0, 0.0), 1.5, 1.0, None),
    ],
)
def test_a_changed_model_takes_the_place_of_the_untouched_one(
    monkeypatch: pytest.MonkeyPatch, start: guard.Start | None, ratio: float, facts: float, reason: str | None
) -> None:
    monkeypatch.setattr(guard, "measured_perplexity", lambda *_: 12.0)
    monkeypatch.setattr(guard, "retention", lambda *_, **__: 0.4)
    limits = GuardConfig(name="disabling", ratio=2.0, facts=0.3)
    asked, before = cast(Any, SimpleNamespace(guard=limits)), cast(Any, SimpleNamespace(guard=4.0))
    found = guard.verdict(asked, before, start)
    assert found is not None
    assert (found.perplexity_ratio, found.facts) == (ratio, facts)
    assert found.reason == (None if reason is None else f"perplexity is {reason}")
