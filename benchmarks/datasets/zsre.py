"""zsRE questions in MEND's schema, as ROME, MEMIT and their successors edit and score them.

    loaded = load("zsre_mend_eval.json", limit=100, seed=0)

zsRE has no competing answer, and the originals score it by teacher-forced accuracy alone: with `target="answers"` its
summary has no probability comparison.

References: Levy et al. 2017 (the questions), De Cao et al. 2021 and Mitchell et al. 2022 (MEND; the paraphrases and the
records), Meng et al. 2022 (ROME), section 3.2 (the scoring).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets.easyedit import portability
from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_records
from errata.benchmarks.datasets.selection import Ids, Selection, select
from errata.editors.core.config import choose
from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Case, Probe

Target = Literal["answers", "alt"]
TARGETS: tuple[Target, ...] = ("answers", "alt")


def load(
    path: str | Path,
    *,
    target: Target = "answers",
    limit: int | None = None,
    ids: Ids | None = None,
    seed: int | None = None,
    needs_subject: bool = True,
) -> Loaded:
    """Read a zsRE file in MEND's form (JSON, plain or gzip).

    Args:
        path: A list of records: `subject`, `src` (the question), `rephrase`, `answers`, `alt`, `loc` (an unrelated
            question) and `loc_ans`. A case's id is the place of its record in the file, as in the originals.
            EasyEdit's files have `portability` as well.
        target: What the edit teaches. "answers" (default): the first right answer, as ROME and MEMIT score it. "alt":
            the wrong answer that MEND's records suggest, in place of the right one, which then competes with it, as
            MEND, EasyEdit and UltraEdit do. Portability is asked only then, since its answers follow from "alt".
        limit, ids, seed, needs_subject: as for `counterfact.load`.

    Raises:
        DatasetError: the file is missing, damaged, no list of records, or holds no usable one.
        ConfigError: no such target, or a bad limit.
    """
    choose(target, TARGETS, "target")
    selection = Selection(limit, ids, seed)
    loaded = convert(
        read_records(path),
        lambda record: to_case(record, target=target, needs_subject=needs_subject),
        silent=("pred", "cond", "alt", "case_id", "portability"),
    )
    return select(loaded, selection, path=path)


def to_case(record: RecordReader, *, target: Target = "answers", needs_subject: bool = True) -> Case:
    """One record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or the subject is not literally in the question, once.
        RequestError: the fields do not make a request.
    """
    if record.get("src") is None and record.get("prompt") is not None:
        raise BadFieldError("src", "expected the question; dataset=easyedit reads records with a prompt in its place")
    question = record.text("src")
    subject = record.subject("subject", question, required=needs_subject)
    mentions = 1 if subject is None else question.count(subject)
    if mentions != 1:
        raise BadFieldError(
            "subject", f"expected {subject!r} once in the question {question!r}, found it {mentions} times"
        )
    answers = record.texts("answers")
    if not answers:
        raise BadFieldError("answers", "expected at least one answer, got an empty list")
    new, true = (answers[0], None) if target == "answers" else (record.text("alt"), answers[0])
    before, slot, after = (question, "", "") if subject is None else question.partition(subject)
    prompt = f"{before}{slot and SLOT}{after}"
    request = EditRequest(prompt, subject, new, true, id=record.place.lstrip("#"))
    probes = [
        Probe("rewrite", request.text, new, true),
        Probe("paraphrase", record.text("rephrase"), new, true),
        # The originals put the question mark that MEND's `loc` leaves out.
        Probe("neighborhood", record.text("loc").rstrip() + "?", record.text("loc_ans")),
    ]
    if target == "alt":
        probes += portability(record)
    return Case(str(request.id), request, tuple(probes))
