"""Fluency of texts behind open prompts, as ROME and its successors report it, times 100.

    words = english_words("The capital isn't Oslen. It's Brast.")          # The capital is n't Oslen . It 's Brast .
    fluency = papers_fluency(texts)                                        # prompts included

Their consistency is 100 times the cosine of texts and reference texts (core/contexts/tf_idf.py).

Source: Meng et al. 2022 (ROME), section 3.3 and appendix; the texts hold their prompts and have 100 tokens in all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from errata.evaluate.collapse import entropy_of_ngrams

PAPERS_TOKENS = 100
PAPERS_TOP_K = 5

_SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
# In their order: quotes, the full stop at the end, commas and colons but not inside numbers, other signs, clitics.
_SPLIT = (
    (re.compile(r"''|``|[\"«»“”‘’]"), r" \g<0> "),
    (re.compile(r"([^.])(\.)([\])}>\"'”’» ]*)$"), r"\1 \2 \3 "),
    (re.compile(r"[:,](?=\D|$)"), r" \g<0> "),
    (re.compile(r"\.{2,}|--|[;@#$%&?!*\[\](){}<>\u2012-\u2015]"), r" \g<0> "),
    (re.compile(r"(?<=[^' ])('[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T|')(?= |$)"), r" \1 "),
    (re.compile(r"(?i)\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b"), r"\1\3\5\7 \2\4\6\8"),
)


def english_words(text: str) -> list[str]:
    """Split English text into words and signs, by the rules of the Penn Treebank that NLTK's `word_tokenize` follows.

    A sentence ends at a full stop, question mark or exclamation mark before white space and a capital letter. NLTK
    learns abbreviations from a corpus, so that the full stop of "Dr. Brast" counts as a sign here and not there.
    """
    found: list[str] = []
    for sentence in _SENTENCE_ENDS.split(text):
        spaced = sentence.strip()
        for pattern, replacement in _SPLIT:
            spaced = pattern.sub(replacement, spaced)
        found += spaced.split()
    return found


def papers_fluency(texts: Sequence[str]) -> float | None:
    """Return the mean n-gram entropy of texts with their prompts, in bits times 100; None without texts."""
    return 100 * fmean(entropy_of_ngrams(english_words(text)) for text in texts) if texts else None
