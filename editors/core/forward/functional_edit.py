"""What a model says once it is edited, as a function of the edit: gradients flow to the factors, nothing is written.

A linear map W with the update U V added gives W x + U (V x). A hook adds the second term, so that neither the update
nor a gradient of its size is ever formed, and rows of one batch may belong to different edits: all edits of a training
step run as one batch.

Shapes: n rows, l tokens of a row, e edits, r factors of an edit, t tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.gradient_factors import AnsweredRow, answer_losses
from errata.editors.core.forward.upper_blocks import UpperBlocks, prepare_upper_blocks
from errata.editors.core.model.activations import hooked
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches


@dataclass(frozen=True)
class Updates:
    """What edits add to the weight of one map: U (e, d_out, r) and V (e, r, d_in), of edit i the product U[i] V[i]."""

    U: Tensor
    V: Tensor

    @staticmethod
    def of(columns: Tensor, rows: Tensor, owner: Tensor, edits: int) -> Updates:
        """From factors token by token, columns (t, d_out) and rows (t, d_in) of the edits `owner` (t,), ascending, on
        whatever device. Edits with fewer tokens than others are filled up with zeros."""
        owner = owner.to(columns.device)
        counts = torch.bincount(owner, minlength=edits)
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(owner), device=owner.device) - first[owner]
        r = int(counts.max())
        U = columns.new_zeros(edits, r, columns.shape[1]).index_put((owner, slot), columns)
        V = rows.new_zeros(edits, r, rows.shape[1]).index_put((owner, slot), rows)
        return Updates(U.transpose(1, 2), V)


@contextmanager
def overlay_updates(maps: Sequence[nn.Module], updates: Sequence[Updates], owner: Tensor) -> Iterator[None]:
    """The maps as edited, for batches whose row i belongs to edit `owner[i]`. Nothing is written."""

    def hook(update: Updates) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].reshape(len(owner), -1, args[0].shape[-1]).to(update.V.dtype)
            U, V, place = (tensor.to(x.device) for tensor in (update.U, update.V, owner))
            added = x @ V[place].mT @ U[place].mT  # (n, l, d_out)
            return output + added.reshape(output.shape).to(output.dtype)

        return add

    # Beneath the hooks of edits that the model carries, as the weights are.
    hooks = (m.register_forward_hook(hook(update), prepend=True) for m, update in zip(maps, updates, strict=True))
    with hooked(*hooks):
        yield


@dataclass(frozen=True)
class KeptRow:
    """A row of ids on which the predictions shall stay as they are: those at position `first` and behind."""

    ids: tuple[int, ...]
    first: int = 0

    @property
    def places(self) -> range:
        """Positions that are read."""
        return range(self.first, len(self.ids))


@dataclass(frozen=True)
class EditedModel:
    """A model as several edits leave it, each by itself. Blocks below the edits run once for before and after.

    Attributes:
        first: The lowest edited block.
        maps: The linear maps that are edited.
        updates: What is added to the weight of each.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a pass.
    """

    architecture: Architecture
    first: int
    maps: Sequence[nn.Module]
    updates: Sequence[Updates]
    pad: int
    batch_tokens: int

    def answer_loss(self, rows: Sequence[AnsweredRow], owner: Tensor) -> Tensor:
        """Negative log probability of the answers, a mean over the answer tokens of each edit's rows, in nats: (e,).

        Args:
            owner: (n,), the edit under which a row is asked.
        """
        losses, owners = [], []
        for places, upper in self._batches([row.ids for row in rows]):
            chosen = [rows[i] for i in places]
            with overlay_updates(self.maps, self.updates, owner[places]):
                hidden = self.architecture.normed(upper.run())
            losses.append(answer_losses(self.architecture, hidden, chosen))
            owners.append(owner[places].repeat_interleave(torch.tensor([len(row.answer) for row in chosen])))
        return self._mean(losses, owners)

    def divergence(self, rows: Sequence[KeptRow], owner: Tensor) -> Tensor:
        """KL(before || after) of the next-token distributions, a mean over the tokens that are read in each edit's
        rows, in nats: (e,). Arguments as of `answer_loss`."""
        losses, owners = [], []
        for places, upper in self._batches([row.ids for row in rows]):
            chosen = [rows[i] for i in places]
            row = [i for i, kept in enumerate(chosen) for _ in kept.places]
            place = [p for kept in chosen for p in kept.places]
            with torch.no_grad():
                before = self._log_probabilities(upper.run()[row, place])
            with overlay_updates(self.maps, self.updates, owner[places]):
                after = self._log_probabilities(upper.run()[row, place])
            losses.append((before.exp() * (before - after)).sum(-1))
            owners.append(owner[places][row])
        return self._mean(losses, owners)

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], UpperBlocks]]:
        lengths = [len(row) for row in rows]
        for places in pack_batches(lengths, batch_tokens=self.batch_tokens, max_padding=PROMPT_PADDING):
            chosen = [rows[i] for i in places]
            yield places, prepare_upper_blocks(self.architecture, chosen, first=self.first, pad=self.pad)

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        logits = self.architecture.readout(hidden)
        return logits.to(working_dtype(logits.dtype)).log_softmax(-1)

    def _mean(self, losses: Sequence[Tensor], owners: Sequence[Tensor]) -> Tensor:
        """Mean of the tokens' losses over each edit; 0 where it has no tokens."""
        edits = self.updates[0].U.shape[0]
        if not losses:
            return self.updates[0].U.new_zeros(edits)
        owner = torch.cat(list(owners))
        tokens = torch.bincount(owner, minlength=edits).clamp_min(1)
        total = torch.cat(list(losses))
        return total.new_zeros(edits).index_add(0, owner.to(total.device), total) / tokens.to(total)
