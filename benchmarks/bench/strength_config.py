"""What the protocols `dial` and `league` measure."""

from __future__ import annotations

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
        if not self.strengths or list(self.strengths) != sorted(set(self.strengths)):
            raise ConfigError(f"dial.strengths: expected ascending numbers, got {list(self.strengths)}")


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
        if not self.caps or min(self.caps) <= 0 or len(set(self.caps)) < len(self.caps):
            raise ConfigError(f"league.caps: expected numbers above 0, each once, got {list(self.caps)}")
