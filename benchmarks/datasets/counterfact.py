"""CounterFact and CounterFact+, in the original schema.

    loaded = load("counterfact.json", form="counterfact_plus", limit=100, seed=0)
    loaded.cases[0].request, loaded.cases[0].probes, loaded.dropped

References: Meng et al. 2022 (ROME), section 3.3; Hoelscher-Obermaier et al. 2023 (CounterFact+), section 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets.json_records import Loaded, RecordReader, convert, read_records
from errata.benchmarks.datasets.selection import Ids, Selection, select
from errata.editors.core.config import choose
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe, distracting

Form = Literal["counterfact", "counterfact_plus"]
FORMS: tuple[Form, ...] = ("counterfact", "counterfact_plus")


def load(
    path: str | Path,
    *,
    form: Form = "counterfact",
    limit: int | None = None,
    ids: Ids | None = None,
    seed: int | None = None,
    needs_subject: bool = True,
) -> Loaded:
    """Read a CounterFact file (JSON, plain or gzip).

    Args:
        path: A list of records: `case_id`, `requested_rewrite` {`prompt`, `subject`, `target_new.str`,
            `target_true.str`, and for reference texts `relation_id` and `target_new.id`}, `paraphrase_prompts`,
            `neighborhood_prompts`, and where there are any `attribute_prompts` and `generation_prompts`.
        form: "counterfact_plus" adds the distracting neighborhood: every neighborhood prompt again, behind a sentence
            that states the edit.
        limit: The largest number of cases.
        ids: Only these case ids, or those in a JSON file (see `selection.Selection`).
        seed: Shuffle first; None keeps the order of the file.
        needs_subject: Drop records whose subject is absent or cannot be found in the prompt. False: they become cases
            without a subject, for methods that never look at it.

    Raises:
        DatasetError: the file is missing, damaged, no list of records, or holds no usable one.
        ConfigError: no such form, or a bad limit.
    """
    choose(form, FORMS, "form")
    selection = Selection(limit, ids, seed)
    loaded = convert(
        read_records(path),
        lambda record: to_case(record, form=form, needs_subject=needs_subject),
        id_field="case_id",
        silent=("pararel_idx",),
    )
    return select(loaded, selection, path=path)


def to_case(record: RecordReader, *, form: Form = "counterfact", needs_subject: bool = True) -> Case:
    """One record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    prompt = record.text("requested_rewrite.prompt")
    request = EditRequest(
        prompt=prompt,
        subject=record.subject("requested_rewrite.subject", prompt, required=needs_subject),
        target=record.text("requested_rewrite.target_new.str"),
        target_true=record.text("requested_rewrite.target_true.str"),
        id=record.name("case_id"),
    )
    new, true = request.target, request.target_true
    neighbors = record.texts("neighborhood_prompts")
    probes = [Probe("rewrite", request.text, new, true)]
    probes += [Probe("paraphrase", prompt, new, true) for prompt in record.texts("paraphrase_prompts")]
    probes += [Probe("neighborhood", prompt, true, new) for prompt in neighbors]
    if form == "counterfact_plus":
        probes += [Probe("distracting_neighborhood", distracting(request, prompt), true, new) for prompt in neighbors]
    probes += [Probe("attribute", p, new, true) for p in record.texts("attribute_prompts", required=False)]
    probes += [Probe("generation", open_) for open_ in record.texts("generation_prompts", required=False)]
    return Case(str(request.id), request, tuple(probes), reference=_reference(record))


def _reference(record: RecordReader) -> tuple[str, str] | None:
    """Return under which relation and answer reference texts are found; None where the record does not say."""
    relation, answer = record.get("requested_rewrite.relation_id"), record.get("requested_rewrite.target_new.id")
    return (relation, answer) if isinstance(relation, str) and isinstance(answer, str) else None
