"""WISE's memory: changed copies of one linear map, and the routing that chooses one of them per row.

    output of a row = W' x  for the shard W' that the row is routed to,  else the map's own output

(Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models".) Each
edit adds a change to the newest shard, the side copy. After `save_freq` edits the shard becomes a memory and the next
edit begins a new shard at zero. `merge_freq / save_freq` memories become one (ties.py). A row's distance to a shard is

    d = mean over tokens of || act(W' x) - act(W x) ||,  the largest token's if there are more than 100

and its threshold is `act_ratio` times the smallest distance that its edits had at the end of their training. The side
copy comes first, if its distance reaches its threshold. A memory takes its place if its distance is larger and above
its own threshold.

Example: `save_freq` 2, `merge_freq` 4, edits a to e in this order.

    after      a        b        c        d        e
    side       {a}      -        {c}      -        {e}
    memories   -        {ab}     {ab}     {abcd}   {abcd}    merged

A record names its shard by number, so that undoing a leaves b where it was, and the memories are those of the edits
that are left, in their order. Routing reads the whole row. So a row that is scored must end where it is read, and rows
of a cache, one token each, are routed by that token alone.

In merge mode (`retrieve` false) there is one merged copy and the side copy. A row gets the more distant of the two, or
neither if both are below the threshold. Memories that wait for their merge do not act.

Legend: W (d_out, d_in); b rows, t tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.side_memory.beside_map import check_site, require_rows
from errata.editors.core.side_memory.sparse_change import SparseChange, added, total
from errata.editors.core.side_memory.ties import ties

LONG = 100  # tokens of a row beyond which the largest distance counts, a constant of the authors' code
MERGED = 0.6  # weight of what is merged already, in merge mode; the shards share the rest
NONE = -1  # the route of a row that keeps the map's own output


@dataclass(frozen=True)
class ShardRule:
    """How edits are stored and rows are routed, the same for all edits of a module.

    Attributes:
        save_freq: Edits of a shard.
        merge_freq: Edits whose shards become one.
        retrieve: Whether every memory is asked; else there is one, into which the others are merged.
        densities: Share of a shard's elements that a merge keeps.
        act_ratio: Share of the smallest distance in training that a row must reach.
        activation: Name of the model's activation, through which outputs are compared.
        side_bars: Whether a side copy that was not chosen still keeps out memories that are less distant.
    """

    save_freq: int
    merge_freq: int
    retrieve: bool
    densities: float
    act_ratio: float
    activation: str
    side_bars: bool


class ShardPart(NamedTuple):
    """What an edit adds to one shard: its change, of `count` requests, and the smallest distance in training."""

    shard: int
    count: int
    min_act: float
    change: SparseChange


@dataclass(frozen=True, eq=False)
class ShardUpdate(Adapter):
    """The record of one edit: what it adds to one shard or to several.

    Attributes:
        parts: One per shard.
        rule: The same for all edits of a module.
        reads: Name of the map whose input x is; None for the record's own module.
    """

    parts: tuple[ShardPart, ...]
    rule: ShardRule
    reads: str | None = None

    kind: ClassVar[str] = "wise"
    acts_by_row: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the map."""
        return self.parts[0].change.shape

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        named = [part.change.named(str(i)) for i, part in enumerate(self.parts)]
        return {name: tensor for tensors in named for name, tensor in tensors.items()}

    @property
    def numbers(self) -> Mapping[str, Any]:
        parts = [{"shard": p.shard, "count": p.count, "min_act": p.min_act} for p in self.parts]
        read = {} if self.reads is None else {"reads": self.reads}
        return {"shape": list(self.shape), "parts": parts, **asdict(self.rule), **read}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            d_out, d_in = numbers["shape"]
            rule = ShardRule(**{each.name: numbers[each.name] for each in fields(ShardRule)})
            changes = [SparseChange.from_tensors(tensors, str(i), (d_out, d_in)) for i in range(len(numbers["parts"]))]
            given = zip(numbers["parts"], changes, strict=True)
            parts = tuple(ShardPart(p["shard"], p["count"], p["min_act"], change) for p, change in given)
            return cls(parts, rule, numbers.get("reads"))
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"expected the parts of an edit of WISE, got others: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        parts: list[ShardPart] = []
        for part in (part for adapter in adapters for part in adapter.parts):
            last = parts[-1] if parts else None
            if last is None or last.shard != part.shard or not last.change.has_mask_of(part.change):
                parts.append(part)
                continue
            change = last.change.plus(part.change)
            parts[-1] = ShardPart(part.shard, last.count + part.count, min(last.min_act, part.min_act), change)
        return replace(adapters[0], parts=tuple(parts))

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> Shards:
        return Shards(adapters[0].rule, (), reads=adapters[0].reads).extended(adapters)

    def check(self, module: nn.Module) -> None:
        check_site(module, self.shape, self.reads)

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return sum(float(part.change.values.double().norm()) ** 2 for part in self.parts) ** 0.5


