"""What a ledger takes in: entries checked against the model, and the weights that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from errata.editors.core.errors import LedgerError
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
    """

    method: str = ""
    requests: tuple[EditRequest, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: tuple[dict[str, Any], ...] = ()


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
    """A parameter that can be edited, and whether it is stored (d_in, d_out)."""

    name: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in), the orientation of patches."""
        stored = tuple(self.parameter.shape)
        return stored[::-1] if self.transposed else stored


def find_weight(model: nn.Module, name: str) -> Weight:
    """The model's weight of that name.

    Raises:
        LedgerError: there is none, or it has no bytes of its own to edit (meta device, quantised, sharded).
    """
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise LedgerError(f"the model has no parameter {name!r}: {error}") from error
    if parameter.is_meta:
        raise LedgerError(f"{name} is on the meta device and has no bytes; load the model without offloading it")
    if parameter.dtype not in arithmetic.FOLD_DTYPES or not _is_plain(parameter):
        raise LedgerError(
            f"{name} is a {type(parameter.detach()).__name__} of {parameter.dtype}; expected a plain tensor of "
            "float16, bfloat16, float32 or float64 (neither quantised nor sharded)"
        )
    if parameter.is_inference():
        raise LedgerError(f"{name} was made in inference mode, where changes leave no trace; load the model outside it")
    return Weight(name, parameter, is_transposed(model.get_submodule(name.rpartition(".")[0])))


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether its elements are the parameter's own, neither packed nor spread over processes."""
    return type(parameter.detach()) is Tensor


def make_entry(
    model: nn.Module,
    id_: str,
    patch: Patch,
    info: EditInfo | None,
    order: int,
    state: Mapping[str, Tensor] | None = None,
) -> Entry:
    """A copy of the patch whose names are the first of each tied weight or module, with everything checked that the
    patch and the model's shapes can tell.

    Raises:
        LedgerError: empty id, unknown or uneditable parameter or module, wrong shape, a tied one named twice; an
            info that JSON cannot hold.
        NumericalError: NaN or inf in the patch.
    """
    if not isinstance(id_, str) or not id_:
        raise LedgerError(f"expected a non-empty text as id, got {id_!r}")
    patch.check_finite()
    kept = {name: arithmetic.fresh(tensor) for name, tensor in (state or {}).items()}
    own = Patch(_own_updates(model, patch), _own_adapters(model, patch))
    return Entry(id_, own, _own_info(info or EditInfo()), order, kept)


def _own_updates(model: nn.Module, patch: Patch) -> dict[str, Update]:
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    updates: dict[str, Update] = {}
    for given, update in patch.updates.items():
        weight = find_weight(model, given)
        name = first_names[id(weight.parameter)]
        if name in updates:
            raise LedgerError(f"{given} and {name} are one tied weight; give one update for both")
        if update.shape != weight.shape:
            raise LedgerError(f"expected an update (d_out, d_in) = {weight.shape} for {given}, got {update.shape}")
        updates[name] = arithmetic.own(update)
    return updates


def _own_adapters(model: nn.Module, patch: Patch) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for given, adapter in patch.adapters.items():
        name, module = find_module(model, given)
        if name in adapters:
            raise LedgerError(f"{given} and {name} are one module; give one record for both")
        adapter.check(module)
        adapters[name] = adapter.owned()
    return adapters


def _own_info(info: EditInfo) -> EditInfo:
    """The info in memory of its own, with the values that a file gives back: lists in place of tuples."""
    try:
        config, reports = json.loads(json.dumps([dict(info.config), list(info.diagnostics)], allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LedgerError(f"expected a configuration and diagnostics that JSON can hold: {error}") from error
    return replace(info, config=config, diagnostics=tuple(reports))
