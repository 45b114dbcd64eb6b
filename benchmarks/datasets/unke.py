"""UnKE: a question and an answer of one or two hundred tokens, asked in other words, and in parts.

Reference: Deng et al. 2025 (Everything is Editable: Extend Knowledge Editing to Unstructured Data), section 4.
"""

from __future__ import annotations

from pathlib import Path

from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_records
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, FreeAnswer, Probe


def read(path: str | Path, *, needs_subject: bool = True, tokens: int = 512) -> Loaded:
    """Read a file of UnKE (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `id`, `question`, `answer`, `para_question`, `sub_question` and `sub_answer`, lists of
            one length.
        needs_subject: Drop records without a `subject`, which are all of those that are published.
        tokens: Bound on the new tokens of the text behind the question and behind its other wording. The parts are
            as long as the run says.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject, tokens=tokens),
        id_field="id",
    )


def to_case(record: RecordReader, *, needs_subject: bool = True, tokens: int = 512) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    question, answer, name = record.text("question"), record.text("answer"), record.name("id")
    request = EditRequest(question, record.subject("subject", question, required=needs_subject), answer, id=name)
    free = FreeAnswer(tokens=tokens)
    probes = [
        Probe("rewrite", request.text, answer, free=free),
        Probe("paraphrase", record.text("para_question"), answer, free=free),
    ]
    parts, answers = (record.texts(field, required=False) for field in ("sub_question", "sub_answer"))
    if len(parts) != len(answers):
        raise BadFieldError("sub_answer", f"expected an answer for each of {len(parts)} questions, got {len(answers)}")
    pairs = zip(parts, answers, strict=True)
    probes += [Probe("portability", part, said, group="Sub_questions") for part, said in pairs]
    return Case(name, request, tuple(probes))
