"""What plain `errata train editor=mend model=world` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata import models
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.training import train
from errata.benchmarks.training.loop import held_out_scores
from errata.editors import MEND


@pytest.mark.slow
def test_the_recipe_writes_nine_in_ten_facts_of_subjects_it_was_not_trained_on_and_keeps_what_is_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tokens right, on the test half of the testbed's cases."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    settings = compose("train", ["editor=mend", "model=world", "device=cpu", f"out={tmp_path}"])
    folder = train.run(TrainConfig.of(settings))
    result = train.read(folder)
    assert result["counts"]["held_out"] >= 60
    assert result["counts"]["train"] + result["counts"]["held_out"] == len(world.cases(split="dev"))
    model, tokenizer = models.load("world", device="cpu")
    found = held_out_scores(MEND(model, tokenizer, {"checkpoint": str(folder)}), world.cases(split="test"))
    scores = {name: value["mean"] for name, value in found["teacher_forced"].items()}
    assert min(scores["reliability"], scores["generalization"]) > 0.9, scores
    assert scores["locality"] > 0.89, scores
