"""The playground without its page: edits undone in any order, the questions, and bad input that changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import errata
from errata.benchmarks.bench.config import ModelConfig
from errata.benchmarks.facts import fact_file
from errata.editors.core.errors import ConfigError, ErrataError, ExportError, LedgerError, NumericalError, RequestError
from errata.editors.rome import ROME
from errata.evaluate import generation
from errata.playground import app, export, html
from errata.playground.examples import COMMON, COMMON_IN_CHAT, ExampleFact, examples, questions
from errata.playground.session import AppliedEdit, AskedQuestion, Reply, Session, SessionOptions, Sessions, SessionView

Digest = Callable[[Any], str]
WORLD = ModelConfig("world")
CPU = SessionOptions(device="cpu")


@pytest.fixture(scope="module")
def opened() -> Session:
    return Session.open(WORLD, CPU)


@pytest.fixture
def session(opened: Session) -> Iterator[Session]:
    """A session without edits."""
    session = Session(opened.model, opened.tokenizer, WORLD, opened.testbed)
    yield session
    session.clear()


@pytest.fixture
def facts(session: Session) -> list[ExampleFact]:
    return examples(session.testbed)


def rewrite(view: SessionView) -> AskedQuestion:
    (asked,) = view.of("rewrite")
    return asked


def test_an_edit_changes_the_first_answer_and_undoing_it_brings_bits_and_answers_back(
    session: Session, facts: list[ExampleFact], digest: Digest
) -> None:
    before = digest(session.model)
    made = session.make("rome", facts[0])
    view = session.view(made.id)
    assert rewrite(view).now.says_target
    assert not rewrite(view).untouched.says_target
    assert rewrite(view).now.top[0][0].strip() == facts[0].target
    assert digest(session.model) != before
    assert not session.undo(made.id).is_applied
    assert digest(session.model) == before
    undone = session.view(made.id)
    assert all(asked.now == asked.untouched for asked in undone.asked)
    assert rewrite(undone).untouched == rewrite(view).untouched


def test_an_edit_in_the_middle_can_be_undone_and_made_again(
    session: Session, facts: list[ExampleFact], digest: Digest
) -> None:
    made = [session.make("rome", fact) for fact in facts[:2]]
    both = digest(session.model)
    session.undo(made[0].id)
    assert [entry.is_applied for entry in session.history] == [False, True]
    assert rewrite(session.view(made[1].id)).now.says_target
    assert not rewrite(session.view(made[0].id)).now.says_target
    session.redo(made[0].id)
    session.undo(made[1].id)
    session.redo(made[1].id)
    assert digest(session.model) == both
    assert [entry.id for entry in session.history] == [entry.id for entry in made]


def test_methods_that_write_weights_and_a_codebook_can_be_mixed_and_undone(
    session: Session, facts: list[ExampleFact], digest: Digest
) -> None:
    before = digest(session.model)
    first, second = session.make("grace", facts[0]), session.make("rome", facts[1])
    assert rewrite(session.view(first.id)).now.says_target
    session.undo(first.id)
    assert not rewrite(session.view(first.id)).now.says_target
    assert rewrite(session.view(second.id)).now.says_target
    session.clear()
    assert digest(session.model) == before
    assert not any(made.is_applied for made in session.history)


LONG = "word " * 3_000
BAD: dict[str, tuple[Callable[[ExampleFact], ExampleFact], str, str]] = {
    "empty target": (lambda fact: replace(fact, target=" "), "rome", "target"),
    "empty prompt": (lambda fact: replace(fact, prompt=""), "rome", "prompt"),
    "subject not in the prompt": (lambda fact: replace(fact, prompt="The capital is"), "rome", "subject"),
    "two slots": (lambda fact: replace(fact, prompt="{} and {} are"), "rome", "slots"),
    "prompt longer than the model": (lambda fact: replace(fact, prompt=LONG + "{} is"), "rome", "at most 128 tokens"),
    "question longer than the model": (lambda fact: replace(fact, wordings=(LONG,)), "rome", "at most 128 tokens"),
    "no such method": (lambda fact: fact, "rme", "did you mean 'rome'"),
    "method that was not trained": (lambda fact: fact, "mend", "errata train"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused_says_why_and_changes_nothing(
    kind: str,
    session: Session,
    facts: list[ExampleFact],
    digest: Digest,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    spoil, method, said = BAD[kind]
    before = digest(session.model)
    with pytest.raises(ErrataError) as refused:
        session.make(method, spoil(facts[0]))
    assert said in str(refused.value)
    assert digest(session.model) == before
    assert session.history == ()


def test_an_edit_that_the_method_refuses_leaves_model_and_history_alone(
    session: Session, facts: list[ExampleFact], digest: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise NumericalError("the update is not finite")

    before = digest(session.model)
    monkeypatch.setattr(ROME, "solve", refuse)
    with pytest.raises(NumericalError, match="not finite"):
        session.make("rome", facts[0])
    assert digest(session.model) == before
    assert session.history == ()


def test_undoing_twice_and_unknown_edits_are_refused(session: Session, facts: list[ExampleFact]) -> None:
    made = session.make("rome", facts[0])
    session.undo(made.id)
    with pytest.raises(LedgerError, match="nothing to undo"):
        session.undo(made.id)
    for act in (session.undo, session.view):
        with pytest.raises(LedgerError, match="no such edit was made here"):
            act("nothing")


def test_an_edit_that_is_on_the_model_already_is_refused_in_the_words_of_the_page(
    session: Session, facts: list[ExampleFact]
) -> None:
    with pytest.raises(LedgerError, match="undo it first, or change a field"):
        for _ in range(4):  # the second is computed on top of the first, and may differ from it
            session.make("ft_l", facts[0])
    assert session.applied


def test_long_work_reports_its_progress(session: Session, facts: list[ExampleFact]) -> None:
    told: list[tuple[int, int, str]] = []
    session.make("rome", facts[0], progress=lambda done, total, what: told.append((done, total, what)))
    assert told
    assert all(0 <= done <= total for done, total, _ in told)


# --- what is asked ------------------------------------------------------------------------------------------------


def test_every_example_of_the_testbed_has_wordings_and_neighbours_to_ask(opened: Session) -> None:
    facts = examples(opened.testbed)
    assert len(facts) > 8
    assert len({fact.subject for fact in facts}) == len(facts)
    for fact in facts:
        kinds = [probe.kind for probe in questions(fact, fact.request(), opened.testbed)]
        assert kinds.count("rewrite") == 1
        assert kinds.count("paraphrase") >= 1, fact
        assert kinds.count("neighborhood") >= 3, fact


def test_what_the_user_asks_goes_before_what_the_testbed_knows(opened: Session) -> None:
    fact = replace(examples(opened.testbed)[0], wordings=("Of {}, they say", " "), others=("Gavaria",))
    asked = questions(fact, fact.request(), opened.testbed)
    assert [probe.prompt for probe in asked if probe.kind == "paraphrase"] == [f"Of {fact.subject}, they say"]
    assert [probe.prompt for probe in asked if probe.kind == "neighborhood"] == [fact.prompt.replace("{}", "Gavaria")]


def test_a_subject_and_an_answer_that_the_testbed_does_not_know_can_be_asked_about(opened: Session) -> None:
    fact = replace(examples(opened.testbed)[0], subject="Atlantis", target="something else")
    asked = questions(fact, fact.request(), opened.testbed)
    assert {probe.kind for probe in asked} == {"rewrite", "paraphrase", "neighborhood"}
    strange = ExampleFact("I wonder whether {} is", "Gavaria", "far")
    assert [probe.kind for probe in questions(strange, strange.request(), opened.testbed)] == ["rewrite"]


@pytest.mark.parametrize("fact", COMMON, ids=lambda fact: fact.subject)
def test_examples_for_other_models_are_requests_with_questions(fact: ExampleFact) -> None:
    asked = questions(fact, fact.request(), None)
    assert len(asked) == 1 + len(fact.wordings) + len(fact.others)
    assert all("{}" not in probe.prompt for probe in asked)


def reply(word: str, share: float = 0.5) -> Reply:
    return Reply(((word, share),), word, None)


def test_a_neighbour_has_held_if_its_likeliest_answer_is_what_it_was() -> None:
    assert AskedQuestion("neighborhood", "p", reply(" a", 0.9), reply(" a", 0.3)).held
    assert not AskedQuestion("neighborhood", "p", reply(" a"), reply(" b")).held


# --- several models -----------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(tmp_path: Any) -> None:
    sessions = Sessions({"world": WORLD, "none": ModelConfig(str(tmp_path))}, CPU)
    session = sessions.choose("world")
    assert sessions.choose("world") is session
    for name, said in (("none", "holds no config.json"), ("stranger", "no model 'stranger' here")):
        with pytest.raises(ConfigError, match=said):
            sessions.choose(name)
    assert (sessions.name, sessions.session) == ("world", session)


def test_a_request_error_is_raised_before_the_model_is_asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_ask", lambda probes: pytest.fail(f"{probes} were asked"))
    with pytest.raises(RequestError, match="field 'target'"):
        session.make("rome", ExampleFact("{} is", "x", ""))


def test_an_edit_knows_how_long_it_took(session: Session, facts: list[ExampleFact]) -> None:
    made = session.make("rome", facts[0])
    assert isinstance(made, AppliedEdit)
    assert math.isfinite(made.seconds)
    assert made.seconds > 0


# --- how it was started -------------------------------------------------------------------------------------------


def test_fields_of_methods_reach_the_edit(opened: Session, facts: list[ExampleFact]) -> None:
    options = SessionOptions({"rome": {"v_num_grad_steps": 3, "mom2_adjustment": False}}, device="cpu")
    session = Session(opened.model, opened.tokenizer, WORLD, opened.testbed, options)
    made = session.make("rome", facts[0])
    session.clear()
    assert (made.edit.config["v_num_grad_steps"], made.edit.config["mom2_adjustment"]) == (3, False)


# --- what the model says already ------------------------------------------------------------------------------------


def test_where_the_model_says_the_answer_already_there_is_a_hint(session: Session, facts: list[ExampleFact]) -> None:
    view = session.view(session.make("rome", facts[0]).id)
    assert "already" not in html.answers(view)
    truth = rewrite(view).untouched.text.partition(".")[0].strip()
    session.clear()
    known = session.view(session.make("rome", replace(facts[0], target=truth)).id)
    assert f"says <b>{truth}</b> here already" in html.answers(known)


# --- chat -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def in_chat(opened: Session) -> Iterator[Session]:
    """A session whose tokenizer has a chat template."""
    tokenizer = copy.deepcopy(opened.tokenizer)
    tokenizer.chat_template = TEMPLATE
    session = Session(opened.model, tokenizer, WORLD, opened.testbed)
    yield session
    session.clear()


def test_a_fact_in_chat_is_edited_and_asked_inside_the_template(
    in_chat: Session, facts: list[ExampleFact], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: list[Any], tokens: int) -> list[str]:
        read.extend(prompt.text for prompt in prompts)
        return own(model, tokenizer, prompts, tokens)

    own = generation.generate
    monkeypatch.setattr(generation, "generate", generate)
    fact = replace(facts[0], chat=True, others=("Gavaria",), wordings=("Of {}, they say",))
    made = in_chat.make("ft_m", fact)
    assert made.request.chat
    assert all(probe.chat for probe in made.questions)
    view = in_chat.view(made.id)
    assert rewrite(view).now.says_target
    assert f"[user] {made.request.text}\n[assistant] " in read
    assert all(text.startswith("[user] ") and text.endswith("[assistant] ") for text in read)


def test_a_fact_in_chat_is_refused_where_there_is_no_template(session: Session, facts: list[ExampleFact]) -> None:
    assert not session.has_chat
    with pytest.raises(RequestError, match="chat"):
        session.make("rome", replace(facts[0], chat=True))


def test_a_model_with_a_template_gets_examples_in_chat(in_chat: Session) -> None:
    assert in_chat.has_chat
    assert [fact.chat for fact in examples(None, chat=True)] == [True] * len(COMMON_IN_CHAT) + [False] * len(COMMON)


def test_white_space_around_a_prompt_and_what_joins_it_stay(opened: Session) -> None:
    fact = ExampleFact("In code, {} is\n", " x ", " y ", ("Of {}:\n",), (" z ",), join="")
    request = fact.request()
    assert (request.prompt, request.subject, request.target, request.join) == ("In code, {} is\n", "x", "y", "")
    asked = questions(fact, request, opened.testbed)
    assert [probe.prompt for probe in asked] == ["In code, x is\n", "Of x:\n", "In code, z is\n"]
    assert {probe.join for probe in asked} == {""}


def test_the_page_has_a_field_for_what_joins_prompt_and_answer(session: Session, facts: list[ExampleFact]) -> None:
    gradio = pytest.importorskip("gradio")
    sessions = Sessions({"world": WORLD}, CPU)
    sessions.name, sessions.session = "world", session
    page = app._Page(gradio, sessions, ["world"], ["ft_m"])
    page.build()
    assert page.fill(0)[-1] == "as the language is written"
    edit = page._edit_handler()
    edit("ft_m", "x = {}", facts[0].subject, "7", "", "", False, "nothing")
    edit("ft_m", facts[0].prompt, facts[0].subject, facts[0].target, "", "", False, "as the language is written")
    assert [made.request.join for made in session.history] == ["", None]


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_bits(
    session: Session, facts: list[ExampleFact], digest: Digest, tmp_path: Path
) -> None:
    session.options = SessionOptions(out=tmp_path / "kept")
    with pytest.raises(ConfigError, match="nothing to save"):
        session.save("mine")
    session.make("rome", facts[0])
    dropped = session.make("grace", facts[1])
    session.make("memit", facts[2])
    session.undo(dropped.id)
    edited = digest(session.model)
    folder = session.save("../../mine: two facts")
    assert folder.parent == tmp_path / "kept"
    with pytest.raises(ExportError):
        session.save("../../mine: two facts")
    session.clear()
    errata.load_ledger(folder, session.model, session.tokenizer)
    assert digest(session.model) == edited


def test_the_program_makes_the_same_edits_again(
    opened: Session, facts: list[ExampleFact], digest: Digest, tmp_path: Path
) -> None:
    options = SessionOptions({"rome": {"v_num_grad_steps": 5}}, device="cpu")
    session = Session(opened.model, opened.tokenizer, WORLD, opened.testbed, options)
    session.make("rome", facts[0])
    session.make("ft_m", replace(facts[1], target='a "quoted" \\ answer'))
    session.make("rome", facts[2])
    edited = digest(session.model)
    text = export.as_python([made.edit for made in session.applied], session.load_arguments)
    session.clear()
    assert "{'v_num_grad_steps': 5}" in text
    assert "from errata.editors import FTM" in text
    program = tmp_path / "again.py"
    program.write_text(text + f"model.save_pretrained({str(tmp_path / 'model')!r})\n")
    exec(compile(program.read_text(), str(program), "exec"), {"__name__": "__main__"})
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == edited


def test_facts_are_read_back_as_the_same_requests(session: Session, facts: list[ExampleFact], tmp_path: Path) -> None:
    first = session.make("rome", replace(facts[0], target="no: 1945 # {}"))
    session.make("rome", facts[1])
    last = session.make("rome", replace(facts[1], target="Gavaria"))
    path = tmp_path / "facts.yaml"
    path.write_text(export.as_facts([made.request for made in session.applied]), encoding="utf-8")
    assert [fact.request for fact in fact_file.read(path)] == [first.request, last.request]
    assert "id:" not in path.read_text(encoding="utf-8")
