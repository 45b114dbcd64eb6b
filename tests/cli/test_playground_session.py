"""The playground without its page: edits undone in any order, the questions, and bad input that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from errata.benchmarks.bench.config import ModelConfig
from errata.editors.core.errors import ConfigError, ErrataError, LedgerError, NumericalError, RequestError
from errata.editors.rome import ROME
from errata.playground.examples import COMMON, ExampleFact, examples, questions
from errata.playground.session import AppliedEdit, AskedQuestion, Reply, Session, Sessions, SessionView

Digest = Callable[[Any], str]
WORLD = ModelConfig("world")


@pytest.fixture(scope="module")
def opened() -> Session:
    return Session.open(WORLD, device="cpu")


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
    sessions = Sessions({"world": WORLD, "none": ModelConfig(str(tmp_path))}, device="cpu")
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
