"""KnowEdit: wiki_recent, wiki_counterfact, ZsRE and WikiBio, with their named groups of portability and locality.

    loaded = read("recent_test.json")
    {probe.group for case in loaded.cases for probe in case.probes}     # Reasoning, Subject_Aliasing, ...

The text behind the edited prompt is written, too, for fluency as EasyEdit measures it.

WikiBio edits the next sentence of a biography; its records have `text`, `concept` and `labels` in place of `prompt`,
`subject` and `target_new`.

Reference: Zhang et al. 2024 (A Comprehensive Study of Knowledge Editing for Large Language Models), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_records
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

# What the groups of questions are, by the field that holds them.
_KINDS = (("portability", "portability"), ("locality", "neighborhood"))


def read(path: str | Path, *, needs_subject: bool = True) -> Loaded:
    """Read a file of KnowEdit (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `prompt`, `subject`, `target_new`, and where there are any `ground_truth`, `rephrase`
            or `rephrase_prompt`, `portability` and `locality`: {group: [{prompt, ground_truth}]}. An answer is a text,
            a list of spellings, or a list of such lists, which are then all needed. A question whose answer is empty is
            left out.
        needs_subject: Drop records whose subject is absent or cannot be found in the prompt.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject),
        id_field="case_id",
        silent=("cond", "pred", "type", "relation", "subject_id", "target_id"),
    )


def to_case(record: RecordReader, *, needs_subject: bool = True) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    is_biography = record.get("prompt") is None and record.get("text") is not None
    fields = ("text", "concept", "labels") if is_biography else ("prompt", "subject", "target_new")
    prompt, new = record.text(fields[0]), record.text(fields[2])
    true = _first(record.spellings("ground_truth")) if record.get("ground_truth") is not None else None
    name = record.place.lstrip("#") if record.get("case_id") is None else record.name("case_id")
    subject = record.subject(fields[1], prompt, required=needs_subject)
    request = EditRequest(prompt, subject, new, true if true != new else None, id=name)
    probes = [Probe("rewrite", request.text, new, request.target_true), Probe("generation", request.text)]
    for field in ("rephrase_prompt", "rephrase"):
        value = record.get(field)
        texts = [] if value is None else record.texts(field) if isinstance(value, list) else [record.text(field)]
        probes += [Probe("paraphrase", text, new, request.target_true) for text in texts]
    for field, kind in _KINDS:
        probes += _grouped(record, field, kind, request)
    return Case(name, request, tuple(dict.fromkeys(probes)))


def _grouped(record: RecordReader, field: str, kind: str, request: EditRequest) -> Iterator[Probe]:
    groups = record.get(field)
    if groups is None:
        return
    if not isinstance(groups, dict):
        raise BadFieldError(field, "expected an object of named groups")
    for group in groups:
        for entry in record.items(f"{field}.{group}", required=False):
            answers = entry.spellings("ground_truth")
            if not answers:
                record.left_out.append((entry.at("ground_truth"), "the question has an empty answer"))
                continue
            (first, *aliases), *also = answers
            other = request.target if kind == "neighborhood" and first == request.target_true else None
            yield Probe(kind, entry.text("prompt"), first, other, aliases=tuple(aliases), also=tuple(also), group=group)


def _first(answers: tuple[tuple[str, ...], ...]) -> str | None:
    return answers[0][0] if answers else None
