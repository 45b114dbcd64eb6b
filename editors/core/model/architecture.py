"""Where a decoder keeps what an editor needs: blocks, MLP down projections, final norm and head.

Nothing is looked up by the model's name. `describe` walks the module tree and recognises the parts by what they are:
the blocks are the largest list of like modules that each hold an attention; the down projection of an MLP is the last
linear map outside the attention that ends in the hidden size, its up projection the last before it that begins there.
This file is the only place that knows.

Shapes: d hidden size, d_in width of the MLP (input of the down projection), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError, RequestError


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module stores its weight as (d_in, d_out): GPT-2's Conv1D does, `nn.Linear` does not."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@dataclass(frozen=True)
class LinearMap:
    """A linear map, and the full name of its weight."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), whichever way round it is stored; shares its memory."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if is_transposed(self.module) else weight


@dataclass(frozen=True)
class Architecture:
    """The parts of one model. Holds the modules themselves: describe again after replacing one."""

    model: nn.Module
    base: nn.Module  # the decoder: token ids to final-norm hidden states
    blocks: nn.ModuleList
    blocks_path: str
    down_path: str  # of the down projection, below its block
    tail: tuple[nn.Module, ...]  # what the decoder applies after the last block: the final norm, perhaps a projection
    head: nn.Module
    d_model: int
    d_mlp: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model takes, where it says so."""
        return max_positions(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.down(0).weight.dtype  # type: ignore[return-value]

    def check_length(self, length: int, what: str, record: str | None) -> None:
        """Refuse a row of `length` tokens, described by `what`, that the model does not take.

        Raises:
            RequestError: names the request `record`.
        """
        limit = self.max_positions
        if limit is not None and length > limit:
            raise RequestError(f"needs {what}; the model takes {limit}", record=record, field="prompt")

    def block(self, layer: int) -> nn.Module:
        """Block `layer`, counted from 0.

        Raises:
            ArchitectureError: no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise ArchitectureError(f"expected a layer from 0 to {self.n_layers - 1}, got {layer}")
        return self.blocks[layer]

    def down(self, layer: int) -> nn.Module:
        """The down projection of block `layer`: input (..., d_in) is the key, output (..., d) the value."""
        return self.block(layer).get_submodule(self.down_path)

    def mlp_maps(self, layer: int) -> dict[str, LinearMap]:
        """The linear maps of block `layer` outside its attention, by the last part of their names: the MLP's up (and
        gate) and down projections, in the order of the module tree."""
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        outside = {n: m for n, m in self.linears(layer).items() if not _in_attention(block, n.removeprefix(prefix))}
        return {name.rpartition(".")[2]: LinearMap(f"{name}.weight", module) for name, module in outside.items()}

    def up(self, layer: int) -> LinearMap:
        """The up projection of block `layer`: input (..., d), output (..., d_in), or both halves (..., 2 d_in) where it
        is fused with the gate (Phi 3). In a gated MLP that keeps them apart (Llama) it is the branch that is not
        activated, which families declare after the gate.

        Raises:
            ArchitectureError: not found; says what was looked for.
        """
        shapes = [(n * self.d_mlp, self.d_model) for n in (1, 2)]
        maps = [found for found in self.mlp_maps(layer).values() if found.name != self.weight_name(layer)]
        ups = [found for found in maps if tuple(found.weight.shape) in shapes]
        if not ups:
            raise ArchitectureError(
                f"no MLP up projection found in {self.blocks_path}.{layer}: looked outside its attention for a linear "
                f"map from {self.d_model} to {self.d_mlp} features, or to twice as many"
            )
        return ups[-1]

    def weight(self, layer: int) -> Tensor:
        """The down projection's weight as (d_out, d_in), whichever way round it is stored; shares its memory."""
        return LinearMap(self.weight_name(layer), self.down(layer)).weight

    def weight_name(self, layer: int) -> str:
        """Full parameter name of the down projection's weight."""
        self.block(layer)
        return f"{self.blocks_path}.{layer}.{self.down_path}.weight"

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """The linear maps of a block by their full names, in the order of the module tree."""
        found = ((name, module) for name, module in self.block(layer).named_modules() if _out_features(module))
        return {f"{self.blocks_path}.{layer}.{name}": module for name, module in found}

    def query_value(self, layer: int) -> list[str]:
        """Full names of the maps that make an attention's queries and values; where one map makes them together with
        the keys (GPT-2's `c_attn`, NeoX's `query_key_value`, Phi-3's `qkv_proj`), of that one.

        Raises:
            ArchitectureError: none found.
        """
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        inside = {name: m for name, m in self.linears(layer).items() if _in_attention(block, name.removeprefix(prefix))}
        names = [name for name in inside if name.rpartition(".")[2][0].lower() in "qv"]
        # Fused maps go by many names, but only they are wider than the hidden size.
        names = names or [name for name, module in inside.items() if (_out_features(module) or 0) > self.d_model]
        if not names:
            raise ArchitectureError(
                f"no query and value projections found in {prefix[:-1]}: its attention has {list(inside)}"
            )
        return names

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the decoder's output (..., d), the final norm applied already."""
        logits = self.head(hidden)
        config = self.model.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scale
        cap = getattr(_text_config(self.model), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def normed(self, hidden: Tensor) -> Tensor:
        """The decoder's output (..., d) of its last block's: the final norm applied."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden

    def readout(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of a block's output (..., d): final norm and head."""
        return self.logits(self.normed(hidden))


def describe(model: nn.Module) -> Architecture:
    """Find the parts of a decoder of transformers.

    Raises:
        ArchitectureError: the model is no decoder, its MLPs are mixtures of experts or quantised, or a part was not
            found; the message says what was looked for.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ArchitectureError(f"expected a language model of transformers, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"expected a decoder, got the encoder-decoder {type(model).__name__}")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ArchitectureError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    d_model = _text_config(model).hidden_size
    blocks_path, blocks = _find_blocks(model)
    down_path = _find_down(blocks[0], d_model, f"{blocks_path}.0")
    base = model.get_submodule(blocks_path.rpartition(".")[0])
    _check_editable(blocks, down_path, blocks_path)
    weight = blocks[0].get_submodule(down_path).weight
    return Architecture(
        model=model,
        base=base,
        blocks=blocks,
        blocks_path=blocks_path,
        down_path=down_path,
        tail=_find_tail(base, blocks_path.rpartition(".")[2]),
        head=head,
        d_model=d_model,
        d_mlp=weight.numel() // d_model,  # type: ignore[operator]
    )


def max_positions(model: nn.Module) -> int | None:
    """The longest row that a model takes, where it says so."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def _is_attention(name: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or "attn" in name or "attention" in name


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [
        (sum(p.numel() for p in modules.parameters()), name, modules)
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        and len({type(module) for module in modules}) == 1
        and any(_is_attention(n, m) and "norm" not in n for n, m in modules[0].named_children())
    ]
    if not found:
        raise ArchitectureError(
            f"no blocks found in {type(model).__name__}: looked for a ModuleList of like modules, each with an "
            "attention module of its own"
        )
    _, name, blocks = max(found, key=lambda entry: entry[0])
    return name, blocks


def _find_down(block: nn.Module, d_model: int, path: str) -> str:
    """The last linear map outside the attention whose output has the hidden size."""
    outside = {name: module for name, module in block.named_modules() if name and not _in_attention(block, name)}
    if any("expert" in name for name in outside):
        raise ArchitectureError(f"{path} holds a mixture of experts; which expert to edit is not defined")
    downs = [name for name, module in outside.items() if _out_features(module) == d_model]
    if not downs:
        linear = [f"{n} {tuple(next(m.parameters()).shape)}" for n, m in outside.items() if _out_features(m)]
        raise ArchitectureError(
            f"no MLP down projection found in {path}: looked outside its attention for a linear map that ends in "
            f"{d_model} features, found {linear or 'no linear map'}"
        )
    return downs[-1]


def _in_attention(block: nn.Module, name: str) -> bool:
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(_is_attention(path.rpartition(".")[2], block.get_submodule(path)) for path in paths)


def _out_features(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if is_transposed(module) else None  # type: ignore[return-value]


def _check_editable(blocks: nn.ModuleList, down_path: str, blocks_path: str) -> None:
    for layer, block in enumerate(blocks):
        weight = block.get_submodule(down_path).weight
        name = f"{blocks_path}.{layer}.{down_path}.weight"
        if not weight.is_floating_point() or weight.ndim != 2:  # type: ignore[operator]
            raise ArchitectureError(f"{name} is quantised ({weight.dtype}); load the model in float32 or bfloat16")


def _find_tail(base: nn.Module, blocks_name: str) -> tuple[nn.Module, ...]:
    """The final norm (and OPT-350m's projection): direct children of the decoder beside the blocks."""
    children = {n: m for n, m in base.named_children() if n != blocks_name and m is not None}
    norms = [m for n, m in children.items() if "norm" in type(m).__name__.lower() and "embed" not in n]
    if len(norms) > 1:
        raise ArchitectureError(f"expected one final norm in {type(base).__name__}, found {len(norms)}")
    projections = [m for n, m in children.items() if n == "project_out"]
    return (*norms, *projections)
