"""Canonical examples: a behaviour shown by a few sentences, tested by others, with texts that must stay as they are.

    loaded = read("data", behaviour="country_capital")
    loaded.canonical.evaluation      # other sentences that need the same capitals

The authors keep each set in files of JSON lines: `NAME_train-val.jsonl` (or `NAME_fixed`), `NAME_eval…` and
`NAME_hard_neg…`. An edit is one example of the first file. The other two are asked as a whole by `protocol=dial` and
`protocol=league` (evaluate/canonical.py), which say where there is no file of them.

Reference: Hewitt et al. 2024, "Model Editing with Canonical Examples", section 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks.datasets.json_records import BadFieldError, Dropped, Loaded, RecordReader, convert, read_text
from errata.editors.core.config import choose
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.canonical_sets import CRITERIA, PAIRED, CanonicalExample, CanonicalSet
from errata.evaluate.probes import Case, Probe

BEHAVIOURS = tuple(CRITERIA)
# What the names of the authors' files say behind the name of the set.
_TRAIN = ("fixed", "train")
_EVALUATION = ("eval_clear", "clear_eval", "eval")
_HARD = ("hard_neg", "hard_neg_eval", "unconditional")
_ENDS = tuple(f".jsonl{end}" for end in ("", ".gz"))
# The field that names the subject of a set's facts. Of the others the whole prefix is the subject, as in the authors'
# runs of MEMIT.
_SUBJECTS: Mapping[str, str] = MappingProxyType(
    {"country_capital": "country", "company_ceo": "company", "stereoset": "target"}
)
_SILENT = (
    *("statement", "clear_documents", "clear_document", "ceo", "capital", "country", "company", "target"),
    *("entity_string", "entity_url", "document", "noref_document", "summary", "bias_answer", "antibias_answer"),
    *("antibias_full_eval", "bias_full_eval"),
)


def read(
    path: str | Path,
    *,
    needs_subject: bool = True,
    behaviour: str | None = None,
    split: str = "val",
    asked: int | None = None,
) -> Loaded:
    """Read a set of canonical examples.

    Args:
        path: A folder with the authors' files (JSON lines, plain or gzip), or the training file of a set in it.
        needs_subject: Drop examples whose subject does not stand once in their prefix.
        behaviour: Name of the set; None: what the name of the file begins with.
        split: "val" or "test", as in the names of the files.
        asked: Ask only the first of the evaluation examples and hard negatives, this many of each; None: all.

    Raises:
        ConfigError: There is no such set, or the folder holds no training file of it.
        DatasetError: A file is damaged. Of evaluation examples and hard negatives it names the record and the field.
    """
    choose(split, ("val", "test"), "dataset.options.split")
    if asked is not None and (isinstance(asked, bool) or asked < 1):
        raise ConfigError(f"dataset.options.asked: expected a number of examples above 0, got {asked!r}")
    folder, train, name = _named(Path(path), behaviour, split)
    loss = CRITERIA[name].loss
    loaded = convert(_lines(train), lambda record: _case(record, name, needs_subject=needs_subject), silent=_SILENT)
    further, missing = dict[str, tuple[CanonicalExample, ...] | None](), []
    for part, words in (("evaluation", _EVALUATION), ("hard_negatives", _HARD)):
        file = _find(folder, name, words, split)
        further[part] = None
        if file is None:
            wanted = f"{name}_{words[0]}-{split}.jsonl"
            missing.append(Dropped(name, part, f"no file such as {wanted} in {folder}, so that they are not asked"))
            continue
        is_pair = part == "evaluation" and loss in PAIRED
        further[part] = tuple(_example(line, place, file, is_pair) for place, line in enumerate(_lines(file)[:asked]))
    examples = tuple(example_of(case) for case in loaded.cases)
    canonical = CanonicalSet(name, examples, further["evaluation"], further["hard_negatives"])
    return replace(loaded, canonical=canonical, left_out=[*loaded.left_out, *missing])


def example_of(case: Case) -> CanonicalExample:
    """Return the example that a case edits."""
    request = case.request
    further = () if request.target_true is None else (request.target_true,)
    return CanonicalExample(request.text, (request.target, *further))


def _named(path: Path, behaviour: str | None, split: str) -> tuple[Path, Path, str]:
    """Return the folder, the training file and the name of the set."""
    if behaviour is not None:
        choose(behaviour, BEHAVIOURS, "dataset.options.behaviour")
    if path.is_dir():
        there = [name for name in BEHAVIOURS if _find(path, name, _TRAIN, split) is not None]
        if behaviour is None:
            names = ", ".join(there or BEHAVIOURS)
            raise ConfigError(f"dataset.options.behaviour is missing: {path} is a folder; give one of {names}")
        train = _find(path, behaviour, _TRAIN, split)
        if train is None:
            raise ConfigError(
                f"no training file of {behaviour} in {path}: expected {behaviour}_train-{split}.jsonl or its like; "
                f"there are files of {', '.join(there) or 'no set'}"
            )
        return path, train, behaviour
    found = behaviour or next((name for name in BEHAVIOURS if path.name.startswith(name)), None)
    if found is None:
        raise ConfigError(
            f"dataset.options.behaviour is missing: the file {path.name} does not begin with the name of a set; give "
            f"one of {', '.join(BEHAVIOURS)}"
        )
    return path.parent, path, found


def _find(folder: Path, name: str, words: tuple[str, ...], split: str) -> Path | None:
    """Return the file of a set whose name holds one of these words."""
    candidates = (folder / f"{name}_{word}-{split}{end}" for word in words for end in _ENDS)
    return next((path for path in candidates if path.is_file()), None)


def _lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines; of a JSON list its entries.

    Raises:
        DatasetError: A line is no JSON; it names the line.
    """
    text = read_text(path, "JSON lines")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DatasetError(f"line {number} is not JSON: {error}", path=path, record=f"#{number - 1}") from error
    return found


def _case(record: RecordReader, name: str, *, needs_subject: bool) -> Case:
    """Return an example as an edit of its first suffix, which a second competes with."""
    prefix, is_pair = record.text("prefix"), CRITERIA[name].loss in PAIRED
    target = record.text("suffix1" if is_pair else "suffix")
    other = record.text("suffix2") if is_pair else None
    place = record.place.lstrip("#")
    request = EditRequest(prefix, _subject(record, name, prefix, needs_subject), target, other, id=place, join="")
    return Case(place, request, (Probe("rewrite", request.text, target, other, join=""),))


def _subject(record: RecordReader, name: str, prefix: str, needs_subject: bool) -> str | None:
    field = _SUBJECTS.get(name)
    if field is None:
        return prefix.strip()
    return record.subject(field, prefix, required=needs_subject)


def _example(content: Any, place: int, path: Path, is_pair: bool) -> CanonicalExample:
    """Return an example that is asked.

    Raises:
        DatasetError: A field is not what the format says.
    """
    fields = ("suffix1", "suffix2") if is_pair else ("suffix",)
    try:
        if not isinstance(content, dict):
            raise BadFieldError("", f"expected an object, got {type(content).__name__}")
        record = RecordReader(content, f"#{place}")
        read_field: Callable[[str], str] = record.text
        return CanonicalExample(read_field("prefix"), tuple(map(read_field, fields)))
    except BadFieldError as error:
        raise DatasetError(error.reason, path=path, record=f"#{place}", field=error.field or None) from error
