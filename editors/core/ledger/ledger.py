"""The ledger: one ordered list of patches over a model's untouched weights, and the only writer of weights and hooks.

    ledger = Ledger.of(model)
    ledger.append("e1", patch_1)
    ledger.append("e2", patch_2)
    ledger.remove("e1")                 # the same bits as a model to which only patch_2 was ever applied

The weights are always base + p1 + p2 + ..., summed in that order by the operations in arithmetic.py. Undoing an entry,
in any order, repeats the sum without it. Nothing is ever subtracted, since a rounded difference would not give back the
same bits. A patch may also hold adapters, which act in the forward pass of a module. All adapters of one module act
through one hook, in the same order (adapter_hooks.py). An operation that fails (bad patch, NaN, no memory, Ctrl-C)
leaves the model and the ledger as they were before the call.

Memory: for each parameter that an entry changes, the ledger keeps the base bytes, the float32 sum of 16-bit weights,
and at most `spacing.kept` earlier sums. Thanks to these, undoing a late entry among thousands repeats few additions. It
also keeps the factors of the entries, and nothing for other parameters. While an operation runs, it needs twice the
memory of the weights that it changes. Only one thread may use a ledger at a time.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, norm_limit
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger import adapter_hooks, arithmetic
from errata.editors.core.ledger.adapter import Folded
from errata.editors.core.ledger.entry import EditInfo, Entry, Weight, find_weight, make_entry
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible, safe_point, transaction
from errata.editors.core.ledger.patch import Patch, Update
from errata.editors.core.ledger.savepoint import Savepoint
from errata.editors.core.ledger.weight_sums import Spacing, Stamp, Sum, SumPlan, plan_extended, plan_recomputed
from errata.editors.core.model.compiled import uncompiled

ATTRIBUTE = "_errata_ledger"


class Ledger:
    """The patches that a model carries. `Ledger.of(model)` returns it; each model has one, kept on the model itself.

    Attributes:
        spacing: How often a snapshot of a sum is kept, and how many of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._entries: dict[str, Entry] = {}
        self._sums: dict[str, Sum] = {}
        # Every change makes a new mapping, so that a savepoint can keep the old one without a copy.
        self._stacks: adapter_hooks.Stacks = {}
        self._hooks: dict[str, adapter_hooks.Hook] = {}
        self._savepoints: list[Savepoint] = []
        self._next_order = 0
        self._is_untouched = False
        self.spacing = Spacing()

    @classmethod
    def of(cls, model: nn.Module) -> Ledger:
        """Return the model's ledger, or make one.

        The ledger is a plain attribute of the model. It is not in `state_dict`, `save_pretrained` does not save it and
        pickling drops it. `copy.deepcopy(model)` gives the copy a separate ledger. What `torch.compile` makes of a
        model has the ledger of that model.
        """
        model = uncompiled(model)
        ledger = model.__dict__.get(ATTRIBUTE)
        if not isinstance(ledger, Ledger):
            ledger = cls(model)
            model.__dict__[ATTRIBUTE] = ledger
        elif ledger._model() is None:
            ledger._model = weakref.ref(model)
        return ledger

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model. The ledger does not keep it alive."""
        model = self._model()
        if model is None:
            raise LedgerError("the ledger's model no longer exists; keep a reference to the model")
        return model

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, in the order of the sum."""
        return tuple(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:  # noqa: A002
        return id in self._entries

    def __repr__(self) -> str:
        edited = f"{len(self._sums)} parameters and {len(self._stacks)} modules"
        return f"Ledger({len(self)} entries over {edited}, {self.nbytes() / 2**20:.1f} MiB)"

    def folded(self, module: str) -> Folded | None:
        """Return what the adapters of a module do together, or None if it has none."""
        stack = self._stacks.get(adapter_hooks.find_module(self.model, module)[0])
        return stack.top if stack else None

    def base(self, name: str) -> Tensor:
        """Return the untouched bytes of a weight, as the model stores it. This is not a copy: do not write to it."""
        weight = find_weight(self.model, name)
        held = self._sums.get(weight.name)
        return weight.parameter.detach() if held is None else held.base

    def nbytes(self) -> int:
        """Return the bytes kept between operations: base bytes, sums, snapshots, hooks, entries' tensors and state."""
        kept = [t for entry in self.entries for _, t in entry.patch.tensors]
        kept += [t for entry in self.entries for t in entry.state.values()]
        made = [t for held in self._sums.values() for t in held.tensors]
        made += [t for stack in self._stacks.values() for _, folded in stack.states for t in folded.kept_tensors]
        # Count each storage once: a sum may also be its newest snapshot, and states of a codebook share memory.
        memories = (t.untyped_storage() for t in (*kept, *made))
        return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(
        self,
        id: str,  # noqa: A002
        patch: Patch,
        info: EditInfo | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
        max_norm_ratio: float = EditorConfig.max_norm_ratio,
    ) -> Entry:
        """Add a patch after all others.

        Args:
            id: The entry's name, which must be new to this ledger.
            patch: Updates by parameter name, of shape (d_out, d_in) even where the model stores the weight transposed,
                and adapters by module name. A tied weight may be given under any of its names. The tensors are copied,
                so that the caller may reuse them.
            info: What the edit answers and how it was found, as values that JSON can hold.
            state: Tensors that the method wants to read from the entry while the ledger holds it. They are copied.
            max_norm_ratio: Refuse an update whose Frobenius norm exceeds this many times the norm of its weight.

        Returns:
            The new entry.

        Raises:
            LedgerError: The id is taken or empty; a parameter or module is unknown or cannot be edited; a shape is
                wrong; adapters cannot share a module; JSON cannot hold the info; other code has changed the edited
                weights; the call is inside `untouched()`.
            NumericalError: The patch or the resulting weights hold NaN or inf, or the update's norm is too large.
        """
        with self.transaction():
            entry = make_entry(self.model, id, patch, info, self._next_order, state)
            self._append_entries([entry], max_norm_ratio)
        return entry

    def extend(self, entries: Iterable[Entry], *, max_norm_ratio: float | None = None) -> None:
        """Append entries from a ledger over the same base: all of them or, on any error, none.

        It sums once per parameter, and raises the same errors as `append`.

        Args:
            entries: The entries, in the order of the sum.
            max_norm_ratio: As of `append`; None: each entry has the limit of its method and configuration.
        """
        with self.transaction():
            made = [
                make_entry(self.model, given.id, given.patch, given.info, self._next_order + index, given.state)
                for index, given in enumerate(entries)
            ]
            self._append_entries(made, max_norm_ratio)

    def remove(self, id: str) -> None:  # noqa: A002
        """Undo any one entry. Afterwards the model is bit for bit as if the entry had never been appended."""
        self.remove_many([id])

    def remove_many(self, ids: Iterable[str]) -> None:
        """Undo several entries at the price of one: all of them or, on any error, none.

        Raises:
            LedgerError: The ledger does not hold an id; other code has changed the edited weights; the call is inside
                `untouched()`.
        """
        with self.transaction():
            gone = set(ids)
            if unknown := sorted(map(repr, gone - self._entries.keys())):
                raise LedgerError(
                    f"this ledger has no entry {', '.join(unknown)} among its {len(self)}; see ledger.entries"
                )
            names = sorted({name for id_ in gone for name in self._entries[id_].patch.updates})
            self._check_unchanged(names)
            adapters = {id_: entry.patch.adapters for id_, entry in self._entries.items()}
            stacks = adapter_hooks.stacks_without(self._stacks, adapters, gone)
            self._sum_again(names, gone)
            self._install_hooks(stacks)
            self._entries = {id_: entry for id_, entry in self._entries.items() if id_ not in gone}

    def clear(self) -> None:
        """Undo every entry. Afterwards the model holds its base bytes, and the ledger is empty."""
        self.remove_many(list(self._entries))

    def transaction(self) -> AbstractContextManager[None]:
        """Return a context manager: all changes made inside happen or, on any exception, none does.

        Transactions nest. Ctrl-C waits for a `safe_point` or for the end. At a safe point it rolls the transaction
        back. A transaction keeps a copy of each weight that it changes until it ends. So the next operation rolls back
        what an exception from another thread has left half done.
        """
        return transaction(self._begin, self._commit, self._roll_back)

    def untouched(self) -> AbstractContextManager[object]:
        """Return a context manager: inside, the model has its base bytes, and none of the ledger's hooks acts.

        On leaving, even by an exception, the edits are back. Inside, the ledger refuses to change, and what other code
        writes to edited weights is lost. Blocks nest. Ctrl-C is prompt inside, or waits for a `safe_point` where an
        outer block defers it. The block keeps a copy of the edited weights.
        """
        return reversible(self._write_base, self._write_edited)

    def rebase(self) -> None:
        """Make the present weights and hooks the new base, and forget all entries. They can then not be undone."""
        with deferred_interrupts():
            self._roll_back_stale()
            if self._is_untouched or self._savepoints:
                raise LedgerError("rebase() cannot be rolled back; leave untouched() and all transactions first")
            self._entries, self._sums, self._stacks, self._hooks = {}, {}, {}, {}

    def restore(self) -> None:
        """Write base + entries again, over what other code has done to the edited weights, and reinstall the hooks.

        Raises:
            LedgerError: A weight has another dtype or shape now, so that its base no longer fits.
        """
        with self.transaction():
            self._check_dtypes_and_shapes()
            self._sum_again(sorted(self._sums), None)
            self._install_hooks(self._stacks)

    # --- noticing changes by other code -----------------------------------------------------------------------------

    def _check_dtypes_and_shapes(self) -> None:
        for name, held in self._sums.items():
            parameter = find_weight(self.model, name).parameter
            now, then = (parameter.dtype, tuple(parameter.shape)), (held.base.dtype, tuple(held.base.shape))
            if now != then:
                raise LedgerError(
                    f"{name}: expected dtype and shape {then}, as when it was edited, got {now}; convert it back, or "
                    "accept it with ledger.rebase(), which forgets the entries"
                )

    def _check_unchanged(self, soon_written: Iterable[str]) -> None:
        """Refuse weights that other code has changed, and follow weights that have moved to another device.

        The stamp of every edited weight is compared. Bytes are read only if the stamp differs or the weight is about
        to be written, since code can write to `parameter.data` without changing the stamp.
        """
        self._check_dtypes_and_shapes()
        soon, moved = set(soon_written), []
        for name, held in self._sums.items():
            parameter = find_weight(self.model, name).parameter
            if held.stamp.looks_like(parameter) and name not in soon:
                continue
            if arithmetic.checksum(parameter) != held.stamp.checksum:
                raise LedgerError(
                    f"other code has changed {name} since the last edit; ledger.restore() writes the edited weights "
                    "over it, and ledger.rebase() accepts it as the new base and forgets the entries"
                )
            self._sums[name] = replace(held, stamp=Stamp.of(parameter, held.stamp.checksum))
            if parameter.device != held.base.device:
                moved.append(name)
        # Another device may round differently. Summed there, the weights are those that a fresh model would get there.
        self._sum_again(moved, None)

    # --- writing in place, after the old bytes are saved ------------------------------------------------------------

    def _append_entries(self, entries: Sequence[Entry], max_norm_ratio: float | None) -> None:
        updates: dict[str, list[tuple[Update, float]]] = {}
        ids = set(self._entries)
        for entry in entries:
            if entry.id in ids:
                raise LedgerError(f"the ledger already has an entry {entry.id!r}; remove it or choose another id")
            ids.add(entry.id)
            ratio = norm_limit(entry.info.method, entry.info.config) if max_norm_ratio is None else max_norm_ratio
            for name, update in entry.patch.updates.items():
                updates.setdefault(name, []).append((update, ratio))
        self._check_unchanged(updates)
        plans = []
        # Compute every sum and every hook before the first write: most errors then leave nothing to restore.
        for name, new in updates.items():
            safe_point()
            weight = find_weight(self.model, name)
            plans.append((weight, plan_extended(weight, self._sums.get(name), new, self.spacing)))
        stacks = adapter_hooks.stacks_with(self._stacks, [entry.patch.adapters for entry in entries])
        self._write_sums(plans)
        self._install_hooks(stacks)
        self._entries |= {entry.id: entry for entry in entries}
        self._next_order += len(entries)

    def _sum_again(self, names: Iterable[str], gone: set[str] | None) -> None:
        """Sum the named weights again without the entries `gone`; from the base on if `gone` is None."""
        plans = []
        for name in names:
            touching = [entry for entry in self._entries.values() if name in entry.patch.updates]
            kept = [entry.patch.updates[name] for entry in touching if not gone or entry.id not in gone]
            # Updates before the first removed one keep their sum, so that a snapshot of it can be used.
            first_gone = next(n for n, entry in enumerate(touching) if entry.id in gone) if gone else 0
            weight = find_weight(self.model, name)
            plans.append((weight, plan_recomputed(weight, self._sums[name], kept, first_gone, self.spacing)))
        self._write_sums(plans)

    def _write_sums(self, plans: list[tuple[Weight, SumPlan]]) -> None:
        """Write planned sums. After a failure, the transaction around the call rolls back what was written."""
        while plans:
            weight, plan = plans.pop()  # frees the plan's memory for the old bytes of the next weight
            self._save_old_bytes(weight)
            _write(weight.parameter, plan.weights)
            if plan.count:
                self._sums[weight.name] = plan.as_sum(weight.parameter)
            else:
                del self._sums[weight.name]

    def _install_hooks(self, stacks: adapter_hooks.Stacks) -> None:
        """Make the model's hooks those of `stacks`. After a failure, the transaction around the call rolls it back."""
        self._stacks = stacks
        adapter_hooks.install(self.model, self._hooks, stacks)

    def _save_old_bytes(self, weight: Weight) -> None:
        old = self._savepoints[-1].old
        if weight.name not in old:
            old[weight.name] = _copy_bytes(weight.parameter)

    def _begin(self, owner: transaction) -> None:
        self._roll_back_stale()
        if self._is_untouched:
            raise LedgerError("the ledger cannot change inside untouched(); leave the block first")
        self._savepoints.append(Savepoint(owner, self._entries, self._sums, self._stacks, self._next_order))

    def _roll_back_stale(self) -> None:
        while self._savepoints and self._savepoints[-1].is_stale:
            self._roll_back_last()

    def _commit(self, owner: transaction) -> None:  # noqa: ARG002 - it is the innermost one
        done, outer = self._savepoints[-1], self._savepoints[-2:-1]
        for each in outer:
            # The outer transaction may still roll back. Its own bytes are older, so they win.
            each.old = done.old | each.old
        self._savepoints.pop()

    def _roll_back(self, owner: transaction) -> None:
        """Roll back this transaction and those inside it; do nothing if it has ended already."""
        while any(saved.belongs_to(owner) for saved in self._savepoints):
            self._roll_back_last()

    def _roll_back_last(self) -> None:
        """Roll back to the newest savepoint, which stays until this is done: an exception may end it anywhere."""
        saved = self._savepoints[-1]
        self._entries, self._sums, self._next_order = saved.entries, saved.sums, saved.next_order
        try:
            self._restore_bytes(saved.old, saved.stacks)
        except LedgerError:
            if saved.has_failed:
                self._savepoints.pop()
            saved.has_failed = True
            raise
        self._savepoints.pop()

    def _restore_bytes(self, old: Mapping[str, Tensor], stacks: adapter_hooks.Stacks) -> None:
        """Write old bytes into the existing parameters, which needs no memory; then restore the hooks in any case."""
        failures: dict[str, Exception] = {}
        for name, weights in old.items():
            try:
                parameter = find_weight(self.model, name).parameter
                _write(parameter, weights)
                if held := self._sums.get(name):
                    self._sums[name] = replace(held, stamp=Stamp.of(parameter, held.stamp.checksum))
            except Exception as error:  # noqa: BLE001 - the other weights are restored first; raised below
                failures[name] = error
        try:
            self._install_hooks(stacks)
        except LedgerError as error:
            failures["hooks"] = error
        if failures:
            names, (first, *_) = ", ".join(failures), failures.values()
            raise LedgerError(f"could not restore {names}: {first}; ledger.restore() tries again") from first

    def _write_base(self) -> dict[str, Tensor] | None:
        """Write the base bytes and return the edited ones; do nothing and return None inside an outer block."""
        if self._is_untouched:
            return None
        # A separate transaction: if the model has moved, the check sums again on its new device. The bytes that the
        # second transaction saves are then those of the new sum.
        with self.transaction():
            self._check_unchanged(())
        with self.transaction():
            for name, held in self._sums.items():
                weight = find_weight(self.model, name)
                self._save_old_bytes(weight)
                _write(weight.parameter, held.base)
            edited = {name: self._savepoints[-1].old[name] for name in self._sums}
            adapter_hooks.install(self.model, self._hooks, self._stacks, disabled=True)
        self._is_untouched = True
        return edited

    def _write_edited(self, edited: dict[str, Tensor] | None) -> None:
        """Undo `_write_base`, given what it returned."""
        if edited is not None:
            self._is_untouched = False
            self._restore_bytes(edited, self._stacks)

    # --- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        model = memo.get(id(self.model))
        if model is None:  # the copy reached the ledger before the model: copy the model, and its ledger with it
            return Ledger.of(copy.deepcopy(self.model, memo))
        twin = memo[id(self)] = Ledger(model)
        twin.spacing, twin._next_order = self.spacing, self._next_order
        if not self._is_untouched:  # else the copied weights are the base bytes, and the copy has no entries
            # Entries and sums are immutable, so that both ledgers may share them.
            twin._entries, twin._sums, twin._stacks = dict(self._entries), dict(self._sums), self._stacks
        twin._hooks = copy.deepcopy(self._hooks, memo)
        if self._is_untouched:
            adapter_hooks.install(model, twin._hooks, {})
        return twin

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None when pickled with the model: the weights of the unpickled model are its base."""
        return type(None), ()


def _copy_bytes(parameter: nn.Parameter) -> Tensor:
    with arithmetic.plain_arithmetic(parameter.device.type):
        return parameter.detach().clone()


def _write(parameter: nn.Parameter, weights: Tensor) -> None:
    """Write a weight in place, so that ties, hooks and optimisers keep their parameter. Only this function writes."""
    with arithmetic.plain_arithmetic(parameter.device.type):
        parameter.copy_(weights)
