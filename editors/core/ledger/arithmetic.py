"""The arithmetic of the ledger: it adds updates to a weight so that the same updates always give the same bits.

Undo is exact because it repeats these operations on fewer updates. So each operation must give the same bits every
time, whatever the caller's settings are (autocast, TF32, inference mode):

- an update of rank one is an outer product, in which each element is one rounded multiplication;
- an update of higher rank is multiplied in float64 and rounded once, which avoids TF32 and other shortcuts of float32;
- updates are added element by element, in the order of the ledger.

Sum dtype: bfloat16 sums would lose every update smaller than half a unit in the last place of its weight. So 16-bit
weights are summed in float32 and rounded once at the end. float32 and float64 weights are summed in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Update

FOLD_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
# The number of elements processed at a time: 2 MB in float64, about one core's share of the cache.
BLOCK = 1 << 18
# The number of 8-byte words that one sum of the checksum covers, and of sums that are computed at a time.
LINE, LINES = 1 << 14, 4
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def plain_arithmetic(device_type: str) -> Iterator[None]:
    """Turn off autograd, autocast and inference mode, so that results inside do not depend on the caller."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def start_sum(base: Tensor) -> Tensor:
    """Return the sum before the first update: a copy of the base in the sum dtype."""
    return base.detach().to(FOLD_DTYPES[base.dtype], copy=True)


def add_update(state: Tensor, update: Update, *, transposed: bool) -> None:
    """Add an update to `state` in place. `state` is (d_out, d_in), or (d_in, d_out) if `transposed`."""
    if isinstance(update, Dense):
        delta = update.delta.to(state.device, state.dtype)
        state.add_(delta.T if transposed and delta.ndim == 2 else delta)
        return
    mask = update.mask.to(state.device) if isinstance(update, Masked) else None
    if mask is not None and transposed:
        mask = mask.T
    left, right = (update.V.T, update.U.T) if transposed else (update.U, update.V)
    rank = left.shape[1]
    # At rank one each element is a single product, which needs no float64 to be the same every time.
    working = state.dtype if rank == 1 else torch.float64
    left, right = left.to(state.device, working), right.to(state.device, working)
    # A block of rows at a time: the full (d_out, d_in) product in float64 would not fit the cache.
    rows = max(1, BLOCK // max(1, state.shape[1]))
    for first in range(0, state.shape[0], rows):
        block = left[first : first + rows]
        product = block * right if rank == 1 else block @ right
        if mask is not None:
            product = product * mask[first : first + rows]
        state[first : first + rows].add_(product.to(state.dtype))


def copy_update(update: Update) -> Update:
    """Return the update in new memory, so that later changes to the caller's tensors cannot reach the ledger."""
    if isinstance(update, LowRank):
        return LowRank(contiguous_copy(update.U), contiguous_copy(update.V))
    if isinstance(update, Masked):
        return Masked(*map(contiguous_copy, update.tensors))
    return Dense(contiguous_copy(update.delta))


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a copy in new contiguous memory.

    Another alignment or another order of rows and columns changes the last bits of a product. So tensors that are read
    from a file need the same memory layout as those that were written.
    """
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or inf. It reads the tensor once and allocates nothing."""
    if tensor.numel() == 0:
        return True
    # `isfinite(tensor)` would allocate a mask as large as the weight. NaN and inf reach the minimum or the maximum.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, accumulated in at least float32 without a float32 copy of the whole tensor."""
    if tensor.numel() == 0:
        return 0.0
    dtype = FOLD_DTYPES[tensor.dtype]
    parts = [torch.linalg.vector_norm(part, dtype=dtype) for part in tensor.detach().reshape(-1).split(BLOCK)]
    return float(torch.linalg.vector_norm(torch.stack(parts), dtype=torch.float64))


def checksum(tensor: Tensor) -> int:
    """Return a digest of the elements and of where they stand, modulo 2^64.

    It is the same on every device. It notices every change of a single element. It also notices elements, rows and
    columns in another order, and flipped signs, except by a coincidence of about 1 in 2^32. It reads the tensor once.
    It detects accidental changes, but it is no cryptographic digest.
    """
    per_word = 8 // tensor.element_size()
    flat = tensor.detach().contiguous().view(-1)
    # A view as int64 needs memory that begins at a multiple of 8 bytes.
    if flat.storage_offset() % per_word:
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % per_word
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(_INTEGER_OF_SIZE[tensor.element_size()])
    words, level = torch.cat([_line_sums(words, 0), rest.to(torch.int64)]), 1
    while len(words) > 1:
        words, level = _line_sums(words, level), level + 1
    return int(words.sum())  # of one word, or of none


def _line_sums(words: Tensor, level: int) -> Tensor:
    """Return one sum per line of LINE words, each word times the weight of its index in the line."""
    weights = _word_weights(level, words.device)
    whole = len(words) - len(words) % LINE
    # A few lines at a time, so that their copy stays in the cache. `torch.mv` would be faster, but CUDA has none.
    lines = words[:whole].view(-1, LINE).split(LINES)
    sums = [_folded(part).mul_(weights).sum(1) for part in lines]
    rest = words[whole:]
    return torch.cat([*sums, _folded(rest).mul_(weights[: len(rest)]).sum()[None][: len(rest)]])


def _folded(words: Tensor) -> Tensor:
    """Return a copy of the words whose high bits also act on lower ones; different words stay different.

    Without it, a flip of the highest bit, which is the sign of a number, would add 2^63 for every odd weight, and two
    flips would add nothing. At a shift of 29, no sign of a 16-, 32- or 64-bit number falls on the sign of another.
    """
    return (words >> 29).bitwise_and_((1 << 35) - 1).bitwise_xor_(words)


def _word_weights(level: int, device: torch.device) -> Tensor:
    """Return LINE odd numbers that look random, by the mixing function of SplitMix64 (Steele et al. 2014)."""
    z = torch.arange(level * LINE + 1, (level + 1) * LINE + 1, device=device)
    for multiplier, shift in ((-0x61C8864680B583EB, 30), (-0x40A7B892E31B1A47, 27), (-0x6B2FB644ECCEEE15, 31)):
        z = z * multiplier
        z = z ^ (z >> shift)
    return z | 1
