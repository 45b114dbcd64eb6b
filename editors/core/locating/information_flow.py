"""Information flow: how much of each hidden state comes from which attention head at which token, and from the MLP.

    flow = information_flow(model, tokenizer, "The capital of France is")
    flow.layers[3].attention[t, s, h]       # share of the state at token t that head h has brought from token s

A state is a sum: what was there before, and the parts that heads (or an MLP) add. A part's importance is how much
nearer the sum is to it than to nothing, c = |whole| - |whole - part|, at least FLOOR; the shares of all parts and of
what was there before sum to 1. Attention's output bias belongs to no part.

Source: Ferrando and Voita 2024 (information flow routes), section 2; the repository facebookresearch/llm-transparency-
tool (routes/contributions.py) was read for the floor, and for SHIFT, which torch's pairwise_distance adds. Norms behind
a sublayer are ours: a part counts as what the norm, at the length that the whole output has, makes of it.

Shapes: T tokens, S key tokens (= T), H heads, L layers, d hidden size, d_in width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError
from errata.editors.core.locating.attention_patterns import Attention
from errata.editors.core.locating.block_sums import BlockSums, block_sums
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.tokens import Tokenizer, prompt_ids

FLOOR, SHIFT = 1e-5, 1e-6
Norm = Literal[1, 2]


@dataclass(frozen=True)
class LayerShares:
    """The shares of one block, in float64 on the CPU.

    Attributes:
        attention: (T, S, H) of the state behind the attention, at each token: what each head has brought from where.
        attention_residual: (T,) what was there before.
        mlp: (T,) of the state behind the MLP.
        mlp_residual: (T,) what was there before.
        reads_middle: Whether the MLP reads the state behind the attention; False: both read the block's input.
    """

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor
    reads_middle: bool = True

    def thresholded(self, threshold: float) -> LayerShares:
        """Return the shares without those up to `threshold`; what is left of each state sums to 1 again.

        A state whose shares are all that small keeps none.
        """
        attention, before = thresholded(self.attention, self.attention_residual, threshold)
        mlp, middle = thresholded(self.mlp, self.mlp_residual, threshold)
        return LayerShares(attention, before, mlp, middle, self.reads_middle)


@dataclass(frozen=True)
class InformationFlow:
    """The shares of all hidden states of one prompt.

    Attributes:
        prompt: The prompt, as read.
        tokens: The text of each token.
        says: The token that the model finds likeliest behind the prompt, as text.
        probability: How likely.
        layers: One entry per block.
    """

    prompt: str
    tokens: tuple[str, ...]
    says: str
    probability: float
    layers: tuple[LayerShares, ...]

    def thresholded(self, threshold: float) -> InformationFlow:
        """Return the flow without small shares, the others made larger; see `LayerShares.thresholded`.

        Raises:
            ConfigError: the threshold is below 0, or not below 1.
        """
        if not 0 <= threshold < 1:
            raise ConfigError(f"threshold: expected a share of at least 0 and below 1, got {threshold}")
        return replace(self, layers=tuple(layer.thresholded(threshold) for layer in self.layers))


def shares(whole: Tensor, parts: Tensor, residual: Tensor, norm: Norm = 1) -> tuple[Tensor, Tensor]:
    """Return the share of each part in a sum, and that of the residual.

    Args:
        whole: (T, d) the sums.
        parts: (T, ..., d) what is added.
        residual: (T, d) what it is added to.
        norm: Of the distance: 1, or 2.

    Returns:
        (T, ...) and (T,), which sum to 1 over all but the first dimension.
    """
    between = tuple(range(1, parts.ndim - 1))
    wholes = whole.reshape(whole.shape[0], *(1 for _ in between), whole.shape[-1])
    found, rest = importance(wholes, parts, norm), importance(whole, residual, norm)
    total = rest + (found.sum(between) if between else found)
    return found / total.reshape(-1, *(1 for _ in between)), rest / total


def importance(whole: Tensor, part: Tensor, norm: Norm = 1) -> Tensor:
    """Return by how much a sum (..., d) is nearer to a part (..., d) than to nothing, at least FLOOR."""
    distance = (part - whole + SHIFT).norm(p=norm, dim=-1)
    return (whole.norm(p=norm, dim=-1) - distance).clamp_min(FLOOR)


def thresholded(parts: Tensor, residual: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return shares (T, ...) and (T,) without those up to a threshold, the rest of each token made to sum to 1."""
    parts, residual = parts * (parts > threshold), residual * (residual > threshold)
    between = tuple(range(1, parts.ndim))
    total = residual + (parts.sum(between) if between else parts)
    total = total.masked_fill(total == 0, 1.0)
    return parts / total.reshape(-1, *(1 for _ in between)), residual / total


