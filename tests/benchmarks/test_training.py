"""Training an editor: it stops and goes on without a trace, is done once, and keeps the best network."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import killed_runs
import pytest
import torch
from forked import output_of
from killed_runs import Points, kill, spare
from quick_training import QUICK, config, history, network

import errata
from errata import editors, models
from errata.benchmarks.bench.train_config import Schedule, TrainConfig
from errata.benchmarks.training import loop, train
from errata.editors.core.errors import ArchitectureError, NumericalError
from errata.editors.core.files.tensor_cache import TensorCache
from errata.editors.core.progress import Progress
from errata.editors.core.request import EditRequest
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.positions import Where
from errata.evaluate.probes import Case, Probe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is trained yet."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- stopping and going on ----------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def stopping(steps: list[int]) -> Progress:
    """Progress that ends the run at each of these steps, once."""

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if what == "steps" and done in steps:
            steps.remove(done)
            raise _Stop

    return progress


@pytest.mark.parametrize(("checkpoint_every", "stops"), [(1, [2, 3]), pytest.param(4, [3, 5], marks=pytest.mark.slow)])
def test_training_that_is_stopped_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    checkpoint_every: int, stops: list[int], tmp_path: Path
) -> None:
    stops = list(stops)
    whole = train.run(config(tmp_path / "whole", checkpoint_every=checkpoint_every))
    settings = config(tmp_path / "torn", checkpoint_every=checkpoint_every)
    while stops:
        with pytest.raises(_Stop):
            train.run(settings, progress=stopping(stops))
    torn = train.run(settings)
    assert network(torn) == network(whole)
    assert len(network(whole)) == 2
    assert history(torn) == history(whole)


def _trained(folder: Path, place: int | None = None) -> int:
    """Train in a fork, which is killed at this point of its writes; how that ended, as `forked` of killed_runs.py."""

    def work() -> None:
        points = Points(kill if place is not None else None, -1 if place is None else place)
        points.install()
        train.run(config(folder, steps=3))
        folder.with_suffix(".points").write_text(str(len(points.seen)))

    return killed_runs.forked(work)


def _killed_and_finished(out: Path, trials: int) -> None:
    """Train undisturbed, then in trials that are killed and go on; print the point of each kill that landed."""
    spare()
    assert _trained(out / "whole") == 0
    count = int((out / "whole.points").read_text())
    trials = min(trials, count)
    # Later runs find in the cache what the first has left, and pass fewer points: the last may not be reached.
    for place in [(2 * trial + 1) * count // (2 * trials) for trial in range(trials)]:
        if _trained(out / str(place), place) == -signal.SIGKILL:
            sys.stdout.write(f"{place}\n")
        assert _trained(out / str(place)) == 0


def test_training_that_is_killed_at_a_write_goes_on_to_the_same_bytes(
    tmp_path: Path, trials: Callable[..., int]
) -> None:
    """SIGKILL just before or after an fsync or a rename, or half way through a write; at points spread over a run."""
    count = trials(3, 60)
    said = output_of(lambda: _killed_and_finished(tmp_path, count), tmp_path / "process")
    killed = said.split()
    assert len(killed) >= 3, said
    (whole,) = (tmp_path / "whole").iterdir()
    for place in killed:
        (folder,) = (tmp_path / place).iterdir()
        assert network(folder) == network(whole)
        assert history(folder) == history(whole)


def test_a_finished_training_is_not_repeated_and_is_put_back_into_a_cache_that_lost_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train.run(config(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    model, tokenizer = models.load("world", device="cpu")
    fields = {
        **{name: QUICK["editor"][name] for name in ("layers", "rank")},
        "combine": False,
    }  # the testbed's settings
    method: Any = editors.get("mend")
    assert method(model, tokenizer, fields).checkpoint is not None
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr(loop.Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert train.run(config(tmp_path)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"} == files
    assert method(model, tokenizer, fields).checkpoint is not None


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, second, other = (
        train.run(config(tmp_path / name, seed=seed, steps=2)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert network(first) == network(second)
    assert network(first) != network(other)


def test_edits_of_a_step_are_taken_in_pieces_where_memory_is_short(tmp_path: Path) -> None:
    unshared = {"norm": False}  # else the later pieces see statistics that have the earlier ones alone
    whole = train.run(config(tmp_path, editor=unshared, steps=2))
    parts = train.run(config(tmp_path, editor=unshared, steps=2, edits_at_once=1))
    for mine, theirs in zip(history(whole), history(parts), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-6)


def test_a_loss_that_is_not_finite_ends_training_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = editors.get("mend")
    original, calls = method.loss, []

    def exploding(self: Any, edits: Any) -> Any:
        loss, parts = original(self, edits)
        calls.append(1)
        return (loss * torch.nan if len(calls) == 3 else loss), parts

    with monkeypatch.context() as patched:
        patched.setattr(method, "loss", exploding)
        with pytest.raises(NumericalError, match=r"gradient of training step 2 is not finite; lower editor\.lr"):
            train.run(config(tmp_path, steps=3))
    assert len(calls) == 3
    torn = train.run(config(tmp_path, steps=3))
    assert network(torn) == network(train.run(config(tmp_path / "whole", steps=3)))


def test_an_edit_that_the_method_refuses_counts_with_the_untouched_scores(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor: Any = editors.MEND(make_tiny("gpt2"), tiny_tokenizer, {"layers": [1], "rank": 4}, trained=False)
    made = editor.compute

    def refusing(requests: Any) -> Any:
        if any(request.subject == "Varland" for request in requests):
            raise NumericalError("no finite edit")
        return made(requests)

    monkeypatch.setattr(editor, "compute", refusing)
    probe = Probe("rewrite", "The capital of Varland is", "Oslen", "Brast")
    cases = [Case(name, EditRequest("The capital of {} is", name, "Oslen"), (probe,)) for name in ("Varland", "Tarvos")]
    alone = loop.held_out_scores(editor, cases[1:])["teacher_forced"]["reliability"]["mean"]
    untouched = loop.held_out_scores(editor, cases[:1])["teacher_forced"]["reliability"]["mean"]
    both = loop.held_out_scores(editor, cases)["teacher_forced"]["reliability"]
    assert (both["mean"], both["n"]) == ((alone + untouched) / 2, 2)


def test_sequences_are_trained_stopped_and_found_by_the_same_loop(tmp_path: Path) -> None:
    own = {"layers": [4], "rank": 8}
    fields = {"name": "rledit", **own, "accumulate_bs": 2, "edit_bs": 2, "edit_lr": 1e-2, "lr": 1e-3}
    values = {**QUICK, "steps": 2, "editor": fields}
    whole = train.run(TrainConfig.of({**values, "out": str(tmp_path / "whole")}))
    torn = TrainConfig.of({**values, "out": str(tmp_path / "torn")})
    with pytest.raises(_Stop):
        train.run(torn, progress=stopping([1]))
    files = [{p.name: p.read_bytes() for p in folder.glob("rledit*")} for folder in (whole, train.run(torn))]
    assert files[0] == files[1]
    assert len(files[0]) >= 2
    best = train.read(whole)["best"]
    assert set(best["losses"]) == {"edit", "locality", "gradient"}
    editor: Any = editors.get("rledit")(*models.load("world"), {**own, "accumulate_bs": 9})
    assert editor.checkpoint in str(files[0].get("rledit.json"))


# --- when to stop, and what is kept -------------------------------------------------------------------------------


def test_training_stops_when_held_out_success_no_longer_grows_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    successes = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    monkeypatch.setattr(loop, "success", lambda _: next(successes))
    folder = train.run(config(tmp_path, steps=20, patience=2))
    result = train.read(folder)
    assert [entry["success"] for entry in result["history"]] == [0.5, 0.7, 0.7, 0.6]
    assert (result["best"]["step"], result["counts"]["steps"]) == (4, 8)
    entry = TensorCache(folder).load("mend")
    assert entry is not None
    assert entry.meta["training"]["step"] == 4


def test_training_teaches(tmp_path: Path) -> None:
    result = train.read(
        train.run(config(tmp_path, steps=40, eval_every=20, checkpoint_every=20, editor={"edit_lr": -1e-3}))
    )
    before, after = result["before"]["teacher_forced"], result["best"]["held_out"]["teacher_forced"]
    first, last = result["history"][0]["losses"], result["history"][-1]["losses"]
    assert last["edit"] < first["edit"]
    assert after["reliability"]["mean"] > before["reliability"]["mean"]


@pytest.mark.parametrize(("decay", "rates"), [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 0.5]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_learning_rates_fall_over_the_share_of_the_steps_that_is_asked_for(decay: float, rates: list[float]) -> None:
    schedule = Schedule(steps=4, decay=decay)
    assert [schedule.rate(step) for step in range(4)] == rates


def test_a_model_that_is_steered_at_the_last_token_is_refused(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, nothing = make_tiny("gpt2"), cast(Any, None)
    contrasts = [Contrast("The capital of Varland is", "Oslen.", "Brast.")]
    errata.steer(model, tiny_tokenizer, contrasts, layer=1, where=Where("last")).apply()
    with pytest.raises(ArchitectureError, match="undo that edit, train"):
        loop.Trainer(cast(Any, SimpleNamespace(model=model)), nothing, [], nothing, tmp_path)
