"""Seconds per edit as batches grow, and as edits pile up: one layer's solve and its entry in the ledger."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.benchmarks.speed import solves_reference
from errata.benchmarks.speed.shapes import edited_layers, random_model
from errata.benchmarks.speed.solves import L2, THRESHOLD, WEIGHT
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.synthetic import Spectrum
from errata.benchmarks.speed.timing import Curve, Timing, difference, timed
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.solve.null_space import GrowingFactor
from errata.editors.core.solve.solvers import factorise, memit_adjoint

LARGEST_BATCH = 1000
PLACES = 8  # on the way to growth_to where the plain way is timed


@dataclass(frozen=True)
class _Batch:
    K: Tensor  # (d_in, n)
    R: Tensor  # (d_out, n)


Ours = Callable[[_Batch], LowRank]
Plain = Callable[[_Batch], Tensor]


class _Bench:
    """A model of the shape and the two methods' solves for its first edited layer."""

    def __init__(self, stage: Stage) -> None:
        self.model = random_model(stage.config.growth_shape, device=stage.config.device, seed=stage.config.seed)
        self.architecture: Architecture = describe(self.model)
        self.layer = edited_layers(self.architecture.n_layers)[0]
        self.spectrum = Spectrum.power_law(self.architecture.d_mlp, seed=stage.config.seed)
        self.C = self.spectrum.moment().to(stage.device)
        self.projector = self.spectrum.null_space(THRESHOLD).to(stage.device, torch.float32)
        self.P = self.projector.matrix()
        self.factor = factorise(self.C)
        self.ids = (f"batch {i}" for i in itertools.count())
        self.reset()

    def reset(self) -> None:
        """No edit made yet."""
        Ledger.of(self.model).clear()
        self.past = GrowingFactor.empty(L2)
        self.cache = torch.zeros_like(self.P)

    def batch(self, count: int, seed: int) -> _Batch:
        K = self.spectrum.keys(count, seed).float().to(self.P.device)
        R = 1e-3 * torch.randn(self.architecture.d_model, count, generator=torch.Generator().manual_seed(seed))
        return _Batch(K, R.to(K))

    def memit(self, batch: _Batch) -> LowRank:
        return self._kept(batch, memit_adjoint(batch.K, lambda: self.C, WEIGHT, self.factor))

    def memit_plain(self, batch: _Batch) -> Tensor:
        return batch.R.double() @ solves_reference.memit(batch.K, self.C, WEIGHT).T

    def alphaedit(self, batch: _Batch) -> LowRank:
        adjoint, self.past = self.past.append(self.projector @ batch.K)
        return self._kept(batch, adjoint)

    def alphaedit_plain(self, batch: _Batch) -> Tensor:
        return solves_reference.alphaedit(batch.K, batch.R, self.P, self.cache, L2)[0]

    def _kept(self, batch: _Batch, adjoint: Tensor) -> LowRank:
        """Into the ledger, which writes the weight."""
        update = LowRank(batch.R, adjoint.T.to(batch.R))
        Ledger.of(self.model).append(next(self.ids), Patch({self.architecture.weight_name(self.layer): update}))
        return update

    def written(self, update: Tensor) -> None:
        """The plain way's write, taken back at once."""
        weight = self.architecture.weight(self.layer)
        before = weight.clone()
        weight += update.to(weight)
        weight.copy_(before)


def measure(stage: Stage) -> list[Curve]:
    """Four curves: MEMIT and AlphaEdit, against the batch size and against the edits so far."""
    bench = _Bench(stage)
    _point(bench, bench.memit, bench.memit_plain, bench.batch(2, 0), 0)  # the first products pay for threads
    _point(bench, bench.alphaedit, bench.alphaedit_plain, bench.batch(2, 0), 0)
    methods = (("MEMIT", bench.memit, bench.memit_plain), ("AlphaEdit", bench.alphaedit, bench.alphaedit_plain))
    curves = []
    settings = {"d_in": len(bench.C), "d_out": bench.architecture.d_model, "shape": stage.config.growth_shape}
    with torch.no_grad():
        for name, ours, plain in methods:
            points = []
            for size in _log_steps(min(LARGEST_BATCH, stage.config.growth_to)):
                bench.reset()
                points.append(_point(bench, ours, plain, bench.batch(size, size), size))
            curves.append(Curve(name, "batch size", tuple(points), settings))
        for name, ours, plain in methods:
            points = _piled(bench, ours, plain, stage.config.batch, stage.config.growth_to)
            curves.append(Curve(name, "edits so far", points, {**settings, "batch": stage.config.batch}))
    return curves


def _piled(bench: _Bench, ours: Ours, plain: Plain, size: int, up_to: int) -> tuple[dict[str, float | None], ...]:
    bench.reset()
    starts = range(0, up_to, size)
    compared = set(starts[:: max(1, len(starts) // PLACES)]) | {starts[-1]}
    points = []
    for start in starts:
        batch = bench.batch(min(size, up_to - start), start + 1)
        points.append(_point(bench, ours, plain if start in compared else None, batch, start))
        bench.cache += batch.K @ batch.K.T
    return tuple(points)


def _point(bench: _Bench, ours: Ours, plain: Plain | None, batch: _Batch, x: float) -> dict[str, float | None]:
    """The plain way first: ours moves on what it keeps."""
    count = batch.K.shape[1]
    theirs, slow = None, None
    if plain is not None:
        theirs, slow = timed(lambda: plain(batch))
        slow += timed(lambda: bench.written(theirs))[1]
    update, fast = timed(lambda: ours(batch))
    agreement = None if theirs is None else difference(update.matrix(torch.float64, theirs.device), theirs)

    def per_edit(timing: Timing | None) -> float | None:
        return None if timing is None else timing.cpu_seconds / count

    clock = {"ours_wall": fast.seconds / count, "reference_wall": None if slow is None else slow.seconds / count}
    return {"x": x, "ours": per_edit(fast), "reference": per_edit(slow), "agreement": agreement, **clock}


def _log_steps(up_to: int) -> list[int]:
    """1, 3, 10, 32, 100, ..., `up_to`."""
    steps = (round(10 ** (i / 2)) for i in range(20))
    return sorted({*(step for step in steps if step < up_to), up_to})
