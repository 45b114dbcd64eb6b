"""Read activations inside a model, such as the keys of an MLP, and leave no trace: hooks and flags end with the `with`.

Reading keys costs little, for four reasons. Rows end at the position that is read, as a decoder never looks ahead. Each
distinct row runs once. Batches hold rows of similar length. The forward stops at the last module that is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked
from errata.editors.core.model.tokens import Batch, right_padded

Row = TypeVar("Row", bound=Sequence[int])
# Tokens of a batch per thread of a CPU: what its caches hold.
CPU_TOKENS = 1024


class StopForward(Exception):
    """Raised by a hook to end the forward, once everything wanted has been read."""


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off the caller's `torch.autocast` inside the `with`, so that results have the model's own precision."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def run_base(architecture: Architecture, batch: Batch) -> Tensor:
    """Return the decoder's hidden states (rows, length, d), after the final norm, for rows padded on the right.

    The padding is not masked. No real token looks ahead at it, and no one reads its states. A mask would keep attention
    kernels from their fast causal path. It would also give NaN where a sliding window holds nothing but padding. But an
    edit that acts at some positions of a row listens to what the decoder is given, and has to know where rows end.
    """
    is_read = bool(architecture.base._forward_pre_hooks_with_kwargs)
    output = architecture.base(
        input_ids=batch.ids,
        attention_mask=batch.mask if is_read else torch.ones_like(batch.mask),
        position_ids=batch.positions,
        use_cache=False,
    )
    return output.last_hidden_state


@contextmanager
def captured_inputs(modules: Sequence[nn.Module], *, stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of some modules during one forward: {index in `modules`: tensor}.

    Args:
        modules: The modules.
        stop: End the forward with StopForward at the last module of the list, which must be the last to run.
    """
    seen: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0]
            if stop and index == len(modules) - 1:
                raise StopForward

        return keep

    with hooked(*(module.register_forward_pre_hook(hook(i)) for i, module in enumerate(modules))):
        yield seen


def run_until_captured(architecture: Architecture, batch: Batch, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the inputs (rows, length, ...) of `modules`, given in the order in which they run. Stop at the last."""
    with captured_inputs(modules) as seen:
        try:
            run_base(architecture, batch)
        except StopForward:
            # OPT flattens rows and positions into one dimension before its MLP.
            return [seen[i].reshape(*batch.ids.shape, -1) for i in range(len(modules))]
    raise AssertionError("the forward ended before the last module of the list had run")


@torch.no_grad()
def sees_context(architecture: Architecture, module: nn.Module) -> bool:
    """Return whether a module's input at a token depends on the tokens before it.

    Two rows with the same last token are tried: below the first attention, their bits are the same.
    """
    batch = right_padded([[0, 2], [1, 2]], 0).to(architecture.device)
    with evaluating(architecture.model):
        (x,) = run_until_captured(architecture, batch, [module])
    return not torch.equal(x[0, 1], x[1, 1])


@torch.inference_mode()
def last_keys(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    pad: int,
    batch_tokens: int = 8192,
) -> dict[int, Tensor]:
    """Return the keys at the last token of each row, for all `layers` in one pass: inputs of the down projections.

    Args:
        architecture: The model.
        rows: Token ids, each row cut off at the position to read.
        layers: Ascending or not; the forward stops after the highest.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a batch.

    Returns:
        {layer: (rows, d_in)} in the model's dtype and on its device.
    """
    order = sorted(set(layers))
    modules = [architecture.down(layer) for layer in order]
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    index_of = {row: i for i, row in enumerate(distinct)}
    parts: list[list[Tensor]] = [[] for _ in order]
    with evaluating(architecture.model):
        for group in batches_by_length(distinct, batch_tokens):
            batch = right_padded(group, pad).to(architecture.device)
            last = batch.mask.sum(1) - 1
            inputs = run_until_captured(architecture, batch, modules)
            for part, tensor in zip(parts, inputs, strict=True):
                part.append(tensor[torch.arange(len(group), device=tensor.device), last.to(tensor.device)])
    index = torch.tensor([index_of[tuple(row)] for row in rows])
    return {layer: torch.cat(part)[index.to(part[0].device)].clone() for layer, part in zip(order, parts, strict=True)}


def limit_batch_tokens(batch_tokens: int, device: torch.device) -> int:
    """Return the bound on a batch's tokens. A CPU gets what its caches hold: larger batches take 1.7 times as long."""
    return min(batch_tokens, CPU_TOKENS * torch.get_num_threads()) if device.type == "cpu" else batch_tokens


def batches_by_length(
    rows: Sequence[Row], batch_tokens: int, *, even: bool = False, growth: int = 0, max_padding: float = 1.0
) -> Iterator[list[Row]]:
    """Split rows, sorted by ascending length, into batches.

    Args:
        rows: The rows.
        batch_tokens: Bound on rows x longest row of a batch; a longer row is a batch of its own.
        even: Put rows of one length only into a batch, so that there is no padding.
        growth: Tokens that each row will grow by, counted for the bound.
        max_padding: Bound on the share of padding in each batch, of the grown rows.
    """
    group: list[Row] = []
    tokens = 0
    for row in rows:
        length = len(row) + growth
        cells = (len(group) + 1) * length
        is_padded = tokens + length < (1 - max_padding) * cells
        if group and (cells > batch_tokens or is_padded or (even and len(row) != len(group[0]))):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    if group:
        yield group
