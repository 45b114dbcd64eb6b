"""`errata convert`: converts files of other repositories, and writes datasets in EasyEdit's form."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.cli.arguments import parse, whole_number
from errata.cli.command import MEASURE, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.convert.hparams import ConvertedField

Convert = Callable[[Sequence[str], Mapping[str, str], "Console"], None]
OPTIONS = "dataset.options."
SEE_HELP = "`errata convert --help` shows what it takes"


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Convert files of one kind."""
    options = [word.partition("=")[0] for word in arguments if word.startswith(OPTIONS)]
    given = parse(arguments, COMMAND, also=options)
    if not given.words:
        raise ConfigError(f"expected a kind of file{did_you_mean('', KINDS)}")
    kind, *files = given.words
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of file {kind!r}{did_you_mean(kind, KINDS)}")
    convert, names = KINDS[kind]
    if unused := [name for name in given.values if name not in names and not (kind == "dataset" and name in options)]:
        raise ConfigError(f"unknown name {unused[0]!r} for {kind}{did_you_mean(unused[0], names)}")
    convert(files, given.values, console)
    return DONE


def _hparams(files: Sequence[str], values: Mapping[str, str], console: Console) -> None:
    """Show what every field becomes, and the command that runs with them."""
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.convert.hparams import read
    from errata.benchmarks.runs.hydra_grammar import written

    (path,) = _expect_files(files, 1)
    if "out" in values:
        _check_new(Path(values["out"]))
    found = read(path, method=values.get("method"))
    table = Table("theirs", "here", "", box=None, padding=(0, 3, 0, 0))
    for row in found.rows:
        style = {"kept": "", "left out": "dim"}.get(row.fate, "yellow")
        cells = (f"{row.field}: {_plain(row.value)}", _here(row, found.method), row.note)
        table.add_row(*(Text(cell, style) for cell in cells))
    console.print(table)
    chosen = f"editor={found.method}"
    if "out" in values:
        _write_yaml(Path(values["out"]), found.method, found.fields, path)
        chosen = f"editor={values['out']}"
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
    """Return a value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _write_yaml(path: Path, method: str, fields: Mapping[str, Any], source: str) -> None:
    from omegaconf import OmegaConf

    from errata.editors.core.files.atomic import make_folder, write_atomically

    text = OmegaConf.to_yaml(OmegaConf.create({"name": method, **fields}))
    make_folder(path.parent)
    write_atomically(path, f"# {method}, from {Path(source).name}; `errata bench editor={path.name}`\n{text}".encode())


def _moments(files: Sequence[str], values: Mapping[str, str], console: Console) -> None:
    """Write the moments of several layers as one file."""
    from errata.benchmarks.convert.statistics import read_moment
    from errata.editors.core.files import matrix_file

    found, out = {}, _out(values)
    for path in _expect_files(files):
        moment = read_moment(path)
        layer = whole_number("layer", values) if "layer" in values else moment.layer
        if layer is None or layer in found:
            why = "names no single layer" if layer is None else f"names layer {layer} a second time"
            raise ConfigError(f"{path} {why}; convert it by itself with layer=N")
        found[layer] = (moment, {"tokens": moment.tokens, "source": Path(path).name})
    matrices = {layer: moment.matrix for layer, (moment, _) in found.items()}
    matrix_file.write(out, "moments", matrices, {layer: origin for layer, (_, origin) in found.items()})
    for layer, (moment, _) in sorted(found.items()):
        say(console, f"layer {layer}: {len(moment.matrix)} x {len(moment.matrix)} over {moment.tokens:,} tokens")
    say(console, f"written to {out}; editor.mom2_file={shlex.quote(str(out))} uses it")


def _projectors(files: Sequence[str], values: Mapping[str, str], console: Console) -> None:
    """Write AlphaEdit's projectors of all layers as one file."""
    from errata.benchmarks.convert.statistics import read_projectors
    from errata.editors.core.files import matrix_file

    (path,), out, layers = _expect_files(files, 1), _out(values), None
    if "layers" in values:
        parts = re.sub(r"[\[\]\s]", "", values["layers"]).split(",")
        numbers = (whole_number("layers", {"layers": part}) for part in parts)
        layers = [number for number in numbers if number is not None]
    found = read_projectors(path, layers)
    matrix_file.write(out, "projectors", found, {layer: {"source": Path(path).name} for layer in found})
    for layer, P in found.items():
        say(console, f"layer {layer}: {len(P)} x {len(P)}, {float(P.diagonal().sum()):.0f} dimensions kept")
    say(console, f"written to {out}; editor=alphaedit editor.projector_file={shlex.quote(str(out))} uses it")


