"""The testbed's own prose as reference texts, in the form of ROME's attribute_snippets.json."""

from __future__ import annotations

import random
from pathlib import Path

from errata.benchmarks.testbed.cases import Known
from errata.benchmarks.testbed.corpus import Author
from errata.benchmarks.testbed.files import BUNDLED

Prose = dict[str, dict[str, list[dict[str, str]]]]
# Paragraphs per subject; each has one to six of the subject's facts.
PARAGRAPHS = 2


def prose_by_answer(folder: Path = BUNDLED) -> Prose:
    """Return {relation: {object: [{"name": subject, "text": prose about the subject}]}}, the same every time.

    A subject's prose stands under each of its facts. It is in the wordings that the model was trained on.
    """
    world = Known.of(folder).world
    texts: dict[str, str] = {}
    found: Prose = {}
    for fact in world.facts:
        if fact.subject not in texts:
            author = Author(world, random.Random(f"references {fact.subject}"), subjects=[fact.subject])
            texts[fact.subject] = _written(author)
        if texts[fact.subject]:
            entry = {"name": fact.subject, "text": texts[fact.subject]}
            found.setdefault(fact.relation, {}).setdefault(fact.object, []).append(entry)
    return found


def _written(author: Author) -> str:
    """Return the paragraphs about an author's one subject; empty if it has too few facts."""
    (subject,) = author.subjects
    paragraphs = [author.about(subject) for _ in range(PARAGRAPHS)]
    return " ".join(passage.text for passage in paragraphs if passage is not None)
