"""`errata steer`: learns a behaviour from a contrast set, makes an edit of it, and measures what it does and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.behaviour_chart import costs
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import is_true, number, parse_values, whole_number
from errata.cli.command import AS_JSON, MEASURE, MODEL, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say, show_json, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.steering.kinds import ALIGNMENTS, BUNDLED, KINDS, PLACES, READS, STRENGTHS

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.edit import Edit
    from errata.editors.core.steering.contrast import Contrast
    from errata.editors.core.steering.positions import Where
    from errata.editors.core.steering.steering import Steering

NUMBERS, PICTURE = "behaviour.json", "behaviour.png"
_TOKENS, _DIRECTIONS = 1000, 3


@dataclass(frozen=True)
class SteerSettings:
    """What was asked for, checked.

    Attributes:
        strengths: To measure at, without 0; (None,) of a kind that has no strength.
        strength: Of the edit that is written.
        learnt, held_out: The contrasts to learn from, and those to measure on.
    """

    kind: str
    where: Where | None
    strengths: tuple[float | None, ...]
    strength: float | None
    learnt: list[Contrast]
    held_out: list[Contrast]
    numbers: Mapping[str, int | None]
    plain: Mapping[str, Any]


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Learn, make the edit, measure it, and show a table."""
    given = parse_values(arguments, COMMAND)
    values = given.values
    if "model" not in values:
        raise ConfigError("expected model=MODEL, and contrast=FILE (or formal, which comes with errata)")
    settings = _settings(values)
    if "report" in values and not settings.held_out:
        raise ConfigError("report= needs contrasts to measure on: give contrast=")
    for name in ("out", "report"):
        if name in values:
            _check_free(Path(values[name]), name)
    model, tokenizer = edit_folders.load_model(values["model"], values)
    with shown_warnings(errors), show_progress(errors) as progress:
        from errata.editors.core.steering.learning import learn_steering

        steering = learn_steering(
            model,
            tokenizer,
            settings.learnt,
            settings.kind,
            where=settings.where,
            read=values.get("read", "mean"),
            **settings.numbers,
        )
        edit = steering.edit(settings.strength)
        study = _measured(model, tokenizer, steering, settings, values, progress)
    if "out" in values:
        edit.save(values["out"], tokenizer=tokenizer)
    if "report" in values:
        _write_report(Path(values["report"]), study, f"{Path(values['model']).name}, {settings.kind}")
    if given.flags:
        show_json({"edit": edit.id, **study}, console)
        return DONE
    _show(study, settings, edit, values, console)
    return DONE


