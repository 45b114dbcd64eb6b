"""RippleEdits: what follows from an edit and what must not, along six axes, with conditions.

    loaded = read("popular.json")

An axis is a named group. A test is one question or more: any (OR) or all (AND) of them must be answered. A test with
conditions counts only where the untouched model answers all of these. Relation_Specificity and Forgetfulness are
locality, the other four portability.

Reference: Cohen et al. 2024 (Evaluating the Ripple Effects of Knowledge Editing in Language Models), sections 3 and 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_records
from errata.editors.core.config import choose
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, FreeAnswer, Probe

Text = Literal["new_tokens", "as_published"]
TEXTS: tuple[Text, ...] = ("new_tokens", "as_published")
_NEW_TOKENS = 30
# Each axis with the kind of its probes. The authors' README spells the first one in another way.
_AXES = (
    ("Relation_Specificity", "neighborhood"),
    ("Relation_Specifity", "neighborhood"),
    ("Logical_Generalization", "portability"),
    ("Subject_Aliasing", "portability"),
    ("Compositionality_I", "portability"),
    ("Compositionality_II", "portability"),
    ("Forgetfulness", "neighborhood"),
)
_RULES = {"OR": "any", "AND": "all"}
# How the sentence of an edit names its subject and then its object, where the relation's own words do not tell.
_SENTENCES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<prompt>(?P<subject>.+?) (?:follows|is followed by)) (?P<object>.+)",
        r"(?P<prompt>.+? which (?P<subject>.+?) (?:is associated with|is a member of|plays in|is part of|is the capital"
        r" of) is) (?P<object>.+)",
        r"(?P<prompt>.+? (?:held by|award|currency in|performed in|number of children) (?P<subject>.+?)"
        r"(?: won| has)? is) (?P<object>.+)",
        r"(?P<prompt>The (?:names?|place|date|\w+)\b.*? of (?P<subject>[^ ].*?) (?:is|are)) (?P<object>.+)",
    )
)


def read(path: str | Path, *, needs_subject: bool = True, text: Text = "new_tokens") -> Loaded:
    """Read a file of RippleEdits (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `example_type`, `edit` {`prompt` (a whole sentence), `relation`, and `previous_fact` or
            `original_fact`}, and the six axes, each a list of {`test_queries`, `test_condition`, `condition_queries`},
            whose queries are {`prompt`, `answers` [{`value`, `aliases`}]}.
        needs_subject: Drop records whose sentence does not tell its subject.
        text: How free answers are read. "new_tokens": 30 new tokens, without the prompt, for whole words.
            "as_published": the prompt and the text together, for the spelling of an answer anywhere; as long as the
            prompt has characters plus 30 tokens, the prompt's own included.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
        ConfigError: there is no such way to read free answers.
    """
    choose(text, TEXTS, "dataset.options.text")
    return convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject, text=text),
        silent=("example_type",),
    )


def to_case(record: RecordReader, *, needs_subject: bool = True, text: Text = "new_tokens") -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or the sentence of the edit is not understood.
        RequestError: the fields do not make a request.
    """
    name = record.place.lstrip("#")
    relation = record.text("edit.relation").lower().replace("_", " ")
    prompt, subject, new = _parts(record.text("edit.prompt"), relation)
    if needs_subject and subject is None:
        raise BadFieldError("edit.prompt", "does not tell its subject in a form that is known")
    request = EditRequest(prompt, subject, new, _old(record, prompt, new), id=name)
    probes = [Probe("rewrite", prompt, new, request.target_true, free=_free(prompt, text))]
    for axis, kind in _AXES:
        for i, test in enumerate(record.items(axis, required=False)):
            probes += _test(test, axis.replace("Specifity", "Specificity"), kind, f"{axis}.{i}", text)
    return Case(name, request, tuple(probes))


def _test(test: RecordReader, axis: str, kind: str, name: str, text: Text) -> Iterator[Probe]:
    condition = test.get("test_condition") or "OR"
    if condition not in _RULES:
        raise BadFieldError(test.at("test_condition"), f"expected OR or AND, got {condition!r}")
    for query in test.items("condition_queries", required=False):
        yield from _query(query, "condition", None, name, "all", text)
    for query in test.items("test_queries"):
        yield from _query(query, kind, axis, name, _RULES[condition], text)


def _query(query: RecordReader, kind: str, axis: str | None, name: str, rule: str, text: Text) -> Iterator[Probe]:
    """Yield a question with its answers; aliases of one character say nothing and are left out, as the authors do."""
    prompt, answers = query.text("prompt"), []
    for answer in query.items("answers"):
        aliases = answer.texts("aliases", required=False)
        spellings = [each for each in (answer.text("value"), *aliases) if len(each) > 1 or each.isdigit()]
        if not spellings:
            raise BadFieldError(answer.at("value"), "expected a spelling of more than one character")
        answers.append(tuple(dict.fromkeys(spellings)))
    if not answers:
        raise BadFieldError(query.at("answers"), "expected at least one answer, got an empty list")
    (first, *aliases), *also = answers
    yield Probe(
        kind, prompt, first, aliases=tuple(aliases), also=tuple(also), group=axis, test=name,
        rule="any" if rule == "any" else "all", free=_free(prompt, text),
    )  # fmt: skip


def _free(prompt: str, text: Text) -> FreeAnswer:
    if text == "new_tokens":
        return FreeAnswer(tokens=_NEW_TOKENS)
    return FreeAnswer(tokens=len(prompt) + _NEW_TOKENS, with_prompt=True, matching="substring")


def _parts(sentence: str, relation: str) -> tuple[str, str | None, str]:
    """Return the prompt, the subject and the object of an edit's sentence.

    Raises:
        BadFieldError: it has no known form.
    """
    own = re.compile(rf"(?P<prompt>.*?\b{re.escape(relation)}s? of (?P<subject>.+?) (?:is|are)) (?P<object>.+)")
    for pattern in (own, *_SENTENCES):
        if (found := pattern.fullmatch(sentence.strip().removesuffix("."))) is not None:
            return found["prompt"], found["subject"], found["object"]
    raise BadFieldError("edit.prompt", f"expected a sentence about a subject and its object, got {sentence!r}")


def _old(record: RecordReader, prompt: str, new: str) -> str | None:
    """Return the object that the edit replaces; None where the fact is new."""
    for field in ("edit.original_fact", "edit.previous_fact"):
        if record.get(field) is not None:
            sentence = record.text(f"{field}.prompt").strip().removesuffix(".")
            if not sentence.startswith(f"{prompt} "):
                raise BadFieldError(f"{field}.prompt", f"does not begin as the edit does: {prompt!r}")
            old = sentence.removeprefix(f"{prompt} ")
            return None if old == new else old
    return None
