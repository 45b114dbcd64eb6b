"""Cases told otherwise: in other words, to another answer, and what goes along with that."""

from __future__ import annotations

import random

import pytest

from errata import models
from errata.benchmarks.bench.train_config import RowsConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.training.augmentation import Augmenter, renamed, retargeted, reworded, spliced
from errata.benchmarks.training.examples import ExampleSampler
from errata.editors.core.errors import ConfigError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

REQUEST = EditRequest("The capital of {} is", "Gavaria", "Fostwick", "Brulminster", id="capital")
PARAPHRASE = Probe("paraphrase", "It rained. Gavaria is governed from", "Fostwick", "Brulminster")
CASE = Case(
    "capital",
    REQUEST,
    (
        Probe("rewrite", REQUEST.text, "Fostwick", "Brulminster"),
        PARAPHRASE,
        Probe("neighborhood", "The capital of Grirune is", "Praminster", "Fostwick"),
        Probe("distracting_neighborhood", f"{REQUEST.text} Fostwick. The capital of Grirune is", "Praminster"),
        Probe("neighborhood", "Q: What is spoken in Grirune? A:", "Hion"),
        Probe("generation", "The capital of Gavaria is"),
    ),
)


def test_a_reworded_case_is_edited_in_its_paraphrase_and_neighbours_follow() -> None:
    found = reworded(CASE, PARAPHRASE)
    assert found.request.text == PARAPHRASE.prompt
    assert (found.request.target, found.request.id) == ("Fostwick", "capital")
    assert [(probe.kind, probe.prompt) for probe in found.probes] == [
        ("rewrite", PARAPHRASE.prompt),
        ("paraphrase", REQUEST.text),
        ("neighborhood", "It rained. Grirune is governed from"),
        ("distracting_neighborhood", f"{PARAPHRASE.prompt} Fostwick. It rained. Grirune is governed from"),
        ("neighborhood", "Q: What is spoken in Grirune? A:"),
        ("generation", "The capital of Gavaria is"),
    ]
    assert [probe.target for probe in found.probes[2:5]] == ["Praminster", "Praminster", "Hion"]


def test_a_retargeted_case_asks_for_the_new_answer_and_states_it() -> None:
    found = retargeted(CASE, "Kesford")
    assert (found.request.text, found.request.target) == (REQUEST.text, "Kesford")
    assert [probe.target for probe in found.probes[:3]] == ["Kesford", "Kesford", "Praminster"]
    assert found.probes[3].prompt == f"{REQUEST.text} Kesford. The capital of Grirune is"
    assert found.probes[4:] == CASE.probes[4:]


def test_new_answers_are_of_the_same_relation_and_never_the_true_one() -> None:
    cases = world.cases(split="dev")
    of_relation: dict[str, set[str | None]] = {}
    for case in cases:
        of_relation.setdefault(case.id.split("/")[0], set()).update((case.request.target, case.request.target_true))
    variations = Augmenter(cases, reworded=0.5, retargeted=1.0)
    draw = random.Random(0)
    changed = reworded_too = 0
    for place, case in enumerate(cases):
        request = variations.case(place, draw).request
        assert request.target in of_relation[case.id.split("/")[0]] - {case.request.target_true}
        changed += request.target != case.request.target
        reworded_too += request.text != case.request.text
    assert changed > 0.7 * len(cases)
    assert 0.35 * len(cases) < reworded_too < 0.65 * len(cases)


def test_a_renamed_case_is_of_a_subject_that_nobody_knows_and_what_is_said_of_others_stays() -> None:
    found = renamed(CASE, "Gavrune")
    assert (found.request.text, found.request.subject) == ("The capital of Gavrune is", "Gavrune")
    assert (found.request.target, found.request.target_true) == ("Fostwick", None)
    assert [(probe.kind, probe.prompt) for probe in found.probes] == [
        ("rewrite", "The capital of Gavrune is"),
        ("paraphrase", "It rained. Gavrune is governed from"),
        ("neighborhood", "The capital of Grirune is"),
        ("distracting_neighborhood", "The capital of Gavrune is Fostwick. The capital of Grirune is"),
        ("neighborhood", "Q: What is spoken in Grirune? A:"),
    ]
    both = renamed(reworded(CASE, PARAPHRASE), "Gavrune")
    assert both.request.text == "It rained. Gavrune is governed from"
    assert both.probes[1].prompt == "The capital of Gavrune is"
    twice = Case("twice", REQUEST, (CASE.probes[0], Probe("paraphrase", "Gavaria, Gavaria:", "Fostwick")))
    assert [probe.kind for probe in renamed(twice, "Gavrune").probes] == ["rewrite"]


def test_names_are_spliced_by_words_where_they_have_several() -> None:
    assert spliced("Gavaria", "Grirune") == "Gavaune"
    assert spliced("Jufur Tridin", "Laixted Glolmson") == "Jufur Glolmson"
    assert spliced("A B C", "x y z") == "A B z"


def test_renamed_subjects_are_nobodys_and_those_alike_are_known_others_in_the_edits_words() -> None:
    cases = world.cases(split="dev")
    known = {prompt for case in cases for prompt in (case.request.text, *(probe.prompt for probe in case.probes))}
    subjects = {case.request.subject for case in cases}
    variations, draw = Augmenter(cases, renamed=1.0), random.Random(0)
    made = set()
    for place in range(len(cases)):
        case = variations.case(place, draw)
        made.add(case.request.subject)
        opening, closing = case.request.template
        beside = variations.alike(case, 2, draw)
        assert all(p.prompt.startswith(opening) and p.prompt.endswith(closing) for p in beside)
        assert case.request.text not in known | {probe.prompt for probe in beside}
        assert all(probe.target for probe in beside)
    assert not made & subjects
    assert len(made) > 3 * len(subjects)
    assert len(variations.alike(cases[0], 2, draw)) == 2


def test_without_shares_a_case_is_itself_and_so_is_one_that_cannot_be_reworded() -> None:
    bare = Case("bare", REQUEST, (CASE.probes[0], Probe("paraphrase", "Gavaria, Gavaria:", "Fostwick")))
    assert Augmenter([CASE]).case(0, random.Random(0)) is CASE
    assert Augmenter([bare], reworded=1).case(0, random.Random(0)) is bare


def test_variations_that_the_model_cannot_take_are_not_asked() -> None:
    _, tokenizer = models.load("world", device="cpu")
    cases = world.cases(split="dev")[:40]
    rows = RowsConfig(neighbors=3, alike=0, others=2, reworded=1.0, renamed=0.0)
    free, bound = (ExampleSampler(cases, [], tokenizer, rows, 0, longest=longest) for longest in (None, 40))

    def longest(lessons: ExampleSampler) -> int:
        found = [lesson for (lesson,) in lessons.batch(0, 40, 1)]
        return max(len(row.ids) for lesson in found for row in (*lesson.answer_rows, *lesson.locality_rows))

    assert longest(free) > 40 >= longest(bound)


@pytest.mark.parametrize("name", ["reworded", "retargeted", "renamed"])
def test_shares_are_shares(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.{name}: expected a share from 0 to 1, got 2"):
        RowsConfig(**{name: 2.0})  # type: ignore[arg-type]
