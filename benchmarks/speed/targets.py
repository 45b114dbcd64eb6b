"""How fast values are found.

Weights are random: no answer is ever learnt, so that no request stops early and both paths take every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.benchmarks.speed.timing import TimedPair, difference, timed
from errata.editors.core.families.search_rows import PromptRow, SearchProblem
from errata.editors.core.families.value_search import Objective, Target, find_targets

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


def problems_like_counterfact(
    count: int, vocabulary: int, contexts: tuple[int, ...], seed: int = 0
) -> list[SearchProblem]:
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
            rows.append(PromptRow((*context, *before, *subject, *after, *answer[:-1]), start, answer))
        problems.append(SearchProblem(f"#{i}", tuple(rows), PromptRow(subject, len(subject) - 1)))
    return problems


def compare(stage: Stage) -> list[TimedPair]:
    """The search for all requests at MEMIT's last layer, behind MEMIT's contexts."""
    config, architecture = stage.config, stage.architecture
    layer, last = stage.layers[-1], architecture.n_layers - 1
    problems = problems_like_counterfact(
        config.requests, stage.model.config.vocab_size, CONTEXTS["memit"], seed=config.seed
    )

    def ours(some: list[SearchProblem], steps: int) -> list[Target]:
        return find_targets(architecture, some, objective(steps), layer=layer, loss_layer=last, site="block", pad=0)

    ours(problems[:2], 2)  # the first products of a process pay for threads and page faults
    found, fast = timed(lambda: ours(problems, config.steps))
    theirs, plain = timed(
        lambda: find_targets_reference(
            architecture, problems, objective(config.steps), layer=layer, site="block", pad=0
        )
    )
    settings = {
        "requests": config.requests,
        "steps": config.steps,
        "layer": layer,
        "rows": len(problems[0].rows) + 1,
        "same_steps": [len(a.losses) for a in found] == [len(b.losses) for b in theirs],
    }
    agreement = max(difference(_value(a), _value(b)) for a, b in zip(found, theirs, strict=True))
    target = stage.target(8.0, 20.0 if config.precision == "bf16" else 8.0)
    return [TimedPair("targets", "values (z)", fast, plain, agreement, target, settings)]


def objective(steps: int) -> Objective:
    """MEMIT's; no loss is below 0, so that no search stops early."""
    return Objective(
        v_num_grad_steps=steps, v_lr=0.5, v_weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625, stop_loss=0.0
    )


def _value(target: Target) -> torch.Tensor:
    """v_0 + delta."""
    return target.initial.double() + target.delta.double()
