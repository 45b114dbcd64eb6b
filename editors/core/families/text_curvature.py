"""Collect the factors of the curvature of a model's own loss on text: second moments of inputs and of gradients.

    A = (1 / N) sum_t x_t x_t^T,    S = (1 / N) sum_t g_t g_t^T

x_t is the input of a map at token t, and g_t the gradient at its output of the loss of all next tokens of its text.
The sums of both come from one forward and one backward pass per text, and are kept in the cache of second moments.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import NumericalError, StatisticsError, StorageWarning
from errata.editors.core.files.digests import json_digest
from errata.editors.core.files.tensor_cache import (
    CachedTensors,
    DamagedEntryError,
    TensorCache,
    UnwritableCacheError,
    cache_folder,
)
from errata.editors.core.forward.gradient_factors import AnsweredRow, gradient_factors
from errata.editors.core.model.architecture import Architecture, LinearMap
from errata.editors.core.model.batching import pack_batches
from errata.editors.core.model.texts import texts_digest
from errata.editors.core.model.tokens import Tokenizer, pad_id
from errata.editors.core.moments.cache_key import foreign_hooks
from errata.editors.core.moments.collect import token_rows
from errata.editors.core.moments.fingerprint import fingerprint
from errata.editors.core.progress import Progress, silent
from errata.editors.core.solve.gram import GramSum

FORMAT = 2  # raise it whenever equal inputs would give other sums
MAX_LENGTH = 256  # tokens kept of each text, as for second moments


@dataclass(frozen=True)
class CurvatureFactors:
    """The factors of one map's curvature.

    Attributes:
        A: (d_in, d_in) second moment of the inputs.
        S: (d_out, d_out) second moment of the gradients at the outputs.
        tokens: N, the tokens that both are means over.
    """

    A: Tensor
    S: Tensor
    tokens: int

    def with_rows(self, x: Tensor, g: Tensor) -> CurvatureFactors:
        """Return the factors over these tokens and others with inputs x (t, d_in) and gradients g (t, d_out)."""
        N, total = self.tokens, self.tokens + len(x)

        def joined(C: Tensor, rows: Tensor) -> Tensor:
            rows = rows.to(C)
            return (N * C + rows.T @ rows) / total

        return CurvatureFactors(joined(self.A, x), joined(self.S, g), total)


def text_curvature(
    architecture: Architecture,
    tokenizer: Tokenizer,
    maps: Sequence[LinearMap],
    texts: list[str],
    *,
    batch_tokens: int,
    progress: Progress = silent,
) -> list[CurvatureFactors]:
    """Return the factors of each map over some texts: from the cache, or from a pass over them.

    Args:
        architecture: The model, without edits.
        tokenizer: Its tokenizer.
        maps: The maps.
        texts: The texts; 256 tokens of each are read.
        batch_tokens: Bound on rows x longest row of a pass.
        progress: Called after every batch.

    Raises:
        StatisticsError: No text has two tokens, or the cache cannot be used.
        NumericalError: An input or a gradient is not finite.
    """
    if foreign_hooks(architecture, range(architecture.n_layers)):  # no digest covers them
        return _collect(architecture, tokenizer, maps, texts, batch_tokens, progress)
    base = fingerprint(architecture.model, tokenizer)
    name = f"curvature-{json_digest([FORMAT, base, texts_digest(texts), MAX_LENGTH, [found.name for found in maps]])}"
    cache, entry = TensorCache(cache_folder()), None
    with suppress(DamagedEntryError):  # it is replaced below
        entry = cache.load(name)
    if entry is None:
        try:
            with cache.lock([name]):
                if (entry := cache.recover(name)) is None:
                    entry = _packed(_collect(architecture, tokenizer, maps, texts, batch_tokens, progress))
                    cache.store(name, entry.tensors, entry.meta)
        except UnwritableCacheError as error:
            warnings.warn(f"the curvature is computed and not kept: {error}", StorageWarning, stacklevel=2)
    if entry is None:  # not even a lock can be had there
        return _collect(architecture, tokenizer, maps, texts, batch_tokens, progress)
    return _unpacked(entry, len(maps))


def _collect(
    architecture: Architecture,
    tokenizer: Tokenizer,
    maps: Sequence[LinearMap],
    texts: list[str],
    batch_tokens: int,
    progress: Progress,
) -> list[CurvatureFactors]:
    rows = [AnsweredRow(tuple(ids[:-1]), tuple(ids[1:])) for ids in token_rows(tokenizer, texts, _limit(architecture))]
    rows = [row for row in rows if row.ids]
    if not rows:
        raise StatisticsError("no text has two tokens, so that there is no gradient of its next tokens")
    pad, dtype = pad_id(tokenizer), working_dtype(architecture.dtype)
    sums = [
        [GramSum(width, dtype=dtype, device=found.weight.device) for width in reversed(found.shape)] for found in maps
    ]
    total = sum(len(row.ids) for row in rows)
    for group in pack_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens):
        chosen = [rows[i] for i in group]
        factors, _ = gradient_factors(
            architecture,
            [found.module for found in maps],
            [chosen],
            pad=pad,
            batch_tokens=batch_tokens,
            answers_only=True,
            summed=True,
        )
        for (inputs, gradients), each in zip(sums, factors, strict=True):
            inputs.add(each.x)
            gradients.add(each.delta)
        progress(sums[0][0].rows, total, "curvature")
    found = [CurvatureFactors(*(each.mean(dtype) for each in pair), tokens=total) for pair in sums]
    for linear_map, each in zip(maps, found, strict=True):
        if not bool(torch.isfinite(each.A).all() and torch.isfinite(each.S).all()):
            raise NumericalError(f"the inputs or gradients of {linear_map.name} hold NaN or inf on these texts")
    return found


def _limit(architecture: Architecture) -> int:
    return min(MAX_LENGTH, architecture.max_positions or MAX_LENGTH)


def _packed(found: Sequence[CurvatureFactors]) -> CachedTensors:
    tensors = {f"{letter}.{i}": getattr(each, letter) for i, each in enumerate(found) for letter in ("A", "S")}
    return CachedTensors(tensors, {"tokens": found[0].tokens})


def _unpacked(entry: CachedTensors, count: int) -> list[CurvatureFactors]:
    tensors, tokens = entry.tensors, int(entry.meta["tokens"])
    return [CurvatureFactors(tensors[f"A.{i}"], tensors[f"S.{i}"], tokens) for i in range(count)]
