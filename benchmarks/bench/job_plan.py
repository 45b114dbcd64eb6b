"""The jobs of a sweep, planned from its overrides before any of them runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from errata.benchmarks.bench.compose import compose, swept
from errata.benchmarks.runs.hydra_grammar import override_name, typed
from errata.benchmarks.runs.results import AT_ONCE
from errata.editors.core.errors import ConfigError

_SIZE = "batch_size"


def expand(lines: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep, as Hydra numbers them: every combination, the last override's values first. Of several
    values for one name the last counts.

    Args:
        lines: Overrides; some have several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(lines)):
        key = override.get_key_element()
        if key.lstrip("+~").split(".")[0].split("/")[0] == "hydra":
            continue
        if override.is_sweep_override():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(job) for job in itertools.product(*values.values())]


def first_job(lines: Sequence[str]) -> list[str]:
    """The first of the jobs that a sweep plans, with the values that an experiment brings along."""
    return expand([*swept(lines), *lines])[0]


def refuse_repeats(jobs: Sequence[Sequence[str]]) -> None:
    """Refuse a sweep in which two jobs are one run. Their overrides are the same, or differ only in the size of their
    batches although all edits are one batch.

    Args:
        jobs: As `expand` gives them.

    Raises:
        ConfigError: says which.
    """
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for job in jobs:
        rest = tuple(line for line in job if override_name(line) != _SIZE)
        alike.setdefault(rest, []).append(tuple(job))
    for rest, group in alike.items():
        if len(set(group)) < len(group):
            raise ConfigError(f"the sweep says one run {len(group)} times: {' '.join(map(typed, group[0]))}")
        if len(group) > 1 and compose("bench", rest)["protocol"]["name"] in AT_ONCE:
            sizes = ", ".join(line.partition("=")[2] for job in group for line in job if override_name(line) == _SIZE)
            raise ConfigError(
                f"batch_size={sizes} would be one run {len(group)} times, since protocol=batch makes all edits at "
                f"once; leave {_SIZE} out, or take protocol=sequential"
            )
