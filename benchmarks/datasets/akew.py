"""AKEW: an edit as a fact, as a text that states it, or as the triplets that a model found in the text.

    loaded = read("MQuAKE-CF.json", teaches="text")

What is asked is the same for all three: the cloze of each fact and, in MQuAKE's file, its questions over several hops.

Reference: Wu et al. 2024 (AKEW: Assessing Knowledge Editing in the Wild), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets import mquake
from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_records
from errata.editors.core.config import choose
from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Case, Probe

Teaches = Literal["text", "triplets", "fact"]
TEACHES: tuple[Teaches, ...] = ("text", "triplets", "fact")
_SILENT = (
    "orig", "single_hops", "new_single_hops", "answer_alias", "pararel_idx", "attribute_prompts", "generation_prompts",
    "case_id",
)  # fmt: skip


def read(path: str | Path, *, needs_subject: bool = True, teaches: Teaches = "text") -> Loaded:
    """Read a file of AKEW (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `case_id` and `requested_rewrite`, one or a list of {`prompt` with `{}`, `subject`,
            `target_new.str`, `target_true.str`, `question`, `fact_new_uns`, `unsfact_triplets_GPT`}; with
            `paraphrase_prompts` and `neighborhood_prompts`, or `questions` and `new_answer`, where there are any.
        needs_subject: Drop records whose subject cannot be found in what is taught. Facts and triplets have it in their
            prompts, texts in their questions.
        teaches: "text": the text, behind the question; "triplets": all triplets of the text together; "fact": the fact.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
        ConfigError: there is nothing of that name to teach.
    """
    choose(teaches, TEACHES, "dataset.options.teaches")
    loaded = convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject, teaches=teaches),
        id_field="case_id",
        silent=_SILENT,
    )
    return replace(loaded, shares_edits=True)


def to_case(record: RecordReader, *, needs_subject: bool = True, teaches: Teaches = "text") -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or two edits contradict each other.
        RequestError: the fields do not make a request.
    """
    name = record.name("case_id") if record.get("case_id") is not None else record.place.lstrip("#")
    single = isinstance(record.get("requested_rewrite"), dict)
    entries = [_inner(record, "requested_rewrite")] if single else record.items("requested_rewrite")
    found: dict[str, EditRequest] = {}
    for entry in entries:
        for request in _taught(entry, teaches, needs_subject=needs_subject):
            earlier = found.setdefault(request.text, request)
            if teaches != "triplets" and earlier.target != request.target:
                raise BadFieldError(entry.at("target_new.str"), "contradicts another edit of the record")
    if not found:
        raise BadFieldError("requested_rewrite", f"has no {teaches} to teach")
    first, *further = [
        replace(request, id=name if len(found) == 1 else f"{name}.{i}") for i, request in enumerate(found.values())
    ]
    probes = [Probe("rewrite", request.text, request.target, request.target_true) for request in (first, *further)]
    for entry in entries:
        probes += _asked(entry, is_taught=teaches == "fact")
    for field, kind in (("paraphrase_prompts", "paraphrase"), ("neighborhood_prompts", "neighborhood")):
        probes += _counterfact(record, entries[0], field, kind)
    if record.get("questions") is not None:
        probes += mquake.multi_hop(record, "bare", "")
    return Case(name, first, tuple(dict.fromkeys(probes)), tuple(further))


def _inner(record: RecordReader, path: str) -> RecordReader:
    return RecordReader(record.get(path), record.place, record.at(path))


def _taught(entry: RecordReader, teaches: Teaches, *, needs_subject: bool) -> Iterator[EditRequest]:
    subject = entry.text("subject").strip()
    if teaches == "fact":
        yield EditRequest(entry.text("prompt"), subject, entry.text("target_new.str"), entry.text("target_true.str"))
    elif teaches == "text":
        cloze = entry.text("prompt").replace(SLOT, subject)
        question = cloze if entry.get("question") is None else entry.text("question")
        known = subject if question.count(subject) == 1 else None
        if known is None and needs_subject:
            raise BadFieldError(entry.at("subject"), f"expected {subject!r} once in the question {question!r}")
        yield EditRequest(question, known, entry.text("fact_new_uns"))
    else:
        for triplet in entry.items("unsfact_triplets_GPT"):
            if SLOT in triplet.text("prompt"):
                yield EditRequest(triplet.text("prompt"), triplet.text("subject").strip(), triplet.text("target"))


def _asked(entry: RecordReader, *, is_taught: bool) -> Iterator[Probe]:
    """Yield the fact of an edit, which its text states, and the triplets of the text as a group of their own."""
    subject, new, true = entry.text("subject").strip(), entry.text("target_new.str"), entry.get("target_true.str")
    if not is_taught:
        yield Probe("portability", entry.text("prompt").replace(SLOT, subject), new, true, group="Fact")
    for triplet in entry.items("unsfact_triplets_GPT", required=False):
        prompt, about, target = (triplet.get(name) for name in ("prompt", "subject", "target"))
        if isinstance(prompt, str) and isinstance(about, str) and isinstance(target, str) and target.strip():
            yield Probe("portability", prompt.replace(SLOT, about), target, group="Triplets")


def _counterfact(record: RecordReader, entry: RecordReader, field: str, kind: str) -> Iterator[Probe]:
    """Yield the paraphrases and neighbours that CounterFact's file has."""
    new, true = entry.text("target_new.str"), entry.get("target_true.str")
    for prompt in record.texts(field, required=False):
        answers = (new, true) if kind == "paraphrase" else (true, new)
        yield Probe(kind, prompt, *answers)
