"""Walking up through the edited layers of a model without running twice what an edit does not change.

Rows are cut off at the position that is read. The first forward runs from the tokens to the last edited layer and reads
the keys of the first; then each layer's update is laid over the model (it is not written), and the rows go on from that
layer's input. So n layers cost one forward and the few blocks between them, not 2n forwards.

Shapes: r rows, d hidden size, d_in width of the keys, n rank of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.activations import StopForward, batches_by_length, hooked, run_base
from errata.editors.core.architecture import Architecture
from errata.editors.core.patch import LowRank
from errata.editors.core.suffix import Call, hidden_of, without_hidden
from errata.editors.core.tokens import Batch, right_padded


@dataclass
class _Group:
    """Rows that run together: the state of a batch at the layer where the walk is."""

    batch: Batch
    calls: dict[int, Call]  # how the model calls each block from the first edited layer on
    inputs: Tensor  # (rows, length, d) input of the block at the walk's layer
    keys: Tensor  # (rows, d_in) there, at the last position
    hidden: Tensor  # (rows, d) output of the last edited layer's block, at the last position


class Walk:
    """Keys and final hidden states of rows, layer by layer, each layer under the updates laid over those below.

    Usage:
        walk = Walk(architecture, rows, layers, pad=pad)
        for layer in layers:
            update = solve(walk.keys, walk.hidden)
            walk.advance(update)

    Args:
        rows: Token ids, each cut off at the position to read.
        layers: The edited layers, ascending.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a batch.
    """

    def __init__(
        self,
        architecture: Architecture,
        rows: Sequence[Sequence[int]],
        layers: Sequence[int],
        *,
        pad: int,
        batch_tokens: int = 16384,
    ) -> None:
        self.architecture, self.layers = architecture, tuple(layers)
        self.place = 0
        distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
        index = {row: i for i, row in enumerate(distinct)}
        self._index = torch.tensor([index[tuple(row)] for row in rows], device=architecture.device)
        with torch.no_grad():
            self._groups = [
                self._first(right_padded(group, pad).to(architecture.device))
                for group in batches_by_length(distinct, batch_tokens)
            ]

    @property
    def keys(self) -> Tensor:
        """(r, d_in): inputs of the down projection at the walk's layer."""
        return torch.cat([group.keys for group in self._groups])[self._index]

    @property
    def hidden(self) -> Tensor:
        """(r, d): outputs of the last edited layer's block, under the updates so far."""
        return torch.cat([group.hidden for group in self._groups])[self._index]

    @torch.no_grad()
    def advance(self, update: LowRank) -> None:
        """Lay `update` over the walk's layer and go on to the next; past the last layer there is nothing to go to."""
        layer = self.layers[self.place]
        self.place += 1
        if self.place == len(self.layers):
            return
        following = self.layers[self.place]
        for group in self._groups:
            hook = self.architecture.down(layer).register_forward_hook(_overlay(update))
            with hooked(hook), self._watched(group, following):
                hidden = group.inputs
                for i in range(layer, self.layers[-1] + 1):
                    call = group.calls[i]
                    hidden = hidden_of(self.architecture.block(i)(hidden, *call.args, **call.kwargs))
            group.hidden = _last(hidden, group.batch)

    def _first(self, batch: Batch) -> _Group:
        """From the tokens to the last edited layer, keeping how the blocks from the first on are called."""
        group = _Group(batch, {}, torch.empty(0), torch.empty(0), torch.empty(0))

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                args, kwargs, _ = without_hidden(args, kwargs)
                group.calls[layer] = Call(args, kwargs)

            return hook

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            group.hidden = _last(hidden_of(output), batch)
            raise StopForward

        blocks = self.architecture.blocks
        hooks = [
            blocks[i].register_forward_pre_hook(keep(i), with_kwargs=True)
            for i in range(self.layers[0], self.layers[-1] + 1)
        ]
        with (
            hooked(*hooks, blocks[self.layers[-1]].register_forward_hook(finish)),
            self._watched(group, self.layers[0]),
        ):
            try:
                run_base(self.architecture, batch)
            except StopForward:
                return group
        raise AssertionError("the forward ended before the last edited layer had run")

    def _watched(self, group: _Group, layer: int) -> Any:
        """While a group runs: keep the block's input and the key at `layer`."""

        def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            group.inputs = without_hidden(args, kwargs)[2]

        def key(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            group.keys = _last(args[0].reshape(*group.batch.ids.shape, -1), group.batch)

        block, down = self.architecture.block(layer), self.architecture.down(layer)
        return hooked(block.register_forward_pre_hook(entering, with_kwargs=True), down.register_forward_pre_hook(key))


def _overlay(update: LowRank) -> Any:
    """A forward hook that makes a down projection compute with W + U V."""

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(update.V.dtype)
        return (output.to(update.U.dtype) + (x @ update.V.T.to(x)) @ update.U.T.to(x)).to(output.dtype)

    return add


def _last(states: Tensor, batch: Batch) -> Tensor:
    """The last real position of each row, in memory of its own."""
    last = batch.mask.sum(1) - 1
    return states[torch.arange(len(last), device=states.device), last].clone()
