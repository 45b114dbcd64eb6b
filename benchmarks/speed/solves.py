"""How fast one layer's update is solved for, with what is computed once computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errata.benchmarks.speed import solves_reference
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.synthetic import Spectrum
from errata.benchmarks.speed.timing import TimedPair, difference, repeated, timed
from errata.editors.core.solve.null_space import GrowingFactor
from errata.editors.core.solve.solvers import Factor, factorise, memit_adjoint, small_adjoint

WEIGHT, RIDGE, L2, THRESHOLD = 15000.0, 0.1, 10.0, 0.02  # the originals' values
TIMES = 3


def compare(stage: Stage) -> list[TimedPair]:
    """MEMIT, EMMET and AlphaEdit at the shape's width, on keys of a second moment of condition 1e5."""
    spectrum = Spectrum.power_law(stage.sizes[1], seed=stage.config.seed)
    C = spectrum.moment().to(stage.device)
    factor, once = timed(lambda: factorise(C))
    assert isinstance(factor, Factor)
    K = spectrum.keys(stage.config.batch, 1).to(stage.device)
    settings = {"d_in": len(C), "batch": stage.config.batch, "condition": 1e5}
    settings |= {"factorisation_seconds": once.seconds, "factorisation_cpu_seconds": once.cpu_seconds}
    return [_memit(stage, K, C, factor, settings), _emmet(stage, K, C, factor, settings), _alphaedit(stage, spectrum)]


def _memit(stage: Stage, K: Tensor, C: Tensor, factor: Factor, settings: dict[str, Any]) -> TimedPair:
    ours, fast = repeated(lambda: memit_adjoint(K, lambda: C, WEIGHT, factor), TIMES)
    theirs, plain = repeated(lambda: solves_reference.memit(K, C, WEIGHT), TIMES)
    target = stage.target(7.0, 10.0)
    return TimedPair("solves", "MEMIT", fast, plain, difference(ours, theirs), target, settings)


def _emmet(stage: Stage, K: Tensor, C: Tensor, factor: Factor, settings: dict[str, Any]) -> TimedPair:
    ours, fast = repeated(lambda: small_adjoint(K, factor.solve(K), RIDGE), TIMES)
    theirs, plain = timed(lambda: solves_reference.emmet(K, C, 1.0, RIDGE))
    return TimedPair("solves", "EMMET", fast, plain, difference(ours, theirs), stage.target(15.0, 15.0), settings)


def _alphaedit(stage: Stage, spectrum: Spectrum) -> TimedPair:
    """The update itself, since the original never forms an adjoint; and what the next batch needs of this one."""
    config, d_out = stage.config, stage.sizes[0]
    projector = spectrum.null_space(THRESHOLD).to(stage.device, torch.float32)
    P = projector.matrix()
    cache = torch.zeros_like(P)
    factor = GrowingFactor.empty(L2)
    for first in range(0, config.earlier, config.batch):
        count = min(config.batch, config.earlier - first)
        past = spectrum.keys(count, 2 + first).float().to(stage.device)
        cache += past @ past.T
        factor = factor.append(projector @ past)[1]
    K = spectrum.keys(config.batch, 1).float().to(stage.device)
    R = torch.randn(d_out, config.batch, generator=torch.Generator().manual_seed(0)).to(stage.device)

    def ours() -> Tensor:
        adjoint, _ = factor.append(projector @ K)
        return R @ adjoint.T.to(R)

    update, fast = repeated(ours, TIMES)
    (theirs, _), plain = repeated(lambda: solves_reference.alphaedit(K, R, P, cache, L2), TIMES)
    settings = {"d_in": len(P), "d_out": d_out, "batch": config.batch, "earlier": config.earlier}
    settings["null_dimensions"] = projector.dimensions
    target = stage.target(20.0, 20.0)
    return TimedPair("solves", "AlphaEdit", fast, plain, difference(update, theirs), target, settings)
