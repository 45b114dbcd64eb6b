"""Checkpoints of a sequence cost a fixed share of its end, and ask about a sample that a killed run draws again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks import bench
from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.checkpoints import Checkpoints, sample_size, sampled
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.execution import carry_out
from errata.benchmarks.bench.sequence_log import EditOutcome
from errata.benchmarks.bench.sequences import interval_ends
from errata.editors import GRACE
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import score

pytestmark = pytest.mark.usefixtures("_nothing_drawn")


class _Log:
    """The log of a sequence that nothing kills."""

    def parts(self, *_: Any) -> Any:
        return self

    def kept(self, make: Callable[[], Any]) -> Any:
        return make()

    def seconds(self, *_: Any) -> None:
        pass


def _case(i: int) -> Case:
    subject = f"Varland {i}"
    request = EditRequest("The capital of {} is", subject, "Brast", "Oslen", id=str(i))
    wrote, near = request.text, f"The capital of Quelm {i} is"
    probes = (Probe("rewrite", wrote, "Brast", "Oslen"), Probe("neighborhood", near, "Oslen", "Brast"))
    return Case(str(i), request, probes)


def test_twenty_checkpoints_cost_less_than_a_third_of_the_end(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.benchmarks.bench.checkpoints.LEAST", 1)  # as of thousands of edits
    model = make_tiny("llama")
    cases = [_case(i) for i in range(600)]
    settings = BenchConfig.of(
        {
            "editor": {"name": "grace"},
            "model": {"name": "none"},
            "dataset": {"name": "counterfact"},
            "protocol": {"name": "sequential"},
            "eval_every": 30,
            "generation": {"tokens": 0, "fluency_tokens": 0},
        }
    )
    told = Bench(settings, GRACE(model, tiny_tokenizer), cases)
    (plain,) = score(model, tiny_tokenizer, cases[0].probes[:1])
    said = {"nll_target": plain.nll_target, "text": None}
    before = Baseline({case.id: [said, said] for case in cases}, None)
    asked = Checkpoints(told, before, _Log())  # type: ignore[arg-type]
    made = [EditOutcome({})] * 600
    tokens: dict[int, int] = {}

    def count(_module: Any, args: Any, _output: Any) -> None:
        tokens[at] = tokens.get(at, 0) + args[0].shape[0] * args[0].shape[1]

    with hooked(model.model.layers[0].register_forward_hook(count)):
        for at in range(30, 630, 30):
            records, _ = asked.evaluated(made[:at], is_end=at == 600)
            assert len(records) == (600 if at == 600 else 9)
            assert {record["place"] for record in records} <= set(range(at))
    assert sum(tokens.values()) < 1.3 * tokens[600]
    assert max(tokens[at] for at in range(60, 600, 30)) <= tokens[30]

    def refused(*_: Any) -> None:
        raise AssertionError("an untouched model is asked again")

    monkeypatch.setattr(Checkpoints, "_all_untouched", refused)
    asked.evaluated(made[:570], is_end=False)


def test_samples_are_drawn_by_the_seed_and_change_little_from_one_checkpoint_to_the_next() -> None:
    assert [sample_size(None, n, 100) for n in (100, 101, 2000)] == [100, 30, 31]
    assert sample_size(None, 2000, None) == 2000
    assert sample_size(7, 2000, 100) == 7
    assert sampled(5, 7, 2000, 0) == [0, 1, 2, 3, 4]
    first, second = sampled(1000, 30, 2000, 0), sampled(1100, 30, 2000, 0)
    assert first == sampled(1000, 30, 2000, 0) != sampled(1000, 30, 2000, 1)
    assert len(first) == 30
    assert len(set(first) & set(second)) >= 24
    assert sorted(first) == first


def test_a_run_has_checkpoints_where_eval_at_says_and_behind_each_interval(tmp_path: Path) -> None:
    """As far as a short run goes: 1, 5 and 10 of eval_at=[1,5,10,20], and the end of an interval at 3."""
    settings = BenchConfig.of(
        {
            "editor": {"name": "ft_m", "num_steps": 1},
            "model": {"name": "world"},
            "dataset": {"name": "world"},
            "protocol": {"name": "sequential"},
            "n_edits": 11,
            "batch_size": 1,
            "eval_at": [1, 5, 10, 20],
            "generation": {"tokens": 0, "fluency_tokens": 0},
            "collapse": {"n_texts": 2, "tokens": 1, "known_facts": 0},
            "device": "cpu",
            "out": str(tmp_path),
        }
    )
    ready = bench.prepare(settings)
    dated = [replace(case, interval="1 of 2" if i < 3 else "2 of 2") for i, case in enumerate(ready.loaded.cases[:11])]
    folder = carry_out(replace(ready, loaded=replace(ready.loaded, cases=dated)))
    points, results = (json.loads((folder / name).read_text()) for name in ("curve.json", "results.json"))
    assert [point["edits"] for point in points] == [1, 3, 5, 10, 11]
    assert [list(point["intervals"]) for point in points] == [["1 of 2"]] * 2 + [["1 of 2", "2 of 2"]] * 3
    assert {name: part["edits"] for name, part in results["intervals"].items()} == {"1 of 2": 3, "2 of 2": 8}
    each = [part["summary"]["probability"]["reliability"] for part in results["intervals"].values()]
    whole = results["summary"]["probability"]["reliability"]["mean"]
    assert 3 * each[0]["mean"] + 8 * each[1]["mean"] == pytest.approx(11 * whole)
    assert interval_ends(dated[::-1]) == [8]
    assert interval_ends([dated[0], dated[5], dated[1]]) == []  # mixed
    with pytest.raises(ConfigError, match="eval_at: expected ascending numbers"):
        replace(settings, eval_at=(5, 1))


def test_a_curve_says_how_many_edits_a_checkpoint_asked_about(tmp_path: Path) -> None:
    folder = bench.run(
        BenchConfig.of(
            {
                "editor": {"name": "ft_m", "num_steps": 1},
                "model": {"name": "world"},
                "dataset": {"name": "world"},
                "protocol": {"name": "sequential"},
                "n_edits": 6,
                "batch_size": 3,
                "eval_every": 3,
                "eval_sample": 2,
                "generation": {"tokens": 0, "fluency_tokens": 0},
                "collapse": {"n_texts": 3, "tokens": 1, "known_facts": 0},
                "device": "cpu",
                "out": str(tmp_path),
            }
        )
    )
    points, results = (json.loads((folder / name).read_text()) for name in ("curve.json", "results.json"))
    assert [(point["edits"], point.get("scored")) for point in points] == [(3, 2), (6, None)]
    said = results["evaluation"]
    assert said["checkpoint_sample"] == 2
    assert 0 < said["checkpoint_perplexity_tokens"] < said["perplexity_tokens"]
    assert points[0]["perplexity_ratio"] > 0
