"""Compute and cache the second moments of an MLP's keys: what a layer must remember besides the edited facts.

    C_l = (1 / N) sum_t x_t x_t^T       x_t (d_in,): input of the down projection of layer l at token t

over the N tokens of a text corpus; the mean is not subtracted. This is the C of ROME (Meng et al. 2022, appendix on
K K^T), MEMIT and EMMET. AlphaEdit uses its null space.

All layers come from one pass over the texts, which stops at the last layer that is wanted. Batches hold texts of
similar length, each in a row of its own, so no text attends to another. Results are cached (tensor_cache.py) under a
digest of everything that they depend on (cache_key.py). A computation that was killed resumes from its last save.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.editors.core import ranks
from errata.editors.core.errors import StatisticsError, StorageWarning
from errata.editors.core.files.tensor_cache import (
    ENVIRONMENT,
    CachedTensors,
    DamagedEntryError,
    TensorCache,
    UnwritableCacheError,
    cache_folder,
)
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.digests import tokenizer_digest
from errata.editors.core.model.texts import TextSource, read_texts, texts_digest
from errata.editors.core.model.tokens import Tokenizer, check_tokenizer, pad_id
from errata.editors.core.moments.cache_key import (
    MomentsKey,
    architecture_digest,
    foreign_hooks,
    matmul_precision,
    weights_digests,
)
from errata.editors.core.moments.collect import SavePolicy, collect, plan_passes, token_rows
from errata.editors.core.progress import Progress, silent

logger = logging.getLogger(__name__)

# Tokens per dimension below which a line says that there are few (docs/your-own-model.md has the measurement).
FEW_TOKENS = 10


@dataclass(frozen=True)
class Moments:
    """Second moments by layer.

    Attributes:
        matrices: {layer: C (d_in, d_in)}, exactly symmetric, on the CPU; float64 for a float64 model, else float32.
        tokens: N, the number of tokens that each is the mean over.
        convergence: {layer: ||C_half - C||_F / ||C||_F}, C_half over the first half of the texts; NaN for one text.
            If the texts are in random order, C is about as far from its limit. Four times the text halves it.
        meta: Number of texts, their digest, tokens kept of each, dtype, {layer: key in the cache}, and the layers that
            were computed now and not read from the cache.
    """

    matrices: dict[int, Tensor]
    tokens: int
    convergence: dict[int, float]
    meta: dict[str, Any] = field(default_factory=dict)


def second_moments(
    model: Any,
    tokenizer: Tokenizer,
    layers: Sequence[int],
    texts: TextSource,
    *,
    max_length: int = 256,
    batch_tokens: int = 4096,
    max_texts: int | None = None,
    cache_dir: str | Path | None = None,
    save_seconds: float = 300.0,
    block_rows: int = 8192,
    progress: Progress = silent,
) -> Moments:
    """Return the second moments of the keys of some layers: from the cache, or from one pass over the texts.

    A begin-of-text token that the tokenizer adds counts as a token, as in the original code. An end token is never
    added. The model stays as it was, training flags included. If several processes want the same moments, one computes
    them, and the others wait and read them. The ranks of one run (ranks.py) compute them together, each its share of
    the texts, and each saves its own totals.

    Args:
        model: A decoder of transformers.
        tokenizer: Its fast tokenizer.
        layers: Layers, counted from 0.
        texts: Any source that texts.py reads.
        max_length: Tokens kept of each text, or fewer if the model takes fewer. A key depends on the tokens before it,
            but hardly on those far away, and short rows cost less than documents of 131k tokens.
        batch_tokens: Bound on rows x longest row of a batch.
        max_texts: Use only the first texts, this many; by default all.
        cache_dir: By default the environment variable ERRATA_CACHE, or ~/.cache/errata/moments.
        save_seconds: How often the totals of an unfinished pass are saved. A pass that was killed and resumed gives
            the same bits, on the same CPU, as one that was not.
        block_rows: Tokens summed in float32 before they join the total in float64.
        progress: Called with (tokens done, tokens in all, what is done).

    Raises:
        DatasetError: there is no text, or a record is not a text.
        StatisticsError: the texts hold no token, or the cache folder cannot be used.
        NumericalError: the model gives NaN or inf.
        ArchitectureError: there is no such layer, or the model is not a supported decoder.
    """
    architecture = describe(model)
    check_tokenizer(tokenizer)
    wanted = _checked_layers(architecture, layers)
    _check_sizes(max_length, batch_tokens, block_rows)
    content = read_texts(texts, max_texts=max_texts)
    limit = min(max_length, architecture.max_positions or max_length)
    keys = _keys(architecture, tokenizer, wanted, content, limit)
    reading = _Reading(architecture, tokenizer, content, limit, batch_tokens, block_rows, progress)
    if hooks := foreign_hooks(architecture, wanted):
        logger.warning("%s carry forward hooks, which no digest covers: the cache of moments is not used", hooks)
        found, computed = reading.collect(wanted, None), wanted
    else:
        found, computed = _load_or_compute(TensorCache(cache_folder(cache_dir)), keys, reading, save_seconds)
    names = {layer: key.digest for layer, key in keys.items()}
    meta = _meta(keys[wanted[0]]) | {"keys": names, "computed": computed}
    return _moments({layer: found[layer] for layer in wanted}, meta)


@dataclass(frozen=True)
class _Reading:
    """How texts are read for the layers that the cache lacks; the fields are arguments of `second_moments`."""

    architecture: Architecture
    tokenizer: Tokenizer
    texts: list[str]
    max_length: int
    batch_tokens: int
    block_rows: int
    progress: Progress

    @property
    def work(self) -> dict[str, Any]:
        """Return what decides, besides the keys, whether saved totals can be continued."""
        device = self.architecture.device.type
        work = {"batch_tokens": self.batch_tokens, "block_rows": self.block_rows, "device": device}
        return work if ranks.count() == 1 else {**work, "rank": ranks.rank(), "ranks": ranks.count()}

    def collect(self, layers: list[int], saving: SavePolicy | None) -> dict[int, CachedTensors]:
        """Read the texts once and return the entries of these layers."""
        plan = plan_passes(token_rows(self.tokenizer, self.texts, self.max_length), self.batch_tokens)
        return collect(
            self.architecture,
            plan,
            layers,
            pad=pad_id(self.tokenizer),
            block_rows=self.block_rows,
            saving=saving,
            progress=self.progress,
        )


def _check_sizes(max_length: int, batch_tokens: int, block_rows: int) -> None:
    if min(max_length, batch_tokens, block_rows) < 1:
        raise StatisticsError(
            f"expected max_length, batch_tokens and block_rows of at least 1, got {max_length}, {batch_tokens} and "
            f"{block_rows}"
        )


def _checked_layers(architecture: Architecture, layers: Sequence[int]) -> list[int]:
    wanted = sorted(set(layers))
    if not wanted:
        raise StatisticsError("expected at least one layer, got none")
    for layer in wanted:
        architecture.block(layer)
    return wanted


def _keys(
    architecture: Architecture, tokenizer: Tokenizer, layers: list[int], texts: list[str], max_length: int
) -> dict[int, MomentsKey]:
    weights = weights_digests(architecture, layers)
    shared: dict[str, Any] = {
        "architecture": architecture_digest(architecture),
        "tokenizer": tokenizer_digest(tokenizer),
        "texts": texts_digest(texts),
        "n_texts": len(texts),
        "max_length": max_length,
        "dtype": str(architecture.dtype).removeprefix("torch."),
        "precision": matmul_precision(architecture.device),
    }
    return {layer: MomentsKey(layer=layer, weights=weights[layer], **shared) for layer in layers}


def _meta(key: MomentsKey) -> dict[str, Any]:
    names = ("texts", "n_texts", "max_length", "dtype", "precision", "tokenizer")
    return {name: getattr(key, name) for name in names}


def _load_or_compute(
    cache: TensorCache, keys: Mapping[int, MomentsKey], reading: _Reading, save_seconds: float
) -> tuple[dict[int, CachedTensors], list[int]]:
    """Return the entry of every layer, and the layers that were computed now."""
    if ranks.count() > 1:
        return _load_or_compute_in_ranks(cache, keys, reading, save_seconds)
    found = _loaded(cache, keys)
    if len(found) == len(keys):
        return found, []
    missing = [layer for layer in keys if layer not in found]
    try:
        with cache.lock([keys[layer].digest for layer in missing]):
            # Another process may have computed them while we waited for the lock.
            entries = {layer: cache.recover(keys[layer].digest, _fault) for layer in missing}
            found |= {layer: entry for layer, entry in entries.items() if entry is not None}
            missing = [layer for layer in missing if layer not in found]
            if missing:
                name = _partial_name([keys[layer].digest for layer in missing], reading.work)
                found |= reading.collect(missing, _save_policy(cache, name, save_seconds))
                _store(cache, {keys[layer]: found[layer] for layer in missing}, name)
    except UnwritableCacheError as error:
        warnings.warn(f"moments are computed and not kept: {error}", StorageWarning, stacklevel=2)
        found |= reading.collect(missing, None)
    return found, missing


def _loaded(cache: TensorCache, keys: Mapping[int, MomentsKey]) -> dict[int, CachedTensors]:
    """Return the entries that the cache has."""
    found: dict[int, CachedTensors] = {}
    for layer, key in keys.items():
        try:
            entry = cache.load(key.digest, _fault)
        except DamagedEntryError:
            continue  # Damaged, or replaced while we read it: checked again under the lock.
        if entry is not None:
            found[layer] = entry
    return found


def _load_or_compute_in_ranks(
    cache: TensorCache, keys: Mapping[int, MomentsKey], reading: _Reading, save_seconds: float
) -> tuple[dict[int, CachedTensors], list[int]]:
    """As `_load_or_compute`. The first rank holds the locks and writes; what one rank does not find, all compute."""
    is_first, digests, can_keep = ranks.rank() == 0, [key.digest for key in keys.values()], True
    with ExitStack() as held:
        if is_first:
            try:
                held.enter_context(cache.lock(digests))
            except UnwritableCacheError as error:
                warnings.warn(f"moments are computed and not kept: {error}", StorageWarning, stacklevel=2)
                can_keep = False
        can_keep = ranks.from_first(can_keep)
        found = _loaded(cache, keys)
        seen_by_all = set(keys).intersection(*ranks.gather(list(found)))
        missing = [layer for layer in keys if layer not in seen_by_all]
        if missing:
            name = _partial_name([keys[layer].digest for layer in missing], reading.work)
            found |= reading.collect(missing, _save_policy(cache, name, save_seconds) if can_keep else None)
            if can_keep and is_first:
                _store(cache, {keys[layer]: found[layer] for layer in missing}, name)
            elif can_keep:
                cache.remove(name)
    return found, missing


def _fault(entry: CachedTensors) -> str | None:
    """Return why an entry is no second moment, or None."""
    moment, meta = entry.tensors.get("moment"), entry.meta
    if moment is None or moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not moment.is_floating_point():
        shapes = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
        return f"holds {shapes}, expected one square matrix of the name 'moment'"
    tokens, convergence = meta.get("tokens"), meta.get("convergence", "")
    if type(tokens) is not int or tokens < 1 or not isinstance(convergence, float | int | None):
        return f"is of tokens={tokens!r} and convergence={convergence!r}, expected numbers"
    return None


def _store(cache: TensorCache, entries: Mapping[MomentsKey, CachedTensors], partial: str) -> None:
    """Store what was computed. If the disk is full, this run keeps its result and the next run computes again."""
    try:
        for key, entry in entries.items():
            cache.store(key.digest, entry.tensors, entry.meta | {"layer": key.layer, **_meta(key)})
        cache.remove(partial)
    except OSError as error:
        advice = f"set {ENVIRONMENT} to a folder with room that is yours"
        logger.warning("moments cannot be kept in %s and will be computed again: %s; %s", cache.folder, error, advice)


def _partial_name(digests: list[str], work: dict[str, Any]) -> str:
    content = json.dumps([sorted(digests), work], sort_keys=True)
    return f"partial-{hashlib.sha256(content.encode()).hexdigest()}"


def _save_policy(cache: TensorCache, name: str, seconds: float) -> SavePolicy:
    def store(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        try:
            cache.store(name, tensors, meta)
        except OSError as error:
            logger.warning("the totals so far cannot be saved in %s: %s", cache.folder, error)

    return SavePolicy(lambda: cache.recover(name), store, seconds)


def _moments(entries: Mapping[int, CachedTensors], meta: dict[str, Any]) -> Moments:
    matrices = {layer: entry.tensors["moment"] for layer, entry in entries.items()}
    first = next(iter(entries))
    tokens = entries[first].meta["tokens"]
    change = {layer: entry.meta["convergence"] for layer, entry in entries.items()}
    convergence = {layer: math.nan if value is None else float(value) for layer, value in change.items()}
    if tokens < len(matrices[first]):
        logger.warning(
            "second moments over %d tokens, fewer than their %d dimensions (%.2g tokens per dimension), are rank "
            "deficient: they have no inverse; use more text",
            tokens,
            len(matrices[first]),
            tokens / len(matrices[first]),
        )
    elif tokens < FEW_TOKENS * len(matrices[first]):
        logger.warning(
            "second moments over %d tokens, %.2g for each of their %d dimensions, are a rough estimate: updates come "
            "out larger than with %d and more; use more text",
            tokens,
            tokens / len(matrices[first]),
            len(matrices[first]),
            FEW_TOKENS,
        )
    return Moments(matrices, tokens, convergence, meta)
