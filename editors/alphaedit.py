"""AlphaEdit: MEMIT's edit, projected so that it changes nothing in the directions that other keys use.

    A = (P (K K^T + K_p K_p^T) + L2 I)^-1 P K,    W' = W + R A^T

Fang et al. 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models". P projects onto the
eigenvectors of the keys' second moment with small eigenvalues. K_p are the keys of earlier edits, which the new edit
should not change. They are stored in the ledger's entries. So an undone edit no longer counts, and another model has
its own keys. Legend in core/families/mass_editing.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.brakes.past_keys import Past
from errata.editors.core.brakes.past_values import ridge_columns
from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError, StatisticsError
from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
from errata.editors.core.files.matrix_file import MatrixFile
from errata.editors.core.ledger import arithmetic
from errata.editors.core.model.texts import TextSource
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent
from errata.editors.core.solve.null_space import Projector, dense_adjoint

logger = logging.getLogger(__name__)

PUBLISHED_THRESHOLD, PUBLISHED_L2 = 0.02, 10.0
RIDGE = 0.1
"""The default ridge, as a share of what a key of the text has in the null space on average."""


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(MassEditingConfig):
    """AlphaEdit's fields; defaults are those of the authors' code for GPT-2 XL."""

    FILES = (*MassEditingConfig.FILES, "projector_file")

    nullspace_threshold: float | None = None
    """Eigenvectors of the second moment with eigenvalues below this span the null space. The unit is that of squared
    activations. null: 0.02, the authors'."""

    nullspace_energy: float | None = None
    """If given, this replaces the threshold: the smallest eigenvalues that together make up at most this share of the
    trace belong to the null space. It does not depend on the scale of activations."""

    projector_file: str | None = None
    """File of projectors computed before, as `errata convert projectors` writes it. No second moment is needed then."""

    L2: float | None = None
    """Ridge of the solve, in the unit of squared activations. null: with `nullspace_energy` a tenth of what keys have
    in the null space; else, as published and with projectors that are given, 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("L2",))
        if self.nullspace_energy is not None and self.nullspace_threshold is None:
            # It has no effect then. Runs of older versions, where it was the default, keep their names.
            object.__setattr__(self, "nullspace_threshold", PUBLISHED_THRESHOLD)
        if self.nullspace_energy is not None and not 0 < self.nullspace_energy < 1:
            raise ConfigError(f"nullspace_energy: expected a share between 0 and 1, got {self.nullspace_energy}")


class AlphaEdit(MassEditor):
    """Null-space constrained editing (Fang et al. 2025).

    Args:
        projectors: {layer: P (d_in, d_in)}, if they have been computed before. A matrix that is not a projector is
            used unchanged with a slower solve, and a warning is logged.
    """

    name = "alphaedit"
    Config = AlphaEditConfig
    config: AlphaEditConfig
    settings: AlphaEditConfig
    remembers_keys = True
    advice = MappingProxyType({"share": "lower L2, or raise nullspace_energy"})

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: AlphaEditConfig | Mapping[str, Any] | None = None,
        *,
        projectors: Mapping[int, Tensor] | None = None,
        moments: Mapping[int, Tensor] | None = None,
        text: TextSource | None = None,
        progress: Progress = silent,
    ) -> None:
        self._given_projectors = dict(projectors or {})
        super().__init__(model, tokenizer, config, moments=moments, text=text, progress=progress)

    def setup(self) -> None:
        super().setup()
        self._projectors: dict[int, Projector] = {}
        self._exact: dict[int, bool] = {}
        self._ridges: dict[int, float] = {}
        for layer, P in self._given_projectors.items():
            self._keep_projector(layer, self._checked(layer, P))

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields: the authors' numbers; with `nullspace_energy` the L2 of `ridge`.

        A threshold has the unit of squared activations, which differ between models and layers. At 0.02 the null space
        holds 2 % to 9 % of the trace on the testbed (layers 0 to 2), and 18 % to 50 % on SmolLM2-135M-Instruct (layers
        4 to 8, 35,000 tokens of ME-PPL), where it is hardly one.
        """
        config, found = self.config, {**super().rules(), "nullspace_threshold": PUBLISHED_THRESHOLD}
        by_energy = config.nullspace_energy is not None and not config.as_published
        return found if by_energy else {**found, "L2": PUBLISHED_L2}

    def ridge(self, layer: int) -> float:
        """Return L2 of a layer: the configured one, or a tenth of trace(P C).

        For a single key k, the update writes the share p / (L2 + p) of its residual, p = ||P k||^2. Over the text of
        the second moment p has the mean trace(P C). So L2 = trace(P C) / 10 writes 91 % of the residual of a usual key,
        in every model. A projector that was given comes without C. Then L2 is the authors' 10.
        """
        if self.settings.L2 is not None:
            return self.settings.L2
        if layer not in self._ridges:
            given = layer in self._given_projectors or self.config.projector_file is not None
            energy = PUBLISHED_L2 / RIDGE if given else self.projector(layer).energy(self.moment(layer))
            self._ridges[layer] = RIDGE * energy
        return self._ridges[layer]

    def projector(self, layer: int) -> Projector:
        """Return P of a layer. It is read from a file or computed when it is first needed."""
        if layer not in self._projectors and self.config.projector_file is not None:
            P = self._checked(layer, MatrixFile.open(self.config.projector_file, "projectors").matrix(layer))
            if not P.is_exact:  # `errata convert` writes no such matrix
                raise StatisticsError(
                    f"layer {layer}: the matrix in {self.config.projector_file} is no projector (P P = P = P^T fails "
                    f"by {P.error:.2g} of its norm); convert it again"
                )
            self._keep_projector(layer, P)
        elif layer not in self._projectors:
            moment, config = self.moment(layer), self.settings
            threshold = config.nullspace_threshold or 0.0
            with self.clock.one_off("factors"):
                P = Projector.null_space(moment, threshold=threshold, energy=config.nullspace_energy)
            logger.info("layer %d: a null space of %d of %d dimensions", layer, P.dimensions, len(P.columns))
            self._keep_projector(layer, P)
        return self._projectors[layer]

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        P = self.projector(layer)
        K = K.to(P.columns.device)  # the layer may be on another device, if a model is spread over several
        past = self._past_keys(layer)
        if not self._exact[layer]:  # the factors below need P P = P
            M = torch.cat([*(keys for _, keys in past), K], dim=1)
            return dense_adjoint(P.matrix(), M, K.shape[1], self.ridge(layer))
        K = arithmetic.contiguous_copy(K.to(P.dtype))  # as the ledger stores it, to be recognised
        ridge = self.ridge(layer) * self.strength(layer)
        return self.past.adjoint(layer, past, K, lambda keys: P @ keys.to(P.dtype), ridge)

    def past_adjoint(self, layer: int, K: Tensor, strength: float) -> Tensor:
        """Return P K (q L2 I + K^T P K)^-1 for the keys of earlier edits."""
        P = self._exact_projector(layer)
        return ridge_columns(P @ K.to(P.dtype), self.ridge(layer) * strength)

    def within(self, layer: int, D: Tensor) -> Tensor:
        """Return D P."""
        P = self._exact_projector(layer)
        return (P @ D.T.to(P.dtype)).T

    def _exact_projector(self, layer: int) -> Projector:
        P = self.projector(layer)
        if not self._exact[layer]:
            raise ConfigError("past_values, lyaplock: the matrix given is no projector, which these need")
        return P.to(P.columns.device, torch.float64)

    def _past_keys(self, layer: int) -> Past:
        device = self.projector(layer).columns.device
        return [(id_, keys.to(device)) for id_, keys in super()._past_keys(layer)]

    def _checked(self, layer: int, P: Tensor) -> Projector:
        width = self.architecture.map_at(layer).shape[1]
        if tuple(P.shape) != (width, width) or not bool(torch.isfinite(P).all()):
            raise StatisticsError(
                f"layer {layer}: expected a finite projector ({width}, {width}), got {tuple(P.shape)}; compute it on "
                "this model"
            )
        return Projector.from_matrix(P)

    def _keep_projector(self, layer: int, P: Projector) -> None:
        P = P.to(self.architecture.device, working_dtype(self.architecture.dtype))
        self._exact[layer] = P.is_exact
        if not self._exact[layer]:
            logger.warning(
                "layer %d: the matrix given is no projector (P P = P = P^T fails by %.2g of its norm); solving "
                "directly",
                layer,
                P.error,
            )
        self._projectors[layer] = P
