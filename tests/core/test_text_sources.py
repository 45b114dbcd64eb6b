"""Texts from memory, files, datasets and the hub: the same texts however they come, and errors that name the record."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errata.editors import ROME
from errata.editors.core.errors import DatasetError
from errata.editors.core.model.texts import read_texts, texts_digest

TEXTS = [f"The river of {place} is well known." for place in ("Varland", "Oslen", "Quelm", "Brast", "Tarvos")]


def _write(path: Path, content: str) -> Path:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


SOURCES: dict[str, Callable[[list[str]], str]] = {
    "a.txt": lambda texts: "\n\n".join(texts) + "\n",
    "a.json": json.dumps,
    "b.json.gz": lambda texts: json.dumps([{"Text": text, "id": 1} for text in texts]),
    "a.jsonl": lambda texts: "\n".join(json.dumps({"text": text}) for text in texts),
    "b.jsonl.gz": lambda texts: "\n".join(json.dumps(text) for text in [*texts, "  "]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    texts = ["Erster Satz, mit Überhang.", "second  one ", "三"]
    path = _write(tmp_path / name, SOURCES[name](texts))
    assert read_texts(path) == read_texts(str(path)) == texts
    assert read_texts(path, max_texts=2) == texts[:2]


def test_datasets_and_iterables_are_read_in_order() -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_dict({"text": ["one", "", "two", "three"], "label": [0, 1, 2, 3]})
    assert read_texts(dataset) == ["one", "two", "three"]
    assert read_texts(dataset.to_iterable_dataset(), max_texts=1) == ["one"]
    assert read_texts(text for text in ("a", "b")) == ["a", "b"]
    with pytest.raises(DatasetError, match="pass one of its values"):
        read_texts(DatasetDict({"train": dataset}))


def test_a_hub_name_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}, {"wrong": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts("owner/name::train", max_texts=2) == ["one", "two"]
    assert read_texts("name:config:test", max_texts=1) == ["one"]
    assert calls == [("owner/name", None, "train", True), ("name", "config", "test", True)]
    with pytest.raises(DatasetError, match=r"record #2, field 'text': .*found 'wrong'"):
        read_texts("owner/name::train")
    assert len(calls) == 3
    with pytest.raises(DatasetError, match=r"'name:config:split', got 'name:config:test\[:10\]'"):
        read_texts("name:config:test[:10]")
    assert len(calls) == 3


BAD = {
    "missing.txt": (None, "found none there"),
    "empty.txt": ("\n \n", "found none"),
    "broken.json": ('["a", ', "is no JSON"),
    "object.json": ('{"text": "a"}', "expected a JSON list"),
    "field.json": ('["a", {"body": "b"}]', r"record #1, field 'text': expected a field 'text' or 'Text', found 'body'"),
    "number.json": ('[{"text": 3}]', r"record #0, field 'text': expected text, got int"),
    "line.jsonl": ('"a"\n{"text"\n', r"record line 2: is no JSON"),
    "surrogate.json": (r'["\ud800"]', "unpaired surrogate"),
    "plain.json.gz": (b"not gzip", "cannot be read"),
    "latin.txt": (b"\xe4\xf6", "cannot be read"),
    "texts.csv": ("a,b", "ends in one of"),
    "latin.jsonl": (b'"a"\n"\xe4"\n', r"record line 2: cannot be read: it is not UTF-8"),
    "latin.json": (b'["\xe4"]', "not UTF-8"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "deep.jsonl": ('"a"\n' + "[" * 100_000, r"record line 2: is nested too deeply"),
    "cut.jsonl.gz": (gzip.compress(b'"a"\n' * 5000)[:-20], "cannot be read"),
    "torn.jsonl.gz": (gzip.compress(b'"a"\n' * 10)[:10] + b"\xff" * 30, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_files_are_named_with_record_and_field(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError, match=message) as caught:
        read_texts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", [3, "no such file nor dataset", {"text": "a"}, [b"bytes"], ["a", None]])
def test_what_is_no_text_is_refused(source: Any) -> None:
    with pytest.raises(DatasetError):
        read_texts(source)


def test_an_array_of_texts_is_read_like_a_list(make_tiny: Any, tiny_tokenizer: Any) -> None:
    texts = np.array(["The capital of Varland is Oslen.", "It lies in the north.", " "])
    assert read_texts(texts) == [str(text) for text in texts[:2]]
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, {"layers": [0]}, text=texts)
    assert editor.moment(0).shape == (128, 128)


def test_a_text_longer_than_any_name_of_a_file_is_told_from_one() -> None:
    with pytest.raises(DatasetError, match="to measure on that string itself, pass it in a list"):
        read_texts("The river of Varland is well known. " * 1000)


def test_the_digest_of_texts_knows_where_each_ends() -> None:
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"]) != texts_digest(["abc"])
    assert texts_digest(["a", "b"]) != texts_digest(["b", "a"])
