"""How fast values are found, against the plain path in the same run, and how far the two agree.

    python -m errata.benchmarks.speed.targets --shape gpt2 --requests 32 --steps 20 --threads 1 --contexts memit

Weights are random: no answer is ever learnt, so that no request stops early and both paths take every step.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from errata.benchmarks.speed.shapes import SHAPES, random_model
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.architecture import Architecture, describe
from errata.editors.core.suffix import Site
from errata.editors.core.targets import Objective, Problem, Row, Target, find_targets

logger = logging.getLogger(__name__)


# Shares of lengths in words. Names take some more tokens than words; answers are nearly always one of either.
LENGTHS = MappingProxyType(
    {
        "before": {0: 0.80, 1: 0.03, 3: 0.09, 4: 0.08},
        "subject": {1: 0.10, 2: 0.30, 3: 0.25, 4: 0.20, 5: 0.10, 6: 0.05},
        "after": {1: 0.15, 2: 0.19, 3: 0.30, 4: 0.14, 5: 0.17, 6: 0.05},
        "answer": {1: 0.9, 2: 0.1},
    }
)
# Lengths in tokens of the contexts that the papers put before a prompt, the period included; 0 is the bare prompt.
CONTEXTS = MappingProxyType({"rome": (0, *[6] * 10, *[11] * 10), "memit": (0, *[11] * 5)})


def problems_like_counterfact(count: int, vocabulary: int, contexts: tuple[int, ...], seed: int = 0) -> list[Problem]:
    """Requests of the shape of CounterFact's: random ids, lengths drawn as its 19,727 prompts have them in words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shares: Mapping[int, float]) -> int:
        return list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1, generator=generator))]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())

    prefixes = [ids(length) for length in contexts]
    problems = []
    for i in range(count):
        before, subject, after, answer = (ids(draw(shares)) for shares in LENGTHS.values())
        rows = []
        for context in prefixes:
            start = len(context) + len(before) + len(subject) - 1
            rows.append(Row((*context, *before, *subject, *after, *answer[:-1]), start, answer))
        problems.append(Problem(f"#{i}", tuple(rows), Row(subject, len(subject) - 1)))
    return problems


def measure(
    architecture: Architecture, problems: list[Problem], *, layer: int, steps: int, site: Site
) -> dict[str, Any]:
    """Seconds and CPU seconds of both paths, their ratio, and the largest relative difference of any value found."""
    objective = Objective(steps, 0.5, 0.5, 4.0, 0.0625)
    ours, fast = _timed(
        lambda: find_targets(
            architecture, problems, objective, layer=layer, loss_layer=architecture.n_layers - 1, site=site, pad=0
        )
    )
    theirs, plain = _timed(
        lambda: find_targets_reference(architecture, problems, objective, layer=layer, site=site, pad=0)
    )
    return {
        "ours": fast,
        "reference": plain,
        "ratio_wall": plain["seconds"] / fast["seconds"],
        "ratio_cpu": plain["cpu_seconds"] / fast["cpu_seconds"],
        "largest_relative_difference": max(_difference(a, b) for a, b in zip(ours, theirs, strict=True)),
        "same_steps": [len(a.losses) for a in ours] == [len(b.losses) for b in theirs],
    }


def _timed(function: Any) -> tuple[list[Target], dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _difference(ours: Target, theirs: Target) -> float:
    """Of the values v_0 + delta."""
    a, b = (target.initial.double() + target.delta.double() for target in (ours, theirs))
    return float((a - b).norm() / b.norm())


def main() -> None:
    """Measure and log one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--layer", type=int, default=None, help="the edited layer; by default where the papers edit GPT-2 XL"
    )
    parser.add_argument("--contexts", choices=sorted(CONTEXTS), default="memit")
    parser.add_argument("--site", choices=("mlp", "block"), default="block", help="mlp: ROME's; block: MEMIT's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    model = random_model(options.shape, dtype=getattr(torch, options.dtype), device=options.device)
    architecture = describe(model)
    layer = round(architecture.n_layers * 17 / 48) if options.layer is None else options.layer
    problems = problems_like_counterfact(options.requests, model.config.vocab_size, CONTEXTS[options.contexts])
    logger.info(
        "%s",
        json.dumps(
            {
                **vars(options),
                "layer": layer,
                "torch": torch.__version__,
                **measure(architecture, problems, layer=layer, steps=options.steps, site=options.site),
            }
        ),
    )


if __name__ == "__main__":
    main()
