"""The records of all commands, in the order of the overview."""

from __future__ import annotations

from errata.cli import (
    ability,
    apply,
    attribute,
    bench,
    check,
    compare,
    completion,
    compose,
    convert,
    derive,
    diff,
    edit,
    export,
    fetch,
    flow,
    heads,
    list_edits,
    merge,
    methods,
    playground,
    remove,
    report,
    status,
    steer,
    survive,
    trace,
    train,
    tune,
)
from errata.cli.command import Command
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

_WITHOUT_COMPLETION = (
    edit.COMMAND,
    bench.COMMAND,
    compose.COMMAND,
    survive.COMMAND,
    train.COMMAND,
    tune.COMMAND,
    compare.COMMAND,
    status.COMMAND,
    report.COMMAND,
    ability.COMMAND,
    trace.COMMAND,
    steer.COMMAND,
    attribute.COMMAND,
    flow.COMMAND,
    heads.COMMAND,
    convert.COMMAND,
    apply.COMMAND,
    check.COMMAND,
    list_edits.COMMAND,
    diff.COMMAND,
    derive.COMMAND,
    merge.COMMAND,
    remove.COMMAND,
    export.COMMAND,
    methods.COMMAND,
    fetch.COMMAND,
    playground.COMMAND,
)
# The command that completes all commands is made from their records.
COMMANDS: tuple[Command, ...] = (*_WITHOUT_COMPLETION, completion.command_for(_WITHOUT_COMPLETION))


def find(name: str) -> Command:
    """Return the command of this name.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    for command in COMMANDS:
        if command.name == name:
            return command
    raise ConfigError(f"unknown command {name!r}{did_you_mean(name, [command.name for command in COMMANDS])}")
