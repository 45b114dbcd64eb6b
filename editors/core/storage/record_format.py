"""The format of an edit on disk: a line of JSON that describes it, and a block of bytes with its tensors.

A block has the content of a safetensors file. Blocks are concatenated into a few large files, since the file systems of
clusters are slow with thousands of small ones. The tensors of a block are named

    ORDER/update/PARAMETER/U (d_out, r) and .../V (r, d_in), or .../delta (d_out, d_in)
    ORDER/adapter/MODULE/NAME
    ORDER/state/NAME

A digest covers every byte, since safetensors does not notice changed bytes. Reading a file never runs code from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from errata.editors.core.errors import DamagedEditsError, LedgerError
from errata.editors.core.files import atomic, jsonl
from errata.editors.core.files.plain_files import check_plain, read_bytes
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.adapter import Adapter, adapter_kind, check_registered
from errata.editors.core.ledger.entry import EditInfo, Entry
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch, Update
from errata.editors.core.request import EditRequest

FORMAT, VERSION = "errata edits", 1
MANIFEST, EDITS, BLOCKS, CARD = "manifest.json", "edits.jsonl", "edits-{:05}.blocks", "README.md"
OURS = (MANIFEST, EDITS, CARD, "edits-*.blocks")
# No block is appended to a file that has reached this many bytes.
FILE_BYTES = 1 << 30
# kind of an update in a file -> (its class, what its tensors are called there)
UPDATES: Mapping[str, tuple[Callable[..., Update], tuple[str, ...]]] = MappingProxyType(
    {"low_rank": (LowRank, ("U", "V")), "dense": (Dense, ("delta",)), "masked": (Masked, ("U", "V", "bits"))}
)


def is_ours(name: str) -> bool:
    """Return whether this is the name of a file that errata writes into a folder of edits."""
    return any(fnmatch(name, pattern) for pattern in OURS)


@dataclass(frozen=True)
class EditRecord:
    """The content of one line.

    Attributes:
        order: Index of the line.
        entry: The edit; None for an edit that was not made.
        notes: What the writer noted about it.
    """

    order: int
    entry: Entry | None
    notes: Mapping[str, Any]


# --- writing --------------------------------------------------------------------------------------------------------


def block_of(order: int, entry: Entry) -> bytes:
    """Return the block of an entry: its tensors as bytes.

    Raises:
        LedgerError: It has an adapter of a kind that is not registered, which no file could give back.
    """
    from safetensors.torch import save

    for kind in {type(adapter) for adapter in entry.patch.adapters.values()}:
        check_registered(kind)
    tensors = {f"{order}/state/{name}": tensor for name, tensor in entry.state.items()}
    for name, update in entry.patch.updates.items():
        parts = zip(UPDATES[_kind(update)][1], update.tensors, strict=True)
        tensors |= {f"{order}/update/{name}/{part}": tensor for part, tensor in parts}
    for name, adapter in entry.patch.adapters.items():
        tensors |= {f"{order}/adapter/{name}/{part}": tensor for part, tensor in adapter.tensors.items()}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def line_of(order: int, entry: Entry, notes: Mapping[str, Any], path: Path, start: int, block: bytes) -> dict[str, Any]:
    """Return the JSON record of an entry whose block begins at byte `start` of `path`."""
    patch = entry.patch
    kinds = {name: _kind(update) for name, update in patch.updates.items()}
    adapters = {
        name: {"kind": adapter.kind, "numbers": dict(adapter.numbers), "tensors": list(adapter.tensors)}
        for name, adapter in patch.adapters.items()
    }
    return {
        "order": order,
        "id": entry.id,
        "notes": dict(notes),
        "meta": info_to_json(entry.info),
        "updates": kinds,
        "adapters": adapters,
        "state": list(entry.state),
        "file": path.name,
        "start": start,
        "bytes": len(block),
        "sha256": hashlib.sha256(block).hexdigest(),
    }


def info_to_json(info: EditInfo) -> dict[str, Any]:
    """Return what a file says of an edit's info; nothing where there is none."""
    if info == EditInfo():
        return {}
    return {
        "method": info.method,
        "requests": [request.as_dict() for request in info.requests],
        "config": dict(info.config),
        "diagnostics": [dict(report) for report in info.diagnostics],
        **({"derived": dict(info.derived)} if info.derived else {}),
    }


