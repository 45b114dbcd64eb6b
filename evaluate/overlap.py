"""BLEU and ROUGE-L of a text against the wanted answer, by sacrebleu and rouge-score (the extra `overlap`).

Both are shares from 0 to 1. BLEU is that of a sentence, over words (tokenised as "13a"), with exponential smoothing
and without the orders of n-grams that the text is too short for.
ROUGE-L is the recall: the share of the answer's words that the text has in the same order, as UnKE's authors report it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from errata.editors.core.errors import ConfigError

PACKAGES = ("sacrebleu", "rouge-score")


def bleu(text: str, spellings: Sequence[str]) -> float:
    """Return the BLEU of a text, with the spellings as its references.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    found = sacrebleu.sentence_bleu(text, list(spellings), use_effective_order=True)
    return min(1.0, found.score / 100)  # which rounding can exceed


def rouge_l(text: str, spellings: Sequence[str]) -> float:
    """Return the recall of ROUGE-L; the best over the spellings.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    scorer: Any = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return max(float(scorer.score(spelling, text)["rougeL"].recall) for spelling in spellings)


def check_installed() -> dict[str, str]:
    """Return the versions of the two packages, once both can be imported; errors as `bleu`."""
    bleu("a", ["a"])
    rouge_l("a", ["a"])
    return {name: version(name) for name in PACKAGES}


def _not_installed(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"generation.overlap needs sacrebleu and rouge-score ({error.name} is missing): pip install -e '.[overlap]'; "
        "generation.overlap=false does without"
    )
