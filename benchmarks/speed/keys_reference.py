"""The walk through the edited layers as plain as the originals have it: a whole forward for every question.

For each layer: one forward pass of all rows, to the logits, for its keys; one of the bare prompts for the values of the
last layer; then the update is really written. Nothing in the library uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.families.search_rows import SearchProblem
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked
from errata.editors.core.model.tokens import right_padded

# The originals run 512 rows at a time; fewer where their logits would take more than 2 GiB.
ROWS, LOGITS = 512, 2**29

Ids = Sequence[int]
# (layer, keys (n, contexts, d_in), values (n, d)) -> the layer's update (d_out, d_in)
Solve = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PlainWalk:
    """What was read, by layer: keys (n, contexts, d_in), values (n, d), and keys once all layers are edited."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    keys_after: dict[int, Tensor]


def walk_reference(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    layers: Sequence[int],
    solve: Solve,
    *,
    again: bool = False,
) -> PlainWalk:
    """Go through the layers; the weights are as before when this returns.

    Args:
        again: Read the keys of every layer once more when all are edited, as AlphaEdit does for its cache.
    """
    rows = [(_prompt(row.ids, row.answer), row.start) for problem in problems for row in problem.rows]
    bare = [(_prompt(problem.rows[0].ids, problem.rows[0].answer), problem.rows[0].start) for problem in problems]
    found = PlainWalk({}, {}, {})

    def keys(layer: int) -> Tensor:
        return states_at(architecture, rows, architecture.down(layer), of="input").unflatten(0, (len(problems), -1))

    with torch.no_grad(), evaluating(architecture.model), restored(architecture, layers):
        for layer in layers:
            found.keys[layer] = keys(layer)
            found.values[layer] = states_at(architecture, bare, architecture.block(layers[-1]), of="output")
            weight = architecture.weight(layer)
            weight += solve(layer, found.keys[layer], found.values[layer]).to(weight)
        if again:
            found.keys_after.update({layer: keys(layer) for layer in layers})
    return found


def states_at(architecture: Architecture, rows: Sequence[tuple[Ids, int]], module: nn.Module, *, of: str) -> Tensor:
    """Input or output of `module` at one position of each row, (rows, width), by whole forward passes."""
    longest = max(len(ids) for ids, _ in rows)
    vocabulary = int(architecture.head.weight.shape[0])  # type: ignore[union-attr, operator]
    step = max(1, min(ROWS, LOGITS // (longest * vocabulary)))
    parts = []
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        batch = right_padded([ids for ids, _ in some], 0).to(architecture.device)
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            state = args[0] if of == "input" else output[0] if isinstance(output, tuple) else output
            seen.append(state.reshape(*batch.ids.shape, -1))  # noqa: B023 - the hook is gone before the next batch

        with hooked(module.register_forward_hook(keep)):
            architecture.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
        parts.append(torch.stack([state[start] for state, (_, start) in zip(seen[0], some, strict=True)]))
    return torch.cat(parts)


@contextmanager
def restored(architecture: Architecture, layers: Sequence[int]) -> Iterator[None]:
    """The layers' weights are put back on leaving."""
    before = [architecture.weight(layer).clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            architecture.weight(layer).copy_(weight)


def _prompt(ids: Ids, answer: Ids) -> Ids:
    """A row without what of its answer stands behind it."""
    return ids[: len(ids) - (len(answer) - 1)] if answer else ids
