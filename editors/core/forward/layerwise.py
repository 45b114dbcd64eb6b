"""Walk up through the edited layers of a model, running no block twice that an edit leaves unchanged.

MEMIT and its kin edit several layers, the lower ones first: the keys of a layer depend on the updates below it. Rows
end at the position that is read. The first forward runs from the tokens to the first edited layer and reads its keys.
Then the update of that layer takes effect (it is added to the layer's output, not written to the weights), and the rows
go on from there to the next edited layer. So the keys of all layers cost one forward that ends at the last of them.

The solve also needs the hidden state that some rows (the watched ones) have after the last edited layer. Only these
rows go on to it each time.

Example: two rows of five tokens, four blocks, edited layers 1 and 2, row 0 watched. The key of a row is what enters the
MLP's down projection at position 4, the last.

                first forward                          advance(update of layer 1)
                row 0 (watched)     row 1              row 0 (watched)     row 1
    block 3     . . . . .           . . . . .          . . . . .           . . . . .
    block 2     R R R R R           . . . . .          R R R R R           K K K K K
    block 1     R R R R R           R R R R R          + + + + +           + + + + +
    block 0     R R R R R           R R R R R          . . . . .           . . . . .

    R: the block runs      K: it runs up to its down projection, whose input is the key      .: it does not run
    +: kept, not run: its output and what its down projection read; the update of that is added to the output

Before that, row 0 alone is tried once: does what an update adds to the MLP's output reach the block's output unchanged?
If it does not (a norm or a factor may follow the MLP), block 1 runs again, with the update added inside.

After the update of the last layer the watched rows alone go on, to the end of that block. So `hidden` tells in the end
what the updates have made of it.

Shapes: r rows, w watched rows, d hidden size, d_in width of the keys, n rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import BlockCall, hidden_of, skip_blocks, split_hidden
from errata.editors.core.forward.residual_gain import residual_gain
from errata.editors.core.ledger.adapter_hooks import active_hooks
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.activations import StopForward, batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import Batch, right_padded


@dataclass
class _Group:
    """Rows that run together, and their states at the layer where the walk is.

    States that are not needed stay empty: `output` where the block is not run to its end, `hidden` where no row is
    watched.

    Attributes:
        batch: The rows.
        watched: Whether the final hidden state of the rows is wanted. All rows of a group agree.
        calls: How the model calls each block from the first edited one on.
        inputs: (rows, length, d) input of the walk's block.
        mlp: (rows, length, d_in) input of its down projection.
        output: (rows, length, d) output of the block.
        hidden: (rows, d) output of the last edited block at the last position; (rows, length, d) of a walk that reads
            every position.
    """

    batch: Batch
    watched: bool
    calls: dict[int, BlockCall] = field(default_factory=dict)
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    mlp: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def keys(self) -> Tensor:
        """(rows, d_in): what the down projection reads at the last position."""
        return _last(self.mlp, self.batch)


class LayerWalk:
    """Keys and final hidden states of rows, layer by layer, each layer with the updates of those below in effect.

    Usage:
        walk = LayerWalk(architecture, rows, layers, pad=pad, watched=bare)
        for layer in layers:
            update = solve(walk.keys, walk.hidden)
            walk.advance(update)

    Args:
        architecture: The model.
        rows: Token ids, each cut off at the position to read.
        layers: The edited layers, ascending.
        pad: Id to pad with.
        watched: Indices of the rows whose final hidden state is wanted.
        site: What `hidden` is: the output of the last edited block, or that of its down projection ("mlp").
        everywhere: Whether every position of every row is wanted, as `states` gives them; `keys` and `hidden` are not.
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
        site: Literal["block", "mlp"] = "block",
        everywhere: bool = False,
        batch_tokens: int = 16384,
    ) -> None:
        self.architecture, self.layers, self._site = architecture, tuple(layers), site
        self._everywhere = everywhere
        self._step = 0
        wanted = {tuple(rows[i]) for i in watched}
        distinct = sorted({tuple(row) for row in rows}, key=lambda row: (row not in wanted, len(row), row))
        index = {row: i for i, row in enumerate(distinct)}
        self._index = torch.tensor([index[tuple(row)] for row in rows])
        self._watched = self._index[list(watched)]
        bound = limit_batch_tokens(batch_tokens, architecture.device)
        with torch.no_grad():
            self._plain = len(self.layers) > 1 and self._adds_plainly(right_padded(distinct[:1], pad))
            self._groups = [
                self._first(_Group(right_padded(group, pad).to(architecture.device), some is wanted))
                for some in (wanted, set(distinct) - wanted)
                for group in batches_by_length([row for row in distinct if row in some], bound)
            ]

    @property
    def keys(self) -> Tensor:
        """(r, d_in): inputs of the down projection of the walk's layer at the last position."""
        keys = torch.cat([group.keys for group in self._groups])
        return keys[self._index.to(keys.device)]

    @property
    def hidden(self) -> Tensor:
        """(w, d): what the last edited layer gives at the last position of watched rows, with the updates so far."""
        hidden = torch.cat([group.hidden for group in self._groups if group.watched])
        return hidden[self._watched.to(hidden.device)]

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Return (length, d_in) keys and (length, d) final hidden states of each row, at every position."""
        lengths = [group.batch.mask.sum(1).tolist() for group in self._groups]
        found = [
            (group.mlp[row, :length], group.hidden[row, :length])
            for group, own in zip(self._groups, lengths, strict=True)
            for row, length in enumerate(own)
        ]
        return [found[i] for i in self._index.tolist()]

    @torch.no_grad()
    def advance(self, update: LowRank) -> None:
        """Put `update` into effect at the walk's layer and go on to the next layer, if there is one."""
        layer = self.layers[self._step]
        self._step += 1
        added = _Addition(update)
        if self._step == len(self.layers):
            for group in (group for group in self._groups if group.watched):
                if self._site == "mlp":
                    group.hidden = (group.hidden + added(group.keys)).to(group.hidden.dtype)
                else:
                    group.hidden = self._wanted(self._under(added, group, layer), group.batch)
            return
        for group in self._groups:
            hidden = self._under(added, group, layer)
            for i in range(layer + 1, self.layers[self._step]):
                hidden = self._block(group, i, hidden)
            self._arrive(group, hidden)

    def _wanted(self, states: Tensor, batch: Batch) -> Tensor:
        return states.clone() if self._everywhere else _last(states, batch)

    def _under(self, added: _Addition, group: _Group, layer: int) -> Tensor:
        """Return the block's output (rows, length, d) with the update in effect."""
        if self._plain:
            return (group.output + added(group.mlp)).to(group.output.dtype)
        # The update stands for a change of the weights, so it comes before the hooks of edits on the model.
        with hooked(self.architecture.down(layer).register_forward_hook(added.hook, prepend=True)):
            return self._block(group, layer, group.inputs)

    def _arrive(self, group: _Group, hidden: Tensor) -> None:
        """Run the walk's block on `hidden` as far as needed; for watched rows also the blocks up to the last edited."""
        layer = self.layers[self._step]
        with self._kept(group, layer), self._reading(group):
            try:
                hidden = self._block(group, layer, hidden)
            except StopForward:
                return
        if group.watched:
            with self._reading(group):
                for i in range(layer + 1, self.layers[-1] + 1):
                    hidden = self._block(group, i, hidden)
            if self._site == "block":
                group.hidden = self._wanted(hidden, group.batch)

    def _block(self, group: _Group, layer: int, hidden: Tensor) -> Tensor:
        call = group.calls[layer]
        return hidden_of(self.architecture.block(layer)(hidden, *call.args, **call.kwargs))

    def _adds_plainly(self, batch: Batch) -> bool:
        """Return whether what an update adds to the MLP's output reaches the block's output unchanged.

        One row is tried. Where an edit on the model acts on a down projection, it may treat each row differently, so
        one row proves nothing and the answer is no.
        """
        if any(active_hooks(self.architecture.down(layer)) for layer in self.layers):
            return False
        layer = self.layers[0]
        group = self._first(_Group(batch.to(self.architecture.device), True))
        return residual_gain(self.architecture, layer, group.inputs, group.calls[layer], group.output) == 1

    def _first(self, group: _Group) -> _Group:
        """Run a group from the tokens to the first edited layer, and record how the model calls the blocks above.

        The blocks above run for watched rows only. For the others they are skipped, as only their calls are needed.
        """

        def calling(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                args, kwargs, _ = split_hidden(args, kwargs)
                group.calls[layer] = BlockCall(args, kwargs)

            return hook

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            if group.watched and self._site == "block":
                group.hidden = self._wanted(hidden_of(output), group.batch)
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
            self._reading(group),
            hooked(*hooks, blocks[-1].register_forward_hook(finish)),
            skip_blocks(skipped, form),
        ):
            try:
                run_base(self.architecture, group.batch)
            except StopForward:
                return group
        raise AssertionError("the forward ended before the last edited layer had run")

    @contextmanager
    def _reading(self, group: _Group) -> Iterator[None]:
        """Read what the down projection of the last edited block gives, where that is wanted of the group."""

        def leaving(_module: nn.Module, _args: Any, output: Tensor) -> None:
            group.hidden = _last(output.reshape(*group.batch.ids.shape, -1), group.batch)

        is_read = group.watched and self._site == "mlp"
        down = self.architecture.down(self.layers[-1])
        with hooked(*([down.register_forward_hook(leaving)] if is_read else [])):
            yield

    @contextmanager
    def _kept(self, group: _Group, layer: int) -> Iterator[None]:
        """Keep the states of a block while a group runs, and stop at the keys where nothing above is wanted."""
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
    """What W + U V computes beyond W: with the factors, or with the product where their rank is too high to pay off."""

    def __init__(self, update: LowRank) -> None:
        d_out, d_in = update.shape
        dense = update.U.shape[1] * (d_out + d_in) > d_out * d_in
        self.factors = (update.matrix(update.U.dtype, update.U.device),) if dense else (update.V, update.U)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out), in the dtype of the factors."""
        for factor in self.factors:
            x = nn.functional.linear(x.to(factor), factor.to(x.device))
        return x

    def hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output + self(args[0])).to(output.dtype)


def _last(states: Tensor, batch: Batch) -> Tensor:
    """Return the states at the last real position of each row, as a copy."""
    last = (batch.mask.sum(1) - 1).to(states.device)
    return states[torch.arange(len(last), device=states.device), last].clone()
