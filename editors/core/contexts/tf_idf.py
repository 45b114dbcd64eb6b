"""TF-IDF: texts as vectors of weighted words, with the weights of scikit-learn's TfidfVectorizer.

    weights = TfIdf.of(texts)
    weights.cosine("the mother tongue", "a native tongue")        # from 0 to 1

    weight of w in a text = tf(w, text) (1 + ln((1 + n) / (1 + df(w)))),  over words of at least two letters or digits

There are n texts; df(w) of them hold the word w. A text's vector has length 1, or no entry if it has no known word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_WORD = re.compile(r"\b\w\w+\b")
Vector = Mapping[str, float]


@dataclass(frozen=True)
class TfIdf:
    """The weights of words that were learned on some texts.

    Attributes:
        idf: {word: ln((1 + n) / (1 + df)) + 1}. Other words do not count.
    """

    idf: Mapping[str, float]

    @classmethod
    def of(cls, texts: Iterable[str]) -> TfIdf:
        """Learn the weights of the words of some texts."""
        held = [set(_words(text)) for text in texts]
        counts = Counter(word for words in held for word in words)
        return cls({word: math.log((1 + len(held)) / (1 + count)) + 1 for word, count in counts.items()})

    def vector(self, text: str) -> Vector:
        """Return a text as a vector of length 1, by word."""
        counts = Counter(word for word in _words(text) if word in self.idf)
        weights = {word: count * self.idf[word] for word, count in counts.items()}
        norm = math.sqrt(math.fsum(weight**2 for weight in weights.values()))
        return {word: weight / norm for word, weight in weights.items()}

    def cosine(self, text: str, other: str) -> float:
        """Return the cosine of two texts, from 0 to 1."""
        return product(self.vector(text), self.vector(other))


def product(one: Vector, other: Vector) -> float:
    """Return the inner product of two vectors."""
    return math.fsum(weight * other.get(word, 0.0) for word, weight in one.items())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