def _kind(update: Update) -> str:
    return next(kind for kind, (made, _) in UPDATES.items() if type(update) is made)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest: the fields that hold for all edits together."""
    atomic.write_atomically(folder / MANIFEST, jsonl.render({"format": FORMAT, "version": VERSION, **manifest}))


# --- reading --------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote, without format and version.

    Raises:
        DamagedEditsError: There is no manifest, or it is damaged.
        LedgerError: This version cannot read the format.
    """
    path = folder / MANIFEST
    try:
        manifest = jsonl.parse(read_bytes(path))
    except OSError as error:
        # The user may have given a parent folder: name the folders of edits in it.
        inside = sorted(child.parent.name for child in folder.glob(f"*/{MANIFEST}"))
        hint = f"; folders of edits in it: {', '.join(inside[:3])}{', ...' if inside[3:] else ''}" if inside else ""
        reason = f"cannot be read: {error.strerror}" if folder.exists() else "there is no such folder"
        raise DamagedEditsError(f"{reason}; expected a folder of edits{hint}", path=path) from error
    except ValueError as error:
        raise DamagedEditsError(str(error), path=path) from error
    version = manifest.pop("format", None), manifest.pop("version", None)
    if version != (FORMAT, VERSION):
        raise LedgerError(f"{path} is in the format {version}; this version of errata reads {(FORMAT, VERSION)}")
    if field := _invalid_field(manifest):
        raise DamagedEditsError(f"{field} is not what a manifest has there", path=path)
    return manifest


def _invalid_field(manifest: Mapping[str, Any]) -> str | None:
    """Return the first field with an unexpected type, or None.

    A correct digest only says that there is no damage. Another program may have written the file.
    """
    model, base, tokenizer, whole = (manifest.get(name) for name in ("model", "base", "tokenizer", "edits"))
    named = [model.get(name) for name in ("name", "revision")] if isinstance(model, dict) else [...]
    is_valid = {
        "model": all(isinstance(text, str | None) for text in named),
        "base": isinstance(base, dict) and all(isinstance(value, str) and value.split() for value in base.values()),
        "tokenizer": isinstance(tokenizer, str | None),
        "edits": whole is None or (isinstance(whole, dict) and {"records", "sha256"} <= whole.keys()),
    }
    return next((name for name, valid in is_valid.items() if not valid), None)


