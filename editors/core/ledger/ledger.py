"""The ledger: one ordered list of patches over a model's untouched weights, and the only writer of weights and hooks.

    ledger = Ledger.of(model)
    ledger.append("e1", patch_1)
    ledger.append("e2", patch_2)
    ledger.remove("e1")                 # the bits of a model to which only patch_2 was ever applied

The weights are always base + p1 + p2 + ..., summed in that order by the operations in arithmetic.py. Undoing an entry,
in any order, repeats the sum without it; nothing is ever subtracted. A patch may also hold adapters, records that act
in the forward pass of a module: what they make together in that order is the module's one hook (adapter_hooks.py).
Whatever fails (bad patch, NaN, no memory, Ctrl-C) leaves model and ledger as they were before the call.

Memory, for each parameter that an entry touches: its base bytes, for 16-bit weights the float32 sum, and at most
`spacing.kept` earlier sums, so that undoing a late entry among thousands repeats few of them. Plus the factors of the
entries. Nothing for other parameters. While an operation runs, twice the weights that it changes. One thread at a time.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from errata.editors.core.config import EditorConfig
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger import adapter_hooks, arithmetic
from errata.editors.core.ledger.adapter import Folded
from errata.editors.core.ledger.entry import EditInfo, Entry, Weight, find_weight, make_entry
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible, safe_point, transaction
from errata.editors.core.ledger.patch import Patch, Update
from errata.editors.core.ledger.weight_sums import Spacing, Stamp, Sum, SumPlan, extended, repeated

ATTRIBUTE = "_errata_ledger"


class _Journal:
    """What takes a transaction back: the ledger as it was, and the old bytes of the weights written since."""

    def __init__(self, ledger: Ledger) -> None:
        self.entries, self.sums, self.stacks = dict(ledger._entries), dict(ledger._sums), ledger._stacks
        self.next_order = ledger._next_order
        self.old: dict[str, Tensor] = {}


class Ledger:
    """The patches that a model carries. Get it by `Ledger.of(model)`: one a model, kept on the model itself.

    `spacing` says how often a sum is kept aside, and how many of these.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._entries: dict[str, Entry] = {}
        self._sums: dict[str, Sum] = {}
        self._stacks: adapter_hooks.Stacks = {}  # replaced, never written, so that a journal can hold it
        self._hooks: dict[str, adapter_hooks.Hook] = {}
        self._journals: list[_Journal] = []
        self._next_order = 0
        self._bare = False
        self.spacing = Spacing()

    @classmethod
    def of(cls, model: nn.Module) -> Ledger:
        """The model's ledger; a new one if it has none.

        It is a plain attribute of the model: not in `state_dict`, not saved by `save_pretrained`, dropped by pickling.
        `copy.deepcopy(model)` gives the copy a ledger of its own.
        """
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
        """The model, which the ledger does not keep alive."""
        model = self._model()
        if model is None:
            raise LedgerError("the ledger's model no longer exists; keep a reference to the model")
        return model

    @property
    def entries(self) -> tuple[Entry, ...]:
        """In the order of the sum."""
        return tuple(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:  # noqa: A002
        return id in self._entries

    def __repr__(self) -> str:
        places = f"{len(self._sums)} parameters and {len(self._stacks)} modules"
        return f"Ledger({len(self)} entries over {places}, {self.nbytes() / 2**20:.1f} MiB)"

    def folded(self, module: str) -> Folded | None:
        """What the adapters of a module make together; None where there is none."""
        stack = self._stacks.get(adapter_hooks.find_module(self.model, module)[0])
        return stack.top if stack else None

    def base(self, name: str) -> Tensor:
        """The untouched bytes of a weight, as the model stores it. Not a copy: leave them as they are."""
        weight = find_weight(self.model, name)
        held = self._sums.get(weight.name)
        return weight.parameter.detach() if held is None else held.base

    def nbytes(self) -> int:
        """Bytes held between operations: base bytes, sums, snapshots, hooks, and the entries' tensors and state."""
        kept = [t for entry in self.entries for _, t in entry.patch.tensors]
        kept += [t for entry in self.entries for t in entry.state.values()]
        made = [t for held in self._sums.values() for t in held.tensors]
        made += [t for stack in self._stacks.values() for _, folded in stack.states for t in folded.held]
        # A sum and its newest snapshot may be one tensor, and states of a codebook share memory.
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
        """Put a patch on top of the others.

        Args:
            id: The entry's name, new to this ledger.
            patch: Updates by parameter name, (d_out, d_in) whichever way round the model stores the weight. A weight
                may go by any of its tied names. Adapters by module name. Copied, so that the caller may reuse the
                tensors.
            info: What the edit answers and how it was found, of values that JSON can hold.
            state: Tensors that the method wants to find in the entry while it is here. Copied.
            max_norm_ratio: Refuse an update whose Frobenius norm exceeds this many times its weight's.

        Raises:
            LedgerError: id taken or empty; unknown or uneditable parameter or module; wrong shape; adapters that
                cannot share a module; an info that JSON cannot hold; weights changed by somebody else; called inside
                `untouched()`.
            NumericalError: NaN or inf in the patch or in the weights it would give; exploded norm.
        """
        with self.transaction():
            entry = make_entry(self.model, id, patch, info, self._next_order, state)
            self._put_on_top([entry], max_norm_ratio)
        return entry

    def extend(self, entries: Iterable[Entry]) -> None:
        """Append entries that a ledger over the same base held, at the price of one sum a parameter: all of them or, on
        any error, none. Raises as `append`; norms are not looked at again."""
        with self.transaction():
            made = [
                make_entry(self.model, given.id, given.patch, given.info, self._next_order + place, given.state)
                for place, given in enumerate(entries)
            ]
            self._put_on_top(made, math.inf)

    def remove(self, id: str) -> None:  # noqa: A002
        """Undo one entry, whichever: the model is then bit for bit as if it had never been appended."""
        self.remove_many([id])

    def remove_many(self, ids: Iterable[str]) -> None:
        """Undo several entries at the price of one: all of them or, on any error, none.

        Raises:
            LedgerError: an id that the ledger does not hold; weights changed by somebody else; inside `untouched()`.
        """
        with self.transaction():
            gone = set(ids)
            if unknown := sorted(map(repr, gone - self._entries.keys())):
                raise LedgerError(f"no entry {', '.join(unknown)} among the {len(self)} of this ledger")
            names = sorted({name for id_ in gone for name in self._entries[id_].patch.updates})
            self._check_unchanged(names)
            adapters = {id_: entry.patch.adapters for id_, entry in self._entries.items()}
            stacks = adapter_hooks.repeated(self._stacks, adapters, gone)
            self._repeat(names, gone)
            self._hang(stacks)
            self._entries = {id_: entry for id_, entry in self._entries.items() if id_ not in gone}

    def clear(self) -> None:
        """Undo every entry: the model holds its base bytes, and the ledger nothing."""
        self.remove_many(list(self._entries))

    def transaction(self) -> AbstractContextManager[None]:
        """`with ledger.transaction():` what is appended and removed inside happens completely or, on any exception,
        not at all. Nests. Ctrl-C waits for a `safe_point` or the end, and at a safe point undoes the transaction.

        Holds a copy of each weight that it changes until it ends.
        """
        return transaction(self._begin, self._commit, self._take_back)

    def untouched(self) -> AbstractContextManager[object]:
        """`with ledger.untouched():` base bytes and no hook of ours at work inside, and the edits again afterwards,
        whatever happens.

        The ledger refuses to change inside; what others write to edited weights inside is lost. Nests. Ctrl-C is
        prompt inside, or waits for a `safe_point` where an outer block defers it. Holds a copy of the edited weights.
        """
        return reversible(self._lay_bare, self._cover)

    def rebase(self) -> None:
        """Take the present weights and hooks as the new base and forget all entries, which then cannot be undone."""
        with deferred_interrupts():
            if self._bare or self._journals:
                raise LedgerError("rebase() cannot be taken back: leave untouched() and transactions first")
            self._entries, self._sums, self._stacks, self._hooks = {}, {}, {}, {}

    def restore(self) -> None:
        """Write base + entries over whatever somebody else has made of the edited weights, and hang hooks up again.

        Raises:
            LedgerError: a weight has another dtype or shape now, so that its base no longer fits.
        """
        with self.transaction():
            self._check_kinds()
            self._repeat(sorted(self._sums), None)
            self._hang(self._stacks)

    # --- noticing strangers -----------------------------------------------------------------------------------------

    def _check_kinds(self) -> None:
        for name, held in self._sums.items():
            parameter = find_weight(self.model, name).parameter
            now, then = (parameter.dtype, tuple(parameter.shape)), (held.base.dtype, tuple(held.base.shape))
            if now != then:
                raise LedgerError(
                    f"{name} was {then} when it was edited and is {now} now; convert it back, or accept it as it is "
                    "with ledger.rebase(), which forgets the entries"
                )

    def _check_unchanged(self, soon_written: Iterable[str]) -> None:
        """Refuse weights that somebody else has changed, and follow those that have moved to another device.

        All edited weights are looked at; bytes are read of those that look changed, or are about to be written
        (`parameter.data` can be written without a trace).
        """
        self._check_kinds()
        soon, moved = set(soon_written), []
        for name, held in self._sums.items():
            parameter = find_weight(self.model, name).parameter
            if held.stamp.looks_like(parameter) and name not in soon:
                continue
            if arithmetic.checksum(parameter) != held.stamp.checksum:
                raise LedgerError(
                    f"{name} was changed by somebody else since the last edit. ledger.restore() writes the edited "
                    "weights over it; ledger.rebase() accepts it as the new base and forgets the entries"
                )
            self._sums[name] = replace(held, stamp=Stamp.of(parameter, held.stamp.checksum))
            if parameter.device != held.base.device:
                moved.append(name)
        # Another device may round differently: repeated there, the sum is what a fresh model would get there.
        self._repeat(moved, None)

    # --- writing: in place, and old bytes aside first ---------------------------------------------------------------

    def _put_on_top(self, entries: Sequence[Entry], max_norm_ratio: float) -> None:
        updates: dict[str, list[Update]] = {}
        ids = set(self._entries)
        for entry in entries:
            if entry.id in ids:
                raise LedgerError(f"the ledger holds an entry {entry.id!r} already; remove it or choose another id")
            ids.add(entry.id)
            for name, update in entry.patch.updates.items():
                updates.setdefault(name, []).append(update)
        self._check_unchanged(updates)
        plans = []
        for name, new in updates.items():
            safe_point()
            weight = find_weight(self.model, name)
            plans.append((weight, extended(weight, self._sums.get(name), new, self.spacing, max_norm_ratio)))
        stacks = adapter_hooks.extended(self._stacks, [entry.patch.adapters for entry in entries])
        self._install(plans)
        self._hang(stacks)
        self._entries |= {entry.id: entry for entry in entries}
        self._next_order += len(entries)

    def _repeat(self, names: Iterable[str], gone: set[str] | None) -> None:
        """Sum again without `gone`; from the very base if that is None."""
        plans = []
        for name in names:
            touching = [entry for entry in self._entries.values() if name in entry.patch.updates]
            kept = [entry.patch.updates[name] for entry in touching if not gone or entry.id not in gone]
            first_gone = next(n for n, entry in enumerate(touching) if entry.id in gone) if gone else 0
            weight = find_weight(self.model, name)
            plans.append((weight, repeated(weight, self._sums[name], kept, first_gone, self.spacing)))
        self._install(plans)

    def _install(self, plans: list[tuple[Weight, SumPlan]]) -> None:
        """Write what was planned. The transaction around it takes back what was written before a failure."""
        while plans:
            weight, plan = plans.pop()  # gives its memory to the old bytes of the next
            self._keep_aside(weight)
            _write(weight.parameter, plan.weights)
            if plan.count:
                self._sums[weight.name] = plan.written(weight.parameter)
            else:
                del self._sums[weight.name]

    def _hang(self, stacks: adapter_hooks.Stacks) -> None:
        """Let the model's hooks do what was planned. The transaction around it takes it back after a failure."""
        self._stacks = stacks
        adapter_hooks.install(self.model, self._hooks, stacks)

    def _keep_aside(self, weight: Weight) -> None:
        old = self._journals[-1].old
        if weight.name not in old:
            old[weight.name] = _bytes_of(weight.parameter)

    def _begin(self) -> None:
        if self._bare:
            raise LedgerError("the ledger cannot change inside untouched(); leave the block first")
        self._journals.append(_Journal(self))

    def _commit(self) -> None:
        done = self._journals.pop()
        if self._journals:
            self._journals[-1].old = done.old | self._journals[-1].old

    def _take_back(self) -> None:
        journal = self._journals.pop()
        self._entries, self._sums, self._next_order = journal.entries, journal.sums, journal.next_order
        self._put_back(journal.old, journal.stacks)

    def _put_back(self, old: Mapping[str, Tensor], stacks: adapter_hooks.Stacks) -> None:
        """Write old bytes again: into memory that is there, so that it cannot run out. Then the hooks, in any case."""
        failures: dict[str, Exception] = {}
        for name, weights in old.items():
            try:
                parameter = find_weight(self.model, name).parameter
                _write(parameter, weights)
                if held := self._sums.get(name):
                    self._sums[name] = replace(held, stamp=Stamp.of(parameter, held.stamp.checksum))
            except Exception as error:  # noqa: BLE001 - the other weights are put back all the same; raised below
                failures[name] = error
        try:
            self._hang(stacks)
        except LedgerError as error:
            failures["hooks"] = error
        if failures:
            names, (first, *_) = ", ".join(failures), failures.values()
            raise LedgerError(f"could not put back {names}: {first}; ledger.restore() tries again") from first

    def _lay_bare(self) -> dict[str, Tensor] | None:
        """Write the base bytes; gives the edited ones. None if an outer block has done so."""
        if self._bare:
            return None
        # A transaction of its own: on another device the check sums again, and what is kept aside is what that gives.
        with self.transaction():
            self._check_unchanged(())
        with self.transaction():
            for name, held in self._sums.items():
                weight = find_weight(self.model, name)
                self._keep_aside(weight)
                _write(weight.parameter, held.base)
            edited = {name: self._journals[-1].old[name] for name in self._sums}
            adapter_hooks.install(self.model, self._hooks, self._stacks, asleep=True)
        self._bare = True
        return edited

    def _cover(self, edited: dict[str, Tensor] | None) -> None:
        if edited is not None:
            self._bare = False
            self._put_back(edited, self._stacks)

    # --- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        model = memo.get(id(self.model))
        if model is None:  # reached before the model was: copy that, and its ledger with it
            return Ledger.of(copy.deepcopy(self.model, memo))
        twin = memo[id(self)] = Ledger(model)
        twin.spacing, twin._next_order = self.spacing, self._next_order
        if not self._bare:  # else the copy holds the base bytes: it is a model without entries
            # Entries and sums are never written, so that both ledgers may hold the same.
            twin._entries, twin._sums, twin._stacks = dict(self._entries), dict(self._sums), self._stacks
        twin._hooks = copy.deepcopy(self._hooks, memo)
        if self._bare:
            adapter_hooks.install(model, twin._hooks, {})
        return twin

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickled with its model, a ledger becomes None: the copy's weights are its base."""
        return type(None), ()


def _bytes_of(parameter: nn.Parameter) -> Tensor:
    with arithmetic.plain_arithmetic(parameter.device.type):
        return parameter.detach().clone()


def _write(parameter: nn.Parameter, weights: Tensor) -> None:
    """The one place where weights are written: in place, so that ties, hooks and optimisers keep their parameter."""
    with arithmetic.plain_arithmetic(parameter.device.type):
        parameter.copy_(weights)
