"""Which of many combinations `make test` tries. The others are slow: `make test-slow` tries them, so that the two
together try all.

A law is tried on every method, and on tiny models of several block forms. Every method with every form under every law
would be most of the time of the tests, and a fault that needs one form, one method and one law at once is rare. So each
pair of them meets at least once: every method is held to every law, every law to every model, and every method meets
every block form under some law. The choice follows from the order of the methods alone, so that a method added later is
covered by being registered. tests/editors/test_laws.py proves this.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from errata.testing import laws
from errata.testing.tiny_models import ARCHITECTURES


def of_laws(number: int, make: laws.Make) -> list[tuple[laws.Trial, bool]]:
    """Return the trials of a method, each with whether it is an everyday one.

    A law with one model is tried on it. Of the laws with several, the first is tried on one block form, the next on
    the next form, and so on; each method begins with another form.

    Args:
        number: The method's place among the methods.
        make: Makes an editor of it.
    """
    found, several = [], 0
    for law, models in laws.LAWS:
        form = ARCHITECTURES[(number + several) % len(ARCHITECTURES)]
        several += len(models) > 1
        for architecture, dtype in models:
            kept = len(models) == 1 or architecture == form
            found.append((laws.Trial(law, make, architecture, dtype), kept))
    return found


def pairs(many: Sequence[Any], few: Sequence[Any]) -> list[Any]:
    """Return every pair as parameters of a test. The everyday ones have each of `many` with one of `few` in turn."""
    every = product(enumerate(many), enumerate(few))
    return [pytest.param(a, b, marks=marks(i % len(few) == j)) for (i, a), (j, b) in every]


def triples(many: Sequence[Any], some: Sequence[Any], few: Sequence[Any]) -> list[Any]:
    """Return every triple as parameters of a test. The everyday ones have each pair of `many` and `some` with one of
    `few`, and any two of the three meet."""
    every = product(enumerate(many), enumerate(some), enumerate(few))
    return [pytest.param(a, b, c, marks=marks((i + j) % len(few) == k)) for (i, a), (j, b), (k, c) in every]


def marks(is_everyday: bool) -> Any:
    """Return the marks of a combination."""
    return () if is_everyday else pytest.mark.slow
