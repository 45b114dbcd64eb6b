"""Rules for free answers that compare whole texts: SQuAD's form, exact match in it, and F1 of the sets of words.

WILD reads an answer up to the first stop string and asks whether it is the wanted one in this form. Compared with
`generation.match_answer`, nothing may follow the answer.

Reference: Yang et al. 2025 (The Mirage of Model Editing), section 3; Rajpurkar et al. 2016 (SQuAD) for the form.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_form(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation and articles, its words separated by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_exact(text: str, spellings: Sequence[str]) -> bool:
    """Return whether a text is one of the spellings, in SQuAD's form. An empty form matches nothing."""
    written = squad_form(text)
    return bool(written) and any(written == squad_form(spelling) for spelling in spellings)


def word_f1(text: str, spellings: Sequence[str]) -> float:
    """Return the F1 of the sets of words of a text and of a spelling, in SQuAD's form; the best over the spellings."""
    written = set(squad_form(text).split())
    return max((_f1(written, set(squad_form(spelling).split())) for spelling in spellings), default=0.0)


def _f1(one: set[str], other: set[str]) -> float:
    shared = len(one & other)
    return 2 * shared / (len(one) + len(other)) if shared else 0.0
