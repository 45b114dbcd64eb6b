"""Losses of an edited model as a function of the edit: gradients flow to the edit's factors, and no weight is written.

A linear map W with the update U V gives W x + U (V x). A hook adds the second term. So neither the update nor a
gradient of its size is ever formed. Rows of one batch may belong to different edits, so all edits of a training step
run as one batch.

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
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.forward.whole_rows import WholeForward, rows_from_block
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.own_forward import hooked


@dataclass(frozen=True)
class Updates:
    """Updates of the weight of one map: U (e, d_out, r) and V (e, r, d_in). Edit i adds U[i] V[i]."""

    U: Tensor
    V: Tensor

    @staticmethod
    def of(columns: Tensor, rows: Tensor, owner: Tensor, edits: int) -> Updates:
        """Gather the factors of single tokens by edit. Edits with fewer tokens than others are padded with zeros.

        Args:
            columns: (t, d_out) what each token contributes to U.
            rows: (t, d_in) what it contributes to V.
            owner: (t,) its edit, ascending; on any device.
            edits: Number of edits, e.
        """
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
    """Let the maps compute as edited, inside the `with`, for batches whose row i belongs to edit `owner[i]`.

    No weight is written.
    """

    def hook(update: Updates) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].reshape(len(owner), -1, args[0].shape[-1]).to(update.V.dtype)
            U, V, edit = (tensor.to(x.device) for tensor in (update.U, update.V, owner))
            if len(U) > 1:  # a single edit, which may be one of many requests, is not copied to every row
                U, V = U[edit], V[edit]
            added = x @ V.mT @ U.mT  # (n, l, d_out)
            return output + added.reshape(output.shape).to(output.dtype)

        return add

    # The updates stand for a change of the weights, so they come before the hooks of edits on the model.
    hooks = (m.register_forward_hook(hook(update), prepend=True) for m, update in zip(maps, updates, strict=True))
    with hooked(*hooks):
        yield


@dataclass(frozen=True)
class KeptRow:
    """A row of ids whose predictions should stay unchanged from position `first` on."""

    ids: tuple[int, ...]
    first: int = 0

    @property
    def positions(self) -> range:
        """Positions whose predictions are compared."""
        return range(self.first, len(self.ids))


@dataclass(frozen=True)
class EditedModel:
    """A model with several edits, each on its own: a row sees the edit that it belongs to and no other.

    Blocks below the edits run once, both for the model before the edits and after them.

    Attributes:
        architecture: The model.
        first: The lowest edited block.
        maps: The linear maps that are edited.
        updates: The updates of the weight of each map.
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
        """Return the mean negative log-probability of the answer tokens in each edit's rows, in nats: (e,).

        Args:
            rows: Prompts with their answers.
            owner: (n,) the edit that each row belongs to.
        """
        losses, owners = [], []
        for indices, upper in self._batches([row.ids for row in rows]):
            chosen = [rows[i] for i in indices]
            with overlay_updates(self.maps, self.updates, owner[indices]):
                hidden = upper.normed(upper.run())
            losses.append(answer_losses(self.architecture, hidden, chosen))
            owners.append(owner[indices].repeat_interleave(torch.tensor([len(row.answer) for row in chosen])))
        return self._mean(losses, owners)

    def divergence(self, rows: Sequence[KeptRow], owner: Tensor) -> Tensor:
        """Return the mean KL(before || after) of next-token distributions over each edit's rows, in nats: (e,).

        Args:
            rows: Rows whose predictions should stay; the mean is over the positions that they name.
            owner: (n,) the edit that each row belongs to.
        """
        losses, owners = [], []
        for indices, upper in self._batches([row.ids for row in rows]):
            chosen = [rows[i] for i in indices]
            row = [i for i, kept in enumerate(chosen) for _ in kept.positions]
            position = [p for kept in chosen for p in kept.positions]
            with torch.no_grad():
                before = self._log_probabilities(upper, row, position)
            with overlay_updates(self.maps, self.updates, owner[indices]):
                after = self._log_probabilities(upper, row, position)
            losses.append((before.exp() * (before - after)).sum(-1))
            owners.append(owner[indices][row])
        return self._mean(losses, owners)

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], UpperBlocks | WholeForward]]:
        lengths = [len(row) for row in rows]
        for indices in pack_batches(lengths, batch_tokens=self.batch_tokens, max_padding=PROMPT_PADDING):
            chosen = [rows[i] for i in indices]
            yield indices, rows_from_block(self.architecture, chosen, first=self.first, pad=self.pad)

    def _log_probabilities(self, upper: UpperBlocks | WholeForward, row: list[int], position: list[int]) -> Tensor:
        logits = upper.readout(upper.run()[row, position])
        return logits.to(working_dtype(logits.dtype)).log_softmax(-1)

    def _mean(self, losses: Sequence[Tensor], owners: Sequence[Tensor]) -> Tensor:
        """Return the mean loss per token of each edit, (e,); 0 for an edit without tokens."""
        edits = self.updates[0].U.shape[0]
        if not losses:
            return self.updates[0].U.new_zeros(edits)
        owner = torch.cat(list(owners))
        tokens = torch.bincount(owner, minlength=edits).clamp_min(1)
        total = torch.cat(list(losses))
        return total.new_zeros(edits).index_add(0, owner.to(total.device), total) / tokens.to(total)
