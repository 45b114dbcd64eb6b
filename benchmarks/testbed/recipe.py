"""What a testbed's model is made of: its sizes, the course of its training, and the shape of its blocks.

    gpt2      LayerNorm before each sublayer, learned positions; what the bundled testbed is
    llama     RMSNorm before each sublayer, a gated MLP, rotary positions, a BOS token before every text
    gemma3    as llama, with a second RMSNorm behind each sublayer, before its output is added to the hidden state

A shape is a configuration of transformers and nothing else: world, text, tokenizer, training and measures are the same
for all. Only what a shape lacks differs. Without learned positions there is no sink to fix at position 0, and with a
BOS token no text begins without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from errata.benchmarks.testbed.corpus import Mixture


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on besides the seed and the shape."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    positions: int = 128
    vocabulary: int = 1536
    row_tokens: int = 64
    batch_rows: int = 8
    long_every: int = 4
    """Each such batch has rows twice as long and half as many: they train the upper half of the positions."""
    steps: int = 2400
    curriculum: float = 0.2
    """The first part of the steps reads about a fifth of the subjects only; it ends the plateau before recall."""
    bottleneck: float = 0.7
    """Share of the batches with the subject bottleneck."""
    sink_norm: float = 12.0
    """Norm of the fixed position embedding of position 0; 0 for no sink."""
    matrix_rate: float = 0.02
    """Muon's rate, for the matrices inside the blocks."""
    other_rate: float = 2e-3
    """AdamW's rate, for embeddings, biases and norms."""
    weight_decay: float = 0.05
    constant: float = 0.5
    """Share of the steps at the full rate; afterwards it falls linearly."""
    final_rate: float = 0.02
    """The last step's rate, as a share of the full one."""
    mixture: Mixture = field(default_factory=Mixture)


@dataclass(frozen=True)
class Shape:
    """The form of a testbed's blocks.

    Attributes:
        config: Makes the configuration of transformers for a recipe's sizes.
        bos: Whether the tokenizer puts its first token before every text.
        sink: Whether there are learned positions: the first of them is fixed as a sink.
    """

    config: Callable[[Recipe], PreTrainedConfig]
    bos: bool
    sink: bool

    def fit(self, recipe: Recipe) -> Recipe:
        """Return the recipe without what this shape cannot have: direct starts behind a BOS, a sink."""
        mixture = replace(recipe.mixture, start_end_of_text=1.0, start_direct=0.0) if self.bos else recipe.mixture
        return replace(recipe, mixture=mixture, sink_norm=recipe.sink_norm if self.sink else 0.0)


def _gpt2(recipe: Recipe) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _gated(recipe: Recipe) -> dict[str, Any]:
    """Return what the configurations of Llama and Gemma share: the MLP is as wide as GPT-2's."""
    return {
        "vocab_size": recipe.vocabulary,
        "max_position_embeddings": recipe.positions,
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": recipe.width // recipe.heads,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _llama(recipe: Recipe) -> PreTrainedConfig:
    return LlamaConfig(**_gated(recipe))


def _gemma3(recipe: Recipe) -> PreTrainedConfig:
    return Gemma3TextConfig(
        **_gated(recipe), sliding_window=recipe.positions, query_pre_attn_scalar=recipe.width // recipe.heads
    )


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "gpt2": Shape(_gpt2, bos=False, sink=True),
        "llama": Shape(_llama, bos=True, sink=False),
        "gemma3": Shape(_gemma3, bos=True, sink=False),
    }
)
