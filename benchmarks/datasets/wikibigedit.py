"""WikiBigEdit: changes of Wikidata as questions, in the order of their time.

Beside the rephrased question, a question in the words of a persona and one of several hops are scored by name.

Reference: Thede et al. 2025 (WikiBigEdit: Understanding the Limits of Lifelong Knowledge Editing in LLMs), section 3.
"""

from __future__ import annotations

from pathlib import Path

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, read_records
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

# The fields of the published records, and of the flat form in which EasyEdit's and UltraEdit's repositories keep them.
_PUBLISHED = ("update", "ans", "rephrase", "loc", "loc_ans")
_FLAT = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")


def read(path: str | Path, *, needs_subject: bool = True) -> Loaded:
    """Read a file of WikiBigEdit (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `update` (the question), `ans`, `subject`, and where there are any `rephrase`,
            `personas`, `loc` with `loc_ans`, `mhop` with `mhop_ans`; or the flat form of EasyEdit.
        needs_subject: Drop records whose subject is absent or cannot be found in the question.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject),
        silent=("tag", "relation", "object", "subject_id", "object_id"),
    )


def to_case(record: RecordReader, *, needs_subject: bool = True) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    is_flat = record.get("update") is None and record.get("prompt") is not None
    question, answer, rephrase, unrelated, kept = _FLAT if is_flat else _PUBLISHED
    prompt, new = record.text(question), record.text(answer)
    name = record.place.lstrip("#")
    request = EditRequest(prompt, record.subject("subject", prompt, required=needs_subject), new, id=name)
    probes = [Probe("rewrite", request.text, new)]
    for field, group in ((rephrase, "Rephrase"), ("personas", "Persona")):
        if record.get(field) is not None:
            probes.append(Probe("paraphrase", record.text(field), new, group=group))
    if record.get(unrelated) is not None:
        probes.append(Probe("neighborhood", record.text(unrelated), record.text(kept)))
    if record.get("mhop") is not None and record.get("mhop_ans") is not None:
        probes.append(Probe("portability", record.text("mhop"), record.text("mhop_ans"), group="Multi_hop"))
    return Case(name, request, tuple(probes))
