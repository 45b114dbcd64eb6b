"""Reading a model from the inside without a trace: no hook, flag or gradient survives the `with` block.

Reading keys costs little: rows are cut off at the position that is read (a decoder never looks ahead), each distinct
row runs once, in batches of like length, and the forward stops at the last module wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.tokens import Batch, right_padded

Row = TypeVar("Row", bound=Sequence[int])
# Tokens of a batch for each thread of a CPU.
CPU_TOKENS = 1024


class StopForward(Exception):
    """Raised by a hook once everything wanted has been seen."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own training flag as before afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside, so that autograd keeps nothing for them; as before afterwards."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove the given hook handles on leaving."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_base(architecture: Architecture, batch: Batch) -> Tensor:
    """Hidden states (rows, length, d) of the decoder for rows padded on the right, the final norm applied.

    The padding is not masked: no token looks ahead at it, and its own states are nobody's business. Masked, it would
    cost the kernels their causal short cut and, in a sliding window of padding only, see nothing and become NaN.
    """
    output = architecture.base(
        input_ids=batch.ids,
        attention_mask=torch.ones_like(batch.mask),
        position_ids=batch.positions,
        use_cache=False,
    )
    return output.last_hidden_state


@contextmanager
def captured_inputs(modules: Sequence[nn.Module], *, stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of some modules during one forward: {place in `modules`: tensor}.

    With `stop`, the forward ends with StopForward at the last module of the list, which must be the last to run.
    """
    seen: dict[int, Tensor] = {}

    def hook(place: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[place] = args[0]
            if stop and place == len(modules) - 1:
                raise StopForward

        return keep

    with hooked(*(module.register_forward_pre_hook(hook(i)) for i, module in enumerate(modules))):
        yield seen


def run_until_captured(architecture: Architecture, batch: Batch, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Inputs (rows, length, ...) of `modules`, given in the order in which they run; the forward stops at the last."""
    with captured_inputs(modules) as seen:
        try:
            run_base(architecture, batch)
        except StopForward:
            # OPT flattens rows and positions into one dimension before its MLP.
            return [seen[i].reshape(*batch.ids.shape, -1) for i in range(len(modules))]
    raise AssertionError("the forward ended before the last module of the list had run")


@torch.no_grad()
def sees_context(architecture: Architecture, module: nn.Module) -> bool:
    """Whether what a token brings to a module depends on the tokens before it. Tried on two rows that end alike, up to
    the module: below the first attention, the bits are the same."""
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
    """Keys at the last token of each row: inputs of the down projections, for all `layers` in one pass.

    Args:
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
    place = {row: i for i, row in enumerate(distinct)}
    parts: list[list[Tensor]] = [[] for _ in order]
    with evaluating(architecture.model):
        for group in batches_by_length(distinct, batch_tokens):
            batch = right_padded(group, pad).to(architecture.device)
            last = batch.mask.sum(1) - 1
            inputs = run_until_captured(architecture, batch, modules)
            for part, tensor in zip(parts, inputs, strict=True):
                part.append(tensor[torch.arange(len(group), device=tensor.device), last.to(tensor.device)])
    index = torch.tensor([place[tuple(row)] for row in rows])
    return {layer: torch.cat(part)[index.to(part[0].device)].clone() for layer, part in zip(order, parts, strict=True)}


def limit_batch_tokens(batch_tokens: int, device: torch.device) -> int:
    """The tokens of a batch: no more than a CPU's caches hold, which a larger one leaves at 1.7 times the time."""
    return min(batch_tokens, CPU_TOKENS * torch.get_num_threads()) if device.type == "cpu" else batch_tokens


def batches_by_length(
    rows: Sequence[Row], batch_tokens: int, *, even: bool = False, growth: int = 0
) -> Iterator[list[Row]]:
    """Split rows that are sorted by ascending length so that rows x longest stays within the bound, once each has grown
    by `growth` tokens; `even` batches hold rows of one length, and so no padding."""
    group: list[Row] = []
    for row in rows:
        full = (len(group) + 1) * (len(row) + growth) > batch_tokens
        if group and (full or (even and len(row) != len(group[0]))):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
