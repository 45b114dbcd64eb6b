"""The text that a model reads: how an answer joins its prompt, and where a blank stands between the two.

    joined("The capital of France is", "Paris")     # "The capital of France is Paris"
    joined("法国的首都是", "巴黎")                     # "法国的首都是巴黎"
    joined("pd.read_", "csv")                       # "pd.read_csv"
    joined("She said: “", "Yes")                    # "She said: “Yes"

A blank is implied where prompt and answer are both written with blanks between words, and the characters that meet
would have one between them in running text. White space that is there already belongs to the user: then nothing is
added. `join` overrides the rule, as `""` for code or `" "` for a language that the rule does not know.
"""

from __future__ import annotations

import unicodedata

# First and last code point of writing that puts no blank between words, its punctuation and full-width forms included.
_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # Chinese radicals and punctuation, Hiragana, Katakana, Bopomofo
    (0x3190, 0x4DBF),  # Kanbun to the first extension of Chinese characters
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xA000, 0xA4CF),  # Yi
    (0xA9E0, 0xA9FF),  # Myanmar, extended
    (0xAA60, 0xAA7F),  # Myanmar, extended
    (0xF900, 0xFAFF),  # Chinese characters, for compatibility
    (0xFE30, 0xFE4F),  # vertical forms
    (0xFF00, 0xFF9F),  # full-width forms, half-width Katakana
    (0x16F00, 0x18DFF),  # Tangut, Khitan
    (0x1B000, 0x1B16F),  # Kana, extended
    (0x20000, 0x3FFFF),  # Chinese characters, further extensions
)
# Behind these a word goes on: paths, names in code, mentions, sums of money.
_GOES_ON = frozenset("_/\\@#$€£¥")
# Quotes that look alike on both sides of what they quote.
_STRAIGHT_QUOTES = frozenset("\"'`")
# In front of these no blank is written, though Unicode does not call them closing.
_CLOSES = frozenset(".,;:!?%…·،؛؟।॥")


def joined(prompt: str, answer: str, join: str | None = None) -> str:
    """Return prompt and answer as the one text that a model reads.

    Args:
        prompt: What the answer continues.
        answer: What follows it.
        join: The text between them; None: a blank where the writing has one (`separator`).
    """
    return prompt + (separator(prompt, answer) if join is None else join) + answer


def separator(prompt: str, answer: str) -> str:
    """Return what stands between a prompt and its answer in running text: one blank or nothing."""
    if not prompt or not answer:
        return ""
    last, first = prompt[-1], answer[0]
    if last.isspace() or first.isspace():
        return ""
    if _is_without_blanks(last) or _is_without_blanks(first):
        return ""
    return "" if _opens(prompt) or _closes(first) else " "


def _is_without_blanks(char: str) -> bool:
    """Whether a character belongs to writing without blanks between words."""
    code = ord(char)
    return any(first <= code <= last for first, last in _WITHOUT_BLANKS)


def _opens(prompt: str) -> bool:
    """Whether the last character of a prompt belongs to the word behind it, as an opening bracket does."""
    last, before = prompt[-1], prompt[-2:-1]
    if last in _GOES_ON or unicodedata.category(last) in ("Ps", "Pi"):
        return True
    stands_free = not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
    if last in _STRAIGHT_QUOTES:
        return stands_free or before in "=(["
    return last == "-" and not stands_free


def _closes(char: str) -> bool:
    """Whether a character belongs to the word in front of it, as a closing bracket does."""
    return char in _CLOSES or unicodedata.category(char) in ("Pe", "Pf")
