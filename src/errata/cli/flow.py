"""`errata flow`: shows through which tokens, heads and MLPs a prediction comes about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import is_true, parse_values
from errata.cli.command import AS_JSON, CHAT, MEASURE, MODEL, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say, show_json, shown_warnings
from errata.editors.core.errors import ConfigError
from errata.editors.core.request import EditRequest

if TYPE_CHECKING:
    from rich.console import Console

# The share that edges of a route exceed, if nothing is typed.
THRESHOLD = 0.04


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Show the shares of one prompt's states and the route to its last token, and write numbers and a picture."""
    given = parse_values(arguments, COMMAND)
    values = given.values
    if not {"model", "prompt"} <= values.keys():
        raise ConfigError("expected model=MODEL prompt=TEXT")
    threshold, least = (_share(name, values, default) for name, default in (("threshold", THRESHOLD), ("least", 0.0)))
    norm = values.get("norm", "1")
    if norm not in ("1", "2"):
        raise ConfigError(f"norm: expected 1 or 2, got {norm!r}")
    token, prompt = _token(values), values["prompt"]
    if "subject" in values:
        prompt = EditRequest(prompt, values["subject"], target="?").text
    model, tokenizer = edit_folders.load_model(values["model"], values)

    from errata.benchmarks.tracing import flow_files, flow_pictures
    from errata.editors.core.locating.information_flow import information_flow

    with shown_warnings(errors):
        chat = is_true("chat", values)
        flow = information_flow(model, tokenizer, prompt, chat=chat, norm=1 if norm == "1" else 2)
    record = flow_files.flow_record(flow.thresholded(least) if least else flow, token, threshold)
    if "out" in values:
        flow_files.write_flow(Path(values["out"]), record, flow_pictures.of_flow(record))
    if given.flags:
        show_json(record, console)
    else:
        _show(record, console)
        if "out" in values:
            say(console, f"{flow_files.NUMBERS} and {flow_files.PICTURE}: {values['out']}")
    return DONE


def _share(name: str, values: Mapping[str, str], default: float) -> float:
    """Return a value as a share.

    Raises:
        ConfigError: It is no number from 0 to 1.
    """
    try:
        share = float(values.get(name, default))
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise ConfigError(f"{name}: expected a share of at least 0 and below 1, got {values[name]!r}")
    return share


def _token(values: Mapping[str, str]) -> int:
    text = values.get("token", "-1")
    if not text.removeprefix("-").isdecimal():
        raise ConfigError(f"token: expected a number, counted from 0, or -1 for the last, got {text!r}")
    return int(text)


def _show(record: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    tokens, token = record["tokens"], record["token"]
    names = [repr(text)[1:-1] for text in tokens]
    say(console, f"{record['prompt']} -> {record['says'].strip()!r} ({record['probability']:.4f})")
    states = {name for edge in record["route"] for name in edge[:2]}
    say(
        console,
        f"route to token {token} ({names[token]!r}): {count_of(len(record['route']), 'edge')} above "
        f"{record['threshold']:g} of {record['n_edges']}, {count_of(len(states), 'state')}",
    )
    ranked = sorted(enumerate(record["token_shares"]), key=lambda pair: -pair[1])
    listed = ", ".join(f"{names[place]!r} {100 * share:.0f} %" for place, share in ranked[:8] if share >= 0.005)
    say(console, f"its last state comes from: {listed}")
    say(console, "shares of its own states, per layer, and the largest parts that heads bring from other tokens:")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "attention", "MLP"):
        table.add_column(name, justify="right")
    table.add_column("from (head)")
    for layer, shares in enumerate(record["layers"]):
        attention = sum(map(sum, shares["attention"]))  # with `least`, shares may sum to 0
        parts = sorted(
            ((part, place, head) for place, row in enumerate(shares["attention"]) for head, part in enumerate(row)),
            reverse=True,
        )
        largest = [f"{names[place]} {part:.3f} ({head})" for part, place, head in parts[:3] if part > 0.01]
        table.add_row(str(layer), f"{attention:.3f}", f"{shares['mlp']:.3f}", ", ".join(largest))
    show_table(console, table)


COMMAND = Command(
    name="flow",
    usage=("model=MODEL prompt=TEXT [name=value ...]",),
    summary="Show through which tokens, heads and MLPs a prediction comes about.",
    group=MEASURE,
    run=run,
    options=(
        MODEL,
        Option("prompt=TEXT", "the text whose next token is asked about"),
        Option("subject=TEXT", "what stands for {} in it"),
        CHAT,
        Option("threshold=0.04", "the route has the edges with a larger share"),
        Option("least=0", "drop parts up to this share first, and share out the rest"),
        Option("token=-1", "the token that the route leads to; by default the last"),
        Option("norm=1", "the distance between states: 1 as in the paper, or 2", ("1", "2")),
        Option("out=FOLDER", "write flow.json and flow.png"),
        AS_JSON,
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "Every hidden state is a sum of what was there before and what heads and an MLP add. A part's share is how\n"
        "much nearer the sum is to it than to nothing. The route is what is reached from the last state downward.",
        "An information flow describes one run of the model. It is no experiment: `errata trace` patches states.",
    ),
    examples=(
        'errata flow model=world prompt="Q: Which city is the capital of Gavaria? A:"',
        'errata flow model=gpt2 prompt="The Eiffel Tower is in the city of" threshold=0.02 out=flow',
    ),
    needs_arguments=True,
)
