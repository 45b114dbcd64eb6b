"""The configuration of a command that Hydra configures, as help and `--cfg` show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.cli import overrides

if TYPE_CHECKING:
    from rich.console import Console

MULTIRUN = ("-m", "--multirun")


def compose_first(config: str, given: Sequence[str], *, sweep: bool = False) -> dict[str, Any]:
    """Return the configuration that overrides give; for a sweep that of its first run.

    Args:
        config: The YAML in hparams/.
        given: Overrides as typed.
        sweep: Whether commas separate the values of a sweep.

    Raises:
        ConfigError: An override has an unknown name or value.
    """
    lines = overrides.translated(given, config, sweep=sweep)
    if sweep:
        from errata.benchmarks.bench.job_plan import first_job

        lines = first_job(lines)
    return compose(config, lines)


def show_yaml(config: str, values: Mapping[str, Any], console: Console) -> None:
    """Show a configuration as YAML, with the meaning of each field in a comment."""
    from errata.benchmarks.bench.defaults import explained

    console.print(explained(config, values), end="", markup=False, highlight=False, soft_wrap=True)
