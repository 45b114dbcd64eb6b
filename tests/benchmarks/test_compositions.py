"""Edits that meet a compression on the bundled testbed: both orders, what a run records, and how it goes on."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata.benchmarks import bench, world
from errata.benchmarks.bench import composition, forgetting
from errata.benchmarks.bench.composition_config import ComposeConfig
from errata.benchmarks.bench.composition_log import STEPS
from errata.benchmarks.bench.config import BenchConfig, ProtocolConfig
from errata.benchmarks.reports import orders, publish, report, survival
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.cli import main
from errata.editors.core.errors import ConfigError
from errata.editors.core.interventions.unlearning import UnlearningConfig

pytestmark = pytest.mark.usefixtures("_nothing_drawn")
ORDERS = ("edit-compress", "compress-edit")


def config(out: Path, order: str = ORDERS[0], **said: Any) -> BenchConfig:
    return BenchConfig.of(
        {
            "editor": {"name": "ft_m", "num_steps": 12, "lr": 5e-3},
            "model": {"name": "world"},
            "dataset": {"name": "world_counterfact", "probes": 1},
            "protocol": {"name": "compose"},
            "device": "cpu",
            "n_edits": 2,
            "out": str(out),
            "generation": {"tokens": 0, "fluency_tokens": 0},
            "collapse": {"n_texts": 2, "known_facts": 3},
            "guard": {"name": "perplexity", "ratio": 50.0, "n_texts": 2, "facts": 0.0},
            "compose": {"order": order, "compress": {"name": "magnitude", "sparsity": 0.5}, **said},
        }
    )


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compositions")
    return [bench.run(config(root, order)) for order in ORDERS]


def test_a_run_says_what_the_model_is_behind_each_step(both: list[Path]) -> None:
    edited_first, compressed_first = (results(folder)["composition"] for folder in both)
    assert [*edited_first["steps"]] == ["edit"]
    assert [*compressed_first["steps"]] == ["compress"]
    alone = edited_first["steps"]["edit"]
    assert alone["average_bits"] is None
    assert alone["summary"]["set_f1"]["reliability"]["mean"] == 1
    assert compressed_first["steps"]["compress"]["average_bits"] == pytest.approx(8.5, abs=0.01)
    assert edited_first["average_bits"] == pytest.approx(compressed_first["average_bits"], abs=0.01)
    for folder in both:
        summary = results(folder)["summary"]
        assert {"probability", "teacher_forced", "set_f1"} <= summary.keys()
        assert results(folder)["before"]["set_f1"]["locality"]["mean"] == 1
        assert results(folder)["sequence"]


def test_a_model_that_went_through_a_merged_folder_has_the_same_scores(
    both: list[Path], survived: tuple[Path, dict[str, Any]]
) -> None:
    _, found = survived
    own = results(both[0])
    alone = own["composition"]["steps"]["edit"]["summary"]
    for summary, step in ((alone, "float32"), (own["summary"], "float32 magnitude")):
        for scoring in ("probability", "teacher_forced"):
            for metric in ("reliability", "generalization", "locality"):
                expected = summary[scoring][metric]["mean"]
                assert survival.mean(found, step, scoring, metric) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes(
    both: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = both[1]
    folder = run_with_stops(config(tmp_path, ORDERS[1]), monkeypatch)
    assert folder != whole
    for name in (RECORDS, STEPS):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert results(folder)["composition"] == results(whole)["composition"]


def run_with_stops(made: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that was stopped again and again."""
    monkeypatch.setattr(Stop, "check", _stopping(Stop.check, itertools.count()))
    for _ in range(60):
        try:
            return bench.run(made)
        except Stopped:
            continue
    raise AssertionError("the run has not ended")


def _stopping(check: Any, numbers: Any) -> Any:
    """Return a check that stops a run at every sixth call: a start needs three before it measures something new."""

    def checked(stop: Stop) -> None:
        check(stop)
        if next(numbers) % 6 == 5:
            raise Stopped("stopped by the test")

    return checked


