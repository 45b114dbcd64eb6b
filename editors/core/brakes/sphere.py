"""SPHERE, a brake that acts on an update once it is solved: it leaves out the leading directions of the weight.

    D <- D (I - alpha Q Q^T), Q the leading directions of the rows of W, each scaled to norm 1, that hold the share eta
    of their energy (as in EasyEdit's models/SPHERE)

It sees W as it stands before the edit, with earlier edits on it. Within a batch of several layers, keys and residuals
are still those of the updates before the brake, as in the authors' code. SPHERE projects the input side on every
model; EasyEdit's code takes the other side on GPT-2, whose weights are stored transposed.

RECT, the other brake on updates, is a rule of masks (algebra/mask_rules.py).

Legend: W, D (d_out, d_in) weight and update; Q (d_in, r).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import find_weight
from errata.editors.core.ledger.patch import LowRank, Update

# Added to the norm of a row in the authors' code.
EPSILON = 1e-8


def leading_directions(W: Tensor, energy: float) -> Tensor:
    """Return Q (d_in, r), float64: r = 1 + how many leading directions hold together at most the share `energy`.

    Args:
        W: (d_out, d_in) the weight as it stands.
        energy: eta, a share of the sum of eigenvalues.
    """
    rows = W.double()
    rows = rows / (rows.norm(dim=1, keepdim=True) + EPSILON)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) / values.sum() <= energy).sum())
    return vectors[:, : min(count, len(values))]


def off_sphere(update: LowRank, Q: Tensor, alpha: float) -> LowRank:
    """Return D (I - alpha Q Q^T), as factors."""
    V = update.V.double()
    Q = Q.to(V)
    return LowRank(update.U, (V - alpha * (V @ Q) @ Q.T).to(update.V.dtype))


class Sphere:
    """The projection that a configuration asks for.

    Args:
        alpha: How much of the leading directions is left out; None: no projection.
        energy: eta.
    """

    def __init__(self, alpha: float | None, energy: float) -> None:
        self.alpha, self.energy = alpha, energy
        # By name of a weight: its checksum, and its leading directions, which are kept until the weight changes.
        self._leading: dict[str, tuple[int, Tensor]] = {}

    def act(self, model: nn.Module, name: str, update: Update) -> Update:
        """Return the update of a weight of the model after the projection."""
        if not isinstance(update, LowRank) or self.alpha is None:
            return update
        weight = find_weight(model, name)
        W = weight.parameter.detach().T if weight.transposed else weight.parameter.detach()
        return off_sphere(update, self._directions(name, W), self.alpha)

    def _directions(self, name: str, W: Tensor) -> Tensor:
        checksum = arithmetic.checksum(W)
        if name not in self._leading or self._leading[name][0] != checksum:
            self._leading[name] = (checksum, leading_directions(W, self.energy))
        return self._leading[name][1]
