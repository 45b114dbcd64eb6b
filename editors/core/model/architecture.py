"""Find the parts of a decoder that an editor needs: blocks, MLP projections, final norm and head.

Nothing is looked up by the model's name. `describe` walks the module tree and recognises parts by what they are. The
blocks are the largest list of modules of one class that each hold an attention. The down projection of an MLP is the
last linear map outside the attention with as many outputs as the hidden size. Its up projection is the last one before
it with as many inputs. No other file knows how models are built.

Shapes: d hidden size, d_in width of the MLP (input of the down projection), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError, RequestError


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear module stores its weight as (d_in, d_out): GPT-2's Conv1D does, `nn.Linear` does not."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@dataclass(frozen=True)
class LinearMap:
    """A linear map with the full name of its weight."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight as (d_out, d_in), also where it is stored transposed. It shares memory with the parameter."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if is_transposed(self.module) else weight


@dataclass(frozen=True)
class Architecture:
    """The parts of one model. It holds the modules themselves: describe the model again after replacing one.

    Attributes:
        model: The whole model, with its head.
        base: The decoder, from token ids to hidden states after the final norm.
        blocks: The blocks, lowest first.
        blocks_path: Their name in the model.
        down_path: The name of the MLP's down projection in a block.
        tail: What the decoder applies after the last block: the final norm, perhaps a projection.
        head: The language-model head.
        d_model: Hidden size.
        d_mlp: Width of the MLP.
    """

    model: nn.Module
    base: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    down_path: str
    tail: tuple[nn.Module, ...]
    head: nn.Module
    d_model: int
    d_mlp: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model takes, in tokens; None if its configuration does not say."""
        return max_positions(self.model)

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on."""
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.down(0).weight.dtype  # type: ignore[return-value]

    def check_length(self, length: int, what: str, record: str | None) -> None:
        """Refuse a row that is longer than the model takes.

        Args:
            length: Tokens of the row.
            what: A description of them, for the message.
            record: The request, for the message.

        Raises:
            RequestError: the row is too long.
        """
        limit = self.max_positions
        if limit is not None and length > limit:
            raise RequestError(f"needs {what}; the model takes {limit}", record=record, field="prompt")

    def block(self, layer: int) -> nn.Module:
        """Return block `layer`, counted from 0.

        Raises:
            ArchitectureError: there is no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise ArchitectureError(f"expected a layer from 0 to {self.n_layers - 1}, got {layer}")
        return self.blocks[layer]

    def down(self, layer: int) -> nn.Module:
        """Return the down projection of block `layer`: its input (..., d_in) is the key, its output (..., d) the value.

        Raises:
            ArchitectureError: there is no such layer.
        """
        return self.block(layer).get_submodule(self.down_path)

    def mlp_maps(self, layer: int) -> dict[str, LinearMap]:
        """Return the linear maps of block `layer` outside its attention, by the last part of their names.

        These are the MLP's up, gate (if there is one) and down projections, in the order of the module tree.
        """
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        outside = {n: m for n, m in self.linears(layer).items() if not _in_attention(block, n.removeprefix(prefix))}
        return {name.rpartition(".")[2]: LinearMap(f"{name}.weight", module) for name, module in outside.items()}

    def up(self, layer: int) -> LinearMap:
        """Return the up projection of block `layer`, from (..., d) to (..., d_in).

        Where it is fused with the gate (Phi 3), its output has both halves (..., 2 d_in). In a gated MLP with two maps
        (Llama) it is the branch without activation, which models declare after the gate.

        Raises:
            ArchitectureError: it was not found; the message says what was looked for.
        """
        shapes = [(n * self.d_mlp, self.d_model) for n in (1, 2)]
        others = [linear for linear in self.mlp_maps(layer).values() if linear.name != self.weight_name(layer)]
        ups = [linear for linear in others if tuple(linear.weight.shape) in shapes]
        if not ups:
            raise ArchitectureError(
                f"no MLP up projection found in {self.blocks_path}.{layer}: looked outside its attention for a linear "
                f"map from {self.d_model} to {self.d_mlp} features, or to twice as many"
            )
        return ups[-1]

    def weight(self, layer: int) -> Tensor:
        """Return the down projection's weight as (d_out, d_in). It shares memory with the parameter."""
        return LinearMap(self.weight_name(layer), self.down(layer)).weight

    def weight_name(self, layer: int) -> str:
        """Return the full parameter name of the down projection's weight."""
        self.block(layer)
        return f"{self.blocks_path}.{layer}.{self.down_path}.weight"

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear maps of a block by their full names, in the order of the module tree."""
        linears = ((name, module) for name, module in self.block(layer).named_modules() if _out_features(module))
        return {f"{self.blocks_path}.{layer}.{name}": module for name, module in linears}

    def query_value(self, layer: int) -> list[str]:
        """Return the full names of the maps that compute an attention's queries and values.

        Some models compute queries, keys and values with one map (GPT-2's `c_attn`, NeoX's `query_key_value`, Phi-3's
        `qkv_proj`). Then it is the name of that one.

        Raises:
            ArchitectureError: none was found.
        """
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        inside = {name: m for name, m in self.linears(layer).items() if _in_attention(block, name.removeprefix(prefix))}
        names = [name for name in inside if name.rpartition(".")[2][0].lower() in "qv"]
        # Fused maps have many names, but only they are wider than the hidden size.
        names = names or [name for name, module in inside.items() if (_out_features(module) or 0) > self.d_model]
        if not names:
            raise ArchitectureError(
                f"no query and value projections found in {prefix[:-1]}: looked for linear maps of its attention with "
                f"names in q and v, or wider than {self.d_model} features, found {list(inside) or 'none'}"
            )
        return names

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the decoder's output (..., d), which has passed the final norm already."""
        logits = self.head(hidden)
        config = self.model.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scale
        cap = getattr(_text_config(self.model), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the decoder's output (..., d) from the output of its last block: apply the final norm."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of a block's output (..., d): apply the final norm and the head."""
        return self.logits(self.normed(hidden))


def describe(model: nn.Module) -> Architecture:
    """Find the parts of a decoder of transformers.

    Raises:
        ArchitectureError: the model is not a decoder, its MLPs are mixtures of experts or quantised, or a part was not
            found. The message says what was looked for.
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
    """Return the longest row that a model takes, in tokens; None if its configuration does not say."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def _is_attention(name: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or "attn" in name or "attention" in name


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    candidates = [
        (sum(p.numel() for p in modules.parameters()), name, modules)
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        and len({type(module) for module in modules}) == 1
        and any(_is_attention(n, m) and "norm" not in n for n, m in modules[0].named_children())
    ]
    if not candidates:
        raise ArchitectureError(
            f"no blocks found in {type(model).__name__}: looked for a ModuleList of modules of one class, each with an "
            "attention module of its own"
        )
    _, name, blocks = max(candidates, key=lambda entry: entry[0])
    return name, blocks


def _find_down(block: nn.Module, d_model: int, path: str) -> str:
    """Return the name of the last linear map outside the attention with as many outputs as the hidden size."""
    outside = {name: module for name, module in block.named_modules() if name and not _in_attention(block, name)}
    if any("expert" in name for name in outside):
        raise ArchitectureError(
            f"{path} holds a mixture of experts, and which expert to edit is not defined; use a model with dense MLPs"
        )
    downs = [name for name, module in outside.items() if _out_features(module) == d_model]
    if not downs:
        linear = [f"{n} {tuple(next(m.parameters()).shape)}" for n, m in outside.items() if _out_features(m)]
        raise ArchitectureError(
            f"no MLP down projection found in {path}: looked outside its attention for a linear map with "
            f"{d_model} output features, found {linear or 'no linear map'}"
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
    """Return the final norm (and OPT-350m's projection): direct children of the decoder beside the blocks."""
    children = {n: m for n, m in base.named_children() if n != blocks_name and m is not None}
    norms = [m for n, m in children.items() if "norm" in type(m).__name__.lower() and "embed" not in n]
    if len(norms) > 1:
        raise ArchitectureError(f"expected one final norm in {type(base).__name__}, found {len(norms)}")
    projections = [m for n, m in children.items() if n == "project_out"]
    return (*norms, *projections)
