"""Which positions of a row a key of a codebook replaces where it is met.

What holds for a row that is run in pieces, as by a server that fills its cache chunk by chunk, or token by token as
`generate` does behind the prompt (checked in tests/editors/test_grace.py):

    replace_last     everything: the same as the row run at once.
    replace_all      Each piece is as in a row that began with it, as far as the codebook goes: positions of earlier
    replace_prompt   pieces are in the cache and stay as they are. So a key that is met in the piece that holds the
                     whole prompt does what it does without a cache; one met later reaches back to the piece's first
                     position, and one met by a generated token to nothing but that token (replace_all), or to nothing
                     (replace_prompt).

The last two look ahead: what a position is given depends on what stands behind it, so that a row scored for the sake of
its beginning must end there, and nothing may stand behind it for padding. Scoring asks for that (`Folded.looks_ahead`).
Other methods' edits do not, when they are computed on a model that carries such edits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Replacement = Literal["replace_last", "replace_all", "replace_prompt"]


def spread_keys(keys: Tensor, replacement: Replacement) -> Tensor:
    """Which key's value each position is given, -1 for none; as `keys`, the key that each position has met (b, s).

    replace_last: a position takes the value of the key that it has met itself. It looks at nothing else, so that the
        model computes the same alone and in a batch, with a cache and without, whatever stands behind it in the row.
    replace_all: each position takes the value of the next key that is met in its row, at the position or behind it.
    replace_prompt: likewise, of the next key behind it; the position that has met the key keeps its output.

    The authors' code replaces all positions of the row, or those before the key, wherever the one position lies that
    it looks at. These two are as near to that as a rule can be that knows positions by nothing but what they have met.
    """
    if replacement == "replace_last":
        return keys
    rows, length = keys.shape
    columns = torch.arange(length, device=keys.device)
    following = torch.where(keys >= 0, columns, length).flip(1).cummin(1).values.flip(1)  # (b, s) the next column met
    beyond = keys.new_full((rows, 1), -1)
    if replacement == "replace_prompt":
        following = torch.cat([following[:, 1:], beyond + 1 + length], dim=1)
    return torch.cat([keys, beyond], dim=1).gather(1, following)


def looks_ahead(replacement: Replacement) -> bool:
    """Whether a position is given something for what stands behind it."""
    return replacement != "replace_last"
