"""FEVER as MEND's line edits it: a claim and its truth value, with other wordings and an unrelated claim.

References: Thorne et al. 2018 (the claims), Mitchell et al. 2022 (MEND), section 5 (the records).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, read_records
from errata.editors.core.config import choose
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

Paraphrases = Literal["one", "all"]
PARAPHRASES: tuple[Paraphrases, ...] = ("one", "all")


def read(path: str | Path, *, needs_subject: bool = True, paraphrases: Paraphrases = "one") -> Loaded:
    """Read a file of FEVER in MEND's form (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `prompt`, `alt` (what the edit teaches), `equiv_prompt` (other wordings),
            `unrel_prompt` and `unrel_ans`.
        needs_subject: Drop records without a `subject`, which are all of those that are published.
        paraphrases: "one": one other wording, drawn by the record's index, as the authors draw one; "all": all.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
        ConfigError: there is no such choice of paraphrases.
    """
    choose(paraphrases, PARAPHRASES, "dataset.options.paraphrases")
    return convert(
        read_records(path),
        lambda record: to_case(record, needs_subject=needs_subject, paraphrases=paraphrases),
        silent=("pred", "cond", "logit", "input"),
    )


def to_case(record: RecordReader, *, needs_subject: bool = True, paraphrases: Paraphrases = "one") -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    prompt, new, name = record.text("prompt"), record.text("alt"), record.place.lstrip("#")
    request = EditRequest(prompt, record.subject("subject", prompt, required=needs_subject), new, id=name)
    value = record.get("equiv_prompt")
    wordings = [record.text("equiv_prompt")] if isinstance(value, str) else record.texts("equiv_prompt")
    if paraphrases == "one" and wordings:
        wordings = [random.Random(f"fever {name}").choice(wordings)]
    probes = [Probe("rewrite", request.text, new), *(Probe("paraphrase", wording, new) for wording in wordings)]
    probes.append(Probe("neighborhood", record.text("unrel_prompt"), record.text("unrel_ans")))
    return Case(name, request, tuple(probes))
