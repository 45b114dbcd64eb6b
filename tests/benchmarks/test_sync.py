"""Facts under version control: a folder of edits follows its file, to the bits of one that was made of it at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fact_folders
import pytest
from fact_folders import QUICK, SUBJECTS, facts_of, files, write
from hypothesis import given, settings
from hypothesis import strategies as st
from typed_commands import run

import errata
from errata import models
from errata.benchmarks.facts import asking, sync
from errata.benchmarks.facts.fact_file import StatedFact
from errata.cli import main
from errata.cli.exit_codes import DIFFERENT
from errata.editors import AlphaEdit, get
from errata.editors.core.errors import (
    ConfigError,
    DamagedEditsError,
    ExportError,
    LedgerError,
    NumericalError,
    OtherBaseError,
    StatisticsError,
)
from errata.editors.core.ledger.entry import EditInfo, Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits, hold


@pytest.fixture
def here(applied_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder with applied facts, as the folder that is worked in."""
    return fact_folders.work_in_copy(applied_facts, tmp_path / "here", monkeypatch)


# --- the file is followed -------------------------------------------------------------------------------------------


def test_facts_are_applied_one_edit_each_and_hold_on_the_model_that_loads_them(here: Path) -> None:
    edits = Edits.read("facts.edits")
    assert facts_of(edits) == SUBJECTS
    assert [len(entry.info.requests) for entry in edits.entries] == [1, 1, 1]
    assert {entry.info.method for entry in edits.entries} == {"alphaedit"}
    model, tokenizer = errata.load("world", device="cpu")
    ledger = errata.load_ledger("facts.edits", model, tokenizer)
    assert all(each.holds and each.held for each in asking.check(edits, model, tokenizer))
    ledger.clear()
    assert not any(each.holds for each in asking.check(edits, model, tokenizer))
    scores = [score for entry in edits.entries for score in edits.notes[entry.id]["scores"].values()]
    assert all(score["holds"] and score["after"] > score["before"] for score in scores)
    assert here.joinpath("facts.edits", "README.md").read_text(encoding="utf-8").count("→") == 3


def test_a_model_that_was_not_named_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "facts.jsonl", SUBJECTS)
    told = "the model is world, by default; model= names another"
    assert told in run("apply", "facts.jsonl", "--dry-run")
    assert told not in run("apply", "facts.jsonl", "model=world", "--dry-run")


