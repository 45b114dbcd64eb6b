"""The running sum of one weight: what the ledger keeps of it, and what it shall be next. Nothing is written here."""

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
    """One snapshot of a sum every so many updates, and how many of them are kept, the newest."""

    every: int = 32
    kept: int = 2


Snapshots = tuple[tuple[int, Tensor], ...]  # (updates in it, their sum with the base), oldest first


@dataclass(frozen=True)
class Stamp:
    """How a parameter looked when the ledger last wrote it. Version and address are free to read and change with most
    writes of others; the checksum settles whether the bytes did."""

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
    """The sum in force. Its tensors are never written once it is made, so that an old Sum can be taken up again."""

    base: Tensor  # dtype and layout of the parameter
    total: Tensor | None  # fold dtype; None where the parameter itself holds it (float32, float64)
    count: int  # updates in it
    snapshots: Snapshots
    stamp: Stamp

    @property
    def tensors(self) -> list[Tensor]:
        return [self.base, *(total for _, total in self.snapshots), *([] if self.total is None else [self.total])]


@dataclass(frozen=True)
class SumPlan:
    """What a parameter shall hold, computed completely before the first write."""

    base: Tensor
    total: Tensor  # fold dtype
    weights: Tensor  # the parameter's dtype; `total` itself where that is the fold dtype
    count: int
    snapshots: Snapshots

    def written(self, parameter: nn.Parameter) -> Sum:
        """The Sum, once `parameter` holds `weights`."""
        total = None if self.weights is self.total else self.total
        stamp = Stamp.of(parameter, arithmetic.checksum(self.weights))
        return Sum(self.base, total, self.count, self.snapshots, stamp)


def extended(
    weight: Weight, held: Sum | None, updates: Sequence[Update], spacing: Spacing, max_norm_ratio: float
) -> SumPlan:
    """The sum with more updates; `held` is None for a weight that no update has touched.

    Raises:
        NumericalError: an update's norm exceeds `max_norm_ratio` times the weight's, or NaN or inf would result.
    """
    parameter = weight.parameter.detach()
    with arithmetic.plain_arithmetic(parameter.device.type):
        _check_norms(weight, updates, max_norm_ratio)
        base = held.base if held else parameter.clone()
        total = arithmetic.start(parameter if held is None or held.total is None else held.total)
        count, snapshots = (held.count, held.snapshots) if held else (0, ())
        snapshots = _added(total, weight, updates, count, snapshots, spacing)
        return _rounded(weight, base, total, count + len(updates), snapshots)


def repeated(weight: Weight, held: Sum, updates: Sequence[Update], unchanged: int, spacing: Spacing) -> SumPlan:
    """The sum of other updates over the same base, of which the first `unchanged` are those of `held`.

    Starts at the newest snapshot of these, or at the base; on the parameter's present device.

    Raises:
        NumericalError: NaN or inf would result.
        KeyboardInterrupt: one was waiting; nothing is lost, since nothing was written.
    """
    device = weight.parameter.device
    with arithmetic.plain_arithmetic(device.type):
        base = held.base.to(device)
        if not updates:
            return SumPlan(base, base, base, 0, ())
        snapshots = tuple((n, total) for n, total in held.snapshots if n <= unchanged and total.device == device)
        done, begin = snapshots[-1] if snapshots else (0, base)
        total = arithmetic.start(begin)
        snapshots = _added(total, weight, updates[done:], done, snapshots, spacing)
        return _rounded(weight, base, total, len(updates), snapshots)


def _added(
    total: Tensor, weight: Weight, updates: Sequence[Update], done: int, snapshots: Snapshots, spacing: Spacing
) -> Snapshots:
    """Add updates to `total`, in place, which holds `done` others; the snapshots that are then to be kept."""
    end = done + len(updates)
    for count, update in enumerate(updates, done + 1):
        arithmetic.add_update(total, update, transposed=weight.transposed)
        if count % spacing.every == 0:
            safe_point()
            if count > end - spacing.every * spacing.kept:
                snapshots = _newest((*snapshots, (count, total if count == end else total.clone())), spacing)
    return snapshots


def _newest(snapshots: Snapshots, spacing: Spacing) -> Snapshots:
    return snapshots[max(0, len(snapshots) - spacing.kept) :]


def _check_norms(weight: Weight, updates: Sequence[Update], max_norm_ratio: float) -> None:
    before = arithmetic.norm(weight.parameter.detach())
    if not before < float("inf"):
        raise NumericalError(f"{weight.name} holds NaN or inf (norm {before}) before the edit; load the model again")
    # A weight of zeros has no scale to compare with.
    limit = max_norm_ratio * before if before > 0 else float("inf")
    for change in (update.norm() for update in updates):
        if not change <= limit:
            raise NumericalError(
                f"the update of {weight.name} has norm {change:.3g}, more than {max_norm_ratio:.3g} times the weight's "
                f"({before:.3g}); the edit is refused"
            )


def _rounded(weight: Weight, base: Tensor, total: Tensor, count: int, snapshots: Snapshots) -> SumPlan:
    weights = total.to(base.dtype)
    if not arithmetic.is_finite(weights):
        raise NumericalError(
            f"the edited weights of {weight.name} would hold NaN or inf in {str(base.dtype).removeprefix('torch.')}; "
            "the edit is refused"
        )
    return SumPlan(base, total, weights, count, snapshots)
