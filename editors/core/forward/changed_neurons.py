"""Run a row of tokens with changed neurons and without writing to the model, from the lowest changed block on.

A neuron is a column w (d,) of a down projection W (d, d_in), with its activation h_n (T,) at T tokens. A change of it
to w' adds h_n (w' - w) to what the map gives. A hook adds that, and many changes are tried as the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.upper_blocks import UpperBlocks, prepare_upper_blocks
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked

Neuron = tuple[int, int]  # layer, column of its down projection


@dataclass(frozen=True)
class Changes:
    """What has been added to neurons so far: (d,) by neuron."""

    columns: dict[Neuron, Tensor] = field(default_factory=dict)

    def with_added(self, neuron: Neuron, change: Tensor) -> Changes:
        before = self.columns.get(neuron)
        return Changes({**self.columns, neuron: change if before is None else before + change})

    def of_layer(self, layer: int) -> tuple[list[int], Tensor] | None:
        """Return the changed columns (r) of a layer and their changes (r, d); None where there is none."""
        found = sorted(n for at, n in self.columns if at == layer)
        return (found, torch.stack([self.columns[layer, n] for n in found])) if found else None


class PatchedRow:
    """One row of tokens, run from the lowest edited block on with changed neurons, any number of times.

    Args:
        architecture: The model, which stays as it is.
        ids: The row.
        layers: Layers whose neurons may be changed.
        pad: Id to pad with.
        batch_tokens: Bound on the tokens that run at once.
    """

    def __init__(
        self, architecture: Architecture, ids: Sequence[int], layers: Sequence[int], *, pad: int, batch_tokens: int
    ) -> None:
        self.architecture, self.ids, self.layers, self.pad = architecture, tuple(ids), tuple(layers), pad
        self._at_once = max(1, batch_tokens // len(ids))
        self._row = prepare_upper_blocks(architecture, [ids], first=min(layers), pad=pad)

    def answer_logits(self, changes: Changes, count: int) -> Tensor:
        """Return the logits (count, V) after each of the last `count` tokens of the row."""
        with torch.no_grad(), self._changed(changes, ()):
            return self._row.readout(self._row.run()[:, -count:])[0]

    def logits(self, changes: Changes, tries: Sequence[tuple[Neuron, Tensor]]) -> Tensor:
        """Return the logits (n, V) after the row for `n` tries, each one further change (d,) of one neuron."""
        found = []
        for start in range(0, len(tries), self._at_once):
            group = tries[start : start + self._at_once]
            blocks = self._rows(len(group))
            with torch.no_grad(), self._changed(changes, group):
                found.append(blocks.readout(blocks.run()[:, -1]))
        return torch.cat(found)

    def with_inputs(self, changes: Changes, *, gradients: bool) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the logits (V,) after the row, and the input (T, d_in) of each layer's down projection.

        Args:
            changes: What has been added to neurons.
            gradients: Whether the logits have gradients for these inputs.
        """
        seen: dict[int, Tensor] = {}

        def keeping(layer: int) -> Any:
            def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                x = args[0]
                seen[layer] = x if x.requires_grad or not gradients else x.detach().requires_grad_()
                return (seen[layer], *args[1:])

            return keep

        hooks = [self.architecture.down(at).register_forward_pre_hook(keeping(at)) for at in self.layers]
        with torch.set_grad_enabled(gradients), hooked(*hooks), self._changed(changes, ()):
            logits = self._row.readout(self._row.run()[:, -1])[0]
        return logits, seen

    def _rows(self, count: int) -> UpperBlocks:
        """Return the row `count` times; the lower blocks run again only where a model's arguments cannot be shared."""
        repeated = self._row.select([0] * count)
        if repeated is not None:
            return repeated
        return prepare_upper_blocks(self.architecture, [self.ids] * count, first=min(self.layers), pad=self.pad)

    @contextmanager
    def _changed(self, changes: Changes, tries: Sequence[tuple[Neuron, Tensor]]) -> Iterator[None]:
        """Add what changed neurons would to what the maps give, before the adapters of edits see it."""
        hooks = []
        for layer in self.layers:
            shared = changes.of_layer(layer)
            own = [(row, n, change) for row, ((at, n), change) in enumerate(tries) if at == layer]
            if shared or own:
                hook = _adding(shared, own, max(1, len(tries)), len(self.ids))
                hooks.append(self.architecture.down(layer).register_forward_hook(hook, prepend=True))
        with hooked(*hooks):
            yield


def _adding(
    shared: tuple[list[int], Tensor] | None, own: Sequence[tuple[int, int, Tensor]], rows: int, length: int
) -> Any:
    """Return a hook that adds h_n (w' - w): for the neurons `shared` by all rows, and for each row's own."""

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        h = args[0].reshape(rows, length, -1)  # OPT flattens rows and tokens
        total = output.reshape(rows, length, -1).to(working_dtype(output.dtype), copy=True)
        if shared is not None:
            total = total + h[..., shared[0]].to(total) @ shared[1].to(total)
        for row, column, change in own:
            total[row] += h[row, :, column, None].to(total) * change.to(total)
        return total.to(output.dtype).reshape(output.shape)

    return add
