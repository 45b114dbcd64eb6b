"""Measure signs that edits break a model: perplexity of plain text, drift of predictions, repetitive text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ErrataError
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.forward.whole_rows import rows_from_block
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture, describe, max_positions
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.scoring import Model, ProbeScore, reads_per_chunk

# Bytes of hidden states that are kept of the texts whose perplexity is asked again: 2,048 tokens of width 4,096 take
# 32 MiB in float32.
_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of the `tokens` tokens that were predicted."""

    value: float
    tokens: int


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    max_tokens: int | None = None,
    window: int = 1024,
    batch_tokens: int = 8192,
) -> Perplexity:
    """Return the perplexity of plain texts, each on its own; arguments and errors are those of `HeldOutTexts`."""
    return HeldOutTexts(
        model, tokenizer, texts, max_tokens=max_tokens, window=window, batch_tokens=batch_tokens
    ).perplexity()


class HeldOutTexts:
    """Plain texts whose perplexity is asked again and again, while a model is edited.

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

    Attributes:
        tokens: How many tokens are predicted.

    Raises:
        ErrataError: there is no token to predict.
        ValueError: the window is below 2, or max_tokens below 1.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        *,
        max_tokens: int | None = None,
        window: int = 1024,
        batch_tokens: int = 8192,
    ) -> None:
        if window < 2 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"expected window >= 2 and max_tokens >= 1, got {window} and {max_tokens}")
        width = min(window, max_positions(model) or window)
        self._model, self._batch_tokens, self._pad = model, batch_tokens, tokens.pad_id(tokenizer)
        self._rows = sorted(windows_of(tokenizer, texts, width, max_tokens), key=len)
        self._kept: _KeptStates | None = None
        self.tokens = sum(len(row) - 1 for row in self._rows)
        if not self.tokens:
            raise ErrataError("expected a text of at least two tokens for the perplexity, got none")

    @torch.inference_mode()
    def keep_below(self, first: int | None) -> None:
        """Run the texts once up to block `first`, where `perplexity` begins as long as nothing below it changes.

        Nothing is kept where the blocks do not allow it, where the states would take more than _KEPT_BYTES, or for
        `first` 0 or None. What was kept before is forgotten.

        Args:
            first: The lowest block that edits will change.
        """
        if self._kept is not None and self._kept.first == first:
            return
        self._kept = None
        architecture = describe(self._model)
        cells = sum(len(group) * len(group[-1]) for group in self._batches(even=False))
        size = cells * architecture.d_model * torch.finfo(architecture.dtype).bits // 8
        if not first or size > _KEPT_BYTES or looks_ahead(self._model):
            return
        with evaluating(self._model):
            parts = []
            for group in self._batches(even=False):
                upper = rows_from_block(architecture, group, first=first, pad=self._pad)
                if not isinstance(upper, UpperBlocks):
                    return
                parts.append(upper)
        self._kept = _KeptStates(first, tuple(parts))

    @torch.inference_mode()
    def perplexity(self) -> Perplexity:
        """Return the perplexity that the model has now."""
        architecture, total = describe(self._model), 0.0
        ahead = looks_ahead(self._model)
        kept = iter(() if self._kept is None or ahead else self._kept.parts)
        with evaluating(self._model):
            for group in self._batches(even=ahead):
                upper = next(kept, None)
                total += _nll(architecture, group, self._pad, upper)
        mean = total / self.tokens
        value = math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan
        return Perplexity(value, self.tokens)

    @torch.inference_mode()
    def row_losses(self) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood (nats, float64) and the predicted tokens of each window, (rows,).

        The rows come in the same order every time, so that two models can be compared row by row.
        """
        architecture, found = describe(self._model), []
        ahead = looks_ahead(self._model)
        kept = iter(() if self._kept is None or ahead else self._kept.parts)
        with evaluating(self._model):
            for group in self._batches(even=ahead):
                found.append(_row_losses(architecture, group, self._pad, next(kept, None)))
        return torch.cat(found), torch.tensor([len(row) - 1 for row in self._rows])

    def _batches(self, *, even: bool) -> Iterator[list[list[int]]]:
        return batches_by_length(self._rows, limit_batch_tokens(self._batch_tokens, self._model.device), even=even)


