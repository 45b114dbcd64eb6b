"""An edit's seconds do not hold what comes once for a model: contexts, second moments, factors."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from errata.benchmarks.bench.run_results import _speed
from errata.editors import ROME
from errata.editors.core.request import EditRequest
from errata.editors.core.work_clock import ONE_OFF, WorkClock

_LETTERS = random.Random(0)
TEXT = ["".join(_LETTERS.choices("abcdefghij ,.XYZ0123", k=60)) for _ in range(60)]


def test_the_clock_stands_still_during_a_one_off_cost_and_laps_name_it() -> None:
    clock = WorkClock()
    clock.start()
    before, wall = clock(), time.perf_counter()
    with clock.one_off("moments"), clock.one_off("factors"):  # the inner one belongs to the outer
        time.sleep(0.05)
    wall = time.perf_counter() - wall
    assert clock() - before < wall - 0.045
    lap = clock.lap()
    assert list(lap.one_off) == ["moments"]
    assert lap.one_off["moments"] == pytest.approx(wall, abs=0.02)
    assert clock.lap().one_off == {}


def test_the_first_edit_names_its_one_off_costs_and_the_second_has_none(make_tiny: Any, tiny_tokenizer: Any) -> None:
    fields = {"layers": [1], "v_num_grad_steps": 2, "context_template_length_params": [[2, 1]]}
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, fields, text=TEXT)
    request = EditRequest("The capital of {} is", subject="Varland", target=" Brast")
    first, second = (editor.compute(request)[0].diagnostics[0] for _ in range(2))
    assert all(first[f"{name}_seconds"] > 0 for name in ONE_OFF)
    assert not any(f"{name}_seconds" in second for name in ONE_OFF)
    assert second["cpu_seconds"] > 0
    assert first["seconds"] > 0


def test_a_run_s_seconds_per_edit_leave_one_off_costs_out() -> None:
    first = {"case": "a", "edit": 70.0, "method_moments_seconds": 60.0, "method_cpu_seconds": 8.0}
    speed = _speed([first, {"case": "b", "edit": 12.0, "method_cpu_seconds": 10.0}])
    assert (speed["seconds_per_edit"], speed["one_off_seconds"], speed["cpu_seconds_per_edit"]) == (11.0, 60.0, 9.0)
    assert speed["total_seconds"] == 82.0
