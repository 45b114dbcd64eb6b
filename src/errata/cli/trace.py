"""`errata trace`: shows where a model keeps a fact, or the facts of a dataset, by causal tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import is_true, parse_values, whole_number
from errata.cli.command import AS_JSON, CHAT, DATASET_FILE, HALF, MEASURE, MODEL, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say, show_json, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.config import did_you_mean, nearest
from errata.editors.core.errors import ConfigError
from errata.editors.core.request import SLOT

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.locating.answer_scores import Direction, Metric
    from errata.editors.core.locating.corruption import Noise, Swap
    from errata.editors.core.locating.donors import TraceableFact
    from errata.editors.core.locating.grids import Grid
    from errata.editors.core.locating.many_facts import FactTraces
    from errata.editors.core.locating.tracing import FactTrace

SWAP = "swap"
# What a preset says where nothing else is typed: corruption, window of MLP and attention, metric that is shown.
PRESETS: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("errata", (SWAP, "1", "logit_difference")),
    ("rome", ("s3", "10", "probability")),
)
ONE_FACT = ("prompt", "subject", "donor", "answer", "chat")


@dataclass(frozen=True)
class TraceSettings:
    """What was asked for, checked.

    Attributes:
        corruption: None: another subject.
        metric: The one that is shown; all are written.
    """

    corruption: Noise | None
    grids: tuple[Grid, ...]
    direction: Direction
    metric: Metric
    seed: int
    plain: Mapping[str, Any]


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Trace one fact or those of a dataset, show a table, and write numbers and a picture."""
    given = parse_values(arguments, COMMAND)
    values = given.values
    if "model" not in values or not ("prompt" in values or "dataset" in values):
        raise ConfigError("expected model=MODEL, and prompt=TEXT subject=TEXT or dataset=NAME")
    if "prompt" not in values and (unused := [name for name in ONE_FACT if name in values and name != "chat"]):
        raise ConfigError(f"{unused[0]}= goes with prompt=, for one fact")
    settings = _settings(values)
    facts = _facts(values)
    if "prompt" in values:
        _check_one(values, settings, facts)
        _say_of_subject(values["subject"], facts, errors)
    model, tokenizer = edit_folders.load_model(values["model"], values)
    _check_window(model, settings, values, errors)
    with shown_warnings(errors), show_progress(errors) as progress:
        if "prompt" in values:
            from errata.editors.core.locating.tracing import trace

            changed = _corruption_of(model, tokenizer, values, settings, facts)
            one = trace(
                model,
                tokenizer,
                values["prompt"],
                values.get("subject", ""),
                changed,
                answer=values.get("answer"),
                chat=is_true("chat", values),
                grids=settings.grids,
                direction=settings.direction,
                progress=progress,
            )
            return _show_fact(one, settings, values, console, as_json=bool(given.flags))

        from errata.editors.core.locating.many_facts import trace_facts

        found = trace_facts(
            model,
            tokenizer,
            facts,
            settings.corruption,
            n_facts=whole_number("n_facts", values, least=1),
            grids=settings.grids,
            direction=settings.direction,
            seed=settings.seed,
            progress=progress,
        )
    return _show_facts(found, settings, values, console, as_json=bool(given.flags))


