"""How fast a fact is traced: one grid, and all three of the ROME paper in one run."""

from __future__ import annotations

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
    grids = grids_of(stage.config.grids, WINDOW)
    requests = [case.request for case in synthetic.cases(stage.words, stage.config.traced, stage.config.seed)]
    noise = scaled_noise(stage.architecture, Noise())
    _ours(stage, requests[0], noise, grids[:1])  # the first products of a process pay for threads
    plain, alone, together, worst, lengths = dict.fromkeys(grids, _NOTHING), _NOTHING, _NOTHING, 0.0, []
    for request in requests:
        located = locate(stage.tokenizer, request.prompt, request.given_subject)
        lengths.append([len(located.ids), located.first, located.end])
        _, first = timed(lambda request=request: _ours(stage, request, noise, grids[:1]))
        ours, every = timed(lambda request=request: _ours(stage, request, noise, grids))
        alone, together = alone + first, together + every
        for grid in grids:
            span = (located.first, located.end)
            theirs, seconds = timed(
                lambda grid=grid, ids=located.ids, span=span: traced(
                    stage.architecture, ids, span, noise.level, grid, noise.noise.samples
                )
            )
            plain[grid] += seconds
            worst = max(worst, difference(ours.grids[grid.name]["probability"], theirs))
    settings = {
        "samples": noise.noise.samples,
        "layers": stage.architecture.n_layers,
        "tokens, subject from, to": lengths,
    }
    target, names = stage.target(8.0, 8.0), [_title(grid) for grid in grids]
    found = [TimedPair("tracing", names[0], alone, plain[grids[0]], worst, target, settings)]
    if len(grids) > 1:
        total = sum(plain.values(), _NOTHING)
        found.append(TimedPair("tracing", ", ".join(names), together, total, worst, target, settings))
    return found


def _ours(stage: Stage, request: EditRequest, noise: ScaledNoise, grids: tuple[Grid, ...]) -> FactTrace:
    return trace(stage.model, stage.tokenizer, request.prompt, request.given_subject, noise, grids=grids)


def _title(grid: Grid) -> str:
    return {"state": "states", "mlp": "MLP", "attention": "attention"}.get(grid.part, grid.name)
