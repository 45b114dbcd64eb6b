"""Run the upper blocks of a model again and again, while modules in them are trained.

As long as nothing below a block changes, its input does not change. So rows run once up to that block. Each later
forward begins there, with the arguments that the model itself gives to that block and to those above.

Shapes: b rows, L longest row (rows are padded on the right), d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import BlockCall, hidden_of, select_rows, skip_blocks, split_hidden
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded


@dataclass(frozen=True)
class UpperBlocks:
    """Rows at the input of block `first`, ready to run from there to the last block.

    Attributes:
        architecture: The model.
        first: The first block that runs.
        hidden: (b, L, d) input of block `first`.
        calls: How the model calls it and each block above.
        lengths: Tokens of each row that run, without padding.
        starts: The column of each row at which it begins to run; empty: all begin at their first.
    """

    architecture: Architecture
    first: int
    hidden: Tensor
    calls: tuple[BlockCall, ...]
    lengths: tuple[int, ...]
    starts: tuple[int, ...] = ()

    def run(self) -> Tensor:
        """Return the output (b, L, d) of the last block, with the modules as they are now."""
        hidden = self.hidden.clone()  # a block may add to it in place
        for layer, call in enumerate(self.calls, self.first):
            hidden = hidden_of(self.architecture.block(layer)(hidden, *call.args, **call.kwargs))
        return hidden

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the decoder's output (..., d) of what `run` gives: apply the final norm."""
        return self.architecture.normed(hidden)

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of what `run` gives (..., d): apply the final norm and the head."""
        return self.architecture.readout(hidden)

    def select(self, rows: Sequence[int]) -> UpperBlocks | None:
        """Return these rows only, or None if an argument of a block cannot be split by rows."""
        index = torch.tensor(rows, device=self.hidden.device)
        kept = select_rows(self.calls, index, len(self.lengths))
        if kept is None:
            return None
        lengths = tuple(self.lengths[row] for row in rows)
        starts = tuple(self.starts[row] for row in rows) if self.starts else ()
        return UpperBlocks(self.architecture, self.first, self.hidden[index], kept, lengths, starts)


@torch.no_grad()
def prepare_upper_blocks(
    architecture: Architecture, rows: Sequence[Sequence[int]], *, first: int, pad: int
) -> UpperBlocks:
    """Run rows of token ids once, up to block `first`. The blocks above it do not run: only their calls are kept.

    Args:
        architecture: The model.
        rows: Token ids, of any lengths.
        first: The lowest block that will change.
        pad: Id to pad with.
    """
    calls: list[BlockCall] = []
    entered: list[Tensor] = []
    form: list[Any] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs, hidden = split_hidden(args, kwargs)
        calls.append(BlockCall(args, kwargs))
        if not entered:
            entered.append(hidden.clone())

    blocks = list(architecture.blocks)[first:]
    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    # Block `first` does run, because the skipped blocks must return their hidden state in the same form as it does.
    hooks.append(blocks[0].register_forward_hook(lambda _module, _args, output: form.append(output)))
    with hooked(*hooks), skip_blocks(blocks[1:], form):
        run_base(architecture, right_padded(rows, pad).to(architecture.device))
    return UpperBlocks(architecture, first, entered[0], tuple(calls), tuple(map(len, rows)))
