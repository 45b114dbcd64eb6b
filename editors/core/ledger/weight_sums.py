"""The sum of one weight's updates: what the ledger keeps of it, and the plan for its next value.

Functions here compute and check. Only ledger.py writes to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from errata.editors.core.errors import NumericalError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import Weight
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import Update


@dataclass(frozen=True)
class Spacing:
    """One snapshot of a sum is taken after each `every` updates; the newest `kept` of them stay."""

    every: int = 32
    kept: int = 2


Snapshots = tuple[tuple[int, Tensor], ...]  # (number of updates, base plus these updates), oldest first


@dataclass(frozen=True)
class Stamp:
    """What identifies a parameter's content when the ledger last wrote it.

    Version and address cost nothing to read, and change when other code writes in most ways. The checksum decides
    whether the bytes have changed.
    """

    version: int
    address: int
    checksum: int

    @classmethod
    def of(cls, parameter: nn.Parameter, checksum: int) -> Stamp:
        return cls(parameter._version, parameter.data_ptr(), checksum)

    def looks_like(self, parameter: nn.Parameter) -> bool:
        return (self.version, self.address) == (parameter._version, parameter.data_ptr())


@dataclass(frozen=True)
class Sum:
    """The present sum of a weight. It is immutable, so that a transaction can return to an earlier Sum."""

    base: Tensor  # dtype and layout of the parameter
    total: Tensor | None  # sum dtype; None where the parameter itself holds it (float32, float64)
    count: int  # number of updates
    snapshots: Snapshots
    stamp: Stamp

    @property
    def tensors(self) -> list[Tensor]:
        return [self.base, *(total for _, total in self.snapshots), *([] if self.total is None else [self.total])]


@dataclass(frozen=True)
class SumPlan:
    """The next value of a parameter, computed completely before the first write."""

    base: Tensor
    total: Tensor  # sum dtype
    weights: Tensor  # the parameter's dtype; `total` itself where that is the sum dtype
    count: int
    snapshots: Snapshots

    def as_sum(self, parameter: nn.Parameter) -> Sum:
        """Return the Sum, after `weights` have been written to `parameter`."""
        total = None if self.weights is self.total else self.total
        stamp = Stamp.of(parameter, arithmetic.checksum(self.weights))
        return Sum(self.base, total, self.count, self.snapshots, stamp)


def plan_extended(
    weight: Weight, held: Sum | None, updates: Sequence[tuple[Update, float]], spacing: Spacing
) -> SumPlan:
    """Plan the sum with more updates.

    Args:
        weight: The weight as it is now.
        held: Its present sum; None for a weight without updates.
        updates: The updates to add, in order, each with its limit: the largest accepted norm, as a multiple of the norm
            that the weight has when the update is added.
        spacing: Which snapshots to keep.

    Raises:
        NumericalError: An update's norm exceeds its limit, or NaN or inf would result.
    """
    parameter = weight.parameter.detach()
    with arithmetic.plain_arithmetic(parameter.device.type):
        before = _finite_norm(weight)
        base = held.base if held else parameter.clone()
        total = arithmetic.start_sum(parameter if held is None or held.total is None else held.total)
        count, snapshots = (held.count, held.snapshots) if held else (0, ())
        limits = _NormLimits(weight.name, before, [ratio for _, ratio in updates])
        changes = [update for update, _ in updates]
        snapshots = _add_updates(total, weight, changes, count, snapshots, spacing, limits)
        return _round(weight, base, total, count + len(updates), snapshots)


def plan_recomputed(weight: Weight, held: Sum, updates: Sequence[Update], unchanged: int, spacing: Spacing) -> SumPlan:
    """Plan the sum of other updates over the same base, on the parameter's present device.

    Args:
        weight: The weight as it is now.
        held: Its present sum.
        updates: All updates of the new sum, in order.
        unchanged: How many of the first updates are also the first of `held`. The sum starts at the newest snapshot of
            these, or at the base.
        spacing: Which snapshots to keep.

    Raises:
        NumericalError: NaN or inf would result.
        KeyboardInterrupt: Ctrl-C was waiting. Nothing is lost, since nothing was written.
    """
    device = weight.parameter.device
    with arithmetic.plain_arithmetic(device.type):
        base = held.base.to(device)
        if not updates:
            return SumPlan(base, base, base, 0, ())
        # Snapshots on another device may be rounded differently from what this one computes.
        snapshots = tuple((n, total) for n, total in held.snapshots if n <= unchanged and total.device == device)
        done, begin = snapshots[-1] if snapshots else (0, base)
        total = arithmetic.start_sum(begin)
        snapshots = _add_updates(total, weight, updates[done:], done, snapshots, spacing)
        return _round(weight, base, total, len(updates), snapshots)


def _add_updates(
    total: Tensor,
    weight: Weight,
    updates: Sequence[Update],
    done: int,
    snapshots: Snapshots,
    spacing: Spacing,
    limits: _NormLimits | None = None,
) -> Snapshots:
    """Add updates to `total` in place, which holds `done` others, and return the snapshots to keep."""
    end = done + len(updates)
    for count, update in enumerate(updates, done + 1):
        if limits is not None:
            limits.check(update, total, count - done - 1)
        arithmetic.add_update(total, update, transposed=weight.transposed)
        if count % spacing.every == 0:
            safe_point()
            if count > end - spacing.every * spacing.kept:  # earlier ones would be dropped before the end
                snapshots = _newest((*snapshots, (count, total if count == end else total.clone())), spacing)
    return snapshots


def _newest(snapshots: Snapshots, spacing: Spacing) -> Snapshots:
    return snapshots[max(0, len(snapshots) - spacing.kept) :]


class _NormLimits:
    """The limits on the norms of updates that are added one after another to a weight."""

    def __init__(self, name: str, before: float, ratios: Sequence[float]) -> None:
        self.name, self.reference, self.ratios = name, before, ratios

    def check(self, update: Update, total: Tensor, index: int) -> None:
        """Refuse the update with this index, which `total` does not hold yet, if its norm is too large.

        Raises:
            NumericalError: It is.
        """
        norm, ratio = update.norm(), self.ratios[index]
        if self.reference > 0 and norm <= ratio * self.reference:
            return
        # Earlier updates may have made the weight larger. Its norm costs a read, which most updates do not need.
        self.reference = arithmetic.norm(total) if index else self.reference
        # A weight of zeros has no scale to compare with.
        limit = ratio * self.reference if self.reference > 0 else float("inf")
        if not norm <= limit:  # so written, NaN is refused, too
            raise NumericalError(
                f"the update of {self.name} has norm {norm:.3g}, more than {ratio:.3g} times the weight's "
                f"({self.reference:.3g}), and is refused; if this is intended, raise max_norm_ratio"
            )


def _finite_norm(weight: Weight) -> float:
    before = arithmetic.norm(weight.parameter.detach())
    if not before < float("inf"):
        raise NumericalError(f"{weight.name} holds NaN or inf (norm {before}) before the edit; load the model again")
    return before


def _round(weight: Weight, base: Tensor, total: Tensor, count: int, snapshots: Snapshots) -> SumPlan:
    weights = total.to(base.dtype)
    if not arithmetic.is_finite(weights):
        raise NumericalError(
            f"the edited weights of {weight.name} would hold NaN or inf in {str(base.dtype).removeprefix('torch.')}, "
            "and the edit is refused; load the model in float32"
        )
    return SumPlan(base, total, weights, count, snapshots)
