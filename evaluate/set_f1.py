"""The edit success of composable interventions: the F1 of two sets of tokens, of what a model writes and of the answer.

A model continues the prompt greedily, to 50 tokens in all. Padding, begin-of-text and the token of a single space are
left out on both sides, what the model wrote is cut to as many tokens as the answer has, and the two are compared as
sets: neither order nor repetition counts. For locality the answer is what the untouched model wrote.

Source: Kolbeinsson et al., arXiv 2407.06483, and hartvigsen-group/composable-interventions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.reading import ReadPrompt
from errata.editors.core.model.tokens import Tokenizer, prompt_ids
from errata.evaluate.generation import continuations
from errata.evaluate.scoring import Model

WHOLE = 50
"""Tokens of a prompt with its continuation."""
_SPARE = 4  # tokens that may be left out before more have to be written


class SetMatch(NamedTuple):
    """F1 and recall of two sets of tokens, from 0 to 1."""

    f1: float
    recall: float


def left_out_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that do not count: padding, begin-of-text and a single space."""
    space = tokenizer.encode(" ", add_special_tokens=False)
    found = (tokenizer.pad_token_id, tokenizer.bos_token_id, *(space if len(space) == 1 else ()))
    return frozenset(id_ for id_ in found if id_ is not None)


def set_match(written: Sequence[int], answer: Sequence[int], left_out: Collection[int] = ()) -> SetMatch:
    """Compare what was written with the answer.

    Args:
        written: Ids behind the prompt; those behind the answer's length do not count.
        answer: Ids of the answer.
        left_out: Ids that do not count on either side.
    """
    wanted = [id_ for id_ in answer if id_ not in left_out]
    found = [id_ for id_ in written if id_ not in left_out][: len(wanted)]
    common = len(set(found) & set(wanted))
    if not common:
        return SetMatch(0.0, 0.0)
    recall, precision = common / len(set(wanted)), common / len(set(found))
    return SetMatch(2 * precision * recall / (precision + recall), recall)


def written_ids(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[ReadPrompt],
    lengths: Sequence[int],
    *,
    batch_tokens: int = 8192,
) -> list[tuple[int, ...]]:
    """Return the ids that a model writes behind each prompt, as many as are compared.

    Args:
        model: The model as it stands.
        tokenizer: Its tokenizer.
        prompts: As the model reads them.
        lengths: Of the answer to each prompt, in tokens.
        batch_tokens: As of `continuations`.

    Returns:
        Ids that count, at most `lengths` of them; fewer where the text ended, or had its 50 tokens.
    """
    left_out, count = left_out_ids(tokenizer), max(lengths, default=0) + _SPARE
    sizes = [len(prompt_ids(tokenizer, prompt.text)) for prompt in prompts]
    room = [max(length, WHOLE - size) for size, length in zip(sizes, lengths, strict=True)]
    limit, found = max_positions(model), {}
    due = list(range(len(prompts)))
    while due:
        # The model may have no positions for as many.
        asked = count if limit is None else max(1, min(count, limit - max(sizes[i] for i in due)))
        texts = continuations(model, tokenizer, [prompts[i] for i in due], asked, batch_tokens=batch_tokens)
        for i, text in zip(due, texts, strict=True):
            kept = tuple(id_ for id_ in text.ids[: room[i]] if id_ not in left_out)
            if len(kept) >= lengths[i] or len(text.ids) < asked or asked >= room[i] or asked < count:
                found[i] = kept[: lengths[i]]
        due, count = [i for i in due if i not in found], 2 * count
    return [found[i] for i in range(len(prompts))]
