"""Entries of a ledger: their checks against the model, and the model's weights that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.files.digests import add_bytes
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.adapter import Adapter
from errata.editors.core.ledger.adapter_hooks import find_module
from errata.editors.core.ledger.patch import Patch, Update
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.request import EditRequest


@dataclass(frozen=True)
class EditInfo:
    """What an edit answers and how it was found. Nothing of it acts on the model.

    Attributes:
        method: Registered name of the method; "" where it is not known.
        requests: What was asked.
        config: The method's configuration as plain values.
        diagnostics: One report per request as plain values.
        derived: How it was calculated from other edits (algebra/derivation.py); empty where a method has found it.
    """

    method: str = ""
    requests: tuple[EditRequest, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: tuple[dict[str, Any], ...] = ()
    derived: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_closing_step(self) -> bool:
        """Whether it is a method's closing step over earlier edits: configured like an edit, it answers no request."""
        return bool(self.method and self.config) and not self.requests and not self.derived

    @property
    def is_intervention(self) -> bool:
        """Whether it changes the whole model, as a compression does: it has a name and answers no request."""
        return bool(self.method) and not (self.config or self.requests or self.derived)


@dataclass(frozen=True, eq=False)
class Entry:
    """One patch in the ledger, as the ledger's own copy.

    Attributes:
        id: Names the entry in its ledger.
        patch: What it adds to the model.
        info: What it answers and how it was found.
        order: Grows with every append and is never given twice; sorting by it gives the order of the sum.
        state: Tensors that the method finds again while the entry is in the ledger, and only then.
    """

    id: str
    patch: Patch
    info: EditInfo
    order: int
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Weight:
    """A parameter that can be edited; `transposed` says whether the model stores it as (d_in, d_out)."""

    name: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in), the orientation of patches."""
        stored = tuple(self.parameter.shape)
        return stored[::-1] if self.transposed else stored


def find_weight(model: nn.Module, name: str) -> Weight:
    """Return the model's weight of this name.

    Raises:
        LedgerError: There is none, or its bytes cannot be edited (meta device, quantised, sharded).
    """
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise LedgerError(f"the model has no parameter {name!r}: {error}") from error
    if parameter.is_meta:
        raise LedgerError(f"{name} is on the meta device and has no bytes; load the model without offloading it")
    if parameter.dtype not in arithmetic.FOLD_DTYPES or not _is_plain(parameter):
        raise LedgerError(
            f"{name}: expected a plain tensor of float16, bfloat16, float32 or float64, neither quantised nor sharded, "
            f"got a {type(parameter.detach()).__name__} of {parameter.dtype}; load the model in one of these"
        )
    if parameter.is_inference():
        raise LedgerError(
            f"{name} was made in inference mode, which does not record changes; load the model outside it"
        )
    return Weight(name, parameter, is_transposed(model.get_submodule(name.rpartition(".")[0])))


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether the parameter holds its elements itself, neither packed nor spread over processes."""
    return type(parameter.detach()) is Tensor


def make_entry(
    model: nn.Module,
    id_: str,
    patch: Patch,
    info: EditInfo | None,
    order: int,
    state: Mapping[str, Tensor] | None = None,
) -> Entry:
    """Return an entry with a copy of the patch, after all checks that need only the patch and the model's shapes.

    Tied weights and modules are named by the first of their names.

    Raises:
        LedgerError: The id is empty; a parameter or module is unknown or cannot be edited; a shape is wrong; a tied
            weight is given twice; JSON cannot hold the info.
        NumericalError: The patch holds NaN or inf.
    """
    if not isinstance(id_, str) or not id_:
        raise LedgerError(f"id: expected a non-empty text, got {id_!r}")
    patch.check_finite()
    state_copy = {name: arithmetic.contiguous_copy(tensor) for name, tensor in (state or {}).items()}
    patch_copy = Patch(_copy_updates(model, patch), _copy_adapters(model, patch))
    return Entry(id_, patch_copy, _copy_info(info or EditInfo()), order, state_copy)


def _copy_updates(model: nn.Module, patch: Patch) -> dict[str, Update]:
    # `named_parameters` yields a tied weight once, under its first name.
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    updates: dict[str, Update] = {}
    for given, update in patch.updates.items():
        weight = find_weight(model, given)
        name = first_names[id(weight.parameter)]
        if name in updates:
            raise LedgerError(f"{given} and {name} are one tied weight; give one update for both")
        if update.shape != weight.shape:
            raise LedgerError(f"{given}: expected an update (d_out, d_in) = {weight.shape}, got {update.shape}")
        updates[name] = arithmetic.copy_update(update)
    return updates


def _copy_adapters(model: nn.Module, patch: Patch) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for given, adapter in patch.adapters.items():
        name, module = find_module(model, given)
        if name in adapters:
            raise LedgerError(f"{given} and {name} are one module; give one adapter for both")
        adapter.check(module)
        adapters[name] = adapter.copy()
    return adapters


def _copy_info(info: EditInfo) -> EditInfo:
    """The info in memory of its own, with the values that a file gives back: lists in place of tuples."""
    plain = [dict(info.config), list(info.diagnostics), dict(info.derived)]
    try:
        config, reports, derived = json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LedgerError(f"expected a configuration and diagnostics that JSON can hold: {error}") from error
    return replace(info, config=config, diagnostics=tuple(reports), derived=derived)


def edit_id(method: str, requests: Sequence[EditRequest], patch: Patch) -> str:
    """Return the id of an edit: its method, and a digest of requests and patch."""
    total = hashlib.sha256(json.dumps([request.as_dict() for request in requests]).encode("utf-8", "surrogatepass"))
    for name, adapter in patch.adapters.items():
        total.update(json.dumps([name, adapter.kind, dict(adapter.numbers)]).encode())
    for name, tensor in patch.tensors:
        total.update(name.encode())
        add_bytes(total, tensor)
    return f"{method}-{total.hexdigest()[:16]}"