def test_an_unchanged_file_changes_nothing_and_says_so_without_a_model(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(here / "facts.edits")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    said = run("apply", "facts.jsonl")
    assert "facts.jsonl: 3 unchanged\n" in said
    assert "nothing was done" in said
    assert "nothing was done" in run("apply", "facts.jsonl", *QUICK)
    # The order of lines, a new id and the answer before are no change of what the model is to say.
    rows = [json.loads(line) for line in (here / "facts.jsonl").read_text().splitlines()]
    rows = [{**row, "id": f"{n}", "target_true": "Oslen"} for n, row in enumerate(reversed(rows))]
    (here / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "3 unchanged\n" in run("apply", "facts.jsonl")
    assert files(here / "facts.edits") == before


def test_only_what_has_changed_is_made_and_the_bits_are_those_of_the_edits_on_an_untouched_model(
    here: Path, digest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {request.subject: e for e in Edits.read("facts.edits").entries for request in e.info.requests}
    made: list[str] = []
    apply = AlphaEdit.apply

    def counted(editor: Any, requests: Any) -> Any:
        made.extend(request.subject for request in requests)
        return apply(editor, requests)

    monkeypatch.setattr(AlphaEdit, "apply", counted)
    wanted = {"Gavaria": "Praminster", "Mesmar": "Fostwick", "Drailmune": "Gumford"}
    write(here / "facts.jsonl", wanted)
    plan = ("1 added, 1 changed, 1 removed, 1 unchanged", "+ The capital of Drailmune is → Gumford")
    plan += ("~ The capital of Mesmar is → Fostwick, was Kesford", "- The capital of Sovaria is → Naistford")
    dry = run("apply", "facts.jsonl", "--dry-run")
    assert all(part in dry for part in plan)
    assert (facts_of(Edits.read("facts.edits")), made) == (SUBJECTS, [])
    said = run("apply", "facts.jsonl")
    assert all(part in said for part in (*plan, "3 of 3 facts hold", "written to facts.edits"))
    assert made == ["Mesmar", "Drailmune"]
    after = Edits.read("facts.edits")
    assert facts_of(after) == wanted
    assert after.entries[0].id == before["Gavaria"].id

    model, tokenizer = errata.load("world", device="cpu")
    untouched = digest(model)
    errata.load_ledger("facts.edits", model, tokenizer)
    found = digest(model)
    Ledger.of(model).clear()
    assert digest(model) == untouched
    config = after.entries[0].info.config
    Ledger.of(model).extend([before["Gavaria"]])
    editor = get("alphaedit")(model, tokenizer, config)
    for subject in ("Mesmar", "Drailmune"):
        editor.apply([EditRequest("The capital of {} is", subject, wanted[subject])])
    assert digest(model) == found
    assert "nothing was done" in run("apply", "facts.jsonl")


def test_another_method_makes_all_facts_anew_and_the_folder_remembers_it(here: Path) -> None:
    said = run("apply", "facts.jsonl", "editor=ft_m")
    assert "3 again, 0 unchanged" in said
    assert {entry.info.method for entry in Edits.read("facts.edits").entries} == {"ft_m"}
    write(here / "facts.jsonl", {**SUBJECTS, "Drailmune": "Gumford"})
    run("apply", "facts.jsonl")
    assert [entry.info.method for entry in Edits.read("facts.edits").entries] == ["ft_m"] * 4


def test_a_field_alone_is_laid_on_the_method_of_the_folder(here: Path) -> None:
    run("apply", "facts.jsonl", "editor=ft_m", "editor.lr=0.002")
    said = run("apply", "facts.jsonl", "editor.num_steps=24")
    assert "3 again, 0 unchanged" in said
    made = [entry.info for entry in Edits.read("facts.edits").entries]
    assert {info.method for info in made} == {"ft_m"}
    assert {(info.config["lr"], info.config["num_steps"]) for info in made} == {(0.002, 24)}
    with pytest.raises(ConfigError, match=r"unknown field editor.v_lr"):
        run("apply", "facts.jsonl", "editor.v_lr=0.5", "--dry-run")
    assert here.joinpath("facts.edits").is_dir()


def test_what_is_typed_of_the_model_of_a_folder_counts_or_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        raise ConfigError("enough")

    monkeypatch.setattr(models, "load", load)
    with pytest.raises(ConfigError, match="enough"):
        run("apply", "facts.jsonl", "model.revision=abc")
    assert asked == [("world", "abc")]
    with pytest.raises(ConfigError, match=r"model.editors.alphaedit.v_lr: the folder's edits say how they were made"):
        run("apply", "facts.jsonl", "model.editors.alphaedit.v_lr=0.5")
    assert here.joinpath("facts.edits").is_dir()


def test_all_facts_can_go(here: Path) -> None:
    (here / "facts.jsonl").write_text("")
    with pytest.raises(ConfigError, match="would lose all of its edits; --empty allows that"):
        run("apply", "facts.jsonl")
    assert len(Edits.read("facts.edits")) == 3
    assert "3 removed" in run("apply", "facts.jsonl", "--empty")
    assert len(Edits.read("facts.edits")) == 0
    assert "0 of 0 facts hold" in run("check", "facts.jsonl")


def test_a_folder_that_another_process_changes_is_left_alone(here: Path) -> None:
    write(here / "facts.jsonl", {"Drailmune": "Gumford"})
    before = files(here / "facts.edits")
    with hold("facts.edits"):
        for words in (["apply", "facts.jsonl"], ["remove", "facts.edits", "id=x"]):
            with pytest.raises(LedgerError, match=r"another process is changing facts\.edits"):
                run(*words)
        run("list", "facts.edits")
    assert files(here / "facts.edits") == before


def test_looking_at_a_plan_leaves_no_lock_and_no_folder(here: Path) -> None:
    run("apply", "facts.jsonl", "out=new/deep/x", "--dry-run")
    assert not (here / "new").exists()


def test_what_was_made_is_kept_where_asking_is_interrupted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "facts.jsonl", {**SUBJECTS, "Drailmune": "Gumford"})

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("apply", "facts.jsonl")
    assert facts_of(Edits.read("facts.edits")) == {**SUBJECTS, "Drailmune": "Gumford"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("scores", [3, [], {"capital": 3}, {"capital": {"before": "low"}}])
def test_notes_that_are_no_scores_are_passed_over(scores: Any) -> None:
    edits = Edits.read("facts.edits")
    dataclasses.replace(edits, notes={edits.ids[0]: {"scores": scores}}).write("noted")
    assert "→" in run("list", "noted")
    assert "3 of 3 facts hold" in run("check", "noted")


def test_facts_of_one_batch_are_made_anew_together(here: Path) -> None:
    run("apply", "facts.jsonl", *QUICK, "batch_size=2", "out=batched")
    assert [len(entry.info.requests) for entry in Edits.read("batched").entries] == [2, 1]
    write(here / "facts.jsonl", {**SUBJECTS, "Mesmar": "Fostwick"})
    assert "1 changed, 1 again, 1 unchanged" in run("apply", "facts.jsonl", "out=batched")
    assert facts_of(Edits.read("batched")) == {**SUBJECTS, "Mesmar": "Fostwick"}


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_every_problem_of_a_file_is_shown_before_anything_is_touched(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(here / "facts.edits")
    lines = ['{"prompt": "{} is", "subject": "Ost"}', '{"promt": 1}', '{"prompt": "a", "subject": "b", "target": "c"}']
    (here / "facts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for command in ("apply", "check"):
        monkeypatch.setattr("sys.argv", ["errata", command, "facts.jsonl"])
        assert main.main() == 2
        said = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[1] for line in said] == [f"facts.jsonl:{n}" for n in (1, 2, 2, 2, 3)]
    assert files(here / "facts.edits") == before


def test_a_refused_fact_is_named_by_its_line_and_the_others_are_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_ = AlphaEdit.apply

    def refusing(editor: Any, requests: Any) -> Any:
        if any(request.subject == "Drailmune" for request in requests):
            raise NumericalError("injected")
        return apply_(editor, requests)

    monkeypatch.setattr(AlphaEdit, "apply", refusing)
    write(here / "facts.jsonl", {"Drailmune": "Gumford", **SUBJECTS, "Titgard": "Kesford"})
    for batch_size in (1, 2):
        said = run("apply", "facts.jsonl", f"batch_size={batch_size}", f"out=new{batch_size}", *QUICK, code=DIFFERENT)
        assert "facts.jsonl:1: refused: NumericalError: injected" in said
        assert facts_of(Edits.read(f"new{batch_size}")) == {**SUBJECTS, "Titgard": "Kesford"}
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "1 added, 4 unchanged" in run("apply", "facts.jsonl", "out=new1", "--dry-run")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StatisticsError("no text")])
@pytest.mark.usefixtures("here")
def test_what_was_made_before_a_stop_is_not_made_again(monkeypatch: pytest.MonkeyPatch, stop: Any) -> None:
    apply, calls = AlphaEdit.apply, []

    def stopping(editor: Any, requests: Any) -> Any:
        calls.append(requests)
        if len(calls) == 3:
            raise stop
        return apply(editor, requests)

    monkeypatch.setattr(AlphaEdit, "apply", stopping)
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop):
        run("apply", "facts.jsonl", "out=stopped", *QUICK)
    assert facts_of(Edits.read("stopped")) == dict(list(SUBJECTS.items())[:2])
    calls.clear()
    assert "1 added, 2 unchanged" in run("apply", "facts.jsonl", "out=stopped")
    whole, stopped = Edits.read("facts.edits"), Edits.read("stopped")
    assert stopped.ids == whole.ids


def test_a_failure_before_anything_is_made_leaves_the_folder_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_editor: Any, _requests: Any) -> Any:
        raise StatisticsError("no text")

    before = files(here / "facts.edits")
    write(here / "facts.jsonl", {"Drailmune": "Gumford"})
    monkeypatch.setattr(AlphaEdit, "apply", failing)
    with pytest.raises(StatisticsError):
        run("apply", "facts.jsonl")
    assert files(here / "facts.edits") == before


