"""WikiBigEdit: changes of Wikidata as questions, in the order of their time.

Beside the rephrased question, a question in the words of a persona and one of several hops are scored by name.

The published files are eight, one per interval of time, and their names hold its ends: 20240201_20240220. A folder of
them is read in the order of time. Each interval is also summed up by itself, and a sequence has a checkpoint behind it.

Reference: Thede et al. 2025 (WikiBigEdit: Understanding the Limits of Lifelong Knowledge Editing in LLMs), section 3.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, joined, read_records
from errata.editors.core.errors import DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

_INTERVAL = re.compile(r"(\d{4})(\d\d)(\d\d)[_-](\d{4})(\d\d)(\d\d)")
# The fields of the published records, and of the flat form in which EasyEdit's and UltraEdit's repositories keep them.
_PUBLISHED = ("update", "ans", "rephrase", "loc", "loc_ans")
_FLAT = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")


def read(path: str | Path, *, needs_subject: bool = True) -> Loaded:
    """Read a file of WikiBigEdit (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A folder of files that are named by their intervals, or one file, with a list of records: `update` (the
            question), `ans`, `subject`, and where there are any `rephrase`, `personas`, `loc` with `loc_ans`, `mhop`
            with `mhop_ans`; or the flat form of EasyEdit.
        needs_subject: Drop records whose subject is absent or cannot be found in the question.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
    """
    return joined([_of_file(file, needs_subject=needs_subject) for file in _files(path)])


def interval_of(path: str | Path) -> str | None:
    """Return the interval that a file's name holds, as "2024-02-01 to 2024-02-20"; None where it holds none."""
    found = _INTERVAL.search(Path(path).name)
    return None if found is None else "{}-{}-{} to {}-{}-{}".format(*found.groups())


def _files(path: str | Path) -> list[str | Path]:
    """Return the files of a folder in the order of their intervals; a file by itself.

    Raises:
        DatasetError: No file of the folder has an interval in its name.
    """
    if not Path(path).is_dir():
        return [path]
    named = [(interval_of(file), file) for file in Path(path).iterdir() if file.is_file()]
    found = sorted((interval, file.name, file) for interval, file in named if interval is not None)
    if not found:
        raise DatasetError("has no file that is named by its interval, as 20240201_20240220", path=path)
    return [file for *_, file in found]


def _of_file(path: str | Path, *, needs_subject: bool) -> Loaded:
    interval = interval_of(path)
    found = convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject, interval=interval),
        silent=("tag", "relation", "object", "subject_id", "object_id"),
    )
    if interval is None:
        return found
    return replace(found, dropped=[replace(one, record=f"{interval}/{one.record}") for one in found.dropped])


def to_case(record: RecordReader, *, needs_subject: bool = True, interval: str | None = None) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    is_flat = record.get("update") is None and record.get("prompt") is not None
    question, answer, rephrase, unrelated, kept = _FLAT if is_flat else _PUBLISHED
    prompt, new = record.text(question), record.text(answer)
    name = record.place.lstrip("#") if interval is None else f"{interval}/{record.place.lstrip('#')}"
    request = EditRequest(prompt, record.subject("subject", prompt, required=needs_subject), new, id=name)
    probes = [Probe("rewrite", request.text, new)]
    for field, group in ((rephrase, "Rephrase"), ("personas", "Persona")):
        if record.get(field) is not None:
            probes.append(Probe("paraphrase", record.text(field), new, group=group))
    if record.get(unrelated) is not None:
        probes.append(Probe("neighborhood", record.text(unrelated), record.text(kept)))
    if record.get("mhop") is not None and record.get("mhop_ans") is not None:
        probes.append(Probe("portability", record.text("mhop"), record.text("mhop_ans"), group="Multi_hop"))
    return Case(name, request, tuple(probes), interval=interval)
