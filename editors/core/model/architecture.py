"""The parts of a decoder that an editor needs: blocks, MLP projections, final norm and head.

`describe` finds them (parts.py says how), and tries them: what they compute must be what the model computes. No other
file knows how models are built.

Blocks may differ. Those without a dense MLP (a mixture of experts, a state-space layer) are refused where one of their
weights is asked for. Scores, and edits of other blocks, do without it.

Shapes: d hidden size, d_in width of the MLP (input of the down projection), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError, RequestError
from errata.editors.core.model import parts
from errata.editors.core.model.own_forward import (
    LAYOUTS,
    ROW,
    OwnHead,
    check_own_forward,
    evaluating,
    inputs_seen,
    passes_gradients,
    trial_rows,
)
from errata.editors.core.model.parts import is_transposed

# Precisions of weights that can be edited.
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), also where the weight is packed."""
        sizes = parts.features(self.module)
        assert sizes is not None
        return sizes

    @property
    def is_plain(self) -> bool:
        """Whether the weight holds its numbers themselves, neither quantised nor packed nor spread over processes."""
        weight = self.module._parameters.get("weight")
        return weight is not None and weight.dtype in PLAIN_DTYPES and type(weight.detach()) is Tensor


@dataclass(frozen=True)
class Architecture:
    """The parts of one model. It holds the modules themselves: describe the model again after replacing one.

    Attributes:
        model: The whole model, with its head.
        base: The decoder, from token ids to hidden states after the final norm.
        blocks: The blocks, lowest first.
        blocks_path: Their name in the model.
        down_paths: For each block, the name in it of the MLP's down projection; None where there is none to edit.
        refusals: For each block, why there is none; empty where there is one.
        tail: What the decoder applies after the last block: the final norm, perhaps a projection.
        head: The language-model head.
        own_head: What the model computes from the decoder's output.
        d_model: Hidden size.
    """

    model: nn.Module
    base: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    down_paths: tuple[str | None, ...]
    refusals: tuple[str, ...]
    tail: tuple[nn.Module, ...]
    head: nn.Module
    own_head: OwnHead
    d_model: int

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
        """The precision that the model computes in: its first down projection's, or that of any weight of its own."""
        first = next((layer for layer, path in enumerate(self.down_paths) if path is not None), None)
        weights = [] if first is None else [self.down(first)._parameters.get("weight")]
        weights += self.base.parameters()
        return next((w.dtype for w in weights if w is not None and w.dtype in PLAIN_DTYPES), torch.float32)

    @property
    def down_path(self) -> str:
        """The name of the MLP's down projection in the first block that has one; empty if none has."""
        return next((path for path in self.down_paths if path is not None), "")

    @property
    def d_mlp(self) -> int:
        """Width of the MLP of the first block that has one."""
        return self.map_at(next((layer for layer, path in enumerate(self.down_paths) if path is not None), 0)).shape[1]

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
            ArchitectureError: there is no such layer, or it has no dense MLP; says why.
        """
        block, path = self.block(layer), self.down_paths[layer]
        if path is None:
            dense = [i for i, other in enumerate(self.down_paths) if other is not None]
            advice = f"layers that can be edited: {', '.join(map(str, dense))}" if dense else "no layer can be edited"
            raise ArchitectureError(f"{self.refusals[layer]}; {advice}")
        return block.get_submodule(path)

    def attention_out(self, layer: int) -> nn.Module:
        """Return the output projection of block `layer`'s attention: its output (..., d) is what the attention gives.

        Raises:
            ArchitectureError: there is no such layer, or no attention in it.
        """
        return self.attention_map(layer).module

    def attention_map(self, layer: int) -> LinearMap:
        """Return the output projection of block `layer`'s attention with its name; errors as `attention_out`."""
        block = self.block(layer)
        path = parts.find_attention_out(block, self.d_model)
        if path is None:
            raise ArchitectureError(f"{self.blocks_path}.{layer} has no attention with an output projection")
        return LinearMap(f"{self.blocks_path}.{layer}.{path}.weight", block.get_submodule(path))

    def map_at(self, layer: int) -> LinearMap:
        """Return the down projection of block `layer` with its name; errors as `down`."""
        return LinearMap(self.weight_name(layer), self.down(layer))

    def check_writable(self, maps: Sequence[LinearMap]) -> None:
        """Refuse maps whose weights cannot be written.

        Raises:
            ArchitectureError: one is quantised or sharded.
        """
        for found in maps:
            if not found.is_plain:
                weight = found.module._parameters.get("weight")
                what = "packed" if weight is None else f"{type(weight.detach()).__name__} of {weight.dtype}"
                raise ArchitectureError(
                    f"{found.name} is quantised or sharded ({what}), and cannot be written; load the model in float32 "
                    "or bfloat16, or edit with GRACE, which writes no weight"
                )

    def check_trainable(self, maps: Sequence[LinearMap]) -> None:
        """Refuse maps that gradients do not reach, or that are given rows and tokens in an order of their own.

        Raises:
            ArchitectureError: names the first.
        """
        if any(parameter.is_meta for parameter in self.base.parameters()):
            return
        first: dict[int, str] = {}
        for found in maps:
            other = first.setdefault(id(found.module._parameters.get("weight")), found.name)
            if other != found.name:
                raise ArchitectureError(f"{other} and {found.name} are one weight that two blocks share")
        ids = torch.tensor(trial_rows(self.model, ROW), device=self.device)
        modules = [found.module for found in maps]
        with evaluating(self.model), torch.no_grad():
            _, seen = inputs_seen(self.base, ids, modules)
            for found, shapes in zip(maps, seen, strict=True):
                if other := [shape for shape in shapes if shape not in LAYOUTS]:
                    raise ArchitectureError(
                        f"{found.name} is given {other[0]} for rows and tokens {LAYOUTS[0]}, in another order"
                    )
            run = [module for module, shapes in zip(modules, seen, strict=True) if shapes]
            if not run:
                raise ArchitectureError(f"{maps[0].name} does not run in a forward pass of text")
            if not passes_gradients(self.base, ids, run[0]):
                raise ArchitectureError(
                    f"{type(self.model).__name__} lets no gradient through to {maps[0].name}, which is what edits are "
                    "found by"
                )

    def mlp_maps(self, layer: int) -> dict[str, LinearMap]:
        """Return the linear maps of the MLP of block `layer`, by the last part of their names.

        These are its up, gate (if there is one) and down projections, in the order of the module tree; errors as
        `down`.
        """
        self.down(layer)
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        mine = parts.holder(str(self.down_paths[layer]))
        outside = {name: m for name, m in parts.linears(block).items() if not parts.mixes_tokens(block, name)}
        beside = {name: module for name, module in outside.items() if parts.holder(name) == mine}
        # BERT holds the up and the down projection in modules of their own.
        found = beside if len(beside) > 1 else outside
        short = [parts.short_name(name) for name in found]
        key = parts.short_name if len(set(short)) == len(short) else str  # BERT calls all of them `dense`
        return {key(name): LinearMap(f"{prefix}{name}.weight", module) for name, module in found.items()}

    def up(self, layer: int) -> LinearMap:
        """Return the up projection of block `layer`, from (..., d) to (..., d_in).

        Where it is fused with the gate (Phi 3), its output has both halves (..., 2 d_in). In a gated MLP with two maps
        (Llama) it is the branch without activation, which models declare after the gate.

        Raises:
            ArchitectureError: it was not found; the message says what was looked for.
        """
        down = self.map_at(layer)
        width = down.shape[1]
        shapes = [(n * width, self.d_model) for n in (1, 2)]
        ups = [found for found in self.mlp_maps(layer).values() if found.name != down.name and found.shape in shapes]
        if not ups:
            raise ArchitectureError(
                f"no MLP up projection found in {self.blocks_path}.{layer}: looked beside its down projection for a "
                f"linear map from {self.d_model} to {width} features, or to twice as many"
            )
        return ups[-1]

    def weight(self, layer: int) -> Tensor:
        """Return the down projection's weight as (d_out, d_in). It shares memory with the parameter."""
        return self.map_at(layer).weight

    def weight_name(self, layer: int) -> str:
        """Return the full parameter name of the down projection's weight; errors as `down`."""
        self.down(layer)
        return f"{self.blocks_path}.{layer}.{self.down_paths[layer]}.weight"

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear maps of a block by their full names, in the order of the module tree."""
        found = parts.linears(self.block(layer))
        return {f"{self.blocks_path}.{layer}.{name}": module for name, module in found.items()}

    def has_attention(self, layer: int) -> bool:
        """Return whether block `layer` has linear maps that belong to an attention."""
        block = self.block(layer)
        return any(parts.in_attention(block, name) for name in parts.linears(block))

    def query_value(self, layer: int) -> list[str]:
        """Return the full names of the maps that compute an attention's queries and values.

        Some models compute queries, keys and values with one map (GPT-2's `c_attn`, NeoX's `query_key_value`, Phi-3's
        `qkv_proj`). Then it is the name of that one.

        Raises:
            ArchitectureError: none was found.
        """
        block, prefix = self.block(layer), f"{self.blocks_path}.{layer}."
        linears = self.linears(layer).items()
        inside = {name: m for name, m in linears if parts.in_attention(block, name.removeprefix(prefix))}
        names = [name for name in inside if parts.short_name(name)[0].lower() in "qv"]
        # Fused maps have many names, but only they are wider than the hidden size.
        names = names or [name for name, m in inside.items() if (parts.features(m) or (0, 0))[0] > self.d_model]
        if not names:
            raise ArchitectureError(
                f"no query and value projections found in {prefix[:-1]}: looked for linear maps of its attention with "
                f"names in q and v, or wider than {self.d_model} features, found {list(inside) or 'none'}"
            )
        return names

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the decoder's output (..., d), which has passed the final norm already."""
        return self.own_head(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the decoder's output (..., d) from the output of its last block: apply the final norm."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of a block's output (..., d): apply the final norm and the head."""
        return self.logits(self.normed(hidden))


def describe(model: nn.Module) -> Architecture:
    """Find the parts of a decoder of transformers, and try them on two tokens, once per model.

    Raises:
        ArchitectureError: the model is not a decoder, a part was not found, or the parts compute something else than
            the model. The message says what was looked for.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ArchitectureError(f"expected a language model of transformers, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"expected a decoder, got the encoder-decoder {type(model).__name__}")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ArchitectureError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    d_model = parts.text_config(model).hidden_size
    blocks_path, blocks = parts.find_blocks(model)
    found = [parts.find_down(block, d_model, f"{blocks_path}.{layer}") for layer, block in enumerate(blocks)]
    base_path = parts.find_base(model, blocks_path)
    base = model.get_submodule(base_path)
    own_head = OwnHead(model, base_path, head)
    there = [layer for layer, (path, _) in enumerate(found) if path is not None]
    downs = [blocks[layer].get_submodule(str(found[layer][0])) for layer in there]
    for layer, seen in zip(there, check_own_forward(model, base, head, own_head, downs), strict=True):
        name = f"{blocks_path}.{layer}.{found[layer][0]}"
        if len(seen) != 1:
            found[layer] = (None, f"{name} runs {len(seen)} times in a forward pass, and has no one key per token")
        elif seen[0] not in LAYOUTS:
            found[layer] = (None, f"{name} is given {seen[0]} for rows and tokens {LAYOUTS[0]}, in another order")
    return Architecture(
        model=model,
        base=base,
        blocks=blocks,
        blocks_path=blocks_path,
        down_paths=tuple(path for path, _ in found),
        refusals=tuple(refusal for _, refusal in found),
        tail=parts.find_tail(base, blocks_path.removeprefix(f"{base_path}.")),
        head=head,
        own_head=own_head,
        d_model=d_model,
    )


def max_positions(model: nn.Module) -> int | None:
    """Return the longest row that a model takes, in tokens; None if its configuration does not say."""
    limit = getattr(parts.text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
