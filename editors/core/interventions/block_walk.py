"""Walk up a model block by block while the blocks are compressed, each with the inputs that the compressed ones give.

The rows run once from the tokens to the first block. From there each block runs twice: to read the inputs of its linear
maps, and, once they are compressed, for the inputs of the next block. So the pass costs two forwards in all, however
many blocks there are.

Shapes: r rows of a group, l their length, d hidden size, d_in width of a map's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError, StatisticsError
from errata.editors.core.forward.block_calls import hidden_of
from errata.editors.core.forward.upper_blocks import UpperBlocks, prepare_upper_blocks
from errata.editors.core.forward.whole_rows import blocks_chain
from errata.editors.core.ledger.adapter_hooks import reads_layout
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens
from errata.editors.core.model.architecture import Architecture, LinearMap
from errata.editors.core.model.own_forward import hooked

Read = Callable[[str, Tensor], None]


class BlockWalk:
    """Rows on their way through the blocks.

    Usage:
        walk = BlockWalk(architecture, rows)
        for layer in range(architecture.n_layers):
            walk.read(layer, maps, add)     # calls add(name, inputs) for every group of rows
            ...                             # change the block
            walk.advance(layer)

    Args:
        architecture: The model.
        rows: Token ids.
        batch_tokens: Bound on rows x length of a group; a CPU takes less, see `limit_batch_tokens`.

    Raises:
        ArchitectureError: The blocks do not hand over one hidden state, or an edit acts at some positions of a row.
        StatisticsError: There are no rows.
    """

    def __init__(self, architecture: Architecture, rows: Sequence[Sequence[int]], *, batch_tokens: int = 8192) -> None:
        if not rows:
            raise StatisticsError("there is no text to compress by: it holds no token; pass a longer one")
        if reads_layout(architecture.model):
            raise ArchitectureError(
                "the model carries an edit of behaviour that acts at some positions of a row, and blocks are "
                "compressed one after another, each by itself; undo that edit, compress, and apply it again"
            )
        if not blocks_chain(architecture):
            raise ArchitectureError(
                f"the blocks of {type(architecture.model).__name__} hand over more than one hidden state, so that they "
                "cannot be compressed one after another; magnitude and rtn need no text, and so no pass"
            )
        self.architecture, self.rows = architecture, len(rows)
        bound = limit_batch_tokens(batch_tokens, architecture.device)
        # Groups of one length have no padding, which would count as input.
        groups = batches_by_length(sorted(rows, key=len), bound, even=True)
        self._groups = [prepare_upper_blocks(architecture, group, first=0, pad=0) for group in groups]
        self._hidden = [group.hidden for group in self._groups]

    def read(self, layer: int, maps: Sequence[LinearMap], add: Read) -> None:
        """Run a block as it is now, and hand the inputs (r x l, d_in) of its maps over: `add(name, inputs)`."""

        def hook(name: str) -> Any:
            def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                add(name, args[0].detach().reshape(-1, args[0].shape[-1]))

            return keep

        with hooked(*(found.module.register_forward_pre_hook(hook(found.name)) for found in maps)):
            for group, hidden in zip(self._groups, self._hidden, strict=True):
                self._run(layer, group, hidden)

    def advance(self, layer: int) -> None:
        """Run a block as it is now, for the inputs of the next one."""
        self._hidden = [
            self._run(layer, group, hidden) for group, hidden in zip(self._groups, self._hidden, strict=True)
        ]

    def _run(self, layer: int, group: UpperBlocks, hidden: Tensor) -> Tensor:
        safe_point()
        call = group.calls[layer]
        # A block may add to its input in place.
        return hidden_of(self.architecture.block(layer)(hidden.clone(), *call.args, **call.kwargs))
