"""How fast a fact is traced: its states, and all three grids of the ROME paper in one run."""

from __future__ import annotations

from errata.benchmarks.speed import synthetic
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, Timing, difference, timed
from errata.benchmarks.speed.tracing_reference import traced
from errata.editors.core.locating.corruption import Noise, scaled_noise
from errata.editors.core.locating.grids import Grid
from errata.editors.core.locating.tracing import locate, trace

WINDOW = 10
GRIDS = (Grid("state"), Grid("mlp", WINDOW), Grid("attention", WINDOW))


def compare(stage: Stage) -> list[TimedPair]:
    """The grid of states, and the three grids of the paper from one run against one after another."""
    model, tokenizer, architecture = stage.model, stage.tokenizer, stage.architecture
    requests = [case.request for case in synthetic.cases(stage.words, stage.config.traced, stage.config.seed)]
    noise = scaled_noise(architecture, Noise())
    samples = noise.noise.samples
    trace(model, tokenizer, requests[0].prompt, str(requests[0].subject), noise, grids=GRIDS[:1], tokens="subject_last")
    plain = {grid: Timing(0.0, 0.0) for grid in GRIDS}
    states, every, worst, lengths = Timing(0.0, 0.0), Timing(0.0, 0.0), 0.0, []
    for request in requests:
        prompt, subject = request.prompt, str(request.subject)
        _, alone = timed(
            lambda prompt=prompt, subject=subject: trace(model, tokenizer, prompt, subject, noise, grids=GRIDS[:1])
        )
        ours, together = timed(
            lambda prompt=prompt, subject=subject: trace(model, tokenizer, prompt, subject, noise, grids=GRIDS)
        )
        states, every = states + alone, every + together
        located = locate(tokenizer, prompt, subject)
        lengths.append((len(located.ids), located.first, located.end))
        for grid in GRIDS:
            span = (located.first, located.end)
            theirs, seconds = timed(
                lambda grid=grid, ids=located.ids, span=span: traced(
                    architecture, ids, span, noise.level, grid, samples
                )
            )
            plain[grid] += seconds
            worst = max(worst, difference(ours.grids[grid.name]["probability"], theirs))
    settings = {"samples": samples, "tokens, subject from, to": lengths, "layers": architecture.n_layers}
    target = stage.target(8.0, 8.0)
    total = plain[GRIDS[0]] + plain[GRIDS[1]] + plain[GRIDS[2]]
    return [
        TimedPair("tracing", "states", states, plain[GRIDS[0]], worst, target, settings),
        TimedPair("tracing", f"states, MLP and attention (window {WINDOW})", every, total, worst, target, settings),
    ]
