"""Gradients of linear maps, in the factors that backpropagation has at hand anyway.

For a linear map y = W x the gradient of a loss is a sum over tokens of outer products,

    dL/dW = sum_t delta_t x_t^T,    x_t the map's input, delta_t = dL/dy_t

so that x and delta hold all of it in (d_in + d_out) numbers a token instead of d_in * d_out. They are caught by hooks
in one forward and one backward pass, which goes down to the lowest of the maps and no further; no gradient of a weight
is ever formed.

Shapes: n rows, l tokens of a row, t tokens that have a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import hooked, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.tokens import right_padded


@dataclass(frozen=True)
class AnsweredRow:
    """A row of ids whose last `len(answer)` tokens predict the tokens of `answer`: a prompt and answer[:-1]."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def places(self) -> range:
        """Positions that predict the answer."""
        return range(len(self.ids) - len(self.answer), len(self.ids))


@dataclass(frozen=True)
class Factors:
    """The gradient of one map's weight: x (t, d_in) and delta (t, d_out); `owner` (t,) says whose a token is."""

    x: Tensor
    delta: Tensor
    owner: Tensor


def answer_losses(architecture: Architecture, hidden: Tensor, rows: Sequence[AnsweredRow]) -> Tensor:
    """Negative log probability of every answer token, in nats: (tokens of all answers,), row after row.

    Args:
        hidden: The decoder's output (n, l, d) for the rows, padded on the right.
    """
    row = [i for i, answered in enumerate(rows) for _ in answered.answer]
    place = [p for answered in rows for p in answered.places]
    answers = torch.tensor([token for answered in rows for token in answered.answer], device=hidden.device)
    logits = architecture.logits(hidden[row, place])
    return cross_entropy(logits.to(working_dtype(logits.dtype)), answers.to(logits.device), reduction="none")


def gradient_factors(
    architecture: Architecture,
    maps: Sequence[nn.Module],
    edits: Sequence[Sequence[AnsweredRow]],
    *,
    pad: int,
    batch_tokens: int,
) -> tuple[list[Factors], list[list[float]]]:
    """The gradients of several losses at once, in as few passes as memory allows. The loss of an edit is the negative
    log probability of its rows' answers, a mean over all of their tokens.

    Tokens whose x or delta is zero throughout, as those behind the last prediction, are left out.

    Args:
        maps: Linear maps of the decoder, each of which runs once.
        edits: The rows of each.
        batch_tokens: Bound on rows x length of a pass.

    Returns:
        The factors of each map, ordered by edit; and of each edit the losses of its rows, each over its own tokens.
    """
    rows = [row for edit in edits for row in edit]
    owner = [e for e, edit in enumerate(edits) for _ in edit]
    tokens = [sum(len(row.answer) for row in edit) for edit in edits]
    parts: list[list[Factors]] = [[] for _ in maps]
    losses = [0.0] * len(rows)
    for places in pack_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens, max_padding=PROMPT_PADDING):
        safe_point()
        weights = [1 / tokens[owner[i]] for i in places]
        found, means = _pass(architecture, maps, [rows[i] for i in places], weights, pad)
        index = torch.tensor(places)
        for part, factors in zip(parts, found, strict=True):
            part.append(Factors(factors.x, factors.delta, index.to(factors.owner.device)[factors.owner]))
        for i, mean in zip(places, means, strict=True):
            losses[i] = mean
    grouped = iter(losses)
    return [_ordered(part, owner) for part in parts], [[next(grouped) for _ in edit] for edit in edits]


def _pass(
    architecture: Architecture,
    maps: Sequence[nn.Module],
    rows: Sequence[AnsweredRow],
    weights: Sequence[float],
    pad: int,
) -> tuple[list[Factors], list[float]]:
    batch = right_padded([row.ids for row in rows], pad).to(architecture.device)
    with torch.enable_grad(), _caught(maps) as (inputs, outputs):
        losses = answer_losses(architecture, run_base(architecture, batch), rows)
        each = [weight for row, weight in zip(rows, weights, strict=True) for _ in row.answer]
        total = (losses * torch.tensor(each, dtype=losses.dtype, device=losses.device)).sum()
        gradients = torch.autograd.grad(total, outputs)
    mean = [float(part.mean()) for part in losses.detach().split([len(row.answer) for row in rows])]
    return [_kept(x, delta, len(rows)) for x, delta in zip(inputs, gradients, strict=True)], mean


@contextmanager
def _caught(maps: Sequence[nn.Module]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Inputs and outputs of the maps in the forward pass inside; of outputs that nothing below asks a gradient of, one
    is asked for, so that the graph begins there."""
    inputs: list[Any] = [None] * len(maps)
    outputs: list[Any] = [None] * len(maps)

    def hook(place: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)
            inputs[place], outputs[place] = args[0].detach(), output

        return keep

    # Beneath the hooks of edits that the model carries, which take what an edited weight gives.
    with hooked(*(module.register_forward_hook(hook(i), prepend=True) for i, module in enumerate(maps))):
        yield inputs, outputs


def _kept(x: Tensor, delta: Tensor, n: int) -> Factors:
    """The tokens with a gradient, from (n, l, d), or (n * l, d) as OPT has it."""
    x, delta = x.reshape(n, -1, x.shape[-1]), delta.reshape(n, -1, delta.shape[-1])
    alive = (x != 0).any(-1) & (delta != 0).any(-1)  # (n, l)
    return Factors(x[alive], delta[alive], alive.nonzero()[:, 0])


def _ordered(parts: Sequence[Factors], edit_of: Sequence[int]) -> Factors:
    """All tokens in the order of their rows, however these were batched, with the edits that they are of."""
    row = torch.cat([part.owner for part in parts])
    order = row.argsort(stable=True)
    owner = torch.tensor(edit_of, device=row.device)[row[order]]
    return Factors(torch.cat([p.x for p in parts])[order], torch.cat([p.delta for p in parts])[order], owner)