@pytest.mark.slow
def test_what_happens_to_a_compression_that_is_not_last(both: list[Path], tmp_path: Path) -> None:
    kept, left = (results(bench.run(config(tmp_path, ORDERS[1], end=end))) for end in ("keep", "none"))
    again = results(both[1])
    assert kept["composition"]["average_bits"] == pytest.approx(again["composition"]["average_bits"], abs=0.01)
    assert left["composition"]["average_bits"] > again["composition"]["average_bits"]
    perplexities = {run["collapse"]["perplexity_after"] for run in (kept, left, again)}
    assert len(perplexities) == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"order": "edit-edit"}, "compose.order: expected edit, compress and unlearn"),
        ({"order": "compress"}, "each at most once and edit always"),
        ({"order": "edit-unlearn"}, "compose.unlearn.name is missing"),
        ({"compress": {"name": "wander"}}, "did you mean 'wanda'"),
        ({"compress": {"name": "wanda", "sparsty": 0.5}}, r"compose.compress.sparsty; did you mean 'sparsity'"),
        ({"compress": {"name": "wanda", "sparsity": 2}}, r"^compose.compress.sparsity: expected a share"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.prepare(config(tmp_path, **said))


def test_a_guard_charges_edits_with_what_they_do_to_the_compressed_model(both: list[Path]) -> None:
    for folder, step in zip(both, ("edit", "compress"), strict=True):
        found = results(folder)
        records = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
        (said,) = {json.dumps(record["guard"]) for record in records}
        # Both edits are one batch: behind it stands the model that was measured behind the first step, or its edit.
        ratio = json.loads(said)["perplexity_ratio"]
        measured = found["composition"]["steps"][step]["perplexity_ratio"]
        if step == "edit":
            assert ratio == pytest.approx(measured)
        else:
            lines = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
            assert next(line for line in lines if line["step"] == "guard")["perplexity"] > 1
            assert ratio != pytest.approx(measured)
        assert all(record["status"] == "ok" for record in records)


def test_one_number_is_one_run_however_it_is_written() -> None:
    one, other = (ComposeConfig(unlearn={"name": "gd", "alpha": value, "lr": 0.5}) for value in (40, 4e1))
    assert repr(one) == repr(other)
    assert "'alpha': 40," in repr(other)


def test_fields_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench.prepare(config(tmp_path, "edit-unlearn", unlearn={"name": "ga", "forget": "-"}))
    assert "compose.compress has no effect: compose.order=edit-unlearn does not name it" in caplog.messages
    caplog.clear()
    bench.prepare(config(tmp_path))
    assert "no effect" not in caplog.text
    bench.prepare(replace(config(tmp_path), protocol=ProtocolConfig("batch")))
    assert "compose.compress has no effect: protocol=batch does not read it" in caplog.messages


def test_the_texts_of_a_compression_are_part_of_a_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    names = set()
    for words in ("one text", "another text"):
        text.write_text(words)
        prepared = bench.prepare(config(tmp_path, compress={"name": "wanda", "text": str(text)}))
        names.add(prepared.folder.key)
        assert prepared.settings["interventions"].keys() == {"compress.text"}
    assert len(names) == 2
    assert composition.intervention_configs(config(tmp_path))["compress"].seed == 0


def test_reports_show_both_orders(both: list[Path], tmp_path: Path) -> None:
    runs = [report.read(folder) for folder in both]
    (pair,) = orders.pairs(runs)
    assert pair.label == "FT-M, magnitude"
    table = orders.order_table(runs, "probability")
    assert table is not None
    assert table.heads[3:5] == ["edited, then compressed", "compressed, then edited"]
    row = next(cells for cells in table.rows if cells[1] == "Reliability, set F1")
    first, second, error, sensitivity = map(float, row[3:])
    assert error == pytest.approx(100 - max(first, second))
    assert sensitivity == pytest.approx(abs(first - second))
    assert "compose.end=again" in " ".join(table.notes)
    console = Console(file=io.StringIO(), width=200)
    report.show(runs, console)
    assert "Both orders" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "edited, then compressed" in report.markdown(runs[0], [])
    files = publish.publish(both[0].parent, tmp_path / "report")
    assert {"orders.md", "index.html"} <= {path.name for path in files}
    assert "order sensitivity" in files[0].read_text()
    assert not orders.pairs([{"names": runs[0]["names"], "config": {}}])
    more = [copy.deepcopy(run) for run in runs]
    for run, sparsity in zip((*runs, *more), (0.25, 0.25, 0.4, 0.4), strict=True):
        for given in (run["config"]["compose"]["compress"], run["composition"]["compress"]):
            given["sparsity"] = sparsity
    assert [pair.label for pair in orders.pairs([*runs, *more])] == ["FT-M, magnitude 25 %", "FT-M, magnitude 40 %"]


def test_reports_show_what_is_left_of_the_texts_to_forget(both: list[Path]) -> None:
    runs = [copy.deepcopy(report.read(folder)) for folder in both]
    sets = {"texts": 3, "asked": 2}

    def forgetting(loss: float, forget: float) -> dict[str, Any]:
        found = {"forget": {"loss": loss, "answers": forget}, "retain": {"loss": 2.0, "answers": 0.75}}
        return {name: {**own, **sets} for name, own in found.items()}

    for run, forget in zip(runs, (0.25, 0.5), strict=True):
        said = run["composition"]
        said["forgetting"] = {"untouched": forgetting(2.5, 1.0), "end": forgetting(9.25, forget)}
        if "edit" in said["steps"]:
            said["steps"]["edit"]["forgetting"] = forgetting(2.75, 0.9)
    table = orders.order_table(runs, "probability")
    assert table is not None
    rows = {cells[1]: cells[2:] for cells in table.rows}
    # Lower is better: the error of the better order is what it still answers.
    assert rows["Forget set, answered"] == ["90.0", "25.0", "50.0", "25.0", "25.0"]
    assert rows["Retain set, answered"][3:] == ["25.0", "0.0"]
    assert rows["Forget set, loss in nats"] == ["2.75", "9.25", "9.25", "-", "-"]
    assert "forget set of 3 texts, loss 2.5 nats, 100.0 % of 2 answers" in " ".join(table.notes)
    assert any(panel.title == "Forget set, answered" for panel in orders.order_panels(runs, "probability"))
    del runs[0]["composition"]["forgetting"]["untouched"]  # begun before these were measured
    del runs[1]["composition"]["forgetting"]["untouched"]
    table = orders.order_table(runs, "probability")
    assert table is not None
    assert "Before" not in " ".join(table.notes)


def test_what_is_asked_of_the_texts_of_an_unlearning(tmp_path: Path) -> None:
    def lines(name: str, count: int) -> str:
        file = tmp_path / f"{name}.jsonl"
        told = [
            {"text": f"The {name} {i} is here", "prompt": f"The {name} {i} is", "answer": "here"} for i in range(count)
        ]
        file.write_text("".join(json.dumps(one) + "\n" for one in told))
        return str(file)

    own = UnlearningConfig(forget=lines("one", 5), retain=lines("other", 7), n_texts=4)
    asked = forgetting.sets_of(None, own)
    assert asked["forget"].texts == tuple(f"The one {i} is here" for i in range(4))
    assert asked["retain"].texts == tuple(f"The other {i} is here" for i in (4, 5, 6))  # those that train nothing
    assert asked["retain"].questions[0].target == "here"
    (tmp_path / "plain.txt").write_text("One text.\nAnother text.\n")
    own = UnlearningConfig(forget=str(tmp_path / "plain.txt"), retain=str(tmp_path / "plain.txt"))
    asked = forgetting.sets_of(None, own)
    assert len(asked["retain"].texts) == 2  # all train, so that there is nothing else
    assert not asked["forget"].questions


@pytest.mark.slow
def test_an_unlearning_is_measured_behind_each_step_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = world.known_facts(split="dev")[:8]
    for name, own in (("forget", known[:4]), ("retain", known[4:])):
        told = [{"text": f"{p.prompt} {p.target}", "prompt": p.prompt, "answer": p.target} for p in own]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    fields = {"name": "ga", "forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")}
    made = config(tmp_path, "unlearn-edit", unlearn={**fields, "lr": 3e-3, "batch_size": 1}, compress={})
    whole = bench.run(made)
    found = results(whole)["composition"]
    untouched, end = (found["forgetting"][step]["forget"] for step in ("untouched", "end"))
    assert untouched["answers"] == 1
    assert end["loss"] > untouched["loss"]
    assert found["steps"]["unlearn"]["forgetting"]["forget"]["loss"] > untouched["loss"]
    assert found["forgetting"]["end"]["retain"]["asked"] == 4
    again = run_with_stops(replace(made, out=str(tmp_path / "again")), monkeypatch)
    assert (again / STEPS).read_bytes() == (whole / STEPS).read_bytes()
    assert results(again)["composition"] == found


