"""Batches of rows of like length, so that little of what runs through the model is padding; and smaller ones where
memory is short."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from errata.editors.core.errors import OutOfMemoryError

logger = logging.getLogger(__name__)
# Prompts are short, so that few passes pay more than little padding: no slower on a CPU, and half as many launches.
PROMPT_PADDING = 0.5
T = TypeVar("T")
R = TypeVar("R")


def solve_with_halving(
    chunks: Iterable[Sequence[T]], solve: Callable[[Sequence[T]], list[R]], advice: Callable[[T], str]
) -> list[R]:
    """`solve` of every chunk, in order; where memory runs out, of its halves.

    Args:
        chunks: Requests that are solved together for speed's sake alone.
        solve: One result a request.
        advice: What to say where there is no memory for a single one.

    Raises:
        OutOfMemoryError: memory runs out with a single request.
    """
    results: list[R] = []
    waiting = deque(chunks)
    while waiting:
        chunk = waiting.popleft()
        try:
            results += solve(chunk)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                raise OutOfMemoryError(advice(chunk[0])) from error
            logger.warning("out of memory with %d requests at a time; halving", len(chunk))
            half = len(chunk) // 2
            waiting.extendleft((chunk[half:], chunk[:half]))
    return results


def pack_batches(lengths: Sequence[int], *, batch_tokens: int, max_padding: float = 0.2) -> list[list[int]]:
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
