"""A square matrix for each of some layers in one file, to be handed to a method: second moments or projectors that were
computed elsewhere.

    write("moments.safetensors", "moments", {17: C})
    MatrixFile.open("moments.safetensors", "moments").matrix(17)      # (d_in, d_in), read only now

A safetensors file whose metadata say what it is, and hold the SHA-256 of every matrix: safetensors itself does not
notice bytes that have changed. Nothing in it says which model it belongs to; a method can check the width alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files import atomic
from errata.editors.core.files.digests import add_bytes

Kind = Literal["moments", "projectors"]
_ENTRY = "errata"


@dataclass(frozen=True)
class MatrixFile:
    """A file that was opened, of which no matrix has been read yet.

    Attributes:
        path: Where it is.
        layers: What is noted of each layer's matrix.
    """

    path: Path
    layers: Mapping[int, Mapping[str, Any]]

    @classmethod
    def open(cls, path: str | Path, kind: Kind) -> MatrixFile:
        """Read what the file says of itself.

        Raises:
            StatisticsError: no such file, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        wanted = f"expected {kind} as `errata convert {kind}` writes them"
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_ENTRY])
            layers = {int(layer): dict(notes) for layer, notes in about["layers"].items()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatisticsError(f"{path} cannot be read ({type(error).__name__}: {error}); {wanted}") from error
        if about.get("kind") != kind:
            raise StatisticsError(f"{path} holds {about.get('kind')!r}; {wanted}")
        return cls(Path(path), layers)

    def matrix(self, layer: int) -> Tensor:
        """The layer's matrix (d_in, d_in), in fresh memory.

        Raises:
            StatisticsError: there is none for this layer, or its bytes are not those that were written.
        """
        from safetensors import safe_open

        if layer not in self.layers:
            raise StatisticsError(f"{self.path} has nothing for layer {layer}; it has {sorted(self.layers)}")
        with safe_open(self.path, framework="pt") as file:
            matrix = file.get_tensor(str(layer)).clone()
        if _digest(matrix) != self.layers[layer].get("sha256"):
            raise StatisticsError(f"{self.path}: the matrix of layer {layer} is not as written; convert it again")
        return matrix


def write(
    path: str | Path, kind: Kind, matrices: Mapping[int, Tensor], notes: Mapping[int, Mapping[str, Any]] | None = None
) -> Path:
    """Write the matrices.

    Args:
        path: A new file.
        kind: What they are.
        matrices: {layer: (d_in, d_in)}.
        notes: What to note of a layer's matrix: values that JSON holds.

    Raises:
        StatisticsError: a file of this name is there, or a matrix is not square or not finite.
    """
    target = Path(path)
    if target.exists():
        raise StatisticsError(f"{target} is there already and is not written over; remove it or name another file")
    plain = {layer: matrix.detach().cpu().contiguous() for layer, matrix in sorted(matrices.items())}
    for layer, matrix in plain.items():
        check(matrix, f"the matrix of layer {layer}")
    about = {layer: {**(notes or {}).get(layer, {}), "sha256": _digest(matrix)} for layer, matrix in plain.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_whole(target) as temporary:
        tensors = {str(layer): matrix for layer, matrix in plain.items()}
        atomic.write_tensors(temporary, tensors, {_ENTRY: json.dumps({"kind": kind, "layers": about})})
    return target


def check(matrix: Tensor, what: str) -> None:
    """Refuse what is no finite square matrix.

    Raises:
        StatisticsError: says what it is.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise StatisticsError(f"{what}: expected (d_in, d_in) numbers, got {tuple(matrix.shape)} of {matrix.dtype}")
    if not bool(torch.isfinite(matrix).all()):
        raise StatisticsError(f"{what} holds NaN or inf")


def _digest(matrix: Tensor) -> str:
    digest = hashlib.sha256()
    add_bytes(digest, matrix)
    return digest.hexdigest()
