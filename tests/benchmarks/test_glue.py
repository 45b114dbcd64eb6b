"""The glue tasks of AlphaEdit's code: prompts, answers, F1 by hand and by scikit-learn, and a model that is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import errata
from errata.benchmarks.ability import ability, glue
from errata.benchmarks.ability.ability import AbilityConfig
from errata.benchmarks.ability.scores import chance_of_samples
from errata.benchmarks.bench import sequences
from errata.editors.core.errors import ConfigError

SENTENCES = {"sentence": "A fine {boat}", "sentence1": "Oslen is a town.", "sentence2": "Oslen is big."}


def write(folder: Path, name: str, count: int, **fields: Any) -> None:
    records = [{"label": i % 2, **SENTENCES, **fields} for i in range(count)]
    (folder / f"{name}.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("glue_sst", "Review :A fine {boat}\nSentiment :"),
        ("glue_rte", "Oslen is a town.\nquestion: Oslen is big. True or False?\nanswer:"),
        ("glue_cola", "Is this sentence linguistically acceptable?\nSentence: A fine {boat}\nAnswer: "),
        ("glue_mmlu", "Question: Why?\n(A) a\n(B) b\n(C) c\n(D) d\nAnswer:"),
    ],
)
def test_prompts_hold_the_fields_and_the_first_ten_records_are_examples(name: str, prompt: str, tmp_path: Path) -> None:
    task = glue.TASKS[name]
    write(tmp_path, name.removeprefix("glue_"), 13, question="Why?", choices=list("abcd"))
    found = glue.questions(task, tmp_path, None)
    assert [question.prompt for question in found] == [prompt] * 3
    assert [question.label for question in found] == [0, 1, 0]
    assert len(glue.questions(task, tmp_path, 2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("glue_sst", "Review :positive\nSentiment : negative", 0),  # what follows the cue counts
        ("glue_sst", "Sentiment : a Sentiment : POSITIVE", 1),
        ("glue_mrpc", "Answer: yes", 1),
        ("glue_mrpc", "Answer: maybe", -1),
        ("glue_rte", "answer: true", 0),  # entailment
        ("glue_rte", "answer: false", 1),
        ("glue_nli", "Answer: True", 1),
        ("glue_mmlu", "Answer: c\n", 2),
        ("glue_mmlu", "Answer: c", -1),
        ("glue_cola", "Answer:  No, it", 0),
    ],
)
def test_answers_are_read_behind_the_last_cue_on_ten_texts(name: str, text: str, label: int) -> None:
    assert glue.TASKS[name].read(text) == label


def test_the_weighted_f1_by_hand_and_as_scikit_learn_has_it() -> None:
    right, said = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, -1, 1, 1, 0, -1]
    zero, one = 2 * 3 / (6 + 4), 2 * 2 / (4 + 4)  # twice the hits over the right and the given
    assert glue.weighted_f1(right, said) == pytest.approx(0.6 * zero + 0.4 * one)
    sklearn = pytest.importorskip("sklearn.metrics")
    theirs = sklearn.f1_score(right, said, average="weighted", zero_division=0)
    assert glue.weighted_f1(right, said) == pytest.approx(theirs)


def test_a_model_is_asked_without_lm_eval_and_chance_stands_beside_its_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "rte", 14)
    monkeypatch.setattr(ability, "_imported", lambda: pytest.fail("lm-eval was imported"))
    config = AbilityConfig(tasks=("glue_rte",), path=str(tmp_path), limit=3)
    ability.check(config)
    assert ability.digests(config) is not None
    found = ability.measure(*errata.load("world"), config)
    assert list(found) == ["glue_rte", "glue_rte/as_published", "glue_rte/words"]
    assert {(score.n, score.chance) for score in found.values()} == {(3, 0.5)}
    assert ability.mean(found) == found["glue_rte"].value
    assert ability.chance_of_plain(ability.plain(found)) == 0.5


def test_suites_stand_for_their_tasks() -> None:
    config = AbilityConfig(tasks=("glue", "glue_sst", "world_facts", "capability"))
    assert config.glue_tasks == list(glue.TASKS)
    assert [task.name for task in config.lm_eval_tasks] == ["world_facts", *ability.SUITES["capability"]]


@pytest.mark.parametrize("content", ["[]", "nonsense", '[{"label": 0}]', json.dumps([{"sentence": "a"}] * 11)])
def test_files_of_another_form_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "sst.json").write_text(content)
    with pytest.raises(ConfigError, match=r"sst\.json"):
        ability.check(AbilityConfig(tasks=("glue_sst",), path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"ability\.path"):
        ability.check(AbilityConfig(tasks=("glue_sst",)))


def test_chance_is_the_mean_over_questions_of_guessing() -> None:
    samples = [{"filtered_resps": [0] * 4}, {"filtered_resps": [0] * 2}]
    assert chance_of_samples(samples) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert chance_of_samples([{"filtered_resps": ["said"]}]) is chance_of_samples(()) is None


def test_checkpoints_at_given_numbers_of_edits_are_due_once() -> None:
    bench: Any = SimpleNamespace(config=SimpleNamespace(eval_every=None, eval_at=(1, 5, 10)))
    ends = [(0, 4), (4, 8), (8, 12), (12, 16)]  # batches of four
    assert [sequences._is_due(bench, *end) for end in ends] == [True, True, True, False]
    every: Any = SimpleNamespace(config=SimpleNamespace(eval_every=8, eval_at=(1,)))
    assert [sequences._is_due(every, *end) for end in ends] == [True, True, False, True]
