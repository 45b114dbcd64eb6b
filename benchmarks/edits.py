"""One edit as two files: its tensors in safetensors, and what was asked, how and on which model in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from errata.benchmarks.store import encodable, slug
from errata.editors.core.adapter import Adapter, adapter_kind
from errata.editors.core.durable import write_atomically
from errata.editors.core.editor import Edit
from errata.editors.core.errors import ConfigError, ErrataError, LedgerError
from errata.editors.core.patch import Dense, LowRank, Patch, Update
from errata.editors.core.request import EditRequest

SCHEMA_VERSION = 1
TENSORS, MANIFEST = "edit.safetensors", "edit.json"


def write(edit: Edit, out: str | Path, model: Mapping[str, Any]) -> Path:
    """Write an edit into a new folder of `out`, named by its subject, its answer and its id.

    Args:
        edit: Applied or not.
        out: The folder of edits.
        model: What to say of the model: name, revision, fingerprint.

    Returns:
        The folder, with `edit.safetensors` (of each parameter `NAME.U` (d_out, r) and `NAME.V` (r, d_in), or
        `NAME.delta` (d_out, d_in); of each adapter's tensors `MODULE:NAME`) and `edit.json`, which has the kind and
        the numbers of adapters.

    Raises:
        ConfigError: the folder cannot be made.
    """
    from safetensors.torch import save

    first = edit.requests[0]
    folder = Path(out) / f"{slug(f'{first.subject}-{first.target}', 40)}-{slug(edit.id, 40)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}; give another `out=`") from error
    tensors = {}
    for name, update in edit.patch.updates.items():
        parts = {"U": update.U, "V": update.V} if isinstance(update, LowRank) else {"delta": update.delta}
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    for module, adapter in edit.patch.adapters.items():
        tensors.update({f"{module}:{part}": tensor for part, tensor in adapter.tensors.items()})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "id": edit.id,
        "method": edit.method,
        "model": dict(model),
        "requests": [vars(request) for request in edit.requests],
        "config": edit.config,
        "adapters": {
            module: {"kind": adapter.kind, "numbers": dict(adapter.numbers)}
            for module, adapter in edit.patch.adapters.items()
        },
        "norms": edit.patch.norms(),
        "diagnostics": list(edit.diagnostics),
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / TENSORS, save(contiguous))
    # Last, so that a folder with a manifest is complete.
    write_atomically(folder / MANIFEST, (json.dumps(encodable(manifest), indent=2) + "\n").encode())
    return folder


def about(folder: str | Path) -> dict[str, Any]:
    """The manifest of an edit that was written.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} cannot be read: {error!r}; expected an edit as `errata edit` writes it") from error
    if version != SCHEMA_VERSION:
        raise LedgerError(f"{path} has schema_version {version!r}; this version of errata reads {SCHEMA_VERSION}")
    return manifest


def read(folder: str | Path, model: nn.Module) -> Edit:
    """The edit of a folder, not applied, for a model that is that of the manifest. What its method remembers of its
    own edits is not in these files: to go on with a sequence, use its journal.

    Raises:
        LedgerError: a file that is missing, or not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path, manifest = Path(folder), about(folder)
    try:
        tensors = {name: tensor.clone() for name, tensor in load((path / TENSORS).read_bytes()).items()}
        adapters = {module: _adapter(tensors, module, said) for module, said in manifest["adapters"].items()}
        names = [name for name in manifest["norms"] if name not in adapters]
        patch = Patch({name: _update(tensors, name) for name in names}, adapters)
        requests = tuple(EditRequest(**request) for request in manifest["requests"])
        reports = tuple(manifest["diagnostics"])
        edit = Edit(manifest["method"], requests, patch, reports, manifest["config"], model)
    except (OSError, SafetensorError, ErrataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"{path} holds no edit: {error!r}") from error
    if edit.id != manifest["id"]:  # a digest of the requests and of every byte of the tensors
        raise LedgerError(f"{path}: the edit is not what was written as {manifest['id']}; its files are damaged")
    return edit


def _update(tensors: Mapping[str, Any], name: str) -> Update:
    delta = tensors.get(f"{name}.delta")
    return LowRank(tensors[f"{name}.U"], tensors[f"{name}.V"]) if delta is None else Dense(delta)


def _adapter(tensors: Mapping[str, Any], module: str, said: Mapping[str, Any]) -> Adapter:
    start = f"{module}:"
    parts = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return adapter_kind(said["kind"]).from_parts(parts, said["numbers"])
