"""Memorization and priming: the formulas by hand, no change without an edit, and which prompts are asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from quick_editors import build

from errata.editors.core.errors import ErrataError
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.evaluate.priming import OPENINGS, RELATIONS, SUBJECTS, Ratios, measure, of_losses
from errata.evaluate.priming_prompts import PromptPool
from errata.evaluate.probes import Case, Probe
from errata.evaluate.rank_correlation import spearman

ASKED = (
    Probe("memorization", "The capital of Varland is", "near the Ost"),
    Probe("priming", "The capital of Ilda is", "near the Ost", group=SUBJECTS),
    Probe("priming", "Danielle Darrieux lives in", "near the Ost", group=RELATIONS),
    Probe("priming", "The musician", "near the Ost", group=OPENINGS),
)


def test_the_measures_are_those_of_the_formulas() -> None:
    logs = [[math.log(p) for p in row] for row in ((0.1, 0.2, 0.4), (0.2, 0.2, 0.1))]
    found = Ratios(tuple(logs[0]), tuple(logs[1]))
    assert found.s == pytest.approx((2 + 1 + 0.25) / 3)
    assert found.log10_s == pytest.approx(math.log10(3.25 / 3))
    assert found.mean_log10 == pytest.approx(math.log10(0.5) / 3)
    assert found.median_log10 == pytest.approx(0)
    assert found.delta_p == pytest.approx((0.1 + 0 - 0.3) / 3)
    assert found.p_before == pytest.approx(0.008 ** (1 / 3))


def test_a_probability_that_is_none_has_no_logarithm() -> None:
    for now in (math.nan, -math.inf):
        found = Ratios((-1.0, -1.0), (-1.0, now))
        assert not found.is_finite
        assert math.isnan(found.log10_s)
        assert math.isnan(found.median_log10)


def test_ratios_that_no_float_holds_have_a_logarithm() -> None:
    found = Ratios((-1000.0,), (-0.5,))
    assert found.log10_s == pytest.approx(999.5 / math.log(10))
    assert found.s == math.inf


def test_without_an_edit_both_are_exactly_1(make_tiny: Any, tiny_tokenizer: Any) -> None:
    found = measure(make_tiny("gpt2"), tiny_tokenizer, ASKED, nullcontext())
    assert found.memorization.s == 1
    assert found.priming is not None
    assert found.priming.s == 1
    assert found.priming.mean_log10 == 0
    assert found.priming.delta_p == 0
    assert found.selectivity == 0
    assert list(found.by_place) == [SUBJECTS, RELATIONS, OPENINGS]


def test_the_first_token_is_what_is_measured_and_logarithms_of_two_edits_add_up(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2")
    weight = model.transformer.h[1].mlp.c_proj.weight
    torch.manual_seed(0)
    one, other = torch.randn_like(weight), torch.randn_like(weight)
    first, whole = (measure(model, tiny_tokenizer, ASKED, added(weight, by)) for by in (one, one + other))
    with added(weight, one):
        second = measure(model, tiny_tokenizer, ASKED, added(weight, other))
        (token, *_) = answer_ids(tiny_tokenizer, ASKED[1].prompt, "near the Ost")
        ids = torch.tensor([prompt_ids(tiny_tokenizer, ASKED[1].prompt)])
        with torch.inference_mode():
            expected = float(model(ids).logits[0, -1].log_softmax(-1)[token])
    assert first.by_place[SUBJECTS].after == (pytest.approx(expected, abs=1e-5),)
    for place in (SUBJECTS, RELATIONS, OPENINGS):  # one prompt each
        parts = first.by_place[place].log10_s + second.by_place[place].log10_s
        assert whole.by_place[place].log10_s == pytest.approx(parts, abs=1e-4)
    assert whole.memorization.log10_s != 0


@contextmanager
def added(weight: torch.Tensor, by: torch.Tensor) -> Iterator[None]:
    was = weight.detach().clone()
    with torch.no_grad():
        weight += by
    yield
    with torch.no_grad():
        weight.copy_(was)


@pytest.mark.parametrize("method", ["ft_m", "grace", "ice"])
def test_weights_adapters_and_contexts_are_measured_alike(method: str, make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = build(method, make_tiny("gpt2"), tiny_tokenizer)
    (edit,) = editor.compute([EditRequest("The capital of {} is", "Varland", "near the Ost")])
    found = measure(editor.model, tiny_tokenizer, ASKED, edit.applied())
    assert found.memorization.is_finite
    assert found.memorization.log10_s != 0
    assert measure(editor.model, tiny_tokenizer, ASKED, nullcontext()).memorization.before == found.memorization.before


def test_a_fact_without_its_own_prompt_is_refused() -> None:
    with pytest.raises(ErrataError, match="memorization"):
        of_losses(ASKED[1:], [1.0] * 3, [1.0] * 3)


def case(name: str, relation: str, subject: str, new: str, true: str, *probes: Probe) -> Case:
    request = EditRequest(f"The {relation} of {{}} is", subject, new, true, id=name)
    return Case(name, request, probes, reference=(relation, new))


POOL = (
    case(
        "a", "home", "Ilda", "Oslen", "Brast",
        *(Probe("neighborhood", f"The home of {who} is", "Brast", "Oslen") for who in ("Moren", "Tovi", "Ilda Ber")),
        Probe("generation", "Ilda is"),
    ),
    case("b", "birthplace", "Moren", "Brast", "Oslen"),  # Oslen is right there
    case("c", "birthplace", "Tovi", "Oslen", "Varn"),
    case("d", "birthplace", "Reka", "Brast", "Varn", Probe("generation", "Reka of Oslen is")),
    case("e", "craft", "Sund", "baker", "smith", Probe("generation", "Sund is")),
    case("f", "home", "Kell", "Varn", "Brast"),
)  # fmt: skip


def prompts(asked: list[Probe], place: str | None) -> set[str]:
    return {probe.prompt for probe in asked if probe.group == place}


def test_prompts_mention_neither_the_subject_nor_the_answer_and_are_not_right() -> None:
    asked = PromptPool(POOL).probes(POOL[0], 10)
    assert prompts(asked, None) == {"The home of Ilda is"}
    assert prompts(asked, SUBJECTS) == {"The home of Moren is", "The home of Tovi is"}
    assert prompts(asked, RELATIONS) == {"The birthplace of Tovi is", "The birthplace of Reka is"}
    assert prompts(asked, OPENINGS) == {"Sund is"}
    assert {probe.target for probe in asked} == {"Oslen"}
    assert not any(probe.wants_text for probe in asked)


def test_prompts_avoid_the_subjects_of_a_sequence_and_their_number_is_bounded() -> None:
    asked = PromptPool(POOL, ["Tovi"]).probes(POOL[0], 10)
    assert prompts(asked, SUBJECTS) == {"The home of Moren is"}
    assert prompts(asked, RELATIONS) == {"The birthplace of Reka is"}
    less = replace(POOL[0], probes=POOL[0].probes[:1])  # as of a run with dataset.probes=1
    assert PromptPool(POOL).probes(less, 10) == PromptPool(POOL).probes(POOL[0], 10)
    few = PromptPool(POOL).probes(POOL[0], 1)
    assert [len(prompts(few, place)) for place in (SUBJECTS, RELATIONS, OPENINGS)] == [1, 1, 1]
    assert few == PromptPool(POOL).probes(POOL[0], 1)


def test_ranks_that_agree_correlate_and_ties_share_theirs() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]).mean == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]).mean == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert spearman([0, 5, 5, 7], [0, 2, 1, 3]).mean == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1], [1, 2]).mean)
    with pytest.raises(ValueError, match="finite"):
        spearman([1, math.inf], [1, 2])
