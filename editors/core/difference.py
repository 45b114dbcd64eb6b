"""The difference of two models of one architecture, as an edit: task arithmetic on checkpoints.

    edit = errata.difference(base, tuned)      # base + edit is tuned
    (-edit).apply()                            # what the tuning taught, forgotten (Ilharco et al. 2023)
    edit.save("tuning")                        # and scaled, added, masked, exported like any other edit

A weight whose change has low rank, as after a LoRA, is kept as factors where these give the tuned weight but for its
rounding. Every other weight that changed is kept whole, which may take as much memory as the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, NumericalError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import Weight, find_weight
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import Dense, LowRank, Patch, Update
from errata.editors.core.model.compiled import uncompiled
from errata.editors.core.storage.provenance import source, without_folders

# The rank up to which factors are looked for. Those of LoRA are rarely larger.
MAX_RANK = 64
# The largest share of a change's norm that its factors may leave out.
LEFT_OUT = 0.01


@dataclass(frozen=True)
class _Change:
    """The change of one weight, and how far base plus change is from the tuned weight."""

    update: Update
    off: int  # number of elements with other bits
    units: float  # the norm of the distance, over that of one unit in the last place per element


def difference(base: nn.Module, tuned: nn.Module, *, units: float = 1) -> Edit:
    """Return what turns one model into another of the same architecture, as an edit of the first.

    Args:
        base: The model that the edit is of. Its weights count as they stand, with its edits.
        tuned: The other model, in the same precision.
        units: Keep a change as factors if the tuned weight is then off by at most this many units in the last place per
            element, in root mean square; 0: only if all its bits come back.

    Returns:
        The edit, not applied and without requests. `edit.derived["numbers"]` says how many weights are kept as factors
        (low_rank) and whole (dense), the bytes of all, how many elements have other bits after rounding (off), and by
        how many units the worst weight is off (units). Elements that shrink by more than half may have other bits even
        where a change is kept whole.

    Raises:
        AlgebraError: The models have other parameters, shapes or precisions; it names the first.
        LedgerError: A weight cannot be edited (quantised, sharded, on the meta device).
        NumericalError: A weight that differs holds NaN or inf; it names the weight.
    """
    base, tuned = uncompiled(base), uncompiled(tuned)
    changes = {name: _change(weight, target, units) for name, weight, target in _pairs(base, tuned)}
    updates = {name: change.update for name, change in changes.items()}
    low = sum(isinstance(update, LowRank) for update in updates.values())
    numbers = {
        "low_rank": low,
        "dense": len(updates) - low,
        "bytes": sum(tensor.nbytes for update in updates.values() for tensor in update.tensors),
        "off": sum(change.off for change in changes.values()),
        "units": max((change.units for change in changes.values()), default=0.0),
    }
    names = [without_folders(source(model)["name"]) or "a model without a name" for model in (base, tuned)]
    derived = {"operation": "difference", "numbers": numbers, "parents": [], "base": names[0], "tuned": names[1]}
    return Edit("", (), Patch(updates), (), {}, base, derived=derived)


def _pairs(base: nn.Module, tuned: nn.Module) -> Iterator[tuple[str, Weight, Tensor]]:
    """Yield every weight that differs, with the tuned one as it is stored. A tied weight comes once."""
    theirs = dict(tuned.named_parameters())
    ours = dict(base.named_parameters())
    if other := sorted(ours.keys() ^ theirs.keys()):
        raise AlgebraError(
            f"expected two models of one architecture, but only one of them has {other[0]} "
            f"({len(other)} such parameters); tied weights must be tied in both"
        )
    for name, parameter in ours.items():
        target = theirs[name].detach()
        if (target.shape, target.dtype) != (parameter.shape, parameter.dtype):
            raise AlgebraError(
                f"{name}: expected {tuple(parameter.shape)} of {parameter.dtype} in both models, got "
                f"{tuple(target.shape)} of {target.dtype}; load both in one precision"
            )
        safe_point()
        target = target.to(parameter.device)
        if not torch.equal(parameter.detach(), target):
            if not (arithmetic.is_finite(parameter) and arithmetic.is_finite(target)):
                raise NumericalError(f"{name}: expected finite numbers in both models, got NaN or inf")
            yield name, find_weight(base, name), target


def _change(weight: Weight, target: Tensor, units: float) -> _Change:
    dtype = working_dtype(target.dtype)
    delta = target.double() - weight.parameter.detach().double()
    if weight.transposed and delta.ndim == 2:
        delta = delta.T
    factors = _factors(delta, dtype) if delta.ndim == 2 else None
    if factors is not None:
        found = _measured(weight, factors, target)
        if found.units <= units:
            return found
    return _measured(weight, Dense(delta.to(dtype).contiguous()), target)


def _factors(delta: Tensor, dtype: torch.dtype) -> LowRank | None:
    """Return factors of a change that has low rank but for rounding; None where it has not.

    Random combinations of the columns span what the change spans (Halko et al. 2011), if there are more of them than
    its rank. So one product with a narrow matrix tells whether an exact decomposition is worth while.
    """
    d_out, d_in = delta.shape
    probes = min(MAX_RANK + 1, d_out, d_in)
    drawn = torch.randn(d_in, probes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spanned, sizes, _ = torch.linalg.svd(delta @ drawn.to(delta.device), full_matrices=False)
    size = float(delta.norm())
    for rank in (2**power for power in range(MAX_RANK.bit_length())):
        if rank * (d_out + d_in) >= d_out * d_in:
            return None
        if float(sizes[rank:].norm()) > LEFT_OUT * float(sizes.norm()):
            continue
        # The rank that the sizes show, rather than the power of two above it.
        gaps = sizes[:rank] > LEFT_OUT**2 * sizes[0]
        Q = spanned[:, : max(1, int(gaps.sum()))]
        V = Q.T @ delta
        if float((delta - Q @ V).norm()) <= LEFT_OUT * size:
            return LowRank(Q.to(dtype).contiguous(), V.to(dtype).contiguous())
    return None


def _measured(weight: Weight, update: Update, target: Tensor) -> _Change:
    """Return an update with the distance from the tuned weight at which the ledger's sum ends."""
    with arithmetic.plain_arithmetic(target.device.type):
        total = arithmetic.start_sum(weight.parameter)
        arithmetic.add_update(total, update, transposed=weight.transposed)
        apart = (total.to(target.dtype).double() - target.double()).abs()
        larger = torch.maximum(weight.parameter.detach().abs(), target.abs()).double()
        # x = m 2^e with m from 1/2 to 1, so that neighbours of x differ by eps 2^(e - 1).
        step = torch.ldexp(torch.full_like(larger, torch.finfo(target.dtype).eps), torch.frexp(larger).exponent - 1)
        # Of norms: what rounding has done to large elements of a change moves its factors, and so its small elements.
        units = float(apart.norm() / step.norm().clamp_min(torch.finfo(target.dtype).tiny))
    return _Change(update, int((apart > 0).sum()), units)