@torch.no_grad()
def information_flow(
    model: Any, tokenizer: Tokenizer, prompt: str, *, chat: bool = False, norm: Norm = 1
) -> InformationFlow:
    """Return the shares of all hidden states of a prompt, from one run of the model.

    Args:
        model: A decoder of transformers; edits that are applied to it take part.
        tokenizer: Its fast tokenizer.
        prompt: The text.
        chat: Whether it is a message to an instruct model.
        norm: Of the distance between states: 1, as in the paper, or 2.

    Raises:
        ArchitectureError: a block has no attention, or its sums have another form (block_sums.py).
        RequestError: the prompt is longer than the model takes.
    """
    architecture = describe(model)
    text = as_read(tokenizer, prompt, chat=chat).text
    ids = prompt_ids(tokenizer, text)
    architecture.check_length(len(ids), f"{len(ids)} tokens for the prompt", None)
    ran = block_sums(architecture, ids)
    chances = architecture.logits(ran.normed[-1:])[0].double().softmax(-1)
    says = int(chances.argmax())
    return InformationFlow(
        prompt=text,
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        says=tokenizer.decode([says]),
        probability=float(chances[says]),
        layers=tuple(layer_shares(block, norm) for block in ran.blocks),
    )


def layer_shares(block: BlockSums, norm: Norm = 1) -> LayerShares:
    """Return the shares of one block's sums, its patterns among them."""
    assert block.attention is not None
    rows = [
        shares(block.middle[token, None], parts[None], block.entry[token, None], norm)
        for token, parts in enumerate(head_parts(block, block.attention))
    ]
    mlp, mlp_residual = shares(block.exit, block.exit - block.stream, block.stream, norm)
    return LayerShares(
        attention=torch.cat([found for found, _ in rows]),
        attention_residual=torch.cat([rest for _, rest in rows]),
        mlp=mlp,
        mlp_residual=mlp_residual,
        reads_middle=block.reads_middle,
    )


def head_parts(block: BlockSums, attention: Attention) -> list[Tensor]:
    """Return for each query token what each head brings from each key token to the stream, (S, H, d).

    Args:
        block: The sums of a block.
        attention: Its patterns and values, or others in their place.
    """
    heads, tokens, width = attention.values.shape
    out = block.out.reshape(-1, heads, width).permute(1, 2, 0)  # (H, w, d)
    carried = attention.values @ out if attention.factor is None else None  # (H, S, d), the same for all queries
    found = []
    for token in range(tokens):
        moved = carried
        if moved is None:
            assert attention.factor is not None
            moved = (attention.values * attention.factor[token][:, None]) @ out
        parts = (attention.pattern[:, token, :, None] * moved).transpose(0, 1)
        found.append(block.behind.at(token)(parts))
    return found


def check_token(token: int, count: int) -> None:
    """Refuse an index that is none of `count` tokens.

    Raises:
        ConfigError: it is none; negative ones count from the last.
    """
    if not -count <= token < count:
        told = f"less than {count}" if token > 0 else f"at least {-count}"
        raise ConfigError(f"token: expected {told}, got {token}")


def neuron_shares(
    model: Any, tokenizer: Tokenizer, prompt: str, layer: int, *, token: int = -1
) -> tuple[Tensor, float]:
    """Return the share of each neuron of an MLP in the state behind it, (d_in,), and that of the residual.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        prompt: The text.
        layer: The block, counted from 0.
        token: Which token's state; the last by default.

    Raises:
        ArchitectureError: the block has no dense MLP, or its sums have another form.
        RequestError: the prompt is longer than the model takes.
        ConfigError: there is no such token.
    """
    architecture = describe(model)
    architecture.down(layer)
    ids = prompt_ids(tokenizer, prompt)
    architecture.check_length(len(ids), f"{len(ids)} tokens for the prompt", None)
    check_token(token, len(ids))
    ran = block_sums(architecture, ids, patterns=False, layers=[layer])
    found, rest = shares_of_neurons(architecture, ran.blocks[0], layer, token)
    return found, float(rest)


def shares_of_neurons(
    architecture: Architecture, block: BlockSums, layer: int, token: int, norm: Norm = 1
) -> tuple[Tensor, Tensor]:
    """Return the shares (d_in,) of the neurons of a block with a dense MLP at one token, and () of the residual."""
    assert block.keys is not None and block.behind_mlp is not None
    weight = architecture.map_at(layer).weight.to("cpu", torch.float64)
    parts = block.behind_mlp.at(token)((weight * block.keys[token]).T)
    found, rest = shares(block.exit[token, None], parts[None], block.stream[token, None], norm)
    return found[0], rest[0]
