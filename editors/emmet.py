"""EMMET: a method that writes the values of a batch exactly, and changes other keys' values as little as possible.

    A^T = (K^T C'^-1 K + epsilon I)^-1 K^T C'^-1,    C' = lambda C + mu I,    W' = W + R A^T

Gupta et al. 2024, "A Unified Framework for Model Editing": it extends ROME's equality constraint to many facts. With
epsilon > 0, nearly dependent keys stay solvable. As in the authors' code, a single request is solved without epsilon.
With `past_keys`, which the authors do not have, C' also holds K_p K_p^T, the keys of earlier edits.

Legend in core/families/mass_editing.py; C (d_in, d_in) second moment of the keys; lambda = mom2_update_weight; mu =
update_norm_lambda; epsilon = emmet_lambda.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.brakes.past_values import ridge_columns
from errata.editors.core.config import check_least, check_positive
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.layer_choice import single_layer
from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
from errata.editors.core.solve.solvers import Factor, Inverse, factorise, small_adjoint


@dataclass(frozen=True, kw_only=True)
class EMMETConfig(MassEditingConfig):
    """EMMET's fields; defaults are those of the authors' file for GPT-2 XL."""

    mom2_update_weight: float | None = None
    """lambda: scale of the second moment in C'. It cancels if mu and epsilon are 0. The larger it is, the more effect
    epsilon has. null: the width d_in of a key, or GPT-2 XL's 1000 as published."""

    update_norm_lambda: float = 0.0
    """mu: weight of a small norm of the update."""

    emmet_lambda: float = 0.1
    """epsilon: ridge on the batch's Gram matrix, for more than one request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("mom2_update_weight",))
        check_least(self, {"update_norm_lambda": 0, "emmet_lambda": 0})
        if (self.past_keys or self.writes_back) and self.mom2_dtype == "float32":
            raise ConfigError("past_keys: give mom2_dtype=float64; with an explicit inverse there is no growing factor")


class EMMET(MassEditor):
    """Equality-constrained mass editing (Gupta et al. 2024)."""

    name = "emmet"
    Config = EMMETConfig
    config: EMMETConfig
    settings: EMMETConfig
    advice = MappingProxyType({"share": "lower emmet_lambda, or give fewer requests at a time"})
    singular_advice = "give more text, or raise update_norm_lambda"

    def default_layers(self) -> tuple[int, ...]:
        """Return one layer, as ROME does. The authors' files edit 17 of 48 (GPT-2 XL) and 5 of 28 (GPT-J)."""
        return (single_layer(self.architecture.n_layers),)

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields: lambda is the width of a key.

        In a batch, epsilon and lambda act as a ridge epsilon lambda against g = k^T C^-1 k, whose mean over the text of
        the second moment is d_in: of a usual key's residual, d_in / (d_in + epsilon lambda) is written. With lambda =
        d_in and epsilon = 0.1 that is 91 % in every model. The authors' weights give 98 % (GPT-2 XL, 1000) and 94 %
        (GPT-J, 10000).
        """
        width = self.architecture.map_at(self.layers[0]).shape[1]
        return {**super().rules(), "mom2_update_weight": 1000.0 if self.config.as_published else float(width)}

    @property
    def _scale(self) -> float:
        """lambda, as `rules` has filled it in."""
        assert self.settings.mom2_update_weight is not None
        return self.settings.mom2_update_weight

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        factor, past = self.factor(layer), self._past_keys(layer)

        def columns(keys: Tensor) -> Tensor:
            assert isinstance(factor, Factor)
            return factor.half(keys.to(factor.lower)) / self._scale**0.5

        if past:  # (q C' + K_p K_p^T)^-1 K
            assert isinstance(factor, Factor)  # else the configuration refuses past keys
            strength = self.strength(layer)
            left = self.past.factor(layer, past, columns, strength).leftover(columns(K)) / strength
            Y = factor.second_half(left) / self._scale**0.5
        else:
            Y = factor.solve(K).double() / self._scale  # C'^-1 K
        return small_adjoint(K, Y, self.config.emmet_lambda if K.shape[1] > 1 else 0.0)

    def past_adjoint(self, layer: int, K: Tensor, strength: float) -> Tensor:
        """Return (q C' + K K^T)^-1 K for the keys of earlier edits."""
        factor = self.factor(layer)
        assert isinstance(factor, Factor)
        return factor.second_half(ridge_columns(factor.half(K) / self._scale**0.5, strength)) / self._scale**0.5

    def factor(self, layer: int) -> Factor | Inverse:
        """Return the factor of C' / lambda."""
        if layer not in self._factors:
            # C' / lambda = C + (mu / lambda) I; `adjoint` divides by lambda afterwards.
            C = self.moment(layer).double()
            ridge = self.config.update_norm_lambda / self._scale
            shifted = C + ridge * torch.eye(len(C), dtype=C.dtype, device=C.device)
            dtype = getattr(torch, self.config.mom2_dtype)
            with self.clock.one_off("factors"):
                self._factors[layer] = factorise(shifted, dtype, f"of layer {layer}", self.singular_advice)
        return self._factors[layer]
