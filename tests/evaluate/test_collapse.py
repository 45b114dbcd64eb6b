"""Signs of collapse: perplexity, divergence and repetition are what their formulas say."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.editors.core.errors import ErrataError
from errata.editors.core.model import tokens
from errata.evaluate.collapse import (
    neighborhood_kl,
    next_token_kl,
    ngram_entropy,
    perplexity,
)
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

TEXTS = (
    "The capital of Varland is Oslen, and the river Ost runs through it.",
    "São Verão lies in Überwald.",
    "",
    "Who plays the lyre in Northern Tarvos? The musician Ilda Moren plays it, and nobody doubts it.",
)


def text_by_text(model: Any, tokenizer: Any, texts: tuple[str, ...], window: int) -> tuple[float, int]:
    """The oracle: every predicted token in a forward pass of its own."""
    losses: list[float] = []
    with torch.inference_mode():
        for ids in (tokens.prompt_ids(tokenizer, text) for text in texts if text):
            for i in range(1, len(ids)):
                start = (i - 1) // (window - 1) * (window - 1)
                logits = model(torch.tensor([ids[start:i]])).logits[0, -1].double()
                losses.append(-float(logits.log_softmax(-1)[ids[i]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("window", [1024, 7, 2])
def test_perplexity_equals_predicting_token_by_token(
    architecture: str, bos: bool, window: int, make_tiny: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("tiny_tokenizer_bos" if bos else "tiny_tokenizer")
    model = make_tiny(architecture)
    value, count = text_by_text(model, tokenizer, TEXTS, window)
    for batch_tokens in (1, 8192):
        ours = perplexity(model, tokenizer, TEXTS, window=window, batch_tokens=batch_tokens)
        assert ours.tokens == count
        assert ours.value == pytest.approx(value, rel=1e-5)


def test_perplexity_reads_no_more_texts_than_it_needs(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    read: list[str] = []

    def reading() -> Any:
        for text in TEXTS:
            read.append(text)
            yield text

    ours = perplexity(model, tiny_tokenizer, reading(), max_tokens=5)
    assert read == [TEXTS[0]]
    assert ours == perplexity(model, tiny_tokenizer, TEXTS[:1])


def test_a_long_text_is_cut_into_windows_that_fit_the_model(make_tiny: Any, tiny_tokenizer: Any) -> None:
    long = " ".join(TEXTS * 20)
    count = len(tiny_tokenizer(long)["input_ids"])
    assert count > 600
    assert perplexity(make_tiny("gpt2"), tiny_tokenizer, [long]).tokens == count - 1


def test_reading_in_small_chunks_changes_nothing(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("gpt2")
    whole = perplexity(model, tiny_tokenizer, TEXTS)
    monkeypatch.setattr("errata.evaluate.scoring._LOGITS_AT_ONCE", 3 * len(tiny_tokenizer))
    assert perplexity(model, tiny_tokenizer, TEXTS).value == pytest.approx(whole.value, rel=1e-6)


def test_nothing_to_predict_and_senseless_windows_are_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    with pytest.raises(ErrataError, match="at least two tokens"):
        perplexity(model, tiny_tokenizer, ["", "W"])
    with pytest.raises(ValueError, match="window"):
        perplexity(model, tiny_tokenizer, TEXTS, window=1)
    with pytest.raises(ValueError, match="max_tokens"):
        perplexity(model, tiny_tokenizer, TEXTS, max_tokens=0)


def test_a_ruined_model_has_a_perplexity_that_says_so(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    assert perplexity(model, tiny_tokenizer, TEXTS).value == math.inf
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, tiny_tokenizer, TEXTS).value)


def test_damage_raises_the_perplexity_of_real_text(models_root: Path, data_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models_root / "cf-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [entry["Text"] for entry in json.loads(gzip.decompress((data_root / "me_ppl.json.gz").read_bytes()))[:30]]
    intact = perplexity(model, tokenizer, texts)
    with torch.no_grad():
        model.get_parameter("transformer.h.2.mlp.c_proj.weight").mul_(-5)
    assert intact.value < 1500
    assert perplexity(model, tokenizer, texts).value > 1.5 * intact.value


# --- divergence -----------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-20, 20), min_size=2, max_size=10)


@given(st.data())
def test_the_divergence_is_torchs_and_never_negative(data: st.DataObject) -> None:
    first = data.draw(LOGITS)
    second = data.draw(st.lists(st.floats(-20, 20), min_size=len(first), max_size=len(first)))
    after, before = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (first, second))
    theirs = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum")
    assert next_token_kl(after, before) == pytest.approx(float(theirs), abs=1e-12)
    assert next_token_kl(after, before) >= -1e-12
    assert next_token_kl(after, after) == 0


def test_the_neighborhoods_divergence_is_a_mean_over_probes(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    probes = [Probe("neighborhood", "The capital of Tarvos is", "a"), Probe("neighborhood", "Who", "a")]
    before = score(model, tiny_tokenizer, probes, next_token={"neighborhood"})
    assert neighborhood_kl(before, before) == 0
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(1.5)
    after = score(model, tiny_tokenizer, probes, next_token={"neighborhood"})
    each = [next_token_kl(a.logprobs, b.logprobs) for a, b in zip(after, before, strict=True)]  # type: ignore[arg-type]
    assert neighborhood_kl(after, before) == pytest.approx(sum(each) / 2)
    assert min(each) > 0
    assert neighborhood_kl(score(model, tiny_tokenizer, probes), before) is None


# --- repetition -----------------------------------------------------------------------------------------------------


def test_ngram_entropy_of_different_words_is_the_logarithm_of_their_number() -> None:
    text = "one two three four five six"  # 5 bigrams, 4 trigrams, all different
    assert ngram_entropy(text) == pytest.approx((2 / 3 * math.log2(5) + 4 / 3 * math.log2(4)) / 2)


@pytest.mark.parametrize("text", ["", "word", "again again again again again"])
def test_a_text_that_says_one_thing_has_no_entropy(text: str) -> None:
    assert ngram_entropy(text) == pytest.approx(0)


def test_repetition_lowers_the_entropy() -> None:
    assert ngram_entropy("the city of Oslen is the city of Oslen is the city") < ngram_entropy(
        "the city of Oslen is north of Brast, near a river that freezes"
    )
