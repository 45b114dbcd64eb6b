"""Free generation, greedy and batched, and whether a continuation gives an answer.

texts = generate(model, tokenizer, ["The mother tongue of Danielle Darrieux is"], max_new_tokens=10)
matches(texts[0], "French")                                       # Match(exact=True, contained=True)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length, evaluating
from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.scoring import Model

# A word ends where no letter, digit or sign of a name ("C++") follows, and no decimals of a number.
_WORD_ENDS = r"(?!\w|[+#]|[.,]\d)"


@dataclass(frozen=True)
class Continuation:
    """What a model puts behind a prompt: without the prompt, and without the end-of-text token."""

    text: str
    ids: tuple[int, ...]


class Match(NamedTuple):
    """Whether a continuation begins with the answer (`exact`) and whether it holds it at all (`contained`)."""

    exact: bool
    contained: bool


def generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 20, *, batch_tokens: int = 8192
) -> list[str]:
    """The texts of `continuations`."""
    found = continuations(model, tokenizer, prompts, max_new_tokens, batch_tokens=batch_tokens)
    return [continuation.text for continuation in found]


@torch.inference_mode()
def continuations(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 20, *, batch_tokens: int = 8192
) -> list[Continuation]:
    """Continue every prompt with the likeliest token, again and again, until the end of text or the limit.

    Args:
        model: Any causal decoder of transformers. Nothing of its generation_config is used but the end-of-text ids.
        tokenizer: Its fast tokenizer.
        prompts: Equal ones are continued once.
        max_new_tokens: Limit of new tokens per prompt.
        batch_tokens: Bound on rows x (prompt + new tokens) of a batch.

    Returns:
        One Continuation per prompt, in their order.

    Raises:
        RequestError: a prompt tokenises to nothing.
        ErrataError: a prompt leaves no room for the new tokens in the model's positions.
    """
    tokens.check_tokenizer(tokenizer)
    rows = {prompt: tuple(tokens.prompt_ids(tokenizer, prompt)) for prompt in prompts}
    _check_room(model, rows, max_new_tokens)
    pad, ends = tokens.pad_id(tokenizer), _end_ids(model, tokenizer)
    new: dict[tuple[int, ...], tuple[int, ...]] = {}
    order = sorted(set(rows.values()), key=lambda row: (len(row), row))
    with evaluating(model), _plain_greedy(model, max_new_tokens, pad, ends):
        # In float64, padding on the left makes NaN of whole rows in the eager attention of Llama, NeoX and their kin:
        # they mask with the least float64 number and take the softmax in float32, where that number is minus infinity.
        even = model.dtype == torch.float64
        for group in batches_by_length(order, batch_tokens, even=even, growth=max_new_tokens):
            batch = tokens.left_padded(group, pad).to(model.get_input_embeddings().weight.device)
            output = model.generate(input_ids=batch.ids, attention_mask=batch.mask)
            for row, ids in zip(group, output[:, batch.ids.shape[1] :].tolist(), strict=True):
                new[row] = _until_end(ids, ends)
    texts = {ids: tokenizer.decode(ids, skip_special_tokens=True) for ids in set(new.values())}
    return [Continuation(texts[new[rows[prompt]]], new[rows[prompt]]) for prompt in prompts]


def match_answer(text: str, answer: str) -> Match:
    """Whether a continuation gives an answer.

    Both are normalised: Unicode NFKC, case folded, runs of white space to one space, and no white space or punctuation
    at either end. Then
    - exact: the continuation begins with the answer, and the answer ends with a word. What follows is free: a greedy
      continuation has no end of its own, so "French, and she" gives "French", but "Frenchman" does not.
    - contained: the answer stands anywhere in it, as whole words.

    Languages written without spaces have no word ends in this sense; their answers match only before punctuation.
    """
    said, wanted = normalise(text), normalise(answer)
    if not wanted:
        return Match(exact=False, contained=False)
    pattern = re.escape(wanted) + _WORD_ENDS
    return Match(
        exact=re.match(pattern, said) is not None,
        contained=re.search(rf"(?<!\w){pattern}", said) is not None,
    )


def normalise(text: str) -> str:
    """A text as `match_answer` compares it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    first = next((i for i, char in enumerate(folded) if not _is_trim(char)), len(folded))
    last = next((i for i in range(len(folded), first, -1) if not _is_trim(folded[i - 1])), first)
    return folded[first:last]


def _is_trim(char: str) -> bool:
    # "#" counts as punctuation in Unicode, but ends a name ("C#").
    return char.isspace() or (unicodedata.category(char).startswith("P") and char != "#")


@contextmanager
def _plain_greedy(model: Model, max_new_tokens: int, pad: int, ends: list[int]) -> Iterator[None]:
    """The model's generation_config replaced by a plain one, put back on leaving.

    `generate` fills whatever a passed config leaves open from the model's own: a repetition penalty, say, or a minimum
    length. So the model's own is what has to be plain.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends or None
    )
    try:
        yield
    finally:
        model.generation_config = own


def _end_ids(model: Model, tokenizer: Tokenizer) -> list[int]:
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return sorted(found)


def _until_end(ids: list[int], ends: list[int]) -> tuple[int, ...]:
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:length])


def _check_room(model: Model, rows: dict[str, tuple[int, ...]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    limit = max_positions(model)
    for prompt, row in rows.items():
        if not row:
            raise RequestError(f"the prompt {prompt!r} has no tokens to continue", field="prompt")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ErrataError(
                f"expected a prompt of at most {limit - max_new_tokens} tokens ({limit} positions less "
                f"{max_new_tokens} new tokens), got {len(row)}: {prompt[:60]!r}; shorten it"
            )
