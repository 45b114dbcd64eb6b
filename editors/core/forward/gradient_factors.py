"""Gradients of linear maps as factors: the inputs and output gradients that backpropagation computes anyway.

For a linear map y = W x the gradient of a loss is a sum over tokens of outer products,

    dL/dW = sum_t delta_t x_t^T,    x_t the map's input, delta_t = dL/dy_t

So x and delta hold all of it in d_in + d_out numbers per token, not d_in * d_out. Hooks record them in one forward and
one backward pass. The backward pass ends at the lowest of the maps, and no gradient of a weight is ever formed.

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
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded


@dataclass(frozen=True)
class AnsweredRow:
    """A row of ids, a prompt and answer[:-1]: its last `len(answer)` tokens predict the tokens of `answer`."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def positions(self) -> range:
        """Positions that predict the answer."""
        return range(len(self.ids) - len(self.answer), len(self.ids))


@dataclass(frozen=True)
class Factors:
    """The gradient of one map's weight: x (t, d_in), delta (t, d_out), and the `owner` (t,) of each token: its edit."""

    x: Tensor
    delta: Tensor
    owner: Tensor


def answer_losses(architecture: Architecture, hidden: Tensor, rows: Sequence[AnsweredRow]) -> Tensor:
    """Return the negative log-probability of every answer token, in nats: (tokens of all answers,), row after row.

    Args:
        architecture: The model.
        hidden: The decoder's output (n, l, d) for the rows, padded on the right.
        rows: The rows with their answers.
    """
    row = [i for i, answered in enumerate(rows) for _ in answered.answer]
    position = [p for answered in rows for p in answered.positions]
    answers = torch.tensor([token for answered in rows for token in answered.answer], device=hidden.device)
    logits = architecture.logits(hidden[row, position])
    return cross_entropy(logits.to(working_dtype(logits.dtype)), answers.to(logits.device), reduction="none")


def gradient_factors(
    architecture: Architecture,
    maps: Sequence[nn.Module],
    edits: Sequence[Sequence[AnsweredRow]],
    *,
    pad: int,
    batch_tokens: int,
    answers_only: bool = False,
    summed: bool = False,
) -> tuple[list[Factors], list[list[float]]]:
    """Compute the gradients of several losses at once, in as few passes as memory allows.

    The loss of an edit is the negative log-probability of its rows' answers, a mean over all their tokens. Tokens with
    an x or a delta of zeros, such as those behind the last prediction, are left out.

    Args:
        architecture: The model.
        maps: Linear maps of the decoder. Each must run once in a forward pass.
        edits: The rows of each edit.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a pass.
        answers_only: Keep exactly the tokens that predict the answers, zeros or not. The factors are then a part of the
            gradient.
        summed: Take the sum over an edit's tokens, not the mean. In float16 a share of thousands of tokens is below
            what the format holds.

    Returns:
        The factors of each map, ordered by edit; and for each edit the losses of its rows, each a mean over the row's
        own tokens.
    """
    rows = [row for edit in edits for row in edit]
    owner = [e for e, edit in enumerate(edits) for _ in edit]
    tokens = [sum(len(row.answer) for row in edit) for edit in edits]
    parts: list[list[Factors]] = [[] for _ in maps]
    losses = [0.0] * len(rows)
    for indices in pack_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens, max_padding=PROMPT_PADDING):
        safe_point()
        # The sum of the weighted token losses is the sum of the edits' losses.
        weights = [1.0 if summed else 1 / tokens[owner[i]] for i in indices]
        by_map, means = _pass(architecture, maps, [rows[i] for i in indices], weights, pad, answers_only)
        index = torch.tensor(indices)
        for part, factors in zip(parts, by_map, strict=True):
            part.append(Factors(factors.x, factors.delta, index.to(factors.owner.device)[factors.owner]))
        for i, mean in zip(indices, means, strict=True):
            losses[i] = mean
    grouped = iter(losses)
    return [_ordered(part, owner) for part in parts], [[next(grouped) for _ in edit] for edit in edits]


def _pass(
    architecture: Architecture,
    maps: Sequence[nn.Module],
    rows: Sequence[AnsweredRow],
    weights: Sequence[float],
    pad: int,
    answers_only: bool,
) -> tuple[list[Factors], list[float]]:
    batch = right_padded([row.ids for row in rows], pad).to(architecture.device)
    with torch.enable_grad(), _record(maps) as (inputs, outputs):
        losses = answer_losses(architecture, run_base(architecture, batch), rows)
        each = [weight for row, weight in zip(rows, weights, strict=True) for _ in row.answer]
        total = (losses * torch.tensor(each, dtype=losses.dtype, device=losses.device)).sum()
        gradients = torch.autograd.grad(total, outputs)
    mean = [float(part.mean()) for part in losses.detach().split([len(row.answer) for row in rows])]
    where = [(i, position) for i, row in enumerate(rows) for position in row.positions] if answers_only else None
    return [_chosen_tokens(x, delta, len(rows), where) for x, delta in zip(inputs, gradients, strict=True)], mean


@contextmanager
def _record(maps: Sequence[nn.Module]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Record inputs and outputs of the maps in the forward pass inside the `with`."""
    inputs: list[Any] = [None] * len(maps)
    outputs: list[Any] = [None] * len(maps)

    def hook(index: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The graph begins at the lowest map: nothing below it needs a gradient.
            if not output.requires_grad:
                output.requires_grad_(True)
            inputs[index], outputs[index] = args[0].detach(), output

        return keep

    # These hooks come first: hooks of edits on the model act on what an edited weight gives.
    with hooked(*(module.register_forward_hook(hook(i), prepend=True) for i, module in enumerate(maps))):
        yield inputs, outputs


def _chosen_tokens(x: Tensor, delta: Tensor, n: int, where: Sequence[tuple[int, int]] | None) -> Factors:
    """Return the tokens at `where`, (row, position) each, or those with a gradient if it is None.

    The tensors are (n, l, d), or (n * l, d) as in OPT.
    """
    x, delta = x.reshape(n, -1, x.shape[-1]), delta.reshape(n, -1, delta.shape[-1])
    if where is None:
        row, column = ((x != 0).any(-1) & (delta != 0).any(-1)).nonzero().T
    else:
        row, column = torch.tensor(where, device=x.device).T
    return Factors(x[row, column], delta[row, column], row)


def _ordered(parts: Sequence[Factors], edit_of: Sequence[int]) -> Factors:
    """Return all tokens in the order of their rows, not of the batches, with the edit of each as its owner."""
    row = torch.cat([part.owner for part in parts])
    order = row.argsort(stable=True)
    owner = torch.tensor(edit_of, device=row.device)[row[order]]
    return Factors(torch.cat([p.x for p in parts])[order], torch.cat([p.delta for p in parts])[order], owner)
