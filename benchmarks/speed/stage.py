"""What the phases share: the model of the run, its tokenizer, texts, and the precision that the run declares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from errata.benchmarks.runs import environment
from errata.benchmarks.speed import synthetic
from errata.benchmarks.speed.settings import SpeedConfig
from errata.benchmarks.speed.shapes import edited_layers, random_model, sizes
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.architecture import Architecture, describe

# Of a run's other tensors: logits of whole batches, activations, what the allocator keeps.
_BESIDE = 3 * 2**30


@dataclass(frozen=True)
class Stage:
    """One run's configuration and what is made from it when it is first needed."""

    config: SpeedConfig

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """(d, d_in)."""
        return sizes(self.config.shape)[1:]

    @cached_property
    def model(self) -> Any:
        if self.config.model is not None:
            return self._loaded[0]
        return random_model(self.config.shape, dtype=self.dtype, device=self.config.device, seed=self.config.seed)

    @cached_property
    def architecture(self) -> Architecture:
        return describe(self.model)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return edited_layers(self.architecture.n_layers)

    @cached_property
    def words(self) -> list[str]:
        return synthetic.words(self.config.seed)

    @cached_property
    def tokenizer(self) -> Any:
        if self.config.model is not None:
            return self._loaded[1]
        if self.config.tokenizer is not None:
            from transformers import AutoTokenizer

            found, rows = AutoTokenizer.from_pretrained(self.config.tokenizer), self.model.config.vocab_size
            if len(found) > rows:
                raise ConfigError(f"tokenizer: expected at most the {rows} entries of the shape, got {len(found)}")
            return found
        return synthetic.tokenizer(self.words)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from errata import models

        return models.load(
            str(self.config.model), dtype=str(self.dtype).removeprefix("torch."), device=self.config.device
        )

    def target(self, cpu: float, gpu: float) -> float:
        """The ratio aimed at on this run's device."""
        return cpu if self.device.type == "cpu" else gpu


def check_room(config: SpeedConfig) -> None:
    """Refuse a shape that does not fit.

    Raises:
        ConfigError: no such device, or less memory than the weights and the second moments take.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; give device=cpu")
    parameters, _, d_in = sizes(config.shape)
    weights = parameters * (2 if config.precision == "bf16" else 4)
    # A moment, its factor a layer, and what a solve makes of them; in float64.
    moments = {"solves": 6, "end_to_end": 12}
    need = weights + 8 * d_in**2 * max([moments.get(phase, 0) for phase in config.phases]) + _BESIDE
    if config.shape == "tiny":
        return
    free = torch.cuda.mem_get_info()[0] if config.device == "cuda" else _available()
    if need > free:
        raise ConfigError(
            f"shape: {config.shape} takes about {need / 2**30:.0f} GiB in {config.precision} for these phases, and "
            f"{free / 2**30:.0f} GiB of the {config.device}'s memory are free; give a smaller shape or fewer phases"
        )


def _available() -> int:
    """Bytes that a process may still take."""
    free = environment.free_host_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free


@contextmanager
def declared(config: SpeedConfig) -> Iterator[None]:
    """The run's matmul precision and threads inside; those from before afterwards."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
