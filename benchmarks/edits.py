"""One edit as two files: its tensors in safetensors, and what was asked, how and on which model in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.benchmarks.store import encodable, slug
from errata.editors.core.durable import write_atomically
from errata.editors.core.editor import Edit
from errata.editors.core.errors import ConfigError
from errata.editors.core.patch import LowRank

SCHEMA_VERSION = 1


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
    write_atomically(folder / "edit.safetensors", save(contiguous))
    # Last, so that a folder with a manifest is complete.
    write_atomically(folder / "edit.json", (json.dumps(encodable(manifest), indent=2) + "\n").encode())
    return folder
