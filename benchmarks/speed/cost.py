"""What many edits cost on a large model, on paper: floating point operations by formula, bytes by shape.

A forward pass of one token through a linear map of m weights takes 2 m operations, and the gradient for its input as
many. Attention adds 4 (heads x head size) per token and token that it looks at; norms and activations are left out.
tests/benchmarks/test_cost.py compares the formulas with torch's counter of operations.

Shapes: t tokens, d hidden size, d_in width of the keys, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from errata.benchmarks.speed.shapes import configuration
from errata.editors.core.model.architecture import describe


@dataclass(frozen=True)
class ModelCost:
    """What a token costs in a model.

    Attributes:
        parameters: Of the whole model.
        layers: Its blocks.
        d, d_in: Hidden size, and width of the keys.
        block: Operations of one token in one block, attention's products with other tokens left out.
        head: Operations of one position in the head.
        seen: Operations of one token in one block for each token that it looks at.
    """

    parameters: int
    layers: int
    d: int
    d_in: int
    block: int
    head: int
    seen: int

    @classmethod
    def of(cls, config: Any) -> ModelCost:
        """Return the costs of a configuration of transformers; no weight is made."""
        import transformers

        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        parts = describe(model)
        matrices = [weight.numel() for weight in parts.block(0).parameters() if weight.ndim == 2]
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()),
            layers=parts.n_layers,
            d=parts.d_model,
            d_in=parts.d_mlp,
            block=2 * sum(matrices),
            head=2 * parts.d_model * config.vocab_size,
            seen=4 * width,
        )

    @classmethod
    def of_shape(cls, shape: str) -> ModelCost:
        """Return the costs of a shape of shapes.py."""
        return cls.of(configuration(shape))

    def forward(self, tokens: float, seen: float, reads: float = 0, layers: int | None = None) -> float:
        """Return the operations of a forward pass.

        Args:
            tokens: How many run.
            seen: How many tokens each looks at, on average.
            reads: Positions that the head reads.
            layers: Blocks that they pass; by default all.
        """
        count = self.layers if layers is None else layers
        return tokens * count * (self.block + seen * self.seen) + reads * self.head


@dataclass(frozen=True)
class EditTokens:
    """Tokens of one edit, means over a dataset.

    Attributes:
        prefix: From the start of all rows to the subject's last token.
        suffix: From the subject's last token on, with the essence row.
        seen: Tokens that a token of a suffix looks at.
        reads: Positions where the search reads the head.
        asked: Tokens of the prompts of an evaluation, with the answers.
        answers: Of these, the positions that the head reads.
    """

    prefix: float
    suffix: float
    seen: float
    reads: float
    asked: float
    answers: float


def search_step(model: ModelCost, tokens: EditTokens, layer: int) -> float:
    """Return the operations of one step of the search for a value behind `layer`: a pass forward, and one back."""
    return 2 * model.forward(tokens.suffix, tokens.seen, tokens.reads, model.layers - 1 - layer)


def search(model: ModelCost, tokens: EditTokens, layer: int, steps: int) -> float:
    """Return the operations of a whole search: one pass of all rows, and its steps; the last has no pass back."""
    first = model.forward(tokens.prefix + tokens.suffix, tokens.seen)
    return first + (steps - 0.5) * search_step(model, tokens, layer)


def keys(model: ModelCost, tokens: EditTokens, last: int) -> float:
    """Return the operations of the keys of all layers up to `last`, each block once."""
    return model.forward(tokens.prefix, tokens.seen, layers=last + 1)


def evaluation(model: ModelCost, tokens: EditTokens) -> float:
    """Return the operations of asking all probes of an edit once, without free texts."""
    return model.forward(tokens.asked, tokens.seen, tokens.answers)


def moments(model: ModelCost, tokens: float, seen: float, last: int, layers: int) -> float:
    """Return the operations of second moments: a pass up to the last layer, and the upper half of x x^T."""
    return model.forward(tokens, seen, layers=last + 1) + tokens * layers * model.d_in**2


def solves(model: ModelCost, edits: int, batch: int, layers: int) -> float:
    """Return the operations of MEMIT's solves in float64: a Cholesky factor per layer, and two triangular solves and
    two small products per batch."""
    each = 2 * model.d_in**2 * batch + 2 * model.d_in * batch**2 + batch**3 / 3 + 2 * model.d_in * batch**2
    return layers * (model.d_in**3 / 3 + -(-edits // batch) * each)


def factor_bytes(model: ModelCost, layers: int) -> int:
    """Return the bytes of one edit's factors in float32, as the ledger holds them and the journal writes them."""
    return 4 * layers * (model.d + model.d_in)


def moment_bytes(model: ModelCost, layers: int) -> int:
    """Return the bytes of the factors of the second moments in float64."""
    return 8 * layers * model.d_in**2
