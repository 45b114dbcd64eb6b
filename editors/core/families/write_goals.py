"""What a method that writes many facts over several layers still has to write: a goal, layer by layer.

    HiddenGoal    Z, the hidden state behind the last edited layer. A layer's share is a difference of the residual
                  stream, which its MLP has to give: R_l = (Z - H) / (layers left) / gain_l. (MEMIT: Meng et al. 2023,
                  section 4.3; the gain is 1 in their models, see residual_gain.py)
    OutputGoal    delta_l, what the down projection of each layer has to give besides: R_l = delta_l, found by a joint
                  search. It is for models with a norm behind the MLP, which lets no difference of the residual stream
                  through as it is

Legend: n requests; L layers; Z, H (d, n) wanted and present hidden states; R (d, n) residuals; delta (L, d, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class HiddenGoal:
    """Hidden states to reach behind the last layer.

    Attributes:
        Z: (d, n) the hidden states.
        gains: Of each edited layer, what its block multiplies the MLP's output by.
        distances: ||Z - H|| (n,) before each layer's update, and after the last.
    """

    Z: Tensor
    gains: Sequence[float]
    distances: list[Tensor] = field(default_factory=list)

    def residual(self, step: int, H: Tensor) -> Tensor:
        """Return R (d, n): the share of what remains that the layer at index `step` has to write.

        Each layer takes its share of what remains, so that errors of the layers below are corrected.
        """
        left = self.Z - H.to(self.Z.device)
        self.distances.append(left.norm(dim=0))
        return left / (len(self.gains) - step) / self.gains[step]

    def wrote(self, step: int, written: Tensor, H: Tensor) -> None:  # noqa: ARG002
        """Note what came of it: `written` (d, n) is what the update adds to the projection's output, H comes after."""
        if step == len(self.gains) - 1:
            self.distances.append((self.Z - H.to(self.Z.device)).norm(dim=0))


class RootGoal(HiddenGoal):
    """As HiddenGoal, but a layer's share is R_l = (Z - H) / sqrt(layers left), so that lower layers write more.

    (PMET: Li et al. 2024.)
    """

    def residual(self, step: int, H: Tensor) -> Tensor:
        """Return R (d, n) for the layer at index `step`."""
        left = self.Z - H.to(self.Z.device)
        self.distances.append(left.norm(dim=0))
        return left / (len(self.gains) - step) ** 0.5


@dataclass
class OutputGoal:
    """What the down projections have to give besides what they give already.

    Attributes:
        deltas: (L, d, n) for each edited layer.
        distances: The norm (n,) of all that is not yet written, before each layer's update and after the last.
    """

    deltas: Tensor
    distances: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left = self.deltas.clone()
        self._note()

    def residual(self, step: int, H: Tensor) -> Tensor:  # noqa: ARG002
        """Return R (d, n) for the layer at index `step`."""
        return self.deltas[step]

    def wrote(self, step: int, written: Tensor, H: Tensor) -> None:  # noqa: ARG002
        """Note what came of it: `written` (d, n) is what the update adds to the projection's output."""
        self._left[step] -= written
        self._note()

    def _note(self) -> None:
        self.distances.append(torch.linalg.vector_norm(self._left, dim=(0, 1)))


Goal = HiddenGoal | OutputGoal
