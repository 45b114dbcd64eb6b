"""Several processes that want the same second moments: one computes them, and others go on where it was killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedProcess
from moment_texts import TEXTS

from errata.editors.core.files.tensor_cache import TensorCache
from errata.editors.core.moments.second_moments import second_moments

# A round starts a process for each of its entries, all wanting the same moments of one cache. An entry is the batch at
# which the process kills itself, 0 for never. A round can do without the locks.


def _begun(make: Callable[[], Any], tokenizer: Any, base: Path, name: str, kill: int, locked: bool) -> ForkedProcess:
    """Begin a process that wants the moments; it writes what it found to NAME.json."""

    def work() -> None:
        if not locked:
            TensorCache.lock = lambda *_: nullcontext()  # type: ignore[method-assign, assignment, return-value]
        batches = 0

        def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
            nonlocal batches
            batches += 1
            time.sleep(0.005)
            if batches == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        options: dict[str, Any] = {"batch_tokens": 64, "block_rows": 100, "save_seconds": 0}
        cache = base / f"cache{name.split('-')[0]}"
        found = second_moments(make(), tokenizer, [0, 1], TEXTS, cache_dir=cache, progress=progress, **options)
        total = found.matrices[1].double().sum().item()
        line = {"computed": found.meta["computed"], "batches": batches, "sum": total}
        (base / f"{name}.json").write_text(json.dumps(line))

    return ForkedProcess(work, base / name)


def _rounds(make: Callable[[], Any], tokenizer: Any, base: Path, rounds: list[tuple[list[int], bool]]) -> list[Any]:
    """Return for every round what each of its processes found, or how it ended."""
    results = []
    for number, (kills, locked) in enumerate(rounds):
        names = [f"{number}-{index}" for index in range(len(kills))]
        begun = [_begun(make, tokenizer, base, name, kill, locked) for name, kill in zip(names, kills, strict=True)]
        codes = [process.wait() for process in begun]
        found = zip(names, codes, strict=True)
        results.append([json.loads((base / f"{name}.json").read_text()) if code == 0 else code for name, code in found])
    return results


@pytest.fixture
def rounds_of(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., list[Any]]:
    """`rounds_of(rounds)`: see `_rounds`."""
    return functools.partial(_rounds, lambda: make_tiny("gpt2"), tiny_tokenizer, tmp_path)


def test_several_processes_compute_a_key_once(
    rounds_of: Callable[..., list[Any]], trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    rounds = trials(1, 50)
    processes = 4 if rounds == 1 else 16
    everybody = [0] * processes
    *results, control = rounds_of([*([(everybody, True)] * rounds), (everybody, False)])
    computations = sum(bool(line["computed"]) for outcome in results for line in outcome if isinstance(line, dict))
    without = sum(line["computed"] != [] for line in control if isinstance(line, dict))
    tried(5, rounds, processes=processes, computations=computations, without_locks=without)
    assert len(results) == rounds == computations
    for outcome in results:
        assert all(isinstance(line, dict) for line in outcome), outcome
        assert sorted(line["computed"] for line in outcome) == [[]] * (processes - 1) + [[0, 1]]
        assert len({line["sum"] for line in outcome}) == 1
    # The control: without locks the same round computes more than once, or a process fails; so the test could fail.
    assert [line["computed"] if isinstance(line, dict) else line for line in control].count([]) < processes - 1


def test_when_the_holder_of_the_lock_is_killed_others_go_on_from_there(
    rounds_of: Callable[..., list[Any]], trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    rounds = 2 * trials(1, 50)
    processes = 4 if rounds == 2 else 16
    # The process that gets the lock dies at its eighth batch, unless less is left to do or it is the last in the list.
    kills = [8] * (processes - 1) + [0]
    (whole,), *results = rounds_of([([0], True), *([(kills, True)] * rounds)])
    assert len(results) == rounds
    landed = 0
    for outcome in results:
        killed = [code for code in outcome if code == -signal.SIGKILL]
        lines = [line for line in outcome if isinstance(line, dict)]
        assert len(killed) + len(lines) == processes, outcome
        assert {line["sum"] for line in lines} == {whole["sum"]}
        (finisher,) = (line for line in lines if line["computed"])
        # It went on from where the killed one had saved, and did not start over.
        assert finisher["batches"] < whole["batches"] if killed else finisher["batches"] == whole["batches"]
        landed += len(killed)
    tried(5, rounds, processes=processes, holders_killed=landed)
    assert landed >= rounds / 2


def test_waiting_for_a_lock_ends_when_it_is_free(tmp_path: Path) -> None:
    """Two threads that name the same entries in different orders neither overlap nor wait for each other for ever."""
    from threading import Thread

    cache, inside, most = TensorCache(tmp_path), [], []

    def work(names: list[str]) -> None:
        for _ in range(5):
            with cache.lock(names):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [Thread(target=work, args=(names,)) for names in (["a", "b"], ["b", "a"], ["b"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(most) == 15
    assert max(most) == 1
