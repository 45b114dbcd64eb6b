"""`errata tune`: finds settings of a method for a model, and says what they gain on unseen facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.cli import configuration, overrides
from errata.cli.arguments import split_flags
from errata.cli.command import AS_JSON, MEASURE, METHOD_FIELD, SHOW_CONFIGURATION, Command, Option
from errata.cli.exit_codes import DONE, STOPPED
from errata.cli.messages import say, say_stopped, show_json, shown_warnings
from errata.cli.progress_bars import show_progress

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.tuning.tune import Tried

# With fewer edited facts than by default, a correlation over layers is said to be of few.
FEW_FACTS = 8


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Search, show one line per setting, and what the settings found gain."""
    given, flags = split_flags(arguments, COMMAND)
    if SHOW_CONFIGURATION.usage in flags:
        configuration.show_yaml("tune", configuration.compose_first("tune", given), console)
        return DONE
    as_json = AS_JSON.usage in flags
    values = compose("tune", overrides.translated(given, "tune"))

    from errata.benchmarks.tuning import tune

    config = TuneConfig.of(values)

    def report(tried: Tried) -> None:
        say(errors if as_json else console, _line(tried))

    stop = Stop()
    try:
        with stop.on_sigterm(), shown_warnings(errors), show_progress(errors) as progress:
            folder = tune.run(config, progress=progress, report=report, stop=stop)
    except Stopped as reason:
        say_stopped(errors, reason)
        return STOPPED
    result = tune.read(folder)
    if as_json:
        show_json(result, console)
        return DONE
    for line in _summary(result):
        say(console, line)
    say(console, f"settings {folder / tune.FILE}; numbers {folder / tune.NUMBERS}; picture {folder / tune.PICTURE}")
    return DONE


def _line(tried: Tried) -> str:
    """Return a setting in one line."""
    what = tried.name if tried.value is None else f"{tried.name}={tried.value}"
    if tried.is_kept and tried.gain is not None:
        return f"  kept: {what}"
    gain = "" if tried.gain is None else f"   gain {_signed(tried.gain.as_dict())}"
    return f"{what}, {count_of(tried.score.n, tried.part + ' fact')}: score {_share(tried.score.as_dict())}{gain}"


def _share(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _signed(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _localisation(there: Mapping[str, Any]) -> list[str]:
    """Return how trace and edits go together, and how little few facts say of it; nothing of few layers."""
    from errata.benchmarks.tuning.summaries import LEAST_FACTS

    if (rho := there["correlations"].get("score")) is None:
        return []
    within, n = there["within_facts"], there["score"][0]["n"]
    said = f"trace and edits over {rho['n']} choices of layers, {count_of(n, 'fact')}: rank correlation {_signed(rho)}"
    if within is not None:
        said += f"; within one fact {_signed(within)} ({count_of(within['n'], 'fact')})"
    lines = [said]
    if within is None:
        lines.append(f"within one fact: not known; it takes {LEAST_FACTS} facts that were traced and edited")
    if n < FEW_FACTS:
        lines.append(
            f"{n} facts are few: the interval is over layers, and other facts may rank them otherwise (n_edits=)"
        )
    return lines


def _summary(result: Mapping[str, Any]) -> list[str]:
    """Return what a search has found, in a few lines."""
    lines = _localisation(there) if (there := result["localisation"]) is not None else []
    for part in ("development", "unseen"):
        if (found := result[part]) is not None:
            cost = [found["cpu_seconds_per_edit"][end] for end in ("start", "found")]
            spent = "" if None in cost else f", CPU s per edit {cost[0]:.2f} and {cost[1]:.2f}"
            lines.append(
                f"gain over the beginning, {count_of(found['n'], part + ' fact')}: {_signed(found['gain'])}{spent}"
            )
    if not result["is_changed"]:
        lines.append("nothing better was found; the settings of the beginning stay")
    elif not result["is_kept"]:
        lines.append("what was found is no better on unseen facts, so that the settings of the beginning stay")
    elif result["unseen"] is not None and result["unseen"]["gain"]["low"] <= 0:
        lines.append("the interval of the gain on unseen facts holds 0: more facts would tell (n_edits=, n_unseen=)")
    return lines


COMMAND = Command(
    name="tune",
    usage=("[editor=rome] [model=world] [dataset=world] [n_edits=8] [out=FOLDER] [name=value ...]",),
    summary="Find layers and other settings of a method for a model, and compare them on unseen facts.",
    group=MEASURE,
    run=run,
    config="tune",
    options=(SHOW_CONFIGURATION, AS_JSON),
    overrides=(
        Option("dataset.path=FILE", "read the cases from a file in the dataset's own format"),
        METHOD_FIELD,
        Option("values.FIELD=V1,V2", "the values to try of a field of the method"),
        Option("out=FOLDER", "gets errata.json, tune.json, tune.png and the runs"),
    ),
    notes=(
        "Facts are traced, layers around the best are tried, then learning rate, clamp and weight of the moments. A\n"
        "value is kept if it is better by more than the noise of a few facts. errata.json is for the model's folder,\n"
        "or for model.settings=FOLDER of `errata bench`, `edit` and `apply`.",
        "layers=all fields=layers asks whether the layers of the trace are those where edits succeed.",
        "Every setting is a run in FOLDER/runs. The same command continues a search that was stopped or killed.",
    ),
    examples=(
        "errata tune editor=rome model=world dataset=world n_edits=8 editor.layers=null out=tuned",
        "errata tune editor=rome model=world dataset=world fields=layers layers=all n_unseen=0 out=layers",
    ),
    exit_codes=((STOPPED, "stopped early by SIGTERM or time_limit=; the same command continues"),),
    resumes=True,
)
