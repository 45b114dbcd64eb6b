"""How an update lies on a grid of a few bits: whether rounding keeps it, and how it compares with rounding's own error.

Shapes: weights (d_out, d_in), t tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.interventions.intervention import Applied, maps_of
from errata.editors.core.interventions.kept import OnGrid
from errata.editors.core.ledger.entry import Entry, find_weight
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.activations import captured_inputs, run_base
from errata.editors.core.model.architecture import Architecture, LinearMap, describe
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.tokens import Tokenizer, prompt_ids, right_padded


@dataclass(frozen=True)
class GridUpdate:
    """The updates of one edited model on the grid of one compression.

    Attributes:
        moved: Share of the elements of the edited weights that the edit takes to another point of the grid; None of a
            compression without a grid.
        half_steps: The median size of an element's update, in half steps of its grid; None likewise.
        carried: For each fact, how many times larger the edit's change of what the edited maps give is than
            rounding's, at the token of the prompt where the edit changes it most: ||D x|| / ||E x|| over all edited
            maps, with the update D, the rounding error E and the maps' inputs x.
    """

    moved: float | None
    half_steps: float | None
    carried: tuple[float, ...]

    @staticmethod
    def together(found: Sequence[GridUpdate]) -> dict[str, float | int | None]:
        """Return the means over edited models, and the median over facts."""
        carried = [ratio for one in found for ratio in one.carried]
        moved = [one.moved for one in found if one.moved is not None]
        half_steps = [one.half_steps for one in found if one.half_steps is not None]
        return {
            "moved": fmean(moved) if moved else None,
            "half_steps": fmean(half_steps) if half_steps else None,
            "carried": median(carried) if carried else None,
            "n": len(carried),
        }


def edited_maps(model: Any, entries: Sequence[Entry]) -> dict[str, LinearMap]:
    """Return the linear maps of a model's blocks that edits change, by the full names of their weights."""
    names = {name for entry in entries for name in entry.patch.updates}
    return {found.name: found for found in maps_of(describe(model)) if found.name in names}


def update_on_grid(
    ledger: Ledger,
    model: Any,
    tokenizer: Tokenizer,
    maps: Mapping[str, LinearMap],
    merged: Mapping[str, Tensor],
    applied: Applied,
    texts: Sequence[tuple[str, bool]],
) -> GridUpdate:
    """Return how the updates of an edited model lie on the grid of a compression that it carries now.

    Args:
        ledger: Of the model that was edited, for the untouched weights.
        model: The merged model with the compression.
        tokenizer: Its tokenizer.
        maps: Its edited maps.
        merged: Their weights before the compression.
        applied: The compression.
        texts: The edited prompts, and whether each is a message of a chat.
    """
    moved, sizes, updates, errors = [], [], {}, {}
    for name, found in maps.items():
        weight, kept = merged[name], applied.kept.get(name)
        updates[name], errors[name] = weight - _untouched(ledger, name).to(weight), found.weight - weight
        if isinstance(kept, OnGrid):
            moved.append((kept.project(weight) != kept.project(weight - updates[name])).float().flatten())
            sizes.append((updates[name].abs() / (kept.steps / 2)).flatten())
    carried = tuple(_carried(model, tokenizer, maps, updates, errors, texts))
    if not moved:
        return GridUpdate(None, None, carried)
    return GridUpdate(float(torch.cat(moved).mean()), float(torch.cat(sizes).median()), carried)


def _untouched(ledger: Ledger, name: str) -> Tensor:
    base = ledger.base(name)
    return base.T if find_weight(ledger.model, name).transposed else base


def _carried(
    model: Any,
    tokenizer: Tokenizer,
    maps: Mapping[str, LinearMap],
    updates: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    texts: Sequence[tuple[str, bool]],
) -> Iterator[float]:
    architecture: Architecture = describe(model)
    for text, chat in texts:
        ids = prompt_ids(tokenizer, as_read(tokenizer, text, chat=chat).text)
        batch = right_padded([ids], 0).to(architecture.device)
        modules = [found.module for found in maps.values()]
        with torch.no_grad(), captured_inputs(modules, stop=False) as seen:
            run_base(architecture, batch)
        change, error = torch.zeros(len(ids)), torch.zeros(len(ids))  # squares, by token
        for place, name in enumerate(maps):
            if place in seen:  # a map that no token reaches, such as an expert's, has no input
                inputs = seen[place].reshape(len(ids), -1).to(updates[name])
                change += (inputs @ updates[name].T).square().sum(1).cpu()
                error += (inputs @ errors[name].T).square().sum(1).cpu()
        token = int(change.argmax())
        if error[token] > 0:
            yield float((change[token] / error[token]).sqrt())
