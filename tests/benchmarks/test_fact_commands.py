"""Commands on folders of facts: check, list, merge, diff and remove; questions about a fact, and facts in chat."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fact_folders
import pytest
import torch
from fact_folders import QUICK, SUBJECTS, facts_of, files, write
from typed_commands import run

import errata
from errata.benchmarks.facts import asking, sync
from errata.benchmarks.facts.fact_file import StatedFact
from errata.cli.exit_codes import DIFFERENT
from errata.editors import get
from errata.editors.core.errors import (
    ConfigError,
    DamagedEditsError,
    LedgerError,
    MergeError,
    OtherBaseError,
)
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score


@pytest.fixture
def here(applied_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder with applied facts, as the folder that is worked in."""
    return fact_folders.work_in_copy(applied_facts, tmp_path / "here", monkeypatch)


# --- asking ---------------------------------------------------------------------------------------------------------


def test_check_tells_what_is_lost_from_what_is_not_applied_by_its_exit_code(here: Path) -> None:
    assert "3 of 3 facts hold" in run("check", "facts.jsonl")
    assert "3 of 3 facts hold" in run("check", "facts.edits")
    write(here / "facts.jsonl", {**SUBJECTS, "Drailmune": "Gumford"})
    said = run("check", "facts.jsonl", code=DIFFERENT)
    assert "3 of 3 facts hold" in said
    assert "+ The capital of Drailmune is → Gumford" in said
    assert "`errata apply facts.jsonl` brings it in line" in said
    # An edit that does nothing any more.
    edits = Edits.read("facts.edits")
    first, *others = edits.entries
    nothing = Patch({name: Dense(torch.zeros(update.shape)) for name, update in first.patch.updates.items()})
    dataclasses.replace(edits, entries=(dataclasses.replace(first, patch=nothing), *others)).write("weak")
    said = run("check", "weak", code=DIFFERENT)
    assert "2 of 3 facts hold" in said
    assert "lost  The capital of Gavaria is → Praminster (p 0." in said


@pytest.mark.usefixtures("here")
def test_a_shipped_model_is_asked_as_it_stands() -> None:
    run("export", "facts.edits", "merged=edited", "precision=bfloat16")  # without force: the base is the same
    assert json.loads(Path("edited/config.json").read_text())["dtype"] == "bfloat16"
    fact = {"prompt": "The capital of {} is", "subject": "Gavaria", "target": SUBJECTS["Gavaria"]}
    Path("facts.jsonl").write_text(json.dumps(fact))
    said = run("check", "facts.jsonl", "shipped=edited").splitlines()
    assert said[:2] == ["1 of 1 fact holds", f"  The capital of Gavaria is → {SUBJECTS['Gavaria']}: holds"]
    assert [line.startswith(f"    now: {SUBJECTS['Gavaria']}") for line in said[2:]] == [True]  # none from before
    assert "0 of 1 fact holds" in run("check", "facts.jsonl", "shipped=world", code=DIFFERENT)
    # Only the untouched model, which the folder of edits names, can say what should have stayed.
    asked = [f"The capital of {next(iter(SUBJECTS))} is", "1 + 1 ="]
    Path("facts.jsonl").write_text(json.dumps({**fact, "unchanged": asked}))
    said = run("check", "facts.jsonl", "shipped=edited", code=DIFFERENT)
    assert "holds, 1 of 2 neighbours changed" in said
    with pytest.raises(ConfigError, match=r"shipped= is asked for the facts of a file, and facts\.edits is none"):
        run("check", "facts.edits", "shipped=edited")


def test_without_edits_there_is_nothing_to_check(here: Path) -> None:
    write(here / "new.jsonl", SUBJECTS)
    with pytest.raises(DamagedEditsError, match=r"new\.edits.manifest\.json: there is no such folder"):
        run("check", "new.jsonl")


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_edits_are_listed_removed_and_told_apart(digest: Callable[[Any], str]) -> None:
    edits = Edits.read("facts.edits")
    said = run("list", "facts.edits")
    assert said.startswith("3 edits of world\n")
    assert all(entry.id in said for entry in edits.entries)
    assert [each["id"] for each in json.loads(run("list", "facts.edits", "--json"))["edits"]] == list(edits.ids)
    run("remove", "facts.edits", f"id={edits.ids[1]}", "out=two")
    assert Edits.read("facts.edits").ids == edits.ids
    request = edits.entries[2].info.requests[0]
    said = run("remove", "two", f"id={request.id}")
    assert f"- {edits.ids[2]}: {request.text} → {request.target}" in said
    model, _ = errata.load("world", device="cpu")
    found = digest(errata.load_ledger("two", model).model)
    Ledger.of(model).clear()
    edits.only({edits.ids[0]}).apply_to(model)
    assert digest(model) == found
    said = run("diff", "two", "facts.edits", code=3)
    assert said.splitlines() == [
        "+ The capital of Mesmar is → Kesford",
        "+ The capital of Sovaria is → Naistford",
        "1 edit is the same",
    ]
    assert json.loads(run("diff", "facts.edits", "facts.edits", "--json"))["same"] == 3


