"""Second moments the plain way, to check and time ours against: one pass per layer, whole products, no packing.

This is what the original programs do, written again from the formula; `grouped` follows their batching (a hundred texts
at a time, sorted by length, as many in a batch as padded tokens allow), else every text is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.model.own_forward import hooked


class _Stop(Exception):
    pass


@torch.no_grad()
def reference_moments(
    model: Any,
    tokenizer: Any,
    modules: dict[int, nn.Module],
    texts: Sequence[str],
    *,
    max_length: int,
    dtype: torch.dtype,
    grouped: bool = False,
    batch_tokens: int = 3072,
) -> dict[int, Tensor]:
    """{layer: (1 / N) sum x x^T (d_in, d_in)} over all tokens, products and sums in `dtype`."""
    moments: dict[int, Tensor] = {}
    for layer, module in modules.items():
        total, count = None, 0
        for batch in _batches(texts, tokenizer, max_length, grouped, batch_tokens):
            x = _input_of(model, module, batch).to(dtype)
            x = x.reshape(-1, x.shape[-1])[batch["attention_mask"].reshape(-1).bool().to(x.device)]
            total = x.T @ x if total is None else total + x.T @ x
            count += len(x)
        assert total is not None
        moments[layer] = total / count
    return moments


def _batches(
    texts: Sequence[str], tokenizer: Any, max_length: int, grouped: bool, batch_tokens: int
) -> list[dict[str, Tensor]]:
    rows = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    if not grouped:
        return [_padded([row]) for row in rows]
    batches = []
    for start in range(0, len(rows), 100):
        group: list[list[int]] = []
        for row in sorted(rows[start : start + 100], key=len, reverse=True):
            if group and (len(group) + 1) * len(group[0]) > batch_tokens:
                batches.append(_padded(group))
                group = []
            group.append(row)
        batches.append(_padded(group))
    return batches


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _input_of(model: Any, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(keep)
    with suppress(_Stop), hooked(handle):
        model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    return seen[0]
