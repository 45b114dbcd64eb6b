"""What an editor is trained on: cases held out by subject, and examples that depend on seed and step alone."""

from __future__ import annotations

import pytest

from errata import models
from errata.benchmarks.bench.train_config import RowsConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.training.examples import ExampleSampler, fitting, split
from errata.editors.core.errors import DatasetError
from errata.evaluate.probes import Case, Probe


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return world.cases(split="dev")[:60]


def test_cases_are_held_out_by_subject_and_by_seed(cases: list[Case]) -> None:
    parts = split(cases, 10, 0)
    assert 10 <= len(parts.held_out) < 20
    assert len(parts.train) + len(parts.held_out) == len(cases)
    assert not {c.request.subject for c in parts.train} & {c.request.subject for c in parts.held_out}
    assert split(cases, 10, 0) == parts
    assert split(cases, 10, 1) != parts
    with pytest.raises(DatasetError, match="leave none to train on"):
        split(cases, 60, 0)


def test_lessons_depend_on_seed_and_step_alone_and_take_every_case_once_an_epoch(cases: list[Case]) -> None:
    _, tokenizer = models.load("world", device="cpu")

    rows = RowsConfig(texts=1, retargeted=0, renamed=0)

    def made(seed: int = 0) -> ExampleSampler:
        return ExampleSampler(cases, ["One text of several words.", "Another"], tokenizer, rows, seed)

    first = made()
    steps = [first.batch(step, 5, 2) for step in range(6)]
    assert [len(step) for step in steps] == [5] * 6
    assert all(len(edit) == 2 for step in steps for edit in step)
    requests = [lesson.request for step in steps for edit in step for lesson in edit]
    assert sorted(request.text for request in requests) == sorted(case.request.text for case in cases)
    assert made().batch(4, 5, 2) == steps[4]
    assert made(1).batch(4, 5, 2) != steps[4]


def test_a_lesson_asks_the_edit_and_a_paraphrase_and_keeps_neighbours_other_prompts_and_text(cases: list[Case]) -> None:
    _, tokenizer = models.load("world", device="cpu")
    text = "We read that no one knows."
    rows = RowsConfig(neighbors=2, alike=0, others=1, texts=1, text_tokens=4, retargeted=0, renamed=0)
    lessons = ExampleSampler(cases, [text], tokenizer, rows, 0)
    for ((lesson,),) in (lessons.batch(step, 1, 1) for step in range(20)):
        case = next(case for case in cases if case.request is lesson.request)
        said = [tokenizer.decode([*row.ids, row.answer[-1]]) for row in lesson.answer_rows]
        wanted = [f"{p.prompt} {p.target}" for p in case.probes if p.kind == "paraphrase"]
        assert said[0] == f"{case.request.text} {case.request.target}"
        assert len(said) == 2
        assert said[1] in wanted
        kept = [tokenizer.decode(row.ids) for row in lesson.locality_rows]
        kinds = {"neighborhood": 2, "distracting_neighborhood": 1, "attribute": 1}
        near = [p.prompt for p in case.probes if p.kind in kinds]
        there = [p.kind for p in case.probes]
        assert len(kept) == sum(min(count, there.count(kind)) for kind, count in kinds.items()) + 2
        assert all(any(k.startswith(prompt) for prompt in near) for k in kept[:-2])
        assert any(kept[-2].startswith(other.request.text) for other in cases if other is not case)
        assert kept[-1] in text
        assert len(lesson.locality_rows[-1].positions) == 4
        for row, said_so in zip(lesson.locality_rows[:-1], kept[:-1], strict=True):
            assert tokenizer.decode(row.ids[: row.first + 1]) in (*near, *(other.request.text for other in cases)), (
                said_so
            )


def test_cases_that_the_model_cannot_be_asked_are_left_out_by_name(cases: list[Case]) -> None:
    from dataclasses import replace

    model, tokenizer = models.load("world", device="cpu")
    long = replace(cases[0], id="long", probes=(Probe("paraphrase", "word " * 500, "a", "b"),))
    kept, dropped = fitting([long, *cases[:2]], model, tokenizer)
    assert kept == cases[:2]
    assert [entry.record for entry in dropped] == ["long"]
    assert "at most 128 tokens" in dropped[0].reason
