"""Where the numbers of a run go as it runs, beside its folder: one small protocol, and four services behind it.

    errata bench ... trackers=tensorboard

Off by default. A tracker is told the checkpoints of a sequence and the final scores. It decides nothing: it is no part
of what names a run, and one that fails is left with a warning, while the run goes on. `wandb` and `mlflow` send to
wherever their own settings say; `tensorboard` and `trackio` write to this machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

logger = logging.getLogger(__name__)

PROJECT = "errata"


class Tracker(Protocol):
    """What is told of a run."""

    def log(self, edits: int, values: Mapping[str, float]) -> None:
        """Send the values measured after `edits` edits."""

    def finish(self) -> None:
        """The run has ended, or is left."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at the start: the folder, whose name is the run's and the same when it goes on, and the
    configuration, flat."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(self, edits: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, edits)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        self._run: Any = import_module("wandb").init(
            project=PROJECT, name=run.name, id=run.name[-64:], resume="allow", config=dict(run.config), reinit=True
        )

    def log(self, edits: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "edits": edits})

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        service = import_module("trackio")
        self._run: Any = service.init(project=PROJECT, name=run.name, resume="allow", config=dict(run.config))

    def log(self, edits: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "edits": edits})

    def finish(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        self._mlflow: Any = import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=run.name)
        self._mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})

    def log(self, edits: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=edits)

    def finish(self) -> None:
        self._mlflow.end_run()


KINDS: Mapping[str, Callable[[TrackedRun], Tracker]] = MappingProxyType(
    {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
)


def check(names: Sequence[str]) -> None:
    """Refuse a name that is no tracker's.

    Raises:
        ConfigError: names the nearest.
    """
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"trackers: unknown tracker {name!r}{did_you_mean(name, KINDS)}")


class Trackers:
    """Some of them as one; none is nothing.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        check(names)
        self._kept: dict[str, Tracker] = {}
        for name in names:
            try:
                self._kept[name] = KINDS[name](run)
            except ModuleNotFoundError as error:
                self.finish()
                raise ConfigError(
                    f"trackers: {name} is not installed ({error.name} is missing): pip install -e '.[trackers]' or "
                    f"{name}; trackers=[] does without"
                ) from error
            except Exception as error:  # noqa: BLE001 - as below
                logger.warning("the tracker %s could not begin and is told nothing: %r", name, error)

    def log(self, edits: int, values: Mapping[str, Any]) -> None:
        """What is a finite number among the values, nested ones by their path."""
        numbers = dict(_numbers(values))
        self._each(lambda tracker: tracker.log(edits, numbers))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self._kept.clear()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._kept.items()):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a service fails by, the run is worth more
                logger.warning("the tracker %s failed and is told nothing more: %r", name, error)
                del self._kept[name]


def _numbers(values: Mapping[str, Any], path: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            # Of {mean, low, high, n} the mean stands for itself.
            inner = {"": value["mean"]} if "mean" in value else value
            found += _numbers(inner, f"{path}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((f"{path}{name}".rstrip("/"), float(value)))
    return found


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A configuration by the names of its overrides."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found
