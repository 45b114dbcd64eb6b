"""`errata survive`: edits in float32, merged, rounded to a few bits, and asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.cli import configuration, overrides
from errata.cli.arguments import split_flags, whole_number
from errata.cli.command import AS_JSON, MEASURE, SHOW_CONFIGURATION, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say, show_json, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, ExportError
from errata.editors.core.interventions import registry

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.survival import SurvivalPlan

EDIT, COMPRESS = "edit", "compress"
PICTURE = "survival.png"
_OUT = "survival"
_OWN = ("merged", "group", "out")  # names that `errata bench` has not, or not so


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Measure each method, show a table, and draw a picture."""
    given, flags = split_flags(arguments, COMMAND)
    methods, lines, own = _sorted(given)
    if SHOW_CONFIGURATION.usage in flags:
        configuration.show_yaml(
            "bench", configuration.compose_first("bench", [f"editor={methods[0]}", *lines]), console
        )
        return DONE
    configs = [compose("bench", overrides.translated([f"editor={method}", *lines], "bench")) for method in methods]

    from errata.benchmarks.bench.config import BenchConfig
    from errata.benchmarks.bench.survival import SurvivalStudy

    plan, out, found = _plan(own), Path(own.get("out", _OUT)), []
    with shown_warnings(errors), show_progress(errors) as progress:
        study = SurvivalStudy(plan, out=out, progress=progress)
        for method, values in zip(methods, configs, strict=True):
            try:
                found.append(study.measure(BenchConfig.of(values)))
            except ExportError as error:
                if len(methods) == 1:
                    raise
                say(errors, f"{method} is left out: {error}")
    if not found:
        raise ExportError("no method is left: none of them changes weights alone; see `errata methods`")
    _show(found, out, console, as_json=AS_JSON.usage in flags)
    return DONE


def _sorted(given: Sequence[str]) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return the methods, the overrides of `errata bench`, and the values that are this command's own.

    Raises:
        ConfigError: A compression is unknown, a name is given twice, or one is not for this command.
    """
    overrides.refuse_repeats(given)
    methods, lines, own = ["rome"], ["protocol=batch"], dict[str, Any]()
    for argument in given:
        name, value = overrides.split(argument)
        first, _, field = name.partition(".")
        if name == EDIT:
            methods = value.split(",")
        elif first == EDIT:
            lines.append(f"editor.{field}={value}")
        elif name == "protocol":
            raise ConfigError("errata survive edits in groups; leave protocol= out, and give group=N")
        elif first == COMPRESS or name in _OWN:
            own[name] = value
        else:
            lines.append(argument)
    if len(methods) > 1 and (named := next((line for line in lines if line.startswith("editor.")), None)):
        raise ConfigError(f"{named} is of one method, and there are {len(methods)}; give model.editors.METHOD.FIELD=")
    for name in own.get(COMPRESS, "rtn,gptq").split(","):
        if name not in (known := registry.names("compress")):
            raise ConfigError(f"compress={name}: unknown compress{did_you_mean(name, known)}")
    return methods, lines, own


def _as_bench(given: Sequence[str], sweep: bool) -> list[str]:  # noqa: ARG001 - several methods need no -m
    methods, lines, _ = _sorted(given)
    return [f"editor={methods[0]}", *lines]


def _plan(own: dict[str, Any]) -> SurvivalPlan:
    """Return what the models go through. A field counts for every compression that has it.

    Raises:
        ConfigError: No compression has a field, a value is wrong, or a file is missing.
    """
    from errata.benchmarks.bench.survival import PRECISIONS, SurvivalPlan

    lines = [f"compose.{name}={value}" for name, value in own.items() if name.startswith(f"{COMPRESS}.")]
    fields = compose("bench", overrides.translated(lines, "bench"))["compose"][COMPRESS] if lines else {}
    said: list[dict[str, Any]] = []
    unread = set(fields)
    for name in own.get(COMPRESS, "rtn,gptq").split(","):
        known = registry.get(name, "compress").Config.__dataclass_fields__
        said.append({"name": name, **{field: value for field, value in fields.items() if field in known}})
        unread -= set(known)
    if unread:
        raise ConfigError(f"compress.{min(unread)}: none of the compressions has this field")
    merged = tuple(own["merged"].split(",")) if "merged" in own else PRECISIONS
    plan = SurvivalPlan(said, merged, whole_number("group", own) or 0)
    for compression in plan.compressions().values():
        compression.config.check_files(path=f"{COMPRESS}.")
    return plan


def _show(found: Sequence[dict[str, Any]], out: Path, console: Console, *, as_json: bool) -> None:
    from rich.table import Table

    from errata.benchmarks.reports import survival
    from errata.benchmarks.reports.panels import png
    from errata.benchmarks.reports.terminal import show_table
    from errata.editors.core.files.atomic import write_atomically

    summaries = [survival.summary(one) for one in found]
    write_atomically(out / PICTURE, png(survival.panels(summaries, "probability"), across=3))
    if as_json:
        show_json({"methods": summaries}, console)
        return
    for scoring in ("probability", "teacher_forced"):
        table = Table(*survival.HEADS, title=f"{scoring.replace('_', '-')}, %")
        for row in survival.rows(summaries, scoring):
            table.add_row(*row)
        show_table(console, table)
    say(console, f"numbers {out}; picture {out / PICTURE}")


COMMAND = Command(
    name="survive",
    usage=("edit=METHOD,METHOD [compress=rtn,gptq] [merged=PRECISION,..] [group=N] [n_edits=30] [name=value ...]",),
    summary="Edit in float32, merge, round to a few bits, and show what each method's edits keep.",
    group=MEASURE,
    run=run,
    config="bench",
    options=(
        SHOW_CONFIGURATION,
        AS_JSON,
    ),
    overrides=(
        Option("edit=METHOD,METHOD", "the methods; edit.FIELD=VALUE sets a field of a single one"),
        Option(
            "compress=NAME,NAME",
            "rtn, gptq, torchao or another one of `errata compose`; compress.FIELD=VALUE sets a field",
        ),
        Option("merged=float32,bfloat16", "precisions of the merged model"),
        Option("group=N", "facts that one edited model carries; by default all"),
        Option("out=FOLDER", "gets the numbers of each method, and survival.png"),
        Option("dataset.path=FILE", "read the cases from a file in the dataset's own format"),
    ),
    notes=(
        "Every group of facts is edited in float32 and written as a merged model, as by errata export merged=FOLDER.\n"
        "The folder is loaded again, compressed, and asked. A change is that of the same facts, with a 95 % interval.",
        "moved: share of the edited weights' elements that the edit takes to another point of the grid. carried: the\n"
        "edit's change of what the edited maps give at the fact's token, over that of rounding.",
        "What a method's numbers are measured with is in the name of its file, which is read when it is there.",
    ),
    examples=(
        "errata survive edit=memit,ft_m dataset=world_counterfact n_edits=30",
        "errata survive edit=rome compress=gptq compress.n_rows=16 group=5 dataset=world_counterfact n_edits=30",
    ),
    as_overrides=_as_bench,
    resumes=True,
)
