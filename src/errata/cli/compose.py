"""`errata compose`: edits that meet a compression or an unlearning, in both orders."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.composition_config import COMPRESS, EDIT, ROLES, UNLEARN, ComposeConfig
from errata.benchmarks.runs.hydra_grammar import override_name
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.cli import configuration, overrides
from errata.cli.arguments import split_flags
from errata.cli.bench import carry_out_sweep, is_shared
from errata.cli.command import MEASURE, SHOW_CONFIGURATION, Command, Option
from errata.cli.configuration import MULTIRUN
from errata.cli.exit_codes import DONE, STOPPED
from errata.cli.messages import say_stopped
from errata.editors.core.config import build, did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.interventions import registry

if TYPE_CHECKING:
    from rich.console import Console

BOTH, FIRST, LAST = "both", "edit_first", "edit_last"
ORDERS = (BOTH, FIRST, LAST)


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one run for each order and combination of values, and show both orders side by side."""
    given, flags = split_flags(arguments, COMMAND)
    sweep = any(flag in flags for flag in MULTIRUN)
    if is_shared():
        raise ConfigError("torchrun carries out one run in several processes, and errata compose makes one per order")
    lines = _as_bench(given, sweep)
    translated = overrides.translated(lines, "bench", sweep=sweep, also=(*ROLES, "order", "end"))
    orders = _orders_of(given)
    if SHOW_CONFIGURATION.usage in flags:
        first = [*lines, f"compose.order={orders[0]}"]
        configuration.show_yaml("bench", configuration.compose_first("bench", first, sweep=sweep), console)
        return DONE
    translated = [*translated, f"compose.order={','.join(orders)}"]
    _check_fields(translated)
    stop = Stop()
    try:
        with stop.on_sigterm(lambda: errors.print("[yellow]SIGTERM[/]: stopping after the current step")):
            return carry_out_sweep(translated, shlex.join(["errata", "compose", *arguments]), stop, console, errors)
    except Stopped as reason:
        say_stopped(errors, reason)
        return STOPPED


def _as_bench(given: Sequence[str], sweep: bool) -> list[str]:
    """Return what was typed as overrides of `errata bench`, without the order.

    Raises:
        ConfigError: An intervention is unknown, or a name is not for this command.
    """
    lines = ["protocol=compose"]
    for argument in given:
        name, value = overrides.split(argument)
        first, _, field = name.partition(".")
        if name == "protocol":
            raise ConfigError("errata compose has its own protocol; leave protocol= out, or use errata bench")
        if first == EDIT:
            lines.append(f"editor{name.removeprefix(EDIT)}={value}")
        elif first in (COMPRESS, UNLEARN):
            if not field:
                _check(first, value, sweep=sweep)
            lines.append(f"compose.{first}.{field or 'name'}={value}")
        elif name == "end":
            lines.append(f"compose.end={value}")
        elif name != "order":
            lines.append(argument)
    return lines


def _orders_of(given: Sequence[str]) -> list[str]:
    """Return the orders that are asked for.

    Raises:
        ConfigError: Nothing meets the edits, or the order is unknown.
    """
    typed = dict(overrides.split(argument) for argument in given)
    roles = [role for role in ROLES if role == EDIT or role in typed]
    if roles == [EDIT]:
        raise ConfigError("nothing meets the edits: give compress=NAME, unlearn=NAME or both, such as compress=wanda")
    order = typed.get("order", BOTH)
    if order not in ORDERS:
        raise ConfigError(f"order={order}: unknown order{did_you_mean(order, ORDERS)}")
    return _orders(order, roles)


def _check(role: str, value: str, *, sweep: bool) -> None:
    """Refuse an intervention that there is not, before anything is loaded.

    Raises:
        ConfigError: It names the nearest.
    """
    known = registry.names("compress" if role == COMPRESS else "unlearn")
    if "," in value and not sweep:
        raise ConfigError(f"{role}={value}: several values need -m")
    for name in value.split(","):
        if name not in known:
            raise ConfigError(f"{role}={name}: unknown {role}{did_you_mean(name, known)}")


def _check_fields(lines: Sequence[str]) -> None:
    """Refuse wrong fields and missing files once, before the first run, by the names that were typed.

    Args:
        lines: Overrides for Hydra; some have several values.

    Raises:
        ConfigError: It names the field.
    """
    from errata.benchmarks.bench.composition import named_configs
    from errata.benchmarks.bench.job_plan import expand

    own = [line for line in lines if override_name(line).startswith("compose.")]
    for job in expand(own):
        values = compose("bench", job)["compose"]
        for role, given in named_configs(build(ComposeConfig, values, "compose."), 0, path="").items():
            given.check_files(path=f"{role}.")


def _orders(order: str, roles: Sequence[str]) -> list[str]:
    """Return every order of some roles that is asked for: both of two, all six of three."""
    every = ["-".join(one) for one in itertools.permutations(roles)]
    if order == FIRST:
        return [one for one in every if one.startswith(EDIT)]
    return [one for one in every if one.endswith(EDIT)] if order == LAST else every


COMMAND = Command(
    name="compose",
    usage=(
        "edit=METHOD compress=NAME [order=both] [model=world] [dataset=world] [n_edits=50] [name=value ...]",
        "edit=METHOD unlearn=NAME unlearn.forget=FILE [name=value ...]",
        "-m edit=memit,alphaedit compress=wanda,gptq [name=value,value ...]",
    ),
    summary="Make edits before and behind a compression or an unlearning, and score both orders.",
    group=MEASURE,
    run=run,
    config="bench",
    options=(
        Option("-m, --multirun", "run every combination of the values that commas separate"),
        SHOW_CONFIGURATION,
    ),
    overrides=(
        Option("edit=METHOD", "the method; edit.FIELD=VALUE sets a field of it, as `errata methods rome` lists them"),
        Option(
            "compress=NAME",
            "magnitude, wanda, sparsegpt, rtn, gptq, awq or torchao; compress.FIELD=VALUE sets a field of it",
        ),
        Option("unlearn=NAME", "rmu, ga or gd; unlearn.forget=FILE is the text to unlearn"),
        Option("order=ORDER", "both (default), edit_first or edit_last", ORDERS),
        Option("end=again", "a compression that is not last is done again; keep: its zeros or grid are put back; none"),
        Option("dataset.path=FILE", "read the cases from a file in the dataset's own format"),
        Option("out=FOLDER", "where each run gets its folder"),
    ),
    notes=(
        "Every order is a run of errata bench with protocol=compose, in its own folder. The same command continues\n"
        "what was stopped or killed, and errata status and errata report take the folder as any other.",
        "All edits are made at once. docs/composing-interventions.md says what each compression does.",
    ),
    examples=(
        "errata compose edit=memit compress=wanda model=world dataset=world_counterfact n_edits=10",
        "errata compose -m edit=memit,alphaedit compress=wanda,gptq compress.n_rows=32 n_edits=10",
    ),
    exit_codes=((STOPPED, "stopped early by SIGTERM or time_limit=; the same command continues"),),
    as_overrides=_as_bench,
    resumes=True,
)