@dataclass(frozen=True, eq=False)
class Shard:
    """The edits of one shard.

    Attributes:
        number: Counted from 0 in the order in which shards were begun.
        count: Edits.
        min_act: Smallest distance in training.
        changes: Their sum, as one change per mask.
    """

    number: int
    count: int
    min_act: float
    changes: tuple[SparseChange, ...]


class Memory(NamedTuple):
    """One changed copy that rows can be routed to: W' - W (d_out, d_in) and the least distance of its rows."""

    delta: Tensor
    threshold: float


@dataclass(frozen=True, eq=False)
class Shards(Folded):
    """The memory of one module after some edits. It is immutable: `extended` returns a new one.

    Attributes:
        rule: That of all edits.
        shards: In the order of their numbers.
        made: Matrices that have been multiplied out, by the shards that they are made of. The newest state has them.
        reads: Name of the map whose input is read; None for the memory's own module.
    """

    rule: ShardRule
    shards: tuple[Shard, ...]
    made: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    reads: str | None = None

    kind: ClassVar[str] = "wise"

    def extended(self, adapters: Sequence[ShardUpdate]) -> Shards:
        shards = {shard.number: shard for shard in self.shards}
        device = adapters[-1].parts[-1].change.values.device
        with arithmetic.plain_arithmetic(device.type):
            for adapter in adapters:
                if adapter.rule != self.rule:
                    raise LedgerError(f"expected the rule of the module's other edits, {self.rule}, got {adapter.rule}")
                if adapter.reads != self.reads:
                    raise LedgerError(f"expected an edit that reads {self.reads}, as others do, got {adapter.reads}")
                for part in adapter.parts:
                    old = shards.get(part.shard, Shard(part.shard, 0, part.min_act, ()))
                    changes = added(tuple(c.to(device) for c in old.changes), part.change.to(device))
                    least = min(old.min_act, part.min_act)
                    shards[part.shard] = Shard(part.shard, old.count + part.count, least, changes)
        made, kept = dict(self.made), set(shards.values())
        self.made.clear()  # memory holds the matrices of one state; this one makes them again if it comes back
        known = {key: matrix for key, matrix in made.items() if kept.issuperset(_members(key))}
        return replace(self, shards=tuple(shards[number] for number in sorted(shards)), made=known)

    def to(self, device: torch.device) -> Shards:
        if all(change.values.device == device for shard in self.shards for change in shard.changes):
            return self
        moved = [replace(shard, changes=tuple(c.to(device) for c in shard.changes)) for shard in self.shards]
        return replace(self, shards=tuple(moved), made={})

    # --- what acts --------------------------------------------------------------------------------------------------

    @property
    def open_shard(self) -> Shard | None:
        """The shard that the next edit adds to; None if it begins a new one."""
        last = self.shards[-1] if self.shards else None
        return last if last is not None and last.count < self.rule.save_freq else None

    @property
    def next_number(self) -> int:
        """Number of the next new shard."""
        return self.shards[-1].number + 1 if self.shards else 0

    def delta(self, shard: Shard) -> Tensor:
        """Return the sum of a shard's changes, (d_out, d_in)."""
        if shard not in self.made:
            self.made[shard] = total(shard.changes)
        return self.made[shard]

    def memories(self) -> list[Memory]:
        """Return the copies that rows can be routed to: the side copy, then the memories, oldest first."""
        side = self.open_shard
        groups, waiting = self._groups([shard for shard in self.shards if shard is not side])
        found = [] if side is None else [(self.delta(side), side.min_act)]
        if self.rule.retrieve:
            found += [(self._merged(group), min(shard.min_act for shard in group)) for group in groups]
            found += [(self.delta(shard), shard.min_act) for shard in waiting]
        else:
            least = min(shard.min_act for shard in self.shards)
            merged = self._merged_into_one(groups)
            found = [(delta, least) for delta in ([] if side is None else [self.delta(side)]) + merged]
        return [Memory(delta, self.rule.act_ratio * least) for delta, least in found]

    def _groups(self, closed: Sequence[Shard]) -> tuple[list[tuple[Shard, ...]], list[Shard]]:
        """Return the closed shards that are merged together, as groups, and those that wait for their merge."""
        size = self.rule.merge_freq // self.rule.save_freq
        groups: dict[int, list[Shard]] = {}
        for shard in closed:
            groups.setdefault(shard.number // size, []).append(shard)
        last = self.shards[-1].number if self.shards else 0
        waiting = [
            number for number, group in groups.items() if last // size == number and group[-1].number % size < size - 1
        ]
        whole = [tuple(group) for number, group in groups.items() if number not in waiting]
        return whole, [shard for number in waiting for shard in groups[number]]

    def _merged(self, group: tuple[Shard, ...]) -> Tensor:
        if group not in self.made:
            deltas = [self.delta(shard) for shard in group]
            self.made[group] = ties(deltas, [1 / len(group)] * len(group), self.rule.densities)
            for shard in group:
                del self.made[shard]
        return self.made[group]

    def _merged_into_one(self, groups: Sequence[tuple[Shard, ...]]) -> list[Tensor]:
        """Return what merge mode has merged: every group, with what was merged before it; nothing before the first."""
        merged: list[Tensor] = []
        done: tuple[Shard, ...] = ()
        for group in groups:
            done = (*done, *group)
            if ("all", *done) not in self.made:
                share = 1 - MERGED if merged else 1.0
                weights = [share / len(group)] * len(group) + [MERGED] * len(merged)
                deltas = [total(shard.changes) for shard in group] + merged
                self.made["all", *done] = ties(deltas, weights, self.rule.densities)
            merged = [self.made["all", *done]]
        return merged

    # --- the forward pass -------------------------------------------------------------------------------------------

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        require_rows("WISE", module, x)
        memories = self.memories()
        if not memories:
            return None
        changes = [linear(x, memory.delta.to(x.dtype)) for memory in memories]
        own = activated(output, self.rule.activation)
        distances = [row_distance(activated(output + c, self.rule.activation), own) for c in changes]
        route = self.route(distances, [memory.threshold for memory in memories])
        if not bool((route != NONE).any()):
            return None
        for index, change in enumerate(changes):
            output = torch.where((route == index)[:, None, None], output + change, output)
        return output

    def route(self, distances: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
        """Return the memory that each row is routed to, (b,); NONE where it keeps the map's own output.

        Args:
            distances: Each memory's distance of each row, (b,) each.
            thresholds: Each memory's least distance.
        """
        route = torch.full_like(distances[0], NONE, dtype=torch.int64)
        farthest = torch.zeros_like(distances[0])
        has_side = self.open_shard is not None
        if not self.rule.retrieve:
            near = torch.stack([d < t for d, t in zip(distances, thresholds, strict=True)]).all(0)
            return torch.where(near, route, torch.stack(list(distances)).argmax(0))
        for index, (d, threshold) in enumerate(zip(distances, thresholds, strict=True)):
            is_side = has_side and index == 0
            chosen = d >= threshold if is_side else (d > farthest) & (d > threshold)
            route = torch.where(chosen, index, route)
            farthest = torch.where(chosen | (is_side and self.rule.side_bars), d, farthest)
        return route

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        memories = self.memories()
        return {
            **{f"delta{i}": memory.delta for i, memory in enumerate(memories)},
            "thresholds": torch.tensor([memory.threshold for memory in memories], dtype=torch.float64),
        }

    @property
    def kept_tensors(self) -> Sequence[Tensor]:
        sparse = [t for shard in self.shards for change in shard.changes for t in change.tensors]
        return [*sparse, *self.made.values()]

    @property
    def looks_ahead(self) -> bool:
        return True


def _members(key: Any) -> Iterable[Shard]:
    return (each for each in (key if isinstance(key, tuple) else (key,)) if isinstance(each, Shard))


def activated(output: Tensor, activation: str) -> Tensor:
    """Return the activation of a map's output, in the working dtype."""
    from transformers.activations import ACT2FN

    return ACT2FN[activation](output.to(working_dtype(output.dtype)))


def row_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of each row of a and b (rows, t, d_out), (rows,): the mean over tokens, or the largest."""
    norms = (a - b).norm(dim=-1)
    return norms.amax(1) if norms.shape[1] > LONG else norms.mean(1)
