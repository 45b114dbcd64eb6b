"""The savepoint of a transaction: what the ledger needs to roll back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor

from errata.editors.core.ledger.adapter_hooks import Stacks
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.interrupts import transaction
from errata.editors.core.ledger.weight_sums import Sum


class Savepoint:
    """What a transaction needs to roll back: the ledger's state at its start, and the old bytes of weights written."""

    def __init__(
        self,
        owner: transaction,
        entries: Mapping[str, Entry],
        sums: Mapping[str, Sum],
        stacks: Stacks,
        next_order: int,
    ) -> None:
        self._owner = weakref.ref(owner)
        self.entries, self.sums, self.stacks, self.next_order = dict(entries), dict(sums), stacks, next_order
        self.old: dict[str, Tensor] = {}
        self.has_failed = False  # rolling back has failed once

    def belongs_to(self, owner: transaction) -> bool:
        """Return whether this transaction made the savepoint."""
        return self._owner() is owner

    @property
    def is_stale(self) -> bool:
        """Whether the transaction has ended, and an exception from another thread kept it from rolling back."""
        owner = self._owner()
        return owner is None or owner.is_over
