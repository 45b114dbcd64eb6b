"""LoRA: a fine-tuning method that trains low-rank adapters of the attention's projections on the answer.

    y = W x + (lora_alpha / rank) B A dropout(x),    A (r, d_in) uniform,  B (d_out, r) zero

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3. The baseline for
knowledge editing, and the defaults, are EasyEdit's: cross-entropy of the answer as in FT-M, Adam, no early stopping.
Papers and code differ from each other and from this file:

- EasyEdit's files set `lora_type: adalora`: three factors of rank 12 with an orthogonality penalty (Zhang et al. 2023),
  whose ranks it never adapts. This file is EasyEdit's `lora_type: lora`, which any tool can read.
- Hu et al. draw A from a Gaussian. Their code, peft and this file draw it uniformly within 1 / sqrt(d_in).
- EasyEdit takes 30 (GPT-2 XL), 50 (GPT-J) or 70 (Llama) passes; 70 is the default here.

The update is the product of the adapter, kept as factors: U = (lora_alpha / rank) B, V = A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.config import check_positive, did_you_mean
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.fine_tuning import Tuner
from errata.editors.core.families.joint_training import TuningConfig
from errata.editors.core.families.trainables import Trainable
from errata.editors.core.ledger.entry import Weight, find_weight
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import LinearMap


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TuningConfig):
    """LoRA's fields; defaults are EasyEdit's for Llama 2 7B."""

    num_steps: int = 70
    """Passes over the requests of an edit."""

    lr: float = 5e-3
    """Learning rate of Adam."""

    batch_size: int = 1
    """Requests of one edit that share a gradient step."""

    stop_loss: float = 0.0
    """Training ends once the mean loss of a pass is below this; 0: no early stopping."""

    rank: int = 8
    """r: rank of each adapter."""

    lora_alpha: float = 32.0
    """The output of an adapter is multiplied by lora_alpha / rank."""

    lora_dropout: float = 0.1
    """Share of an adapter's inputs that is dropped, drawn again in every pass."""

    target_modules: tuple[str, ...] | None = None
    """Linear maps of each layer, by the last part of their names, as in peft; null: the query and value maps of the
    attention (Llama's `q_proj` and `v_proj`), or the one map that contains both (GPT-2's `c_attn`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("rank", "lora_alpha"))
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("target_modules: expected at least one name, or null for queries and values, got none")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected a share from 0 to below 1, got {self.lora_dropout}")


class LoRA(Tuner):
    """LoRA (Hu et al. 2022), as EasyEdit has it for a baseline."""

    name = "lora"
    Config = LoRAConfig
    config: LoRAConfig

    def default_layers(self) -> Sequence[int]:
        """Return all layers, as in EasyEdit's files; by default without those that have no attention."""
        every = range(self.architecture.n_layers)
        if self.config.target_modules is not None:
            return every
        return [layer for layer in every if self.architecture.has_attention(layer)] or every

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the linear maps of each layer that `target_modules` names.

        Raises:
            ConfigError: A layer has no map of a given name.
        """
        ends = self.config.target_modules
        modules: dict[str, nn.Module] = {}
        for layer in self.layers:
            linears = self.architecture.linears(layer)
            if ends is None:
                names = self.architecture.query_value(layer)
            else:
                names = [name for name in linears if _plain(name).endswith(tuple(f".{end}" for end in ends))]
                for end in ends:
                    if not any(_plain(name).endswith(f".{end}") for name in names):
                        known = {_plain(name).rpartition(".")[2] for name in linears}
                        raise ConfigError(f"target_modules: layer {layer} has no {end!r}{did_you_mean(end, known)}")
            modules.update({name: linears[name] for name in names})
        maps = [LinearMap(f"{name}.weight", module) for name, module in modules.items()]
        self.architecture.check_writable(maps)
        self.architecture.check_trainable(maps)
        return modules

    def trainable(self) -> Trainable:
        weights = {name: find_weight(self.model, f"{name}.weight") for name in self.modules}
        return _Adapters(weights, self.config, working_dtype(self.architecture.dtype))


def _plain(name: str) -> str:
    """Return the name of a linear map without what an adapter of PEFT adds to it."""
    return name.removesuffix(".base_layer")


class _Adapters(Trainable):
    """One A and B per module, on the device of its weight.

    Random numbers are the same for every edit, on every device, and whatever other edits are trained in the batch.
    """

    def __init__(self, weights: Mapping[str, Weight], config: LoRAConfig, dtype: torch.dtype) -> None:
        self.scale, self.dropout = config.lora_alpha / config.rank, config.lora_dropout
        initial = torch.Generator().manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)  # for dropout
        self.A: dict[str, Tensor] = {}
        self.B: dict[str, Tensor] = {}
        for name, weight in weights.items():
            (d_out, d_in), device = weight.shape, weight.parameter.device
            A = (2 * torch.rand(config.rank, d_in, generator=initial) - 1) / d_in**0.5
            self.A[name] = A.to(device, dtype).requires_grad_()
            self.B[name] = torch.zeros(d_out, config.rank, dtype=dtype, device=device, requires_grad=True)
        self.parameters = [*self.A.values(), *self.B.values()]

    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:
        A, B = self.A[name], self.B[name]
        return y + self.scale * linear(linear(self._dropped(x.to(A), lengths), A), B)

    def patch(self) -> Patch:
        return Patch(
            {f"{name}.weight": LowRank(self.scale * B.detach(), self.A[name].detach()) for name, B in self.B.items()}
        )

    def _dropped(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the inputs (b, L, d_in) after dropout.

        No numbers are drawn for padding, since its amount depends on the other rows of the batch.
        """
        if not self.dropout:
            return x
        ends = torch.tensor(lengths, device=x.device)
        real = torch.arange(x.shape[1], device=x.device) < ends[:, None]  # (b, L)
        # Drawn on the CPU: generators of other devices give other numbers.
        drawn = torch.rand(sum(lengths), x.shape[2], generator=self.generator)
        mask = torch.zeros_like(x)
        mask[real] = (drawn >= self.dropout).to(x) / (1 - self.dropout)
        return x * mask
