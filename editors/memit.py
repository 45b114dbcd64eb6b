"""MEMIT: a method that writes many facts over several layers, by one least-squares solve per layer.

    A = (lambda C + K K^T)^-1 K,    W' = W + R A^T

Meng et al. 2023, "Mass-Editing Memory in a Transformer", equation 14. Legend in core/families/mass_editing.py; C (d_in,
d_in) second moment of the keys; lambda = mom2_update_weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from errata.editors.core.config import check_positive
from errata.editors.core.errors import StatisticsError
from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
from errata.editors.core.solve.solvers import Factor, Inverse, memit_adjoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(MassEditingConfig):
    """MEMIT's fields; defaults are those of the authors' files for GPT-J."""

    mom2_update_weight: float = 15000.0
    """lambda: weight of preserving other keys, relative to the keys of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("mom2_update_weight",))


class MEMIT(MassEditor):
    """Mass-editing memory (Meng et al. 2023)."""

    name = "memit"
    Config = MEMITConfig
    config: MEMITConfig

    def setup(self) -> None:
        super().setup()
        self._singular: set[int] = set()

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        weight = self.config.mom2_update_weight
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