def windows_of(
    tokenizer: Tokenizer, texts: Iterable[str], width: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Yield the windows of texts as ids; neighbours overlap by the token that the next one is predicted from.

    Args:
        tokenizer: A fast tokenizer.
        texts: Read in order; those without a letter are left out.
        width: The longest window.
        max_tokens: Stop with the text that reaches this many predicted tokens; None reads all.
    """
    predicted = 0
    for text in texts:
        ids = tokens.prompt_ids(tokenizer, text) if text.strip() else []
        yield from (ids[start : start + width] for start in range(0, len(ids) - 1, width - 1))
        predicted += max(0, len(ids) - 1)
        if max_tokens is not None and predicted >= max_tokens:
            return


@dataclass(frozen=True)
class _KeptStates:
    """The batches of the texts at the input of block `first`."""

    first: int
    parts: tuple[UpperBlocks, ...]


def _nll(
    architecture: Architecture, group: Sequence[Sequence[int]], pad: int, upper: UpperBlocks | None = None
) -> float:
    """Return the summed negative log-likelihood, in nats, of all tokens but the first of each row.

    Args:
        architecture: The model.
        group: The rows.
        pad: Id to pad with.
        upper: The rows at the input of a block, if they have been run up to there.
    """
    hidden, wanted, _ = _predictions(architecture, group, pad, upper)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    step = reads_per_chunk(architecture)
    for states, ids in zip(hidden.split(step), wanted.split(step), strict=True):
        total += _cross_entropy(architecture, states, ids, "sum").to(total.device)
    return float(total)


def _row_losses(
    architecture: Architecture, group: Sequence[Sequence[int]], pad: int, upper: UpperBlocks | None
) -> Tensor:
    """Return the same sum for each row by itself, (rows,), in float64 on the CPU."""
    hidden, wanted, rows = _predictions(architecture, group, pad, upper)
    step = reads_per_chunk(architecture)
    each = [
        _cross_entropy(architecture, states, ids, "none").double().cpu()
        for states, ids in zip(hidden.split(step), wanted.split(step), strict=True)
    ]
    return torch.zeros(len(group), dtype=torch.float64).index_add(0, rows.cpu(), torch.cat(each))


def _predictions(
    architecture: Architecture, group: Sequence[Sequence[int]], pad: int, upper: UpperBlocks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states (m, d) from which tokens are predicted, the ids of these tokens, and the rows that they are in,
    both (m,)."""
    batch = tokens.right_padded(group, pad).to(architecture.device)
    read = batch.mask[:, 1:].bool()
    hidden = run_base(architecture, batch) if upper is None else upper.normed(upper.run())
    hidden = hidden[:, :-1][read.to(hidden.device)]  # (predicted tokens, d)
    wanted = batch.ids[:, 1:][read].to(hidden.device)
    return hidden, wanted, read.nonzero()[:, 0]


def _cross_entropy(architecture: Architecture, states: Tensor, ids: Tensor, reduction: str) -> Tensor:
    logits = architecture.logits(states)
    logits = logits.to(working_dtype(logits.dtype))
    return nn.functional.cross_entropy(logits, ids.to(logits.device), reduction=reduction)


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
    return entropy_of_ngrams(re.findall(r"\w+|[^\w\s]", text))


def entropy_of_ngrams(units: Sequence[str]) -> float:
    """Return half of 2/3 x the entropy of bigrams + 4/3 x that of trigrams of some units, in bits."""
    return (2 / 3 * _entropy(units, 2) + 4 / 3 * _entropy(units, 3)) / 2


def _entropy(units: Sequence[str], n: int) -> float:
    counts = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
