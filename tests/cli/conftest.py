"""What the tests of commands share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from errata import models


@pytest.fixture(scope="module")
def world_loaded_once() -> Iterator[Any]:
    """Commands that read a model, or edit it for a while only, get one bundled model for all tests of a file."""
    with pytest.MonkeyPatch.context() as patched:
        loaded = models.load("world", device="cpu")
        patched.setattr(models, "load", lambda *_, **__: loaded)
        yield loaded
