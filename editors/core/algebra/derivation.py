"""Edits that are calculated from other edits, as entries of a ledger: what they add, and the record of their parents.

    {"operation": "scale", "numbers": {"factor": 0.5}, "parents": [{"id": "rome-3f0a"}]}

This record is the `derived` of an entry's info. It is saved with the edit. A parent that was itself derived carries its
own record. The derived edit keeps the requests and the configuration of its parents, and what their methods reported
about the search, but not the reported norms, which are no longer true.

State (the keys that AlphaEdit protects, for example) stays where the facts are still meant to be there: under a factor
above 0 and at most 1, and under a mask. Otherwise it is dropped, and the record says `"state": "dropped"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.editors.core.algebra.mask_rules import Below, MaskRule
from errata.editors.core.algebra.masking import masked_patch, merged_patch
from errata.editors.core.algebra.merge_rules import MergeRule
from errata.editors.core.algebra.patch_arithmetic import added, scaled
from errata.editors.core.config import norm_limit
from errata.editors.core.errors import AlgebraError
from errata.editors.core.ledger.entry import EditInfo, Entry, edit_id
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.request import EditRequest

# What a report says of the size of its patch.
_SIZES = ("update_norm", "update_ratio")


def scaled_entry(entry: Entry, factor: float) -> Entry:
    """Return `factor` times an edit; the entry itself where the factor is 1.

    Raises:
        AlgebraError: The factor is not finite, or the edit has an adapter, which cannot be scaled.
    """
    patch = scaled(entry.patch, factor)
    if patch is entry.patch:
        return entry
    return derived_entry([entry], patch, "scale", {"factor": factor}, keeps_state=0 < factor <= 1)


def added_entries(entries: Sequence[Entry]) -> Entry:
    """Return the sum of edits; the entry itself where there is one.

    Raises:
        AlgebraError: There are none, or two have adapters of different kinds on one module.
    """
    if len(entries) == 1:
        return entries[0]
    return derived_entry(entries, added([entry.patch for entry in entries]), "add", {})


def masked_entry(entry: Entry, rule: MaskRule, below: Mapping[str, Below]) -> Entry:
    """Return what a rule leaves of an edit. Arguments and errors as of `masked_patch`."""
    patch = masked_patch(entry.patch, rule, below)
    return derived_entry([entry], patch, "mask", rule.numbers, keeps_state=True)


def merged_entries(
    entries: Sequence[Entry], rule: MergeRule, below: Mapping[str, Below], weights: Sequence[float] | None = None
) -> Entry:
    """Return what several edits become under a rule. Arguments and errors as of `merged_patch`."""
    patch = merged_patch([entry.patch for entry in entries], rule, below, weights)
    numbers = rule.numbers if weights is None else {**rule.numbers, "weights": list(weights)}
    return derived_entry(entries, patch, "merge", numbers)


def derived_entry(
    parents: Sequence[Entry],
    patch: Patch,
    operation: str,
    numbers: Mapping[str, Any],
    *,
    keeps_state: bool = False,
) -> Entry:
    """Return the entry of an edit that was calculated from others.

    Args:
        parents: The edits, in the order of the operation.
        patch: The result.
        operation: Name of the operation.
        numbers: Its parameters, as values that JSON can hold.
        keeps_state: Whether the state of a single parent is still true.

    Raises:
        AlgebraError: There are no parents.
    """
    if not parents:
        raise AlgebraError("expected at least one edit to calculate with, got none")
    infos = [entry.info for entry in parents]
    kept = parents[0].state if keeps_state and len(parents) == 1 else {}
    dropped = not kept and any(entry.state for entry in parents)
    derived = {
        "operation": operation,
        "numbers": dict(numbers),
        "parents": _named(parents, operation),
        **({"state": "dropped"} if dropped else {}),
    }
    requests, reports = _asked(infos)
    method = infos[0].method if len({info.method for info in infos}) == 1 else ""
    info = EditInfo(method, requests, _shared_config(infos), reports, derived)
    return Entry(edit_id(method or "derived", requests, patch), patch, info, parents[0].order, kept)


def described(derived: Mapping[str, Any]) -> str:
    """Return the record of a derived edit as a formula, such as `0.5 rome-3f0a`; "" where there is no record."""
    if not derived:
        return ""
    operation, numbers = derived.get("operation"), derived.get("numbers", {})
    parents = [
        f"({described(one['derived'])})" if one.get("derived") else str(one.get("id"))
        for one in derived.get("parents", ())
    ]
    if operation == "scale":
        return f"{numbers.get('factor', 1):g} {parents[0]}"
    if operation == "difference":
        return f"{derived.get('tuned')} - {derived.get('base')}"
    if operation == "add":
        return " + ".join(parents)
    if operation == "steer":
        shown = [f"{field}={numbers[field]:g}" for field in ("layer", "strength", "random") if field in numbers]
        return f"{numbers.get('kind')}({', '.join(shown)})"
    name = numbers.get("rule", operation)
    details = [f"{field}={value}" for field, value in numbers.items() if field != "rule" and value is not None]
    return f"{name}({', '.join([*parents, *details])})"


def ancestors(derived: Mapping[str, Any]) -> set[str]:
    """Return the ids of all edits that a derived edit was calculated from, over any number of steps."""
    found: set[str] = set()
    for one in derived.get("parents", ()):
        found |= {str(one.get("id"))} | ancestors(one.get("derived", {}))
    return found


def _named(parents: Sequence[Entry], operation: str) -> list[dict[str, Any]]:
    """Return the parents as the record names them. A sum of sums is one sum of all."""
    named: list[dict[str, Any]] = []
    for entry in parents:
        derived = entry.info.derived
        if operation == "add" and derived.get("operation") == "add":
            named += derived["parents"]
        else:
            named.append({"id": entry.id, **({"derived": dict(derived)} if derived else {})})
    return named


def _asked(infos: Sequence[EditInfo]) -> tuple[tuple[EditRequest, ...], tuple[dict[str, Any], ...]]:
    """Return each request of the parents once, with its report."""
    found: dict[EditRequest, dict[str, Any]] = {}
    for info in infos:
        reports = info.diagnostics if len(info.diagnostics) == len(info.requests) else ({},) * len(info.requests)
        for request, report in zip(info.requests, reports, strict=True):
            found.setdefault(request, {name: value for name, value in report.items() if name not in _SIZES})
    return tuple(found), tuple(found.values())


def _shared_config(infos: Sequence[EditInfo]) -> dict[str, Any]:
    """Return the parents' configuration where they share one; else only the largest of their limits on norms."""
    first = infos[0]
    if all((info.method, dict(info.config)) == (first.method, dict(first.config)) for info in infos):
        return dict(first.config)
    return {"max_norm_ratio": max(norm_limit(info.method, info.config) for info in infos)}
