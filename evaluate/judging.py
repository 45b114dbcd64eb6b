"""Judges of free answers: functions that decide whether a text answers a question. No run needs one.

    def judge(claims):                      # in my_judges.py
        return [claim.answers[0].lower() in claim.text.lower() for claim in claims]

    errata bench wild.tokens=50 wild.judge=my_judges:judge wild.trust_judge_code=true

`wild.judge=model` asks a local model, and a package can register a judge by an entry point of `errata.judges`. Code
that is named by MODULE:FUNCTION is imported only with `trust_judge_code`, and results.json says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from errata.editors.core.errors import ConfigError
from errata.editors.core.extensions import ExtensionPoint
from errata.evaluate.probes import Probe

if TYPE_CHECKING:
    from errata.editors.core.model.tokens import Tokenizer
    from errata.evaluate.scoring import Model

MODEL = "model"


@dataclass(frozen=True)
class Claim:
    """What a judge decides: whether `text` answers `question` with one of `answers`, the spellings that count."""

    question: str
    answers: tuple[str, ...]
    text: str


Judge = Callable[[Sequence[Claim]], Sequence[bool]]

ADDED = ExtensionPoint(
    "errata.judges",
    "judge",
    "a function judge(claims) -> a list of true or false",
    lambda loaded: callable(loaded) and not isinstance(loaded, type),
    own=(MODEL,),
)

_INSTRUCTION = (
    "Decide whether a predicted answer to a question is correct. It is correct if it states the whole gold answer, "
    "contradicts it nowhere and does not repeat itself. Answer A for correct and B for incorrect."
)


def find_judge(name: str, *, trust_code: bool) -> Judge:
    """Return the judge of a name: MODULE:FUNCTION, or one that a package registered.

    Args:
        name: The name.
        trust_code: Whether MODULE may be imported, which runs it.

    Raises:
        ConfigError: There is none, it cannot be imported, or MODULE:FUNCTION is not trusted.
    """
    module, colon, function = name.partition(":")
    if not colon:
        return ADDED.load(name)
    if not trust_code:
        raise ConfigError(
            f"wild.judge={name} runs the code of the module {module!r}: give wild.trust_judge_code=true if you trust it"
        )
    try:
        found = cast(Judge, getattr(importlib.import_module(module), function, None))
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(f"wild.judge={name}: {module!r} cannot be imported: {error}") from error
    if not ADDED.fits(found):
        raise ConfigError(f"wild.judge={name}: {module!r} has no function {function!r}")
    return found


def verdicts(judge: Judge, name: str, claims: Sequence[Claim]) -> list[bool]:
    """Return what a judge decides, once it is a verdict for each claim.

    Raises:
        ConfigError: The judge fails, or returns something else; names it.
    """
    try:
        found = list(judge(claims))
    except Exception as error:  # whatever a judge raises
        raise ConfigError(f"wild.judge={name} failed: {type(error).__name__}: {error}") from error
    if len(found) != len(claims) or not all(isinstance(verdict, bool) for verdict in found):
        raise ConfigError(f"wild.judge={name}: expected {len(claims)} times true or false, got {found!r}")
    return found


def model_judge(model: Model, tokenizer: Tokenizer, *, batch_tokens: int = 8192) -> Judge:
    """Return a judge that asks a model for A (correct) or B (incorrect), and takes the more probable letter.

    A tokenizer with a chat template is asked within it.
    """
    from errata.evaluate import scoring

    chat = bool(getattr(tokenizer, "chat_template", None))

    def judge(claims: Sequence[Claim]) -> list[bool]:
        asked = [Probe("rewrite", question(claim), "A", "B", join="" if chat else " ", chat=chat) for claim in claims]
        scores = scoring.score(model, tokenizer, asked, batch_tokens=batch_tokens)
        return [s.nll_target is not None and s.nll_other is not None and s.nll_target < s.nll_other for s in scores]

    return judge


def question(claim: Claim) -> str:
    """Return what a model is asked about a claim."""
    asked = f"Question: {claim.question}\nGold answer: {' or '.join(claim.answers)}"
    said = f"Predicted answer: {claim.text.strip() or '(nothing)'}"
    return f"{_INSTRUCTION}\n\n{asked}\n{said}\n\nCorrect (A) or incorrect (B)? Answer:"
