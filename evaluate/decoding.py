"""How a continuation is written: greedily or drawn from the likeliest tokens, and where it stops.

A drawn continuation depends on the seed and on its own prompt alone. Its draws are made before the first token, so that
other rows of the batch, their order and an interruption change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.model.tokens import Tokenizer


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and which strings end a text.

    Attributes:
        stop: Strings that end a text. They are cut off, with all that follows.
        top_k: Draw each token from this many of the likeliest, by their probabilities; None: take the likeliest.
        seed: Of the draws.
    """

    stop: tuple[str, ...] = ()
    top_k: int | None = None
    seed: int = 0

    def cut(self, text: str) -> str:
        """Return a text up to the first of the stop strings."""
        ends = [place for end in self.stop if (place := text.find(end)) >= 0]
        return text[: min(ends, default=len(text))]


GREEDY = Decoding()


class DrawnFromTop:
    """A processor of logits for a greedy `generate`: of each row it leaves one token, drawn from the likeliest.

    Args:
        rows: Ids of the prompts, in the order of the batch.
        steps: The largest number of new tokens.
        decoding: With `top_k` and `seed`.
    """

    def __init__(self, rows: Sequence[Sequence[int]], steps: int, decoding: Decoding) -> None:
        assert decoding.top_k is not None, "a draw needs top_k"
        self._top_k, self._step = decoding.top_k, 0
        # random.Random takes a text as a seed, by its digest.
        draws = [random.Random(f"{decoding.seed} {list(row)}") for row in rows]
        self._draws = torch.tensor([[draw.random() for _ in range(steps)] for draw in draws], dtype=torch.float64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Return scores (rows, vocabulary) that are -inf but for the drawn token of each row."""
        top = scores.topk(min(self._top_k, scores.shape[-1]), dim=-1)
        # A few numbers per row, in float64, which not every device has.
        shares = torch.softmax(top.values.cpu().double(), dim=-1).cumsum(dim=-1)
        draw = self._draws[:, self._step : self._step + 1]
        place = (shares < draw).sum(dim=-1, keepdim=True).clamp(max=shares.shape[-1] - 1).to(scores.device)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, top.indices.gather(-1, place), 0.0)


class StopAtStrings:
    """A stopping criterion of `generate`: a row is done once its new text holds one of the stop strings.

    Args:
        tokenizer: That decodes the rows.
        start: Where the new tokens begin in a row.
        stop: The strings.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._start, self._stop = tokenizer, start, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """Return whether each row is done: (rows,)."""
        new = input_ids[:, self._start :].tolist()
        texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in new]
        done = [any(end in text for end in self._stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