def test_an_id_with_a_comma_is_one_id_where_there_is_one(here: Path) -> None:
    rows = [
        {"prompt": "The capital of {} is", "subject": s, "target": t, "id": f"{s}, {t}"} for s, t in SUBJECTS.items()
    ]
    (here / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("apply", "facts.jsonl", "out=named", *QUICK)
    ids = Edits.read("named").ids
    run("remove", "named", "id=Gavaria, Praminster")
    assert Edits.read("named").ids == ids[1:]
    run("remove", "named", f"id={ids[1]},{ids[2]}", "out=none")
    assert len(Edits.read("none")) == 0
    with pytest.raises(LedgerError, match="have the id 'Gavaria'"):
        run("remove", "named", "id=Gavaria, Praminster")


def test_folders_are_merged_or_added_to_and_contradictions_are_named(here: Path) -> None:
    run("apply", str(write(here / "more.jsonl", {"Drailmune": "Gumford"})), *QUICK)
    assert "4 edits, from 3 and 1: both" in run("merge", "facts.edits", "more.edits", "out=both")
    assert "1 edit added, 4 in all: facts.edits" in run("apply", "more.edits", "out=facts.edits")
    assert Edits.read("facts.edits").ids == Edits.read("both").ids
    assert "already; nothing was done" in run("apply", "more.edits", "out=facts.edits")
    run("apply", str(write(here / "else.jsonl", {"Drailmune": "Fostwick"})), *QUICK)
    before = files(here / "both")
    for command in (("merge", "both", "else.edits", "out=new"), ("apply", "else.edits", "out=both")):
        with pytest.raises(MergeError, match="'The capital of Drailmune is' should be 'Gumford'"):
            run(*command)
    assert files(here / "both") == before
    assert not (here / "new").exists()
    run("merge", "both", "else.edits", "out=new", "prefer=second")
    assert facts_of(Edits.read("new")) == {**SUBJECTS, "Drailmune": "Fostwick"}


def test_edits_are_calculated_from_edits_and_from_two_models(here: Path) -> None:
    first, second, third = Edits.read("facts.edits").entries
    said = run("derive", "facts.edits", "scale=0.5", "mask=rect:0.8", f"id={first.id}", "out=half")
    (half,) = Edits.read("half").entries
    assert f"{half.id} = 0.5 (rect({first.id}, share=0.8)), norm" in said and "1 edit: half" in said
    assert f"= 0.5 (rect({first.id}, share=0.8))" in run("list", "half")
    run("merge", "facts.edits", "half", "how=sum", "out=one")
    (one,) = Edits.read("one").entries
    assert [parent["id"] for parent in one.info.derived["parents"]] == [first.id, second.id, third.id]
    run("apply", str(write(here / "more.jsonl", {"Drailmune": "Gumford"})), *QUICK)
    run("merge", "facts.edits", "more.edits", "how=ties:0.5", "out=both")
    (both,) = Edits.read("both").entries
    assert both.info.derived["numbers"] == {"rule": "ties", "strength": 1.0, "keep": 0.5, "average": "mean"}
    assert facts_of(Edits.read("both")) == {**SUBJECTS, "Drailmune": "Gumford"}
    # Taken back from a merged model, whose ledger is gone.
    run("export", "facts.edits", "merged=merged")
    run("derive", "facts.edits", "scale=-1", "out=back")
    with pytest.raises(OtherBaseError):
        run("export", "back", "model=merged", "merged=clean")
    said = run("export", "back", "model=merged", "merged=clean", "force=true")
    assert re.search(r"\d of \d weights have the bytes of the model that the edits were made on", said)
    said = run("derive", "base=world", "tuned=merged", "out=tuning")
    assert "as factors and" in said and "= merged - world, norm" in said
    left = run("derive", "base=world", "tuned=clean", "out=left")
    sizes = [float(re.findall(r"norm (\S+)", text)[0]) for text in (said, left)]
    assert sizes[1] < 1e-6 * sizes[0]


def test_edits_go_onto_another_model_by_force_alone(here: Path) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.save_pretrained(here / "other")
    tokenizer.save_pretrained(here / "other")
    with pytest.raises(OtherBaseError, match="other bytes"):
        run("apply", "facts.edits", "model=other", "out=moved")
    assert not (here / "moved").exists()
    run("apply", "facts.edits", "model=other", "out=moved", "force=true")
    moved = Edits.read("moved")
    assert (moved.ids, moved.model["name"]) == (Edits.read("facts.edits").ids, "other")
    moved.check(model)


WRONG = {
    "apply facts.edits": "expected out=FOLDER",
    "apply facts.edits out=x force=maybe": "force: expected true or false",
    "apply facts.jsonl --wet": "unknown option '--wet'; there are --dry-run and --empty",
    "apply facts.jsonl batch_size=0": "batch_size: expected at least 1",
    "apply facts.jsonl editr=rome": "did you mean 'editor'",
    "check a b": "expected a file of facts or a folder",
    "remove facts.edits": "expected id=ID",
    "merge facts.edits facts.edits": "out=FOLDER",
    "merge facts.edits facts.edits out=x prefer=both": "prefer: expected first or second",
    "diff facts.edits": "expected two folders",
    "derive facts.edits out=x": "expected scale=NUMBER or mask=RULE",
    "derive base=world out=x": "or base=MODEL and tuned=MODEL",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_with_a_command_is_said_before_anything_is_done(here: Path, line: str) -> None:
    before = sorted(path.name for path in here.iterdir())
    with pytest.raises(ConfigError) as caught:
        run(*line.split())
    assert WRONG[line] in str(caught.value)
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize("command", ["apply", "check", "list", "diff", "derive", "merge", "remove"])
def test_every_command_has_its_help_and_shows_it_where_nothing_is_said(command: str) -> None:
    assert f"errata {command}" in run(command, "--help")
    assert run(command) == run(command, "--help")
    assert f"errata {command}" in run("--help")


# --- questions about a fact, and chat -------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_apply_and_check_say_of_each_fact_what_became_of_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fact = {"prompt": "The capital of {} is", "subject": "Gavaria", "target": "Praminster"}
    asked = {"paraphrases": ["The capital of {} is", {"prompt": "The capital of Mesmar is"}]}
    wrong = {"prompt": "The capital of Drailmune is", "answer": "Praminster"}
    Path("facts.jsonl").write_text(json.dumps({**fact, **asked, "unchanged": ["The capital of Mesmar is", wrong]}))
    said = run("apply", "facts.jsonl", "editor=grace", code=DIFFERENT)
    assert "holds, 1 of 2 paraphrases, 1 of 2 neighbours changed" in said
    assert "not answered: The capital of Mesmar is" in said
    assert "changed: The capital of Drailmune is; before: " in said
    before, now = next(line for line in said.splitlines() if line.startswith("    before: ")).split(", now: ")
    assert "Praminster" in now
    assert "Praminster" not in before
    assert len(now) <= 48
    told = run("check", "facts.jsonl", code=DIFFERENT)
    assert told.startswith("1 of 1 fact holds\n")
    assert told in said
    Path("facts.jsonl").write_text(json.dumps({**fact, "unchanged": ["The capital of Mesmar is"]}))
    assert "holds, 0 of 1 neighbour changed" in run("check", "facts.jsonl")
    Path("facts.jsonl").write_text(json.dumps({**fact, "unchanged": ["The capital of Gavaria is"]}))
    told = run("check", "facts.jsonl", code=DIFFERENT)
    assert "changed: The capital of Gavaria is (any other wording counts); before: " in told


def test_a_neighbour_without_an_answer_is_compared_with_the_untouched_model() -> None:
    model, tokenizer = errata.load("world", device="cpu")
    request = EditRequest("The capital of {} is", "Gavaria", "Praminster")
    same = Probe("neighborhood", "The capital of Gavaria is")
    other = Probe("neighborhood", "The capital of Mesmar is")
    fact = StatedFact(request, 1, unchanged=(same, other))
    editor = get("grace")(model, tokenizer)
    editor.apply(request)
    (found,) = asking.check(Edits.of(Ledger.of(model)), model, tokenizer, [fact])
    assert [asked.holds for asked in found.unchanged] == [False, True]
    assert found.holds
    assert not found.is_good


def test_a_fact_in_chat_is_made_and_checked_in_chat(tmp_path: Path) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    tokenizer.chat_template = TEMPLATE
    chat = EditRequest("Which city is the capital of Gavaria?", None, "Praminster", chat=True)
    plain = dataclasses.replace(chat, chat=False, id=None)
    facts = [StatedFact(chat, 1, paraphrases=(Probe("paraphrase", chat.text, "Praminster", None, None, True),))]
    editor = get("grace")(model, tokenizer)
    kept = sync.carry_out(sync.plan(facts, None), editor, tmp_path / "facts.edits")
    assert [(each.holds, each.is_good) for each in kept.checked] == [(True, True)]
    edits = Edits.read(tmp_path / "facts.edits")
    assert edits.entries[0].info.requests == (chat,)
    (found,) = asking.check(edits, model, tokenizer, facts)
    assert found.holds
    (asked,) = score(model, tokenizer, [Probe("rewrite", plain.text, plain.target)])
    assert not all(asked.target_correct)
    # The same words outside the chat are another fact, and the same fact in another form has to be made again.
    assert sync.plan([StatedFact(plain, 1)], edits).added == (StatedFact(plain, 1),)
    joined = StatedFact(dataclasses.replace(chat, join=" "), 1)
    assert [fact for _, fact in sync.plan([joined], edits).changed] == [joined]
