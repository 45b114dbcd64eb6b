"""Run one pass of texts through a model that sums x x^T of the keys of several layers; it can stop and resume.

The texts run in two halves. The moment of the first half is compared with that of both: how far they differ tells how
well the moment has converged.

Moments are sums. Of several ranks (ranks.py) each runs its share of the batches, and the sums are added up at the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core import ranks
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import NumericalError, StatisticsError
from errata.editors.core.files.tensor_cache import CachedTensors
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import run_until_captured, without_autocast
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import pack_batches
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, begin_ids, right_padded
from errata.editors.core.progress import Progress, silent
from errata.editors.core.solve.gram import GramSum, relative_change

logger = logging.getLogger(__name__)

# Saving totals may take a twentieth of the time at most: the next save waits this many times as long as the last took.
_SAVE_SHARE = 20
# Texts tokenised at a time. Encodings are a hundred times larger than their ids; those of 256 documents take megabytes.
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class CollectionPlan:
    """Rows of token ids, and the batches (indices of rows) of each half of them."""

    rows: list[list[int]]
    halves: tuple[list[list[int]], list[list[int]]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def of_this_rank(self) -> CollectionPlan:
        """Return the plan with this rank's share of the batches of each half."""
        first, second = (list(ranks.own(half)) for half in self.halves)
        return CollectionPlan(self.rows, (first, second))


@dataclass(frozen=True)
class SavePolicy:
    """How to load and store the totals of an unfinished pass, and how often, in seconds; 0 is as often as possible."""

    load: Callable[[], CachedTensors | None]
    store: Callable[[dict[str, Tensor], dict[str, Any]], None]
    seconds: float