def _settings(values: Mapping[str, str]) -> SteerSettings:
    kind = values.get("kind", "caa")
    for name, value, known in (
        ("kind", kind, KINDS),
        ("read", values.get("read", "mean"), READS),
        ("positions", values.get("positions", "all"), PLACES),
        ("align", values.get("align", "front"), ALIGNMENTS),
    ):
        if value not in known:
            raise ConfigError(f"{name}: expected {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    own = dict(STRENGTHS)[kind]
    if own is None and (unused := [name for name in ("strength", "strengths") if name in values]):
        raise ConfigError(f"{kind} removes a direction and has no strength, got {unused[0]}={values[unused[0]]}")
    strength = own if own is None else number("strength", values.get("strength", str(own)))
    listed = [number("strengths", each) for each in values.get("strengths", "").split(",") if each]
    measured: tuple[float | None, ...] = tuple(sorted({each for each in listed if each})) or (strength,)
    learnt, held_out = _contrasts(kind, values)
    for name in ("random", "text_tokens"):  # read later; a mistake is told before the model is loaded
        whole_number(name, values)
    numbers = {
        name: whole_number(name, values, least=least) for name, least in (("layer", 0), ("heads", 1), ("rows", 1))
    }
    unplain = ("out", "report", "device", "trust_remote_code")
    plain = {name: values[name] for name in sorted(values) if name not in unplain}
    return SteerSettings(kind, _where(values), measured, strength, learnt, held_out, numbers, plain)


def _where(values: Mapping[str, str]) -> Where | None:
    """Return the positions that were typed; None for the kind's own."""
    typed = [name for name in ("positions", "align", "start", "stop") if name in values]
    if not typed:
        return None
    from errata.editors.core.steering.positions import Where

    place = values.get("positions", "prefix" if "align" in values else "span")
    if place != "span" and (unused := [name for name in ("start", "stop") if name in values]):
        raise ConfigError(f"{unused[0]}= goes with positions=span")
    if place != "prefix" and "align" in values:
        raise ConfigError("align= goes with positions=prefix")
    ends = {name: whole_number(name, values) for name in ("start", "stop")}
    return Where(place, values.get("align", "front"), ends["start"] or 0, ends["stop"])


def _contrasts(kind: str, values: Mapping[str, str]) -> tuple[list[Contrast], list[Contrast]]:
    from errata.editors.core.steering.contrast import Contrast, halves, read_contrasts

    found = read_contrasts(values["contrast"], chat=is_true("chat", values)) if "contrast" in values else []
    typed = [name for name in ("plus", "minus") if name in values]
    if kind == "actadd":
        if len(typed) < 2:
            raise ConfigError(
                "actadd adds the activations of one prompt and subtracts another's: give plus= and minus="
            )
        return [Contrast("", values["plus"], values["minus"])], found
    if typed:
        raise ConfigError(f"{typed[0]}= goes with kind=actadd")
    if not found:
        raise ConfigError(f"expected contrast=FILE, or a set that comes with errata: {', '.join(BUNDLED)}")
    if len(found) < 4:
        raise ConfigError(
            f"expected four contrasts or more, one half to learn from and one to measure on, got {len(found)}"
        )
    return halves(found)


def _check_free(folder: Path, name: str) -> None:
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{name}: {folder} exists already; choose a new folder")


def _measured(
    model: Any, tokenizer: Any, steering: Steering, settings: SteerSettings, values: Mapping[str, str], progress: Any
) -> dict[str, Any]:
    """Return what edits of all strengths do and cost, beside the baselines, as plain values."""
    if not settings.held_out:
        none: dict[str, Any] = {
            "untouched": None,
            "steered": [],
            "random": [],
            "random_directions": [],
            "prompted": None,
        }
        return {"settings": settings.plain, "n": 0, **none}
    from errata.editors.core.model.texts import FACTBOOK, read_texts
    from errata.evaluate.behaviour import BehaviourStudy
    from errata.evaluate.text_drift import TextDrift

    tokens = whole_number("text_tokens", values)
    texts = read_texts(values.get("texts", FACTBOOK)) if tokens != 0 else []
    drift = TextDrift(model, tokenizer, texts, max_tokens=tokens or _TOKENS) if texts else None
    study = BehaviourStudy(model, tokenizer, settings.held_out, drift)
    count = whole_number("random", values)
    seeds = range(_DIRECTIONS if count is None else count)
    every, measured = len(settings.strengths) * (1 + len(seeds)), 0

    def count_one(done: int = 0, total: int = 0, what: str = "") -> None:  # noqa: ARG001
        nonlocal measured
        progress(measured := measured + 1, every, "edits measured")

    steered, controls = [], []
    for strength in settings.strengths:
        steered.append(study.measure(steering.edit(strength), 1.0 if strength is None else strength).as_dict())
        count_one()
        if seeds:
            controls.append(study.random(steering, strength, seeds=seeds, progress=count_one))
    prompted = study.prompted(values["instruction"]).as_dict() if "instruction" in values else None
    zero = study.untouched.as_dict()
    if drift is not None:
        from dataclasses import asdict

        zero["drift"] = asdict(drift.measure())
    return {
        "settings": {**settings.plain, "learnt_from": len(settings.learnt), "made": dict(steering.settings)},
        "n": len(settings.held_out),
        "text_tokens": 0 if drift is None else drift.tokens,
        "untouched": zero,
        "steered": sorted([*steered, zero], key=lambda point: point["strength"]),
        "random": [
            {"seed": seed, **point.as_dict()}
            for each in controls
            for seed, point in zip(each.seeds, each.points, strict=True)
        ],
        "random_directions": [each.as_dict() for each in controls],
        "prompted": prompted,
    }


def _write_report(folder: Path, study: Mapping[str, Any], title: str) -> None:
    from errata.benchmarks.reports.behaviour_chart import behaviour_picture
    from errata.benchmarks.runs.json_values import encodable
    from errata.editors.core.files.atomic import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(encodable(study), allow_nan=False, indent=1) + "\n"
    write_atomically(folder / NUMBERS, numbers.encode())
    write_atomically(
        folder / PICTURE, behaviour_picture(study, f"{title}, {count_of(study['n'], 'held-out contrast')}")
    )


def _show(
    study: Mapping[str, Any], settings: SteerSettings, edit: Edit, values: Mapping[str, str], console: Console
) -> None:
    from rich.table import Table

    strength = "" if settings.strength is None else f", strength {settings.strength:g}"
    say(console, f"{edit.id}: {settings.kind} from {count_of(len(settings.learnt), 'contrast')}{strength}")
    if study["steered"]:
        say(
            console,
            f"measured on {count_of(study['n'], 'held-out contrast')} and {study['text_tokens']} tokens of text:",
        )
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("")
        for name in ("strength", "positive first", "effect", "log p positive", "log p negative", "loss", "KL"):
            table.add_column(name, justify="right")
        for name, point in _rows(study):
            table.add_row(name, *_cells(point))
        show_table(console, table)
        if any(point["is_breaking"] for point in study["steered"]):
            say(console, "where both continuations become less probable, the edit is breaking the model")
    if "out" in values:
        say(console, f"the edit: {values['out']}")
    if "report" in values:
        say(console, f"{NUMBERS} and {PICTURE}: {values['report']}")


def _rows(study: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    steered = [("untouched" if point["strength"] == 0 else "steered", point) for point in study["steered"]]
    controls = [(count_of(len(each["seeds"]), "random direction"), each) for each in study["random_directions"]]
    return steered + controls + ([("instruction", study["prompted"])] if study["prompted"] else [])


def _cells(point: Mapping[str, Any]) -> list[str]:
    def interval(name: str) -> str:
        found = point[name]
        ends = (
            f" [{found['low']:+.2f}, {found['high']:+.2f}]" if isfinite(found["low"]) else ""
        )  # none of one direction
        return f"{found['mean']:+.2f}{ends}"

    rise, kl = costs(point)
    cost = ["", ""] if rise is None or kl is None else [f"{100 * rise:+.2f} %", f"{kl:.4f}"]
    strength = "" if point["strength"] is None else f"{point['strength']:g}"
    return [strength, f"{100 * point['share']:.0f} %", *map(interval, ("effect", "positive", "negative")), *cost]


COMMAND = Command(
    name="steer",
    usage=(
        "model=MODEL contrast=FILE [kind=caa] [layer=N] [strength=S] [out=FOLDER] [name=value ...]",
        "model=MODEL contrast=FILE strengths=-2,-1,1,2 [report=FOLDER] [name=value ...]",
        "model=MODEL kind=actadd plus=TEXT minus=TEXT layer=N strength=S [out=FOLDER]",
    ),
    summary="Make an edit of a behaviour from a contrast set, and measure what it does and what it costs.",
    group=MEASURE,
    run=run,
    options=(
        MODEL,
        Option("contrast=FILE", "JSON lines with prompt, positive and negative; or formal, which comes with errata"),
        Option("kind=caa", f"{', '.join(KINDS)}", KINDS),
        Option("layer=N", "the block to read and change; by default the middle one"),
        Option("strength=S", "of the edit; by default the kind's own"),
        Option("strengths=-2,-1,1,2", "measure at these; by default at strength="),
        Option("positions=all", "all, prompt, last, prefix or span; by default the kind's own", PLACES),
        Option("align=front", "where a prefix stands: front, middle or back", ALIGNMENTS),
        Option("start=N", "first position of a span"),
        Option("stop=N", "one past the last position of a span"),
        Option("read=mean", "the mean over a continuation, or its last token", READS),
        Option("heads=N", "heads that iti changes; by default 4.7 % of all"),
        Option("rows=N", "rows of gates that surgery moves; by default four times the hidden size"),
        Option("plus=TEXT", "actadd: the prompt whose activations are added"),
        Option("minus=TEXT", "actadd: the prompt whose activations are subtracted"),
        Option("chat=true", "prompts are messages in the model's chat template", ("true", "false")),
        Option("instruction=TEXT", "also measure this text in front of every prompt, without an edit"),
        Option("random=3", "random directions of the same length to measure beside it"),
        Option("texts=SOURCE", "general text for the cost: a file, or factbook, which comes with errata"),
        Option("text_tokens=1000", "tokens of it; 0 measures no cost"),
        Option("out=FOLDER", "write the edit, for load_edit, and for `errata list`, `derive` and `merge`"),
        Option("report=FOLDER", f"write {NUMBERS} and {PICTURE}"),
        AS_JSON,
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "Every second contrast is learnt from, and the others are measured on. `positive first` is the share whose\n"
        "positive continuation is the more probable one. `effect` is the change of that difference in its deviations.\n"
        "The changes of both continuations stand apart: an edit that lowers both is breaking the model.\n"
        "Intervals of the edit are over contrasts, and those of random directions over the directions.",
        "loss and KL are the cost on general text against the untouched model. For its cost, an instruction stands in\n"
        "front of every text.",
    ),
    examples=(
        "errata steer model=world contrast=formal layer=3 strength=2 out=formal",
        "errata steer model=world contrast=formal kind=ace strengths=0.5,1,2 report=formal-report",
        'errata steer model=world kind=actadd plus=" love" minus=" hate" layer=3 strength=2',
    ),
    needs_arguments=True,
)
