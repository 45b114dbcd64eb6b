"""ConflictEdit and RoundEdit: two edits in turn that contradict each other, or that lead there and back.

    loaded = read("reverse_edit.json")            # successes, conflict score, conflict magnitude, tied fact damage
    loaded = read("easy.json")                    # success, distortion, ignore rate, failure rate

Both edits of a case are made one after the other, whatever the protocol. The conflict is asked where the two meet:

    coverage    both edit one prompt: the second answer against the first, behind it
    reverse     the first relation, asked about the second answer: it should lead back to where the first edit began
    composite   the first relation, asked about the first subject: the second answer against the first

Each edit's own success stands beside these: that of the first before the second is made, and that of the second made by
itself. The authors report the latter for coverage alone.

References: Li et al. 2024 (Unveiling the Pitfalls of Knowledge Editing for Large Language Models), sections 2 and 3,
and the authors' experiments/evaluate_conflictedit.py. The scores are in evaluate/conflicts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.benchmarks.datasets.json_records import (
    BadFieldError,
    Loaded,
    RecordReader,
    convert,
    read_json,
    read_records,
)
from errata.editors.core.errors import DatasetError
from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Case, Probe

_TYPES = ("coverage", "reverse", "composite")
Templates = Mapping[str, Sequence[str]]


def read(
    path: str | Path,
    *,
    needs_subject: bool = True,  # noqa: ARG001 - every edit has one
    prompts: str | Path | None = None,
) -> Loaded:
    """Read a file of ConflictEdit or of RoundEdit (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `type`, `triples`, `prerequisites` and two `edits`, each {`relation` {`prompt` with
            `{}`, `id`}, `subject.label`, `object.label`, `new_object.label`}; or one `edit` and `true_objects`.
        needs_subject: Has no effect.
        prompts: The authors' conflict_prompts.json or round_prompts.json: {relation id: [prompt with `{}`]}. Every
            probability is then the mean over these and over the relation's own prompt, as in the paper.

    Raises:
        DatasetError: a file is missing, damaged or not of this form.
    """
    templates = {} if prompts is None else _templates(prompts)
    return convert(
        read_records(path),
        lambda record: to_case(record, templates),
        silent=("rule",),
    )


def to_case(record: RecordReader, templates: Templates | None = None) -> Case:
    """Return one record as a case of two edits in turn.

    Raises:
        BadFieldError: a field is absent or of the wrong type.
        RequestError: the fields do not make a request.
    """
    if record.get("true_objects") is not None:
        return _round(record, templates or {})
    kind = record.text("type")
    if kind not in _TYPES:
        raise BadFieldError("type", f"expected {', '.join(_TYPES)}, got {kind!r}")
    edits = record.items("edits")
    if len(edits) != 2:
        raise BadFieldError("edits", f"expected two edits, got {len(edits)}")
    name = record.place.lstrip("#")
    first, second = (_request(edit, f"{name}.{i}") for i, edit in enumerate(edits))
    asked = _Asker(templates or {})
    # The relation, the subject and the answer of the fact that the second edit should make the more probable one.
    relation, subject, answer = {
        "coverage": (edits[1], second.given_subject, second.target),
        "reverse": (edits[0], second.target, first.target),
        "composite": (edits[0], first.given_subject, second.target),
    }[kind]
    probes = [Probe("rewrite", second.text, second.target, second.target_true)]
    probes += asked("superseded", edits[0], first.given_subject, first.target, "conflict", first.target_true)
    probes += asked("prevailing", relation, subject, answer, "conflict")
    probes += asked("later_edit", edits[1], second.given_subject, second.target, "later", second.target_true)
    triples = record.items("triples")
    leaned_on = record.get("prerequisites") or []
    if not isinstance(leaned_on, list) or not all(isinstance(i, int) and 0 <= i < len(triples) for i in leaned_on):
        raise BadFieldError("prerequisites", f"expected indices of the {len(triples)} triples, got {leaned_on!r}")
    for i in leaned_on:
        fact = triples[i]
        probes += asked("tied_fact", fact, fact.text("subject.label"), fact.text("object.label"), f"tied.{i}")
    return Case(name, first, tuple(probes), (second,), in_turn=True)


def _round(record: RecordReader, templates: Templates) -> Case:
    """Return an edit to a wrong object and back to the true one that is restored."""
    name = record.place.lstrip("#")
    edit = RecordReader(record.get("edit") or {}, record.place, "edit")
    away = _request(edit, f"{name}.0")
    if away.target_true is None:
        raise BadFieldError("edit.new_object.label", "is the true object, so that there is no way back")
    back = EditRequest(away.prompt, away.given_subject, away.target_true, away.target, id=f"{name}.1")
    record.get("type")
    asked = _Asker(templates)
    probes = [Probe("rewrite", back.text, back.target, back.target_true)]
    probes += asked("restored_object", edit, back.given_subject, back.target, "round")
    probes += asked("left_object", edit, away.given_subject, away.target, "round")
    others = dict.fromkeys(entry.text("label") for entry in record.items("true_objects"))
    if back.target not in others:
        raise BadFieldError("true_objects", f"expected the object of the edit, {back.target!r}, among them")
    for answer in others:
        if answer != back.target:
            probes += asked("true_object", edit, back.given_subject, answer, "round")
    return Case(name, away, tuple(probes), (back,), in_turn=True)


class _Asker:
    """Asks a fact behind its relation's own prompt and the templates of the relation."""

    def __init__(self, templates: Templates) -> None:
        self.templates = templates

    def __call__(
        self, kind: str, fact: RecordReader, subject: str, answer: str, test: str, other: str | None = None
    ) -> Iterator[Probe]:
        prompts = (fact.text("relation.prompt"), *self.templates.get(str(fact.get("relation.id")), ()))
        for prompt in dict.fromkeys(prompts):
            yield Probe(kind, prompt.replace(SLOT, subject), answer, other, test=test)


def _request(edit: RecordReader, name: str) -> EditRequest:
    """Return one edit. Some teach what is true already; they replace nothing."""
    new, old = edit.text("new_object.label"), edit.text("object.label")
    true = None if new.strip() == old.strip() else old
    return EditRequest(edit.text("relation.prompt"), edit.text("subject.label").strip(), new, true, id=name)


def _templates(path: str | Path) -> dict[str, list[str]]:
    found: Any = read_json(path)
    is_good = isinstance(found, dict) and all(
        isinstance(texts, list) and all(isinstance(text, str) and SLOT in text for text in texts)
        for texts in found.values()
    )
    if not is_good:
        raise DatasetError(f"expected an object of lists of prompts with {SLOT} by relation", path=path)
    return found
