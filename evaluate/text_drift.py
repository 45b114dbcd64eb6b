"""What an edit of behaviour costs on general text: how much the loss rises, and how far predictions move.

    drift = TextDrift(model, tokenizer, texts, max_tokens=1000)
    with edit.applied():
        found = drift.measure()             # found.rise.value, found.kl

Both come from the same passes, so that they stand on one axis. Each text runs in windows, as in `HeldOutTexts`. Rows
are not padded where an edit looks ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, pad_id, right_padded
from errata.evaluate.collapse import windows_of
from errata.evaluate.general_text import LossRise, paired_rise
from errata.evaluate.scoring import Model, reads_per_chunk

WINDOW = 256


@dataclass(frozen=True)
class MovedText:
    """What has become of the predictions on general text.

    Attributes:
        rise: Of the loss, beside the untouched model's.
        kl: KL(untouched || now) of the next token, in nats, as a mean over tokens.
    """

    rise: LossRise
    kl: float


class TextDrift:
    """Texts that the untouched model has read, to be read again by the edited one.

    Args:
        model: Any causal decoder of transformers; the edits that it carries now count as untouched, as in
            `BehaviourStudy`.
        tokenizer: Its fast tokenizer.
        texts: Read in order until there are enough tokens.
        max_tokens: Stop with the window that reaches this many predicted tokens; None reads all.
        batch_tokens: Bound on rows x length of a batch.

    Raises:
        ConfigError: There is no token to predict.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        *,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.architecture, self.pad = model, describe(model), pad_id(tokenizer)
        self.batch_tokens = limit_batch_tokens(batch_tokens, self.architecture.device)
        limit = min(WINDOW, self.architecture.max_positions or WINDOW)
        self.bos: int | None = getattr(tokenizer, "bos_token_id", None)
        self.rows = sorted(_first(windows_of(tokenizer, texts, limit), max_tokens), key=len)
        self.tokens = sum(len(row) - 1 for row in self.rows)
        if not self.tokens:
            raise ConfigError("expected general text with a token to predict, got none")
        # The states are kept and not the predictions, which are a hundred times as many numbers.
        self._states = [states.cpu() for states in self._read()]
        self._losses = [self._loss(states, row) for states, row in zip(self._states, self.rows, strict=True)]

    def takes(self, before: Sequence[int]) -> bool:
        """Return whether the model takes rows with these ids in front."""
        limit = self.architecture.max_positions
        return limit is None or len(before) + max(map(len, self.rows)) <= limit

    @torch.no_grad()
    def measure(self, before: Sequence[int] = ()) -> MovedText:
        """Return how the model predicts the texts now.

        Args:
            before: Ids in front of every row, as of an instruction; those of the rows alone are predicted.
        """
        losses, moved = [], 0.0
        for now, then, row in zip(self._read(before), self._states, self.rows, strict=True):
            losses.append(self._loss(now, row))
            moved += self._moved(now, then.to(now.device))
        return MovedText(paired_rise(losses, self._losses, self.tokens), moved / self.tokens)

    @torch.no_grad()
    def _read(self, before: Sequence[int] = ()) -> Iterator[Tensor]:
        """Yield the decoder's output at the tokens that predict another, (tokens, d), row by row."""
        # Of two tokens that begin a text, the second one is left out: what stands in front begins it.
        begun = [bool(before) and row[0] == before[0] == self.bos for row in self.rows]
        whole = [[*before, *row[1 if cut else 0 :]] for row, cut in zip(self.rows, begun, strict=True)]
        lengths = iter(len(row) - 1 for row in self.rows)
        with evaluating(self.model):
            for group in batches_by_length(whole, self.batch_tokens, even=looks_ahead(self.model)):
                hidden = run_base(self.architecture, right_padded(group, self.pad).to(self.architecture.device))
                for states, row, count in zip(hidden, group, lengths, strict=False):
                    yield states[len(row) - 1 - count : len(row) - 1]

    def _predicted(self, states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield log-probabilities (some tokens, V) with the first of these tokens."""
        size = reads_per_chunk(self.architecture)
        for start in range(0, len(states), size):
            logits = self.architecture.logits(states[start : start + size])
            yield start, torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))

    @torch.no_grad()
    def _loss(self, states: Tensor, row: Sequence[int]) -> float:
        total, states = 0.0, states.to(self.architecture.device)
        for start, logprobs in self._predicted(states):
            targets = torch.tensor(row[start + 1 : start + 1 + len(logprobs)], device=logprobs.device)
            total -= float(logprobs.gather(1, targets[:, None]).double().sum())
        return total

    def _moved(self, now: Tensor, then: Tensor) -> float:
        pairs = zip(self._predicted(then), self._predicted(now), strict=True)
        return sum(float((old.exp() * (old - new)).double().sum()) for (_, old), (_, new) in pairs)


def _first(rows: Iterable[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    """Yield rows up to the one that reaches `max_tokens` predicted tokens: a long text is not read to its end."""
    done = 0
    for row in rows:
        yield row
        done += len(row) - 1
        if max_tokens is not None and done >= max_tokens:
            return
