"""MEND: a method whose trained network transforms the gradient of a fact into an edit.

    dL/dW = sum_t delta_t x_t^T,    (x~_t, delta~_t) = g(x_t, delta_t),    W' = W + alpha sum_t delta~_t x~_t^T

Mitchell et al. 2022, "Fast Model Editing at Scale", sections 3.1 and 3.2. One forward pass, and one backward pass down
to the lowest edited layer, give the gradient of the new answer's loss as factors, one pair per token. A small network g
and a rate alpha per weight transform them into the factors of the edit. There is no search at edit time. g and alpha
are trained on many edits, to minimise

    c_edit * L_e + c_loc * L_loc,    L_e = -log p'(new answer | other words),    L_loc = KL(p || p') on unrelated text

(equations 4a and 4b), where p' is the edited model. If the authors' code and the paper differ, this follows the code:
the update is added, so that training makes the rates negative, and a batch of requests is one gradient. A network that
was trained on batches of another size (`edit_bs`) has seen gradients of another scale.

Legend: x (t, d_in) the inputs of a linear map at t tokens; delta (t, d_out) the gradients of its outputs; x~ and delta~
the factors after g; W (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.config import check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.families.gradient_editor import GradientEditor, GradientEditorConfig
from errata.editors.core.families.hypernetwork import Hypernetwork
from errata.editors.core.forward.gradient_factors import Factors


@dataclass(frozen=True, kw_only=True)
class MENDConfig(GradientEditorConfig):
    """MEND's fields; defaults are those of the authors' files for GPT-2 XL and GPT-J."""

    n_hidden: int = 1
    """Number of hidden layers of g."""

    shared: bool = True
    """Whether weights of one shape share a network, with a scale and an offset per weight; false: one per weight."""

    norm: bool = True
    """Whether x and delta are normalised by their mean and standard deviation in training."""

    lr_lr: float = 1e-4
    """Learning rate of the rates alpha. (It has no effect in the authors' code, which trains them with `lr`.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("lr_lr",))
        check_least(self, {"n_hidden": 0})


class MEND(GradientEditor):
    """Model editor networks with gradient decomposition (Mitchell et al. 2022)."""

    name = "mend"
    Config = MENDConfig
    config: MENDConfig
    structural = ("layers", "projections", "n_hidden", "rank", "combine", "shared", "norm")

    def default_layers(self) -> tuple[int, ...]:
        """Return the last three, as in the authors' files."""
        count = self.architecture.n_layers
        return tuple(range(max(0, count - 3), count))

    def build(self, generator: torch.Generator) -> Hypernetwork:
        return Hypernetwork(
            [(linear_map.shape[1], linear_map.shape[0]) for linear_map in self.maps],
            n_hidden=self.config.n_hidden,
            rank=self.config.rank,
            combine=self.config.combine,
            shared=self.config.shared,
            norm=self.config.norm,
            edit_lr=self.config.edit_lr,
            dtype=working_dtype(self.architecture.dtype),
            generator=generator,
        )

    def transform(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """Return the factors after the network: (alpha x~ (t, d_in), delta~ (t, d_out)) for each weight."""
        device = self.architecture.device
        return [self.network(i, f.x.to(device), f.delta.to(device)) for i, f in enumerate(factors)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        # The rates alpha have their own learning rate.
        rates = self.network.edit_lrs
        others = [parameter for parameter in self.network.parameters() if parameter is not rates]
        return [{"params": others, "lr": self.config.lr}, {"params": [rates], "lr": self.config.lr_lr}]
