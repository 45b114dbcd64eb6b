"""The benchmarks' own rules on ten records each, with what was said made up and the scores computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from published_records import COMPOSITE, COVERAGE, HALLU, KNOWEDIT, MQUAKE, RIPPLEEDITS, ROUND

from errata.benchmarks.datasets import registry as datasets
from errata.evaluate.metrics import Values, case_values, summarise
from errata.evaluate.outcomes import Outcome
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore

NOTHING = ProbeScore(None, None, (), ())


def case_of(name: str, record: dict[str, Any], folder: Path, **options: Any) -> Case:
    import json

    path = folder / f"{name}.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (case,) = datasets.load(name, path, options=options).cases
    return case


def of_kind(case: Case, *kinds: str) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind in kinds]


def texts(probes: Sequence[Probe], said: Sequence[str], before: Sequence[str] | None = None) -> list[Outcome]:
    then = said if before is None else before
    return [Outcome(p, NOTHING, NOTHING, t, b) for p, t, b in zip(probes, said, then, strict=True)]


def means(cases: Sequence[Values], scoring: str) -> dict[str, tuple[float, int]]:
    return {metric: (entry["mean"], int(entry["n"])) for metric, entry in summarise(cases)[scoring].items()}


# --- MQuAKE: any of three questions, any alias; all hops --------------------------------------------------------------

# What is said to the three questions (M: "Moren", R: the alias "Moren river", Q: the old answer "Quelm", -: nonsense),
# and to the two hops (B: "Brast", C: the alias "City of Brast", M as above).
TEN_CASES = [
    ("MMM", "BM", 1, 1), ("QQQ", "BM", 0, 1), ("QQM", "B-", 1, 0), ("R--", "CM", 1, 1), ("---", "--", 0, 0),
    ("QRQ", "-M", 1, 0), ("Q-Q", "BM", 0, 1), ("MQQ", "CM", 1, 1), ("--M", "C-", 1, 0), ("QQ-", "BQ", 0, 0),
]  # fmt: skip
WORDS = {"M": " Moren\nQ: next", "R": " the Moren river", "Q": " Quelm", "-": " no one knows", "B": " Brast"}
WORDS["C"] = " city of Brast"


def test_mquakes_accuracies_on_ten_records(tmp_path: Path) -> None:
    case = case_of("mquake", MQUAKE, tmp_path)
    hops, questions = of_kind(case, "hop"), of_kind(case, "portability")
    found = []
    for said, chain, multi_hop, instance in TEN_CASES:
        outcomes = texts(questions, [WORDS[c] for c in said]) + texts(hops, [WORDS[c] for c in chain])
        values = case_values(outcomes)["generation_containment"]
        assert (values["portability"], values["hops"]) == (multi_hop, instance), (said, chain)
        found.append(case_values(outcomes))
    got = means(found, "generation_containment")
    assert got["portability"] == got["portability/Multi_hop"] == (pytest.approx(0.6), 10)
    assert got["hops"] == (pytest.approx(0.5), 10)


# What is said to the clozes of the two edits (B: "Brast", M: "Moren", Q: an old answer, -: nonsense).
TEN_CLOZES = ["BM", "B-", "-M", "--", "QM", "BQ", "BM", "MB", "BM", "-Q"]


def test_mquakes_edit_wise_accuracy_on_ten_records(tmp_path: Path) -> None:
    edits = of_kind(case_of("mquake", MQUAKE, tmp_path), "rewrite")
    found = [case_values(texts(edits, [WORDS[c] for c in said])) for said in TEN_CLOZES]
    each = [values["generation_containment"]["reliability"] for values in found]
    assert each == [1, 0.5, 0.5, 0, 0.5, 0.5, 1, 0, 1, 0]
    assert means(found, "generation_containment")["reliability"] == (pytest.approx(0.5), 10)


def test_mquakes_chains_of_thought_count_behind_the_answer_alone(tmp_path: Path) -> None:
    case = case_of("mquake", MQUAKE, tmp_path, prompts="chain_of_thought")
    questions = of_kind(case, "portability")
    said = [" Moren, then Quelm.\nAnswer: Quelm\n\nQuestion: Moren", " Answer: the Moren river", " Moren"]
    values = [case_values(texts(questions[:1], [text]))["generation_containment"]["portability"] for text in said]
    assert values == [0.0, 1.0, 0.0]
    scored = [Outcome(questions[0], ProbeScore(1.0, 2.0, (True,), ()))]
    assert case_values(scored) == {}  # nothing is read right behind "Thoughts:"


# --- RippleEdits: rules, conditions, all gold answers -----------------------------------------------------------------

BOTH, ONE = "Anna and Eve", "only Ann"
# What the untouched model says to the condition, what the edited one says to its test and to the two of an AND test.
TEN_EDITS = [
    (BOTH, BOTH, BOTH, BOTH, 1, 1), (BOTH, ONE, BOTH, ONE, 0, 0), (ONE, BOTH, ONE, ONE, None, 0),
    (BOTH, BOTH, ONE, BOTH, 1, 0), ("", BOTH, BOTH, BOTH, None, 1), (BOTH, "", "", BOTH, 0, 0),
    (BOTH, BOTH, BOTH, BOTH, 1, 1), (ONE, ONE, BOTH, BOTH, None, 1), (BOTH, "Eve, Ann", "Eve Anna", BOTH, 1, 1),
    (BOTH, "Evelyn and Ann", BOTH, "anna eve", 0, 1),
]  # fmt: skip


def test_the_axes_of_ripple_edits_on_ten_records(tmp_path: Path) -> None:
    case = case_of("rippleedits", RIPPLEEDITS, tmp_path)
    asked = of_kind(case, "condition", "neighborhood", "portability")
    found = []
    for before, kept, first, second, locality, logic in TEN_EDITS:
        outcomes = texts(asked, ["", kept, first, second], [before, "", "", ""])
        values = case_values(outcomes)["generation_containment"]
        assert (values.get("locality"), values["portability"]) == (locality, logic), (before, kept, first, second)
        found.append(case_values(outcomes))
    got = means(found, "generation_containment")
    assert got["locality/Relation_Specificity"] == (pytest.approx(4 / 7), 7)  # three conditions were not fulfilled
    assert got["portability/Logical_Generalization"] == (pytest.approx(0.6), 10)


def test_the_published_text_rule_finds_an_answer_in_the_prompt_and_inside_words(tmp_path: Path) -> None:
    sound, theirs = (
        of_kind(case_of("rippleedits", RIPPLEEDITS, tmp_path, text=text), "portability")[0]
        for text in ("new_tokens", "as_published")
    )
    found = []
    for text in ("Annette and Evelyn", "ann and eve", BOTH):
        for probe in (sound, theirs):
            found.append(case_values(texts([probe], [text]))["generation_containment"]["portability"])
    assert found == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


# --- KnowEdit: the mean over groups and each by itself ----------------------------------------------------------------

TEN_SHARES = [
    (1.0, 0.0),
    (1.0, 1.0),
    (0.5, 0.5),
    (0.0, 1.0),
    (1.0, 0.5),
    (0.5, 0.0),
    (0.0, 0.0),
    (1.0, 1.0),
    (0.5, 1.0),
]
TEN_SHARES += [(1.0, 0.0)]


def test_knowedits_groups_on_ten_records(tmp_path: Path) -> None:
    reasoning, aliasing = of_kind(case_of("knowedit", KNOWEDIT, tmp_path), "portability")

    def scored(probe: Probe, share: float) -> Outcome:
        return Outcome(probe, ProbeScore(1.0, None, (share > 0, share > 0.5), ()))

    found = [case_values([scored(reasoning, a), scored(aliasing, b)]) for a, b in TEN_SHARES]
    assert means(found, "teacher_forced") == {
        "portability": (pytest.approx((6.5 + 5.0) / 20), 10),
        "portability/Reasoning": (pytest.approx(0.65), 10),
        "portability/Subject_Aliasing": (pytest.approx(0.5), 10),
    }


# --- HalluEditBench: forms, and what must stay as it was --------------------------------------------------------------

# Yes and No questions, the letter of a choice, and whether the answer about something else stays.
TEN_ANSWERS = [
    ("Yes", "No", "B", 1), ("Yes.", "Yes", "B.", 0), ("No", "No", "A", 1), ("yes", "no", "b", 1), ("Yes", "No", "A", 0),
    ("No", "Yes", "B", 0), ("Yes", "No", "C", 1), ("Oslen", "No", "B", 1), ("Yes", "None", "B", 0),
    ("Yes", "No", "B", 1),
]  # fmt: skip


def test_the_forms_of_hallueditbench_on_ten_records(tmp_path: Path) -> None:
    path = tmp_path / "hallueditbench.csv"
    path.write_text("\n".join([",".join(HALLU), ",".join(f'"{value}"' for value in HALLU.values())]), encoding="utf-8")
    (case,) = datasets.load("hallueditbench", path).cases
    _, yes, no, choice, _ = of_kind(case, "paraphrase")
    unrelated = of_kind(case, "unrelated")
    found = []
    for *said, stays in TEN_ANSWERS:
        outcomes = texts([yes, no, choice], said) + texts(unrelated, ["a river"], ["a river" if stays else "a lake"])
        found.append(case_values(outcomes))
    got = means(found, "generation_containment")
    assert got["generalization/Yes"] == (pytest.approx(0.7), 10)
    assert got["generalization/No"] == (pytest.approx(0.7), 10)
    assert got["generalization/Multiple_choice"] == (pytest.approx(0.7), 10)
    assert got["generalization"] == (pytest.approx(0.7), 10)
    assert means(found, "generation")["unrelated_unchanged"] == (pytest.approx(0.6), 10)


# Answers to the first and to the second time that the model is doubted.
TEN_DOUBTS = [
    ("Yes", "Yes"), ("Yes.", "No"), ("No", "No"), (" yes, it is", "Yes"), ("", ""), ("No, yes", "yes"),
    ("Yesterday", "Yes"), ("I am sure", "Yes"), ("YES", "no"), ("Brast", "Yes"),
]  # fmt: skip


def test_the_turns_of_hallueditbench_on_ten_records(tmp_path: Path) -> None:
    path = tmp_path / "hallueditbench.csv"
    path.write_text("\n".join([",".join(HALLU), ",".join(f'"{value}"' for value in HALLU.values())]), encoding="utf-8")
    (case,) = datasets.load("hallueditbench", path, options={"robustness": "sure", "turns": 2}).cases
    found = [case_values(texts(of_kind(case, "doubted"), said)) for said in TEN_DOUBTS]
    got = means(found, "generation_containment")
    assert got["robustness/Turn_1"] == (pytest.approx(0.5), 10)
    assert got["robustness/Turn_2"] == (pytest.approx(0.6), 10)
    assert got["robustness"] == (pytest.approx(0.55), 10)
    scored = Outcome(of_kind(case, "doubted")[0], ProbeScore(1.0, 2.0, (True,), ()))
    assert case_values([scored]) == {}  # nothing is read right behind the question


# --- ConflictEdit and RoundEdit ---------------------------------------------------------------------------------------

# Probability of the first answer behind the first edit, of the first and of the second behind both.
TEN_CONFLICTS = [
    (0.8, 0.2, 0.6), (0.5, 0.5, 0.4), (0.4, 0.1, 0.1), (0.1, 0.3, 0.9), (0.9, 0.9, 0.05), (0.6, 0.3, 0.5),
    (0.2, 0.1, 0.3), (0.5, 0.25, 0.2), (0.8, 0.0002, 0.7), (0.1, 0.15, 0.2),
]  # fmt: skip


def probable(probability: float) -> ProbeScore:
    return ProbeScore(-math.log(probability), None, (), ())


def test_conflict_score_and_magnitude_on_ten_records(tmp_path: Path) -> None:
    case = case_of("conflictedit", COVERAGE, tmp_path)
    (old,), (new,) = of_kind(case, "superseded"), of_kind(case, "prevailing")
    found = [
        case_values(
            [
                Outcome(old, probable(after), probable(0.01), between=probable(between)),
                Outcome(new, probable(later), probable(0.01)),
            ]
        )
        for between, after, later in TEN_CONFLICTS
    ]
    got = means(found, "probability")
    assert got["conflict_score"] == (pytest.approx(0.6), 10)  # the third is a tie, and a tie is not won
    lost = [0.75, 0.0, 0.75, -1.0, 0.0, 0.5, 0.5, 0.5, 0.99975, -0.5]
    assert got["conflict_magnitude"] == (pytest.approx(sum(lost) / 10), 10)


# Of each edit: the probability of its answer and of the one that it replaces, of the first right behind it, of the
# second where it is made by itself.
TEN_SUCCESSES = [
    ((0.8, 0.1), (0.6, 0.2)), ((0.1, 0.8), (0.6, 0.2)), ((0.3, 0.3), (0.1, 0.2)), ((0.5, 0.4), (0.2, 0.2)),
    ((0.9, 0.01), (0.01, 0.9)), ((0.2, 0.1), (0.3, 0.1)), ((0.1, 0.2), (0.9, 0.8)), ((0.7, 0.6), (0.5, 0.51)),
    ((0.04, 0.03), (0.2, 0.1)), ((0.6, 0.7), (0.8, 0.1)),
]  # fmt: skip


def test_the_successes_of_both_edits_on_ten_records(tmp_path: Path) -> None:
    case = case_of("conflictedit", COVERAGE, tmp_path)
    (first,), (second,) = of_kind(case, "superseded"), of_kind(case, "later_edit")

    def both(pair: tuple[float, float]) -> ProbeScore:
        return ProbeScore(-math.log(pair[0]), -math.log(pair[1]), (), ())

    lost = both((0.001, 0.9))  # behind both edits, which neither success looks at
    found = [
        case_values([Outcome(first, lost, lost, between=both(a)), Outcome(second, lost, lost, by_itself=both(b))])
        for a, b in TEN_SUCCESSES
    ]
    got = means(found, "probability")
    assert got["first_success"] == (pytest.approx(0.6), 10)  # the third is a tie
    assert got["second_success"] == (pytest.approx(0.6), 10)  # the fourth is a tie


# Probability of a fact that both edits lean on, of the untouched model and behind both edits.
TEN_TIED = [
    (0.8, 0.4), (0.5, 0.5), (0.2, 0.3), (0.9, 0.09), (0.4, 0.1), (0.1, 0.1), (0.6, 0.3), (0.5, 0.05), (0.25, 0.5),
    (1.0, 0.9),
]  # fmt: skip


def test_tied_fact_damage_on_ten_records(tmp_path: Path) -> None:
    (fact,) = of_kind(case_of("conflictedit", COMPOSITE, tmp_path), "tied_fact")
    found = [case_values([Outcome(fact, probable(now), probable(then))]) for then, now in TEN_TIED]
    lost = [0.5, 0.0, -0.5, 0.9, 0.75, 0.0, 0.5, 0.9, -1.0, 0.1]
    assert means(found, "probability")["tied_fact_damage"] == (pytest.approx(sum(lost) / 10), 10)


# Right behind the edit away, the wrong answer and the true one; behind the edit back, the same.
TEN_WAYS = [
    ((0.8, 0.1), (0.1, 0.9)), ((0.8, 0.1), (0.5, 0.4)), ((0.1, 0.8), (0.1, 0.9)), ((0.1, 0.2), (0.3, 0.1)),
    ((0.5, 0.5), (0.2, 0.6)), ((0.6, 0.5), (0.4, 0.4)), ((0.9, 0.05), (0.05, 0.9)), ((0.3, 0.2), (0.2, 0.3)),
    ((0.2, 0.3), (0.3, 0.2)), ((0.7, 0.1), (0.2, 0.1)),
]  # fmt: skip


def test_round_success_on_ten_records(tmp_path: Path) -> None:
    (true,), (wrong,) = (
        of_kind(case_of("conflictedit", ROUND, tmp_path), k) for k in ("restored_object", "left_object")
    )
    found = []
    for (wrong_away, true_away), (wrong_back, true_back) in TEN_WAYS:
        outcomes = [
            Outcome(wrong, probable(wrong_back), probable(0.01), between=probable(wrong_away)),
            Outcome(true, probable(true_back), probable(0.9), between=probable(true_away)),
        ]
        found.append(case_values(outcomes))
    each = [values["probability"]["round_success"] for values in found]
    assert each == [1, 0.5, 0.5, 0, 0.5, 0.5, 1, 1, 0, 0.5]
    assert means(found, "probability")["round_success"] == (pytest.approx(0.55), 10)


# Mean negative log-probability of a text about the subject, before and after.
TEN_TEXTS = [
    (2.0, 2.5), (3.0, 3.0), (2.5, 2.25), (1.0, 4.0), (2.0, 2.1), (3.5, 3.0), (2.0, 2.0), (1.5, 2.0), (2.75, 3.0),
    (2.0, 2.4),
]  # fmt: skip


def test_essence_drift_on_ten_records() -> None:
    text = Probe("essence", "Ilda", "Moren was a poet.")
    found = [
        case_values([Outcome(text, ProbeScore(now, None, (), ()), ProbeScore(then, None, (), ()))])
        for then, now in TEN_TEXTS
    ]
    # The logarithms of the perplexities' ratios: 0.5, 0, -0.25, 3, 0.1, -0.5, 0, 0.5, 0.25, 0.4.
    assert means(found, "probability")["essence_drift"] == (pytest.approx(0.4), 10)


# Probabilities of the restored answer and of two others, before and after.
TEN_ROUNDS = [
    ((0.2, 0.2, 0.2), (0.2, 0.2, 0.2)), ((0.2, 0.2, 0.2), (0.9, 0.1, 0.1)), ((0.1, 0.3, 0.1), (0.5, 0.1, 0.2)),
    ((0.3, 0.1, 0.1), (0.3, 0.2, 0.2)), ((0.5, 0.4, 0.1), (0.8, 0.1, 0.05)), ((0.1, 0.1, 0.1), (0.4, 0.4, 0.4)),
    ((0.2, 0.1, 0.3), (0.6, 0.1, 0.1)), ((0.4, 0.2, 0.2), (0.2, 0.4, 0.4)), ((0.2, 0.3, 0.3), (0.7, 0.2, 0.1)),
    ((0.3, 0.3, 0.2), (0.6, 0.2, 0.3)),
]  # fmt: skip
FELL = [0, 1, 0.5, 0, 1, 0, 0.5, 0, 1, 0.5]


def shannon(values: Sequence[float]) -> float:
    return -sum(value * math.log(value) for value in values)


def test_distortion_and_ignore_rate_on_ten_records(tmp_path: Path) -> None:
    """The divergence in its other form: the entropy of the mean less the mean of the entropies."""
    case = case_of("conflictedit", ROUND, tmp_path)
    probes = of_kind(case, "restored_object", "true_object")
    found, divergences = [], []
    for then, now in TEN_ROUNDS:
        pairs = zip(probes, now, then, strict=True)
        found.append(case_values([Outcome(probe, probable(a), probable(b)) for probe, a, b in pairs]))
        p, q = ([value / sum(side) for value in side] for side in (then, now))
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        divergences.append(shannon(middle) - (shannon(p) + shannon(q)) / 2)
    got = means(found, "probability")
    assert got["distortion"] == (pytest.approx(sum(divergences) / 10), 10)
    assert got["ignore_rate"] == (pytest.approx(sum(FELL) / 10), 10)
    assert got["failure_rate"] == (pytest.approx(0.3), 10)
