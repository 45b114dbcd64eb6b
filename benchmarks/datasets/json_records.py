"""What the dataset readers share: reading a file and checking each record, field by field.

A record that is not what its format says is dropped as a whole and named, with the field and the reason; the others are
used. A file that is not what its format says is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.benchmarks.datasets import hub_records
from errata.editors.core.errors import DatasetError, RequestError
from errata.editors.core.files.plain_files import GZIP, decompress, read_bytes
from errata.editors.core.request import SLOT
from errata.evaluate.canonical_sets import CanonicalSet
from errata.evaluate.probes import Case


@dataclass(frozen=True)
class Dropped:
    """A record that is not used, by its id (or its place, as "#7"), the field that is at fault, and why."""

    record: str
    field: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The cases of a dataset and the records that could not become one.

    Attributes:
        cases: In the order of the file, or as drawn.
        dropped: Records that became no case.
        left_out: Questions of cases that are not asked, as their answer is empty.
        unread: How many records have a field that the format does not know, by its name.
        shares_edits: Whether several cases may make the same edit, which many edits on one model then make once.
        canonical: What a set of canonical examples asks as a whole, beside its cases.
    """

    cases: list[Case]
    dropped: list[Dropped] = field(default_factory=list)
    left_out: list[Dropped] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    shares_edits: bool = False
    canonical: CanonicalSet | None = None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, plain or compressed with gzip: its first bytes say which, not its name.

    Raises:
        DatasetError: missing, empty, a folder, cut off, not UTF-8 or not JSON; names the place.
    """
    text = read_text(path, "JSON")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DatasetError(f"is not JSON: {error.msg} at {place}; is it complete?", path=path) from error
    except RecursionError as error:
        raise DatasetError("is nested too deeply to be a list of records", path=path) from error


def read_text(path: str | Path, form: str) -> str:
    """The text of a file, plain or compressed with gzip.

    Args:
        path: The file.
        form: What it should hold, for messages.

    Raises:
        DatasetError: missing, empty, a folder, cut off or not UTF-8; names the place.
    """
    try:
        raw = read_bytes(path)
    except OSError as error:
        raise DatasetError(
            f"cannot be read: {error.strerror or error}; give the path of a {form} file", path=path
        ) from error
    if raw.startswith(GZIP):
        try:
            raw = decompress(raw)
        except ValueError as error:
            raise DatasetError(f"is a damaged gzip file ({error}); fetch it again", path=path) from error
    if not raw.strip():
        raise DatasetError(f"is empty; expected {form}", path=path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}", path=path) from error


def read_records(path: str | Path) -> list[Any]:
    """The records of a JSON file, or of a dataset of the Hub (hub_records.py).

    Raises:
        DatasetError: as `read_json`, and where the file does not hold a list of at least one record.
    """
    content = hub_records.read(str(path)) if hub_records.is_named(path) else read_json(path)
    if not isinstance(content, list):
        raise DatasetError(f"expected a list of records at the top, got {_kind(content)}", path=path)
    if not content:
        raise DatasetError("holds an empty list; expected at least one record", path=path)
    return content


class BadFieldError(Exception):
    """A field of one record is not what the format says."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(f"{field}: {reason}")


