"""One edit at many strengths, and the loss on general text beside the untouched model's."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.core.contexts.context import Context, Fact, Retrieval
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, ConfigError
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.evaluate.collapse import HeldOutTexts
from errata.evaluate.general_text import GeneralText, LossRise, last_admitted, paired_rise
from errata.evaluate.probes import Case, Probe
from errata.evaluate.strength_grid import CAPS
from errata.evaluate.strengths import Dial, rise_at, strongest, turned

TEXTS = ["the capital of france is paris", "danielle darrieux speaks french", "a river runs through it", "and so on"]


def rise(value: float) -> LossRise:
    return LossRise(3.0 * (1 + value), 3.0, value, 0.0, 10, 2)


def test_a_rise_is_the_ratio_of_sums_with_the_error_of_a_ratio() -> None:
    found = paired_rise([3.0, 6.3], [3.0, 6.0], tokens=9)
    assert found.loss == pytest.approx(9.3 / 9)
    assert found.untouched == 1.0
    ratio = 0.3 / 9
    assert found.value == pytest.approx(ratio)
    assert found.error == pytest.approx(math.sqrt(2 * ((3 * ratio) ** 2 + (0.3 - 6 * ratio) ** 2)) / 9)
    assert math.isnan(paired_rise([1.0], [1.0], tokens=2).error)


def test_every_row_longer_by_the_same_share_has_no_error() -> None:
    assert paired_rise([1.1, 2.2, 3.3], [1.0, 2.0, 3.0], tokens=6).error == pytest.approx(0, abs=1e-12)


def test_the_rule_of_a_league_is_strict() -> None:
    assert not LossRise(1.5, 1.0, 0.5, 0.0, 1, 1).is_below(0.5)
    assert LossRise(1.5, 1.0, 0.5, 0.0, 1, 1).is_below(0.5 + 1e-9)
    assert not LossRise(math.nan, 1.0, math.nan, 0.0, 1, 1).is_below(10.0)
    assert all(LossRise(1.0, 1.0, 0.0, 0.0, 1, 1).is_below(cap) for cap in CAPS), "the untouched model is admitted"


def test_a_margin_asks_for_more_than_the_estimate() -> None:
    found = LossRise(1.05, 1.0, 0.05, 0.03, 1, 2)
    assert found.is_below(0.1)
    assert found.is_below(0.1, margin=1)
    assert not found.is_below(0.1, margin=2)
    assert LossRise(1.0, 1.0, 0.0, 0.0, 1, 2).is_below(1e-9, margin=2), "the untouched model is admitted"


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_the_last_admitted_epoch_is_the_authors(golden_root: Path, dtype: str) -> None:
    leagues = json.loads((golden_root / "gpt2_tr/canonical" / f"losses_{dtype}.json").read_text())["results"]["leagues"]
    losses = [entry["general"] for entry in leagues["stats"]]
    found = {f"{cap:g}": last_admitted(losses, cap) for cap in CAPS}
    assert found == {f"{cap:g}": leagues["result"][f"{cap:g}"]["index"] for cap in CAPS}
    assert last_admitted([3.0, math.nan, 4.0], 0.1) == 0
    with pytest.raises(ConfigError, match="cap above 0"):
        last_admitted([3.0], 0.0)


@pytest.mark.parametrize("steps", [1, 3, 10, 1024])
@pytest.mark.parametrize("cap", [1e-6, 1e-4, 0.3, 0.99, 2.0])
def test_the_strongest_is_the_largest_on_its_grid(steps: int, cap: float) -> None:
    asked: list[float] = []

    def measure(strength: float) -> LossRise:
        asked.append(strength)
        return rise(strength**2)

    wanted = max(k / steps for k in range(steps + 1) if k == 0 or rise((k / steps) ** 2).is_below(cap))
    assert strongest(measure, cap, steps=steps) == wanted
    assert len(asked) <= 4 + math.ceil(math.log2(max(2, steps // 4 + 1)))


def test_a_larger_cap_never_gives_a_smaller_strength() -> None:
    draws = random.Random(0)
    for _ in range(200):
        table = [rise(draws.choice([0.2, 1.0, 3.0]) * draws.random()) for _ in range(65)]
        found = [strongest(lambda c, table=table: table[round(64 * c)], cap, steps=64) for cap in (0.1, 0.5, 1.0, 2.0)]
        assert found == sorted(found)


def test_an_edit_that_is_refused_has_strength_0() -> None:
    assert strongest(lambda _: None, 1e-3) == 0
    with pytest.raises(ConfigError, match="above 0"):
        strongest(lambda _: None, 0.0)


@pytest.fixture(scope="module")
def tiny(make_tiny: Any, tiny_tokenizer: Any) -> tuple[Any, Any]:
    return make_tiny("gpt2"), tiny_tokenizer


def edit_of(model: Any, patch: Patch) -> Edit:
    return Edit("rome", (EditRequest("{} speaks", "danielle darrieux", "english"),), patch, ({},), {}, model)


@pytest.fixture
def edit(tiny: tuple[Any, Any]) -> Edit:
    model, _ = tiny
    draws = torch.Generator().manual_seed(1)
    d_in, d_out = model.transformer.h[1].mlp.c_proj.weight.shape
    update = LowRank(torch.randn(d_out, 2, generator=draws), 0.02 * torch.randn(2, d_in, generator=draws))
    return edit_of(model, Patch({"transformer.h.1.mlp.c_proj.weight": update}))


def test_rows_add_up_to_the_perplexity(tiny: tuple[Any, Any]) -> None:
    texts = HeldOutTexts(*tiny, TEXTS)
    losses, counts = texts.row_losses()
    assert int(counts.sum()) == texts.tokens
    assert math.exp(float(losses.sum()) / texts.tokens) == pytest.approx(texts.perplexity().value, rel=1e-6)


def test_strengths_0_and_1_are_the_untouched_and_the_edited_model(
    tiny: tuple[Any, Any], edit: Edit, digest: Any
) -> None:
    model, _ = tiny
    before, dial, text = digest(model), Dial(edit), GeneralText(*tiny, TEXTS, patch=edit.patch)
    assert dial.reason is None
    untouched = text.rise().untouched
    assert rise_at(dial, text, 0) == LossRise(untouched, untouched, 0.0, 0.0, text.tokens, 4)
    with edit.applied():
        full = text.rise()
    assert rise_at(dial, text, 1) == full
    half = rise_at(dial, text, 0.5)
    assert half is not None
    assert half.value not in (0.0, full.value)
    assert digest(model) == before


def test_blocks_below_the_edit_run_once_and_change_nothing(tiny: tuple[Any, Any], edit: Edit) -> None:
    kept, whole = (GeneralText(*tiny, TEXTS, patch=patch) for patch in (edit.patch, None))
    with edit.applied():
        assert kept.rise().value == pytest.approx(whole.rise().value, rel=1e-4)


def test_a_dial_is_turned_over_scores_and_damage(tiny: tuple[Any, Any], edit: Edit) -> None:
    case = Case("0", edit.requests[0], (Probe("rewrite", "danielle darrieux speaks", "english", "french"),))
    points = turned(Dial(edit), GeneralText(*tiny, TEXTS), [case], (-1.0, 0.0, 1.0, 1e30))
    assert [point.strength for point in points] == [-1, 0, 1, 1e30]
    assert [point.summary["probability"]["reliability"]["n"] for point in points[:3]] == [1, 1, 1]
    assert points[1].rise is not None
    assert points[1].rise.value == 0
    assert points[3].rise is None
    assert points[3].reason is not None


def test_an_edit_that_is_no_change_of_weights_has_the_strengths_0_and_1(tiny: tuple[Any, Any]) -> None:
    context = Context((Fact("danielle darrieux speaks english"),), Retrieval())
    dial = Dial(edit_of(tiny[0], Patch({}, {"transformer.wte": context})))
    assert dial.reason is not None
    assert "context" in dial.reason
    assert [dial.has(strength) for strength in (0, 0.5, 1, 2)] == [True, False, True, False]
    with pytest.raises(AlgebraError, match="context"):
        dial.at(0.5)
    text = GeneralText(*tiny, TEXTS)
    assert rise_at(dial, text, 0.5) is None
    points = turned(dial, text, [], (0.5,))
    assert (points[0].rise, points[0].reason) == (None, dial.reason)


def test_a_refused_edit_has_no_strength_but_0(tiny: tuple[Any, Any]) -> None:
    dial, text = Dial(None), GeneralText(*tiny, TEXTS)
    assert [rise_at(dial, text, strength) is None for strength in (0, 0.5, 1)] == [False, True, True]
    assert strongest(partial(rise_at, dial, text), 1e-3, steps=1) == 0
    with pytest.raises(AlgebraError, match="no edit was made"):
        dial.at(1)
