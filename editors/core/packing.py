"""Batches of rows of like length, so that little of what runs through the model is padding."""

from __future__ import annotations

from collections.abc import Sequence


def packed(lengths: Sequence[int], *, batch_tokens: int, max_padding: float = 0.2) -> list[list[int]]:
    """Group rows into batches, the longest first, so that a want of memory shows at once.

    Args:
        lengths: Tokens of each row, at least 1.
        batch_tokens: Bound on rows x longest of a batch; a row longer than this is a batch of its own.
        max_padding: Bound on the share of padding in each batch.

    Returns:
        The places of the rows in `lengths`, batch by batch; every place once.
    """
    batches: list[list[int]] = []
    group: list[int] = []
    tokens = 0
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cells = (len(group) + 1) * lengths[group[0]] if group else 0
        if cells > batch_tokens or tokens + lengths[place] < (1 - max_padding) * cells:
            batches.append(group)
            group, tokens = [], 0
        group.append(place)
        tokens += lengths[place]
    return [*batches, group] if group else batches
