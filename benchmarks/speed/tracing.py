"""How fast a fact is traced: one grid, and all three of the ROME paper in one run."""

from __future__ import annotations

import random

import torch

from errata.benchmarks.speed import synthetic
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, Timing, difference, timed
from errata.benchmarks.speed.tracing_reference import traced
from errata.editors.core.locating.corruption import Noise, ScaledNoise, scaled_noise
from errata.editors.core.locating.grids import Grid, grids_of
from errata.editors.core.locating.tracing import FactTrace, locate, trace
from errata.editors.core.request import EditRequest

WINDOW = 10
_NOTHING = Timing(0.0, 0.0)


def compare(stage: Stage) -> list[TimedPair]:
    """One grid, and all grids from one run, against one forward pass per cell."""
    grids, requests = grids_of(stage.config.grids, WINDOW), _requests(stage)
    noise = scaled_noise(stage.architecture, Noise())
    _ours(stage, requests[0], noise, grids[:1])  # the first products of a process pay for threads
    plain, alone, together, worst, lengths = dict.fromkeys(grids, _NOTHING), _NOTHING, _NOTHING, 0.0, []
    for request in requests:
        located = locate(stage.tokenizer, request.prompt, request.given_subject)
        lengths.append([len(located.ids), located.first, located.end])
        only, first = timed(lambda request=request: _ours(stage, request, noise, grids[:1]))
        ours, every = only, first
        if grids[1:]:
            ours, every = timed(lambda request=request: _ours(stage, request, noise, grids))
        alone, together = alone + first, together + every
        cells = _spread(len(located.ids), stage.architecture.n_layers, stage.config.plain_cells)
        share = len(cells) / (len(located.ids) * stage.architecture.n_layers)
        for grid in grids:
            span = (located.first, located.end)
            theirs, seconds = timed(
                lambda grid=grid, ids=located.ids, span=span, cells=cells: traced(
                    stage.architecture, ids, span, noise.level, grid, noise.noise.samples, cells
                )
            )
            plain[grid] += Timing(seconds.seconds / share, seconds.cpu_seconds / share)
            same = ours.grids[grid.name]["probability"][tuple(torch.tensor(cells).T)]
            worst = max(worst, difference(same, theirs))
    settings = {
        "samples": noise.noise.samples,
        "layers": stage.architecture.n_layers,
        "tokens, subject from, to": lengths,
        "plain_cells": stage.config.plain_cells,
    }
    target, names = stage.target(8.0, 8.0), [_title(grid) for grid in grids]
    found = [TimedPair("tracing", names[0], alone, plain[grids[0]], worst, target, settings)]
    if len(grids) > 1:
        total = sum(plain.values(), _NOTHING)
        found.append(TimedPair("tracing", ", ".join(names), together, total, worst, target, settings))
    return found


def _requests(stage: Stage) -> list[EditRequest]:
    """Return the prompts: some of the file of CounterFact, by the seed, or made-up ones that begin with their subject.

    Most prompts of CounterFact begin with their subject, but its first ones do not.
    """
    count = stage.config.traced
    if stage.config.data is None:
        return [case.request for case in synthetic.cases(stage.words, count, stage.config.seed)]
    from errata.benchmarks.datasets import registry

    cases = registry.load("counterfact", stage.config.data).cases
    return [case.request for case in random.Random(stage.config.seed).sample(cases, min(count, len(cases)))]


def _spread(tokens: int, layers: int, count: int) -> list[tuple[int, int]]:
    """Return `count` cells (token, layer) at equal distances in the order of a heat map's rows; all for 0."""
    every = [(token, layer) for token in range(tokens) for layer in range(layers)]
    number = min(count or len(every), len(every))
    return [every[(2 * i + 1) * len(every) // (2 * number)] for i in range(number)]


def _ours(stage: Stage, request: EditRequest, noise: ScaledNoise, grids: tuple[Grid, ...]) -> FactTrace:
    return trace(stage.model, stage.tokenizer, request.prompt, request.given_subject, noise, grids=grids)


def _title(grid: Grid) -> str:
    return {"state": "states", "mlp": "MLP", "attention": "attention"}.get(grid.part, grid.name)
