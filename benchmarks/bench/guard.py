"""The guard: after every edit it looks whether the model is still whole, and says which edit was one too many.

The model is measured as it stands and compared with the untouched one, so that an edit is also charged with what those
before it have left: the guard keeps the model within its limits, whichever edit uses them up. Where something else
changed the model before the first edit, such as a compression, the changed model takes the place of the untouched one.
The protocol decides what happens to the edit: a sequence undoes it or ends with it; a single edit is marked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.config import GuardConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import measured_perplexity, retention
from errata.benchmarks.runs.json_values import number
from errata.editors.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the guard measured after an edit.

    Attributes:
        perplexity_ratio: Perplexity over that of the model before the first edit; NaN counts as infinite.
        facts: Share of the known facts that are answered, of those that were before the first edit; None where they
            are not asked.
        reason: Which limit is passed; None where none is.
    """

    perplexity_ratio: float
    facts: float | None
    reason: str | None

    def plain(self) -> dict[str, Any]:
        """As records have it."""
        return {**dataclasses.asdict(self), "tripped": self.reason is not None}


@dataclasses.dataclass(frozen=True)
class Start:
    """What edits are compared with where the model was changed before the first of them.

    Attributes:
        perplexity: Of the guard's texts.
        facts: Share of the known facts that are answered; None where they are not asked.
    """

    perplexity: float
    facts: float | None


def start_of(bench: Bench) -> Start:
    """Return what the model says as it stands, before its first edit.

    Args:
        bench: With the guard's configuration.
    """
    assert bench.guard is not None, "a guard has a configuration"
    facts = None if bench.guard.facts is None else retention(bench)
    return Start(number(measured_perplexity(bench, bench.guard.n_texts)), facts)


def untouched(bench: Bench) -> float | None:
    """Perplexity of the guard's texts before the first edit; None without a guard.

    Raises:
        ConfigError: there is nothing to measure.
    """
    if bench.guard is None:
        return None
    if not bench.texts:
        raise ConfigError(
            "guard needs texts: leave collapse.n_texts above 0 and give collapse.text= where the model's folder brings "
            "none, or guard=none"
        )
    if bench.guard.facts is not None and not bench.known:
        raise ConfigError("guard.facts needs facts that the model knows, which only a testbed brings; set it to null")
    return measured_perplexity(bench, bench.guard.n_texts)


def verdict(
    bench: Bench, before: Baseline, start: Start | None = None, *, without: Collection[str] = ()
) -> Verdict | None:
    """Look at the model as it stands; None without a guard.

    Args:
        bench: With the guard's configuration.
        before: What the untouched model says.
        start: What takes its place where the model was changed before the first edit.
        without: Subjects whose facts are not asked.
    """
    if bench.guard is None:
        return None
    after = measured_perplexity(bench, bench.guard.n_texts)
    ratio = number(after) / number(before.guard if start is None else start.perplexity)
    ratio = math.inf if math.isnan(ratio) else ratio
    facts = None if bench.guard.facts is None else retention(bench, without=without)
    if start is not None and facts is not None:
        facts = min(1.0, facts / start.facts) if start.facts else 1.0
    whose = "the untouched model's" if start is None else "that of the model before the edits"
    return Verdict(ratio, facts, _reason(bench.guard, ratio, facts, whose))


def _reason(limits: GuardConfig, ratio: float, facts: float | None, whose: str) -> str | None:
    if ratio > limits.ratio:
        return f"perplexity is {ratio:.3g} times {whose}, above {limits.ratio:g}"
    if facts is not None and limits.facts is not None and facts < limits.facts:
        return f"{100 * facts:.0f} % of the known facts are kept, below {100 * limits.facts:g} %"
    return None
