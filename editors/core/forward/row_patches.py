"""Let every row of a batch run through its own edit, while the model carries none of the edits.

An edit's update U V of a weight W makes a row's output W x + U (V x). A hook adds the second term, each row the one of
its own edit, so that the questions about many edits are asked in one forward pass. Adapters act on the rows of their
edit only. No weight is written. What is computed equals what the written weights give, up to rounding.

Example: three rows of two edits, and one row of none (the untouched model).

    row            edit      linear map of the edited layer      adapter's module
    a b c          0         W x + U_0 (V_0 x)                    as it is, edit 0 has no adapter
    a b c          1         as it is, edit 1 has no update       edit 1's adapter replaces the output
    d e            1         as it is                             edit 1's adapter replaces the output
    a b c          none      as it is                             as it is

    blocks below the lowest edited one: a b c and d e run once each, instead of four rows

Shapes: n rows, L longest row, d hidden size, r factors of an update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ArchitectureError
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.forward.whole_rows import rows_from_block
from errata.editors.core.ledger.adapter import Folded
from errata.editors.core.ledger.adapter_hooks import active_hooks, looks_ahead
from errata.editors.core.ledger.patch import LowRank, Patch, Update
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture, LinearMap, describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.parts import features
from errata.editors.core.model.tokens import right_padded

# The owner of rows that no edit changes.
UNTOUCHED = -1
# Numbers of the factors that are copied for each row of a batch: 2^24 in float32 are 64 MiB. Where there would be more,
# the rows of each edit are multiplied apart.
_FACTORS_AT_ONCE = 2**24


class RowPatches:
    """The patches of several edits of one model, each for its own rows.

    Args:
        model: The model as it stands when the patches were made.
        patches: One per edit. `reason_alone` must have nothing against any of them.

    Attributes:
        architecture: The model's parts.
        patches: As given; an owner of a row is an index of it, or UNTOUCHED.
        first: The lowest block that a patch changes; None if a patch changes something outside the blocks.
    """

    def __init__(self, model: nn.Module, patches: Sequence[Patch]) -> None:
        self.architecture = describe(model)
        self.patches = tuple(patches)
        firsts = [lowest_block(self.architecture, patch) for patch in patches]
        known = [first for first in firsts if first is not None]
        self.first = min(known) if known and len(known) == len(firsts) else None
        self._folded: list[dict[str, Folded]] = [
            {name: type(record).folded([record]) for name, record in patch.adapters.items()} for patch in patches
        ]

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether a row's output at a token may depend on later tokens of the row, as of `Folded.looks_ahead`."""
        own = any(folded.looks_ahead for of_edit in self._folded for folded in of_edit.values())
        return own or looks_ahead(self.architecture.model)

    @contextmanager
    def of_rows(self, owners: Sequence[int]) -> Iterator[None]:
        """Let the model compute as edited, inside the `with`, for batches whose row i belongs to edit `owners[i]`."""
        rows_of = {owner: [i for i, one in enumerate(owners) if one == owner] for owner in dict.fromkeys(owners)}
        rows_of.pop(UNTOUCHED, None)
        updated = dict.fromkeys(name for e in rows_of for name in self.patches[e].updates)
        adapted = dict.fromkeys(name for e in rows_of for name in self._folded[e])
        with ExitStack() as stack:
            # Updates stand for a change of the weights, so they come before the hooks of adapters.
            for name in updated:
                module = self.architecture.model.get_submodule(name.rpartition(".")[0])
                adder = _adder(module, {e: self.patches[e].updates.get(name) for e in rows_of}, owners, rows_of)
                stack.enter_context(hooked(module.register_forward_hook(adder, prepend=True)))
            for name in adapted:
                module = self.architecture.model.get_submodule(name)
                folded = {e: self._folded[e][name] for e in rows_of if name in self._folded[e]}
                seen: dict[str, tuple[Any, ...]] = {}
                for read in dict.fromkeys(a.reads for a in folded.values() if a.reads is not None):
                    keeper = self.architecture.model.get_submodule(read).register_forward_pre_hook(_keeper(seen, read))
                    stack.enter_context(hooked(keeper))
                replacer = _replacer(folded, rows_of, len(owners), seen)
                stack.enter_context(hooked(module.register_forward_hook(replacer)))
            yield

    def hidden_states(self, rows: Sequence[Sequence[int]], owners: Sequence[int], pad: int) -> Tensor:
        """Return the decoder's output (n, L, d), after the final norm, of rows of token ids padded on the right.

        Blocks below the lowest edited one run once for rows with the same ids.
        """
        distinct = list(dict.fromkeys(map(tuple, rows)))
        if self.first and len(distinct) < len(rows):
            upper = rows_from_block(self.architecture, distinct, first=self.first, pad=pad)
            place = {row: i for i, row in enumerate(distinct)}
            chosen = upper.select([place[tuple(row)] for row in rows]) if isinstance(upper, UpperBlocks) else None
            if chosen is not None:
                with self.of_rows(owners):
                    return chosen.normed(chosen.run())
        with self.of_rows(owners):
            return run_base(self.architecture, right_padded(rows, pad).to(self.architecture.device))


