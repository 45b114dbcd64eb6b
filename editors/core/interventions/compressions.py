"""Pruning (magnitude, Wanda, SparseGPT) and quantisation (round to nearest, GPTQ) of all linear maps of the blocks.

Embeddings, norms and the head stay. What is computed is what a compressed model computes with, in the precision of the
weights: zeros are stored, and a weight of 4 bits takes as much memory as before.

Sources: hartvigsen-group/composable-interventions (wanda/lib/prune.py, wanda/lib/sparsegpt.py, and the quantisers of
GPTQ and AWQ that it calls).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError
from errata.editors.core.interventions.block_walk import BlockWalk
from errata.editors.core.interventions.calibration import CalibratedConfig, calibration_rows
from errata.editors.core.interventions.intervention import (
    Intervention,
    InterventionConfig,
    Kind,
    Rows,
    Step,
    maps_of,
    working,
)
from errata.editors.core.interventions.kept import Kept, OnGrid, Zeros
from errata.editors.core.model.architecture import Architecture, LinearMap
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress
from errata.editors.core.solve.pruning import magnitude_mask, sparsegpt, wanda_mask
from errata.editors.core.solve.quantising import Points, gptq, grid_of

TEXT = "calibration"
Compressed = tuple[Tensor, Kept]


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity: expected a share from 0 to below 1, got {sparsity}")


class WeightCompression(Intervention):
    """A compression that looks at the weights alone: it needs no text."""

    kind: ClassVar[Kind] = "compress"

    @abstractmethod
    def compressed(self, weight: Tensor) -> Compressed:
        """Return what a weight (d_out, d_in) becomes, and what is fixed of it."""

    def read(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, Rows]:  # noqa: ARG002
        return {}

    def steps(
        self,
        architecture: Architecture,
        rows: Mapping[str, Rows],  # noqa: ARG002
        progress: Progress,
    ) -> Iterator[Step]:
        for layer in range(architecture.n_layers):
            found = {one.name: self.compressed(working(one.weight)) for one in maps_of(architecture, layer)}
            yield step_of(found)
            progress(layer + 1, architecture.n_layers, f"{self.name} of blocks")


class InputCompression(Intervention):
    """A compression that measures the inputs of every map, block after block: those that compressed blocks give.

    All maps of a block see the inputs that the block has before any of them is compressed.
    """

    kind: ClassVar[Kind] = "compress"
    Config: ClassVar[type[InterventionConfig]] = CalibratedConfig

    @abstractmethod
    def statistics(self, found: LinearMap) -> InputSum:
        """Return what sums up the inputs of a map."""

    @abstractmethod
    def compressed(self, weight: Tensor, inputs: Tensor) -> Compressed:
        """Return what a weight (d_out, d_in) becomes, and what is fixed of it, given the sum of its inputs."""

    def read(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, Rows]:
        return {TEXT: calibration_rows(model, tokenizer, self.config)}

    def steps(self, architecture: Architecture, rows: Mapping[str, Rows], progress: Progress) -> Iterator[Step]:
        walk = BlockWalk(architecture, rows[TEXT])
        for layer in range(architecture.n_layers):
            maps = maps_of(architecture, layer)
            sums = {found.name: self.statistics(found) for found in maps}
            walk.read(layer, maps, lambda name, x, sums=sums: sums[name].add(x))
            # A map that no token has reached, such as an expert's, has no inputs to go by.
            seen = [found for found in maps if sums[found.name].is_used]
            yield step_of({f.name: self.compressed(working(f.weight), sums[f.name].value(walk.rows)) for f in seen})
            del sums
            walk.advance(layer)
            progress(layer + 1, architecture.n_layers, f"{self.name} of blocks")


class InputSum:
    """The sum of x x^T over the inputs of a map, or of its diagonal alone.

    Args:
        d_in: Width of the inputs.
        dtype: Of the sum.
        device: Where it is.
        is_whole: Whether all of it is wanted, (d_in, d_in), or the diagonal alone, (d_in,).
    """

    def __init__(self, d_in: int, dtype: torch.dtype, device: torch.device, *, is_whole: bool) -> None:
        self.is_used, self._is_whole = False, is_whole
        self._sum = torch.zeros((d_in, d_in) if is_whole else (d_in,), dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs (t, d_in)."""
        x = x.to(self._sum)
        self._sum += x.T @ x if self._is_whole else x.square().sum(0)
        self.is_used = True

    def value(self, rows: int) -> Tensor:
        """Return the sum over the number of rows: twice that for the whole, as GPTQ's and SparseGPT's code has it."""
        return self._sum * ((2 if self._is_whole else 1) / rows)


def _sums(found: LinearMap, *, is_whole: bool) -> InputSum:
    weight = found.weight
    return InputSum(found.shape[1], working(weight[:0]).dtype, weight.device, is_whole=is_whole)


