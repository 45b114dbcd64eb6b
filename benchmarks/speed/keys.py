"""How fast keys and values of all edited layers are read, each layer under the updates of those below."""

from __future__ import annotations

import torch

from errata.benchmarks.speed.keys_reference import PlainWalk, walk_reference
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.targets import CONTEXTS, problems_like_counterfact
from errata.benchmarks.speed.timing import TimedPair, difference, timed
from errata.editors.core.families.search_rows import SearchProblem
from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating


def compare(stage: Stage) -> list[TimedPair]:
    """MEMIT's keys, and AlphaEdit's, whose reference reads them a second time when all layers are edited."""
    count = stage.config.requests
    problems = problems_like_counterfact(count, stage.model.config.vocab_size, CONTEXTS["memit"], stage.config.seed)
    updates = random_updates(stage.architecture, stage.layers, count)
    dense = {layer: update.matrix(torch.float32, stage.device) for layer, update in updates.items()}
    walk_ours(stage.architecture, problems[:2], stage.layers, updates)  # the first products pay for threads
    ours, fast = timed(lambda: walk_ours(stage.architecture, problems, stage.layers, updates))
    settings = {"requests": count, "rows": sum(len(p.rows) for p in problems), "layers": list(stage.layers)}
    found = []
    for name, again, target in (("MEMIT", False, (15.0, 20.0)), ("AlphaEdit", True, (30.0, 40.0))):
        theirs, plain = timed(
            lambda again=again: walk_reference(
                stage.architecture, problems, stage.layers, lambda layer, *_: dense[layer], again=again
            )
        )
        settings = {**settings, "second_pass": again}
        found.append(TimedPair("keys", name, fast, plain, _agreement(ours, theirs), stage.target(*target), settings))
    return found


def random_updates(architecture: Architecture, layers: tuple[int, ...], rank: int) -> dict[int, LowRank]:
    """Updates of a tenth of each weight's norm."""
    found = {}
    for layer in layers:
        weight = architecture.weight(layer)
        generator = torch.Generator().manual_seed(layer)
        U, V = (torch.randn(shape, generator=generator).to(weight.device)
                for shape in ((weight.shape[0], rank), (rank, weight.shape[1])))  # fmt: skip
        scale = 0.1 * float(weight.float().norm()) / LowRank(U, V).norm()
        found[layer] = LowRank(scale * U, V)
    return found


def walk_ours(
    architecture: Architecture, problems: list[SearchProblem], layers: tuple[int, ...], updates: dict[int, LowRank]
) -> PlainWalk:
    """As the editors walk: rows cut off at the position that is read, only the bare prompts watched."""
    rows = [row.ids[: row.start + 1] for problem in problems for row in problem.rows]
    found = PlainWalk({}, {}, {})
    with evaluating(architecture.model):
        walk = LayerWalk(architecture, rows, layers, pad=0, watched=range(0, len(rows), len(problems[0].rows)))
        for layer in layers:
            found.keys[layer] = walk.keys.unflatten(0, (len(problems), -1))
            found.values[layer] = walk.hidden
            walk.advance(updates[layer])
    return found


def _agreement(ours: PlainWalk, theirs: PlainWalk) -> float:
    pairs = [(ours.keys, theirs.keys), (ours.values, theirs.values), (ours.keys, theirs.keys_after)]
    return max(difference(a[layer], b[layer]) for a, b in pairs for layer in b)