def _settings(values: Mapping[str, str]) -> TraceSettings:
    from errata.editors.core.locating.answer_scores import DIRECTIONS, METRICS
    from errata.editors.core.locating.corruption import Noise
    from errata.editors.core.locating.grids import grids_of

    preset = values.get("preset", "errata")
    presets = dict(PRESETS)
    _choose("preset", preset, tuple(presets))
    corruption, window, metric = presets[preset]
    corruption, metric = values.get("corruption", corruption), values.get("metric", metric)
    direction = values.get("direction", "denoising")
    _choose("metric", metric, METRICS)
    _choose("direction", direction, DIRECTIONS)
    layers = whole_number("window", {"window": window, **values}, least=1)
    names = [name for name in values.get("grids", "state,mlp,attention").split(",") if name]
    seed = whole_number("seed", values)
    plain = {name: values[name] for name in sorted(values) if name not in ("out", "device", "trust_remote_code")}
    samples = whole_number("samples", values, least=1)
    noise = None
    if corruption != SWAP:
        noise = Noise(corruption, samples=samples or 10, seed=1 if seed is None else seed)
    elif samples is not None:
        raise ConfigError("samples= goes with noise, as corruption=s3")
    return TraceSettings(
        noise,
        grids_of(names, layers or 1),
        next(each for each in DIRECTIONS if each == direction),
        next(each for each in METRICS if each == metric),
        seed or 0,
        {"corruption": corruption, "window": layers, "metric": metric, "direction": direction, **plain},
    )


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected {' or '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def _facts(values: Mapping[str, str]) -> list[TraceableFact]:
    """Return the facts of the dataset; none without one."""
    if "dataset" not in values:
        if unused := [name for name in ("dataset.path", "dataset.split", "n_facts") if name in values]:
            raise ConfigError(f"{unused[0]}= goes with dataset=")
        return []
    from errata.benchmarks.datasets import registry
    from errata.benchmarks.tracing.trace_summary import facts_of

    split: Any = values.get("dataset.split")
    if split not in (None, "dev", "test"):
        raise ConfigError(f"dataset.split: expected dev or test, got {split!r}")
    loaded = registry.load(
        values["dataset"],
        values.get("dataset.path"),
        split=split,
        chat=is_true("chat", values),
    )
    return facts_of(loaded.cases)


def _check_one(values: Mapping[str, str], settings: TraceSettings, facts: Sequence[TraceableFact]) -> None:
    """Refuse the request for one fact that cannot be carried out, before the model is loaded."""
    from errata.editors.core.request import EditRequest

    if "subject" not in values:
        raise ConfigError("subject= is missing: which part of the prompt is the fact about?")
    near = _near_mention(values["subject"], values["prompt"])
    if near is not None:
        raise ConfigError(f"the prompt has no subject {values['subject']!r}; did you mean {near!r}?")
    EditRequest(values["prompt"], values["subject"], target="?")
    if settings.corruption is None and "donor" not in values and not facts:
        raise ConfigError(
            "give donor=SUBJECT, another subject with as many tokens; or dataset=NAME, where one is looked for; or "
            "corruption=s3 (or preset=rome) for noise in place of another subject"
        )
    if settings.corruption is not None and "donor" in values:
        raise ConfigError("donor= is for corruption=swap, and noise needs none")


def _near_mention(subject: str, prompt: str) -> str | None:
    """Return the words of a prompt that are nearly the subject, where the prompt has neither it nor a slot for it."""
    if SLOT in prompt or subject in prompt:
        return None
    words, count = prompt.split(), len(subject.split())
    runs = [" ".join(words[i : i + count]).strip(".,;:?!()'\"") for i in range(len(words) - count + 1)]
    return nearest(subject, runs)


def _say_of_subject(subject: str, facts: Sequence[TraceableFact], errors: Console) -> None:
    """Tell of a subject that the dataset does not have and that is spelled nearly like one that it has."""
    known = {fact.subject for fact in facts}
    near = None if subject in known else nearest(subject, known)
    if near is not None:
        say(errors, f"the dataset has no subject {subject!r}, which is traced as it is; did you mean {near!r}?")


def _check_window(model: Any, settings: TraceSettings, values: Mapping[str, str], errors: Console) -> None:
    """Refuse a window that is wider than the model, and tell of one that a preset has brought."""
    from errata.editors.core.model.architecture import describe

    count, window = describe(model).n_layers, max(grid.window for grid in settings.grids)
    if window <= count:
        return
    if "window" in values:
        raise ConfigError(f"window: expected at most {count}, the layers of the model, got {window}")
    say(errors, f"windows of {window} layers are wider than the model, which has {count}; window=N sets another width")


def _corruption_of(
    model: Any, tokenizer: Any, values: Mapping[str, str], settings: TraceSettings, facts: Sequence[TraceableFact]
) -> Noise | Swap | Any:
    """Return what corrupts the one prompt: noise, the donor that was given, or one of the dataset."""
    from dataclasses import replace

    from errata.editors.core.locating.corruption import Swap
    from errata.editors.core.locating.donors import TraceableFact, ask, find_donor
    from errata.editors.core.locating.many_facts import scaled_for
    from errata.editors.core.model.architecture import describe

    architecture = describe(model)
    if settings.corruption is not None:
        return scaled_for(architecture, tokenizer, settings.corruption, facts)
    if "donor" in values:
        return Swap(values["donor"])
    fact = TraceableFact(values["prompt"], values["subject"], values.get("answer"), chat=is_true("chat", values))
    asked = ask(architecture, tokenizer, fact)
    template = asked.located.template
    # Facts with the same prompt have answers that can be compared; without any, every subject is tried with what the
    # model says of it.
    same = [replace(each, relation=None) for each in facts if each.prompt == template]
    pool = same or [replace(each, relation=None, answer=None) for each in facts]
    found = find_donor(architecture, tokenizer, asked, pool, seed=settings.seed)
    if found is None:
        raise ConfigError(
            f"no donor found among {len(pool)} facts for {values['subject']!r}: expected another subject with as many "
            "tokens, and each prompt to prefer its own answer by 1 logit; give donor=SUBJECT, or corruption=s3"
        )
    return found


def _show_fact(
    trace: FactTrace, settings: TraceSettings, values: Mapping[str, str], console: Console, *, as_json: bool
) -> int:
    from rich.table import Table

    from errata.benchmarks.tracing import heat_maps, trace_files
    from errata.benchmarks.tracing.trace_summary import is_normalised

    metric = settings.metric
    normalised = is_normalised([trace], metric)
    if "out" in values:
        picture = heat_maps.of_fact(trace, metric)
        trace_files.write_fact(Path(values["out"]), settings.plain, trace, picture)
    if as_json:
        show_json({"settings": settings.plain, **trace.as_dict()}, console)
        return DONE
    say(console, f"{trace.prompt} -> {trace.answers[0].strip()!r}; corrupted by {trace.corruption}, {trace.direction}")
    for name, there in (("clean", trace.clean), ("corrupted", trace.corrupted)):
        say(
            console,
            f"{name:>9}: P({trace.answers[0].strip()}) = {there['answer']:.4f}, P({trace.answers[1].strip()}) = "
            f"{there['other']:.4f}, logit difference {there['logit_difference']:+.2f}, KL {there['kl']:.3f}",
        )
    say(console, f"largest effect per token ({heat_maps.unit_of(metric, normalised=normalised)}) and its layer:")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("token")
    for grid in trace.grids:
        table.add_column(heat_maps.title_of(grid), justify="right")
        table.add_column("layer", justify="right")
    first, end = trace.subject_range
    effects = {grid: trace.effects(grid, metric, normalised=normalised) for grid in trace.grids}
    for row, token in enumerate(trace.rows):
        cells = []
        for found in effects.values():
            layer = int(found[row].abs().argmax())
            cells += [f"{float(found[row][layer]):+.3f}", str(layer)]
        table.add_row(repr(trace.tokens[token])[1:-1] + ("*" if first <= token < end else ""), *cells)
    show_table(console, table)
    _say_where(values, console)
    return DONE


def _show_facts(
    found: FactTraces, settings: TraceSettings, values: Mapping[str, str], console: Console, *, as_json: bool
) -> int:
    from rich.table import Table

    from errata.benchmarks.tracing import heat_maps, trace_files
    from errata.benchmarks.tracing.trace_summary import best_cells, summarise

    summary, metric = summarise(found), settings.metric
    if "out" in values:
        title = f"{Path(values['model']).name}, {count_of(len(found.traces), 'fact')}, {settings.direction}"
        picture = heat_maps.of_summary(summary, metric, title)
        trace_files.write_facts(Path(values["out"]), settings.plain, found, summary, picture)
    if as_json:
        show_json({"settings": settings.plain, **summary}, console)
        return DONE
    counts = summary["counts"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "traced")
    say(console, f"{count_of(counts['traced'], 'fact')} traced" + (f"; left out: {left_out}" if left_out else ""))
    for name in ("clean", "corrupted"):
        there = summary["means"][name]
        say(
            console,
            f"{name:>9}: mean probability {there['probability']:.4f}, logit difference "
            f"{there['logit_difference']:+.2f}, KL {there['kl']:.3f}",
        )
    unit = heat_maps.unit_of(metric, normalised=metric in summary["normalised"])
    say(console, f"largest mean effect per class of tokens ({unit}), its 95 % interval over facts, and its layer:")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("token")
    for grid in summary["effects"]:
        table.add_column(heat_maps.title_of(grid), justify="right")
        table.add_column("layer", justify="right")
    rows: dict[str, list[str]] = {}
    for effects in summary["effects"].values():
        for name, layer, mean, low, high in best_cells(effects[metric]):
            rows.setdefault(name, []).extend([f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", str(layer)])
    for name, cells in rows.items():
        table.add_row(name, *cells)
    show_table(console, table)
    _say_where(values, console)
    return DONE


def _say_where(values: Mapping[str, str], console: Console) -> None:
    from errata.benchmarks.tracing import trace_files

    if "out" in values:
        say(console, f"{trace_files.NUMBERS} and {trace_files.PICTURE}: {values['out']}")


COMMAND = Command(
    name="trace",
    usage=(
        "model=MODEL prompt=TEXT subject=TEXT donor=SUBJECT [name=value ...]",
        "model=MODEL dataset=NAME [dataset.path=FILE] [n_facts=N] [name=value ...]",
    ),
    summary="Show by causal tracing which states carry a fact, and where MLP and attention write it.",
    group=MEASURE,
    run=run,
    options=(
        MODEL,
        Option("prompt=TEXT", "one fact: its prompt; {} stands for the subject"),
        Option("subject=TEXT", "what the fact is about"),
        Option("donor=SUBJECT", "the other subject, with as many tokens"),
        Option("answer=TEXT", "the answer; by default what the model says"),
        CHAT,
        Option("dataset=NAME", "trace its facts that the model knows; with prompt=, look for a donor in it"),
        DATASET_FILE,
        HALF,
        Option("n_facts=N", "stop when that many facts are traced"),
        Option("preset=rome", "noise of 3 deviations, windows of 10 layers and probabilities", ("errata", "rome")),
        Option("corruption=swap", "swap (another subject), or noise: s3, s1, 0.1, u0.1, m, t5"),
        Option("samples=10", "rows with noise"),
        Option("direction=denoising", "restore clean states, or put corrupted ones in", ("denoising", "noising")),
        Option("grids=state,mlp", "state, mlp, attention, severed_mlp, severed_attention, severed_both"),
        Option("window=1", "layers around each cell whose MLP or attention is patched"),
        Option(
            "metric=logit_difference",
            "what the table and the picture show",
            ("probability", "logit_difference", "kl"),
        ),
        Option("seed=N", "seed of the noise, or of the order of donors"),
        Option("out=FOLDER", "write trace.json, trace.png, and facts.jsonl for a dataset"),
        AS_JSON,
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "Each cell of a heat map is one patch: the clean value of one token and layer in the corrupted run. The\n"
        "subject is replaced by another one whose prompt has the same tokens otherwise. All metrics come from one run.",
        "Of a dataset, facts are left out and counted that the model answers otherwise, or that have no donor.",
        "preset=rome is the tracing of the ROME paper: noise on the subject's embeddings.",
    ),
    examples=(
        'errata trace model=world prompt="The capital of {} is" subject=Gavaria dataset=world',
        "errata trace model=world dataset=world n_facts=50 out=traces",
        "errata trace model=world dataset=world n_facts=20 preset=rome out=traces-rome",
    ),
    needs_arguments=True,
)
