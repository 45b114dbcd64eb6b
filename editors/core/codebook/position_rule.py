"""Which positions of a row GRACE's codebook replaces when one position matches a key: the three replacement rules.

A row may run in pieces: chunk by chunk, as in a server that fills its cache, or token by token, as in `generate`. What
holds then (checked in tests/editors/test_grace.py):

    replace_last     The result is the same as for the row run at once.
    replace_all      The codebook treats each piece as a row of its own: positions of earlier pieces are in the cache
    replace_prompt   and stay as they are. A key matched in the piece that holds the whole prompt acts as it does
                     without a cache. A key matched in a later piece reaches back to that piece's first position. A key
                     matched by a generated token replaces that token alone (replace_all), or nothing (replace_prompt).

The last two rules look ahead: what a position gets depends on the positions behind it. So a row that is scored must end
at the position that is read, and no padding may follow it. Scoring takes care of that (`Folded.looks_ahead`). Methods
that compute another edit on a model with such edits do not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Replacement = Literal["replace_last", "replace_all", "replace_prompt"]


def spread_keys(keys: Tensor, replacement: Replacement) -> Tensor:
    """Return the key whose value each position gets, (b, s); -1 for none.

    replace_last: a position gets the value of the key that it matches itself. Nothing else matters, so the model
        computes the same alone and in a batch, with a cache and without, whatever follows in the row.
    replace_all: a position gets the value of the next matched key in its row, at the position or behind it.
    replace_prompt: a position gets the value of the next matched key behind it. The position that matches keeps its
        own output.

    The authors' code looks at one position, and replaces all positions of the row, or those before that position. The
    last two rules come as close to that as possible, as a position is known here only by the key that it matches.

    Args:
        keys: (b, s) the key that each position matches, -1 for none.
        replacement: The rule.
    """
    if replacement == "replace_last":
        return keys
    rows, length = keys.shape
    columns = torch.arange(length, device=keys.device)
    following = torch.where(keys >= 0, columns, length).flip(1).cummin(1).values.flip(1)  # (b, s) next match
    beyond = keys.new_full((rows, 1), -1)
    if replacement == "replace_prompt":
        following = torch.cat([following[:, 1:], beyond + 1 + length], dim=1)
    return torch.cat([keys, beyond], dim=1).gather(1, following)


def looks_ahead(replacement: Replacement) -> bool:
    """Return whether what a position gets depends on the positions behind it."""
    return replacement != "replace_last"
