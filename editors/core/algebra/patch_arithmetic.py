"""Scaling, negating and adding patches: pure functions, which leave the patches that they are given as they are.

    scaled(patch, 0.5)      half of every update
    negated(patch)          the opposite of every update, the same bits but for the signs
    added([p, q])           what both do together

Scaling keeps the form of an update: U V becomes (c U) V. So a factor that is a power of two is exact to the bit, unless
numbers become too small or too large for their precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from errata.editors.core.errors import AlgebraError
from errata.editors.core.ledger.adapter import Adapter
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch, Update, compacted, merge


def scaled(patch: Patch, factor: float) -> Patch:
    """Return a patch that changes the model by `factor` times as much.

    Args:
        patch: The patch.
        factor: Any finite number. 1 returns the same object; 0 returns a patch without updates.

    Raises:
        AlgebraError: The factor is not finite, or the patch holds an adapter that cannot be scaled.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise AlgebraError(f"expected a finite number to scale an edit by, got {factor!r}")
    if factor == 1:
        return patch
    adapters: dict[str, Adapter] = {name: record.scaled(factor) for name, record in patch.adapters.items()}
    if factor == 0:
        return Patch({})
    return Patch({name: scaled_update(update, factor) for name, update in patch.updates.items()}, adapters)


def negated(patch: Patch) -> Patch:
    """Return the patch that changes the model by the opposite. Errors as of `scaled`."""
    return scaled(patch, -1)


def added(patches: Sequence[Patch]) -> Patch:
    """Return one patch that does what these do together: the sum of the updates of each weight.

    Factors are put side by side, which is exact, until they hold more numbers than the matrix. From there on, and where
    one update has no factors, the sum is dense.

    Raises:
        AlgebraError: Two patches have adapters of different kinds on one module.
    """
    kinds: dict[str, str] = {}
    for name, record in ((name, record) for patch in patches for name, record in patch.adapters.items()):
        if kinds.setdefault(name, record.kind) != record.kind:
            raise AlgebraError(f"{name} has adapters of two kinds, {kinds[name]} and {record.kind}, which have no sum")
    total = merge(patches)
    return Patch({name: compacted(update) for name, update in total.updates.items()}, total.adapters)


def scaled_update(update: Update, factor: float) -> Update:
    """Return `factor` times an update, in the same form."""
    if isinstance(update, Dense):
        return Dense(update.delta * factor)
    if isinstance(update, Masked):
        return Masked(update.U * factor, update.V, update.bits)
    return LowRank(update.U * factor, update.V)