@pytest.mark.slow
def test_the_command_runs_both_orders_and_goes_on(both: list[Path]) -> None:
    def typed(*words: str) -> tuple[int, str, str]:
        console, errors = (Console(file=io.StringIO(), width=200) for _ in range(2))
        code = main.run(["compose", *words, f"out={both[0].parent}"], console, errors)
        return code, console.file.getvalue(), errors.file.getvalue()  # type: ignore[attr-defined]

    words = (
        *("edit=ft_m", "edit.num_steps=12", "edit.lr=0.005", "compress=magnitude", "compress.sparsity=0.5"),
        *("dataset=world_counterfact", "dataset.probes=1", "n_edits=2", "device=cpu"),
        *("generation.tokens=0", "generation.fluency_tokens=0", "collapse.n_texts=2", "collapse.known_facts=3"),
        *("guard=perplexity", "guard.ratio=50", "guard.n_texts=2", "guard.facts=0"),
    )
    there = sorted(path.name for path in both[0].parent.iterdir() if path.is_dir())
    code, shown, _ = typed(*words)
    assert code == 0
    assert "edited, then compressed" in shown
    # The runs of the other tests are found and not made again.
    assert [name for name in there if name.startswith("ft_m")] == sorted(path.name for path in both)
    assert "order: edit-compress" in typed(*words, "--cfg")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit=memit"], "nothing meets the edits"),
        (["edit=memit", "compres=wanda"], "did you mean 'compress'"),
        (["compress=wanda,gptq"], "several values need -m"),
        (["compress=wandas"], "compress=wandas: unknown compress; did you mean 'wanda'"),
        (["compress=wanda", "order=bothh"], "unknown order; did you mean 'both'"),
        (["compress=wanda", "protocol=batch"], "has its own protocol"),
        (["compress=wanda", "compress.sparsity=2"], "^compress.sparsity: expected a share"),
        (["-m", "compress=wanda", "compress.sparsity=0.5,2"], "^compress.sparsity: expected a share"),
        (["compress=wanda", "compress.sparsty=0.5"], "^unknown field compress.sparsty; did you mean 'sparsity'"),
        (["unlearn=ga", "unlearn.n_texts=5"], "^unlearn.forget is missing"),
        (["unlearn=ga", "unlearn.forget=gone.txt"], "^unlearn.forget: gone.txt does not exist"),
    ],
)
def test_the_command_refuses_mistakes_before_the_first_run(words: list[str], message: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=message):
        main.run(["compose", *words, f"out={tmp_path}"], console, console)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_a_back_end_that_is_not_installed_is_told_before_the_first_run(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="compress=torchao needs torchao"):
        main.run(["compose", "-m", "edit=memit,ft_m", "compress=torchao", f"out={tmp_path}"], console, console)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_to_share_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="errata compose makes one per order"):
        main.run(["compose", "compress=wanda"], console, console)