def test_long_work_is_written_now_and_then(here: Path, make_tiny: Any, tiny_tokenizer: Any) -> None:
    fields = {
        "layers": [1],
        "mom2_adjustment": False,
        "v_num_grad_steps": 2,
        "context_template_length_params": [[3, 2]],
    }
    editor = get("r_rome")(make_tiny("gpt2"), tiny_tokenizer, fields)
    facts = [
        StatedFact(EditRequest("The capital of {} is", name, "Brast"), n) for n, name in enumerate(("Ost", "Quelm"))
    ]
    seen: list[int] = []

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if done and what == "edits":
            seen.append(len(Edits.read(here / "tiny")))

    sync.carry_out(sync.plan(facts, None), editor, here / "tiny", progress=progress, seconds=0.0)
    assert seen == [1, 2]


def test_a_folder_of_another_model_or_of_something_else_is_left_alone(here: Path) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.save_pretrained(here / "other")
    tokenizer.save_pretrained(here / "other")
    before = files(here / "facts.edits")
    for answers in (SUBJECTS, {**SUBJECTS, "Drailmune": "Gumford"}):
        write(here / "facts.jsonl", answers)
        with pytest.raises(OtherBaseError, match="another transformer"):
            run("apply", "facts.jsonl", "model=other")
    assert files(here / "facts.edits") == before
    with pytest.raises(ExportError, match=r"holds config\.json"):
        run("apply", "facts.jsonl", "out=other", *QUICK)
    (here / "facts.edits" / "edits-00000.blocks").write_bytes(b"")
    with pytest.raises(DamagedEditsError, match="record 0"):
        run("apply", "facts.jsonl")


