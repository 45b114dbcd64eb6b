"""MEMIT: a method that writes many facts over several layers, by one least-squares solve per layer.

    A = (lambda C + K K^T)^-1 K,    W' = W + R A^T

Meng et al. 2023, "Mass-Editing Memory in a Transformer", equation 14. Legend in core/families/mass_editing.py; C (d_in,
d_in) second moment of the keys; lambda = mom2_update_weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from errata.editors.core.config import check_positive
from errata.editors.core.errors import StatisticsError
from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
from errata.editors.core.solve.solvers import Factor, Inverse, memit_adjoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(MassEditingConfig):
    """MEMIT's fields; defaults are those of the authors' files for GPT-J."""

    mom2_update_weight: float | None = None
    """lambda: weight of preserving other keys, relative to the keys of the batch; null: the width d_in of a key, or
    GPT-J's 15000 as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("mom2_update_weight",))


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
        """
        width = self.architecture.map_at(self.layers[0]).shape[1]
        return {**super().rules(), "mom2_update_weight": 15000.0 if self.config.as_published else float(width)}

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        weight = self.settings.mom2_update_weight
        assert weight is not None  # filled in by `rules`
        return memit_adjoint(K, lambda: self.moment(layer), weight, self._factor_or_none(layer))

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
