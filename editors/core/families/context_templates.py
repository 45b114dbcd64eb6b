"""Contexts: short texts that the model writes itself, put before a prompt so that an edit does not depend on one.

A context is written as a template that ends in `{}`, where the prompt goes; the bare prompt is the template `{}`.
(Meng et al. 2022, section 3.1 step 1: the key is averaged over such texts.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import evaluating
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.tokens import Tokenizer, prompt_ids

SLOT = "{}"
TOP_K = 5
# What MEMIT's contexts begin with, and all contexts where no token begins a text.
WORDS = ("The", "Therefore", "Because", "I", "You")


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that do not end in their only `{}`, and lists that do not begin with the bare prompt.

    Raises:
        ConfigError: names the template.
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
    """What stands before the prompt: "" and then the texts that the model writes, each ending in ". ".

    Sampled from the five likeliest tokens with a generator of its own: the same seed, model and machine give the same
    texts, and no global generator moves.

    Args:
        lengths: (tokens of a text, how many texts) pairs.
        starts: Words that the texts begin with, in turn; by default the token that begins texts.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = [""]
    with evaluating(architecture.model):
        for length, count in lengths:
            begun = _starts(tokenizer, starts)
            rows: list[list[int]] = [[] for _ in range(count)]
            for place, ids in enumerate(begun):
                mine = range(place, count, len(begun))
                if mine:
                    sampled = _sample(architecture, torch.tensor([ids] * len(mine)), length, generator)
                    for row, text in zip(mine, sampled, strict=True):
                        rows[row] = text
            texts = (tokenizer.decode(row, skip_special_tokens=True) for row in rows)
            prefixes += [f"{' '.join(text.split())}. " for text in texts]
    return tuple(prefixes)


def _starts(tokenizer: Tokenizer, starts: Sequence[str]) -> list[list[int]]:
    """What contexts begin with, tokenised: the token that begins texts or, where there is none or words are given,
    each word behind what the tokenizer puts before a text."""
    for name in ("bos_token_id", "eos_token_id"):
        if not starts and (token := getattr(tokenizer, name, None)) is not None:
            return [[int(token)]]
    return [prompt_ids(tokenizer, word) for word in starts or WORDS]


def _sample(architecture: Architecture, ids: Tensor, length: int, generator: torch.Generator) -> list[list[int]]:
    """Continue each row of `ids` (n, given) by `length` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    given = ids.shape[1]
    positions = torch.arange(given + length, device=architecture.device).expand(len(ids), -1)
    for step in range(given, given + length):
        safe_point()
        output = architecture.base(
            input_ids=(ids if step == given else ids[:, -1:]).to(architecture.device),
            attention_mask=torch.ones_like(ids, device=architecture.device),
            position_ids=positions[:, 0 if step == given else step - 1 : step],
            past_key_values=cache,
            use_cache=True,
        )
        logits = architecture.logits(output.last_hidden_state[:, -1]).float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError("the model's predictions hold NaN or inf; check its weights, or load it in float32")
        best, tokens = logits.topk(min(TOP_K, logits.shape[1]), dim=1)
        choice = torch.multinomial(best.softmax(1), 1, generator=generator)
        ids = torch.cat([ids, tokens.gather(1, choice)], dim=1)
    return ids.tolist()
