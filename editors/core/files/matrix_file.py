"""Files with one square matrix per layer: second moments or projectors that other code has computed for a method.

    write("moments.safetensors", "moments", {17: C})
    MatrixFile.open("moments.safetensors", "moments").matrix(17)      # (d_in, d_in), read only now

The format is safetensors. The metadata state the kind and the SHA-256 of every matrix, since safetensors does not
notice changed bytes. The file does not say which model it belongs to, so that a method can check only the width.
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
from errata.editors.core.files.plain_files import check_plain, parse_json

Kind = Literal["moments", "projectors"]
_ENTRY = "errata"
# How far a sum in float32 may be from symmetric, as a share of its largest element.
ASYMMETRY = 1e-3


@dataclass(frozen=True)
class MatrixFile:
    """An opened file. Matrices are read one by one.

    Attributes:
        path: The file.
        layers: The metadata of each layer's matrix.
    """

    path: Path
    layers: Mapping[int, Mapping[str, Any]]

    @classmethod
    def open(cls, path: str | Path, kind: Kind) -> MatrixFile:
        """Open a file and read its metadata.

        Raises:
            StatisticsError: There is no such file, or it is of another kind.
        """
        from safetensors import SafetensorError, safe_open

        expected = f"expected {kind} as `errata convert {kind}` writes them"
        try:
            check_plain(path)
            with safe_open(path, framework="pt") as file:
                metadata = parse_json((file.metadata() or {})[_ENTRY])
            layers = {int(layer): dict(notes) for layer, notes in metadata["layers"].items()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatisticsError(f"{path} cannot be read ({type(error).__name__}: {error}); {expected}") from error
        if metadata.get("kind") != kind:
            raise StatisticsError(f"{path} holds {metadata.get('kind')!r}; {expected}")
        return cls(Path(path), layers)

    def matrix(self, layer: int) -> Tensor:
        """Read the layer's matrix (d_in, d_in) into new memory.

        Raises:
            StatisticsError: There is none for this layer, or its bytes have changed.
        """
        from safetensors import SafetensorError, safe_open

        if layer not in self.layers:
            raise StatisticsError(f"{self.path} has no matrix for layer {layer}, only for {sorted(self.layers)}")
        try:
            with safe_open(self.path, framework="pt") as file:
                matrix = file.get_tensor(str(layer)).clone()  # aligned: products then always give the same bits
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"{self.path}: the matrix of layer {layer} cannot be read: {error}") from error
        if _digest(matrix) != self.layers[layer].get("sha256"):
            raise StatisticsError(
                f"{self.path}: the matrix of layer {layer} is not as it was written; convert it again"
            )
        check(matrix, f"{self.path}: the matrix of layer {layer}")
        return matrix


def write(
    path: str | Path, kind: Kind, matrices: Mapping[int, Tensor], notes: Mapping[int, Mapping[str, Any]] | None = None
) -> Path:
    """Write matrices to a new file.

    Args:
        path: The file, which must not exist.
        kind: What the matrices are.
        matrices: {layer: (d_in, d_in)}.
        notes: Metadata of each layer's matrix, as values that JSON can hold.

    Returns:
        The path.

    Raises:
        StatisticsError: The file exists already, or a matrix is not square or not finite.
    """
    target = Path(path)
    if target.exists():
        raise StatisticsError(f"{target} is there already and is not written over; remove it or name another file")
    plain = {layer: matrix.detach().cpu().contiguous() for layer, matrix in sorted(matrices.items())}
    for layer, matrix in plain.items():
        check(matrix, f"the matrix of layer {layer}")
    layers = {layer: {**(notes or {}).get(layer, {}), "sha256": _digest(matrix)} for layer, matrix in plain.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_whole(target) as temporary:
        tensors = {str(layer): matrix for layer, matrix in plain.items()}
        atomic.write_tensors(temporary, tensors, {_ENTRY: json.dumps({"kind": kind, "layers": layers})})
    return target


def check(matrix: Tensor, what: str) -> None:
    """Refuse a tensor that is not a finite square matrix of floating-point numbers.

    Args:
        matrix: The tensor.
        what: How the error calls it.

    Raises:
        StatisticsError: It says what came.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise StatisticsError(
            f"{what}: expected (d_in, d_in) floating-point numbers, got {tuple(matrix.shape)} of {matrix.dtype}"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise StatisticsError(f"{what} holds NaN or inf; compute it again")


def check_symmetric(matrix: Tensor, what: str) -> None:
    """Refuse a matrix (d_in, d_in) that is not symmetric up to ASYMMETRY.

    Raises:
        StatisticsError: It says by how much.
    """
    largest, off = float(matrix.abs().max()), float((matrix - matrix.T).abs().max())
    if off > ASYMMETRY * largest:
        raise StatisticsError(
            f"{what} is not symmetric: two elements that should be equal differ by {off:.2g}, and its largest is "
            f"{largest:.2g}; compute it again"
        )


def _digest(matrix: Tensor) -> str:
    digest = hashlib.sha256()
    add_bytes(digest, matrix)
    return digest.hexdigest()
