"""What a run says about the answer: its probability, its lead over the other answer, and how far the prediction is off.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["probability", "logit_difference", "kl"]
METRICS: tuple[Metric, ...] = ("probability", "logit_difference", "kl")
Direction = Literal["denoising", "noising"]
DIRECTIONS: tuple[Direction, ...] = ("denoising", "noising")
# Which way a metric goes as the clean answer comes back.
_SIGN: Mapping[str, int] = MappingProxyType({"probability": 1, "logit_difference": 1, "kl": -1})


@dataclass(frozen=True)
class AnswerScorer:
    """Scores predictions of the next token.

    Attributes:
        answers: Ids of the answer's first token and of the other answer's.
        clean: (V,) log-probabilities of the clean run, in float64.
    """

    answers: tuple[int, int]
    clean: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the scores (..., 5) in float64, each a mean over the rows, of logits (..., S, V).

        They are those of METRICS and the probabilities of both answers; see `named`.
        """
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        # Few passes over the vocabulary: the head of a small model costs no more than they do.
        shifted = logits - logits.amax(-1, keepdim=True)
        total = shifted.exp().sum(-1).double().log()
        right, other = (shifted[..., answer].double() - total for answer in self.answers)
        clean = self.clean.exp()
        expected = (shifted @ clean.to(shifted)).double()
        divergence = (torch.xlogy(clean, clean).sum() - expected + total).clamp_min(0)  # rounding may leave -1e-8
        scores = (right.exp(), right - other, divergence, right.exp(), other.exp())
        return torch.stack([score.mean(-1) for score in scores], dim=-1).cpu()


def named(scores: Tensor) -> dict[str, Tensor]:
    """Return scores (..., 5) by name."""
    return dict(zip((*METRICS, "answer", "other"), scores.unbind(-1), strict=True))


def effect(
    metric: Metric, score: Tensor, clean: float, corrupted: float, direction: Direction, *, normalised: bool = False
) -> Tensor:
    """Return what patches do: 0 is nothing, and more is more of the answer restored (denoising) or lost (noising).

    Args:
        metric: What was measured.
        score: Its value with a patch, of any shape.
        clean: Its value on the clean prompt.
        corrupted: Its value on the corrupted prompt.
        direction: Whether the corrupted run was patched with clean values, or the other way round.
        normalised: Divide by the whole way between the two, so that 1 is all of it. NaN where there is none.

    Returns:
        The effect, in the metric's unit or as a share.

    Reference: Zhang and Nanda 2023, section 2, for the normalised logit difference.
    """
    base, sign = (corrupted, 1) if direction == "denoising" else (clean, -1)
    way = sign * (score - base)
    if normalised:
        return way / (clean - corrupted) if clean != corrupted else torch.full_like(way, float("nan"))
    return _SIGN[metric] * way


def best_other(rows: Sequence[Tensor], answer: int) -> int:
    """Return the token that is likeliest on average over predictions (S, V), the answer left out."""
    mean = torch.cat([row.double().softmax(-1) for row in rows]).mean(0)
    mean[answer] = -1
    return int(mean.argmax())