def _dataset(files: Sequence[str], values: Mapping[str, str], console: Console) -> None:
    """Write the cases of any dataset as EasyEdit's JSON."""
    from omegaconf import OmegaConf

    from errata.benchmarks.datasets import easyedit
    from errata.benchmarks.datasets import registry as datasets

    out = _out(values)
    if files and "dataset.path" in values:
        raise ConfigError(f"dataset.path= and {files[0]} are two files; give one")
    path = values.get("dataset.path") if not files else _expect_files(files, 1)[0]
    limit = whole_number("n_edits", values, least=1)
    split: Any = values.get("dataset.split")
    given = [f"{name.removeprefix(OPTIONS)}={value}" for name, value in values.items() if name.startswith(OPTIONS)]
    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    loaded = datasets.load(values.get("dataset", "world"), path, split=split, limit=limit, options=options or None)
    written = easyedit.write(loaded.cases, out)
    for drop in (*loaded.dropped, *loaded.left_out, *written.dropped):
        say(console, f"left out: {drop.record}, {drop.field}: {drop.reason}")
    for kind, count in sorted(written.left_out.items()):
        say(console, f"EasyEdit's form has no place for {count_of(count, 'probe')} of the kind {kind}")
    say(console, f"{count_of(written.cases, 'case')} written to {out}")


def _expect_files(files: Sequence[str], count: int | None = None) -> Sequence[str]:
    """Return the files, once they are as many as expected; without `count`, at least one.

    Raises:
        ConfigError: There are more or fewer.
    """
    if not files or count not in (None, len(files)):
        expected = "a file" if count else "at least one file"
        raise ConfigError(f"expected {expected}, got {len(files)}; {SEE_HELP}")
    return files


def _out(values: Mapping[str, str]) -> Path:
    if "out" not in values:
        raise ConfigError("out is missing: give out=FILE")
    _check_new(path := Path(values["out"]))
    return path


def _check_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path} is there already and is not overwritten; remove it or name another file")


# Kind of file -> what converts it, and the names that it takes.
KINDS: Mapping[str, tuple[Convert, tuple[str, ...]]] = MappingProxyType(
    {
        "hparams": (_hparams, ("method", "out")),
        "moments": (_moments, ("layer", "out")),
        "projectors": (_projectors, ("layers", "out")),
        "dataset": (_dataset, ("dataset", "dataset.path", "dataset.split", "n_edits", "out")),
    }
)
COMMAND = Command(
    name="convert",
    usage=(
        "hparams FILE [method=NAME] [out=FILE.yaml]",
        "moments FILE.npz ... out=FILE.safetensors [layer=N]",
        "projectors FILE.pt out=FILE.safetensors [layers=N,N]",
        "dataset [FILE] dataset=NAME out=FILE.json [n_edits=N]",
    ),
    summary="Convert files of other repositories for errata, or a dataset for EasyEdit.",
    group=MEASURE,
    run=run,
    options=(
        Option("out=FILE", "the new file"),
        Option("method=NAME", "hparams: the method, where the file does not name it"),
        Option("layer=N", "moments: the layer, where the file's name does not say it"),
        Option("layers=N,N", "projectors: the layers that the file holds, in their order"),
        Option("dataset=NAME", "dataset: any dataset of `errata bench`; by default world"),
        Option("dataset.path=FILE", "dataset: its file, which can be given as FILE as well"),
        Option("dataset.options.NAME=VALUE", "dataset: what a dataset of another package takes besides its path"),
        Option("dataset.split=test", "dataset: which half of the testbed's cases", ("dev", "test")),
        Option("n_edits=N", "dataset: how many cases; by default all"),
    ),
    notes=(
        "hparams shows what becomes of every field of EasyEdit's, ROME's, MEMIT's, EMMET's or AlphaEdit's file, and\n"
        "the `errata bench` command that runs with them. moments and projectors write files for editor.mom2_file= and\n"
        "editor.projector_file=.",
    ),
    examples=(
        "errata convert hparams hparams/ROME/gpt2-xl.yaml",
        "errata convert dataset dataset=world out=world.json n_edits=100",
    ),
    choices=lambda: KINDS,
    needs_arguments=True,
)
