"""The attention of a block as it was computed: which token each head looked at, and which values it read there.

Nothing is looked up by the model's name. While the model runs, products of a matrix of weights over earlier tokens with
one vector per token are kept. The one that enters the attention's output projection is the attention: the product
itself, or the product with a factor per element, where a gate or a norm stands in between.

Shapes: T tokens, H query heads, w width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from errata.editors.core.locating.frozen_norms import exact

_PRODUCTS = ("matmul", "__matmul__", "bmm")
# Rounding of a sum of probabilities in half precision.
_ABOVE_ONE = 0.02
# Products that may lie between the attention and its output projection.
_KEPT = 4


@dataclass(frozen=True)
class Attention:
    """What the heads of one block did.

    Attributes:
        pattern: (H, T, T) the weight of each key token (last) at each query token; float64, on the CPU.
        values: (H, T, w) what each head reads at each token; several query heads may read the same.
        factor: (T, H, w) what a gate or norm multiplies by before the output projection; None: nothing.
    """

    pattern: Tensor
    values: Tensor
    factor: Tensor | None = None

    @property
    def n_heads(self) -> int:
        return self.pattern.shape[0]


class PatternWatch(TorchFunctionMode):
    """Keeps the last products of patterns and values while a model runs one row of `length` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._seen: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._keep(*_unfused(output, *args, **kwargs))
        elif getattr(func, "__name__", "") in _PRODUCTS and len(args) == 2 and not kwargs:
            self._keep(args[0], args[1], output)
        return output

    def _keep(self, pattern: Tensor, values: Tensor, output: Tensor) -> None:
        length = self.length
        if pattern.ndim < 3 or values.ndim < 3 or pattern.shape[-2:] != (length, length):
            return
        if values.shape[-2] != length or values.shape[:-2].numel() > pattern.shape[:-2].numel():
            return
        if bool((pattern < 0).any()) or bool(pattern.triu(1).any()) or float(pattern.sum(-1).max()) > 1 + _ABOVE_ONE:
            return
        width = values.shape[-1]
        values = values.expand(*pattern.shape[:-2], length, width)  # Falcon's heads may share one value
        seen = (x.reshape(-1, *x.shape[-2:]).clone() for x in (pattern, values, output))
        self._seen = [*self._seen[1 - _KEPT :], tuple(seen)]

    def attention_before(self, entering: Tensor) -> Attention | None:
        """Return the attention that made the input (T, H w) of an output projection; None if none did."""
        for pattern, values, output in reversed(self._seen):
            heads, length, width = output.shape
            if entering.numel() != output.numel():
                continue
            given = entering.reshape(length, heads, width).transpose(0, 1)
            found = Attention(exact(pattern), exact(values))
            if torch.equal(given, output):
                return found
            factor = torch.where(output == 0, 0.0, exact(given) / exact(output).masked_fill(output == 0, 1.0))
            if _is_gate(factor) or _is_norm(factor):
                return Attention(found.pattern, found.values, factor.transpose(0, 1))
        return None


def _is_gate(factor: Tensor) -> bool:
    """Return whether factors (H, T, w) are those of a sigmoid."""
    return bool((factor >= 0).all()) and float(factor.max()) <= 1 + _ABOVE_ONE


def _is_norm(factor: Tensor) -> bool:
    """Return whether factors (H, T, w) are a length per token times a weight per element."""
    rows = factor.transpose(0, 1).reshape(factor.shape[1], -1)
    if len(rows) < 2:
        return False
    lengths = rows / rows[:1].masked_fill(rows[:1] == 0, 1.0)
    middle = lengths.median(-1, keepdim=True).values
    return bool(((lengths - middle).abs() <= _ABOVE_ONE * middle.abs()).double().mean() > 0.95)


def _unfused(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pattern, values and output of a fused attention, the pattern as its documentation defines it."""
    if key.shape[-3] != query.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() if query.dtype.itemsize < 4 else query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1), value, output
