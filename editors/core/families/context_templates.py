"""Context templates: short texts that the model writes itself, to put before a prompt.

With several contexts, an edit does not depend on a single one. A template ends in `{}`, where the prompt goes; the bare
prompt is the template `{}`. (Meng et al. 2022, section 3.1 step 1: the key is averaged over such texts.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import without_autocast
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, begin_ids, prompt_ids

SLOT = "{}"
TOP_K = 5
# The first words of MEMIT's contexts, and of all contexts if the tokenizer has no token that begins a text.
WORDS = ("The", "Therefore", "Because", "I", "You")
# Stands before such words if there is no such token, and is cut off again: behind one word alone at the first position,
# SmolLM2 writes scraps like "The-1728", and behind a blank line it writes sentences.
BLANK_LINE = "\n\n"


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that do not end in their only `{}`, and lists that do not begin with the bare prompt.

    Raises:
        ConfigError: It names the template.
    """
    for template in templates:
        if not template.endswith(SLOT) or template.count(SLOT) != 1:
            raise ConfigError(f"context_templates: expected text that ends in its only {SLOT!r}, got {template!r}")
    if not templates or templates[0] != SLOT:
        raise ConfigError(f"context_templates: expected the bare prompt {SLOT!r} first, got {list(templates[:1])}")


@torch.inference_mode()
def write_prefixes(
    architecture: Architecture,
    tokenizer: Tokenizer,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int,
    starts: Sequence[str] = (),
) -> tuple[str, ...]:
    """Let the model write the texts to put before a prompt.

    Each token is sampled from the five most likely ones. The same seed, model and machine give the same texts, since
    sampling uses its own random generator.

    Args:
        architecture: The model.
        tokenizer: Its tokenizer.
        lengths: Pairs of (number of tokens, number of texts).
        seed: Seed of the generator.
        starts: Words that the texts begin with, in turn; if empty, the token that begins a text, or WORDS.

    Returns:
        "" for the bare prompt, then the texts, each ending in ". ".

    Raises:
        NumericalError: The model's predictions hold NaN or inf.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = [""]
    with evaluating(architecture.model), without_autocast():
        for length, count in lengths:
            beginnings = _starts(tokenizer, starts)
            rows: list[list[int]] = [[] for _ in range(count)]
            # Texts with the same beginning are sampled as one batch, and stored in the order of the starts.
            for index, ids in enumerate(beginnings):
                indices = range(index, count, len(beginnings))
                if indices:
                    sampled = _sample(architecture, torch.tensor([ids] * len(indices)), length, generator)
                    for i, text in zip(indices, sampled, strict=True):
                        rows[i] = text
            texts = (tokenizer.decode(row, skip_special_tokens=True) for row in rows)
            prefixes += [f"{' '.join(text.split())}. " for text in texts]
    return tuple(prefixes)


def editor_prefixes(
    editor: Editor,
    templates: Sequence[str] | None,
    lengths: Sequence[tuple[int, int]],
    *,
    starts: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the texts before the prompt in each context of an editor; the first is "", the bare prompt.

    The untouched model writes them, so that they do not depend on edits. They are a one-off cost of the editor.

    Args:
        editor: Whose model, tokenizer and seed write them.
        templates: Given ones, each ending in `{}`; None: the model writes them.
        lengths: (tokens, how many) of those that it writes.
        starts: Words that they begin with.
    """
    if templates is not None:
        return tuple(template.removesuffix(SLOT) for template in templates)
    with editor.clock.one_off("contexts"), editor.ledger.untouched():
        seed = editor.config.seed
        return write_prefixes(editor.architecture, editor.tokenizer, lengths, seed=seed, starts=starts)


def _starts(tokenizer: Tokenizer, starts: Sequence[str]) -> list[list[int]]:
    """Return the tokenised beginnings of contexts.

    This is what the tokenizer puts before a text, or else the token that it has between texts, as GPT-2's. If there is
    none, or if words are given, it is each word with the tokens that the tokenizer puts before a text.
    """
    begin = begin_ids(tokenizer) or _between_texts(tokenizer)
    if begin and not starts:
        return [begin]
    return [prompt_ids(tokenizer, word if begin else BLANK_LINE + word) for word in starts or WORDS]


def _between_texts(tokenizer: Tokenizer) -> list[int]:
    """Return the token that both begins and ends a text, if there is one.

    A token that only begins one may be a mark of chat, as `<|im_start|>`, behind which a model expects a role.
    """
    begin, end = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return [int(begin)] if begin is not None and begin == end else []


def _sample(architecture: Architecture, ids: Tensor, length: int, generator: torch.Generator) -> list[list[int]]:
    """Return the rows of `ids` (n, given), each continued by `length` sampled tokens."""
    cache: Any = None  # the model makes its own
    given = ids.shape[1]
    positions = torch.arange(given + length, device=architecture.device).expand(len(ids), -1)
    for step in range(given, given + length):
        safe_point()
        # The first pass reads all given tokens, and each later one only the new token, thanks to the cache. Without a
        # cache that it takes back, a model reads every row anew.
        output = architecture.base(
            input_ids=(ids if cache is None else ids[:, -1:]).to(architecture.device),
            attention_mask=torch.ones_like(ids, device=architecture.device),
            position_ids=positions[:, 0 if cache is None else step - 1 : step],
            use_cache=True,
            **({} if cache is None else {"past_key_values": cache}),
        )
        cache = getattr(output, "past_key_values", None)
        logits = architecture.logits(output.last_hidden_state[:, -1]).float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError("the model's predictions hold NaN or inf; check its weights, or load it in float32")
        best, tokens = logits.topk(min(TOP_K, logits.shape[1]), dim=1)
        # On the CPU, since generators of other devices give other numbers.
        choice = torch.multinomial(best.softmax(1), 1, generator=generator)
        ids = torch.cat([ids, tokens.gather(1, choice)], dim=1)
    return ids.tolist()
