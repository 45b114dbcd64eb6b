"""Requests that a method measures before its first edit: from a file of them, or cut from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from errata.editors.core.errors import DatasetError, RequestError
from errata.editors.core.files.plain_files import read_json_list
from errata.editors.core.model.texts import TextSource, read_texts
from errata.editors.core.request import SLOT, EditRequest

_FIELDS = ("prompt", "subject", "target", "target_true")
_LEAST, _MOST = 4, 24  # words of a prompt that is cut from text


def read_requests(path: str | Path) -> list[EditRequest]:
    """Return the requests of a file: a JSON list, or one JSON object per line, with `prompt`, `target` and `subject`.

    Other fields are ignored, and `subject` may be missing.

    Raises:
        DatasetError: The file is missing or empty, or a record is no request. It names the record.
    """
    file = Path(path)
    try:
        records = read_json_list(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"expected a JSON list of requests: {error}", path=file) from error
    return [_request(record, index, file) for index, record in enumerate(records)]


def _request(record: Any, index: int, path: Path) -> EditRequest:
    if not isinstance(record, dict) or "prompt" not in record or "target" not in record:
        raise DatasetError("expected an object with `prompt` and `target`", path=path, record=f"#{index}")
    fields = {name: record.get(name) for name in _FIELDS}
    try:
        return EditRequest(**fields, id=f"warm-up {index}")  # type: ignore[arg-type]
    except RequestError as error:
        raise DatasetError(error.message, path=path, record=f"#{index}", field=error.field) from error


def requests_from_text(source: TextSource, count: int) -> list[EditRequest]:
    """Return requests that text can give: the beginning of one sentence, answered by the last word of the next.

    The answer is as wrong as that of an edit, so that its gradient has about the size of an edit's.

    Raises:
        DatasetError: The text has too few sentences.
    """
    sentences = first_sentences(source, count + 1)
    pairs = _pairs(sentences)[:count]
    if len(pairs) < count:
        raise DatasetError(f"expected {count} sentences of at least {_LEAST + 1} words, found {len(pairs)}")
    return pairs


def first_sentences(source: TextSource, count: int) -> list[list[str]]:
    """Return the words of the first sentences of `count` texts or fewer, without those that are too short or hold `{}`.

    Raises:
        DatasetError: There is no text.
    """
    sentences: list[list[str]] = []
    for text in read_texts(source, max_texts=8 * count):
        words = re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0].rstrip(".!?").split()
        if len(words) > _LEAST and SLOT not in " ".join(words):
            sentences.append(words[:_MOST])
        if len(sentences) == count:
            break
    return sentences


def _pairs(sentences: Sequence[Sequence[str]]) -> list[EditRequest]:
    return [
        EditRequest(" ".join(words[:-1]), None, following[-1], id=f"warm-up {index}")
        for index, (words, following) in enumerate(pairwise(sentences))
    ]
