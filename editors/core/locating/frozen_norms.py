"""A norm with its statistics held fixed, which is a linear map: the norm of a sum is the sum of its parts' images.

    norm(sum of parts) = frozen(part 1) + frozen(part 2) + ... + bias

So what one attention head gives can be followed through the norm behind the attention (Gemma 2, OLMo 2) or the final
norm, at the length that all parts together have. The norm is not looked up by name. Its factor is what it multiplies
its input by, and its bias is what it does not turn round when the input's sign is turned round.

Shapes: T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError
from errata.editors.core.model import parts
from errata.editors.core.model.own_forward import MISFIT

# A norm of twice its input is the same, or twice as long where it divides by nothing; with this error at most, since
# norms add a little to what they divide by.
MOST_ERROR = 0.02


@dataclass(frozen=True)
class FrozenNorm:
    """A linear map in the place of a norm.

    Attributes:
        factor: (T, d) in float64, on the CPU.
        is_centred: Whether the norm takes the mean out first, as LayerNorm does.
        bias: (T, d) what it adds, whatever the input.
    """

    factor: Tensor
    is_centred: bool
    bias: Tensor

    def __call__(self, part: Tensor) -> Tensor:
        """Return what the norm makes of parts (..., T, d) of its input, without the bias."""
        return self.factor * (part - part.mean(-1, keepdim=True) if self.is_centred else part)

    def at(self, token: int) -> FrozenNorm:
        """Return the map at one token, for parts (..., d)."""
        return FrozenNorm(self.factor[token], self.is_centred, self.bias[token])


@torch.no_grad()
def freeze(module: nn.Module, given: Tensor, name: str = "") -> FrozenNorm:
    """Return the linear map that a norm is at its input.

    Args:
        module: The norm.
        given: (T, d) its input.
        name: The name of the module, for the message.

    Raises:
        ArchitectureError: the module is no norm: it bends what it is given, or mixes its elements in another way.
    """
    rows = given[None]
    tried = [rows, -rows, 2 * rows, rows + given.abs().mean()]
    try:
        there, mirrored, twice, moved = (exact(module(row)[0]) for row in tried)
    except MISFIT as error:
        raise _refusal(module, name) from error
    bias = (there + mirrored) / 2
    odd = there - bias
    is_centred = _same(moved, there)
    centre = exact(given)
    centre = centre - centre.mean(-1, keepdim=True) if is_centred else centre
    if not any(_same(twice - bias, length * odd) for length in (1, 2)):
        raise _refusal(module, name)
    # An element that is 0 stays 0.
    return FrozenNorm(torch.where(centre == 0, 0.0, odd / centre), is_centred, bias)


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU: shares are differences of sums that are nearly the same."""
    return tensor.detach().to("cpu", torch.float64)


def _refusal(module: nn.Module, name: str) -> ArchitectureError:
    return ArchitectureError(
        f"{name} ({type(module).__name__}) stands behind an attention or MLP, and was expected to be a norm; it bends "
        "what it is given, so that there are no parts of what it gives"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= MOST_ERROR * b.norm())


@dataclass(frozen=True)
class FrozenTail:
    """What a decoder does behind its last block, as a linear map at one hidden state.

    Attributes:
        steps: Norms, frozen, and the matrices (d_out, d_in) of projections.
    """

    steps: tuple[FrozenNorm | Tensor, ...]

    def __call__(self, part: Tensor) -> Tensor:
        """Return what is read of parts (..., d) of the hidden state, without what is added to any of them."""
        for step in self.steps:
            part = step(part) if isinstance(step, FrozenNorm) else part @ step.T
        return part


@torch.no_grad()
def freeze_tail(tail: Sequence[nn.Module], hidden: Tensor) -> FrozenTail:
    """Return the linear map that final norm and projections are at a hidden state.

    Args:
        tail: The modules (`Architecture.tail`).
        hidden: (d,) what the last block gives.

    Raises:
        ArchitectureError: one is neither a norm nor a linear map.
    """
    steps: list[FrozenNorm | Tensor] = []
    for module in tail:
        if parts.features(module) is not None:
            weight = exact(module.get_parameter("weight"))
            steps.append(weight.T if parts.is_transposed(module) else weight)
        else:
            steps.append(freeze(module, hidden[None]).at(0))
        hidden = module(hidden[None, None])[0, 0]
    return FrozenTail(tuple(steps))
