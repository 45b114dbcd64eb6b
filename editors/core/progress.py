"""The function by which long work reports how far it is; callers hand in their own."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that long work calls with how much is done, out of how much, and of what."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """Report nothing."""
