"""`errata playground`: serves a page on this machine to make edits, look at what they did, and undo them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.benchmarks.bench.compose import compose
from errata.cli import overrides
from errata.cli.arguments import parse
from errata.cli.command import TOOLS, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import build
from errata.editors.core.errors import ConfigError
from errata.playground import app, server

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.config import ModelConfig

PORT = "7860"


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: A name, method or model is unknown, the port is taken, or Gradio is not installed.
    """
    given = parse(arguments, COMMAND)
    if given.words:
        raise ConfigError(f"expected name=value, got {given.words[0]!r}")
    values = given.values
    port = _port(values.get("port", PORT))
    server.load_gradio()
    page = app.page_of(
        _models(values.get("model", "world")),
        method=values.get("editor", "rome"),
        precision=values.get("precision"),
        device=values.get("device"),
    )
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
        Option("editor=rome", "the method that is chosen at first"),
        Option("precision=float32", "precision of the weights"),
        Option("device=cuda", "where to load the model"),
    ),
    notes=("No other machine can reach the page. Ctrl-C ends it.",),
    examples=("errata playground", "errata playground model=world,path/or/id port=7861 editor=memit"),
)
