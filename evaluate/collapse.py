"""Measure signs that edits break a model: perplexity of plain text, drift of predictions, repetitive text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ErrataError
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture, describe, max_positions
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.scoring import Model, ProbeScore, reads_per_chunk


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of the `tokens` tokens that were predicted."""

    value: float
    tokens: int


@torch.inference_mode()
def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    max_tokens: int | None = None,
    window: int = 1024,
    batch_tokens: int = 8192,
) -> Perplexity:
    """Return the perplexity of plain texts, each on its own.

    A text is tokenised like a prompt (with the begin-of-text token if the tokenizer adds one) and cut into windows.
    Every token after the first of a text is predicted once, from the tokens before it in its window. Neighbouring
    windows overlap by one token, from which the next one is predicted. The mean is over tokens, so long texts weigh
    more. Each window runs at once. So if an edit on the model looks ahead (`Folded.looks_ahead`), a prediction may
    depend on tokens behind it in its window.

    Args:
        model: Any causal decoder of transformers.
        tokenizer: Its fast tokenizer.
        texts: Read in order, and only as many as are needed. Texts of one token are skipped.
        max_tokens: Stop after the text that reaches this many predicted tokens; None reads all.
        window: Tokens in a window, at most the model's positions.
        batch_tokens: Bound on rows x length of a batch, as in `scoring.score`.

    Raises:
        ErrataError: there is no token to predict.
        ValueError: the window is below 2, or max_tokens below 1.
    """
    if window < 2 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"expected window >= 2 and max_tokens >= 1, got {window} and {max_tokens}")
    width = min(window, max_positions(model) or window)
    rows = _windows(tokenizer, texts, max_tokens, width)
    count = sum(len(row) - 1 for row in rows)
    if not count:
        raise ErrataError("expected a text of at least two tokens for the perplexity, got none")
    architecture, pad = describe(model), tokens.pad_id(tokenizer)
    total = 0.0
    with evaluating(model):
        even = looks_ahead(model)
        for group in batches_by_length(
            sorted(rows, key=len), limit_batch_tokens(batch_tokens, model.device), even=even
        ):
            total += _nll(architecture, group, pad)
    mean = total / count
    return Perplexity(math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan, count)


def _windows(tokenizer: Tokenizer, texts: Iterable[str], max_tokens: int | None, width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    predicted = 0
    for text in texts:
        ids = tokens.prompt_ids(tokenizer, text) if text.strip() else []
        rows += [ids[start : start + width] for start in range(0, len(ids) - 1, width - 1)]
        predicted += max(0, len(ids) - 1)
        if max_tokens is not None and predicted >= max_tokens:
            break
    return rows


def _nll(architecture: Architecture, group: Sequence[Sequence[int]], pad: int) -> float:
    """Return the summed negative log-likelihood, in nats, of all tokens but the first of each row."""
    batch = tokens.right_padded(group, pad).to(architecture.device)
    read = batch.mask[:, 1:].bool()
    hidden = run_base(architecture, batch)
    hidden = hidden[:, :-1][read.to(hidden.device)]  # (predicted tokens, d)
    wanted = batch.ids[:, 1:][read].to(hidden.device)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    step = reads_per_chunk(architecture)
    for states, ids in zip(hidden.split(step), wanted.split(step), strict=True):
        logits = architecture.logits(states)
        logits = logits.to(working_dtype(logits.dtype))
        total += nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="sum").to(total.device)
    return float(total)


def next_token_kl(after: Tensor, before: Tensor) -> float:
    """Return how far a prediction moved: KL(after || before) in nats, from log-probabilities (vocabulary,)."""
    after, before = after.double(), before.double()
    return float((after.exp() * (after - before)).sum())


def neighborhood_kl(after: Sequence[ProbeScore], before: Sequence[ProbeScore]) -> float | None:
    """Return the mean `next_token_kl` over probes that were scored with `next_token=`; None if there are none."""
    moved = [
        next_token_kl(now.logprobs, then.logprobs)
        for now, then in zip(after, before, strict=True)
        if now.logprobs is not None and then.logprobs is not None
    ]
    return sum(moved) / len(moved) if moved else None


def ngram_entropy(text: str) -> float:
    """Return the fluency of a text: half of 2/3 x the entropy of its bigrams + 4/3 x that of its trigrams, in bits.

    It is low for a text that repeats itself, and 0 for a text of fewer than two units. Words and punctuation marks are
    the units. The original code splits with NLTK, which treats contractions differently.

    Reference: Zhang et al. 2018, as used in Meng et al. 2022 (ROME), section 3.3, "generation entropy".
    """
    units = re.findall(r"\w+|[^\w\s]", text)
    return (2 / 3 * _entropy(units, 2) + 4 / 3 * _entropy(units, 3)) / 2


def _entropy(units: Sequence[str], n: int) -> float:
    counts = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
