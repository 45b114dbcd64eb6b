"""Seconds of a piece of work, by the clock and of the processor, and what two timed paths have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock, and those that all threads of this process spent on a CPU: what neighbours on the machine
    disturb less."""

    seconds: float
    cpu_seconds: float

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def timed(work: Callable[[], T]) -> tuple[T, Timing]:
    """What `work` returns and how long it took, with everything that it has put on a GPU."""
    _synchronise()
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    _synchronise()
    return result, Timing(time.perf_counter() - clock, time.process_time() - processor)


def repeated(work: Callable[[], T], times: int) -> tuple[T, Timing]:
    """As `timed`, the fastest of several times: for work so short that what else the machine does would show."""
    runs = [timed(work) for _ in range(times)]
    return runs[0][0], min((timing for _, timing in runs), key=lambda timing: timing.cpu_seconds)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class TimedPair:
    """One piece of work, our way and the plain way, in one run on one machine.

    Attributes:
        phase: The phase that it belongs to.
        name: What was compared.
        agreement: The largest relative difference of the two results.
        target: The ratio aimed at, where there is one for this device.
        settings: Sizes, and further numbers worth keeping.
    """

    phase: str
    name: str
    ours: Timing
    reference: Timing
    agreement: float
    target: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio_wall(self) -> float:
        return self.reference.seconds / self.ours.seconds

    @property
    def ratio_cpu(self) -> float:
        return self.reference.cpu_seconds / self.ours.cpu_seconds


@dataclass(frozen=True)
class Curve:
    """Seconds per edit, our way and the plain way, as something grows.

    Attributes:
        x: What grows, in words.
        points: One {"x", "ours", "reference", "agreement"} a place, the two in seconds per edit; the reference and
            with it the agreement are None where only ours was measured.
    """

    name: str
    x: str
    points: tuple[dict[str, float | None], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def difference(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    a, b = ours.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm())
