"""The arithmetic of the ledger: weights as a pure function of base bytes and an ordered list of updates.

Undo is exact because it repeats these operations on fewer updates. So each of them must give the same bits whenever it
is repeated, whatever the caller's settings (autocast, TF32, inference mode):

- an update of rank one is an outer product, where each element is one rounded multiplication;
- one of higher rank is multiplied in float64 and rounded once: free of TF32 and of other short cuts of float32;
- sums are taken element by element, in the order of the ledger.

Fold dtype: a sum in bfloat16 would lose each update that is below half a unit of the weight it meets. Weights of 16
bits are therefore folded in float32 and rounded once, at the end; float32 and float64 fold in themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from errata.editors.core.ledger.patch import Dense, LowRank, Update

FOLD_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
# Elements that are worked on at a time: 2 MB in float64, about a core's share of the cache.
BLOCK = 1 << 18
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def plain_arithmetic(device_type: str) -> Iterator[None]:
    """No autograd, no autocast, no inference mode: what is computed inside does not depend on the caller."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def start(base: Tensor) -> Tensor:
    """The fold before the first update: a copy of the base in the fold dtype."""
    return base.detach().to(FOLD_DTYPES[base.dtype], copy=True)


def add_update(state: Tensor, update: Update, *, transposed: bool) -> None:
    """state += update, in place. `state` is (d_out, d_in), or (d_in, d_out) where `transposed`."""
    if isinstance(update, Dense):
        delta = update.delta.to(state.device, state.dtype)
        state.add_(delta.T if transposed else delta)
        return
    left, right = (update.V.T, update.U.T) if transposed else (update.U, update.V)
    rank = left.shape[1]
    working = state.dtype if rank == 1 else torch.float64
    left, right = left.to(state.device, working), right.to(state.device, working)
    rows = max(1, BLOCK // max(1, state.shape[1]))
    for first in range(0, state.shape[0], rows):
        block = left[first : first + rows]
        product = block * right if rank == 1 else block @ right
        state[first : first + rows].add_(product.to(state.dtype))


def own(update: Update) -> Update:
    """The update in memory of its own: later changes to the caller's tensors cannot reach the ledger."""
    if isinstance(update, LowRank):
        return LowRank(fresh(update.U), fresh(update.V))
    return Dense(fresh(update.delta))


def fresh(tensor: Tensor) -> Tensor:
    """A copy in new contiguous memory: an odd alignment, or another order of rows and columns, changes the last bits
    of a product, so that what is read back from a file has to lie as what was written lay."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or inf. Reads the tensor once and allocates nothing."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def norm(tensor: Tensor) -> float:
    """Frobenius norm, accumulated in at least float32 and without a float32 copy of the whole."""
    if tensor.numel() == 0:
        return 0.0
    dtype = FOLD_DTYPES[tensor.dtype]
    parts = [torch.linalg.vector_norm(part, dtype=dtype) for part in tensor.detach().reshape(-1).split(BLOCK)]
    return float(torch.linalg.vector_norm(torch.stack(parts), dtype=torch.float64))


def checksum(tensor: Tensor) -> int:
    """Sum of the bytes, read as integers, modulo 2^64: the same on every device and in any order of summation.

    Notices changes by accident at the price of one read; it is no digest.
    """
    per_word = 8 // tensor.element_size()
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() % per_word:
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % per_word
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(_INTEGER_OF_SIZE[tensor.element_size()])
    return int(words.sum()) + int(rest.sum())
