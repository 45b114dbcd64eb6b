"""`errata playground`: serves a page on this machine to make edits, look at what they did, and undo them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.cli import overrides
from errata.cli.arguments import parse
from errata.cli.command import METHOD_FIELD, TOOLS, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import build
from errata.editors.core.errors import ConfigError
from errata.playground import app, server
from errata.playground.session import SessionOptions

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.config import ModelConfig

PORT = "7860"


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: A name, method or model is unknown, the port is taken, or Gradio is not installed.
    """
    chosen = [argument for argument in arguments if argument.startswith(("editor=", "editor."))]
    given = parse([argument for argument in arguments if argument not in chosen], COMMAND)
    if given.words:
        raise ConfigError(f"expected name=value, got {given.words[0]!r}")
    values = given.values
    port = _port(values.get("port", PORT))
    server.load_gradio()
    models = _models(values.get("model", "world"))
    methods, fields = _methods(chosen, models)
    options = SessionOptions(
        fields, values.get("precision"), values.get("device"), Path(values.get("out", SessionOptions.out))
    )
    page = app.page_of(models, methods=methods, options=options)
    served = server.serve(page, port)
    say(console, f"playground at {served.url}; Ctrl-C ends it")
    served.wait()
    return DONE


def _models(names: str) -> dict[str, ModelConfig]:
    """Return the configuration of each model, by the name that was typed."""
    from errata.benchmarks.bench.config import ModelConfig

    found = {}
    for name in (part.strip() for part in names.split(",")):
        values = compose("edit", overrides.translated([f"model={name}"], "edit"))
        found[name] = build(ModelConfig, values["model"], "model.")
    return found


def _methods(
    arguments: Sequence[str], models: Mapping[str, ModelConfig]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the methods to offer, and the fields that were set, by method.

    A field goes to every method that has it. One method alone is the first of all.

    Raises:
        ConfigError: A method is unknown, no offered method has a field, or a value does not fit.
    """
    from errata import editors
    from errata.benchmarks.bench.config import editor_config

    named = [overrides.split(argument)[1] for argument in arguments if argument.startswith("editor=")]
    names = [name.strip() for name in named[-1].split(",")] if named else ["rome"]
    typed = [argument for argument in arguments if not argument.startswith("editor=")]
    values = compose("edit", overrides.translated([f"editor={names[0]}", *typed], "edit"))["editor"]
    first = values.pop("name")
    others = names[1:] or sorted(set(editors.METHODS) - {first})
    offered = [first, *others]
    fields = {name: _known(values, name) for name in offered}
    strange = [field for field in values if not any(field in known for known in fields.values())]
    for model in models.values():
        editor_config({**fields[first], **{field: values[field] for field in strange}, "name": first}, model)
        for name in others:
            if fields[name]:
                editor_config({**fields[name], "name": name}, model)
    return offered, fields


def _known(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return those values that are fields of a method. One that cannot be imported has none, and says so when used."""
    from errata import editors

    try:
        known = {field.name for field in dataclasses.fields(editors.get(method).Config)}
    except ConfigError:
        return {}
    return {field: value for field, value in values.items() if field in known}


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"port: expected a number from 1 to {2**16 - 1}, got {text!r}")
    return int(text)


COMMAND = Command(
    name="playground",
    usage=("[model=NAME,NAME ...] [port=7860] [name=value ...]",),
    summary="Serve a page on this machine to make edits, look at what they did, and undo them.",
    group=TOOLS,
    run=run,
    options=(
        Option("model=NAME,NAME", "the models to choose from: names, folders, Hugging Face ids; by default world"),
        Option("port=7860", "the port of the page on this machine"),
        Option(
            "editor=rome", "the method that is chosen at first; several, with commas, are the only ones to choose from"
        ),
        Option("out=FOLDER", "where the page saves edits; by default edits"),
        Option("precision=float32", "precision of the weights"),
        Option("device=cuda", "where to load the model"),
    ),
    overrides=(METHOD_FIELD,),
    notes=("No other machine can reach the page. Ctrl-C ends it.",),
    examples=(
        "errata playground",
        "errata playground model=world,path/or/id editor=memit,grace editor.mom2_dataset=texts.jsonl",
    ),
)
