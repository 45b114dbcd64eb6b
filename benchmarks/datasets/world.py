"""The testbed's cases under their public names, and in the schemas of published datasets.

    from errata.benchmarks import world
    world.cases()                           # every known fact as a case, with all kinds of probes
    world.cases(split="test")               # those whose subject was not used to choose settings
    world.first_position_cases()            # subjects of one token that stand first: where ROME breaks models
    world.again_cases()                     # every fact with every other answer: for sequences of thousands of edits
    world.records("counterfact")            # the same facts in CounterFact's schema, for any program that reads it

The cases themselves are made in benchmarks/testbed/cases.py, which needs none of the readers in this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from errata.benchmarks.datasets import counterfact, zsre
from errata.benchmarks.datasets.json_records import RecordReader
from errata.benchmarks.testbed import cases as testbed
from errata.benchmarks.testbed.cases import (
    CHOICES,
    NEIGHBORS,
    OPENINGS,
    SPLITS,
    Known,
    Split,
    again_cases,
    check_split,
    elsewhere_cases,
    first_position_cases,
    is_testbed,
    known_facts,
    known_facts_by_subject,
    questions,
    split,
    split_of,
)
from errata.benchmarks.testbed.files import BUNDLED
from errata.benchmarks.testbed.wording import open_question
from errata.benchmarks.testbed.world_generator import WorldFact, share
from errata.editors.core.config import choose
from errata.evaluate.probes import Case

__all__ = (
    "BUNDLED",
    "CHOICES",
    "FORMS",
    "NEIGHBORS",
    "OPENINGS",
    "SPLITS",
    "Form",
    "Known",
    "Split",
    "again_cases",
    "cases",
    "elsewhere_cases",
    "first_position_cases",
    "is_testbed",
    "known_facts",
    "known_facts_by_subject",
    "questions",
    "records",
    "split",
    "split_of",
)

Form = Literal["world", "counterfact", "counterfact_plus", "zsre"]
FORMS: tuple[Form, ...] = ("world", "counterfact", "counterfact_plus", "zsre")


def cases(folder: Path = BUNDLED, *, form: Form = "world", split: Split | None = None) -> list[Case]:
    """Return the known facts of a testbed as cases, in the order of its facts.

    Args:
        folder: A testbed's folder; the bundled one by default.
        form: "world": every known fact, with all kinds of probes. The other forms hold what that format can express,
            made from `records(form)`. They leave out facts without a true neighbour, since every record of CounterFact
            has some.
        split: Only the cases of one half.

    Raises:
        ConfigError: There is no such form or split.
    """
    choose(form, FORMS, "form")
    if form == "world":
        return testbed.cases(folder, split=split)
    check_split(split)
    found = [_from_record(record, form) for record in _records(Known.of(folder), form)]
    return [case for case in found if split in (None, split_of(case.request.given_subject))]


def records(form: Form = "counterfact", folder: Path = BUNDLED, *, split: Split | None = None) -> list[dict[str, Any]]:
    """The cases as records of a published format, ready for `json.dump`; `case_id` is the place of the fact.

    Args:
        form: "counterfact" and "counterfact_plus": CounterFact's schema (CounterFact+ asks the same records, behind a
            distracting sentence). "zsre": MEND's schema; `answers` is the true object and `alt` the counterfactual, so
            load it with `zsre.load(path, target="alt")` for an edit that changes something.
    """
    choose(form, [form for form in FORMS if form != "world"], "form")
    return [record for record in _records(Known.of(folder), form) if split in (None, split_of(_subject(record)))]


def _records(known: Known, form: str) -> list[dict[str, Any]]:
    made = _zsre_record if form == "zsre" else _counterfact_record
    return [made(known, fact) for fact in known.facts if known.neighbors(fact)]


def _counterfact_record(known: Known, fact: WorldFact) -> dict[str, Any]:
    case = known.case(fact)
    prompts = {
        kind: [probe.prompt for probe in case.probes if probe.kind == kind]
        for kind in ("paraphrase", "neighborhood", "attribute", "generation")
    }
    return {
        "case_id": known.index_of[fact],
        "pararel_idx": known.index_of[fact],
        "requested_rewrite": {
            "prompt": case.request.prompt,
            "relation_id": fact.relation,
            "target_new": {"str": fact.target_new, "id": fact.target_new},
            "target_true": {"str": fact.object, "id": fact.object},
            "subject": fact.subject,
        },
        **{f"{kind}_prompts": prompts[kind] for kind in prompts},
    }


def _zsre_record(known: Known, fact: WorldFact) -> dict[str, Any]:
    """MEND's schema. The unrelated question is about another subject and relation, asked as `loc` asks."""
    relation = known.world.relations[fact.relation]
    question, rephrased = (
        next(t for t in templates if t.startswith("Q: ")).replace("{}", fact.subject)
        for templates in (relation.trained, relation.held_out)
    )
    others = [f for f in known.facts if f.relation != fact.relation and fact.subject not in (f.subject, f.object)]
    other = others[int(share(f"loc {fact.relation} {fact.subject}") * len(others))]
    unrelated = next(t for t in known.world.relations[other.relation].trained if t.startswith("Q: "))
    return {
        "case_id": known.index_of[fact],
        "subject": fact.subject,
        "src": question,
        "pred": fact.object,
        "rephrase": rephrased,
        "alt": fact.target_new,
        "answers": [fact.object],
        "loc": open_question(unrelated).replace("{}", other.subject).removesuffix("?"),
        "loc_ans": other.object,
        "cond": f"{fact.object} >> {fact.target_new} || {question}",
    }


def _from_record(record: dict[str, Any], form: Form) -> Case:
    entry = RecordReader(record, str(record["case_id"]))
    if form == "zsre":
        return zsre.to_case(entry, target="alt")
    return counterfact.to_case(entry, form=form)  # type: ignore[arg-type]


def _subject(record: Mapping[str, Any]) -> str:
    return record["subject"] if "subject" in record else record["requested_rewrite"]["subject"]