def record_of(folder: Path, order: int, line: Mapping[str, Any]) -> EditRecord:
    """Return the record of line number `order` of a file, with tensors in new memory.

    Raises:
        DamagedEditsError: The line is not as it was written, or belongs elsewhere; it names file and record.
    """
    if line.get("order") != order:
        raise DamagedEditsError(
            f"holds record {line.get('order')} in its place; lines are missing, repeated or out of order",
            path=folder / EDITS,
            record=order,
        )
    try:
        if not (isinstance(line["id"], str | None) and isinstance(line["notes"], dict)):
            raise TypeError("expected an id, or none, and notes by name")
        entry = None if line["id"] is None else _entry(folder, order, line)
        return EditRecord(order, entry, line["notes"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        if isinstance(error, LedgerError):
            raise
        named = line["id"] if isinstance(line.get("id"), str) else None
        raise DamagedEditsError(f"is no edit: {error!r}", path=folder / EDITS, record=order, id=named) from error


def info_from_json(said: Any) -> EditInfo:
    """Return the info from what `info_to_json` gave; missing fields are empty, and unknown ones are ignored.

    Raises:
        TypeError, ValueError: it is not what `info_to_json` gives; names the field.
    """
    if not isinstance(said, dict):
        raise TypeError(f"expected meta by name, got {said!r}")
    empty: tuple[tuple[str, Any], ...] = (
        ("method", ""),
        ("requests", []),
        ("config", {}),
        ("diagnostics", []),
        ("derived", {}),
    )
    method, requests, config, reports, derived = (said.get(name, default) for name, default in empty)
    if not isinstance(method, str):
        raise TypeError(f"expected the method by its name, got {method!r}")
    if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
        raise TypeError(f"expected a list of requests, got {requests!r}")
    if not isinstance(config, dict):
        raise TypeError(f"expected the configuration by its fields, got {config!r}")
    if not isinstance(reports, list) or not all(isinstance(report, dict) for report in reports):
        raise TypeError(f"expected the diagnostics as a list of reports, got {reports!r}")
    if not isinstance(derived, dict):
        raise TypeError(f"expected how it was derived by fields, got {derived!r}")
    return EditInfo(method, tuple(EditRequest(**request) for request in requests), config, tuple(reports), derived)


def _entry(folder: Path, order: int, line: Mapping[str, Any]) -> Entry:
    tensors = _tensors(folder, order, line)
    updates = {name: _update(tensors, f"{order}/update/{name}", kind) for name, kind in line["updates"].items()}
    adapters = {name: _adapter(tensors, order, name, parts) for name, parts in line["adapters"].items()}
    state = {name: tensors[f"{order}/state/{name}"] for name in line["state"]}
    return Entry(line["id"], Patch(updates, adapters), info_from_json(line["meta"]), order, state)


def _tensors(folder: Path, order: int, line: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    name, start, end = block_place(line)
    path = folder / name
    try:
        check_plain(path)
        if end > path.stat().st_size:  # nothing of a size that a line only claims is asked for
            reason = f"ends before the block at {start}, or within it"
            raise DamagedEditsError(reason, path=path, record=order, id=line["id"])
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
    except OSError as error:
        raise DamagedEditsError(f"cannot be read: {error.strerror}", path=path, record=order, id=line["id"]) from error
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        reason = f"the block at {line['start']} does not have the SHA-256 that is stated"
        raise DamagedEditsError(reason, path=path, record=order, id=line["id"])
    try:
        return {name: arithmetic.contiguous_copy(tensor) for name, tensor in load(content).items()}
    except SafetensorError as error:
        raise DamagedEditsError(f"no safetensors: {error}", path=path, record=order, id=line["id"]) from error


def block_place(line: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return the file of a line's block, and where the block begins and ends in it.

    Raises:
        KeyError, TypeError, ValueError: The line does not say so.
    """
    start, count = line["start"], line["bytes"]
    if type(start) is not int or type(count) is not int or start < 0 or count < 0:
        raise ValueError(f"expected start and bytes as whole numbers, got {start!r:.40} and {count!r:.40}")
    return Path(line["file"]).name, start, start + count  # `.name`: a line cannot point outside the folder


def _adapter(tensors: Mapping[str, Tensor], order: int, name: str, parts: Mapping[str, Any]) -> Adapter:
    by_part = {part: tensors[f"{order}/adapter/{name}/{part}"] for part in parts["tensors"]}
    return adapter_kind(parts["kind"]).from_parts(by_part, parts["numbers"])


def _update(tensors: Mapping[str, Tensor], name: str, kind: str) -> Update:
    made, parts = UPDATES[kind]
    found = [tensors[f"{name}/{part}"] for part in parts]
    for part, tensor in zip(parts, found, strict=True):
        is_matrix = tensor.ndim == 2 or (part == "delta" and tensor.ndim > 0)  # a vector's update is a vector
        if part != "bits" and not (is_matrix and tensor.is_floating_point()):
            raise ValueError(f"{name}: expected a matrix of numbers, got {tuple(tensor.shape)} of {tensor.dtype}")
    return made(*found)
