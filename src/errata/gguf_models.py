"""Models in GGUF files, as llama.cpp writes them: dequantised by transformers, then made a plain model.

The header is read here, in milliseconds: the architecture, the number of layers, and how many weights have which type.

    GGUF | version | tensors, entries (uint64) | entries: key, type, value | tensors: name, shape, type, offset
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from errata.editors.core.errors import ConfigError
from errata.editors.core.files.plain_files import check_plain

SUFFIX = ".gguf"
MAGIC = b"GGUF"
NEEDS = ("gguf", "accelerate")  # without both, transformers opens no such file
# Formats of `struct` by the type of an entry; 8 is text and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# Types that hold weights as they are. All other types are of quantised blocks.
_PLAIN = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about its model.

    Attributes:
        entries: Its numbers and texts by key; arrays are left out.
        weights: {type: number of weights}, as {"Q4_1": 106168320, "F32": 35136}, the most frequent first.
    """

    entries: Mapping[str, Any]
    weights: Mapping[str, int]

    @property
    def n_layers(self) -> int | None:
        """The number of layers; None where the file does not state it."""
        count = self.entries.get(f"{self.entries.get('general.architecture')}.block_count")
        return count if type(count) is int else None

    @property
    def quantised_as(self) -> str | None:
        """The quantised types with their shares, "Q4_1 (79 % of the weights), Q8_0 (21 %)"; None where none is."""
        total = sum(self.weights.values())
        parts = [(name, 100 * count / total) for name, count in self.weights.items() if name not in _PLAIN]
        if not parts:
            return None
        (first, share), *others = parts
        return ", ".join([f"{first} ({share:.0f} % of the weights)", *(f"{name} ({s:.0f} %)" for name, s in others)])


def read_header(path: Path) -> GgufHeader:
    """Return what a GGUF file says about its model, without its weights.

    Raises:
        ConfigError: The package gguf is not installed, or the file cannot be read or is no GGUF.
    """
    check_installed(path)
    try:
        check_plain(path)
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no GGUF file, or a damaged one: {error}") from error


def check_installed(path: Path) -> None:
    """Refuse a GGUF file where the packages that read it are missing.

    Raises:
        ConfigError: It says how to install them.
    """
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ConfigError(f"{path.name} is a GGUF file, which needs {missing[0]}: pip install -e '.[gguf]'")


def load_plain(path: Path, dtype: Any) -> tuple[Any, Any]:
    """Return a model with its weights dequantised, and its tokenizer. The model has no trace of quantisation left.

    transformers marks what it dequantises as quantised, so that it can neither be saved nor trained. The weights move
    into a model that is made from the configuration alone.

    Args:
        path: The file.
        dtype: Precision of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    marked = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=dtype)
    return _plain(marked, config, dtype, str(path)), tokenizer


def _plain(marked: Any, config: Any, dtype: Any, name: str) -> Any:
    """Return a model of the configuration with the weights and buffers of another model, its ties kept."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # neither memory nor random numbers are spent on weights that are replaced
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(marked.state_dict(), assign=True)
    for path, buffer in marked.named_buffers():  # those that no state dict holds, such as the frequencies of RoPE
        module, _, own = path.rpartition(".")
        plain.get_submodule(module)._buffers[own] = buffer
    plain.tie_weights()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain.generation_config = marked.generation_config
    plain.config._name_or_path = plain.name_or_path = name
    return plain


class _Reader:
    """Reads values from an open file. A length that cannot be true is a ValueError, so that memory stays bounded."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def header(self) -> GgufHeader:
        if self._file.read(4) != MAGIC:
            raise ValueError(f"it does not begin with {MAGIC.decode()}")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; versions 2 and 3 can be read")
        n_tensors, n_entries = self._length(), self._length()
        entries = {}
        for _ in range(n_entries):
            key, kind = self._text(), self._number("I")
            if (value := self._value(kind)) is not None:
                entries[key] = value
        return GgufHeader(entries, self._weights(n_tensors))

    def _weights(self, n_tensors: int) -> dict[str, int]:
        from gguf import GGMLQuantizationType

        names = {kind.value: kind.name for kind in GGMLQuantizationType}
        counts: Counter[str] = Counter()
        for _ in range(n_tensors):
            self._text()
            weights = 1
            for _ in range(self._number("I")):
                weights *= self._number("Q")
            kind, _offset = self._number("I"), self._number("Q")
            counts[names.get(kind, f"type {kind}")] += weights
        return dict(counts.most_common())

    def _value(self, kind: int) -> Any:
        """Return a number or a text; None for an array, which is passed over."""
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._format(kind))
        of, count = self._number("I"), self._length()
        if of in (_TEXT, _ARRAY):
            for _ in range(count):
                self._value(of)
        else:
            self._skip(count * struct.calcsize(f"<{self._format(of)}"))
        return None

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"it has an entry of the unknown type {kind}")
        return _FORMATS[kind]

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._file.read(struct.calcsize(f"<{form}")))[0]

    def _length(self) -> int:
        length = self._number("Q")
        if length > self._size:
            raise ValueError(f"it states a length of {length:,} in {self._size:,} bytes")
        return length

    def _text(self) -> str:
        return self._file.read(self._length()).decode("utf-8", errors="replace")

    def _skip(self, count: int) -> None:
        if count > self._size:
            raise ValueError(f"it states {count:,} bytes of numbers in a file of {self._size:,}")
        self._file.seek(count, 1)
