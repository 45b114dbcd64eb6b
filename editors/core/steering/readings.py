"""Hidden states of contrast sets: what modules give or are given, at the last token or averaged over a continuation.

Legend: n texts; m modules; d width of what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.steering.kinds import READS

Side = Literal["output", "input"]
Text = tuple[list[int], int]  # token ids, and where the continuation begins in them


@torch.no_grad()
def read_states(
    architecture: Architecture,
    texts: Sequence[Text],
    modules: Sequence[nn.Module],
    *,
    pad: int,
    side: Side = "output",
    read: str = "mean",
    batch_tokens: int = 8192,
) -> Tensor:
    """Return what some modules give for texts, with the model as it stands.

    Args:
        architecture: The model.
        texts: Token ids, each with where its continuation begins.
        modules: The modules to read; their outputs may be the first of a tuple.
        pad: Id to pad with.
        side: Whether to read outputs or inputs.
        read: The "mean" over the continuation, or the "last" token.
        batch_tokens: Bound on rows x length of a batch.

    Returns:
        (m, n, d) in the model's working precision, on the CPU.

    Raises:
        ConfigError: There is no such way to read.
    """
    if read not in READS:
        raise ConfigError(f"read: expected {' or '.join(READS)}, got {read!r}")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    rows = [texts[i][0] for i in order]
    found: list[list[Tensor]] = [[] for _ in modules]
    limit, done = limit_batch_tokens(batch_tokens, architecture.device), 0
    with evaluating(architecture.model):
        for group in batches_by_length(rows, limit, even=looks_ahead(architecture.model)):
            batch = right_padded(group, pad).to(architecture.device)
            with _captured(modules, side) as seen:
                run_base(architecture, batch)
            spans = [texts[i] for i in order[done : done + len(group)]]
            done += len(group)
            for part, states in zip(found, seen, strict=True):
                states = states.reshape(*batch.ids.shape, -1).to(working_dtype(states.dtype))
                for row, (ids, start) in enumerate(spans):
                    mine = states[row, len(ids) - 1 : len(ids)] if read == "last" else states[row, start : len(ids)]
                    part.append(mine.mean(0).cpu())
    back = torch.tensor(order).argsort()
    return torch.stack([torch.stack(part)[back] for part in found])


@torch.no_grad()
def row_states(architecture: Architecture, ids: Sequence[int], module: nn.Module) -> Tensor:
    """Return what a module gives for each token of one text, (tokens, d), on the CPU."""
    batch = right_padded([list(ids)], ids[0]).to(architecture.device)
    with evaluating(architecture.model), _captured([module], "output") as seen:
        run_base(architecture, batch)
    return seen[0][0].cpu()


@contextmanager
def _captured(modules: Sequence[nn.Module], side: Side) -> Iterator[list[Tensor]]:
    seen: list[Any] = [None] * len(modules)

    def after(index: int) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        return keep

    def before(index: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[index] = args[0]

        return keep

    if side == "output":
        handles = [module.register_forward_hook(after(i)) for i, module in enumerate(modules)]
    else:
        handles = [module.register_forward_pre_hook(before(i)) for i, module in enumerate(modules)]
    with hooked(*handles):
        yield seen
