"""Values as JSON holds them: encoding, reading numbers back, and a digest of the canonical form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form: keys sorted, no white space."""
    text = json.dumps(encodable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def encodable(value: Any) -> Any:
    """The value with everything that JSON cannot hold put as text: "inf", "-inf" and "nan", paths, tuples as lists."""
    # Scalars come first: most of a large value are some, and they are told quickest.
    if value is None or isinstance(value, (str, int)):  # bool is an int
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): encodable(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [encodable(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numbers and arrays of torch and numpy
        return encodable(value.tolist())
    raise TypeError(f"expected a value that JSON can hold, got {type(value).__name__}")


def number(value: Any) -> float:
    """A number as read back from JSON, where inf and nan are text and a missing one is null."""
    return math.nan if value is None else float(value)
