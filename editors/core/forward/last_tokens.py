"""Let the last block compute only what is read of it: the prediction after the last token of a row.

Queries, keys and values of all tokens are needed for that. The output of the attention and the MLP are not: hooks give
them the last token alone. The block adds what they return to the hidden states of all tokens, so that what it gives is
right at the last token and meaningless before it. Blocks where that does not work are tried once, and then left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from errata.editors.core.errors import ArchitectureError
from errata.editors.core.forward.upper_blocks import prepare_upper_blocks
from errata.editors.core.forward.whole_rows import tried_once
from errata.editors.core.ledger.adapter_hooks import reads_layout
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import differ, hooked, trial_rows


@contextmanager
def only_last_tokens(architecture: Architecture) -> Iterator[None]:
    """Narrow the last block's attention output and MLP to the last token of each row, inside the `with`."""
    layer = architecture.n_layers - 1
    down = architecture.down(layer)
    entrances = [found.module for found in architecture.mlp_maps(layer).values() if found.module is not down]
    modules = [architecture.attention_out(layer), *entrances]
    with hooked(*(module.register_forward_pre_hook(_narrow) for module in modules)):
        yield


def last_tokens_agree(architecture: Architecture) -> bool:
    """Return whether the last block gives the same at the last token where it is narrowed to it."""

    def trial() -> bool:
        try:
            with only_last_tokens(architecture):
                pass
        except ArchitectureError:  # the last block has no attention or no dense MLP
            return False
        rows = trial_rows(architecture.model, 5)
        upper = prepare_upper_blocks(architecture, rows, first=architecture.n_layers - 1, pad=rows[0][0])
        whole = upper.run()
        with only_last_tokens(architecture):
            narrowed = upper.run()
        return narrowed.shape == whole.shape and not differ(narrowed[:, -1], whole[:, -1])

    return not reads_layout(architecture.model) and tried_once(architecture, "last tokens", trial)


def _narrow(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = args[0]
    if isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[1] > 1:  # OPT flattens rows and tokens
        return (x[:, -1:], *args[1:])
    return None
