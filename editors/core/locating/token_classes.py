"""Averages of heat maps over facts, whose prompts differ in length: by what a token is in its prompt.

| class | tokens |
|---|---|
| first subject, last subject | the first and the last token of the subject; one that has one token is both |
| middle subject | those between them |
| first after | the token behind the subject |
| further | those between it and the last |
| last | the last token of the prompt, whatever else it is |

Source: kmeng01/rome, notebook average_causal_effects. There, middle and further tokens are pooled over all prompts, as
they are here, and a prompt that ends with its subject stops the average. Here it has no token of the class "first
after".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from errata.editors.core.locating.answer_scores import Metric
from errata.editors.core.locating.tracing import FactTrace

CLASSES = ("first subject", "middle subject", "last subject", "first after", "further", "last")


def class_tokens(trace: FactTrace) -> dict[str, list[int]]:
    """Return the tokens of each class, as indices of the prompt."""
    (first, end), last = trace.subject_range, len(trace.tokens) - 1
    return {
        "first subject": [first],
        "middle subject": list(range(first + 1, end - 1)),
        "last subject": [end - 1],
        "first after": [end] if end <= last else [],
        "further": list(range(end + 1, last)),
        "last": [last],
    }


@dataclass(frozen=True)
class ClassSums:
    """What averages are made of, so that facts can be drawn again for intervals.

    Attributes:
        sums: (facts, classes, L) sums over the tokens of a class.
        squares: The same of squares.
        counts: (facts, classes) tokens of each class.
    """

    sums: np.ndarray
    squares: np.ndarray
    counts: np.ndarray

    def means(self) -> np.ndarray:
        """Return the means over all tokens of a class, (classes, L); NaN where no fact has one."""
        return _ratio(self.sums.sum(0), self.counts.sum(0)[:, None])

    def deviations(self) -> np.ndarray:
        """Return the standard deviations of the population, (classes, L)."""
        spread = _ratio(self.squares.sum(0), self.counts.sum(0)[:, None]) - self.means() ** 2
        return np.sqrt(np.clip(spread, 0, None))

    def drawn_means(self, drawn: np.ndarray) -> np.ndarray:
        """Return the means (draws, classes, L) over drawn facts (draws, facts)."""
        counts = self.counts[drawn].sum(1)[..., None]
        # One draw after another, because many facts of a deep model would take gigabytes at once.
        sums = np.stack([self.sums[facts].sum(0) for facts in drawn])
        return _ratio(sums, counts)


def class_sums(traces: Sequence[FactTrace], maps: Sequence[Tensor]) -> ClassSums:
    """Return the sums of one heat map (T, L) of each fact by class of tokens.

    Args:
        traces: At least one, each with a row for every token.
        maps: Its scores or effects.
    """
    found = []
    for trace, cells in zip(traces, maps, strict=True):
        values = cells.double().numpy()
        by_class = [values[tokens] for tokens in class_tokens(trace).values()]
        found.append(
            ([part.sum(0) for part in by_class], [(part**2).sum(0) for part in by_class], [*map(len, by_class)])
        )
    sums, squares, counts = (np.array([entry[i] for entry in found]) for i in range(3))
    return ClassSums(sums, squares, counts)


def effects_by_class(traces: Sequence[FactTrace], grid: str, metric: Metric, *, normalised: bool = False) -> ClassSums:
    """Return the sums of the effects of many facts by class of tokens."""
    return class_sums(traces, [trace.effects(grid, metric, normalised=normalised) for trace in traces])


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=np.broadcast_to(counts > 0, sums.shape))
