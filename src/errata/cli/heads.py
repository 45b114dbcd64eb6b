"""`errata heads`: which attention heads speak for memory and which for the context, and what scaling them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import blamed_on, is_true, number, parse_values, whole_number
from errata.cli.command import AS_JSON, CHAT, DATASET_FILE, HALF, MEASURE, MODEL, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say, show_json, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.locating.heads import Head

NUMBERS, PICTURE = "heads.json", "heads.png"
N_FACTS = 40
_OF_A_DATASET = ("dataset.path", "dataset.split", "n_facts", "heads", "factors", "chat")


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Rank heads on the facts of a dataset and scale the best, or write the scaling of given heads as an edit."""
    given = parse_values(arguments, COMMAND)
    values = given.values
    if "model" not in values or ("dataset" in values) == ("scale" in values):
        raise ConfigError("expected model=MODEL, and either dataset=NAME or scale=HEAD:FACTOR out=FOLDER")
    if "scale" in values:
        return _write_edit(values, console)
    heads, factors = _heads(values), _factors(values)
    n_facts = whole_number("n_facts", values, least=2) or N_FACTS

    from errata.benchmarks.tracing import head_sweeps

    conflicts = head_sweeps.conflicts_of(_cases(values))
    model, tokenizer = edit_folders.load_model(values["model"], values)
    if heads is not None:
        from errata.editors.core.head_scaling import scale_heads

        with blamed_on("heads"):
            scale_heads(model, dict.fromkeys(heads, 1.0))  # refused here, and not behind the ranking
    with shown_warnings(errors), show_progress(errors) as progress:
        known = head_sweeps.known_conflicts(model, tokenizer, conflicts, n_facts)
        report = head_sweeps.head_report(
            model, tokenizer, known, heads=heads, factors=factors or head_sweeps.FACTORS, progress=progress
        )
    plain = {name: values[name] for name in sorted(values) if name not in ("out", "device", "trust_remote_code")}
    report = {"settings": plain, **report}
    if "out" in values:
        _write(Path(values["out"]), report)
    if given.flags:
        show_json(report, console)
    else:
        _show(report, console)
        if "out" in values:
            say(console, f"{NUMBERS} and {PICTURE}: {values['out']}")
    return DONE


def _cases(values: Mapping[str, str]) -> Any:
    from errata.benchmarks.datasets import registry

    split: Any = values.get("dataset.split")
    if split not in (None, "dev", "test"):
        raise ConfigError(f"dataset.split: expected dev or test, got {split!r}")
    name, path = values["dataset"], values.get("dataset.path")
    return registry.load(name, path, split=split, chat=is_true("chat", values)).cases


def _heads(values: Mapping[str, str]) -> list[Head] | None:
    if "heads" not in values:
        return None
    from errata.editors.core.locating.heads import Head

    with blamed_on("heads"):
        return [Head.of(text) for text in values["heads"].split(",")]


def _factors(values: Mapping[str, str]) -> list[float] | None:
    return [number("factors", text) for text in values["factors"].split(",")] if "factors" in values else None


def _write_edit(values: Mapping[str, str], console: Console) -> int:
    """Write the scaling of the given heads into a folder of edits."""
    if unused := [name for name in _OF_A_DATASET if name in values]:
        raise ConfigError(f"{unused[0]}= goes with dataset=")
    if "out" not in values:
        raise ConfigError("out= is missing: where should the edit be written?")
    from errata.editors.core.head_scaling import scale_heads
    from errata.editors.core.locating.heads import Head
    from errata.editors.core.storage.merged_export import check_free

    factors: dict[Head, float] = {}
    for text in values["scale"].split(","):
        head, colon, factor = text.partition(":")
        if not colon:
            raise ConfigError(f"scale: expected HEAD:FACTOR such as 3.0:0.5, got {text!r}")
        with blamed_on("scale"):
            wanted = Head.of(head)
        factors[wanted] = number("scale", factor)
    check_free(Path(values["out"]))
    model, tokenizer = edit_folders.load_model(values["model"], values)
    with blamed_on("scale"):
        edit = scale_heads(model, factors)
    edit.save(values["out"], tokenizer=tokenizer)
    say(console, f"{edit.id}: {', '.join(f'head {head} times {factor:g}' for head, factor in factors.items())}")
    say(console, f"written to {values['out']}; `errata.load_edit` applies it to the model")
    return DONE


