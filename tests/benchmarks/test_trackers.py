"""Trackers are told what a run measures, under its name, and cost it nothing when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.runs import trackers
from errata.benchmarks.runs.trackers import KINDS, TrackedRun, Trackers, flat
from errata.editors.core.errors import ConfigError

Told = list[tuple[str, Any]]


pytestmark = pytest.mark.usefixtures("_nothing_drawn")


class Listener:
    """Stands for a service; writes down what it is told."""

    def __init__(self, told: Told, fails: bool = False) -> None:
        self.told, self.fails = told, fails

    def log(self, edits: int, values: Any) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.told.append(("log", (edits, dict(values))))

    def finish(self) -> None:
        self.told.append(("finish", None))


def config(out: Path, *names: str) -> BenchConfig:
    return BenchConfig.of(
        {
            "editor": {"name": "memit", "v_num_grad_steps": 3},
            "model": {"name": "world"},
            "dataset": {"name": "world", "split": "test"},
            "protocol": {"name": "sequential"},
            "generation": {"tokens": 0, "fluency_tokens": 0},
            "collapse": {"n_texts": 4, "known_facts": 5},
            "device": "cpu",
            "n_edits": 4,
            "batch_size": 1,
            "eval_every": 2,
            "trackers": list(names),
            "out": str(out),
        }
    )


def test_a_run_is_told_to_its_trackers_and_one_that_fails_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: Told = []
    started: list[TrackedRun] = []

    def listening(run: TrackedRun) -> Listener:
        started.append(run)
        return Listener(told)

    monkeypatch.setattr(trackers, "KINDS", {"good": listening, "bad": lambda _: Listener([], fails=True)})
    folder = bench.run(config(tmp_path, "bad", "good"))
    assert [kind for kind, _ in told] == ["log", "log", "log", "finish"]
    assert [value[0] for kind, value in told if kind == "log"] == [2, 4, 4]
    points = json.loads((folder / "curve.json").read_text())
    first = told[0][1][1]
    assert first["perplexity"] == points[0]["perplexity"]
    assert first["summary/probability/reliability"] == points[0]["summary"]["probability"]["reliability"]["mean"]
    assert not any(name.endswith(("low", "high")) for name in first)
    assert caplog.text.count("the tracker bad failed") == 1
    assert (started[0].name, started[0].config["editor.name"]) == (folder.name, "memit")
    assert bench.run(config(tmp_path)) == folder  # trackers name no run


def test_a_tracker_that_cannot_begin_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: TrackedRun) -> Listener:
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "KINDS", {"bad": refused})
    told = Trackers(["bad"], TrackedRun(tmp_path, {}))
    told.log(1, {"perplexity": 2.0})
    told.finish()
    assert caplog.text.count("the tracker bad could not begin") == 1


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        bench.prepare(config(tmp_path, "tensorbord"))


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        Trackers(["wandb"], TrackedRun(tmp_path, {}))


def test_a_configuration_is_flat_by_the_names_of_its_overrides() -> None:
    assert flat({"editor": {"name": "rome", "layers": [1]}, "seed": 0}) == {
        "editor.name": "rome",
        "editor.layers": [1],
        "seed": 0,
    }


def stand_ins(told: Told) -> dict[str, ModuleType]:
    """The packages, as far as they are called."""

    def module(name: str, **entries: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(entries)
        return made

    def init(**options: Any) -> Any:
        told.append(("init", options))
        return SimpleNamespace(log=lambda values: told.append(("log", values)), finish=lambda: told.append(("end", 0)))

    class Writer:
        def __init__(self, folder: str) -> None:
            told.append(("init", {"name": Path(folder).parent.name}))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append(("log", {name: value, "edits": step}))

        def flush(self) -> None: ...

        def close(self) -> None:
            told.append(("end", 0))

    return {
        "wandb": module("wandb", init=init),
        "trackio": module("trackio", init=init),
        "mlflow": module(
            "mlflow",
            set_experiment=lambda _: None,
            start_run=lambda run_name: told.append(("init", {"name": run_name})),
            log_params=lambda _: None,
            log_metrics=lambda values, step: told.append(("log", {**values, "edits": step})),
            end_run=lambda: told.append(("end", 0)),
        ),
        "torch.utils.tensorboard": module("torch.utils.tensorboard"),
        "torch.utils.tensorboard.writer": module("torch.utils.tensorboard.writer", SummaryWriter=Writer),
    }


@pytest.mark.parametrize("name", KINDS)
def test_each_service_is_told_a_number_at_its_edit_under_the_run_s_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    for package, stand_in in stand_ins(told).items():
        monkeypatch.setitem(sys.modules, package, stand_in)
    tracker = Trackers([name], TrackedRun(tmp_path / "run-1", {"seed": 0}))
    tracker.log(7, {"perplexity": 2.5, "retention": None, "ok": True, "worst": float("inf")})
    tracker.finish()
    (_, begun), (_, logged), (end, _) = told
    assert begun["name"] == "run-1"
    assert logged == {"perplexity": 2.5, "edits": 7}
    assert end == "end"
