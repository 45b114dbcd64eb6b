"""How what a block's MLP says reaches the block's output: unchanged, times a factor, or through a norm.

    output = input + attention + mlp             most decoders, Cohere's parallel blocks among them: the gain is 1
    output = input + c (attention + mlp)         Granite's residual multiplier: the gain is c
    output = input + norm(mlp)                   Gemma 2 and 3, OLMo 2: a norm stands behind, and there is no gain

A method that wants the output to move by r writes r / gain into the MLP. Behind a norm no such vector need exist,
since a norm gives every output the same length. A block is tried, not looked up by name: a vector as long as the
block's output is added to what the down projection gives. Where it comes out as a multiple of itself, the multiple is
the gain.

Shapes: b rows, s positions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import BlockCall, hidden_of, split_hidden
from errata.editors.core.ledger.adapter_hooks import reads_layout
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked, trial_rows
from errata.editors.core.model.tokens import right_padded

# Tokens of the row that a block is tried on.
TRIED = 3
# Behind a norm, a vector comes out with an error of about 0.7; behind a factor, bfloat16 leaves about 0.02.
MOST_ERROR = 0.1


@torch.no_grad()
def residual_gains(architecture: Architecture, layers: Sequence[int]) -> dict[int, float | None]:
    """Return the gain of each of these layers' blocks, None where there is no single factor.

    The model is tried as it stands, on one row of a few tokens. A block whose edit has to be told where the tokens of a
    row stand cannot run by itself: then the model is tried without its edits, which leave the gain as it is.
    """
    if reads_layout(architecture.model):
        with Ledger.of(architecture.model).untouched():
            return residual_gains(architecture, layers)
    seen: dict[int, tuple[BlockCall, Tensor]] = {}
    outputs: dict[int, Tensor] = {}

    def entering(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs, hidden = split_hidden(args, kwargs)
            seen[layer] = BlockCall(args, kwargs), hidden.clone()  # Falcon's blocks add to it in place

        return hook

    def leaving(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[layer] = hidden_of(output).clone()

        return hook

    hooks = [
        hook
        for layer in layers
        for hook in (
            architecture.block(layer).register_forward_pre_hook(entering(layer), with_kwargs=True),
            architecture.block(layer).register_forward_hook(leaving(layer)),
        )
    ]
    row = trial_rows(architecture.model, TRIED)[0]
    with evaluating(architecture.model):
        with hooked(*hooks):
            run_base(architecture, right_padded([row], row[0]).to(architecture.device))
        return {
            layer: residual_gain(architecture, layer, inputs, call, outputs[layer])
            for layer, (call, inputs) in seen.items()
        }


def residual_gain(
    architecture: Architecture, layer: int, inputs: Tensor, call: BlockCall, output: Tensor
) -> float | None:
    """Return what a vector added to the MLP's output is multiplied by on its way to the block's output.

    Args:
        architecture: The model.
        layer: The block.
        inputs: (b, s, d) what the block reads.
        call: Its other arguments.
        output: (b, s, d) what it gives.

    Returns:
        The factor; exactly 1 where the vector arrives unchanged, and None where it arrives as no multiple of itself: a
        norm follows the MLP, an edit on the model replaces the MLP's output, or the block carries several streams, as
        Gemma 3n's, to which it predicts and mixes what the MLP gives.
    """
    if inputs.dim() != 3:
        return None
    vectors = output[:, 0].flip(-1).roll(1, -1)
    allowed = 32 * torch.finfo(output.dtype).eps * float(vectors.double().norm())
    change = _change(architecture, layer, inputs, call, output, vectors)
    if float((change - vectors.double()).norm()) <= allowed:
        return 1.0
    gain, error = _multiple(change, vectors)
    # In half precision `allowed` is as long as what a norm gives, so that the error has to be small beside the change.
    if error > min(allowed, MOST_ERROR * float(change.norm())):
        return None
    # A norm lets a vector through like a factor if it is short beside the MLP's output. But twice that output, which is
    # another vector added, is nothing to a norm.
    own = _mlp_output(architecture, layer, inputs, call)
    same, _ = _multiple(_change(architecture, layer, inputs, call, output, own), own)
    return gain if abs(same - gain) <= MOST_ERROR * abs(gain) else None


def _mlp_output(architecture: Architecture, layer: int, inputs: Tensor, call: BlockCall) -> Tensor:
    """Return what the block's down projection gives at the first position, (b, d)."""
    seen: list[Tensor] = []
    keep = architecture.down(layer).register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    with hooked(keep):
        architecture.block(layer)(inputs, *call.args, **call.kwargs)
    return seen[0].reshape(*inputs.shape[:2], -1)[:, 0]


def _change(
    architecture: Architecture, layer: int, inputs: Tensor, call: BlockCall, output: Tensor, vectors: Tensor
) -> Tensor:
    """Return by how much the block's output (b, d) moves at the first position, in float64."""
    with hooked(architecture.down(layer).register_forward_hook(adder(vectors, inputs.shape), prepend=True)):
        moved = hidden_of(architecture.block(layer)(inputs, *call.args, **call.kwargs))
    return moved[:, 0].double() - output[:, 0].double()


def _multiple(change: Tensor, vectors: Tensor) -> tuple[float, float]:
    """Return the factor by which `vectors` fit `change` best, and the norm of what is left."""
    added = vectors.double()
    gain = float((change * added).sum() / (added * added).sum())
    return gain, float((change - gain * added).norm())


def adder(vectors: Tensor, shape: torch.Size) -> Callable[..., Tensor]:
    """Return a forward hook that adds `vectors` (b, d) to a down projection's output at the first of s positions."""

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = output.reshape(shape[0], shape[1], -1)
        first = rows[:, :1] + vectors.to(output)[:, None]
        return torch.cat([first, rows[:, 1:]], dim=1).reshape(output.shape)

    return add