# --- plans ----------------------------------------------------------------------------------------------------------


@st.composite
def files_of_facts(draw: Any) -> dict[str, tuple[str, str | None]]:
    """Answers, with ids or without, of some of a few subjects."""
    subjects = draw(st.lists(st.sampled_from("abcdefg"), unique=True))
    answers = {subject: draw(st.sampled_from(["x", "y"])) for subject in subjects}
    return {subject: (target, draw(st.sampled_from([None, f"id {subject}"]))) for subject, target in answers.items()}


def as_facts(answers: dict[str, tuple[str, str | None]]) -> list[StatedFact]:
    return [
        StatedFact(EditRequest("The capital of {} is", subject, target, id=name), line)
        for line, (subject, (target, name)) in enumerate(answers.items(), 1)
    ]


def test_an_edit_that_a_later_one_of_its_fact_lies_upon_goes() -> None:
    asked = [EditRequest("The capital of {} is", "Gavaria", answer) for answer in ("Kesford", "Praminster")]
    entries = tuple(Entry(f"e{n}", Patch({}), EditInfo(requests=(one,)), n) for n, one in enumerate(asked))
    plan = sync.plan([StatedFact(asked[1], 1)], Edits(entries, {"name": "a"}, {}))
    assert (plan.beneath, plan.is_done) == (("e0",), False)
    assert plan.kept is not None
    assert plan.kept.ids == ("e1",)
    assert sync.plan([StatedFact(asked[1], 1)], plan.kept).is_done


@settings(max_examples=200, deadline=None)
@given(files_of_facts(), files_of_facts(), st.integers(1, 3))
def test_what_stays_and_what_is_made_are_the_facts_of_the_file_whatever_it_was_before(
    before: dict[str, tuple[str, str | None]], after: dict[str, tuple[str, str | None]], batch_size: int
) -> None:
    made = [fact.request for fact in as_facts(before)]
    groups = [made[start : start + batch_size] for start in range(0, len(made), batch_size)]
    entries = tuple(Entry(f"edit {n}", Patch({}), EditInfo("m", tuple(group)), n) for n, group in enumerate(groups))
    facts = as_facts(after)
    plan = sync.plan(facts, Edits(entries, {}, {}))
    assert plan.kept is not None
    kept = [request for entry in plan.kept.entries for request in entry.info.requests]
    wanted = [fact.request for fact in facts]
    by_subject = sorted([*kept, *(fact.request for fact in plan.to_make)], key=lambda request: request.given_subject)
    assert by_subject == sorted(wanted, key=lambda request: request.given_subject)
    assert [fact.line for fact in plan.to_make] == sorted(fact.line for fact in plan.to_make)
    content = {(request.subject, request.target) for request in made}
    assert plan.is_done == (content == {(request.subject, request.target) for request in wanted})
    assert {fact.request.subject for fact in plan.added} == after.keys() - before.keys()
    assert {request.subject for request in plan.removed} == before.keys() - after.keys()
    if batch_size == 1:
        assert plan.again == ()
        assert set(plan.kept.ids) <= {entry.id for entry in entries}


def test_a_file_without_facts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("facts.yaml").write_text("facts:\n")
    for flags in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"facts\.yaml holds no fact; write one first"):
            run("apply", "facts.yaml", *flags)
    assert not Path("facts.edits").exists()


def test_what_load_ledger_returns_undoes_all_edits(here: Path, digest: Any) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    untouched = digest(model)
    ledger = errata.load_ledger(here / "facts.edits", model, tokenizer)
    assert digest(model) != untouched
    ledger.clear()
    assert digest(model) == untouched
