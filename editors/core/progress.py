"""How long work reports on itself: a function that anything may call and anyone may hand in."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then with how much is done, out of how much, and of what."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """Reports nothing."""
