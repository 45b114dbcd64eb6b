"""What the records beside a linear map share: whether they fit it, whether it gives whole rows, and sums of factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.errors import ArchitectureError, LedgerError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.parts import features


def check_shape(module: nn.Module, shape: tuple[int, int]) -> None:
    """Refuse a module that is no linear map of a shape (d_out, d_in).

    Raises:
        LedgerError: It is not.
    """
    if features(module) != shape:
        raise LedgerError(f"expected a linear map of {shape} features (out, in), got {features(module)}")


def check_site(module: nn.Module, shape: tuple[int, int], reads: str | None) -> None:
    """Refuse a module that a change (d_out, d_in) of a map cannot be added to.

    Args:
        module: The map itself, or what stands behind it.
        shape: (d_out, d_in) of the map.
        reads: Name of the map, if the module is not the map.

    Raises:
        LedgerError: It has other features.
    """
    if reads is None:
        check_shape(module, shape)
        return
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.shape[0] != shape[0]:
        raise LedgerError(
            f"expected a module that gives {shape[0]} features, got one with a weight of {tuple(weight.shape)}"
        )


def require_rows(method: str, module: nn.Module, x: Tensor) -> None:
    """Refuse an input that does not say which tokens belong to one row.

    Raises:
        ArchitectureError: It is not (rows, tokens, width).
    """
    if x.ndim != 3:
        raise ArchitectureError(
            f"{method} looks at whole rows and needs inputs (rows, tokens, width), and {type(module).__name__} got "
            f"{tuple(x.shape)}; edit this model with another method"
        )


def added_factors(factors: Sequence[LowRank], device: torch.device) -> LowRank:
    """Return the sum of updates as factors, side by side, on a device."""
    with arithmetic.plain_arithmetic(device.type):
        U = torch.cat([each.U.to(device) for each in factors], dim=1)
        V = torch.cat([each.V.to(device) for each in factors], dim=0)
    return LowRank(U, V)


def multipliers(factors: LowRank) -> tuple[Tensor, ...]:
    """Return what an input is multiplied by: V and U, or their product where their rank is too high to pay off."""
    U, V = factors.tensors
    whole = U.shape[1] * (U.shape[0] + V.shape[1]) > U.shape[0] * V.shape[1]
    return (factors.matrix(U.dtype, U.device),) if whole else (V, U)


def multiplied(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return an input (..., d_in) times the matrices, (..., d_out), in their dtype."""
    for matrix in matrices:
        x = linear(x.to(matrix), matrix)
    return x
