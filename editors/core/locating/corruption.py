"""How a prompt is corrupted: noise on the subject's token embeddings, or another subject in its place.

`Noise` follows the rules of ROME's experiments (Meng et al. 2022; kmeng01/rome, experiments/causal_trace.py):

| rule | noise on each entry of a token embedding |
|---|---|
| `s3`, `s1`, `s`, `s0.5` | that many standard deviations of the subjects' token embeddings (`s` is one) times N(0, 1) |
| `0.1` | that number times N(0, 1) |
| `u0.1` | that number times a uniform number in (-1, 1) |
| `m` | a Gaussian vector with the mean and covariance of the embeddings of texts |
| `t5` | a vector of Student's t with 5 degrees of freedom, of the same covariance |

What the released code does beside that:
- The noise of `m` and `t5` has the mean embedding in it, so that it is not centred. `centred=True` leaves it out.
- Its severed paths draw twice: the values that are held come from the first draw, and the rows that are patched have
  the second. `draws="two"` does that, and the default holds values of the same draw.
- With `replaced=True` it still reports the score of added noise as that of the corrupted prompt. That is a fault; here
  the corrupted prompt has the noise that its cells have.

Shapes: S samples, n tokens of the subject, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError
from errata.editors.core.model.architecture import Architecture

_EXAMPLES = "s3, s1, 0.1, u0.1, m or t5"
# Rows of the table of embeddings that are read at a time.
_TOKENS_AT_ONCE = 8192


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class Noise:
    """Noise on the token embeddings of the subject, before positions are added.

    Attributes:
        rule: As in the table of this module.
        samples: Corrupted rows, S. Scores are means over them.
        seed: Seed of the draw. Each trace draws anew from it, so that all cells see the same noise.
        replaced: Whether the noise stands in place of the embedding instead of being added to it.
        extra_tokens: Tokens behind the subject that are corrupted, too.
        centred: Whether `m` and `t5` leave the mean embedding out.
        draws: "one": severed paths hold the values of the rows that are patched. "two": as the released code does.

    Raises:
        ConfigError: There is no such rule, or a number is out of range.
    """

    rule: str = "s3"
    samples: int = 10
    seed: int = 1
    replaced: bool = False
    extra_tokens: int = 0
    centred: bool = False
    draws: Literal["one", "two"] = "one"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.extra_tokens < 0 or self.draws not in ("one", "two"):
            raise ConfigError(
                f"expected at least 1 sample, 0 or more extra tokens and draws one or two, got samples={self.samples}, "
                f"extra_tokens={self.extra_tokens} and draws={self.draws!r}"
            )
        if self.rule not in ("m", "t5"):
            self.level()

    def level(self) -> float:
        """Return the number in the rule.

        Raises:
            ConfigError: there is none above 0.
        """
        text = self.rule.removeprefix("u").removeprefix("s")
        level = _number(text or "1")
        if text.endswith("%") and (share := _number(text[:-1])) is not None:
            sign = self.rule[: -len(text)]
            raise ConfigError(f"the noise {self.rule!r} is a percentage: write {sign}{share / 100:g}, a plain number")
        if level is None or not 0 <= level < float("inf") or self.rule == "":
            raise ConfigError(f"unknown rule of noise {self.rule!r}: expected {_EXAMPLES}")
        return level

    @property
    def needs_texts(self) -> bool:
        """Return whether the rule needs the embeddings of texts."""
        return self.rule in ("m", "t5")

    @property
    def needs_subjects(self) -> bool:
        """Return whether the rule needs the embeddings of subjects."""
        return self.rule.startswith("s")


@dataclass(frozen=True)
class Swap:
    """Another subject in the subject's place: symmetric token replacement (Zhang and Nanda 2023, section 2).

    Attributes:
        subject: The other subject. It must have as many tokens as the first, and leave all other tokens as they are.
        answer: The answer that is right for it; None: what the model says.
    """

    subject: str
    answer: str | None = None


Corruption = Noise | Swap


@dataclass(frozen=True)
class ScaledNoise:
    """Noise whose scale is known, ready to be drawn.

    Attributes:
        noise: The rule.
        level: Factor of the plain rules.
        mean: (d,) mean embedding, for `m` and `t5`.
        factor: (d, d) matrix w with w w^T the covariance, for `m` and `t5`.
    """

    noise: Noise
    level: float = 1.0
    mean: np.ndarray | None = None
    factor: np.ndarray | None = None

    def drawn(self, tokens: int, width: int, count: int = 1) -> list[np.ndarray]:
        """Return `count` draws (S, n, d) in float64, one after another from a fresh random state."""
        state = np.random.RandomState(self.noise.seed)
        shape = (self.noise.samples, tokens, width)
        if self.noise.rule.startswith("u"):
            return [self.level * state.uniform(-1, 1, shape) for _ in range(count)]
        plain = [state.randn(*shape) for _ in range(count)]
        if self.factor is None or self.mean is None:
            return [self.level * draw for draw in plain]
        vectors = [draw @ self.factor.T + (0 if self.noise.centred else self.mean) for draw in plain]
        if self.noise.rule == "t5":
            heavy = np.random.RandomState(2).chisquare(5, size=max(1000, shape[0] * tokens))
            factors = np.sqrt((5 - 2) / heavy)[: shape[0] * tokens].reshape(shape[0], tokens, 1)
            vectors = [factors * vector for vector in vectors]
        return vectors


@torch.no_grad()
def scaled_noise(
    architecture: Architecture,
    noise: Noise,
    *,
    subjects: Sequence[Sequence[int]] | None = None,
    texts: Sequence[Sequence[int]] | None = None,
) -> ScaledNoise:
    """Return noise with its scale.

    Args:
        architecture: The model.
        noise: The rule.
        subjects: Token ids of subjects, each tokenised alone, whose embeddings give the standard deviation. None: all
            tokens of the vocabulary.
        texts: Token ids of the texts whose embeddings give mean and covariance; `m` and `t5` need them.

    Raises:
        ConfigError: the rule needs texts, and there are none.
    """
    if noise.needs_texts:
        if not texts:
            raise ConfigError(f"noise {noise.rule!r} needs texts, whose embeddings give its covariance")
        mean, covariance = _moments(architecture, [token for text in texts for token in text])
        left, values, _ = torch.linalg.svd(covariance)
        return ScaledNoise(noise, 1.0, mean.numpy(), (left * values.sqrt()).numpy())
    level = noise.level()
    if noise.needs_subjects:
        level *= _deviation(architecture, [token for subject in subjects for token in subject] if subjects else None)
    return ScaledNoise(noise, level)


@torch.no_grad()
def embedded(architecture: Architecture, ids: Sequence[int] | Tensor) -> Tensor:
    """Return the token embeddings (n, d) of some ids, as the model's embedding gives them."""
    rows = torch.as_tensor(ids, device=architecture.device).reshape(1, -1)
    table: Any = architecture.model.get_input_embeddings()  # type: ignore[operator]
    return table(rows)[0]


def _deviation(architecture: Architecture, ids: Sequence[int] | None) -> float:
    """Return the standard deviation over all entries of the embeddings of these ids, or of the whole vocabulary."""
    if ids is not None:
        return float(embedded(architecture, ids).double().std())
    table: Any = architecture.model.get_input_embeddings()  # type: ignore[operator]
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, table.num_embeddings, _TOKENS_AT_ONCE):
        end = min(start + _TOKENS_AT_ONCE, int(table.num_embeddings))
        part = embedded(architecture, range(start, end)).double()
        count, total, squares = count + part.numel(), total + float(part.sum()), squares + float(part.square().sum())
    return float(np.sqrt((squares - total**2 / count) / (count - 1)))


def _moments(architecture: Architecture, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and unbiased covariance (d, d) of the embeddings of all these tokens, in float64."""
    parts = (embedded(architecture, ids[i : i + _TOKENS_AT_ONCE]) for i in range(0, len(ids), _TOKENS_AT_ONCE))
    vectors = torch.cat([part.double().cpu() for part in parts])
    mean = vectors.mean(0)
    return mean, (vectors - mean).T @ (vectors - mean) / (len(vectors) - 1)
