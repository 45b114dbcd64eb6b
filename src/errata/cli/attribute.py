"""`errata attribute`: shows which components of a model contribute to its answers, by regression over ablations."""

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
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.forward.gradient_factors import AnsweredRow
    from errata.editors.core.request import EditRequest
    from errata.editors.core.solve.mask_regression import Fit

ONE_FACT = ("subject", "answer")
FACTS = 20
DEFAULTS = {
    "components": "heads,neurons:64",
    "keep": "0.95",
    "checks": "0.95,0.9,0.8",
    "fit": "least_squares",
    "ridge": "0.3",
}


@dataclass(frozen=True)
class AttributionSettings:
    """What was asked for, checked.

    Attributes:
        plain: As it was typed, with what is filled in.
    """

    components: str
    layers: tuple[int, ...] | None
    keep: float
    checks: tuple[float, ...]
    fit: Fit
    ridge: float
    seed: int
    top: int
    plain: Mapping[str, Any]


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Attribute one answer or those of a dataset, show a table, and write numbers and a picture."""
    given = parse_values(arguments, COMMAND)
    values = given.values
    if "model" not in values or ("prompt" in values) == ("dataset" in values):
        raise ConfigError("expected model=MODEL, and either prompt=TEXT or dataset=NAME")
    wrong = [name for name in ONE_FACT if name in values and "prompt" not in values]
    wrong += [name for name in values if name.startswith("dataset.") or name == "n_facts"] if "prompt" in values else []
    if wrong:
        raise ConfigError(f"{wrong[0]}= goes with {'dataset' if 'prompt' in values else 'prompt'}=")
    settings = _settings(values)
    requests = _requests(values)
    model, tokenizer = edit_folders.load_model(values["model"], values)

    from errata.benchmarks.tracing.attribution_panels import of_attribution
    from errata.benchmarks.tracing.attribution_summary import summarise_attribution, write_attribution
    from errata.editors.core.locating.attribution import attribute
    from errata.editors.core.locating.components import components_of
    from errata.editors.core.model.architecture import describe

    with shown_warnings(errors), show_progress(errors) as progress:
        components = components_of(describe(model), settings.components, settings.layers)
        rows, facts, otherwise = _asked(model, tokenizer, requests, values)
        found = attribute(
            model,
            tokenizer,
            rows,
            components,
            keep=settings.keep,
            n_masks=whole_number("masks", values, least=2),
            fit=settings.fit,
            ridge=settings.ridge,
            keep_rates=settings.checks,
            check_masks=whole_number("check_masks", values, least=2) or 50,
            seed=settings.seed,
            progress=progress,
        )
    summary = {**summarise_attribution(found, facts, top=settings.top, seed=settings.seed), "left_out": otherwise}
    if "out" in values:
        title = f"{Path(values['model']).name}, {count_of(len(facts), 'fact')}, {settings.components}"
        write_attribution(Path(values["out"]), settings.plain, found, summary, of_attribution(summary, title))
    if given.flags:
        show_json({"settings": settings.plain, **summary}, console)
    else:
        _show(summary, values, console)
    return DONE


def _settings(values: Mapping[str, str]) -> AttributionSettings:
    from errata.editors.core.locating.components import parsed_kinds
    from errata.editors.core.solve.mask_regression import FITS

    filled = {**DEFAULTS, **values}
    parsed_kinds(filled["components"])
    if filled["fit"] not in FITS:
        raise ConfigError(
            f"fit: expected {' or '.join(FITS)}, got {filled['fit']!r}{did_you_mean(filled['fit'], FITS)}"
        )
    layers = None
    if "layers" in values:
        layers = tuple(whole_number("layers", {"layers": layer}) or 0 for layer in values["layers"].split(","))
    unseen = ("out", "device", "trust_remote_code")
    return AttributionSettings(
        filled["components"],
        layers,
        _rate("keep", filled["keep"]),
        tuple(_rate("checks", rate) for rate in filled["checks"].split(",") if rate),
        FITS[FITS.index(filled["fit"])],
        _number("ridge", filled["ridge"]),
        whole_number("seed", values) or 0,
        whole_number("top", values, least=1) or 10,
        {name: filled[name] for name in sorted(filled) if name not in unseen},
    )


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}: expected a number of 0 or more, got {text!r}")
    return value


def _rate(name: str, text: str) -> float:
    value = _number(name, text)
    if not 0 < value < 1:
        raise ConfigError(f"{name}: expected a keep rate above 0 and below 1, got {text!r}")
    return value


def _requests(values: Mapping[str, str]) -> list[EditRequest]:
    """Return what is asked: the one prompt, or the facts of the dataset, each with its true answer."""
    from dataclasses import replace

    from errata.editors.core.request import EditRequest

    if "prompt" in values:
        answer = values.get("answer", "?")
        return [EditRequest(values["prompt"], values.get("subject"), answer, chat=is_true("chat", values))]
    from errata.benchmarks.datasets import registry

    split: Any = values.get("dataset.split")
    if split not in (None, "dev", "test"):
        raise ConfigError(f"dataset.split: expected dev or test, got {split!r}")
    path, chat = values.get("dataset.path"), is_true("chat", values)
    loaded = registry.load(values["dataset"], path, split=split, chat=chat)
    asked = [request for case in loaded.cases for request in case.requests]
    return [replace(request, target=request.target_true or request.target, target_true=None) for request in asked]


def _asked(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], values: Mapping[str, str]
) -> tuple[list[AnsweredRow], list[str], int]:
    """Return the rows, what they ask, and how many facts before them the model answers otherwise."""
    import torch

    from errata.editors.core.locating.ablated_margins import ablated_margins
    from errata.editors.core.locating.attribution import answered_row
    from errata.editors.core.locating.components import components_of
    from errata.editors.core.model.architecture import describe
    from errata.editors.core.model.tokens import pad_id

    architecture, pad = describe(model), pad_id(tokenizer)

    def row(request: EditRequest) -> AnsweredRow:
        return answered_row(tokenizer, request.text, request.target, chat=request.chat, join=request.join)

    if "prompt" in values:
        (request,) = requests
        if "answer" in values:
            return [row(request)], [f"{request.text} -> {request.target.strip()}"], 0
        ids = row(request).ids[: -len(row(request).answer) + 1 or None]
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=architecture.device)).logits[0, -1]
        token = int(logits.argmax())
        from errata.editors.core.forward.gradient_factors import AnsweredRow

        return [AnsweredRow(ids, (token,))], [f"{request.text} -> {tokenizer.decode([token]).strip()}"], 0
    wanted = whole_number("n_facts", values, least=1) or FACTS
    whole = components_of(architecture, "mlp")
    keep = torch.ones(1, len(whole), dtype=torch.bool)
    rows: list[AnsweredRow] = []
    facts: list[str] = []
    otherwise = 0
    for start in range(0, len(requests), 64):
        some = requests[start : start + 64]
        asked = [row(request) for request in some]
        least = ablated_margins(architecture, whole, asked, keep, pad=pad).least[0].tolist()
        for request, one, margin in zip(some, asked, least, strict=True):
            if len(rows) == wanted:
                return rows, facts, otherwise
            if margin > 0:
                rows.append(one)
                facts.append(f"{request.text} -> {request.target.strip()}")
            else:
                otherwise += 1
    if not rows:
        raise ConfigError(f"{values['dataset']}: the model gives none of {len(requests)} true answers")
    return rows, facts, otherwise


def _show(summary: Mapping[str, Any], values: Mapping[str, str], console: Console) -> None:
    from rich.table import Table

    from errata.benchmarks.tracing.attribution_summary import COMPONENTS, NUMBERS, PICTURE

    facts = summary["facts"]
    left_out = f"; {summary['left_out']} others are answered otherwise" if summary["left_out"] else ""
    asked = facts[0]["fact"] if len(facts) == 1 else f"{count_of(len(facts), 'fact')} that the model knows{left_out}"
    mean = sum(fact["margin"] for fact in facts) / len(facts)
    say(console, f"{asked}; margin {mean:+.2f} logits" + (" in the mean" if len(facts) > 1 else ""))
    say(console, f"{summary['n_components']:,} components, {summary['n_masks']:,} masks that keep {summary['keep']:g}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("keep rate", "correlation", "lowest fact"):
        table.add_column(name, justify="right")
    for check in summary["checks"]:
        table.add_row(f"{check['keep']:g}", f"{check['mean']:.3f}", f"{min(check['correlations']):.3f}")
    if summary["checks"]:
        masks = summary["checks"][0]["masks"]
        say(console, f"predicted against measured margins, under {masks} fresh masks per keep rate:")
        show_table(console, table)
    say(console, "logits that the margin gains where a component is kept" + _of_interval(facts) + ":")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("for", "", "against", " "):
        table.add_column(name, justify="right" if not name.strip() else "left")
    for good, bad in zip(summary["for"], summary["against"], strict=True):
        table.add_row(good["name"], _weight(good), bad["name"], _weight(bad))
    show_table(console, table)
    if "out" in values:
        say(console, f"{NUMBERS}, {COMPONENTS} and {PICTURE}: {values['out']}")


def _of_interval(facts: Sequence[Any]) -> str:
    return ", its mean and 95 % interval over facts" if len(facts) > 1 else ""


def _weight(entry: Mapping[str, Any]) -> str:
    interval = "" if entry["low"] is None else f" [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    return f"{entry['mean']:+.3f}{interval}"


COMMAND = Command(
    name="attribute",
    usage=(
        "model=MODEL prompt=TEXT [answer=TEXT] [name=value ...]",
        "model=MODEL dataset=NAME [dataset.path=FILE] [n_facts=N] [name=value ...]",
    ),
    summary="Show by random ablations which components contribute to an answer, and how well that predicts.",
    group=MEASURE,
    run=run,
    options=(
        MODEL,
        Option("prompt=TEXT", "one answer: its prompt; {} stands for the subject"),
        Option("subject=TEXT", "what stands for {}"),
        Option("answer=TEXT", "the answer; by default the first token of what the model says"),
        CHAT,
        Option("dataset=NAME", "the facts whose true answers the model gives"),
        DATASET_FILE,
        HALF,
        Option("n_facts=20", "how many of them"),
        Option("components=heads,neurons:64", "rows (as published), heads, neurons:N, attention, mlp"),
        Option("layers=0,1", "only the components of these blocks"),
        Option("keep=0.95", "probability by which a component is kept in a random mask"),
        Option("masks=N", "random masks; by default 1.55 per component, as published"),
        Option("fit=least_squares", "in closed form, or the published loop", ("least_squares", "saga")),
        Option("ridge=0.3", "share of its variance that is added to each component's mask; 0: as published"),
        Option("checks=0.95,0.9,0.8", "keep rates at which the result is checked on fresh masks; empty: no check"),
        Option("check_masks=50", "fresh masks per keep rate"),
        Option("seed=0", "seed of the masks"),
        Option("top=10", "how many components are shown"),
        Option("out=FOLDER", "write attribution.json, components.jsonl and attribution.png"),
        AS_JSON,
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "Components are set to zero at random, many times, and a line is fitted to the answer's margin: its logit\n"
        "less the highest other one. A component's weight is what the margin gains where it is kept. No weight is\n"
        "written.",
        "The cost is masks x facts forward passes. editor=coar makes an edit of the same numbers.",
    ),
    examples=(
        'errata attribute model=world prompt="Q: Which city is the capital of {}? A:" subject=Gavaria',
        "errata attribute model=world dataset=world n_facts=20 components=heads,neurons:16 out=attribution",
    ),
    needs_arguments=True,
)
