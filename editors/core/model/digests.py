"""What a model's parts are, as digests of their content."""

from __future__ import annotations

import json

from errata.editors.core.files.digests import json_digest
from errata.editors.core.model.tokens import Tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a fast tokenizer's vocabulary, merges, normalisation and special tokens, in hex.

    Truncation and padding are left out: they are settings of the last call, and this package sets them by hand.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_digest({name: value for name, value in content.items() if name not in ("truncation", "padding")})
