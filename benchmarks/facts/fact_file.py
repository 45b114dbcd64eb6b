"""A file of facts: many corrections under version control, in YAML, JSON lines or CSV.

    facts:                                      # or the list alone
      - prompt: The capital of {} is
        subject: Gavaria
        target: Praminster
        target_true: Brulminster                # if known; and id, a name to remove or find it by

    {"prompt": "The capital of {} is", "subject": "Gavaria", "target": "Praminster"}

    prompt,subject,target
    The capital of {} is,Gavaria,Praminster

The fields are those of `EditRequest`. A value of YAML is the text as it is typed: `no` is no, `1945` is 1945. Whatever
is wrong in a file is found at once, each with its line; a file with a problem gives no facts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import DatasetError, RequestError
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.merging import fact_key

if TYPE_CHECKING:
    from yaml.nodes import Node

FIELDS = tuple(field.name for field in fields(EditRequest))
REQUIRED = ("prompt", "subject", "target")
LIST = "facts"


@dataclass(frozen=True)
class FactProblem:
    """What is wrong in a line of a file, counted from 1."""

    line: int
    message: str


@dataclass(frozen=True)
class StatedFact:
    """A correction, and the line on which it begins."""

    request: EditRequest
    line: int


class FactsError(DatasetError):
    """A file of facts is not fit to be applied; `problems` has each with its line."""

    def __init__(self, path: str | Path, problems: list[FactProblem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        self.lines = [f"{path}:{problem.line}: {problem.message}" for problem in self.problems]
        super().__init__("; ".join(self.lines))
        self.path = path


Row = tuple[int, dict[str, Any]]  # line, and the values as the file has them


def read(path: str | Path) -> list[StatedFact]:
    """The facts of a file, in its order.

    Raises:
        FactsError: all that is wrong: fields that are unknown, missing or no text, subjects that are not in their
            prompt, facts that are repeated or contradict each other, ids that are given twice.
        DatasetError: it cannot be read, or its name ends in none of `.yaml`, `.yml`, `.jsonl`, `.csv`.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DatasetError(f"expected a name that ends in {', '.join(_READERS)}", path=path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"is not in UTF-8: {error}", path=path) from error
    problems: list[FactProblem] = []
    facts = [fact for row in reader(text, problems) if (fact := _fact(row, problems)) is not None]
    problems += _clashes(facts)
    if problems:
        raise FactsError(path, problems)
    return facts


def is_file_of_facts(path: str | Path) -> bool:
    """Whether a name can only be that of a file of facts."""
    return Path(path).suffix.lower() in _READERS


# --- formats --------------------------------------------------------------------------------------------------------


def _from_yaml(text: str, problems: list[FactProblem]) -> Iterator[Row]:
    """Nodes rather than values: they have lines, and texts as they are typed; nothing is ever made of a tag."""
    from yaml import MappingNode, MarkedYAMLError, SafeLoader, SequenceNode, YAMLError, compose

    try:
        root = compose(text, Loader=SafeLoader)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(FactProblem(mark.line + 1 if mark else 1, f"is no YAML: {error.problem or error.context}"))
        return
    except (YAMLError, RecursionError) as error:
        problems.append(FactProblem(1, f"is no YAML: {' '.join(str(error).split())}"))
        return
    if isinstance(root, MappingNode):
        root = _list_in(root, problems)
    if root is None:
        return
    if not isinstance(root, SequenceNode):
        problems.append(FactProblem(_line(root), f"expected a list of facts, or {LIST}: and a list"))
        return
    for node in root.value:
        if not isinstance(node, MappingNode):
            problems.append(FactProblem(_line(node), "expected a fact with prompt, subject and target"))
            continue
        yield _line(node), _values(node, problems)


def _list_in(root: Node, problems: list[FactProblem]) -> Node | None:
    """What stands under `facts:`."""
    found = None
    for key, value in root.value:
        if key.value == LIST and found is None:
            found = value
        else:
            problems.append(FactProblem(_line(key), f"expected {LIST}: and nothing beside it, got {key.value!r}"))
    if found is not None and found.tag.endswith(":null"):
        return None
    return found


