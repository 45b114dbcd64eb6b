"""Reference texts, for consistency and essence drift: what is written about subjects that have an answer.

    references = References.read("attribute_snippets.json")        # or "world": the testbed's own prose
    references.about_answer(("P176", "Q312"))                       # texts about subjects with that answer, joined
    references.about_subject("Danielle Darrieux")

The form is that of ROME's attribute_snippets.json: {relation: {answer: [{"name": subject, "text": text}]}}. If idf.npy
and tfidf_vocab.json lie beside the file, as their authors publish them, these are the weights of terms. Otherwise the
weights are learned on all texts of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from errata.benchmarks.datasets.json_records import read_json
from errata.editors.core.contexts.tf_idf import TfIdf
from errata.editors.core.errors import DatasetError
from errata.evaluate.probes import Case, Probe

WORLD = "world"
Key = tuple[str, str]


@dataclass(frozen=True)
class Snippet:
    """A text about a subject."""

    name: str
    text: str


@dataclass(frozen=True)
class References:
    """Texts by relation and answer.

    Attributes:
        snippets: {(relation, answer): texts about subjects that have this answer}.
        weights: Of terms, where they are given.
    """

    snippets: Mapping[Key, Sequence[Snippet]]
    weights: TfIdf | None = None

    @classmethod
    def read(cls, source: str) -> References:
        """Read a file in the form of attribute_snippets.json; "world": the testbed's own prose.

        Raises:
            DatasetError: the file cannot be read or has another form.
        """
        if source == WORLD:
            from errata.benchmarks.testbed.prose import prose_by_answer

            return cls(_snippets(prose_by_answer(), source))
        return cls(_snippets(read_json(source), source), _given_weights(Path(source).parent))

    @cached_property
    def tf_idf(self) -> TfIdf:
        """The weights of terms: those given, or those of all texts."""
        if self.weights is not None:
            return self.weights
        return TfIdf.of(snippet.text for snippets in self.snippets.values() for snippet in snippets)

    def about_answer(self, key: Key | None) -> str:
        """Return the texts about subjects with an answer, joined by spaces; empty where there are none."""
        return "" if key is None else " ".join(snippet.text for snippet in self.snippets.get(key, ()))

    def about_subject(self, subject: str) -> str:
        """Return the texts about a subject, under any answer, joined by spaces; empty where there are none."""
        return " ".join(self._by_subject.get(subject, ()))

    @cached_property
    def _by_subject(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for snippets in self.snippets.values():
            for snippet in snippets:
                found.setdefault(snippet.name, []).append(snippet.text)
        return found


def with_essence(case: Case, references: References) -> Case:
    """Return the case with a probe of the kind "essence" for each subject that texts are about."""
    texts = [text for subject in sorted(case.subjects) if (text := references.about_subject(subject))]
    probes = [Probe("essence", first, rest) for first, _, rest in (text.partition(" ") for text in texts) if rest]
    return replace(case, probes=(*case.probes, *probes))


def _snippets(content: Any, source: str) -> dict[Key, list[Snippet]]:
    try:
        return {
            (relation, answer): [Snippet(str(entry["name"]), str(entry["text"])) for entry in entries]
            for relation, answers in content.items()
            for answer, entries in answers.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        form = "{relation: {answer: [{name, text}]}}"
        raise DatasetError(f"expected {form}, as in attribute_snippets.json: {error!r}", path=source) from error


def _given_weights(folder: Path) -> TfIdf | None:
    """Return the weights that lie beside a file; None where there are none."""
    values, terms = folder / "idf.npy", folder / "tfidf_vocab.json"
    if not values.is_file() or not terms.is_file():
        return None
    import numpy as np

    try:
        idf = np.load(values, allow_pickle=False).reshape(-1)
        return TfIdf({term: float(idf[index]) for term, index in read_json(terms).items()})
    except (ValueError, OSError, IndexError, AttributeError) as error:
        raise DatasetError(f"idf.npy and tfidf_vocab.json do not fit: {error}", path=folder) from error
