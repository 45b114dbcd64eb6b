"""GRACE's codebook: keys with a radius each, and the values that a module gives where its input lies near one of them.

    h(x) = v_i    if ||x - k_i|| <= eps_i for the key k_i nearest to x,    else the module's own output

(Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", section 3.) The
module defers to itself wherever no key is near. A new edit with query q, the key k_i nearest to it at distance d, and
the radius eps that new keys get, changes the codebook by the paper's rules (algorithm 1):

    new       d > eps + eps_i           k = q with radius eps
    split     the answers differ        k = q with radius d / 2, and eps_i = d / 2 - min(1e-5, d / 4)
    expand    they agree, d > eps_i     eps_i = d ("coverage"), or also k_i half way to q ("moving_average")
    keep      they agree, d <= eps_i    no radius changes
    revise    d is 0, they differ       the key answers anew. Not in the paper: split, both radii would be 0 and both
                                        keys deaf, where a user has only corrected an answer once more

In the last three the edit's value takes the place of v_i. Answers are equal if their token ids are; the authors' code
compares the means of the ids. Their split has no d / 4: keys nearer than 2e-5 would leave the older one without reach.

A query computed again, in a batch of another shape, differs in its last bits. So "0" and "<=" allow for that much:
`rounding` times the length of the key, or of a query that it was to answer, too.

Where it lies: the codebook follows the hidden state. When the model has moved, its hook takes keys, radii and values
along, at the next forward pass; until then a query comes to the codebook. Distances are taken in the dtype of the first
correction's key, the working dtype of the model as it was then (float64 for float64, else float32), whatever the model
is turned into afterwards; values are given in the dtype of the module's output. A model that is made less precise than
its edits were computed in has queries that differ by more than their rounding: its keys are met as far as radii reach.

Legend: n keys; d, d_v widths of the module's input and output; q, k (d,); v (d_v,); eps radius; m positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from errata.editors.core.codebook.growing_matrix import GrowingMatrix
from errata.editors.core.codebook.position_rule import Replacement, looks_ahead, spread_keys
from errata.editors.core.errors import ArchitectureError, LedgerError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.model.architecture import is_transposed

Expansion = Literal["coverage", "moving_average"]
Rule = Literal["new", "split", "expand", "keep", "revise"]
# What the authors' code takes off the older radius of a split, so that no query lies within both; at most a quarter of
# the distance here.
GAP = 1e-5
# Products held at a time, queries x keys: 2^24 in float32 are 64 MiB.
PRODUCTS = 1 << 24
# Squared distances by way of products are off by this share of the squared lengths at most, TF32 included. They say
# which positions and which keys may be near, with some to spare; these distances are then taken by subtraction.
DOUBT = 1e-3
CANDIDATES = 32
# Records that are compared with all keys at a time, when many are replayed.
GROUP = 256


@dataclass(frozen=True, eq=False)
class Correction(Adapter):
    """What one edit adds to a codebook: of each of its m requests the query, the value and the answer.

    Attributes:
        keys: (m, d) inputs of the module at the key's position.
        values: (m, d_v) outputs that make the model give the answers.
        labels: Token ids of the answers.
        eps: Radius of a new key.
        replacement: Which positions a key that is met replaces, see `spread_keys`.
        eps_expand: How an older key with the same answer grows.
        rounding: By how much of its length a query may differ when it is computed again.
    """

    keys: Tensor
    values: Tensor
    labels: tuple[tuple[int, ...], ...]
    eps: float
    replacement: Replacement
    eps_expand: Expansion
    rounding: float

    kind: ClassVar[str] = "grace"

    def __post_init__(self) -> None:
        if self.keys.ndim != 2 or self.values.ndim != 2 or not len(self.keys) == len(self.values) == len(self.labels):
            shapes = f"{tuple(self.keys.shape)}, {tuple(self.values.shape)} and {len(self.labels)} labels"
            raise LedgerError(f"expected keys (m, d), values (m, d_v) and m labels, got {shapes}")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {"labels": [list(label) for label in self.labels], **self._settings}

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("eps", "replacement", "eps_expand", "rounding")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            settings = {name: value for name, value in numbers.items() if name != "labels"}
            labels = tuple(tuple(label) for label in numbers["labels"])
            return cls(tensors["keys"], tensors["values"], labels, **settings)
        except (KeyError, TypeError) as error:
            raise LedgerError(f"these are not the parts of a correction of a codebook: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        first = adapters[0]
        if any(adapter._settings != first._settings for adapter in adapters):
            raise LedgerError("corrections of one edit have one radius and one replacement")
        keys, values = (torch.cat([getattr(a, name) for a in adapters]) for name in ("keys", "values"))
        return replace(first, keys=keys, values=values, labels=tuple(label for a in adapters for label in a.labels))

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> Codebook:
        return Codebook.empty(adapters[0]).extended(adapters)

    def check(self, module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        expected = shape[::-1] if is_transposed(module) else shape
        if expected != (self.values.shape[1], self.keys.shape[1]):
            found = f"d = {self.keys.shape[1]}, d_v = {self.values.shape[1]}"
            raise LedgerError(f"expected a linear map of weight (d_v, d) for {found}, got one of {expected}")

    def to(self, device: torch.device) -> Correction:
        """On another device; `self` where it is there."""
        if self.keys.device == device == self.values.device:
            return self
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))

    def norm(self) -> float:
        """Frobenius norm of the values."""
        return float(self.values.double().norm())


Record = tuple[Correction, int]  # and the place of the request in it


class Decision(NamedTuple):
    """Which rule an edit falls under, and its nearest key (-1 where there is none) and distance from it."""

    rule: Rule
    nearest: int
    distance: float


@dataclass(frozen=True, eq=False)
class Codebook(Folded):
    """The codebook of one module after some corrections. Never changed: an older one stays as it was.

    Attributes:
        rows: (n, d) the keys.
        radii: (n,) eps of each.
        slack: (n,) what is allowed for rounding.
        slots: (n,) which record holds each key's value and label; on the CPU.
        records: (correction, place in it) in the order of the ledger; shared, the first `count` are this codebook's.
        replacement: That of all corrections.
    """

    rows: GrowingMatrix
    radii: Tensor
    slack: Tensor
    slots: Tensor
    records: list[Record]
    count: int
    replacement: Replacement

    kind: ClassVar[str] = "grace"

    @classmethod
    def empty(cls, like: Correction) -> Codebook:
        """Without keys, for corrections like this one."""
        none = like.keys.new_empty(0)
        rows = GrowingMatrix.empty(like.keys)
        return cls(rows, none, none, torch.empty(0, dtype=torch.int64), [], 0, like.replacement)

    @property
    def keys(self) -> Tensor:
        """(n, d)."""
        return self.rows.matrix

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        values = {f"value.{i}": self.value(i) for i in range(len(self.slots))}
        return {"keys": self.keys, "radii": self.radii, **values}

    @property
    def held(self) -> Sequence[Tensor]:
        return [*self.tensors.values(), self.rows.squares, self.slack, self.slots]

    def record(self, key: int) -> Record:
        """What holds value and label of a key."""
        return self.records[int(self.slots[key])]

    def value(self, key: int) -> Tensor:
        """(d_v,) of a key."""
        correction, place = self.record(key)
        return correction.values[place]

    def label(self, key: int) -> tuple[int, ...]:
        """Token ids of the answer that a key stands for."""
        correction, place = self.record(key)
        return correction.labels[place]

    @property
    def looks_ahead(self) -> bool:
        return looks_ahead(self.replacement)

    # --- growing ----------------------------------------------------------------------------------------------------

    def decide(self, query: Tensor, label: tuple[int, ...], eps: float, rounding: float = 0.0) -> Decision:
        """What a correction with this query (d,), on any device and in any dtype, would change."""
        if not len(self.slots):
            return Decision("new", -1, float("inf"))
        query = query.to(self.keys)
        distance, nearest = _exact(self.keys, query[None])[:, 0].min(0)
        d, i = float(distance), int(nearest)
        if d > eps + float(self.radii[i]):
            return Decision("new", i, d)
        if label != self.label(i):
            slack = max(float(self.slack[i]), float(self._slack(query, rounding)))
            return Decision("split" if d > slack else "revise", i, d)
        return Decision("expand" if d > float(self.radii[i]) else "keep", i, d)

    def extended(self, adapters: Sequence[Correction]) -> Codebook:
        for correction in adapters:
            if correction.replacement != self.replacement:
                raise LedgerError(
                    f"expected {self.replacement}, as the module's other corrections, got {correction.replacement}; "
                    "one codebook has one replacement"
                )
        # The newest was made where the model is now; older ones may come from files.
        device = adapters[-1].keys.device
        items = [(made, place) for made in (a.to(device) for a in adapters) for place in range(len(made.labels))]
        book, start, size = self.to(device), 0, 1
        with arithmetic.plain_arithmetic(device.type):
            while start < len(items):
                group = items[start : start + size]
                new = book._new_in_front(group)
                book = book._with_new(group[:new]) if new else book._with(*group[0])
                # Most keys are far from all others, which many at a time are cheap to be told.
                start, size = start + max(1, new), min(2 * size, GROUP) if new == len(group) else 1
        return book

    def _new_in_front(self, items: Sequence[Record]) -> int:
        """How many of the first records certainly make new keys, whatever is nearest to them."""
        queries = torch.stack([correction.keys[place] for correction, place in items]).to(self.keys)  # (c, d)
        eps = self.radii.new_tensor([correction.eps for correction, _ in items])
        reach = eps + torch.cat([self.radii, eps]).max().clamp_min(0)
        lengths = queries.square().sum(1)
        among = GrowingMatrix.empty(queries).extended(queries)
        near = lengths.new_zeros(len(items), dtype=torch.bool)
        for rows, earlier in ((self.rows, False), (among, True)):
            if not rows.count:
                continue
            squared = rows.products(queries) + lengths[:, None]
            limit = reach.square() + DOUBT * (lengths + rows.squares.max())
            close = squared <= limit[:, None]
            near |= (close.tril(-1) if earlier else close).any(1)
        return int(near.nonzero()[0]) if bool(near.any()) else len(items)

    def _with_new(self, items: Sequence[Record]) -> Codebook:
        queries = torch.stack([correction.keys[place] for correction, place in items]).to(self.keys)
        eps = self.radii.new_tensor([correction.eps for correction, _ in items])
        rounding = self.radii.new_tensor([correction.rounding for correction, _ in items])
        return replace(
            self,
            rows=self.rows.extended(queries),
            radii=torch.cat([self.radii, eps]),
            slack=torch.cat([self.slack, self._slack(queries, rounding)]),
            slots=torch.cat([self.slots, torch.arange(self.count, self.count + len(items))]),
            records=self._recorded(items),
            count=self.count + len(items),
        )

    def _with(self, correction: Correction, place: int) -> Codebook:
        query = correction.keys[place].to(self.keys)
        rule, near, d = self.decide(query, correction.labels[place], correction.eps, correction.rounding)
        if rule in ("new", "split"):
            book = self._with_new([(correction, place)])
            if rule == "new":
                return book
            radii = book.radii.clone()
            radii[near], radii[-1] = d / 2 - min(GAP, d / 4), d / 2
            return replace(book, radii=radii)
        radii, slack, slots, rows = self.radii.clone(), self.slack.clone(), self.slots.clone(), self.rows
        slots[near], slack[near] = self.count, torch.maximum(slack[near], self._slack(query, correction.rounding))
        if rule == "expand":
            radii[near] = d
            if correction.eps_expand == "moving_average":
                rows = rows.replaced(near, (self.keys[near] + query) / 2)
        records = self._recorded([(correction, place)])
        return replace(self, rows=rows, radii=radii, slack=slack, slots=slots, records=records, count=self.count + 1)

    def _slack(self, queries: Tensor, rounding: float | Tensor) -> Tensor:
        """By how much queries (..., d) may differ when they are computed again, (...); at least what is lost where they
        are rounded to the dtype of the keys."""
        share = torch.as_tensor(rounding, dtype=queries.dtype, device=queries.device)
        return share.clamp_min(2 * torch.finfo(queries.dtype).eps) * queries.norm(dim=-1)

    def _recorded(self, items: Sequence[Record]) -> list[Record]:
        """The shared list with more behind this codebook's; a copy where another has gone on from here before."""
        records = self.records if len(self.records) == self.count else self.records[: self.count]
        records.extend(items)
        return records

    def copy(self) -> Codebook:
        """An equal one, of which longer ones take no memory that longer ones of this could take."""
        return replace(self, rows=self.rows.copy(), records=self.records[: self.count])

    def to(self, device: torch.device) -> Codebook:
        if self.radii.device == device:
            return self
        rows, radii, slack = (part.to(device) for part in (self.rows, self.radii, self.slack))
        moved: dict[int, Correction] = {}
        for correction, _ in self.records[: self.count]:
            if id(correction) not in moved:
                moved[id(correction)] = correction.to(device)
        records = [(moved[id(correction)], place) for correction, place in self.records[: self.count]]
        return replace(self, rows=rows, radii=radii, slack=slack, records=records)

    # --- looking up -------------------------------------------------------------------------------------------------

    def lookup(self, x: Tensor) -> Tensor:
        """The key whose value takes the place of the module's output, (m,), -1 where the module defers to itself.

        Args:
            x: (m, d) inputs of the module.
        """
        found = torch.full((len(x),), -1, device=x.device)
        if not len(self.slots):
            return found
        step = max(1, PRODUCTS // max(1, len(self.slots)))
        for first in range(0, len(x), step):
            part = x[first : first + step].to(self.radii)
            rows, keys = self._near(part)
            found[first + rows] = keys
        return found

    def _near(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of x (m, d) that lie within the radius of their nearest key, and these keys."""
        lengths = x.square().sum(1)  # (m,)
        doubt = DOUBT * (lengths + self.rows.squares.max())
        products = self.rows.products(x)  # (m, n)
        reach = (self.radii + self.slack).max().clamp_min(0)
        rows = (products.min(1).values + lengths <= reach.square() + doubt).nonzero().squeeze(1)
        if not len(rows):
            return rows, rows
        candidates = products[rows].topk(min(CANDIDATES, len(self.slots)), dim=1, largest=False).indices
        distance, best = (self.keys[candidates] - x[rows][:, None]).norm(dim=2).min(1)
        keys = candidates.gather(1, best[:, None]).squeeze(1)
        inside = distance <= (self.radii + self.slack)[keys]
        return rows[inside], keys[inside]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        if x.ndim != 3 and self.looks_ahead:
            raise ArchitectureError(
                f"{self.replacement} needs to see rows, and {type(module).__name__} is given {tuple(x.shape)}; use "
                "replace_last with this model"
            )
        with arithmetic.plain_arithmetic(x.device.type):
            keys = self.lookup(x.reshape(-1, x.shape[-1]))
            source = spread_keys(keys.reshape(x.shape[:-1]), self.replacement).flatten()
            places = (source >= 0).nonzero().squeeze(1)
            if not len(places):
                return None
            used, which = source[places].unique(return_inverse=True)
            values = torch.stack([self.value(key) for key in used.tolist()]).to(output)
        flat = output.reshape(-1, output.shape[-1]).index_copy(0, places, values[which])
        return flat.reshape(output.shape)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Distances (len(a), len(b)) by subtraction, which near zero are right to the last digits."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
