"""The margins of answers under ablations: many masks in one batch, each row without its own components.

The margin of a token is its logit less the highest other one: above 0, the model says this token. That of an answer, or
of a text, is the mean over its tokens (Shah et al. 2024).

    row           components that stay      in one batch
    a b c         mask 0                    the inputs of each map, times the row's own gates
    a b c         mask 1                    blocks below the lowest component run once per text
    d e           mask 0

Shapes: m masks, n rows, C components, t tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.forward.whole_rows import WholeForward, rows_from_block
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.locating.components import Components
from errata.editors.core.model.activations import limit_batch_tokens, without_autocast
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.progress import Progress, silent

# Logits that are formed at once: 2^25 in float32 are 128 MiB.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Margins:
    """Margins of n rows under m masks, in logits and float64.

    Attributes:
        mean: (m, n) mean over the tokens of a row's answer.
        least: (m, n) the smallest of them; above 0, the model says the whole answer.
    """

    mean: Tensor
    least: Tensor


@torch.no_grad()
def ablated_margins(
    architecture: Architecture,
    components: Components,
    rows: Sequence[AnsweredRow],
    keep: Tensor,
    *,
    pad: int,
    batch_tokens: int = 8192,
    progress: Progress = silent,
) -> Margins:
    """Return the margins of rows without some components. Nothing is written to the model, and its edits stay.

    Args:
        architecture: The model.
        components: Its components.
        rows: What is asked: prompts with their answers, or texts.
        keep: (m, C) bool, per mask the components that stay.
        pad: Id to pad with.
        batch_tokens: Bound on rows x length of a pass; on a CPU at most what its caches hold.
        progress: Is told how many masks are done, of all batches of rows together.
    """
    keep = keep.to(architecture.device)
    found = torch.zeros(2, len(keep), len(rows), dtype=torch.float64)
    limit = limit_batch_tokens(batch_tokens, architecture.device)
    padding = 0.0 if looks_ahead(architecture.model) else PROMPT_PADDING
    lengths = [len(row.ids) for row in rows]
    done, total = 0, len(keep) * len(rows)
    with evaluating(architecture.model), without_autocast():
        for group in pack_batches(lengths, batch_tokens=limit, max_padding=padding):
            chosen = [rows[i] for i in group]
            ids = [row.ids for row in chosen]
            shared = rows_from_block(architecture, ids, first=components.first_layer, pad=pad)
            at_once = max(1, limit // (len(group) * max(map(len, ids))))
            for masks in torch.arange(len(keep)).split(at_once):
                safe_point()
                index = list(range(len(group))) * len(masks)
                batch = shared.select(index)
                if batch is None:  # an argument of a block cannot be split by rows
                    whole = right_padded([ids[i] for i in index], pad).to(architecture.device)
                    batch = WholeForward(architecture, whole, tuple(len(ids[i]) for i in index))
                with components.ablated(keep[masks.to(keep.device)].repeat_interleave(len(group), dim=0)):
                    hidden = batch.normed(batch.run())
                columns = torch.tensor(group)
                for part, values in zip(found, _margins(architecture, hidden, chosen, len(masks)), strict=True):
                    part[masks[:, None], columns] = values
                done += len(masks) * len(group)
                progress(done, total, "ablations")
    return Margins(found[0], found[1])


def _margins(
    architecture: Architecture, hidden: Tensor, rows: Sequence[AnsweredRow], masks: int
) -> tuple[Tensor, Tensor]:
    """Return means and minima (masks, rows) of the margins, of the decoder's output (masks * rows, l, d)."""
    row = torch.tensor([i for i, answered in enumerate(rows) for _ in answered.answer])
    position = torch.tensor([p for answered in rows for p in answered.positions])
    answer = torch.tensor([token for answered in rows for token in answered.answer], device=hidden.device)
    states = hidden.reshape(masks, len(rows), *hidden.shape[1:])[:, row, position]  # (masks, t, d)
    flat, answers = states.flatten(0, 1), answer.repeat(masks)
    at_once = max(1, _LOGITS_AT_ONCE // architecture.head.weight.shape[0])  # type: ignore[operator, union-attr]
    parts = [
        _token_margins(architecture.logits(some), wanted)
        for some, wanted in zip(
            flat.split(at_once),
            answers.split(at_once),
            strict=True,
        )
    ]
    each = torch.cat(parts).double().cpu().reshape(masks, -1)  # (masks, t)
    counts = [len(answered.answer) for answered in rows]
    of_rows = each.split(counts, dim=1)
    return torch.stack([part.mean(1) for part in of_rows], 1), torch.stack([part.amin(1) for part in of_rows], 1)


def _token_margins(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the margins (t,) of tokens, from their logits (t, V)."""
    logits = logits.to(working_dtype(logits.dtype))
    right = logits.gather(-1, answers[:, None])
    others = logits.scatter(-1, answers[:, None], -torch.inf)
    return right[:, 0] - others.amax(-1)
