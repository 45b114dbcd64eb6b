"""What the protocols `dial` and `league` measure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError
from errata.evaluate.strength_grid import CAPS, STEPS, STRENGTHS


@dataclass(frozen=True)
class DialConfig:
    """At which strengths `protocol=dial` scores the edit."""

    strengths: tuple[float, ...] = STRENGTHS
    """Factors of what the edit adds: 0 is the untouched model, 1 the edit as it was made, -1 its opposite."""

    def __post_init__(self) -> None:
        is_finite = all(map(math.isfinite, self.strengths))
        if not (self.strengths and is_finite and list(self.strengths) == sorted(set(self.strengths))):
            raise ConfigError(f"dial.strengths: expected finite numbers, ascending, got {list(self.strengths)}")


@dataclass(frozen=True)
class LeagueConfig:
    """How much damage `protocol=league` allows, and how the largest strength is found."""

    caps: tuple[float, ...] = CAPS
    """By how much of itself the mean loss on general text may rise, one league each."""
    steps: int = STEPS
    """The strength is searched among k / steps, by halving."""
    margin: float = 0.0
    """How many standard errors are added to the rise before it is compared; 0: none, as in the authors' code."""
    tokens: int | None = None
    """Predicted tokens of the texts of `collapse` that the loss is measured on, also by `protocol=dial`; null: all."""

    def __post_init__(self) -> None:
        check_least(self, {"steps": 1, "tokens": 1, "margin": 0}, "league.")
        are_caps = all(math.isfinite(cap) and cap > 0 for cap in self.caps)
        if not (self.caps and are_caps and len(set(self.caps)) == len(self.caps) and math.isfinite(self.margin)):
            raise ConfigError(
                f"league.caps: expected finite numbers above 0, each once, and a finite margin, got {list(self.caps)} "
                f"and {self.margin}"
            )