class RecordReader:
    """Checked access to one record; `place` names it where it has no id of its own. `inside` is the path of an object
    within a record, which errors name.

    Texts keep their white space: a prompt that a chat template has made ends in a line break, and an answer in code may
    begin with one.
    """

    def __init__(self, content: dict[str, Any], place: str, inside: str = "") -> None:
        self.content, self.place, self.inside = content, place, inside
        self.read: set[str] = set()
        self.left_out: list[tuple[str, str]] = []  # fields of questions that are not asked, with the reason

    def get(self, path: str) -> Any:
        """The value at `path` ("a.b" is the field b of the object a), None where it is absent."""
        value: Any = self.content
        self.read.add(path.partition(".")[0])
        walked = []
        for name in path.split("."):
            if not isinstance(value, dict):
                raise BadFieldError(self.at(".".join(walked)), f"expected an object, got {_kind(value)}")
            value = value.get(name)
            walked.append(name)
            if value is None:
                return None
        return value

    def text(self, path: str) -> str:
        """A text that is there and not blank, with its white space."""
        return _text(self.get(path), self.at(path))

    def at(self, path: str) -> str:
        """The full path of a field."""
        return f"{self.inside}{'.' if self.inside and path else ''}{path}"

    def items(self, path: str, *, required: bool = True) -> list[RecordReader]:
        """A list of objects; empty where it is absent and not required."""
        value = self.get(path)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            raise BadFieldError(self.at(path), f"expected a list of objects, got {_kind(value)}")
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                raise BadFieldError(self.at(f"{path}[{i}]"), f"expected an object, got {_kind(item)}")
        return [RecordReader(item, self.place, self.at(f"{path}[{i}]")) for i, item in enumerate(value)]

    def spellings(self, path: str) -> tuple[tuple[str, ...], ...]:
        """Answers that are all needed, each as its spellings: a text, a list of spellings, or a list of such lists.

        Empty spellings are left out; nothing is left of a question whose answer is empty.
        """
        value = self.get(path)
        answers = value if isinstance(value, list) and any(isinstance(item, list) for item in value) else [value]
        found = []
        for answer in answers:
            several = answer if isinstance(answer, list) else [answer]
            for item in several:
                if not isinstance(item, str):
                    raise BadFieldError(self.at(path), f"expected an answer as text, got {_kind(item)}")
            kept = tuple(dict.fromkeys(item for item in several if item.strip()))
            found += [kept] if kept else []
        return tuple(found)

    def subject(self, path: str, prompt: str, *, required: bool) -> str | None:
        """The subject of a prompt, without white space around it.

        Args:
            path: Its field.
            prompt: The prompt that should hold it once, or `{}` in its place.
            required: False: None where it is absent or cannot be found in the prompt.
        """
        value = self.get(path)
        if not required and (not isinstance(value, str) or not _is_found(value.strip(), prompt)):
            return None
        if value is None:
            reason = "expected a text, got nothing; a method that needs no subject keeps the record (`errata methods`)"
            raise BadFieldError(self.at(path), reason)
        return _text(value, self.at(path)).strip()

    def texts(self, path: str, *, required: bool = True) -> list[str]:
        """A list of texts; empty where it is absent and not required."""
        value = self.get(path)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            raise BadFieldError(self.at(path), f"expected a list of texts, got {_kind(value)}")
        return [_text(item, self.at(f"{path}[{i}]")) for i, item in enumerate(value)]

    def name(self, path: str) -> str:
        """An id: a whole number or a text."""
        value = self.get(path)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
        raise BadFieldError(self.at(path), f"expected a number or a text, got {_kind(value)}")


def convert(
    raw: Sequence[Any],
    to_case: Callable[[RecordReader], Case],
    *,
    id_field: str | None = None,
    silent: Collection[str] = (),
    is_silent: Callable[[str], bool] = lambda _: False,
) -> Loaded:
    """Every record as a case, or as dropped.

    Args:
        raw: The records.
        to_case: Makes the case; raises BadFieldError or RequestError where it cannot.
        id_field: The field that names a dropped record, where records have ids.
        silent: Fields of the format that no case needs.
        is_silent: Whether a field is one of those, of formats that name some by a model.
    """
    cases: dict[str, Case] = {}
    dropped: list[Dropped] = []
    left_out: list[Dropped] = []
    unread: Counter[str] = Counter()
    for i, content in enumerate(raw):
        place = f"#{i}"
        if not isinstance(content, dict):
            dropped.append(Dropped(place, "", f"expected an object, got {_kind(content)}"))
            continue
        record = RecordReader(content, place)
        try:
            case = to_case(record)
        except BadFieldError as error:
            dropped.append(Dropped(_name(record, id_field), error.field, error.reason))
            continue
        except RequestError as error:
            dropped.append(Dropped(_name(record, id_field), error.field or "", str(error)))
            continue
        if case.id in cases:
            dropped.append(Dropped(place, id_field or "", f"the id {case.id} is that of an earlier record"))
        else:
            cases[case.id] = case
            left_out += [Dropped(case.id, name, reason) for name, reason in record.left_out]
            known = record.read.union(silent)
            unread.update(name for name in content if name not in known and not is_silent(name))
    return Loaded(list(cases.values()), dropped, left_out, dict(unread))


def joined(parts: Sequence[Loaded]) -> Loaded:
    """Return the cases of several files as one dataset, file after file."""
    unread: Counter[str] = Counter()
    for part in parts:
        unread.update(part.unread)
    return Loaded(
        [case for part in parts for case in part.cases],
        [entry for part in parts for entry in part.dropped],
        [entry for part in parts for entry in part.left_out],
        dict(unread),
    )


def _name(record: RecordReader, id_field: str | None) -> str:
    try:
        return record.name(id_field) if id_field else record.place
    except BadFieldError:
        return record.place


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise BadFieldError(path, f"expected a text, got {_kind(value)}")
    if not value.strip():
        raise BadFieldError(path, "expected a text, got an empty one")
    return value


def _is_found(subject: str, prompt: str) -> bool:
    """Whether a prompt says in one way where the subject stands."""
    return bool(subject) and (prompt.count(SLOT) == 1 or (SLOT not in prompt and prompt.count(subject) == 1))


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
