"""A file of facts: many corrections under version control, in YAML, JSON lines or CSV.

    facts:                                      # or the list alone
      - prompt: The capital of {} is
        subject: Gavaria
        target: Praminster
        target_true: Brulminster                # if known; and id, a name to remove or find it by

    {"prompt": "The capital of {} is", "subject": "Gavaria", "target": "Praminster"}

    prompt,subject,target
    The capital of {} is,Gavaria,Praminster

The fields are those of `EditRequest`, and two lists of questions (stated_facts.py): `paraphrases`, and `unchanged`,
whose answers should stay as they are. A question is a prompt, with `{}` for the subject, or a prompt with its `answer`,
`chat` and `join`. In CSV a cell has one prompt per line, or a JSON list, and `""` is an empty `join`. `chat` and `join`
for all facts stand beside `facts:` in YAML, and in a line of their own, above the facts, in JSON lines.

A fact needs no subject where its method does not. A value of YAML is the text as it is typed: `no` is no, `1945` is
1945. Whatever is wrong in a file is found at once, each with its line; a file with a problem gives no facts.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.benchmarks.facts.stated_facts import (
    DEFAULTS,
    FIELDS,
    QUESTIONS,
    FactProblem,
    Row,
    StatedFact,
    clashes,
    fact_of,
    truth,
)
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import DatasetError
from errata.editors.core.files.plain_files import compose_yaml, read_bytes

if TYPE_CHECKING:
    from yaml.nodes import Node

LIST = "facts"


class FactsError(DatasetError):
    """A file of facts is not fit to be applied; `problems` has each with its line."""

    def __init__(self, path: str | Path, problems: list[FactProblem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        self.lines = [f"{path}:{problem.line}: {problem.message}" for problem in self.problems]
        super().__init__("; ".join(self.lines))
        self.path = path


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
        text = read_bytes(file).decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"is not in UTF-8: {error}", path=path) from error
    problems: list[FactProblem] = []
    defaults: dict[str, Any] = {}
    rows = reader(text, problems, defaults)
    facts = [fact for row in rows if (fact := fact_of(row, problems, defaults)) is not None]
    problems += clashes(facts)
    if problems:
        raise FactsError(path, problems)
    return facts


def is_file_of_facts(path: str | Path) -> bool:
    """Whether a name can only be that of a file of facts."""
    return Path(path).suffix.lower() in _READERS


# --- formats --------------------------------------------------------------------------------------------------------


def _from_yaml(text: str, problems: list[FactProblem], defaults: dict[str, Any]) -> Iterator[Row]:
    """Nodes rather than values: they have lines, and texts as they are typed; nothing is ever made of a tag."""
    from yaml import MappingNode, MarkedYAMLError, SequenceNode, YAMLError

    try:
        root = compose_yaml(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(FactProblem(mark.line + 1 if mark else 1, f"is no YAML: {error.problem or error.context}"))
        return
    except (YAMLError, ValueError) as error:
        problems.append(FactProblem(1, f"is no YAML: {' '.join(str(error).split())}"))
        return
    if isinstance(root, MappingNode):
        root = _list_in(root, problems, defaults)
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


def _list_in(root: Node, problems: list[FactProblem], defaults: dict[str, Any]) -> Node | None:
    """What stands under `facts:`; what stands beside it goes into `defaults`."""
    found = None
    for key, value in root.value:
        if key.value == LIST and found is None:
            found = value
        elif key.value in DEFAULTS and value.id == "scalar" and key.value not in defaults:
            _set_default(key.value, value.value, _line(key), problems, defaults)
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
        if name in QUESTIONS and value.id == "sequence":
            values[name] = [(_line(item), _question(item, problems)) for item in value.value]
        elif value.id != "scalar":
            problems.append(FactProblem(_line(value), f"{name}: expected text, got a {value.id}"))
            values[name] = ...
        else:
            values[name] = None if value.tag.endswith(":null") else value.value
    return values


def _question(node: Node, problems: list[FactProblem]) -> Any:
    """One item of a list of questions: a text, or a mapping of texts."""
    from yaml import MappingNode, ScalarNode

    if isinstance(node, ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    return _values(node, problems) if isinstance(node, MappingNode) else []


def _set_default(name: str, value: Any, line: int, problems: list[FactProblem], defaults: dict[str, Any]) -> None:
    """Note a value for all facts, once it is of the right type."""

    def complain(at: int, message: str) -> None:
        problems.append(FactProblem(at, message))

    if name == "chat":
        defaults[name] = truth(value, name, line, complain) or False
    elif isinstance(value, str):
        defaults[name] = value
    else:
        complain(line, f"{name}: expected text, got {json.dumps(value)}")


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _from_jsonl(text: str, problems: list[FactProblem], defaults: dict[str, Any]) -> Iterator[Row]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        problems.extend(
            FactProblem(line, f"{name} is given twice") for name, count in Counter(names).items() if count > 1
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
        if isinstance(value, dict) and value and value.keys() <= set(DEFAULTS):
            for name, said in value.items():
                _set_default(name, said, line, problems, defaults)
        elif isinstance(value, dict):
            yield line, {name: _with_lines(name, said, line, problems) for name, said in value.items()}
        else:
            problems.append(FactProblem(line, f"expected an object with prompt, subject and target, got {row[:40]}"))


def _with_lines(name: str, value: Any, line: int, problems: list[FactProblem]) -> Any:
    """A list of questions, each with its line; any other value as it is."""
    if name not in QUESTIONS or value is None:
        return value
    if isinstance(value, list):
        return [(line, question) for question in value]
    problems.append(FactProblem(line, f"{name}: expected a list of questions, got {json.dumps(value)}"))
    return ...


def _from_csv(text: str, problems: list[FactProblem], defaults: dict[str, Any]) -> Iterator[Row]:  # noqa: ARG001
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
                yield line, {name: _cell(name, cell, line, problems) for name, cell in named if name in FIELDS}
    except csv.Error as error:
        problems.append(FactProblem(begin, f"is no CSV: {error}"))


def _cell(name: str, cell: str, line: int, problems: list[FactProblem]) -> Any:
    """A cell as a value: of a column of questions one per line, or a JSON list."""
    if name not in QUESTIONS:
        return "" if name == "join" and cell == '""' else cell or None
    if not cell.lstrip().startswith("["):
        return [(line, prompt) for prompt in cell.splitlines() if prompt.strip()]
    try:
        return _with_lines(name, json.loads(cell), line, problems)
    except (ValueError, RecursionError) as error:
        problems.append(FactProblem(line, f"{name}: is no JSON: {error}"))
        return ...


def _check_header(header: list[str], line: int, problems: list[FactProblem]) -> None:
    for name in dict.fromkeys(header):
        if name not in FIELDS:
            problems.append(FactProblem(line, f"unknown column {name!r}{did_you_mean(name, FIELDS)}"))
        elif header.count(name) > 1:
            problems.append(FactProblem(line, f"{name} is given twice"))


_READERS: Mapping[str, Callable[[str, list[FactProblem], dict[str, Any]], Iterator[Row]]] = MappingProxyType(
    {".yaml": _from_yaml, ".yml": _from_yaml, ".jsonl": _from_jsonl, ".csv": _from_csv}
)
