"""How a run scores free answers as WILD does; see evaluate/answer_forms.py and evaluate/judging.py."""

from __future__ import annotations

from dataclasses import dataclass

from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError
from errata.evaluate.judging import MODEL


@dataclass(frozen=True)
class WildConfig:
    """How free answers are scored as WILD does: whole, up to a stop string."""

    tokens: int = 0
    """Tokens of the longest answer, 50 in WILD; 0: leave this scoring out."""
    stop: tuple[str, ...] = (".", "\n")
    """Strings that end an answer, beside the end of text; they are cut off."""
    instruction: str | None = None
    """What stands around every prompt, with {} for it; null: the prompt alone."""
    judge: str | None = None
    """Decides on answers: model, a judge of another package, or MODULE:FUNCTION; null: no judge."""
    judge_model: str | None = None
    """With judge=model, the model that is asked: a folder, a GGUF file or a Hugging Face id."""
    trust_judge_code: bool = False
    """Import the module of judge=MODULE:FUNCTION, which runs its code."""

    def __post_init__(self) -> None:
        check_least(self, {"tokens": 0}, "wild.")
        if self.judge is not None and not self.tokens:
            raise ConfigError("wild.judge decides on WILD's answers: give wild.tokens=50")
        if self.instruction is not None and self.instruction.count("{}") != 1:
            raise ConfigError(f"wild.instruction: expected {{}} once, for the prompt, got {self.instruction!r}")
        if (self.judge == MODEL) != (self.judge_model is not None):
            raise ConfigError("wild.judge=model and wild.judge_model=MODEL need each other")
        if not all(self.stop):
            raise ConfigError("wild.stop: expected strings that are not empty")
