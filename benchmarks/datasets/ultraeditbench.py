"""UltraEditBench: two million edits with one rephrased and one unrelated question each, and without subjects.

Reference: Gu et al. 2025 (UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing), section 4.
"""

from __future__ import annotations

from pathlib import Path

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, read_records
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe


def read(path: str | Path, *, needs_subject: bool = True) -> Loaded:
    """Read a file of UltraEditBench (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `prompt`, `ans`, and where there are any `rephrase_prompt` and `loc` with `loc_ans`.
        needs_subject: Drop records without a `subject`, which are all of those that are published.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return convert(
        read_records(path), lambda record: to_case(record, needs_subject=needs_subject), silent=("case_id", "id")
    )


def to_case(record: RecordReader, *, needs_subject: bool = True) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    prompt, new, name = record.text("prompt"), record.text("ans"), record.place.lstrip("#")
    request = EditRequest(prompt, record.subject("subject", prompt, required=needs_subject), new, id=name)
    probes = [Probe("rewrite", request.text, new)]
    if record.get("rephrase_prompt") is not None:
        probes.append(Probe("paraphrase", record.text("rephrase_prompt"), new))
    if record.get("loc") is not None:
        probes.append(Probe("neighborhood", record.text("loc"), record.text("loc_ans")))
    return Case(name, request, tuple(probes))
