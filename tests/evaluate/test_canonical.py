"""Canonical examples: losses, thresholds and failures by hand, and those of the authors' code on the same model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.editors.core.errors import DatasetError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, Patch
from errata.evaluate.canonical import SuffixLosses, failure_share, measured, suffix_losses
from errata.evaluate.canonical_sets import CRITERIA, LOSSES, PAIRED, CanonicalExample, CanonicalSet
from errata.evaluate.general_text import GeneralText, general_kl

PROBABILITIES = {"country_capital": 0.2, "company_ceo": 0.05, "temporal": 0.05}


def test_a_probability_at_the_threshold_is_a_success() -> None:
    for name, probability in PROBABILITIES.items():
        loss = SuffixLosses((-math.log(probability),), (1,)).loss(CRITERIA[name].loss)
        assert failure_share([loss], CRITERIA[name].threshold) == 0
        assert failure_share([math.nextafter(loss, 9)], CRITERIA[name].threshold) == 1
    assert failure_share([SuffixLosses((-math.log(0.001),), (1,)).loss("bad")], CRITERIA["stereoset"].threshold) == 0
    assert failure_share([math.nan, 0.0], 1.0) == 0.5


def test_a_swap_flips_good_v_bad_and_leaves_balance() -> None:
    one, other = SuffixLosses((1.0, 4.5), (1, 2)), SuffixLosses((4.5, 1.0), (2, 1))
    assert one.loss("good-v-bad") == -other.loss("good-v-bad") == -3.5
    assert one.loss("balance") == other.loss("balance") == 3.5
    assert one.loss("good") == -one.loss("bad") == 1.0
    for kind in PAIRED:
        with pytest.raises(DatasetError, match="two suffixes"):
            SuffixLosses((1.0,), (1,)).loss(kind)


@pytest.fixture(scope="module", params=["f32", "f64"])
def golden(golden_root: Path, request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Any], float]:
    """The trained golden model, its tokenizer, the authors' numbers, and what two machines may differ by."""
    dtype = torch.float64 if request.param == "f64" else torch.float32
    said = json.loads((golden_root / "gpt2_tr/canonical" / f"losses_{request.param}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(golden_root / "models/gpt2_tr", dtype=dtype).eval()
    return (
        model,
        AutoTokenizer.from_pretrained(golden_root / "tokenizer"),
        said,
        1e-9 if request.param == "f64" else 1e-4,
    )


def examples(said: dict[str, Any], kind: str) -> list[CanonicalExample]:
    if kind in PAIRED:
        return [CanonicalExample(case["prefix"], (case["suffix1"], case["suffix2"])) for case in said["pair_cases"]]
    return [CanonicalExample(case["prefix"], (case["suffix"],)) for case in said["single_cases"]]


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_failures_are_the_authors(golden: Any, kind: Any) -> None:
    model, tokenizer, said, tolerance = golden
    wanted = said["results"][kind]
    found = suffix_losses(model, tokenizer, examples(said, kind))
    losses = [each.loss(kind) for each in found]
    assert losses == pytest.approx(wanted["per_case" if kind in PAIRED else "per_case_sum"], rel=tolerance)
    assert math.fsum(losses) / len(losses) == pytest.approx(wanted["mean_example"], rel=tolerance)
    if kind not in PAIRED:
        tokens = sum(each.tokens[0] for each in found)
        assert math.fsum(losses) / tokens == pytest.approx(wanted["mean_token"], rel=tolerance)
    for name, share in wanted["failure_rate"].items():
        assert CRITERIA[name].loss == kind
        assert CRITERIA[name].threshold == pytest.approx(said["thresholds"][name]["threshold"], abs=1e-12)
        assert failure_share(losses, CRITERIA[name].threshold) == share


def test_loss_on_general_text_and_its_kl_are_the_authors(golden: Any, golden_root: Path) -> None:
    model, tokenizer, said, tolerance = golden
    texts = [entry["text"] for entry in said["general_texts"]]
    text = GeneralText(model, tokenizer, texts)
    assert text.tokens == sum(said["results"]["general_text_tokens"])
    assert text.rise().loss == pytest.approx(said["results"]["general_text_mean_token_loss"], rel=tolerance)

    stem = golden_root / "gpt2_tr/rome/req0_mom2_f32"
    name = json.loads(stem.with_suffix(".json").read_text())["weight_name"]
    delta = load_file(stem.with_suffix(".safetensors"))["weight_delta"]
    Ledger.of(model).append("rome", Patch({name: Dense(delta.to(model.dtype).T)}), max_norm_ratio=math.inf)
    try:
        found = [0.25 * general_kl(model, tokenizer, [one]) for one in texts]
        by_three = [0.25 * general_kl(model, tokenizer, texts[i : i + 3], padding=True) for i in (0, 3)]
    finally:
        Ledger.of(model).clear()
    assert found == pytest.approx(said["results"]["kl_regulariser_weight0.25_batch1"], rel=max(tolerance, 1e-6))
    assert by_three == pytest.approx(said["results"]["kl_regulariser_weight0.25_batch3"], rel=max(tolerance, 1e-6))


def test_a_set_says_what_it_has_no_file_for(golden: Any) -> None:
    model, tokenizer, said, _ = golden
    every = tuple(examples(said, "good"))
    found = measured(CanonicalSet("country_capital", every[:2], every, None), model, tokenizer)
    assert found["evaluation"]["failures"] == said["results"]["good"]["failure_rate"]["country_capital"]
    assert found["evaluation"]["n"] == 6
    assert found["hard_negatives"] is None
