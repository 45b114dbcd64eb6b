"""Answers with aliases, groups of probes, tests of several probes, conditions: hand-computed values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from errata.editors.core.request import EditRequest
from errata.evaluate.metrics import case_values
from errata.evaluate.outcomes import Outcome, match_probe, spoken, success_by_scoring
from errata.evaluate.probes import Case, FreeAnswer, Probe, rounds
from errata.evaluate.scoring import ProbeScore

CAPITAL = Probe("portability", "The capital is", "Brast", aliases=("City of Brast", "Brastburg"))


def outcome(probe: Probe, text: str | None = None, nll: float | None = None, **more: object) -> Outcome:
    return Outcome(probe, ProbeScore(nll, None, (), ()), text=text, **more)  # type: ignore[arg-type]


def said(probe: Probe, text: str, before: str | None = None) -> Outcome:
    return Outcome(probe, ProbeScore(None, None, (), ()), ProbeScore(None, None, (), ()), text, before)


# --- ten answers, judged by hand --------------------------------------------------------------------------------------

OTHER = ("Oslen", "Oslo")
BOTH = replace(CAPITAL, also=(OTHER,))
CUED = replace(CAPITAL, free=FreeAnswer(after="Answer:", until="\n"))
LOOSE = replace(CAPITAL, prompt="Is it Brast? It is", free=FreeAnswer(matching="substring"))


@pytest.mark.parametrize(
    ("probe", "text", "exact", "contained"),
    [
        (CAPITAL, " Brast, of course", True, True),
        (CAPITAL, " the city of brast", False, True),  # an alias, whatever the case
        (CAPITAL, " Brastburg", True, True),
        (CAPITAL, " Brastburgers", False, False),
        (BOTH, " Brast and Oslo", True, True),
        (BOTH, " Brast and Berlin", False, False),  # one of two answers is missing
        (BOTH, " cities: Oslen and Brastburg", False, True),
        (CUED, " Oslen was. Answer: Brast\nQ: Oslen", True, True),
        (CUED, " Brast was it", False, False),  # no cue, no answer
        (LOOSE, " Oslen", True, True),  # the prompt itself holds the answer
    ],
)
def test_a_free_answer_holds_if_it_gives_every_answer_in_any_spelling(
    probe: Probe, text: str, exact: bool, contained: bool
) -> None:
    assert match_probe(probe, text) == (exact, contained)


def test_a_substring_is_looked_for_as_it_is_spelled() -> None:
    probe = Probe("portability", "It is", "Oslo", free=FreeAnswer(matching="substring"))
    assert match_probe(probe, " oslo") == (False, False)
    assert match_probe(probe, " Oslomet") == (True, True)


def test_only_the_part_that_counts_is_read() -> None:
    assert spoken("\n\nBrast\nOslen", FreeAnswer(until="\n")) == "Brast"
    assert spoken("Answer: a Answer: b", FreeAnswer(after="Answer:")) == " a Answer: b"
    assert spoken("Brast", FreeAnswer(after="Answer:")) == ""


def test_aliases_change_neither_probability_nor_teacher_forcing() -> None:
    score = ProbeScore(1.0, 2.0, (True, False), ())
    found = [success_by_scoring(Outcome(probe, score)) for probe in (CAPITAL, replace(CAPITAL, aliases=()))]
    assert found[0] == found[1] == {"probability": 1.0, "teacher_forced": 0.5}


# --- named groups and tests -------------------------------------------------------------------------------------------


def test_a_named_group_has_its_own_mean_beside_that_of_all() -> None:
    probes = [
        Probe("portability", "p", "a", group=group) for group in ("Reasoning", "Reasoning", "Subject_Aliasing", None)
    ]
    values = case_values([said(probe, text) for probe, text in zip(probes, ("a", "b", "a", "a"), strict=True)])
    expected = {"portability": 0.75, "portability/Reasoning": 0.5, "portability/Subject_Aliasing": 1.0}
    assert values == {"generation": expected, "generation_containment": expected}


def of_test(rule: str, texts: str, condition: str | None = None) -> dict[str, float]:
    """The values of a test whose probes want "a" and get the letters of `texts`, and whose condition got a letter."""
    probe = Probe("portability", "p", "a", test="1", rule=rule)  # type: ignore[arg-type]
    asked = [said(probe, text) for text in texts]
    if condition is not None:
        asked.append(said(Probe("condition", "c", "a", test="1"), "whatever", condition))
    return case_values(asked).get("generation", {})


@pytest.mark.parametrize(
    ("rule", "texts", "condition", "value"),
    [
        ("any", "bba", None, 1.0),
        ("any", "bbb", None, 0.0),
        ("all", "aaa", None, 1.0),
        ("all", "aab", None, 0.0),
        ("any", "ba", "a", 1.0),
        ("all", "ba", "a", 0.0),
        ("any", "aa", "b", None),  # the untouched model does not know what the test builds on
        ("all", "aa", "b", None),
    ],
)
def test_any_or_all_probes_of_a_test_must_hold_once_its_condition_did(
    rule: str, texts: str, condition: str | None, value: float | None
) -> None:
    assert of_test(rule, texts, condition) == ({} if value is None else {"portability": value})


def test_a_test_counts_as_one_probe_and_shares_combine_as_their_minimum_or_maximum() -> None:
    def scored(rule: str, *shares: tuple[bool, ...]) -> list[Outcome]:
        probe = Probe("portability", "p", "a", test=rule, rule=rule)  # type: ignore[arg-type]
        return [Outcome(probe, ProbeScore(None, None, share, ())) for share in shares]

    alone = Outcome(Probe("portability", "q", "a"), ProbeScore(None, None, (True,), ()))
    found = [*scored("any", (True, False), (False, False)), *scored("all", (True, True), (True, False)), alone]
    assert case_values(found) == {"teacher_forced": {"portability": pytest.approx((0.5 + 0.5 + 1) / 3)}}


def test_a_condition_counts_under_each_scoring_by_itself() -> None:
    untouched = ProbeScore(1.0, 2.0, (False,), ())
    condition = Outcome(Probe("condition", "c", "a", "b", test="1"), untouched, untouched)
    probe = Outcome(Probe("portability", "p", "a", "b", test="1"), ProbeScore(2.0, 1.0, (True,), ()))
    # It prefers the right answer, so that probability counts, and it would not say it, so that the tokens do not.
    assert case_values([condition, probe]) == {"probability": {"portability": 0.0}}


def test_unrelated_questions_are_compared_with_the_untouched_model() -> None:
    probe = Probe("unrelated", "Who wrote it?")
    found = case_values([said(probe, "Ann", "Ann"), said(probe, "Ann", "Bob")])
    assert found == {"generation": {"unrelated_unchanged": 0.5}}


# --- edits that contradict each other ---------------------------------------------------------------------------------


def probable(kind: str, answer: str, now: float, then: float | None = None, between: float | None = None) -> Outcome:
    def score(p: float | None) -> ProbeScore | None:
        return None if p is None else ProbeScore(-math.log(p), None, (), ())

    after = score(now)
    assert after is not None
    return Outcome(Probe(kind, "p", answer, test="conflict"), after, score(then), between=score(between))


def test_a_conflict_is_won_by_the_more_probable_answer_and_its_magnitude_is_the_loss_of_the_other() -> None:
    old = [probable("superseded", "x", 0.1, 0.01, 0.4), probable("superseded", "x", 0.3, 0.01, 0.8)]
    new = [probable("prevailing", "y", 0.2), probable("prevailing", "y", 0.3)]
    values = case_values([*old, *new])["probability"]
    assert values["conflict_score"] == 1.0  # 0.25 against 0.2
    assert values["conflict_magnitude"] == pytest.approx((0.6 - 0.2) / 0.6)
    values = case_values([probable("superseded", "x", 0.9, 0.01, 0.1), *new])["probability"]
    assert (values["conflict_score"], values["conflict_magnitude"]) == (0.0, -1.0)  # bounded, as the authors do


def test_a_tied_fact_is_damaged_by_what_it_lost_since_before_all_edits() -> None:
    values = case_values([probable("tied_fact", "z", 0.1, 0.4)])["probability"]
    assert values == {"tied_fact_damage": pytest.approx(0.75)}


def test_distortion_is_the_jensen_shannon_divergence_of_the_true_answers() -> None:
    then, now = (0.2, 0.2), (0.3, 0.1)
    found = [probable("restored_object", "a", now[0], then[0]), probable("true_object", "b", now[1], then[1])]
    p, q, m = (0.5, 0.5), (0.75, 0.25), (0.625, 0.375)
    expected = sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    values = case_values(found)["probability"]
    assert values["distortion"] == pytest.approx(expected)
    assert (values["ignore_rate"], values["failure_rate"]) == (1.0, 1.0)
    kept = [*found, *(probable("true_object", name, 0.3, 0.2) for name in "cd")]
    values = case_values(kept)["probability"]
    assert (values["ignore_rate"], values["failure_rate"]) == (pytest.approx(1 / 3), 0.0)


@pytest.mark.parametrize(
    ("between", "now", "share"),
    [
        ((0.5, 0.1), (0.1, 0.5), 1.0),
        ((0.5, 0.1), (0.3, 0.2), 0.5),
        ((0.1, 0.5), (0.1, 0.5), 0.5),
        ((0.1, 0.5), (0.3, 0.3), 0.0),
    ],
)
def test_an_edit_there_and_back_succeeds_by_halves(
    between: tuple[float, float], now: tuple[float, float], share: float
) -> None:
    pairs = zip(("left_object", "restored_object"), now, between, strict=True)
    found = [probable(kind, kind, after, 0.1, then) for kind, after, then in pairs]
    assert case_values(found)["probability"]["round_success"] == share


def test_what_was_not_measured_between_two_edits_is_absent() -> None:
    assert "conflict_magnitude" not in case_values([probable("superseded", "x", 0.1, 0.2)]).get("probability", {})


# --- plain values and rounds --------------------------------------------------------------------------------------


def test_a_probe_reads_back_from_its_plain_values_and_older_ones_say_nothing_new() -> None:
    full = replace(BOTH, other="Oslen", group="Reasoning", test="3", rule="any", free=FreeAnswer(30, "A:", "\n"))
    assert Probe.of({**full.as_dict(), "before": {}}) == full
    plain = Probe("rewrite", "p", "a", "b")
    assert plain.as_dict() == {"kind": "rewrite", "prompt": "p", "target": "a", "other": "b"}
    assert Probe.of(plain.as_dict()) == plain


def request(prompt: str, target: str, name: str) -> EditRequest:
    return EditRequest(prompt, None, target, id=name)


def test_requests_are_edited_together_in_rounds_and_a_shared_one_once() -> None:
    a, b, again = request("a is", "1", "a"), request("b is", "1", "b"), request("a is", "1", "again")
    other = request("a is", "2", "other")
    together = Case("1", a, (), (b,))
    assert rounds([together, Case("2", again, ())]) == [[a, b]]
    turned = Case("3", a, (), (other,), in_turn=True)
    assert rounds([turned, Case("4", b, ())]) == [[a, b], [other]]
    assert Case("5", a, ()).as_dict().keys() == {"id", "request", "probes"}
    assert turned.as_dict()["further"] == [other.as_dict()]
    assert turned.as_dict()["in_turn"]
