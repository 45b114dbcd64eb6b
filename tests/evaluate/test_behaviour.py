"""What edits of behaviour do and cost: likelihoods of both continuations, effects, baselines, drift on general text."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from errata.editors.core.edit import Edit
from errata.editors.core.errors import ConfigError
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.steering.affine import Affine, Change
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.learning import learn_steering
from errata.editors.core.steering.positions import Where
from errata.evaluate.behaviour import BehaviourStudy, as_written
from errata.evaluate.collapse import HeldOutTexts
from errata.evaluate.general_text import general_kl
from errata.evaluate.text_drift import TextDrift

PAIRS = [
    Contrast("The capital of Varland is", "Oslen.", "Brast."),
    Contrast("The mother tongue of Danielle Darrieux is", "French.", "the lyre."),
    Contrast("Beats Music is owned by", "Apple.", "the river Ost."),
]
TEXTS = ["What is the twin city of Quelm? It is Brast, near the river Ost.", "The capital of Varland is Oslen."]


def by_hand(model: Any, tokenizer: Any, contrast: Contrast, text: str) -> float:
    """Mean log-probability per token, from one pass over prompt and continuation."""
    head = tokenizer(contrast.prompt)["input_ids"]
    ids = head + tokenizer(f" {text}")["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return statistics.fmean(float(logprobs[i - 1, ids[i]]) for i in range(len(head), len(ids)))


def test_points_are_what_their_definitions_say(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    steering = learn_steering(model, tiny_tokenizer, PAIRS, "caa", layer=1)
    study = BehaviourStudy(model, tiny_tokenizer, PAIRS, TextDrift(model, tiny_tokenizer, TEXTS))
    edit = steering.edit(0.5)

    def read() -> list[tuple[float, float]]:
        return [tuple(by_hand(model, tiny_tokenizer, c, t) for t in (c.positive, c.negative)) for c in PAIRS]  # type: ignore[misc]

    before = read()
    point = study.measure(edit, 0.5)
    with edit.applied():
        after = read()
    deltas = [[a - b for a, b in each] for each in (before, after)]
    assert point.delta == pytest.approx(statistics.fmean(deltas[1]))
    assert point.share == sum(delta > 0 for delta in deltas[1]) / 3
    effect = (statistics.fmean(deltas[1]) - statistics.fmean(deltas[0])) / statistics.stdev(deltas[0])
    assert point.effect.mean == pytest.approx(effect)
    assert point.effect.mean != study.untouched.effect.mean == 0
    for i, found in enumerate((point.positive, point.negative)):
        assert found.mean == pytest.approx(statistics.fmean(a[i] - b[i] for a, b in zip(after, before, strict=True)))
    assert point.as_dict()["is_breaking"] is (point.positive.high < 0 and point.negative.high < 0)
    assert study.prompted("Answer in French.").strength is None
    chance = study.random(steering, 0.5, seeds=(3, 4, 5))
    each = [study.measure(steering.random(seed).edit(0.5), 0.5) for seed in (3, 4, 5)]
    assert chance.points == tuple(each)
    effects = [point.effect.mean for point in each]
    assert chance.effect.mean == pytest.approx(statistics.fmean(effects))
    half = 4.302652729911275 * statistics.stdev(effects) / 3**0.5  # Student's t of 2 degrees of freedom
    assert chance.effect.high - chance.effect.mean == pytest.approx(half)
    assert chance.as_dict()["kl"]["mean"] == pytest.approx(statistics.fmean(p.drift.kl for p in each if p.drift))
    alone = study.random(steering, 0.5, seeds=[3])
    assert math.isnan(alone.effect.low)
    with pytest.raises(ConfigError, match="at least one seed"):
        study.random(steering, seeds=())


@pytest.mark.parametrize("bos", [False, True])
def test_an_instruction_costs_what_it_does_to_the_texts_behind_it(
    make_tiny: Any, tiny_tokenizer: Any, tiny_tokenizer_bos: Any, bos: bool
) -> None:
    tokenizer = tiny_tokenizer_bos if bos else tiny_tokenizer
    model = make_tiny("gpt2", dtype=torch.float64)
    drift, asked = TextDrift(model, tokenizer, TEXTS), "Answer in French."
    before = tokenizer(asked)["input_ids"]
    found, total = drift.measure(before), 0.0
    for text in TEXTS:
        own = tokenizer(text)["input_ids"]
        ids = [*before, *(own[1:] if bos else own)]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[i - 1, ids[i]]) for i in range(len(ids) - len(own) + 1, len(ids)))
    assert found.rise.loss == pytest.approx(total / drift.tokens)
    assert found.kl > 0
    assert not drift.takes([5] * 10_000)


def test_drift_is_the_loss_and_the_divergence_of_the_other_measures(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("llama", dtype=torch.float64)
    drift = TextDrift(model, tiny_tokenizer, TEXTS)
    texts = HeldOutTexts(model, tiny_tokenizer, TEXTS)
    assert drift.tokens == texts.tokens
    long = [" ".join(TEXTS * 40)]
    assert TextDrift(model, tiny_tokenizer, long, max_tokens=70).tokens == 255  # its first window
    assert len(tiny_tokenizer(long[0])["input_ids"]) > 2 * 255
    same = drift.measure()
    assert (same.rise.value, same.kl) == (0, 0)
    with learn_steering(model, tiny_tokenizer, PAIRS, "caa", layer=1).edit(0.5).applied():
        # An edit that is there before the texts are read costs nothing, as in `BehaviourStudy`.
        assert TextDrift(model, tiny_tokenizer, TEXTS).measure().kl == 0
        found = drift.measure()
        losses, _ = texts.row_losses()
        assert found.rise.loss == pytest.approx(float(losses.sum()) / drift.tokens)
        rows = [tiny_tokenizer(text)["input_ids"] for text in TEXTS]
        # That measure counts the last token of a text too, which predicts nothing here.
        cut = [tiny_tokenizer.decode(row[:-1]) for row in rows]
        assert [tiny_tokenizer(text)["input_ids"] for text in cut] == [row[:-1] for row in rows]
        assert found.kl == pytest.approx(general_kl(model, tiny_tokenizer, cut) * len(cut) / drift.tokens)
    with pytest.raises(ConfigError, match="a token to predict"):
        TextDrift(model, tiny_tokenizer, [])


def test_an_edit_of_last_tokens_costs_what_it_does_to_a_text_that_is_written(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    everywhere, last = (
        learn_steering(model, tiny_tokenizer, PAIRS, "caa", layer=1, where=w) for w in (None, Where("last"))
    )
    study = BehaviourStudy(model, tiny_tokenizer, PAIRS, TextDrift(model, tiny_tokenizer, TEXTS))
    one, other = study.measure(everywhere.edit(0.5)), study.measure(last.edit(0.5))
    assert one.drift == other.drift
    assert one.delta != other.delta
    # As in a pass per token: the whole row is steered at its end alone.
    contrast = PAIRS[0]
    with last.edit(0.5).applied():
        head = tiny_tokenizer(contrast.prompt)["input_ids"]
        ids, total = head + tiny_tokenizer(f" {contrast.positive}")["input_ids"], 0.0
        with torch.no_grad():
            for i in range(len(head), len(ids)):
                total += float(model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]])
        found = BehaviourStudy(model, tiny_tokenizer, PAIRS)._before[0][0]
    assert found == pytest.approx(total / (len(ids) - len(head)))


def test_what_is_no_adapter_of_last_tokens_is_left_alone(make_tiny: Any) -> None:
    b = torch.ones(32)
    patch = Patch({}, {"transformer.h.1": Affine((Change(b), Change(b, where=Where("prompt"))))})
    edit = Edit("", (), patch, (), {}, make_tiny("gpt2"))
    assert as_written(edit).patch.adapters["transformer.h.1"] is patch.adapters["transformer.h.1"]


def test_a_behaviour_needs_contexts_and_differences(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    for given in (PAIRS[:1], [PAIRS[0], Contrast("", "Oslen", "Brast")]):
        with pytest.raises(ConfigError, match="contrasts with a prompt"):
            BehaviourStudy(model, tiny_tokenizer, given)
    with pytest.raises(ConfigError, match="no scale"):
        BehaviourStudy(model, tiny_tokenizer, [PAIRS[0], PAIRS[0]])
