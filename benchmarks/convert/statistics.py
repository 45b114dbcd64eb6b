"""Second moments and null-space projectors of other repositories, read without unpickling anything.

    moment = read_moment("transformer.h.17.mlp.c_proj_float32_mom2_100000.npz")
    ROME(model, tokenizer, moments={moment.layer: moment.matrix})

The ROME and MEMIT repositories, and EasyEdit, keep the sum of x x^T over a text's tokens with their number, one file
per layer (`mom2.mom2` and `mom2.count` of an .npz; util/runningstats.py). AlphaEdit keeps the projectors of all edited
layers as one pickled tensor: a pickle can run code when it is read, so someone who trusts it has to
write it as safetensors first. Neither says which weights it was computed with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files.matrix_file import check, check_symmetric
from errata.editors.core.files.plain_files import check_plain
from errata.editors.core.solve.null_space import ROUNDING, Projector

# How far a projector computed in single precision may be from one, as a share of its norm.
_SINGLE = 1e-4
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")
_TURN = """python -c "import torch, safetensors.torch as s; \
s.save_file({'P': torch.load('FILE.pt', weights_only=True).contiguous()}, 'FILE.safetensors')\""""


@dataclass(frozen=True)
class ForeignMoment:
    """One file: the layer that its name says, or None; E[x x^T] (d_in, d_in), symmetric; tokens it is the mean over."""

    layer: int | None
    matrix: Tensor
    tokens: int


def read_moment(path: str | Path) -> ForeignMoment:
    """Read a second moment of the ROME and MEMIT repositories or of EasyEdit.

    Raises:
        StatisticsError: There is no such file, it holds pickled objects or other arrays, or the matrix is not symmetric
            and positive semidefinite.
    """
    arrays = _arrays(Path(path))
    if missing := {"mom2.mom2", "mom2.count"} - arrays.keys():
        raise StatisticsError(f"{path}: expected arrays mom2.mom2 and mom2.count, found no {sorted(missing)[0]}")
    total, count = arrays["mom2.mom2"], arrays["mom2.count"]
    tokens = int(count) if count.numel() == 1 else 0
    check(total, f"mom2.mom2 of {path}")
    if tokens < 1:
        raise StatisticsError(f"{path}: mom2.count: expected a number of tokens, got {count}")
    moment = total.to(torch.promote_types(total.dtype, torch.float32)) / tokens
    check_symmetric(moment, f"{path}: mom2.mom2 is no second moment: it")
    moment = (moment + moment.T) / 2
    if (lowest := _negative_eigenvalue(moment)) is not None:
        raise StatisticsError(
            f"{path}: mom2.mom2 is no second moment: it has the eigenvalue {lowest:.3g}, and none can be negative"
        )
    return ForeignMoment(_layer(Path(path).name), moment, tokens)


def _negative_eigenvalue(matrix: Tensor) -> float | None:
    """Return the lowest eigenvalue of a symmetric matrix if it is below zero by more than rounding, else None."""
    C = matrix.double()
    # A Cholesky factorisation answers several times faster than the eigenvalues, which only a refusal needs. The
    # largest element of the diagonal is at most the largest eigenvalue.
    eye = torch.eye(len(C), dtype=C.dtype)
    if int(torch.linalg.cholesky_ex(C + ROUNDING * float(C.diagonal().max()) * eye).info) == 0:
        return None
    values = torch.linalg.eigvalsh(C)
    return float(values[0]) if float(values[0]) < -ROUNDING * float(values.abs().max()) else None


def read_projectors(path: str | Path, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Read AlphaEdit's projectors.

    Args:
        path: .safetensors or .npz with one array (layers, d_in, d_in), or an array (d_in, d_in) for each layer, named
            by its number.
        layers: Of the one array: those that its authors' hparams name, in their order.

    Raises:
        StatisticsError: The file is a pickle or holds other arrays than these; or a matrix is not symmetric and
            idempotent to single precision.
    """
    arrays = _arrays(Path(path))
    if layers is None:
        if not arrays or not all(name.isdecimal() for name in arrays):
            raise StatisticsError(f"{path}: its arrays {sorted(arrays)} are not named by layers; add layers=4,5,6,7,8")
        found = {int(name): array for name, array in arrays.items()}
    else:
        stacked = next(iter(arrays.values())) if len(arrays) == 1 else torch.empty(0)
        if stacked.ndim != 3 or len(stacked) != len(layers) or len(set(layers)) != len(layers):
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            raise StatisticsError(f"{path}: expected one array ({len(layers)}, d_in, d_in), got {shapes}")
        found = dict(zip(layers, stacked, strict=True))
    for layer, P in found.items():
        check(P, f"the projector of layer {layer} in {path}")
        error = Projector.from_matrix(P.double()).error
        if not error <= _SINGLE:
            raise StatisticsError(
                f"{path}: the matrix of layer {layer} is no projector: P P = P = P^T fails by {error:.2g} of its norm, "
                f"and single precision allows {_SINGLE:g}"
            )
    return dict(sorted(found.items()))


def _layer(name: str) -> int | None:
    """The number among the parts of a module's name, as 17 in transformer.h.17.mlp.c_proj."""
    numbers = set(re.findall(r"(?<=\.)\d+(?=\.)", name))
    return int(numbers.pop()) if len(numbers) == 1 else None


def _arrays(path: Path) -> Mapping[str, Tensor]:
    """The numeric arrays of a file; texts are left out."""
    if path.suffix.lower() in _PICKLES:
        raise _pickle(path)
    try:
        check_plain(path)
        return _from_safetensors(path) if path.suffix == ".safetensors" else _from_npz(path)
    except FileNotFoundError as error:
        raise StatisticsError(f"{path} does not exist") from error
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read: {error.strerror}") from error


def _pickle(path: Path) -> StatisticsError:
    advice = f"if you trust it, turn it into safetensors first: {_TURN}"
    return StatisticsError(f"{path} is a pickle, which can run code when it is read; {advice}")


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise StatisticsError(f"{path} is no safetensors file: {error}") from error


def _from_npz(path: Path) -> dict[str, Tensor]:
    import zipfile
    import zlib

    import numpy

    try:
        found = numpy.load(path, allow_pickle=False)
        if not isinstance(found, numpy.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with found as file:
            if any(name.endswith(".pkl") for name in file.files):
                raise _pickle(path)  # torch.save writes a zip archive, too, whatever its name says
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise StatisticsError(f"{path} is no .npz file of plain arrays: {error}") from error
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiu"}
