"""Fingerprint a model as a few digests: two models are the same base if and only if all of their digests agree."""

from __future__ import annotations

from torch import nn

from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.digests import tokenizer_digest
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.moments.cache_key import architecture_digest, tensors_digest


def fingerprint(model: nn.Module, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the SHA-256 of the model's class and configuration, of its weights without edits, and of the tokenizer;
    and the precision of the weights."""
    with Ledger.of(model).untouched():
        weights = tensors_digest(model)
    architecture = describe(model)
    return {
        "architecture": architecture_digest(architecture),
        "precision": str(architecture.dtype).removeprefix("torch."),
        "weights": weights,
        "tokenizer": tokenizer_digest(tokenizer),
    }
