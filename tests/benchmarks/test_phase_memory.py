"""The most memory that each phase of a run has in use."""

from __future__ import annotations

import sys

import pytest

from errata.benchmarks.runs import environment
from errata.benchmarks.runs.phase_memory import PhaseMemory

BYTES = 64 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no peak of a part of a process's life")
def test_a_phase_has_the_peak_of_its_own_and_not_of_one_inside_it() -> None:
    memory = PhaseMemory()
    with memory.phase("outer"):
        with memory.phase("inner"):
            held = b"x" * BYTES
            del held
        with memory.phase("later"):
            pass
    assert memory.peaks["inner"] - memory.peaks["outer"] > 0.9 * BYTES
    assert memory.peaks["inner"] - memory.peaks["later"] > 0.9 * BYTES
    with memory.phase("later"):
        held = b"x" * BYTES
        assert len(held) == BYTES
    assert memory.peaks["later"] - memory.peaks["outer"] > 0.9 * BYTES, "the highest of all its times"


def test_without_a_way_to_begin_anew_there_are_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "take_peak_memory", lambda: None)
    memory = PhaseMemory()
    with memory.phase("edits"):
        pass
    assert memory.peaks == {}
