"""Generate free text, in batches and greedily unless told otherwise, and decide whether a continuation gives an answer.

texts = generate(model, tokenizer, ["The mother tongue of Danielle Darrieux is"], max_new_tokens=10)
match_answer(texts[0], "French")                                  # Match(exact=True, contained=True)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length
from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.reading import ReadPrompt
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.decoding import GREEDY, Decoding, DrawnFromTop, StopAtStrings
from errata.evaluate.scoring import Model

# A word ends if no letter, digit or sign of a name ("C++") follows, and no decimals of a number.
_WORD_ENDS = r"(?!\w|[+#]|[.,]\d)"
# A prompt of a batch is padded to the longest, and its padding is computed: a batch more costs less than this share.
MAX_PADDING = 0.25


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt, without the prompt and without the end-of-text token."""

    text: str
    ids: tuple[int, ...]


class Match(NamedTuple):
    """Whether a continuation begins with the answer (`exact`), and whether it contains it anywhere (`contained`)."""

    exact: bool
    contained: bool


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | ReadPrompt],
    max_new_tokens: int = 20,
    *,
    batch_tokens: int = 8192,
    decoding: Decoding = GREEDY,
) -> list[str]:
    """Return the texts of `continuations`."""
    results = continuations(model, tokenizer, prompts, max_new_tokens, batch_tokens=batch_tokens, decoding=decoding)
    return [continuation.text for continuation in results]


def continuations(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | ReadPrompt],
    max_new_tokens: int = 20,
    *,
    batch_tokens: int = 8192,
    decoding: Decoding = GREEDY,
) -> list[Continuation]:
    """Continue every prompt up to the end of text or the limit: greedily, with the most probable token each time.

    Args:
        model: Any causal decoder of transformers. Only the end-of-text ids of its generation_config are used.
        tokenizer: Its fast tokenizer.
        prompts: Equal ones are continued once. A plain text is read behind the facts that edits put before it
            (`core/contexts`); a `ReadPrompt` is read as it is (`read_on`).
        max_new_tokens: Bound on the new tokens of each continuation.
        batch_tokens: Bound on rows x (prompt + new tokens) of a batch.
        decoding: How tokens are chosen where that is not greedily, and which strings end a text. The text is cut
            there; the ids are not.

    Returns:
        One Continuation per prompt, in their order.

    Raises:
        RequestError: a prompt has no tokens.
        ErrataError: a prompt leaves no room for the new tokens in the model's positions.
        ValueError: max_new_tokens is below 1.
    """
    read = _texts(model, tokenizer, prompts)
    rows = {text: tuple(tokens.prompt_ids(tokenizer, text)) for text in read}
    asked = [(UNTOUCHED, rows[text]) for text in read]
    _check_room(model, rows, max_new_tokens)
    return _continued(model, tokenizer, asked, max_new_tokens, batch_tokens, None, decoding)


def continue_edited(
    patches: RowPatches,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[int, str | ReadPrompt]],
    max_new_tokens: int = 20,
    *,
    batch_tokens: int = 8192,
    decoding: Decoding = GREEDY,
) -> list[Continuation]:
    """Continue prompts of several edits together, each with the model as its own edit makes it.

    Args:
        patches: The edits. The model carries none of them.
        tokenizer: The model's fast tokenizer.
        asked: Prompts with the edit that they are asked of: an index of `patches`, or UNTOUCHED.
        max_new_tokens: As of `continuations`.
        batch_tokens: As of `continuations`.
        decoding: As of `continuations`.

    Returns:
        One Continuation per prompt, in their order. Errors are those of `continuations`.
    """
    model = patches.architecture.model
    read = _texts(model, tokenizer, [prompt for _, prompt in asked])
    rows = {text: tuple(tokens.prompt_ids(tokenizer, text)) for text in read}
    _check_room(model, rows, max_new_tokens)
    owned = [(owner, rows[text]) for (owner, _), text in zip(asked, read, strict=True)]
    return _continued(model, tokenizer, owned, max_new_tokens, batch_tokens, patches, decoding)


