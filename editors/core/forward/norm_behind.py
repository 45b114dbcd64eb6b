"""The norm between a block's MLP and the residual stream, where there is one.

    output = input + norm(mlp)        Gemma 2 and 3, OLMo 2

Such a norm gives every output of the MLP about the same length, so that the MLP can move the hidden state no farther
than that. What stands behind the norm can. The norm is not looked up by name: it is the module that is given the
MLP's output, and whose own output reaches the block's output as it is. Both are tried on one row.

Shapes: d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import hidden_of
from errata.editors.core.model import parts
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked, trial_rows
from errata.editors.core.model.tokens import right_padded

# Tokens of the row that a block is tried on.
TRIED = 3
# A vector as long as the block's output arrives with this error at most, in units of the dtype's precision.
MOST_ERROR = 32


@torch.no_grad()
def norm_behind(architecture: Architecture, layer: int) -> tuple[str, nn.Module] | None:
    """Return the module between the MLP of a block and the residual stream, with its name in the model.

    Args:
        architecture: The model, which is tried as it stands.
        layer: The block, counted from 0.

    Returns:
        The last module that is given what the down projection gives, changes it, and whose output is added to the
        residual stream unchanged; None where there is none. A norm behind that addition (OPT 350M, BERT) is no such
        module: it is given the sum.
    """
    block, down = architecture.block(layer), architecture.down(layer)
    if any(parameter.is_meta for parameter in block.parameters()):
        return None
    given: list[Tensor] = []
    found: list[str] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        given[:] = [output]

    def meets(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            same = given and args and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            if same and _equal(args[0], given[0]) and not _equal(output, given[0]):
                found.append(name)

        return hook

    leaves = {name: m for name, m in block.named_modules() if name and not parts.linears(m)}
    hooks = [down.register_forward_hook(keep), *(m.register_forward_hook(meets(name)) for name, m in leaves.items())]
    with evaluating(architecture.model):
        with hooked(*hooks):
            plain = _block_output(architecture, layer)
        if not found or plain.dim() != 3:
            return None
        vector = plain[0, 0].flip(-1).roll(1, -1)
        with hooked(leaves[found[-1]].register_forward_hook(lambda _module, _args, output: output + vector)):
            moved = _block_output(architecture, layer)
    error = float(((moved - plain).double() - vector.double()).norm(dim=-1).max())
    if error > MOST_ERROR * torch.finfo(plain.dtype).eps * float(plain.double().norm(dim=-1).max()):
        return None
    return f"{architecture.blocks_path}.{layer}.{found[-1]}", leaves[found[-1]]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b)


def _block_output(architecture: Architecture, layer: int) -> Tensor:
    """Return what the block gives for one row of a few tokens, (1, tokens, d)."""
    seen: list[Tensor] = []
    row = trial_rows(architecture.model, TRIED)[0]
    keep = architecture.block(layer).register_forward_hook(
        lambda _m, _a, output: seen.append(hidden_of(output).clone())
    )
    with hooked(keep):
        run_base(architecture, right_padded([row], row[0]).to(architecture.device))
    return seen[0]
