"""Quantisation by torchao (the extra `torchao`): the weights that its quantised linear maps compute with, on a CPU too.

The result is that of torchao's own tensors. The model keeps plain weights with these values, so that it can be edited,
undone and saved as any other. To serve a model in a few bits, quantise the exported one with torchao itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ConfigError
from errata.editors.core.interventions.compressions import BitsConfig, Compressed, WeightCompression
from errata.editors.core.interventions.kept import OnGrid
from errata.editors.core.solve.quantising import BitGrid


class TorchAO(WeightCompression):
    """Quantises each weight by torchao's `IntxWeightOnlyConfig`: symmetric, one scale per row and group."""

    name = "torchao"

    @dataclass(frozen=True, kw_only=True)
    class Config(BitsConfig):
        group: int | None = 32
        """Columns that share a scale, which must divide the columns of every weight; null: the whole row."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _torchao()

    def compressed(self, weight: Tensor) -> Compressed:
        quantization = _torchao()
        bits, columns = self.config.bits, weight.shape[1]
        group = self.config.group or columns
        if columns % group:
            raise ConfigError(f"group: expected a divisor of {columns} columns, got {group}; give null, or use rtn")
        granularity = quantization.PerAxis(0) if group == columns else quantization.PerGroup(group)
        linear = nn.Linear(columns, weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
        quantization.quantize_(linear, config)
        made: Any = linear.weight
        scale = made.scale.reshape(len(weight), -1).to(weight)
        zero = made.zero_point.reshape(len(weight), -1).to(weight) + 2 ** (bits - 1)
        grid = BitGrid(scale, zero, torch.arange(columns, device=weight.device) // group, bits)
        return made.dequantize().to(weight), OnGrid(grid)


def _torchao() -> Any:
    """Return torchao's module of quantisation.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module("torchao.quantization")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"compress=torchao needs torchao ({error.name} is missing): pip install -e '.[torchao]'; compress=rtn with "
            "points=symmetric needs nothing, and has nearly its grid"
        ) from error
