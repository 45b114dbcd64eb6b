"""Gu et al.'s eight tasks: their files, their prompts, ten texts by hand per rule, and a model that is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import errata
from errata.benchmarks.ability import ability
from errata.benchmarks.ability.ability import AbilityConfig
from errata.benchmarks.ability.gu_tasks import answers, records
from errata.benchmarks.ability.tasks import GU_TASKS
from errata.editors.core.errors import ConfigError

NER = "-DOCSTART- -X- O O\n\nIlda NNP B-NP B-PER\nMoren NNP I-NP I-PER\n, , O O\nof IN B-PP O\nOslen NNP B-NP B-LOC\n"
FILES = {
    "test-reasoning.jsonl": json.dumps({"question": "2 and 3?", "answer": "2 + 3 = 5.\n#### 5"}),
    "test-NLI.tsv": "index\tsentence1\tsentence2\tlabel\n0\tOslen is big.\tOslen is small.\tnot_entailment\n",
    "test-OpenDomainQA.jsonl": json.dumps({"question": "Who?", "output": ["Ilda did."], "answer": ["Ilda Moren"]}),
    "test-ClosedDomainQA.jsonl": json.dumps({"question": "is it", "passage": "It is.", "answer": True}),
    "test-dialogue/dev_1.txt": "{'answers': 'B', 'options': ['a', 'b', 'c', 'd'], 'article': 'f : hello'}",
    "test-summarization.json": json.dumps([{"dialogue": "A: Tea?", "summary": "A wants tea."}]),
    "test-NER.txt": NER,
    "test-SentimentAnalysis.tsv": "sentence\tlabel\na fine boat\t1\n",
}


def write(folder: Path) -> Path:
    (folder / "test-dialogue").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_model_is_asked_all_eight_with_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("rouge_score")
    original, seen = lm_eval.simple_evaluate, {}

    def evaluated(**options: Any) -> Any:
        found = original(**options)
        seen.update({name: rows[0]["arguments"][0] for name, rows in found["samples"].items()})
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    config = AbilityConfig(("gu8",), path=str(write(tmp_path)))
    ability.check(config)
    found = ability.measure(*errata.load("world", device="cpu"), config)
    assert set(found) == set(GU_TASKS)
    assert {name: score.chance for name, score in found.items() if score.chance} == {
        "gu8_inference": 0.5, "gu8_closed_qa": 0.5, "gu8_sentiment": 0.5, "gu8_dialogue": 0.25,
    }  # fmt: skip
    assert (found["gu8_summarization"].metric, found["gu8_entities"].metric, found["gu8_entities"].n) == (
        "rouge", "recall", 2,
    )  # fmt: skip
    assert seen["gu8_inference"][0] == "Oslen is big. entails the Oslen is small.. True or False? answer:"
    assert seen["gu8_reasoning"][0] == (
        "Q: 2 and 3? A:Let's think step by step. 2 + 3 = 5.\n Therefore, the answer (arabic numerals) is:"
    )
    assert seen["gu8_dialogue"][0].endswith("(A)a(B)b(C)c(D)d A: Among A through D, the answer is")
    assert (
        seen["gu8_entities"][0]
        == "Please identify Person Entity from the given text. Text: Ilda Moren, of Oslen Entity:"
    )
    assert [seen[name][1]["max_gen_toks"] for name in GU_TASKS] == [5, 1, 20, 1, 1, 25, 10, 1]


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder task-data"):
        records.check(["inference"], None)
    for name in (
        "reasoning",
        "inference",
        "open_qa",
        "closed_qa",
        "dialogue",
        "summarization",
        "entities",
        "sentiment",
    ):
        with pytest.raises(ConfigError, match="test-"):
            records.check([name], str(tmp_path))
    (tmp_path / "test-NER.txt").write_text("word\n")
    with pytest.raises(ConfigError, match=r"test-NER\.txt cannot be read"):
        records.check(["entities"], str(tmp_path))


def test_entities_end_where_their_labels_say() -> None:
    labels = ["B-PER", "I-PER", "B-LOC", "O", "I-ORG", "B-PER", "B-PER"]
    assert records.spans(labels) == [("PER", 0, 2), ("LOC", 2, 3), ("ORG", 4, 5), ("PER", 5, 6), ("PER", 6, 7)]


Rule = Callable[[Any, Sequence[str]], dict[str, Any]]
WANTED: list[tuple[Rule, dict[str, Any], list[tuple[str, float]]]] = [
    (answers.reasoning, {"number": "12"}, [
        (" 12.", 1), ("12", 1), (" 1 2", 0), (" twelve", 0), (" 112", 1), ("", 0), (" 21", 0), (" $12", 1),
        (" 1,200", 0), ("\n12", 1),
    ]),
    (answers.inference, {"label": "not_entailment"}, [
        (" False", 1), (" false", 1), (" True", 0), ("", 0), (" No", 0), ("False.", 1), (" FALSE", 1), (" untrue", 0),
        (" Fal", 0), ("\n", 0),
    ]),
    (answers.closed_qa, {"answer": False}, [
        (" no", 1), (" No", 1), (" yes", 0), ("", 0), (" not", 1), (" none", 1), (" the", 0), ("NO", 1), (" y", 0),
        (" n", 0),
    ]),
    (answers.dialogue, {"answers": "C"}, [
        (" C", 1), ("C", 1), (" (C", 1), (" c", 0), (" A", 0), (" Chi", 0), ("", 0), (" CD", 1), (" B", 0), ("\nC", 1),
    ]),
    (answers.sentiment, {"label": "1"}, [
        (" positive", 1), ("Positive", 1), (" negative", 0), ("", 0), (" pos", 0), (" POSITIVE", 1), (" good", 0),
        ("positive.", 1), (" neg", 0), (" unpositive", 1),
    ]),
    (answers.open_qa, {"answers": ["Ilda Moren", "the 1990s"]}, [
        (" It was Ilda Moren, who", 1), ("ilda moren", 1), (" Ilda", 0), (" Moren Ilda", 0), (" in the 1990s.", 1),
        (" 1990s", 1), (" 1990", 0), ("", 0), (" Ilda the Moren", 1), (" Answer: Ilda", 0),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "record", "texts"), WANTED, ids=[rule.__name__ for rule, _, _ in WANTED])
def test_rules_on_ten_texts(rule: Rule, record: dict[str, Any], texts: list[tuple[str, float]]) -> None:
    assert len(texts) == 10
    assert [rule(record, [text])["acc"] for text, _ in texts] == [value for _, value in texts]


# Summary, text, and by hand ROUGE-1, ROUGE-2 and ROUGE-L: twice what both share over what both have together, of words,
# of pairs of words, and of the longest common subsequence.
ROUGE = [
    ("a b c d", "a b d", 6 / 7, 2 / 5, 6 / 7),
    ("a b c", "a b c", 1, 1, 1),
    ("a b c", "x y z", 0, 0, 0),
    ("a b c d", "d c b a", 1, 0, 2 / 8),
    ("a a b", "a b", 4 / 5, 2 / 3, 4 / 5),  # a word counts as often as both have it
    ("a", "a", 1, 0, 1),  # one word has no pair
    ("a b c", "", 0, 0, 0),
    ("A, b.", "a b", 1, 1, 1),  # neither case nor punctuation counts
    ("a b c d e", "a c e", 6 / 8, 0, 6 / 8),
    ("runs fast", "run fast", 2 / 4, 0, 2 / 4),  # words are not stemmed
]
# Entities of a sentence, a text, and how many of them it has: as parts of the text, and with their case.
ENTITIES = [
    (["Ilda", "Ann"], " Ilda Moren", 1),
    (["Ilda"], "Ilda", 1),
    (["Ilda"], "ilda", 0),
    (["Ann"], "Annabel", 1),
    (["Ilda Moren"], "Ilda and Moren", 0),
    (["Ilda", "Moren"], "Moren, Ilda", 2),
    (["Ilda", "Ilda"], "Ilda", 2),
    ([], "Ilda", 0),
    (["Ilda"], "", 0),
    (["Oslen", "Ilda", "Ann"], "in Oslen, Ann", 2),
]


@pytest.mark.parametrize(("summary", "text", "one", "two", "longest"), ROUGE)
def test_rouge_of_ten_summaries_by_hand(summary: str, text: str, one: float, two: float, longest: float) -> None:
    pytest.importorskip("rouge_score")
    found = answers.summarization({"summary": summary}, [text])["rouge"]
    assert found == pytest.approx((one + two + longest) / 3)


@pytest.mark.parametrize(("names", "text", "count"), ENTITIES)
def test_entities_in_ten_texts_by_hand(names: list[str], text: str, count: int) -> None:
    found = answers.entities({"kind": "Person", "entities": names}, [text])["recall"]
    assert found == ("Person", count, len(names))


def test_recall_is_a_share_per_kind_and_then_a_mean_over_kinds() -> None:
    counts = [("Person", 1, 2), ("Person", 2, 2), ("Location", 0, 1)]
    assert answers.mean_recall(counts) == pytest.approx((3 / 4 + 0) / 2)
