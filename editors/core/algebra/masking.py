"""Masking and merging the updates of patches, with the weights below them where a rule asks for these."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from errata.editors.core.algebra.mask_rules import Below, MaskRule
from errata.editors.core.algebra.merge_rules import MergeRule
from errata.editors.core.errors import AlgebraError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import find_weight
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch, Update


def weights_below(ledger: Ledger, names: Iterable[str], ids: Collection[str] = ()) -> dict[str, Below]:
    """Return weights without some edits and all edits after the first of these; as they stand where it has none.

    Args:
        ledger: Of the model.
        names: Names of the weights.
        ids: Edits that do not count.
    """
    first = next((index for index, entry in enumerate(ledger.entries) if entry.id in ids), None)
    return {name: _weight_below(ledger, name, first) for name in names}


def _weight_below(ledger: Ledger, name: str, count: int | None) -> Below:
    """Return a weight with the first `count` entries of its ledger; None: as it stands."""
    weight = find_weight(ledger.model, name)
    stored = weight.parameter.detach()
    if count is not None:
        base = ledger.base(name)
        updates = [
            entry.patch.updates[weight.name] for entry in ledger.entries[:count] if weight.name in entry.patch.updates
        ]
        with arithmetic.plain_arithmetic(base.device.type):
            total = arithmetic.start_sum(base)
            for update in updates:
                arithmetic.add_update(total, update, transposed=weight.transposed)
            stored = total.to(base.dtype)
    return Below(stored.T if weight.transposed and stored.ndim == 2 else stored, weight.transposed)


def masked_patch(patch: Patch, rule: MaskRule, below: Mapping[str, Below]) -> Patch:
    """Return what a rule leaves of a patch. Factors stay factors, with one bit per element.

    Args:
        patch: The patch.
        rule: The rule.
        below: The weights below the updates, where `rule.needs_weight`.

    Raises:
        AlgebraError: The patch has adapters, or a weight that the rule needs is not given.
    """
    _refuse_adapters(patch, "masked")
    names, generator, kept = list(patch.updates), rule.generator(), dict[str, Update]()
    # Mostly one after another: all updates in float64 take twice the memory of a model whose weights all change.
    for group in [names] if rule.is_joint else [[name] for name in names]:
        deltas = _deltas(Patch({name: patch.updates[name] for name in group}))
        masks = rule.masks(deltas, below, generator)
        for name in group:
            kept[name] = _masked(patch.updates[name], masks[name], rule.gain(deltas[name], masks[name]))
    return Patch(kept)


def merged_patch(
    patches: Sequence[Patch], rule: MergeRule, below: Mapping[str, Below], weights: Sequence[float] | None = None
) -> Patch:
    """Return what several patches become under a rule: a dense update per weight.

    Args:
        patches: The patches; one without an update of a weight counts as 0 there.
        rule: The rule.
        below: The weights below the updates, where the rule's mask needs them.
        weights: Of the patches; None: 1 each.

    Raises:
        AlgebraError: A patch has adapters, the number of weights is another, a weight or the strength is not finite, or
            a weight below is missing.
    """
    shares = [1.0] * len(patches) if weights is None else list(weights)
    if len(shares) != len(patches):
        raise AlgebraError(f"expected one weight per edit, {len(patches)}, got {len(shares)}")
    if not all(map(math.isfinite, [*shares, rule.strength])):
        raise AlgebraError(f"expected finite weights and a finite strength, got {shares} and {rule.strength}")
    for patch in patches:
        _refuse_adapters(patch, "merged by a rule")
    first = {name: update.tensors[0] for patch in reversed(patches) for name, update in patch.updates.items()}
    merged = rule.merged([_deltas(patch, first) for patch in patches], below, shares)
    return Patch({name: Dense(delta.to(first[name].dtype)) for name, delta in merged.items()})


def _deltas(patch: Patch, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the updates multiplied out in float64, on the devices of `like` or of their own."""
    return {
        name: update.matrix(torch.float64, (update.tensors if like is None else [like[name]])[0].device)
        for name, update in patch.updates.items()
    }


def _masked(update: Update, mask: Tensor, gain: float) -> Update:
    if isinstance(update, Dense):
        return Dense(update.delta * mask if gain == 1 else update.delta * mask * gain)
    if isinstance(update, Masked):
        mask = mask & update.mask
    return Masked.of(LowRank(update.U if gain == 1 else update.U * gain, update.V), mask)


def _refuse_adapters(patch: Patch, done: str) -> None:
    for name, record in patch.adapters.items():
        raise AlgebraError(
            f"an edit with an adapter of kind {record.kind!r} on {name} cannot be {done}: it changes no weights"
        )
