"""`errata convert`: files of other repositories in, and cases in EasyEdit's form out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli import edit_folders
from errata.cli.messages import asked_for_help, say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.convert.hparams import ConvertedField

HELP = """\
errata convert hparams FILE [method=ROME] [out=FILE.yaml]          EasyEdit's, ROME's, MEMIT's, EMMET's, AlphaEdit's
errata convert moments FILE.npz... out=FILE.safetensors [layer=17] for editor.mom2_file=FILE.safetensors
errata convert projectors FILE out=FILE.safetensors [layers=[4,5]] for editor.projector_file=FILE.safetensors
errata convert dataset [FILE] dataset=counterfact out=FILE.json    any dataset that errata reads, for EasyEdit
"""
HELP_LINE = "`errata convert --help` shows what there is"


def convert(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Convert one kind of file."""
    from errata.cli.overrides import words_and_options
    from errata.editors.core.config import did_you_mean

    kinds: dict[str, Callable[[list[str], dict[str, str], Console], None]] = {
        "hparams": hparams,
        "moments": moments,
        "projectors": projectors,
        "dataset": dataset,
    }
    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    kind = arguments[0]
    if kind not in kinds:
        raise ConfigError(f"unknown kind of file {kind!r}{did_you_mean(kind, kinds)}")
    words, options = words_and_options(arguments[1:], OPTIONS[kind], HELP_LINE)
    kinds[kind](words, options, console)
    return 0


OPTIONS: Mapping[str, tuple[str, ...]] = {
    "hparams": ("method", "out"),
    "moments": ("layer", "out"),
    "projectors": ("layers", "out"),
    "dataset": ("dataset", "dataset.path", "dataset.split", "n_edits", "out"),
}


def hparams(words: list[str], options: dict[str, str], console: Console) -> None:
    """What becomes of every field, and the command that runs with them."""
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.bench.hydra_grammar import written
    from errata.benchmarks.convert.hparams import read

    (path,) = _files(words, 1)
    if "out" in options:
        _check_new(Path(options["out"]))
    found = read(path, method=options.get("method"))
    table = Table("theirs", "here", "", box=None, padding=(0, 3, 0, 0))
    for row in found.rows:
        style = {"kept": "", "left out": "dim"}.get(row.fate, "yellow")
        cells = (f"{row.field}: {_plain(row.value)}", _here(row, found.method), row.note)
        table.add_row(*(Text(cell, style) for cell in cells))
    console.print(table)
    chosen = f"editor={found.method}"
    if "out" in options:
        _write_yaml(Path(options["out"]), found.method, found.fields, path)
        chosen = f"editor={options['out']}"
        fields = []
    else:
        fields = [f"editor.{name}={written(value)}" for name, value in found.fields.items()]
    model = [] if found.model is None else [f"model={found.model}"]
    line = shlex.join(["errata", "bench", chosen, *model, *fields])
    console.print(Text.assemble("\n", line), soft_wrap=True)


def _here(row: ConvertedField, method: str) -> str:
    if row.ours:
        return ", ".join(f"{name}: {_plain(value)}" for name, value in row.ours.items())
    if row.fate == "kept":
        return f"model={row.value}" if row.field == "model_name" else f"editor={method}"
    return row.fate


def _plain(value: Any) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _write_yaml(path: Path, method: str, fields: Mapping[str, Any], source: str) -> None:
    from omegaconf import OmegaConf

    from errata.editors.core.files.atomic import make_folder, write_atomically

    text = OmegaConf.to_yaml(OmegaConf.create({"name": method, **fields}))
    make_folder(path.parent)
    write_atomically(path, f"# {method}, from {Path(source).name}; `errata bench editor={path.name}`\n{text}".encode())


def moments(words: list[str], options: dict[str, str], console: Console) -> None:
    """Several layers' files as one."""
    from errata.benchmarks.convert.statistics import read_moment
    from errata.editors.core.files import matrix_file

    found, out = {}, _out(options)
    for path in _files(words):
        moment = read_moment(path)
        layer = edit_folders.whole("layer", options) if "layer" in options else moment.layer
        if layer is None or layer in found:
            which = "the name of no single layer" if layer is None else f"layer {layer} a second time"
            raise ConfigError(f"{path} has {which}; convert it by itself with layer=N")
        found[layer] = (moment, {"tokens": moment.tokens, "source": Path(path).name})
    matrix_file.write(
        out, "moments", {n: m.matrix for n, (m, _) in found.items()}, {n: a for n, (_, a) in found.items()}
    )
    for layer, (moment, _) in sorted(found.items()):
        say(console, f"layer {layer}: {len(moment.matrix)} x {len(moment.matrix)} over {moment.tokens:,} tokens")
    say(console, f"written to {out}; editor.mom2_file={shlex.quote(str(out))} uses it")


def projectors(words: list[str], options: dict[str, str], console: Console) -> None:
    """AlphaEdit's projectors of all layers."""
    from errata.benchmarks.convert.statistics import read_projectors
    from errata.editors.core.files import matrix_file

    (path,), out, layers = _files(words, 1), _out(options), None
    if "layers" in options:
        parts = re.sub(r"[\[\]\s]", "", options["layers"]).split(",")
        layers = [n for part in parts if (n := edit_folders.whole("layers", {"layers": part})) is not None]
    found = read_projectors(path, layers)
    matrix_file.write(out, "projectors", found, {layer: {"source": Path(path).name} for layer in found})
    for layer, P in found.items():
        say(console, f"layer {layer}: {len(P)} x {len(P)}, {float(P.diagonal().sum()):.0f} dimensions kept")
    say(console, f"written to {out}; editor=alphaedit editor.projector_file={shlex.quote(str(out))} uses it")


def dataset(words: list[str], options: dict[str, str], console: Console) -> None:
    """Cases of any dataset as EasyEdit's JSON."""
    from errata.benchmarks.datasets import easyedit
    from errata.benchmarks.datasets import registry as datasets

    out = _out(options)
    if words and "dataset.path" in options:
        raise ConfigError(f"dataset.path= and {words[0]} are two files; give one")
    path = options.get("dataset.path") if not words else _files(words, 1)[0]
    limit = edit_folders.whole("n_edits", options, least=1)
    split: Any = options.get("dataset.split")
    loaded = datasets.load(options.get("dataset", "world"), path, split=split, limit=limit)
    written = easyedit.write(loaded.cases, out)
    for drop in (*loaded.dropped, *written.dropped):
        say(console, f"left out: {drop.record}, {drop.field}: {drop.reason}")
    for kind, count in sorted(written.left_out.items()):
        say(console, f"no place in EasyEdit's form for {count} probes: {kind}")
    say(console, f"{written.cases} cases written to {out}")


def _files(words: list[str], count: int | None = None) -> list[str]:
    if not words or count not in (None, len(words)):
        expected = "a file" if count else "at least one file"
        raise ConfigError(f"expected {expected}, got {len(words)}; {HELP_LINE}")
    return words


def _out(options: Mapping[str, str]) -> Path:
    if "out" not in options:
        raise ConfigError("out is missing: give out=FILE")
    _check_new(path := Path(options["out"]))
    return path


def _check_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path} is there already and is not written over; remove it or name another file")
