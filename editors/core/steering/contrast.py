"""Contrast sets: prompts, each with a continuation that shows a behaviour and one that does not.

    contrasts = read_contrasts("formal")           # comes with errata; or a file of JSON lines, or records
    learnt, held_out = halves(contrasts)           # one half to learn from, the other to measure on

A record has `prompt`, `positive` and `negative`. With an empty prompt, both texts are read by themselves: whole
statements, or in a chat two messages. Continuations of equal style and length make a cleaner direction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import DatasetError
from errata.editors.core.files.digests import json_digest
from errata.editors.core.files.plain_files import parse_json, read_bytes
from errata.editors.core.model.reading import as_read, read_ids
from errata.editors.core.model.tokens import Tokenizer, prompt_ids
from errata.editors.core.steering.kinds import BUNDLED


@dataclass(frozen=True)
class Contrast:
    """One prompt with two continuations.

    Attributes:
        prompt: What comes before; empty where the texts stand alone.
        positive: The continuation that shows the behaviour.
        negative: The one that does not.
        chat: Whether the prompt is a message in the model's chat template; of an empty prompt, each text is.
        join: What stands between prompt and continuation; None: what the writing has there.
    """

    prompt: str
    positive: str
    negative: str
    chat: bool = False
    join: str | None = None

    def rows(self, tokenizer: Tokenizer) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """Return the token ids of the positive and the negative text, each with where the continuation begins.

        Raises:
            RequestError: The tokenizer has no chat template, or a continuation has no tokens.
        """
        return self._row(tokenizer, self.positive), self._row(tokenizer, self.negative)

    def _row(self, tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
        if not self.prompt:
            return prompt_ids(tokenizer, as_read(tokenizer, text, chat=self.chat).text), 0
        head, tail = read_ids(tokenizer, self.prompt, text, chat=self.chat, join=self.join)
        return head + tail, len(head)


def read_contrasts(
    source: str | Path | Iterable[Mapping[str, Any] | Contrast], *, chat: bool = False
) -> list[Contrast]:
    """Return the contrasts of a source, in its order.

    Args:
        source: "formal", which comes with errata; a file of JSON lines; or records.
        chat: Read the prompts as messages in the model's chat template.

    Raises:
        DatasetError: The source is missing or empty, or a record is none; it names file, record and field.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and str(source) in BUNDLED:
        text = (files("errata.editors.core.steering") / f"{source}.json").read_text(encoding="utf-8")
        records: list[Any] = json.loads(text)
    elif path is not None:
        records = _lines(path)
    else:
        assert not isinstance(source, str | Path)
        records = list(source)
    found = [_contrast(record, number, path) for number, record in enumerate(records, 1)]
    if not found:
        raise DatasetError("expected at least one contrast, found none", path=path)
    return [replace(each, chat=True) for each in found] if chat else found


def halves(contrasts: Sequence[Contrast]) -> tuple[list[Contrast], list[Contrast]]:
    """Return every second contrast from the first on, and every second from the second on."""
    return list(contrasts[::2]), list(contrasts[1::2])


def contrast_digest(contrasts: Sequence[Contrast]) -> str:
    """Return the SHA-256 of the contrasts, in hex."""
    return json_digest([asdict(each) for each in contrasts])


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        raise DatasetError(
            f"there is no such file{did_you_mean(str(path), BUNDLED)}; expected a file of JSON lines with prompt, "
            f"positive and negative, or a set that comes with errata: {', '.join(BUNDLED)}",
            path=path,
        )
    records = []
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"expected a file of JSON lines in UTF-8: {error}", path=path) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(parse_json(line))
            except ValueError as error:
                raise DatasetError(f"expected a JSON object: {error}", path=path, record=f"line {number}") from error
    return records


def _contrast(record: Any, number: int, path: Path | None) -> Contrast:
    if isinstance(record, Contrast):
        return record
    given = record if isinstance(record, Mapping) else {}
    for field in ("positive", "negative"):
        if not isinstance(given.get(field), str) or not given[field].strip():
            raise DatasetError(
                f"expected a text that is not blank, got {given.get(field)!r}",
                path=path,
                record=f"#{number}",
                field=field,
            )
    known = Contrast.__dataclass_fields__
    if unknown := [name for name in given if name not in known]:
        raise DatasetError(
            f"there is no such field{did_you_mean(str(unknown[0]), tuple(known))}", path=path, record=f"#{number}",
            field=str(unknown[0]),
        )  # fmt: skip
    kinds = {"prompt": str, "chat": bool, "join": (str, type(None))}
    values = {"prompt": "", **given}
    for field, kind in kinds.items():
        if field in values and not isinstance(values[field], kind):
            raise DatasetError(f"got {values[field]!r}", path=path, record=f"#{number}", field=field)
    return Contrast(**values)
