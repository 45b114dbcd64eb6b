"""MEMIT: a method that writes many facts over several layers, by one least-squares solve per layer.

    A = (lambda C + K K^T)^-1 K,    W' = W + R A^T

Meng et al. 2023, "Mass-Editing Memory in a Transformer", equation 14. Two fields add to the system:

    past_keys       K_p K_p^T, the keys of earlier edits ("MEMIT_seq", the baseline of Fang et al. 2025). With the same
                    values, a sequence of batches then writes what one batch of all requests writes: it is recursive
                    least squares. tests/editors/test_brakes.py shows it
    norm_penalty    mu I, a penalty on the norm of the update (ENCORE: Gupta et al. 2025)

The papers print either form, with and without past keys, as "MEMIT".

Legend in core/families/mass_editing.py; C (d_in, d_in) second moment of the keys; K_p (d_in, N) keys of earlier edits;
lambda = mom2_update_weight; mu = norm_penalty.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.brakes.past_values import ridge_columns
from errata.editors.core.config import check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import StatisticsError
from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
from errata.editors.core.ledger import arithmetic
from errata.editors.core.solve.solvers import Factor, Inverse, factorise, memit_adjoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(MassEditingConfig):
    """MEMIT's fields; defaults are those of the authors' files for GPT-J."""

    ADDED = MappingProxyType({**MassEditingConfig.ADDED, "norm_penalty": 0.0})

    mom2_update_weight: float | None = None
    """lambda: weight of preserving other keys, relative to the keys of the batch; null: the width d_in of a key, or a
    tenth of it behind norms, or GPT-J's 15000 as published."""

    norm_penalty: float = 0.0
    """mu: weight of a small norm of the update, which adds mu I to the system (ENCORE has 10 or 20)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("mom2_update_weight",))
        check_least(self, {"norm_penalty": 0})


class MEMIT(MassEditor):
    """Mass-editing memory (Meng et al. 2023)."""

    name = "memit"
    Config = MEMITConfig
    config: MEMITConfig
    settings: MEMITConfig
    advice = MappingProxyType({"share": "lower mom2_update_weight"})

    def setup(self) -> None:
        super().setup()
        self._singular: set[int] = set()

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields: lambda is the width of a key.

        For a single key k, the update writes the share g / (lambda + g) of its residual, g = k^T C^-1 k. Over the text
        of the second moment g has the mean trace(C^-1 C) = d_in. So lambda = d_in writes half of the residual of a key
        that is as usual as those of the text, in every model. The authors' weights are 0.92 d_in (GPT-J, 15000), 1.05
        d_in (Llama 3 8B, 15000) and 3.1 d_in (GPT-2 XL, 20000). A fixed 15000 is 9.8 d_in in SmolLM2-135M.

        Behind norms lambda is d_in / 10, which writes 91 %. There each layer has a vector of its own, and no layer
        above makes up for what is left. On the development facts of the testbed's model of Gemma 3's shape (n = 16),
        reliability, generalization and locality were 75, 84 and 92 % with d_in, and 100, 100 and 88 % with a tenth.
        """
        width = self.architecture.map_at(self.layers[0]).shape[1]
        weight = 15000.0 if self.config.as_published else width if self.gains else width / 10
        return {**super().rules(), "mom2_update_weight": float(weight)}

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        weight, past = self.settings.mom2_update_weight, self._past_keys(layer)
        assert weight is not None  # filled in by `rules`
        factor = self._factor_or_none(layer)
        if not self.remembers:
            return memit_adjoint(K, lambda: self.moment_with_penalty(layer), weight, factor)
        strength = self.strength(layer)
        if not isinstance(factor, Factor):  # singular, or the authors' explicit inverse: one factorisation of the sum
            M = torch.cat([*(keys.to(K) for _, keys in past), K], dim=1)
            return self._system(layer, M, strength).solve(K)

        def columns(keys: Tensor) -> Tensor:
            return factor.half(keys.to(factor.lower)) / weight**0.5

        K = arithmetic.contiguous_copy(K.to(working_dtype(self.architecture.dtype)))  # as the ledger stores it
        return factor.second_half(self.past.adjoint(layer, past, K, columns, strength)) / weight**0.5

    def past_adjoint(self, layer: int, K: Tensor, strength: float) -> Tensor:
        """Return (q lambda C + K K^T)^-1 K for the keys of earlier edits."""
        weight, factor = self.settings.mom2_update_weight, self._factor_or_none(layer)
        assert weight is not None
        if not isinstance(factor, Factor):
            return self._system(layer, K, strength).solve(K).double()
        return factor.second_half(ridge_columns(factor.half(K) / weight**0.5, strength)) / weight**0.5

    def _system(self, layer: int, M: Tensor, strength: float) -> Factor | Inverse:
        """Return the factor of q lambda C + M M^T for all keys M (d_in, N)."""
        weight = self.settings.mom2_update_weight
        assert weight is not None
        system = strength * weight * self.moment_with_penalty(layer).double() + M @ M.T
        return factorise(system, name="plus the keys of all edits")

    def moment_with_penalty(self, layer: int) -> Tensor:
        """Return C + mu / lambda I, which lambda is multiplied with; just C without `norm_penalty`."""
        return self._shifted(self.moment(layer))

    def factor(self, layer: int) -> Factor | Inverse | None:
        """Return the factor of C + mu / lambda I."""
        if not self.config.norm_penalty or layer in self._factors:
            return super().factor(layer)
        dtype = getattr(torch, self.config.mom2_dtype)
        C = self.moment_with_penalty(layer)
        with self.clock.one_off("factors"):
            self._factors[layer] = factorise(C, dtype, f"of layer {layer}", self.singular_advice)
        return self._factors[layer]

    def _shifted(self, C: Tensor) -> Tensor:
        weight, penalty = self.settings.mom2_update_weight, self.config.norm_penalty
        assert weight is not None
        return C.double() + penalty / weight * torch.eye(len(C), dtype=torch.float64, device=C.device) if penalty else C

    def _factor_or_none(self, layer: int) -> Factor | Inverse | None:
        """Return the factor of C, or None if C is singular: lambda C + K K^T may still have a factor."""
        if layer in self._singular:
            return None
        try:
            return self.factor(layer)
        except StatisticsError as error:
            logger.warning("%s; solving with the sum of it and the keys instead", error)
            self._singular.add(layer)  # warn once per layer
            return None
