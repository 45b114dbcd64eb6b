"""Whether a run measures priming, and at how many prompts; see evaluate/priming.py."""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.core.config import check_least


@dataclass(frozen=True)
class PrimingConfig:
    """How far the answers of edits leak into other contexts."""

    n_prompts: int = 0
    """Prompts of each kind at which priming is measured: other subjects, other relations, open ones; 0: none."""

    def __post_init__(self) -> None:
        check_least(self, {"n_prompts": 0}, "priming.")
