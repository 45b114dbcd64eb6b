"""Export of edits for other programs: the edited model as a whole, and the manifest that all exports have.

    edit.export_lora("adapter/")         # a LoRA adapter (lora_export.py): PeftModel.from_pretrained(model, "adapter/")
    edit.export_merged("model/")         # the model with this edit: AutoModelForCausalLM.from_pretrained("model/")
    check_base("adapter/", model)        # raises if these files are damaged, or were made on another model

A folder appears under its name when it is complete, and is not changed afterwards. Beside the files for other programs
it holds errata-export.json: the requests, the SHA-256 of every file, and the SHA-256 of the base of every edited
weight. Other programs ignore it. They load an adapter onto any weights of the same shape, and load files with changed
bytes, without a warning. `check_base` tests both beforehand.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from errata.editors.core.errors import ExportError, LedgerError, NumericalError
from errata.editors.core.files.atomic import digest_of_file, sync_file
from errata.editors.core.files.digests import tensor_digest
from errata.editors.core.files.plain_files import read_json
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import Entry, find_weight
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.storage import readme_card
from errata.editors.core.storage.provenance import is_folder, model_name, source
from errata.editors.core.storage.record_format import CARD

MANIFEST = "errata-export.json"
FORMAT, VERSION = "errata export", 1


def write_merged(model: Any, entries: Sequence[Entry], folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write the model with the given entries and no other edit, as `save_pretrained` does. The model stays unchanged.

    The weights are base + p1 + p2 + ..., by the arithmetic of the ledger. They are bit for bit those of a model that
    carries only these entries.

    Args:
        model: A model of transformers.
        entries: The edits, in the order of the sum; they need not be in the model's ledger.
        folder: A new or empty folder.
        tokenizer: Written beside the model, if given.

    Returns:
        The folder.

    Raises:
        ExportError: An edit is not a change of weights, or the folder exists already.
        NumericalError: NaN or inf would result.
    """
    check_exportable(entries)
    ledger = Ledger.of(model)
    # Edits in the ledger but not in `entries` count as well: their weights must be written without them.
    sums = {name: _sum(ledger, entries, name) for name in _touched([*ledger.entries, *entries])}
    by_parameter = {id(model.get_parameter(name)): total for name, total in sums.items()}
    state = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # All names of a tied weight get the same tensor, since `save_pretrained` recognises ties by it.
        state[name] = by_parameter.get(id(parameter), state[name])
    with new_folder(folder) as path:
        model.save_pretrained(path, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_manifest(path, "merged model", model, entries, {})
    return Path(folder)


def check_exportable(entries: Sequence[Entry]) -> None:
    """Refuse edits that no file of weights can hold.

    Raises:
        ExportError: There is no edit, or one is not a change of weights.
    """
    if not entries:
        raise ExportError("expected at least one edit to export, got none; make or load an edit first")
    for entry in entries:
        if entry.patch.adapters or not entry.patch.updates:
            raise ExportError(
                f"{entry.id} is no change of weights alone; neither an adapter of PEFT nor a merged model can hold it"
            )


def check_base(folder: str | Path, model: nn.Module) -> None:
    """Refuse an exported folder that is damaged, or that was made on another model.

    Args:
        folder: A folder from `export_lora` or `export_merged`.
        model: The model as transformers loads it, before PEFT wraps it. Edits that it carries now do not matter.

    Raises:
        ExportError: The folder is no export of errata; a file is missing or has changed; the base weights differ.
    """
    path = Path(folder)
    manifest = _read_manifest(path / MANIFEST)
    for name, digest in manifest["files"].items():
        if not (path / name).is_file() or digest_of_file(path / name) != digest:
            raise ExportError(f"{path / name} is missing or not what was written; export it again")
    base = Ledger.of(model).base
    for name, digest in manifest["base"].items():
        try:
            same = tensor_digest(base(name)) == digest
        except LedgerError as error:
            raise ExportError(f"{path} was made on another model: {error}") from error
        if not same:
            raise ExportError(f"{path} was made on a model whose {name} held other bytes, or had another precision")


def write_manifest(
    folder: Path, kind: str, model: nn.Module, entries: Sequence[Entry], more: Mapping[str, Any]
) -> None:
    """Write errata-export.json and the card. Call it after all other files are written, since it has their digests."""
    base = Ledger.of(model).base
    edits = [
        {
            "id": entry.id,
            "method": entry.info.method or None,
            "requests": [request.as_dict() for request in entry.info.requests] or None,
        }
        for entry in entries
    ]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "model": model_name(model),
        "edits": edits,
        **more,
        "base": {name: tensor_digest(base(name)) for name in _touched(entries)},
        "files": {path.relative_to(folder).as_posix(): digest_of_file(path) for path in _files(folder)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    reports = [(entry.info.method, entry.info.requests, None) for entry in entries]
    base_model = source(model)
    is_id = base_model["name"] == model_name(model) and not is_folder(str(base_model["name"]))
    (folder / CARD).write_text(readme_card.export_card(kind, base_model, reports, is_id=is_id), encoding="utf-8")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Context manager that gives a temporary folder to write to, and renames it to `folder` at the end.

    All files are on the disk before the rename. After an error nothing is left.

    Raises:
        ExportError: `folder` is a file, or a folder that is not empty.
        OSError: The folder cannot be made.
    """
    target = Path(folder).resolve()
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in _files(temporary):
            # transformers makes files that only their owner can read. Give them the permissions of the user's mask.
            path.chmod(temporary.stat().st_mode & 0o666)
            sync_file(path)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Refuse a folder that cannot be written without losing something.

    Raises:
        ExportError: `folder` is a file, a folder that is not empty, or the current working folder.
    """
    if folder.resolve() == Path.cwd():
        raise ExportError(f"{folder} is the current working folder; name a new folder in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there already and is not written over; remove it or name another folder")


def _files(folder: Path) -> list[Path]:
    """Return all files, also in subfolders: transformers makes one if there are several chat templates."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _touched(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.patch.updates))


def _sum(ledger: Ledger, entries: Sequence[Entry], name: str) -> Tensor:
    """Return the weight with these entries only, computed by the ledger's own operations for the same bits."""
    weight = find_weight(ledger.model, name)
    with arithmetic.plain_arithmetic(weight.parameter.device.type):
        total = arithmetic.start_sum(ledger.base(name))
        for entry in entries:
            if name in entry.patch.updates:
                arithmetic.add_update(total, entry.patch.updates[name], transposed=weight.transposed)
        rounded = total.to(weight.parameter.dtype)
        if not arithmetic.is_finite(rounded):
            raise NumericalError(f"{name} would hold NaN or inf in {rounded.dtype}; nothing is written")
    return rounded


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path)
        version = manifest["format"], manifest["version"]
        whole = all(isinstance(manifest[part], dict) for part in ("files", "base"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error!r}; expected a folder that errata has exported") from error
    if version != (FORMAT, VERSION) or not whole:
        raise ExportError(f"{path} is in the format {version}; this version of errata reads {(FORMAT, VERSION)}")
    return manifest
