"""Read plain texts to measure a model on: from memory, a file, a `datasets` dataset or the hub.

| source | read as |
|---|---|
| an iterable of strings, or of records with a field `text` or `Text` (such as a `datasets` dataset) | in its order |
| a path ending in `.txt` | one text per line |
| `.json`, `.json.gz` | a list of strings or of such records |
| `.jsonl`, `.jsonl.gz` | one string or record per line |
| `"factbook"` | the text that comes with errata: prose of the World Factbook, which is in the public domain |
| `"world"` | sentences about the testbed's made-up world |
| `"name:config:split"` | that dataset of the hub, streamed; `config` may be empty |

Blank texts are dropped everywhere: they hold nothing to measure, and corpora such as WikiText are full of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from errata.editors.core.errors import DatasetError
from errata.editors.core.files.plain_files import bounded

TextSource = str | Path | Iterable[Any]

BUNDLED = "world"
FACTBOOK = "factbook"
FIELDS = ("text", "Text")
_ASKED = ("prompt", "answer")
_SUFFIXES = (".txt", ".json", ".json.gz", ".jsonl", ".jsonl.gz")


class _Record(NamedTuple):
    name: str  # for messages: "line 3", "#3"
    value: Any
    path: Path | None


def read_texts(source: TextSource, *, max_texts: int | None = None) -> list[str]:
    """Return the texts of a source that are not blank, in its order, `max_texts` at most.

    Raises:
        DatasetError: the source is missing, holds only blank texts, or a record is not a text. It names path, record
            and field.
    """
    return [asked.text for asked in read_asked(source, max_texts=max_texts)]


class AskedText(NamedTuple):
    """A text, with a question about what it says where its record has the fields `prompt` and `answer`."""

    text: str
    prompt: str | None = None
    answer: str | None = None


def read_asked(source: TextSource, *, max_texts: int | None = None) -> list[AskedText]:
    """Return texts with the questions that their records ask; order, number and errors as `read_texts`."""
    if max_texts is not None and max_texts < 1:
        raise DatasetError(f"expected max_texts of at least 1 or None, got {max_texts}")
    every = (_asked_text(record) for record in _records(source))
    texts = list(islice((asked for asked in every if asked.text.strip()), max_texts))
    if not texts:
        path = source if isinstance(source, str | Path) else None
        raise DatasetError("expected at least one text that is not blank, found none", path=path)
    return texts


def text_file(source: TextSource) -> Path | None:
    """Return the file that a source names; None where it is none."""
    if not isinstance(source, str | Path):
        return None
    if source == FACTBOOK:
        return Path(str(files("errata") / "editors" / "core" / "model" / "factbook.jsonl.gz"))
    if source == BUNDLED:
        return Path(str(files("errata") / "benchmarks" / "testbed" / "model" / "text.jsonl.gz"))
    is_file = isinstance(source, Path) or _is_file_name(source) or _exists(source)
    return Path(source) if is_file else None


def texts_digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of the texts in UTF-8, each after its length, so that another split gives another digest."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def _records(source: TextSource) -> Iterator[_Record]:
    if (file := text_file(source)) is not None:
        yield from _file_records(file)
    elif isinstance(source, str):
        yield from _hub_records(source)
    elif isinstance(source, Mapping):
        splits = ", ".join(map(repr, list(source)[:5]))
        raise DatasetError(f"expected texts, got a {type(source).__name__} of {splits}; pass one of its values")
    elif isinstance(source, Iterable):
        for index, value in enumerate(source):
            yield _Record(f"#{index}", value, None)
    else:
        raise DatasetError(f"expected texts, a path or a dataset, got {type(source).__name__}")


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # longer than a file name can be
        return False


def _is_file_name(source: str) -> bool:
    return "\n" not in source and source.endswith(_SUFFIXES)


def _asked_text(record: _Record) -> AskedText:
    text, found = _text_of(record), record.value
    prompt, answer = (found.get(name) for name in _ASKED) if isinstance(found, Mapping) else (None, None)
    # Other formats may call something else by these names.
    return AskedText(text, prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else AskedText(text)


def _text_of(record: _Record) -> str:
    value, field = record.value, None
    if isinstance(value, Mapping):
        field = next((name for name in FIELDS if name in value), None)
        if field is None:
            names = ", ".join(map(repr, list(value)[:8])) or "nothing"
            raise _error(record, f"expected a field 'text' or 'Text', found {names}", FIELDS[0])
        value = value[field]
    if not isinstance(value, str):
        raise _error(record, f"expected text, got {type(value).__name__}", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _error(record, "holds an unpaired surrogate, which no tokenizer can read", field) from error
    return value


def _error(record: _Record, message: str, field: str | None = None) -> DatasetError:
    return DatasetError(message, path=record.path, record=record.name, field=field)


def _file_records(path: Path) -> Iterator[_Record]:
    if not path.is_file():
        raise DatasetError(f"expected a file of texts ({', '.join(_SUFFIXES)}), found none there", path=path)
    if not path.name.endswith(_SUFFIXES):
        raise DatasetError(f"expected a name that ends in one of {', '.join(_SUFFIXES)}", path=path)
    is_packed = path.name.endswith(".gz")
    try:
        with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
            if path.name.endswith((".json", ".json.gz")):
                data = b"".join(_bounded(file.read, path)) if is_packed else file.read()
                yield from _json_records(_parsed(data, path), path)
            else:
                lines = _bounded(file.readline, path) if is_packed else file
                yield from _line_records(lines, path, parse=not path.name.endswith(".txt"))
    except (EOFError, OSError, zlib.error) as error:  # a damaged gzip file raises any of these
        raise DatasetError(f"cannot be read: {error}", path=path) from error


def _bounded(read: Callable[[int], bytes], path: Path) -> Iterator[bytes]:
    """Yield the pieces of a compressed file, unless they are far longer than it."""
    try:
        yield from bounded(read, path.stat().st_size)
    except ValueError as error:
        raise DatasetError(f"cannot be read: {error}", path=path) from error


def _parsed(data: bytes, path: Path, record: str | None = None, *, parse: bool = True) -> Any:
    """Return bytes of a file as text, or parsed as JSON with `parse`."""
    try:
        text = data.decode("utf-8")
        return json.loads(text) if parse else text
    except UnicodeDecodeError as error:
        raise DatasetError(f"cannot be read: it is not UTF-8 ({error})", path=path, record=record) from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"is no JSON: {error}", path=path, record=record) from error
    except RecursionError as error:
        raise DatasetError("is nested too deeply to be a text", path=path, record=record) from error


def _json_records(content: Any, path: Path) -> Iterator[_Record]:
    if not isinstance(content, list):
        raise DatasetError(f"expected a JSON list of texts, got {type(content).__name__}", path=path)
    for index, value in enumerate(content):
        yield _Record(f"#{index}", value, path)


def _line_records(lines: Iterable[bytes], path: Path, *, parse: bool) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"line {number}"
            yield _Record(name, _parsed(line.rstrip(b"\r\n"), path, name, parse=parse), path)


def _hub_records(source: str) -> Iterator[_Record]:
    parts = source.split(":")
    if len(parts) != 3 or not parts[0] or not parts[2] or "\n" in source:
        shown = source if len(source) <= 80 else source[:77] + "..."
        raise DatasetError(
            f"expected an existing file or a dataset as 'name:config:split', got {shown!r}; to measure on that "
            "string itself, pass it in a list"
        )
    # Streaming reads a corpus of many gigabytes only as far as it is needed.
    from datasets import load_dataset

    name, config, split = parts
    try:
        dataset = load_dataset(name, config or None, split=split, streaming=True)
        for index, value in enumerate(dataset):
            yield _Record(f"#{index}", value, None)
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(f"the dataset {source!r} cannot be loaded: {type(error).__name__}: {error}") from error
