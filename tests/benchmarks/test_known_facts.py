"""`dataset.known`: only facts that the untouched model gives, or does not give, are edited."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from drawn_runs import draw
from forked_ranks import in_ranks
from rich.console import Console

from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench import known_facts
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.reports import publish, report
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.files import jsonl
from errata.evaluate.generation import generate, match_answer
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

TOKENS, N_RECORDS = 5, 24
QUICK = {"generation": {"tokens": TOKENS, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 5}}
# How much of the file the model cannot know: of every second record the true answer is another fact's.
UNKNOWN = {"counterfact": N_RECORDS // 2, "counterfact_plus": N_RECORDS // 2, "zsre": N_RECORDS // 2}


@pytest.fixture(autouse=True)
def _small_groups_and_no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(known_facts, "_TOGETHER", 4)
    if "shown" not in request.node.name:
        monkeypatch.setattr(report, "write", lambda *_: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each format; every second record states an answer that the model does not give."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name in UNKNOWN:
        records = world.records(name)[:N_RECORDS]  # type: ignore[arg-type]
        for record in records[1::2]:
            if name == "zsre":
                record["answers"] = ["Nobodyknowsit"]
            else:
                record["requested_rewrite"]["target_true"]["str"] = "Nobodyknowsit"
        found[name] = folder / f"{name}.json"
        found[name].write_text(json.dumps(records))
    return found


def config(out: Path, name: str, known: str | None, path: Path | None = None, **changes: Any) -> BenchConfig:
    return BenchConfig.of(
        {
            "editor": {"name": "ft_m", "num_steps": 2},
            "model": {"name": "world"},
            "dataset": {"name": name, "path": None if path is None else str(path), "known": known},
            "protocol": {"name": "batch"},  # scored once
            "device": "cpu",
            "n_edits": 6,
            "out": str(out),
            **QUICK,
            **changes,
        }
    )


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def cases(folder: Path) -> list[str]:
    return [json.loads(line)["case"] for line in (folder / "records.jsonl").read_text().splitlines()]


def records_without_key(folder: Path) -> list[bytes]:
    """Return the lines of a run's records without the key of the run: every other byte counts."""
    found = [jsonl.parse(line) for line in (folder / "records.jsonl").read_bytes().splitlines()]
    key = (folder / "DONE").read_text().splitlines()[0]
    assert all(key.startswith(record.pop("run")) for record in found)
    return [jsonl.render(record) for record in found]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("counterfact_plus", "zsre") else []) for name in UNKNOWN],
)
def test_only_known_or_only_unknown_facts_are_edited_and_all_that_were_asked_are_counted(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = models.load("world", device="cpu")
    everything = datasets.load(name, files[name]).cases
    texts = generate(model, tokenizer, [case.request.text for case in everything], TOKENS)
    truths = [case.request.target_true or case.request.target for case in everything]
    gives = {c.id: match_answer(t, truth).contained for c, t, truth in zip(everything, texts, truths, strict=True)}
    unknown = [name for name, given in gives.items() if not given]
    assert len(unknown) == UNKNOWN[name]
    for known in ("exact", "contained", "absent"):
        folder = bench.run(config(tmp_path, name, known, files[name], n_edits=None))
        made, counts = cases(folder), results(folder)["counts"]
        assert made == [case for case, given in gives.items() if given is (known != "absent")]
        assert (counts["asked"], counts["unknown"]) == (N_RECORDS, len(unknown))
        assert counts["known"] == N_RECORDS - len(unknown)
        assert counts["edits"] == len(made)


def test_as_many_edits_are_made_as_were_asked_for_and_no_more_facts_are_asked_than_it_takes(
    files: dict[str, Path], tmp_path: Path
) -> None:
    path = files["counterfact"]
    folder = bench.run(config(tmp_path, "counterfact", "exact", path))
    counts = results(folder)["counts"]
    assert (counts["edits"], counts["asked"], counts["known"], counts["unknown"]) == (6, 12, 6, 6)
    with pytest.raises(DatasetError, match=r"expected 13 cases .* got 12: of 24 that were asked the model knows 12"):
        bench.run(config(tmp_path, "counterfact", "exact", path, n_edits=13))


def test_ranks_share_the_cases_of_a_group(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = datasets.load("counterfact", files["counterfact"])
    asked: list[str] = []

    def answers(_bench: Any, some: Any) -> Any:
        asked.extend(case.id for case, _ in some)
        return [[{"case": case.id, "exact": True}] for case, _ in some]

    monkeypatch.setattr(known_facts, "_answers", answers)
    monkeypatch.setattr(known_facts, "fitting", lambda bench: (replace(loaded, cases=bench.cases), []))
    bench_ = Bench(config(tmp_path, "counterfact", "exact", files["counterfact"]), cast("Any", None), ())

    def work(_: int) -> Any:
        folder: Any = SimpleNamespace(records=lambda _: [], append=lambda *_: None)
        said = [answers for _, answers, _ in known_facts._asked(bench_, folder, loaded.cases[:6])]
        return asked, [answer["case"] for group in said for answer in group]

    ids = [case.id for case in loaded.cases[:6]]
    shares = [[ids[0], ids[2], ids[4]], [ids[1], ids[3], ids[5]]]
    assert in_ranks(tmp_path / "two", work) == [(share, ids) for share in shares]


def test_the_testbeds_own_cases_are_known_and_a_sequence_leaves_out_what_its_chosen_subjects_are_in(
    tmp_path: Path,
) -> None:
    sequence = {"protocol": {"name": "sequential"}, "n_edits": 12, "batch_size": 6}
    folder = bench.run(config(tmp_path, "world", "contained", **sequence))
    said = results(folder)
    assert (said["counts"]["asked"], said["counts"]["unknown"], said["counts"]["edits"]) == (12, 0, 12)
    plain = bench.run(config(tmp_path, "world", None, **sequence))
    assert records_without_key(folder) == records_without_key(plain)
    assert said["counts"]["probes_apart"] == results(plain)["counts"]["probes_apart"] > 0
    assert said["digests"]["cases"] == results(plain)["digests"]["cases"]
    assert "asked" not in results(plain)["counts"]


def test_the_filter_makes_another_run(files: dict[str, Path], tmp_path: Path) -> None:
    made = [
        bench.prepare(config(tmp_path, "counterfact", known, files["counterfact"]))
        for known in (None, "exact", "contained", "absent")
    ]
    assert len({prepared.folder.key for prepared in made}) == 4
    assert "exact-6" in made[1].folder.path.name
    longer = config(
        tmp_path, "counterfact", "exact", files["counterfact"], generation={"tokens": 6, "fluency_tokens": 0}
    )
    assert bench.prepare(longer).folder.key != made[1].folder.key


def test_the_untouched_model_is_asked_once_and_a_run_that_was_left_while_it_asked_goes_on(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.run(config(tmp_path / "whole", "counterfact", "exact", files["counterfact"]))
    asked: list[str] = []
    ask = known_facts.generate

    def noted(model: Any, tokenizer: Any, prompts: list[str], *more: Any, **options: Any) -> list[str]:
        asked.extend(prompts)
        return ask(model, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(known_facts, "generate", noted)
    stop, settings = Stop(), config(tmp_path, "counterfact", "exact", files["counterfact"])

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if what.startswith("facts"):
            stop.request("enough")

    with pytest.raises(Stopped):
        bench.run(settings, progress=progress, stop=stop)
    assert len(asked) == 4
    left = bench.prepare(settings).folder.path
    assert json.loads((left / "run.json").read_text())["edits"] == 6
    assert bench.run(settings) == left
    assert len(asked) == len(set(asked)) == 12
    for name in ("records.jsonl", known_facts.ANSWERS, "curve.json"):
        assert (left / name).read_bytes() == (whole / name).read_bytes()


def test_cases_that_state_no_true_answer_and_prompts_without_room_are_dropped_and_named(tmp_path: Path) -> None:
    known = world.cases(split="test")[:6]
    records = [
        {"case_id": i, "prompt": c.request.text, "subject": c.request.subject, "target_new": c.request.target}
        | ({} if i == 2 else {"ground_truth": c.request.target_true})
        for i, c in enumerate(known)
    ]
    records[4]["prompt"] = "word " * 3000 + str(records[4]["prompt"])
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(records))
    folder = bench.run(config(tmp_path, "easyedit", "exact", path, n_edits=None))
    said = results(folder)
    assert cases(folder) == ["0", "1", "3", "5"]
    assert {entry["record"]: entry["field"] for entry in said["dropped"]} == {"2": "target_true", "4": "probes"}
    assert said["counts"]["asked"] == 4


def test_what_was_asked_is_shown_in_the_terminal_and_in_both_reports(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(tmp_path, "counterfact", "exact", files["counterfact"])
    folder = bench.run(settings)
    draw(settings)
    bench.run(config(tmp_path, "counterfact", "exact", files["counterfact"], editor={"name": "ft_l", "num_steps": 2}))
    console = Console(file=io.StringIO(), width=160)
    report.show([report.read(folder)], console)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"facts asked +12\n +facts known +6\n", console.file.getvalue())
    assert "12 facts asked, 6 known, 6 unknown" in (folder / "report.md").read_text()
    page = publish.publish(tmp_path)[0].read_text(encoding="utf-8")
    for title, cell in (("facts asked", "12"), ("facts known", "6")):
        assert f'<th scope="row">{title}</th>{2 * f"<td>{cell}</td>"}</tr>' in page


def test_the_filter_needs_free_answers_and_is_none_of_trainings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation\.tokens"):
        config(tmp_path, "world", "exact", generation={"tokens": 0, "fluency_tokens": 0})
    with pytest.raises(ConfigError, match="expected one of 'exact', 'contained', 'absent'"):
        config(tmp_path, "world", "yes")
    with pytest.raises(ConfigError, match="is for errata bench"):
        TrainConfig.of(
            {"editor": {"name": "mend"}, "model": {"name": "world"}, "dataset": {"name": "world", "known": "exact"}}
        )


def test_damaged_answers_are_asked_again(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(tmp_path, "counterfact", "exact", files["counterfact"])
    folder = bench.run(settings)
    path, before = folder / known_facts.ANSWERS, (folder / known_facts.ANSWERS).read_bytes()
    path.write_bytes(before.replace(b'"exact": true', b'"exact": fals', 1))
    (folder / "DONE").unlink()
    assert bench.run(settings) == folder
    assert path.read_bytes() == before
    assert bench.prepare(settings).folder.records(known_facts.ANSWERS)


def test_by_probability_a_fact_is_known_whose_true_answer_is_likelier(files: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = models.load("world", device="cpu")
    path = files["counterfact"]
    everything = datasets.load("counterfact", path).cases
    requests = [case.request for case in everything]
    probes = [Probe("rewrite", r.text, str(r.target_true), r.target, r.join, r.chat) for r in requests]
    scores = score(model, tokenizer, probes)
    likelier = [
        case.id
        for case, said in zip(everything, scores, strict=True)
        if said.nll_target is not None and said.nll_other is not None and said.nll_target < said.nll_other
    ]
    assert 0 < len(likelier) < len(everything)
    folder = bench.run(
        config(tmp_path, "counterfact", "probability", path, n_edits=2, generation={"tokens": 0, "fluency_tokens": 0})
    )
    assert cases(folder) == likelier[:2]
    assert results(folder)["counts"]["edits"] == 2