def token_rows(tokenizer: Tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Return the ids of the texts that have any, after the tokenizer's begin-of-text token, cut to `max_length`."""
    begin, rows = begin_ids(tokenizer), []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        # Cut here, because the tokenizer's own truncation is a setting that would stay on.
        encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows += [(begin + ids)[:max_length] for ids in encoded["input_ids"]]
    return [row for row in rows if row]


def plan_passes(rows: list[list[int]], batch_tokens: int) -> CollectionPlan:
    """Return the batches of each half of the rows, with a fifth of padding at most."""
    middle = len(rows) // 2

    def half(start: int, end: int) -> list[list[int]]:
        batches = pack_batches([len(row) for row in rows[start:end]], batch_tokens=batch_tokens)
        return [[start + index for index in batch] for batch in batches]

    return CollectionPlan(rows, (half(0, middle), half(middle, len(rows))))


PROGRESS_LABEL = "second moments"  # how the progress text of a pass begins


@torch.no_grad()
def collect(
    architecture: Architecture,
    plan: CollectionPlan,
    layers: list[int],
    *,
    pad: int,
    block_rows: int,
    saving: SavePolicy | None = None,
    progress: Progress = silent,
) -> dict[int, CachedTensors]:
    """Run the pass, from its start or from the last save; of several ranks each its share, and all return all.

    Args:
        architecture: The model.
        plan: The rows and batches to run.
        layers: The layers, ascending. The forward stops at the last.
        pad: Id to pad with.
        block_rows: Tokens summed in the working precision before they join the total in float64.
        saving: How totals are saved on the way; None does not save.
        progress: Called after every batch. If it raises, as on Ctrl-C, the totals are saved and the pass ends.

    Returns:
        {layer: entry with the tensor `moment` (d_in, d_in) and the numbers `tokens` and `convergence`}.

    Raises:
        StatisticsError: the texts hold no token.
        NumericalError: a moment holds NaN or inf.
    """
    if not plan.rows:
        raise StatisticsError("the texts hold no token; pass longer ones")
    plan = plan.of_this_rank()
    sums = _Sums.empty(architecture, layers, block_rows)
    if saving and (entry := saving.load()):
        try:
            sums.restore(entry)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            logger.warning("the totals that were saved do not fit this pass (%r); it starts over", error)
            sums = _Sums.empty(architecture, layers, block_rows)
    saver = _Saver(saving, sums)
    modules, tokens = [architecture.down(layer) for layer in layers], plan.tokens
    what = f"{PROGRESS_LABEL} of layers {', '.join(map(str, layers))}"
    batches, middle = [*plan.halves[0], *plan.halves[1]], len(plan.halves[0])
    with evaluating(architecture.model), without_autocast():
        while sums.position < len(batches):
            with saver.save_on_error():
                safe_point()
            batch = right_padded([plan.rows[index] for index in batches[sums.position]], pad).to(architecture.device)
            real = batch.mask.bool().flatten()
            for total, keys in zip(sums.layers, run_until_captured(architecture, batch, modules), strict=True):
                total.add(keys.flatten(0, 1)[real.to(keys.device)])
            sums.position += 1
            if sums.position == middle:
                sums.mark_half()
            saver.save_if_due()
            with saver.save_on_error():
                progress(min(sums.layers[0].rows * ranks.count(), tokens), tokens, what)
    sums.add_ranks()
    return sums.entries(layers)


@dataclass
class _Sums:
    """The state of a pass after some batches.

    Attributes:
        layers: The sum of each layer.
        dtype: Dtype of the moments.
        half: Upper panels of each layer over the first half, on the CPU; empty before the half is reached.
        half_rows: Tokens of the first half; 0 before.
        position: Batches done.
    """

    layers: list[GramSum]
    dtype: torch.dtype
    half: list[list[Tensor]]
    half_rows: int = 0
    position: int = 0

    @classmethod
    def empty(cls, architecture: Architecture, layers: list[int], block_rows: int) -> _Sums:
        dtype = working_dtype(architecture.dtype)
        sums = []
        for layer in layers:
            found = architecture.map_at(layer)
            sums.append(GramSum(found.shape[1], dtype=dtype, device=found.weight.device, block_rows=block_rows))
        return cls(sums, dtype, [])

    def mark_half(self) -> None:
        for total in self.layers:
            total.flush()
        self.half = [[panel.to("cpu", torch.float32) for panel in total.totals] for total in self.layers]
        self.half_rows = self.layers[0].rows

    def add_ranks(self) -> None:
        """Add the sums of the other ranks, at the end of the pass."""
        if ranks.count() == 1:
            return
        for total in self.layers:
            total.flush()
            ranks.add_up(total.totals)
        counts = torch.tensor([self.layers[0].rows, self.half_rows])
        ranks.add_up([counts])
        rows, half_rows = counts.tolist()
        for total in self.layers:
            total.rows = rows
        if half_rows:
            # A rank without a batch of the first half has nothing of it to add.
            self.half = self.half or [[torch.zeros(p.shape) for p in total.totals] for total in self.layers]
            for panels in self.half:
                ranks.add_up(panels)
        self.half_rows = half_rows

    def tensors(self) -> dict[str, Tensor]:
        panels = {f"total.{i}.{j}": p.cpu() for i, s in enumerate(self.layers) for j, p in enumerate(s.totals)}
        if self.layers[0].pending:
            panels |= {f"block.{i}.{j}": p.cpu() for i, s in enumerate(self.layers) for j, p in enumerate(s.block)}
        return panels | {f"half.{i}.{j}": p for i, panels in enumerate(self.half) for j, p in enumerate(panels)}

    def meta(self) -> dict[str, Any]:
        first = self.layers[0]
        return {
            "position": self.position,
            "rows": first.rows,
            "half_rows": self.half_rows,
            "pending": first.pending,
        }

    def restore(self, entry: CachedTensors) -> None:
        self.position, self.half_rows = entry.meta["position"], entry.meta["half_rows"]
        pending = entry.meta.get("pending", 0)
        for i, total in enumerate(self.layers):
            names = [f"{i}.{j}" for j in range(len(total.totals))]
            block = [entry.tensors[f"block.{name}"] for name in names] if pending else []
            total.restore([entry.tensors[f"total.{name}"] for name in names], entry.meta["rows"], block, pending)
            if self.half_rows:
                self.half.append([entry.tensors[f"half.{name}"] for name in names])
        logger.info("second moments resume from batch %d", self.position)

    def entries(self, layers: list[int]) -> dict[int, CachedTensors]:
        entries: dict[int, CachedTensors] = {}
        for i, (layer, total) in enumerate(zip(layers, self.layers, strict=True)):
            C = total.mean(self.dtype)
            if not bool(torch.isfinite(C).all()):
                raise NumericalError(f"the keys of layer {layer} hold NaN or inf on these texts; nothing is kept")
            change = None
            if self.half_rows:
                change = relative_change(self.half[i], self.half_rows, total.totals, total.rows)
            entries[layer] = CachedTensors({"moment": C}, {"tokens": total.rows, "convergence": change})
        return entries


class _Saver:
    """Saves the sums from time to time, and when the pass ends early.

    It waits for the end of a block, where there is less to save. A pass that resumes repeats the same additions, so it
    gives the same bits.
    """

    def __init__(self, saving: SavePolicy | None, sums: _Sums) -> None:
        self._saving, self._sums = saving, sums
        self._due = math.inf if saving is None else time.monotonic() + saving.seconds

    def save_if_due(self) -> None:
        begun = time.monotonic()
        if self._saving is None or begun < self._due or self._sums.layers[0].pending:
            return
        self._save(self._saving)
        now = time.monotonic()
        self._due = now + (max(self._saving.seconds, _SAVE_SHARE * (now - begun)) if self._saving.seconds else 0)

    @contextmanager
    def save_on_error(self) -> Iterator[None]:
        """Save if the body raises, so that a pass makes progress however often it is interrupted."""
        try:
            yield
        except BaseException:
            if self._saving is not None:
                self._save(self._saving)
            raise

    def _save(self, saving: SavePolicy) -> None:
        saving.store(self._sums.tensors(), self._sums.meta())
