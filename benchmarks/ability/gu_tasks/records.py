"""Reads the files of Gu et al.'s repository (task-data) as the test sets of lm-eval tasks.

Each function takes `folder` from the metadata of lm-eval's task manager, which `errata ability path=FOLDER` fills.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

Records = list[dict[str, Any]]
KINDS: Mapping[str, str] = MappingProxyType(
    {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
)


def reasoning(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return GSM8K's questions, with the solution without its last line as `hint`."""

    def parsed(text: str) -> Records:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = []
        for record in records:
            hint, mark, number = record["answer"].partition("#### ")
            if not mark:
                raise ValueError("an answer has no '#### '")
            found.append({"question": record["question"], "hint": hint, "number": number})
        return found

    return _test_set(folder, "test-reasoning.jsonl", parsed)


def inference(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return RTE's pairs of sentences; `label` is entailment or not_entailment."""
    return _test_set(folder, "test-NLI.tsv", lambda text: _table(text, ("sentence1", "sentence2", "label")))


def open_qa(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return questions with a passage and all right answers."""

    def parsed(text: str) -> Records:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [{"question": r["question"], "passage": r["output"][0], "answers": list(r["answer"])} for r in records]

    return _test_set(folder, "test-OpenDomainQA.jsonl", parsed)


def closed_qa(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return BoolQ's questions with their passage; `answer` is true or false."""

    def parsed(text: str) -> Records:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [{name: record[name] for name in ("question", "passage", "answer")} for record in records]

    return _test_set(folder, "test-ClosedDomainQA.jsonl", parsed)


def dialogue(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return MuTual's dialogues, one file each, in the order of their numbers."""
    place = _place(folder, "test-dialogue")
    paths = sorted(place.glob("dev_*.txt"), key=lambda path: (len(path.stem), path.stem))
    found: Records = []
    for path in paths:
        try:
            record = ast.literal_eval(path.read_text(encoding="utf-8"))
            found.append({name: record[name] for name in ("article", "options", "answers")})
        except (OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: expected article, options and answers: {error!r}") from error
    if not found:
        raise ConfigError(f"{place} has no file dev_1.txt")
    return {"test": _dataset(found)}


def summarization(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return SAMSum's dialogues with their summaries."""
    return _test_set(
        folder,
        "test-summarization.json",
        lambda text: [{name: record[name] for name in ("dialogue", "summary")} for record in json.loads(text)],
    )


def entities(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return CoNLL's sentences, once for each kind of entity that they hold."""
    return _test_set(folder, "test-NER.txt", lambda text: list(_asked(text)))


def sentiment(folder: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return SST-2's sentences; `label` is 1 for positive."""
    return _test_set(folder, "test-SentimentAnalysis.tsv", lambda text: _table(text, ("sentence", "label")))


def check(names: Sequence[str], folder: str | None) -> None:
    """Read the records of tasks once, before a long run begins.

    Raises:
        ConfigError: The folder or a file is missing or has another form.
    """
    readers: Mapping[str, Callable[..., Any]] = {
        "reasoning": reasoning,
        "inference": inference,
        "open_qa": open_qa,
        "closed_qa": closed_qa,
        "dialogue": dialogue,
        "summarization": summarization,
        "entities": entities,
        "sentiment": sentiment,
    }
    for name in names:
        readers[name](folder)


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the (kind, first, behind the last) of each entity of BIO labels."""
    found: list[tuple[str, int, int]] = []
    for i, label in enumerate(labels):
        kind = label.partition("-")[2]
        if label.startswith("I-") and found and found[-1][0] == kind and found[-1][2] == i:
            found[-1] = (kind, found[-1][1], i + 1)
        elif kind:
            found.append((kind, i, i + 1))
    return found


def _asked(text: str) -> Iterator[dict[str, Any]]:
    for block in text.split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line.strip()]
        words, labels = [row[0] for row in rows], [row[3] for row in rows]
        sentence = "".join(word if word in (",", ".") else f" {word}" for word in words).strip()
        for kind, name in KINDS.items():
            own = [" ".join(words[a:b]) for found, a, b in spans(labels) if found == kind]
            if own:
                yield {"kind": name, "sentence": sentence, "entities": own}


def _table(text: str, columns: Sequence[str]) -> Records:
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))
    places = [rows[0].index(name) for name in columns]
    return [{name: row[place] for name, place in zip(columns, places, strict=True)} for row in rows[1:]]


def _place(folder: str | None, name: str) -> Path:
    if folder is None:
        raise ConfigError("ability.path: give the folder task-data of Gu et al.'s repository, which the gu8 tasks read")
    return Path(folder) / name


def _test_set(folder: str | None, name: str, parsed: Callable[[str], Records]) -> dict[str, Dataset]:
    path = _place(folder, name)
    try:
        records = parsed(path.read_text(encoding="utf-8"))
    except (OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as the authors' file: {error!r}") from error
    if not records:
        raise ConfigError(f"{path} has no records")
    return {"test": _dataset(records)}


def _dataset(records: Records) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(records)
