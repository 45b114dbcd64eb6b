"""QAEdit: questions of NQ, TriviaQA and SimpleQA as edits, with a rephrased one and five unrelated ones each.

Reference: Yang et al. 2025 (The Mirage of Model Editing: Revisiting Evaluation in the Wild), section 3.
"""

from __future__ import annotations

from pathlib import Path

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, read_records
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe


def read(path: str | Path, *, needs_subject: bool = True) -> Loaded:
    """Read a file of QAEdit (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `id`, `source`, `prompt`, `target`, `subject`, `rephrase`, and `locality`, a list of
            {`loc`, `loc_ans`}. Each source is a named group of the edited prompt and of the rephrased one.
        needs_subject: Drop records whose subject is absent or cannot be found in the prompt.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return convert(read_records(path), lambda record: to_case(record, needs_subject=needs_subject), id_field="id")


def to_case(record: RecordReader, *, needs_subject: bool = True) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    prompt, new, name = record.text("prompt"), record.text("target"), record.name("id")
    group = None if record.get("source") is None else record.text("source")
    name = name if group is None else f"{group}-{name}"  # each source numbers its own questions
    request = EditRequest(prompt, record.subject("subject", prompt, required=needs_subject), new, id=name)
    probes = [Probe("rewrite", request.text, new, group=group)]
    if record.get("rephrase") is not None:
        probes.append(Probe("paraphrase", record.text("rephrase"), new, group=group))
    for entry in record.items("locality", required=False):
        probes.append(Probe("neighborhood", entry.text("loc"), entry.text("loc_ans")))
    return Case(name, request, tuple(probes))
