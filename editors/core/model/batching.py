"""Group rows of similar length into batches with little padding, and use smaller batches where memory runs out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from errata.editors.core.errors import OutOfMemoryError

logger = logging.getLogger(__name__)
# Prompts are short, so fewer passes are worth more padding: no slower on a CPU, and half as many kernel launches.
PROMPT_PADDING = 0.5
T = TypeVar("T")
R = TypeVar("R")


def solve_with_halving(
    chunks: Iterable[Sequence[T]], solve: Callable[[Sequence[T]], list[R]], advice: Callable[[T], str]
) -> list[R]:
    """Solve every chunk in order. Where memory runs out, solve its halves.

    Args:
        chunks: Requests that are solved together only for speed.
        solve: Returns one result per request of a chunk.
        advice: The error message for a request that does not fit in memory on its own.

    Returns:
        One result per request, in order.

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
    """Group rows into batches, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: Tokens of each row, at least 1.
        batch_tokens: Bound on rows x longest of a batch; a row longer than this is a batch of its own.
        max_padding: Bound on the share of padding in each batch.

    Returns:
        The indices of the rows in `lengths`, batch by batch; every index once.
    """
    batches: list[list[int]] = []
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cells = (len(group) + 1) * lengths[group[0]] if group else 0
        if cells > batch_tokens or tokens + lengths[index] < (1 - max_padding) * cells:
            batches.append(group)
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    return [*batches, group] if group else batches