def reason_alone(model: nn.Module, patch: Patch) -> str | None:
    """Return why an edit's rows cannot run beside those of other edits; None if they can.

    Then the edit has to be written to the model, which then answers for this edit alone.
    """
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in patch.updates}
    for name, module in modules.items():
        weight = model.get_parameter(name)
        if weight.dtype not in (torch.float32, torch.float64):
            # What is written is rounded to the few bits of the weight, and that rounding is a part of the edit.
            return f"a weight in {str(weight.dtype).removeprefix('torch.')} rounds what is written to it"
        if features(module) is None:
            return f"{name} is not the weight of a linear map"
        if sum(other is weight for _, other in model.named_parameters(remove_duplicate=False)) > 1:
            return f"{name} is shared by several modules"
    for name, record in patch.adapters.items():
        if not type(record).acts_by_row:
            return f"adapters of kind {record.kind} do not say that they act on each row by itself"
        if active_hooks(model.get_submodule(name)):
            return f"{name} carries adapters of other edits"
        modules[f"{name}.weight"] = model.get_submodule(name)
    try:
        describe(model).check_trainable([LinearMap(name, module) for name, module in modules.items()])
    except ArchitectureError as error:
        return str(error)
    return None


def lowest_block(architecture: Architecture, patch: Patch) -> int | None:
    """Return the lowest block that a patch changes; None if it changes something outside the blocks, or nothing."""
    prefix, found = f"{architecture.blocks_path}.", []
    for name in (*patch.updates, *patch.adapters):
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        if not number.isdecimal():
            return None
        found.append(int(number))
    return min(found, default=None)


def _adder(
    module: nn.Module, updates: dict[int, Update | None], owners: Sequence[int], rows_of: dict[int, list[int]]
) -> Any:
    """Return a forward hook that adds to each row what its edit's update of the module's weight adds."""
    there = {e: update for e, update in updates.items() if update is not None}
    low = {e: update for e, update in there.items() if isinstance(update, LowRank)}
    weight = module.get_parameter("weight")
    dtype, device = working_dtype(weight.dtype), weight.device
    rank = max((update.U.shape[1] for update in low.values()), default=0)
    if len(owners) * rank * sum(features(module) or ()) > _FACTORS_AT_ONCE:
        low = {}
    factors = _stacked(low, owners, dtype, device) if low else None
    apart = [
        (torch.tensor(rows_of[e], device=device), _factors(update, dtype, device))
        for e, update in there.items()
        if e not in low
    ]

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(len(owners), -1, args[0].shape[-1]).to(dtype)  # OPT flattens rows and positions
        added = x.new_zeros(*x.shape[:2], output.shape[-1]) if factors is None else x @ factors[0] @ factors[1]
        for rows, matrices in apart:
            part = x[rows]
            for matrix in matrices:
                part = nn.functional.linear(part, matrix)
            added.index_add_(0, rows, part)
        return output + added.reshape(output.shape).to(output.dtype)

    return add


def _factors(update: Update, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the matrices that an update multiplies an input by, one after another."""
    if isinstance(update, LowRank):
        return [update.V.to(device, dtype), update.U.to(device, dtype)]
    return [update.matrix(dtype, device)]


def _stacked(
    updates: dict[int, LowRank], owners: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each row's factors, (n, d_in, r) and (n, r, d_out); a row without an update has zeros."""
    r = max(update.U.shape[1] for update in updates.values())
    (d_out, d_in), place = next(iter(updates.values())).shape, {e: i for i, e in enumerate(updates)}
    # One more than there are edits: the last is that of rows that nothing changes.
    V = torch.zeros(len(updates) + 1, d_in, r, dtype=dtype, device=device)
    U = torch.zeros(len(updates) + 1, r, d_out, dtype=dtype, device=device)
    for e, update in updates.items():
        V[place[e], :, : update.V.shape[0]] = update.V.to(V).T
        U[place[e], : update.U.shape[1]] = update.U.to(U).T
    index = torch.tensor([place.get(owner, len(updates)) for owner in owners], device=device)
    return V[index], U[index]


def _keeper(seen: dict[str, tuple[Any, ...]], name: str) -> Any:
    """Return a hook that keeps what the module `name` is given."""

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name] = args

    return keep


def _replacer(
    folded: dict[int, Folded], rows_of: dict[int, list[int]], count: int, seen: Mapping[str, tuple[Any, ...]]
) -> Any:
    """Return a forward hook that lets the adapters of each edit act on its rows.

    Args:
        folded: The adapters of each edit.
        rows_of: The rows of each edit.
        count: Rows of a batch.
        seen: What other modules were given whose inputs adapters read.
    """

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        y = output.reshape(count, -1, output.shape[-1])
        for e, adapters in folded.items():
            given = (args if adapters.reads is None else seen[adapters.reads])[0]
            x = given.reshape(count, -1, given.shape[-1])
            flat = given.ndim == 2  # rows and positions in one dimension, as OPT gives them
            rows = torch.tensor(rows_of[e], device=y.device)
            own_x, own_y = (part[rows].flatten(0, 1) if flat else part[rows] for part in (x, y))
            found = adapters.to(y.device)(module, (own_x,), own_y)
            if found is not None:
                y = y.index_copy(0, rows, found.reshape(len(rows), *y.shape[1:]))
        return y.reshape(output.shape)

    return replace
