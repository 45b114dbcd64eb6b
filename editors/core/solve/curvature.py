"""The directions of a weight in which a loss hardly curves, by the two factors of its curvature (K-FAC).

    A = E[x x^T] = U_i diag(a) U_i^T,    S = E[g g^T] = U_o diag(s) U_o^T,    curvature of direction (i, j) = s_i a_j

For y = W x the curvature of a loss in W is about the Kronecker product of A and S (Martens and Grosse 2015). So all of
its d_out d_in eigenvalues come from two small decompositions. A projection onto some directions needs four products,
and no matrix of that many rows.

Shapes: A (d_in, d_in) second moment of the inputs x; S (d_out, d_out) second moment of the gradients g at the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.errors import StatisticsError


@dataclass(frozen=True)
class CurvatureProjector:
    """The projection G -> U_o ((U_o^T G U_i) * M) U_i^T onto the directions of low curvature.

    Attributes:
        inputs: U_i (d_in, d_in).
        outputs: U_o (d_out, d_out); None: the curvature depends on the input alone, and M is the same in every row.
        mask: M (d_out, d_in), or (d_in,) without `outputs`; 1 for directions of low curvature, else 0.
    """

    inputs: Tensor
    outputs: Tensor | None
    mask: Tensor

    @classmethod
    def low(cls, A: Tensor, S: Tensor | None, energy: float) -> CurvatureProjector:
        """Return the projection that leaves out the largest curvatures, those that hold `energy` of their sum.

        Without S it is the null space of AlphaEdit for the share 1 - `energy`. Where nothing curves, because every
        input or every gradient was zero, it leaves out nothing.

        Args:
            A: (d_in, d_in).
            S: (d_out, d_out); None: as if it were the identity.
            energy: A share from 0, which leaves out nothing, to below 1.

        Raises:
            StatisticsError: a matrix is not finite, or no direction is left.
        """
        a, inputs = _decompose(A, "inputs")
        s, outputs = (None, None) if S is None else _decompose(S, "gradients")
        products = a if s is None else torch.outer(s, a)
        if not energy or not bool(products.any()):
            return cls(inputs, outputs, torch.ones_like(products))
        ordered = products.flatten().sort(descending=True).values
        share = ordered.cumsum(0) / ordered.sum()
        last = min(int((share < energy).sum()), len(ordered) - 1)  # the one that completes the share goes too
        low = products < ordered[last]
        if not bool(low.any()):
            raise StatisticsError(
                f"no direction of low curvature is left: only all {len(ordered)} together hold {energy:g} of the "
                "curvature; lower energy_threshold, or give more text"
            )
        return cls(inputs, outputs, low.to(inputs.dtype))

    def to(self, device: torch.device, dtype: torch.dtype) -> CurvatureProjector:
        """Return this on another device, in another precision."""
        outputs = None if self.outputs is None else self.outputs.to(device, dtype)
        return CurvatureProjector(self.inputs.to(device, dtype), outputs, self.mask.to(device, dtype))

    def __call__(self, G: Tensor) -> Tensor:
        """Return the part of G (d_out, d_in) in the directions of low curvature."""
        if self.outputs is None:
            return ((G @ self.inputs) * self.mask) @ self.inputs.T
        return self.outputs @ ((self.outputs.T @ G @ self.inputs) * self.mask) @ self.inputs.T

    @property
    def free_share(self) -> float:
        """The share of all directions that are left."""
        return float(self.mask.double().mean())


def _decompose(C: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of C, none below zero, and its eigenvectors, in float64."""
    if not bool(torch.isfinite(C).all()):
        raise StatisticsError(f"the second moment of the {what} holds NaN or inf")
    values, vectors = torch.linalg.eigh(C.double())
    return values.clamp_min(0), vectors
