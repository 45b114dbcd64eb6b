"""How large the hidden state is that each block gives: where it explodes, a token has become an attention sink."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import hidden_of
from errata.editors.core.model.activations import StopForward, batches_by_length, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked
from errata.editors.core.model.tokens import right_padded


@torch.inference_mode()
def last_state_norms(
    architecture: Architecture, rows: Sequence[Sequence[int]], blocks: int, *, pad: int, batch_tokens: int = 8192
) -> Tensor:
    """Return the norms of the hidden states that the first `blocks` blocks give at the last token of each row.

    Args:
        architecture: The model.
        rows: Token ids, each row cut off at the token to read.
        blocks: How many blocks to read; the forward stops after them.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a batch.

    Returns:
        (rows, blocks) in float64, on the CPU.
    """
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    index_of = {row: i for i, row in enumerate(distinct)}
    norms = torch.zeros(len(distinct), blocks, dtype=torch.float64)
    done = 0
    with evaluating(architecture.model):
        for group in batches_by_length(distinct, batch_tokens):
            batch = right_padded(group, pad).to(architecture.device)
            last = batch.mask.sum(1) - 1
            states: list[Tensor] = []

            def keep(_module: nn.Module, _args: Any, output: Any, states: list[Tensor] = states) -> None:
                states.append(hidden_of(output))
                if len(states) == blocks:
                    raise StopForward

            handles = [architecture.block(i).register_forward_hook(keep) for i in range(blocks)]
            with hooked(*handles), suppress(StopForward):
                run_base(architecture, batch)
            for i, state in enumerate(states):
                at = state[torch.arange(len(group), device=state.device), last.to(state.device)]
                norms[done : done + len(group), i] = at.double().norm(dim=-1).cpu()
            done += len(group)
    return norms[[index_of[tuple(row)] for row in rows]]
