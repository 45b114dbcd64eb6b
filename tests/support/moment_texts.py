"""Texts whose second moments several files of tests compute."""

from __future__ import annotations

TEXTS = [f"{'The capital ' * (1 + n % 5)}of land {n} is Oslen, where lyre number {n * n} is played." for n in range(24)]
