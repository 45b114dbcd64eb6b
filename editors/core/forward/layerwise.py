"""Walking up through the edited layers of a model without running twice what an edit does not change.

Rows are cut off at the position that is read. The first forward runs from the tokens to the first edited layer and
reads its keys. Then each layer's update is laid over the model (it is not written), and the rows go on from that
layer's output to the next. So the keys of all layers cost one forward that ends at the last of them; only the few rows
whose final hidden state is asked for go on to it from each layer.

Shapes: r rows, w watched rows, d hidden size, d_in width of the keys, n rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.suffix import BlockCall, hidden_of, is_plain_residual, skip_blocks, split_hidden
from errata.editors.core.ledger.adapter_hooks import at_work
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.activations import StopForward, batches_by_length, hooked, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.tokens import Batch, right_padded


@dataclass
class _Group:
    """Rows that run together, and their states at the layer where the walk is. What a state is not needed for is not
    there: `output` where the block is not run to its end, `hidden` where no row is watched."""

    batch: Batch
    watched: bool
    calls: dict[int, BlockCall] = field(
        default_factory=dict
    )  # how the model calls each block from the first edited one on
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))  # (rows, length, d) of the block
    mlp: Tensor = field(default_factory=lambda: torch.empty(0))  # (rows, length, d_in) what the down projection reads
    output: Tensor = field(default_factory=lambda: torch.empty(0))  # (rows, length, d) of the block
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))  # (rows, d) of the last edited block, last position

    @property
    def keys(self) -> Tensor:
        return _last(self.mlp, self.batch)


class LayerWalk:
    """Keys and final hidden states of rows, layer by layer, each layer under the updates laid over those below.

    Usage:
        walk = Walk(architecture, rows, layers, pad=pad, watched=bare)
        for layer in layers:
            update = solve(walk.keys, walk.hidden)
            walk.advance(update)

    Args:
        rows: Token ids, each cut off at the position to read.
        layers: The edited layers, ascending.
        pad: Id to pad with.
        watched: Places in `rows` of those whose final hidden state is wanted.
        batch_tokens: Bound on rows x length of a batch; a CPU takes less, see `limit_batch_tokens`.
    """

    def __init__(
        self,
        architecture: Architecture,
        rows: Sequence[Sequence[int]],
        layers: Sequence[int],
        *,
        pad: int,
        watched: Sequence[int],
        batch_tokens: int = 16384,
    ) -> None:
        self.architecture, self.layers = architecture, tuple(layers)
        self.place = 0
        wanted = {tuple(rows[i]) for i in watched}
        distinct = sorted({tuple(row) for row in rows}, key=lambda row: (row not in wanted, len(row), row))
        index = {row: i for i, row in enumerate(distinct)}
        self._places = torch.tensor([index[tuple(row)] for row in rows])
        self._watched = self._places[list(watched)]
        bound = limit_batch_tokens(batch_tokens, architecture.device)
        with torch.no_grad():
            self._plain = len(self.layers) == 1 or self._adds_plainly(right_padded(distinct[:1], pad))
            self._groups = [
                self._first(_Group(right_padded(group, pad).to(architecture.device), some is wanted))
                for some in (wanted, set(distinct) - wanted)
                for group in batches_by_length([row for row in distinct if row in some], bound)
            ]

    @property
    def keys(self) -> Tensor:
        """(r, d_in): inputs of the down projection at the walk's layer."""
        keys = torch.cat([group.keys for group in self._groups])
        return keys[self._places.to(keys.device)]

    @property
    def hidden(self) -> Tensor:
        """(w, d): outputs of the last edited layer's block, under the updates so far."""
        hidden = torch.cat([group.hidden for group in self._groups if group.watched])
        return hidden[self._watched.to(hidden.device)]

    @torch.no_grad()
    def advance(self, update: LowRank) -> None:
        """Lay `update` over the walk's layer and go on to the next; past the last layer there is nothing to go to."""
        layer = self.layers[self.place]
        self.place += 1
        if self.place == len(self.layers):
            return
        added = _Addition(update)
        for group in self._groups:
            hidden = self._under(added, group, layer)
            for i in range(layer + 1, self.layers[self.place]):
                hidden = self._block(group, i, hidden)
            self._arrive(group, hidden)

    def _under(self, added: _Addition, group: _Group, layer: int) -> Tensor:
        """(rows, length, d): the block's output with the update: added where it adds up, else by the block again."""
        if self._plain:
            return (group.output + added(group.mlp)).to(group.output.dtype)
        # Beneath the hooks of edits that the model carries, as the weights are.
        with hooked(self.architecture.down(layer).register_forward_hook(added.hook, prepend=True)):
            return self._block(group, layer, group.inputs)

    def _arrive(self, group: _Group, hidden: Tensor) -> None:
        """Run the walk's block on `hidden`, as far as needed, and those above it where rows are watched."""
        layer = self.layers[self.place]
        with self._kept(group, layer):
            try:
                hidden = self._block(group, layer, hidden)
            except StopForward:
                return
        if group.watched:
            for i in range(layer + 1, self.layers[-1] + 1):
                hidden = self._block(group, i, hidden)
            group.hidden = _last(hidden, group.batch)

    def _block(self, group: _Group, layer: int, hidden: Tensor) -> Tensor:
        call = group.calls[layer]
        return hidden_of(self.architecture.block(layer)(hidden, *call.args, **call.kwargs))

    def _adds_plainly(self, batch: Batch) -> bool:
        """Whether what the update adds to the MLP's output arrives in the block's as it is; tried on one row. Where an
        edit that the model carries acts on the down projection, no row speaks for the others."""
        if any(at_work(self.architecture.down(layer)) for layer in self.layers):
            return False
        layer = self.layers[0]
        group = self._first(_Group(batch.to(self.architecture.device), True))
        return is_plain_residual(self.architecture, layer, group.inputs, group.calls[layer], group.output)

    def _first(self, group: _Group) -> _Group:
        """From the tokens to the first edited layer, with a look at how the model calls the blocks above. They run only
        where rows are watched; else they hand on what they are given."""

        def calling(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                args, kwargs, _ = split_hidden(args, kwargs)
                group.calls[layer] = BlockCall(args, kwargs)

            return hook

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            if group.watched:
                group.hidden = _last(hidden_of(output), group.batch)
            raise StopForward

        first, last = self.layers[0], self.layers[-1]
        blocks = [self.architecture.block(i) for i in range(first, last + 1)]
        hooks = [
            block.register_forward_pre_hook(calling(first + i), with_kwargs=True) for i, block in enumerate(blocks)
        ]
        skipped = [] if group.watched else blocks[1:]
        form: list[Any] = []
        hooks.append(blocks[0].register_forward_hook(lambda _module, _args, output: form.append(output)))
        with (
            self._kept(group, first),
            hooked(*hooks, blocks[-1].register_forward_hook(finish)),
            skip_blocks(skipped, form),
        ):
            try:
                run_base(self.architecture, group.batch)
            except StopForward:
                return group
        raise AssertionError("the forward ended before the last edited layer had run")

    @contextmanager
    def _kept(self, group: _Group, layer: int) -> Iterator[None]:
        """While a group runs: keep the block's states; where the keys are the last thing wanted, stop at them."""
        ends = layer == self.layers[-1] and not group.watched

        def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            group.inputs = split_hidden(args, kwargs)[2]

        def reading(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            group.mlp = args[0].reshape(*group.batch.ids.shape, -1)
            if ends:
                raise StopForward

        def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
            group.output = hidden_of(output)

        block, down = self.architecture.block(layer), self.architecture.down(layer)
        with hooked(
            block.register_forward_pre_hook(entering, with_kwargs=True),
            down.register_forward_pre_hook(reading),
            block.register_forward_hook(leaving),
        ):
            yield


class _Addition:
    """What W + U V computes beyond W: by the factors, or multiplied out where they have too high a rank to pay."""

    def __init__(self, update: LowRank) -> None:
        d_out, d_in = update.shape
        dense = update.U.shape[1] * (d_out + d_in) > d_out * d_in
        self.factors = (update.matrix(update.U.dtype, update.U.device),) if dense else (update.V, update.U)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out), in the dtype of the factors."""
        for factor in self.factors:
            x = nn.functional.linear(x.to(factor), factor.to(x.device))
        return x

    def hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output + self(args[0])).to(output.dtype)


def _last(states: Tensor, batch: Batch) -> Tensor:
    """The last real position of each row, in memory of its own."""
    last = (batch.mask.sum(1) - 1).to(states.device)
    return states[torch.arange(len(last), device=states.device), last].clone()
