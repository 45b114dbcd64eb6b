"""Turn text into token ids: the rules about leading spaces, begin-of-text tokens, offsets and positions.

The rules:
- A prompt gets the begin-of-text token that its tokenizer adds, if it adds one, and never an end-of-text token.
- An answer is tokenised as part of the text that will really be read: the prompt, what stands between the two
  (joining.py), and the answer. Its ids are those behind the ids of the prompt.
- A chat is the tokenizer's own template around the prompt (reading.py), and then a text like any other.
- A subject is located by the tokenizer's character offsets, never by counting the tokens of a prefix.
- A batch carries its mask and its positions explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.model.joining import joined

# Tokenizers of the SentencePiece family put a space before the first word of a text, others do not: behind an anchor
# the two agree on what an answer is.
_ANCHORS = ("x", "\n", "0", "。")

Tokenizer = Any  # a fast tokenizer of transformers (PreTrainedTokenizerFast); its stubs do not describe encodings


@dataclass(frozen=True)
class LocatedSubject:
    """A tokenised prompt, with the indices of the first and last token of its subject."""

    ids: list[int]
    first: int
    last: int


@dataclass(frozen=True)
class Batch:
    """Rows of ids padded to one length. All tensors are (rows, length), int64; `mask` is 1 at real tokens."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device), self.positions.to(device))


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ErrataError(
            f"expected a fast tokenizer, which knows character offsets, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt, with the begin-of-text token if the tokenizer adds one."""
    return _encode(tokenizer, text)[0]


def answer_ids(tokenizer: Tokenizer, prompt: str, answer: str, join: str | None = None) -> list[int]:
    """Return the ids that follow those of the prompt where the model reads prompt and answer.

    Where the tokenizer would make one token of the end of the prompt and the beginning of the answer, the prompt keeps
    its ids, since they are what the model is given, and the answer is tokenised as what comes next.

    Args:
        prompt: The prompt as it is read (in a chat, the rendered one).
        answer: The answer; white space that it begins with stays.
        join: What stands between the two; None: see `joining.joined`.

    Raises:
        RequestError: the answer tokenises to nothing.
    """
    head, whole = _encode(tokenizer, prompt)[0], _encode(tokenizer, joined(prompt, answer, join))[0]
    if answer.strip() and len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    ids = _continuing(tokenizer, joined(prompt, answer, join)[len(prompt) :])
    if not answer.strip() or not ids:
        raise RequestError(f"the answer {answer!r} tokenises to nothing of its own with this tokenizer", field="target")
    return ids


def _continuing(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on from another, without special tokens."""
    for anchor in _ANCHORS:
        head = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        whole = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if len(whole) > len(head) and whole[: len(head)] == head:
            return list(whole[len(head) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def locate_subject(tokenizer: Tokenizer, text: str, span: tuple[int, int]) -> LocatedSubject:
    """Tokenise a prompt and find the tokens that hold its characters `span` = (start, end).

    Raises:
        RequestError: no token covers the span, for instance because the tokenizer normalises the subject away.
    """
    ids, offsets = _encode(tokenizer, text)
    start, end = span
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not inside:
        raise RequestError(f"no token holds the subject {text[start:end]!r} of {text!r}", field="subject")
    return LocatedSubject(ids, inside[0], inside[-1])


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    anchor = _ANCHORS[0]
    return _encode(tokenizer, anchor)[0][: -len(tokenizer(anchor, add_special_tokens=False)["input_ids"])]


def pad_id(tokenizer: Tokenizer) -> int:
    """Return an id to pad with: the tokenizer's own, its end of text, or 0. Any id works, as padding is never read."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Return rows padded on the left, so that all of them end in the same column."""
    return _padded(rows, pad, left=True)


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Return rows padded on the right, so that column and position are the same."""
    return _padded(rows, pad, left=False)


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> Batch:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.int64)
        mask[i, columns] = 1
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp_min(0))


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and character offsets, with leading special tokens (offset (0, 0)) and without trailing ones."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets, special = encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"]
    end = len(ids)
    while end > 1 and special[end - 1] and offsets[end - 1] == (0, 0):
        end -= 1
    return list(ids[:end]), [(0, 0) if s else tuple(o) for s, o in zip(special[:end], offsets[:end], strict=True)]