@torch.inference_mode()
def _continued(
    model: Model,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[int, tuple[int, ...]]],
    max_new_tokens: int,
    batch_tokens: int,
    patches: RowPatches | None,
    decoding: Decoding,
) -> list[Continuation]:
    """Continue rows of ids, each with the edit that owns it."""
    tokens.check_tokenizer(tokenizer)
    pad, ends = tokens.pad_id(tokenizer), _end_ids(model, tokenizer)
    new: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
    order = sorted(set(asked), key=lambda one: (len(one[1]), one[1], one[0]))
    with evaluating(model), _plain_greedy(model, max_new_tokens, pad, ends):
        # In float64, padding on the left turns whole rows into NaN in the eager attention of Llama, NeoX and similar
        # models: they mask with the lowest float64 number and compute the softmax in float32, where it is -inf. And an
        # edit that looks at whole rows would look at the padding, too.
        ahead = looks_ahead(model) if patches is None else patches.looks_ahead
        even = ahead or model.dtype == torch.float64
        prompts = [row for _, row in order]
        batches = batches_by_length(prompts, batch_tokens, even=even, growth=max_new_tokens, max_padding=MAX_PADDING)
        owners = iter([owner for owner, _ in order])
        for group in batches:
            batch = tokens.left_padded(group, pad).to(model.get_input_embeddings().weight.device)
            mine = [next(owners) for _ in group]
            with nullcontext() if patches is None else patches.of_rows(mine):
                ways = _ways(decoding, tokenizer, group, max_new_tokens, batch.ids.shape[1])
                output = model.generate(input_ids=batch.ids, attention_mask=batch.mask, **ways)
            for owner, row, ids in zip(mine, group, output[:, batch.ids.shape[1] :].tolist(), strict=True):
                new[owner, row] = _until_end(ids, ends)
    texts = {ids: decoding.cut(tokenizer.decode(ids, skip_special_tokens=True)) for ids in set(new.values())}
    return [Continuation(texts[new[one]], new[one]) for one in asked]


def _ways(
    decoding: Decoding, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], steps: int, start: int
) -> dict[str, Any]:
    """Return what `generate` is given for a batch beside its rows; nothing where decoding is plain."""
    found: dict[str, Any] = {}
    if decoding.top_k is not None:
        found["logits_processor"] = [DrawnFromTop(rows, steps, decoding)]
    if decoding.stop:
        found["stopping_criteria"] = [StopAtStrings(tokenizer, start, decoding.stop)]
    return found


def _texts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str | ReadPrompt]) -> list[str]:
    """Return what the model reads for each prompt."""
    plain = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    read = dict(zip(plain, read_on(model, tokenizer, [AskedPrompt(prompt) for prompt in plain]), strict=True))
    return [(read[prompt] if isinstance(prompt, str) else prompt).text for prompt in prompts]


def match_answer(text: str, answer: str) -> Match:
    """Return whether a continuation gives an answer.

    Both are normalised: Unicode NFKC, case folded, white space collapsed to one space, and without white space or
    punctuation at the ends. Then
    - exact: the continuation begins with the answer, and a word ends there. What follows does not matter, as a greedy
      continuation has no end of its own: "French, and she" gives "French", but "Frenchman" does not.
    - contained: the answer is anywhere in the continuation, as whole words.

    Languages written without spaces have no word ends in this sense. Their answers match only before punctuation.
    """
    written, wanted = normalise(text), normalise(answer)
    if not wanted:
        return Match(exact=False, contained=False)
    pattern = re.escape(wanted) + _WORD_ENDS
    return Match(
        exact=re.match(pattern, written) is not None,
        contained=re.search(rf"(?<!\w){pattern}", written) is not None,
    )


def normalise(text: str) -> str:
    """Return a text in the form in which `match_answer` compares it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    first = next((i for i, char in enumerate(folded) if not _is_trim(char)), len(folded))
    last = next((i for i in range(len(folded), first, -1) if not _is_trim(folded[i - 1])), first)
    return folded[first:last]


def _is_trim(char: str) -> bool:
    # "#" counts as punctuation in Unicode, but ends a name ("C#").
    return char.isspace() or (unicodedata.category(char).startswith("P") and char != "#")


@contextmanager
def _plain_greedy(model: Model, max_new_tokens: int, pad: int, ends: list[int]) -> Iterator[None]:
    """Replace the model's generation_config by a plain greedy one inside the `with`, and restore it afterwards.

    Passing a plain config to `generate` is not enough. What that leaves open, such as a repetition penalty or a minimum
    length, would come from the model's own config.
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
    ids: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        ids.update([] if value is None else value if isinstance(value, list | tuple) else [value])
    return sorted(ids)


def _until_end(ids: list[int], ends: list[int]) -> tuple[int, ...]:
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:length])


def _check_room(model: Model, rows: dict[str, tuple[int, ...]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    limit = max_positions(model)
    for prompt, row in rows.items():
        if not row:
            raise RequestError(
                f"expected a prompt of at least one token, got {prompt!r}, which has none", field="prompt"
            )
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ErrataError(
                f"expected a prompt of at most {limit - max_new_tokens} tokens ({limit} positions less "
                f"{max_new_tokens} new tokens), got {len(row)}: {prompt[:60]!r}; shorten it"
            )
