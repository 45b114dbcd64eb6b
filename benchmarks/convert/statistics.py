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
from errata.editors.core.files.matrix_file import check

# What a sum in float32 may be off the symmetric, as a share of its largest element.
_ASYMMETRY = 1e-3
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
        StatisticsError: no such file, one that holds pickled objects or other arrays, or no second moment.
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
    largest = float(moment.abs().max())
    if not float((moment - moment.T).abs().max()) <= _ASYMMETRY * largest or bool((moment.diagonal() < 0).any()):
        raise StatisticsError(f"{path}: mom2.mom2 is no second moment: not symmetric, or negative on its diagonal")
    return ForeignMoment(_layer(Path(path).name), (moment + moment.T) / 2, tokens)


def read_projectors(path: str | Path, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Read AlphaEdit's projectors.

    Args:
        path: .safetensors or .npz with one array (layers, d_in, d_in), or an array (d_in, d_in) for each layer, named
            by its number.
        layers: Of the one array: those that its authors' hparams name, in their order.

    Raises:
        StatisticsError: a pickle, other arrays than these, or not as many as layers.
    """
    arrays = _arrays(Path(path))
    if layers is None:
        if not arrays or not all(name.isdecimal() for name in arrays):
            raise StatisticsError(
                f"{path}: its arrays {sorted(arrays)} are not named by layers; add layers=[4,5,6,7,8]"
            )
        found = {int(name): array for name, array in arrays.items()}
    else:
        stacked = next(iter(arrays.values())) if len(arrays) == 1 else torch.empty(0)
        if stacked.ndim != 3 or len(stacked) != len(layers) or len(set(layers)) != len(layers):
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            raise StatisticsError(f"{path}: expected one array ({len(layers)}, d_in, d_in), got {shapes}")
        found = dict(zip(layers, stacked, strict=True))
    for layer, P in found.items():
        check(P, f"the projector of layer {layer} in {path}")
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
        return _from_safetensors(path) if path.suffix == ".safetensors" else _from_npz(path)
    except FileNotFoundError as error:
        raise StatisticsError(f"{path} does not exist") from error


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
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise StatisticsError(f"{path} is no .npz file of plain arrays: {error}") from error
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiu"}