def step_of(found: Mapping[str, Compressed]) -> Step:
    """Return the step that writes compressed weights, by full parameter name."""
    return Step({n: weight for n, (weight, _) in found.items()}, {n: kept for n, (_, kept) in found.items()})


class MagnitudePruning(WeightCompression):
    """Prunes the smallest elements of each weight.

    Source: the baseline of Sun et al., arXiv 2306.11695, in its code: over a whole weight, and one element more than
    the share of it.
    """

    name = "magnitude"

    @dataclass(frozen=True, kw_only=True)
    class Config(InterventionConfig):
        sparsity: float = 0.25
        """Share of the elements that become 0."""

        def __post_init__(self) -> None:
            _check_sparsity(self.sparsity)

    def compressed(self, weight: Tensor) -> Compressed:
        mask = magnitude_mask(weight, self.config.sparsity)
        return weight.masked_fill(mask, 0), Zeros(mask)


class Wanda(InputCompression):
    """Prunes the elements with the smallest |W_ij| ||x_j|| of each row (Sun et al., arXiv 2306.11695)."""

    name = "wanda"

    @dataclass(frozen=True, kw_only=True)
    class Config(CalibratedConfig):
        sparsity: float = 0.25
        """Share of each row that becomes 0."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_sparsity(self.sparsity)

    def statistics(self, found: LinearMap) -> InputSum:
        return _sums(found, is_whole=False)

    def compressed(self, weight: Tensor, inputs: Tensor) -> Compressed:
        mask = wanda_mask(weight, inputs, self.config.sparsity)
        return weight.masked_fill(mask, 0), Zeros(mask)


class SparseGPT(InputCompression):
    """Prunes, and lets the elements that are left make up for it (Frantar and Alistarh, arXiv 2301.00774)."""

    name = "sparsegpt"

    @dataclass(frozen=True, kw_only=True)
    class Config(CalibratedConfig):
        sparsity: float = 0.25
        """Share of each block of 128 columns that becomes 0."""
        damp: float = 0.01
        """What is added to the diagonal of the inputs' second moment, as a share of its mean."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_sparsity(self.sparsity)
            check_least(self, {"damp": 0})

    def statistics(self, found: LinearMap) -> InputSum:
        return _sums(found, is_whole=True)

    def compressed(self, weight: Tensor, inputs: Tensor) -> Compressed:
        pruned = sparsegpt(weight, inputs, self.config.sparsity, damp=self.config.damp)
        return pruned, Zeros(pruned == 0)


@dataclass(frozen=True, kw_only=True)
class BitsConfig(InterventionConfig):
    """Fields of every quantisation."""

    bits: int = 4
    """Bits of an element, 2 to 8."""
    group: int | None = 128
    """Columns that share a scale and a zero point; null: the whole row."""

    def __post_init__(self) -> None:
        check_least(self, {"bits": 2, "group": 1})
        if self.bits > 8:
            raise ConfigError(f"bits: expected 2 to 8, got {self.bits}")


@dataclass(frozen=True, kw_only=True)
class GridConfig(BitsConfig):
    """Fields of the quantisations that lay their own grids."""

    points: Points = "asymmetric"
    """How a grid lies around 0: symmetric or asymmetric as in GPTQ's code, awq as in AWQ's."""


class RoundToNearest(WeightCompression):
    """Rounds each element to the nearest point of its group's grid: the plainest quantisation, without any text."""

    name = "rtn"
    Config: ClassVar[type[InterventionConfig]] = GridConfig

    def compressed(self, weight: Tensor) -> Compressed:
        grid = grid_of(weight, self.config.bits, self.config.group, self.config.points)
        return grid.nearest(weight), OnGrid(grid)


class GPTQ(InputCompression):
    """Rounds column after column, and lets later columns make up for it (Frantar et al., arXiv 2210.17323)."""

    name = "gptq"

    @dataclass(frozen=True, kw_only=True)
    class Config(GridConfig, CalibratedConfig):
        points: Points = "symmetric"
        by_activation: bool = True
        """Treat columns with the largest inputs first, and group them in this order."""
        damp: float = 0.01
        """What is added to the diagonal of the inputs' second moment, as a share of its mean."""

        def __post_init__(self) -> None:
            GridConfig.__post_init__(self)
            CalibratedConfig.__post_init__(self)
            check_least(self, {"damp": 0})

    def statistics(self, found: LinearMap) -> InputSum:
        return _sums(found, is_whole=True)

    def compressed(self, weight: Tensor, inputs: Tensor) -> Compressed:
        given = self.config
        weights, grid = gptq(
            weight,
            inputs,
            given.bits,
            given.group,
            points=given.points,
            by_activation=given.by_activation,
            damp=given.damp,
        )
        return weights, OnGrid(grid)