def _values(node: Node, problems: list[FactProblem]) -> dict[str, Any]:
    """Of a mapping, with its scalars as they are typed."""
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value)
        if name in values:
            problems.append(FactProblem(_line(key), f"{name} is given twice"))
        if value.id != "scalar":
            problems.append(FactProblem(_line(value), f"{name}: expected text, got a {value.id}"))
            values[name] = ...
        else:
            values[name] = None if value.tag.endswith(":null") else value.value
    return values


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _from_jsonl(text: str, problems: list[FactProblem]) -> Iterator[Row]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        problems.extend(
            FactProblem(line, f"{name} is given twice") for name in {n for n in names if names.count(n) > 1}
        )
        return dict(pairs)

    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            value = json.loads(row, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            problems.append(FactProblem(line, f"is no JSON: {error}"))
            continue
        if isinstance(value, dict):
            yield line, value
        else:
            problems.append(FactProblem(line, f"expected an object with prompt, subject and target, got {row[:40]}"))


def _from_csv(text: str, problems: list[FactProblem]) -> Iterator[Row]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for row in rows:
            line, begin = begin, rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
                _check_header(header, line, problems)
            elif len(row) != len(header):
                problems.append(FactProblem(line, f"expected {len(header)} cells as in the first line, got {len(row)}"))
            else:
                named = zip(header, row, strict=True)
                yield line, {name: cell or None for name, cell in named if name in FIELDS}
    except csv.Error as error:
        problems.append(FactProblem(begin, f"is no CSV: {error}"))


def _check_header(header: list[str], line: int, problems: list[FactProblem]) -> None:
    for name in dict.fromkeys(header):
        if name not in FIELDS:
            problems.append(FactProblem(line, f"unknown column {name!r}{did_you_mean(name, FIELDS)}"))
        elif header.count(name) > 1:
            problems.append(FactProblem(line, f"{name} is given twice"))


_READERS: Mapping[str, Callable[[str, list[FactProblem]], Iterator[Row]]] = MappingProxyType(
    {".yaml": _from_yaml, ".yml": _from_yaml, ".jsonl": _from_jsonl, ".csv": _from_csv}
)


# --- facts ----------------------------------------------------------------------------------------------------------


def _fact(row: Row, problems: list[FactProblem]) -> StatedFact | None:
    """The fact of a row; None, and what is wrong with it, where it is none."""
    line, values = row
    found = [FactProblem(line, f"unknown field {n!r}{did_you_mean(str(n), FIELDS)}") for n in values if n not in FIELDS]
    found += [FactProblem(line, f"{name} is missing") for name in REQUIRED if values.get(name) is None]
    for name in FIELDS:
        value = values.get(name)
        if value is not None and value is not ... and not isinstance(value, str):
            found.append(FactProblem(line, f"{name}: expected text, got {json.dumps(value)}"))
    problems += found
    if found or ... in values.values():
        return None
    try:
        return StatedFact(EditRequest(**values), line)
    except RequestError as error:
        problems.append(FactProblem(line, f"{error.field}: {error.message}" if error.field else error.message))
        return None


def _clashes(facts: list[StatedFact]) -> Iterator[FactProblem]:
    """Facts that another one above repeats or contradicts."""
    by_key: dict[str, StatedFact] = {}
    by_id: dict[str | None, StatedFact] = {}
    for fact in facts:
        request = fact.request
        earlier = by_key.setdefault(fact_key(request), fact)
        if earlier is not fact and earlier.request.target.strip() == request.target.strip():
            yield FactProblem(
                fact.line, f"repeats line {earlier.line}: {request.text!r} -> {request.target!r}; drop one"
            )
        elif earlier is not fact:
            both = f"{earlier.request.target!r} and {request.target!r}"
            yield FactProblem(
                fact.line, f"contradicts line {earlier.line}: {request.text!r} cannot be both {both}; keep one"
            )
        named = by_id.setdefault(request.id, fact)
        if named is not fact and earlier is fact:
            yield FactProblem(fact.line, f"has the id {request.id!r} of line {named.line}; give each its own")
