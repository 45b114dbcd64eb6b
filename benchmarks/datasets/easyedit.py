"""EasyEdit's flat records: prompts with the subject written out, and what it calls locality and portability.

    loaded = load("counterfact-edit.json", limit=100, seed=0)
    write(cases, "mine.json")                                   # any cases, for EasyEdit to read

An answer may be a text, a list of spellings (the first is taken, as there) or lists of those.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks.datasets.json_records import BadFieldError, Dropped, Loaded, RecordReader, convert, read_records
from errata.benchmarks.datasets.selection import Ids, Selection, select
from errata.editors.core.errors import ConfigError, DatasetError, RequestError
from errata.editors.core.files.atomic import make_folder, write_atomically
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

# EasyEdit's own filler where a record has no true answer.
_NO_ANSWER = "<|endoftext|>"
# Kinds of probes that it has groups for, and what these are called.
_PLACES = MappingProxyType({"neighborhood": "locality", "portability": "portability"})


def load(
    path: str | Path,
    *,
    limit: int | None = None,
    ids: Ids | None = None,
    seed: int | None = None,
    needs_subject: bool = True,
) -> Loaded:
    """Read a file in EasyEdit's form (JSON, plain or gzip).

    Args:
        path: A list of records: `prompt`, `subject` (literally in the prompt), `target_new`, and where there are any
            `ground_truth`, `rephrase_prompt` or `rephrase`, `locality_prompt` with `locality_ground_truth`, `case_id`
            (else the place in the file), and the nested `locality` and `portability`: {name: [{prompt, ground_truth},
            ...]} or {name: {prompt: [...], ground_truth: [...]}}. KnowEdit's WikiBio has `text`, `concept` and
            `labels` in place of `prompt`, `subject` and `target_new`. QAEdit has `target`, and `locality` as a list of
            {loc, loc_ans}. A question whose answer is empty is left out; its fact is kept.
        limit, ids, seed, needs_subject: as for `counterfact.load`.

    Raises:
        DatasetError: the file is missing, damaged, no list of records, or holds no usable one.
        ConfigError: a bad limit.
    """
    selection = Selection(limit, ids, seed)
    loaded = convert(
        read_records(path), lambda record: to_case(record, needs_subject=needs_subject), id_field="case_id"
    )
    return select(loaded, selection, path=path)


def to_case(record: RecordReader, *, needs_subject: bool = True) -> Case:
    """One record as a case. A neighborhood probe competes with the new answer where its own is the replaced one.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or a prompt lacks its answer.
        RequestError: the fields do not make a request, as where the prompt does not hold the subject.
    """
    prompt_field, subject_field, target_field = _names(record)
    prompt, new = record.text(prompt_field), record.text(target_field)
    subject = record.subject(subject_field, prompt, required=needs_subject)
    true = None if _is_empty(record.get("ground_truth")) else _answer(record.get("ground_truth"), "ground_truth")
    name = record.place.lstrip("#") if record.get("case_id") is None else record.name("case_id")
    request = EditRequest(prompt, subject, new, true, id=name)
    probes = [Probe("rewrite", request.text, new, true)]
    rephrased = [text for field in ("rephrase_prompt", "rephrase") for text in _texts(record, field)]
    probes += [Probe("paraphrase", text, new, true) for text in dict.fromkeys(rephrased)]
    for prompt, answer in (*_flat(record, "locality"), *_nested(record, "locality")):
        probes.append(Probe("neighborhood", prompt, answer, new if true and answer.strip() == true.strip() else None))
    for prompt, answer in (*_flat(record, "portability"), *_nested(record, "portability")):
        probes.append(Probe("portability", prompt, answer))
    return Case(name, request, tuple(probes))


@dataclass(frozen=True)
class Written:
    """A file that was written: how many cases, probes that its form has no place for by kind, and cases that it cannot
    say, with the reason."""

    path: Path
    cases: int
    left_out: dict[str, int]
    dropped: tuple[Dropped, ...]


def write(cases: Sequence[Case], path: str | Path) -> Written:
    """Write cases in EasyEdit's form. Every record that is written reads back as the case, but for the probes left out.

    Args:
        cases: Of any dataset.
        path: A new file.

    Raises:
        ConfigError: a file of this name is there.
        DatasetError: no case can be written.
    """
    target = Path(path)
    if target.exists():
        raise ConfigError(f"{target} is there already and is not written over; remove it or name another file")
    records, left_out, dropped = [], Counter(), []
    for case in cases:
        if case.further:
            dropped.append(Dropped(case.id, "requests", f"has {len(case.requests)}, and a record of this form has one"))
            continue
        record = to_record(case)
        try:
            found = to_case(RecordReader(record, case.id))
        except (BadFieldError, RequestError) as error:
            dropped.append(Dropped(case.id, getattr(error, "field", None) or "prompt", str(error)))
            continue
        records.append(record)
        left_out += Counter(probe.kind for probe in case.probes) - Counter(probe.kind for probe in found.probes)
    if not records:
        raise DatasetError(f"none of {len(cases)} cases can be written in EasyEdit's form", path=target)
    make_folder(target.parent)
    write_atomically(target, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
    return Written(target, len(records), dict(left_out), tuple(dropped))


def to_record(case: Case) -> dict[str, Any]:
    """A case as one record: of each kind the first probe in the flat fields, which every reader of EasyEdit's knows,
    and the others in the nested ones. There is a place for one paraphrase, and none for attributes and open prompts."""
    request = case.request
    record: dict[str, Any] = {
        "case_id": int(case.id) if case.id.isdecimal() and str(int(case.id)) == case.id else case.id,
        "prompt": request.text,
        "subject": request.subject,
        "target_new": request.target,
        "ground_truth": request.target_true or _NO_ANSWER,
    }
    paraphrases = [probe.prompt for probe in case.probes if probe.kind == "paraphrase"]
    if paraphrases:
        record["rephrase_prompt"] = paraphrases[0]
    for kind, name in _PLACES.items():
        pairs = [(probe.prompt, probe.target) for probe in case.probes if probe.kind == kind and probe.target]
        if pairs:
            record[f"{name}_prompt"], record[f"{name}_ground_truth"] = pairs[0]
        if pairs[1:]:
            record[name] = {kind: [{"prompt": prompt, "ground_truth": [[answer]]} for prompt, answer in pairs[1:]]}
    return record


def portability(record: RecordReader) -> list[Probe]:
    """The questions that follow from the edit, of a record of zsRE: one question and its answer, or named groups."""
    found = record.get("portability")
    if isinstance(found, dict) and "New Question" in found:
        pairs = _pairs(record, found["New Question"], found.get("New Answer"), "portability.New Question")
    else:
        pairs = _nested(record, "portability")
    return [Probe("portability", prompt, answer) for prompt, answer in pairs]


def _flat(record: RecordReader, kind: str) -> list[tuple[str, str]]:
    """`locality_prompt` with `locality_ground_truth`: one of each, or lists of equal length."""
    prompts, answers = record.get(f"{kind}_prompt"), record.get(f"{kind}_ground_truth")
    return list(_pairs(record, prompts, answers, f"{kind}_prompt"))


def _nested(record: RecordReader, kind: str) -> Iterator[tuple[str, str]]:
    groups = record.get(kind)
    if groups is None:
        return
    if isinstance(groups, list) and all(isinstance(entry, dict) for entry in groups):
        groups = {"": groups}  # QAEdit's questions have no groups
    if not isinstance(groups, dict):
        raise BadFieldError(kind, f"expected an object of named groups, got {type(groups).__name__}")
    for name, group in groups.items():
        path = f"{kind}.{name}".rstrip(".")
        if isinstance(group, dict):
            yield from _pairs(record, group.get("prompt"), group.get("ground_truth"), path)
        elif isinstance(group, list):
            for i, entry in enumerate(group):
                one = RecordReader(entry if isinstance(entry, dict) else {}, record.place)
                prompt, answer = ("prompt", "ground_truth") if one.get("loc") is None else ("loc", "loc_ans")
                yield from _pairs(record, one.get(prompt), one.get(answer), f"{path}[{i}]", required=True)
        else:
            raise BadFieldError(path, f"expected a list or an object, got {type(group).__name__}")


def _pairs(
    record: RecordReader, prompts: Any, answers: Any, path: str, *, required: bool = False
) -> Iterator[tuple[str, str]]:
    if prompts is None and answers is None and not required:
        return
    several = isinstance(prompts, list)
    prompts = prompts if several else [prompts]
    answers = answers if several else [answers]
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise BadFieldError(path, f"expected an answer for each of {len(prompts)} prompts")
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(prompt, str) and prompt.strip() and _is_empty(answer):
            record.left_out.append((path, "the question has an empty answer"))
            continue
        text = _answer(answer, path)
        if not isinstance(prompt, str) or not prompt.strip() or text is None:
            raise BadFieldError(path, f"expected a prompt and its answer, got {prompt!r} and {answer!r}")
        yield prompt, text


def _names(record: RecordReader) -> tuple[str, str, str]:
    """The fields of prompt, subject and answer: WikiBio's where a record has no prompt, QAEdit's `target`."""
    is_biography = record.get("prompt") is None and record.get("text") is not None
    is_short = record.get("target_new") is None and record.get("target") is not None
    answer = "target" if is_short else "target_new"
    return ("text", "concept", "labels") if is_biography else ("prompt", "subject", answer)


def _texts(record: RecordReader, path: str) -> list[str]:
    value = record.get(path)
    return [] if value is None else record.texts(path) if isinstance(value, list) else [record.text(path)]


def _answer(value: Any, path: str) -> str | None:
    while isinstance(value, list) and value:
        value = next((item for item in value if not _is_empty(item)), value[0])
    if value is None or value == _NO_ANSWER:
        return None
    if not isinstance(value, str) or not value.strip():
        raise BadFieldError(path, f"expected an answer, got {value!r}")
    return value


def _is_empty(value: Any) -> bool:
    """Whether a field of answers is there and holds none: "", [], [[]] or [""]."""
    if isinstance(value, list):
        return all(_is_empty(item) for item in value)
    return isinstance(value, str) and not value.strip()
