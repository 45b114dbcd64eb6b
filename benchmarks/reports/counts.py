"""Counts with their nouns."""

from __future__ import annotations


def count_of(count: int, what: str) -> str:
    """Return a count with its noun: "1 case", "1,000 cases"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