def _write(folder: Path, report: Mapping[str, Any]) -> None:
    import json

    from errata.benchmarks.runs.json_values import encodable
    from errata.benchmarks.tracing import head_pictures
    from errata.editors.core.files.atomic import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NUMBERS, (json.dumps(encodable(report), allow_nan=False) + "\n").encode())
    write_atomically(folder / PICTURE, head_pictures.of_heads(report))


def _show(report: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    counts = report["counts"]
    say(
        console,
        f"{count_of(counts['ranked'] + counts['measured'], 'fact')} that the model knows, each behind a sentence that "
        f"says another answer; {counts['unknown']} were answered otherwise, {counts['unusable']} could not be used",
    )
    say(console, f"ranked on {counts['ranked']}: mean logits for the context over memory, with 95 % intervals")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("for memory", "", "for the context", ""):
        table.add_column(name, justify="right" if not name else "left")
    pairs = (report["strongest"][side] for side in ("memory", "context"))
    for memory, context in zip(*pairs, strict=True):
        cells = [
            (each["head"], f"{each['mean']:+.2f} [{each['low']:+.2f}, {each['high']:+.2f}]")
            for each in (memory, context)
        ]
        table.add_row(*cells[0], *cells[1])
    show_table(console, table)
    say(console, f"scaled, on the other {counts['measured']} facts: % of the answers, with 95 % intervals")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("head", "factor", "context", "memory", "other", "logits", "remembered without it"):
        table.add_column(name, justify="right")
    for sweep in report["sweeps"]:
        for effect in sweep["effects"]:
            shares = [_percent(effect[name]) for name in ("context", "memory", "other")]
            logits = f"{effect['difference']['mean']:+.2f}"
            table.add_row(sweep["head"], f"{effect['factor']:g}", *shares, logits, _percent(effect["remembered"]))
    show_table(console, table)


def _percent(share: Mapping[str, float]) -> str:
    return f"{100 * share['mean']:.0f} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


COMMAND = Command(
    name="heads",
    usage=(
        "model=MODEL dataset=NAME [dataset.path=FILE] [name=value ...]",
        "model=MODEL scale=HEAD:FACTOR,... out=FOLDER",
    ),
    summary="Rank attention heads by what they say for memory or for a false context, and scale the best.",
    group=MEASURE,
    run=run,
    options=(
        MODEL,
        Option("dataset=NAME", "facts with a new answer beside the true one"),
        DATASET_FILE,
        HALF,
        Option("n_facts=40", "facts that the model knows: every second one ranks, the others are measured"),
        Option("heads=3.1,4.0", "scale these, as LAYER.HEAD; by default the strongest of each side"),
        Option("factors=0,0.5,1,2", "what heads are multiplied by"),
        CHAT,
        Option("scale=3.1:0,4.0:2", "write the scaling of these heads as an edit"),
        Option("out=FOLDER", "write heads.json and heads.png, or the edit"),
        AS_JSON,
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "A fact that the model knows stands behind a sentence that says another answer. A head's attribution is what\n"
        "it adds to the logit of the sentence's answer over the remembered one.",
        "Scaling is an edit of the attention's output projection: undone, saved and calculated with like any other.",
    ),
    examples=(
        "errata heads model=world dataset=world_counterfact_plus out=heads",
        "errata heads model=world scale=4.0:0 out=silent.edits",
    ),
    needs_arguments=True,
)
