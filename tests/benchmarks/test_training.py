"""Training an editor: it stops and goes on without a trace, is done once, and is found again by later edits."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch
from forked import output_of
from killed_runs import Points, kill, spare
from typed_commands import run

from errata import editors, models
from errata.benchmarks import bench
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.train_config import RowsConfig, Schedule, TrainConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.training import loop, train
from errata.benchmarks.training.examples import ExampleSampler, fitting, split
from errata.benchmarks.training.loop import CHECKPOINT
from errata.cli import overrides
from errata.editors.core.errors import CheckpointError, ConfigError, DatasetError, NumericalError
from errata.editors.core.families.learned_editor import TrainedEditor
from errata.editors.core.files.tensor_cache import TensorCache
from errata.editors.core.progress import Progress
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

QUICK: dict[str, Any] = {
    "editor": {
        "name": "mend", "layers": [4], "rank": 8, "accumulate_bs": 2, "lr": 1e-3, "lr_lr": 1e-3, "edit_lr": 1e-3,
    },
    "model": {"name": "world"},
    "dataset": {"name": "world", "split": "dev"},
    "n_cases": 14,
    "held_out": 3,
    "steps": 6,
    "eval_every": 2,
    "checkpoint_every": 1,
    "n_texts": 5,
    "decay": 0.0,
    "rows": {"neighbors": 3, "alike": 0, "others": 2, "texts": 1, "retargeted": 0.0, "renamed": 0.0},
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is trained yet."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(out: Path, **values: Any) -> TrainConfig:
    return TrainConfig.of(
        {**QUICK, "out": str(out), **values, "editor": {**QUICK["editor"], **values.get("editor", {})}}
    )


def network(folder: Path) -> dict[str, bytes]:
    """The files of the trained network, by name: of its content."""
    return {path.name: path.read_bytes() for path in folder.glob("mend*") if path.suffix != ".lock"}


def history(folder: Path) -> list[dict[str, Any]]:
    return train.read(folder)["history"]


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


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_training_that_is_stopped_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    checkpoint_every: int, tmp_path: Path
) -> None:
    whole = train.run(config(tmp_path / "whole", checkpoint_every=checkpoint_every))
    stops = [1, 2, 3, 5]
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
    count = trials(4, 60)
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
        train.run(config(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
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
            train.run(config(tmp_path))
    assert len(calls) == 3
    torn = train.run(config(tmp_path))
    assert network(torn) == network(train.run(config(tmp_path / "whole")))


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


# --- what is learned from -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return world.cases(split="dev")[:60]


def test_cases_are_held_out_by_subject_and_by_seed(cases: list[Case]) -> None:
    parts = split(cases, 10, 0)
    assert 10 <= len(parts.held_out) < 20
    assert len(parts.train) + len(parts.held_out) == len(cases)
    assert not {c.request.subject for c in parts.train} & {c.request.subject for c in parts.held_out}
    assert split(cases, 10, 0) == parts
    assert split(cases, 10, 1) != parts
    with pytest.raises(DatasetError, match="leave none to train on"):
        split(cases, 60, 0)


def test_lessons_depend_on_seed_and_step_alone_and_take_every_case_once_an_epoch(cases: list[Case]) -> None:
    _, tokenizer = models.load("world", device="cpu")

    rows = RowsConfig(texts=1, retargeted=0, renamed=0)

    def made(seed: int = 0) -> ExampleSampler:
        return ExampleSampler(cases, ["One text of several words.", "Another"], tokenizer, rows, seed)

    first = made()
    steps = [first.batch(step, 5, 2) for step in range(6)]
    assert [len(step) for step in steps] == [5] * 6
    assert all(len(edit) == 2 for step in steps for edit in step)
    requests = [lesson.request for step in steps for edit in step for lesson in edit]
    assert sorted(request.text for request in requests) == sorted(case.request.text for case in cases)
    assert made().batch(4, 5, 2) == steps[4]
    assert made(1).batch(4, 5, 2) != steps[4]


def test_a_lesson_asks_the_edit_and_a_paraphrase_and_keeps_neighbours_other_prompts_and_text(cases: list[Case]) -> None:
    _, tokenizer = models.load("world", device="cpu")
    text = "We read that no one knows."
    rows = RowsConfig(neighbors=2, alike=0, others=1, texts=1, text_tokens=4, retargeted=0, renamed=0)
    lessons = ExampleSampler(cases, [text], tokenizer, rows, 0)
    for ((lesson,),) in (lessons.batch(step, 1, 1) for step in range(20)):
        case = next(case for case in cases if case.request is lesson.request)
        said = [tokenizer.decode([*row.ids, row.answer[-1]]) for row in lesson.answer_rows]
        wanted = [f"{p.prompt} {p.target}" for p in case.probes if p.kind == "paraphrase"]
        assert said[0] == f"{case.request.text} {case.request.target}"
        assert len(said) == 2
        assert said[1] in wanted
        kept = [tokenizer.decode(row.ids) for row in lesson.locality_rows]
        kinds = {"neighborhood": 2, "distracting_neighborhood": 1, "attribute": 1}
        near = [p.prompt for p in case.probes if p.kind in kinds]
        there = [p.kind for p in case.probes]
        assert len(kept) == sum(min(count, there.count(kind)) for kind, count in kinds.items()) + 2
        assert all(any(k.startswith(prompt) for prompt in near) for k in kept[:-2])
        assert any(kept[-2].startswith(other.request.text) for other in cases if other is not case)
        assert kept[-1] in text
        assert len(lesson.locality_rows[-1].positions) == 4
        for row, said_so in zip(lesson.locality_rows[:-1], kept[:-1], strict=True):
            assert tokenizer.decode(row.ids[: row.first + 1]) in (*near, *(other.request.text for other in cases)), (
                said_so
            )


def test_cases_that_the_model_cannot_be_asked_are_left_out_by_name(cases: list[Case]) -> None:
    from dataclasses import replace

    from errata.evaluate.probes import Probe

    model, tokenizer = models.load("world", device="cpu")
    long = replace(cases[0], id="long", probes=(Probe("paraphrase", "word " * 500, "a", "b"),))
    kept, dropped = fitting([long, *cases[:2]], model, tokenizer)
    assert kept == cases[:2]
    assert [entry.record for entry in dropped] == ["long"]
    assert "at most 128 tokens" in dropped[0].reason


# --- the command --------------------------------------------------------------------------------------------------


def flat(values: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        plain = value if isinstance(value, str) else json.dumps(value)  # a text is typed without quotes
        found += flat(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}={plain}"]
    return found


def typed(out: Path, **values: Any) -> list[str]:
    """The quick configuration as it is typed."""
    settings = {**QUICK, **values}
    editor = {name: value for name, value in settings["editor"].items() if name != "name"}
    rest = {k: v for k, v in settings.items() if k not in ("editor", "model", "dataset")}
    return [*flat({"editor": editor}), *flat(rest), f"out={out}"]


def test_the_command_trains_says_so_and_is_printed_such_that_it_repeats(tmp_path: Path) -> None:
    shown = run("train", *typed(tmp_path))
    (folder,) = tmp_path.glob("mend-*")
    assert str(folder) in shown
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines[:3]] == [2, 4, 6]
    assert all("reliability" in line and "locality" in line for line in lines)
    assert (folder / train.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not (folder / f"{CHECKPOINT}.json").exists()
    result = train.read(folder)
    words = shlex.split(result["command"])
    assert words[:2] == ["errata", "train"]
    again = TrainConfig.of(compose("train", overrides.translated(words[2:], "train")))
    assert train.prepare(again).folder.path == folder
    assert result["counts"] == {"train": 11, "held_out": 3, "dropped": 0, "steps": 6, "edits": 12}
    assert result["digests"]["settings"].startswith(folder.name[-12:])


def test_a_line_leaves_out_what_was_not_measured() -> None:
    right, preferred = {"reliability": {"mean": 0.5}, "locality": {"mean": 0.25}}, {"reliability": {"mean": 1.0}}
    entry = {"step": 2, "losses": {}, "held_out": {"teacher_forced": right, "probability": preferred}}
    assert train.line(entry).endswith("held out: reliability 50.0% (100.0%), locality 25.0%")


def test_help_shows_every_field_of_training() -> None:
    shown = run("train", "--help")
    names = [field.name for kind in (TrainConfig, RowsConfig) for field in dataclasses.fields(kind)]
    assert [name for name in names if not re.search(rf"^ *{name}:", shown, flags=re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["editor=rome"], "rome needs no training"),
        (["editor.checkpoint=somewhere"], "training begins with a new network"),
        (["steps=0"], "steps: expected at least 1, got 0"),
        (["decay=2"], "decay: expected a share"),
        (["rows.neighbors=-1"], "rows.neighbors: expected at least 0"),
        (["dataset.probes=2"], "dataset.probes is for errata bench"),
        (["step=3"], "did you mean 'steps'"),
        (["held_out=5000"], "leave none to train on"),
        (["editor.layers=[9]"], "layers"),
        (["protocol=single"], "protocol"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DatasetError), match=said):
        run("train", *arguments, "device=cpu", f"out={tmp_path}")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


# --- and then ------------------------------------------------------------------------------------------------------


def test_a_bench_takes_what_was_trained_and_is_another_run_once_that_is_trained_anew(tmp_path: Path) -> None:
    editor = {name: QUICK["editor"][name] for name in ("name", "layers", "rank")}
    values = {
        "editor": editor, "model": {"name": "world"}, "dataset": {"name": "world", "split": "test"}, "n_edits": 2,
        "out": str(tmp_path / "runs"), "generation": {"tokens": 0, "fluency_tokens": 0}, "device": "cpu",
        "collapse": {"n_texts": 1, "known_facts": 2},
    }  # fmt: skip
    settings = BenchConfig.of(values)
    with pytest.raises(CheckpointError, match="errata train editor=mend"):
        bench.run(settings)
    first = train.run(config(tmp_path))
    before = bench.prepare(settings).folder.key
    records = [json.loads(line) for line in (bench.run(settings) / "records.jsonl").read_text().splitlines()]
    entry = TensorCache(first).load("mend")
    assert entry is not None
    assert {record["diagnostics"]["checkpoint"] for record in records} == {entry.meta["checkpoint"]}
    assert bench.prepare(settings).folder.key == before
    train.run(config(tmp_path, seed=1))
    assert bench.prepare(settings).folder.key != before
    named = BenchConfig.of({**values, "editor": {**editor, "checkpoint": str(first)}})
    key = bench.prepare(named).folder.key
    train.run(config(tmp_path, seed=2))
    assert bench.prepare(named).folder.key == key


def test_the_command_that_a_bench_names_trains_what_it_looks_for(tmp_path: Path) -> None:
    values = {
        "editor": {"name": "mend", "rank": 4}, "model": {"name": "world"}, "n_edits": 1, "device": "cpu",
        "dataset": {"name": "world", "split": "test"}, "out": str(tmp_path / "runs"),
        "generation": {"tokens": 0, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 0},
    }  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        bench.run(BenchConfig.of(values))
    said = re.search(r"train one: (errata train .*?), or name", str(caught.value))
    assert said is not None
    assert said[1] == "errata train editor=mend model=world editor.rank=4"
    run(*shlex.split(said[1])[1:], "steps=1", "n_cases=12", "held_out=3", "device=cpu", f"out={tmp_path}")
    assert (bench.run(BenchConfig.of(values)) / "results.json").is_file()


def test_every_method_that_is_trained_can_be(tmp_path: Path) -> None:
    trained = [name for name in editors.METHODS if issubclass(editors.get(name), TrainedEditor)]
    assert trained == ["mend"]
    for name in editors.METHODS:
        if name not in trained:
            with pytest.raises(ConfigError, match="needs no training"):
                train.prepare(TrainConfig.of({**QUICK, "editor": {"name": name}, "out": str(tmp_path)}))
