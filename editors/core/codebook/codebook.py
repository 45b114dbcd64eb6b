"""GRACE's codebook: keys with a radius each, and the values that replace a module's output near one of them.

    h(x) = v_i    if ||x - k_i|| <= eps_i for the key k_i nearest to x,    else the module's own output

(Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", section 3.) Where
no key is near, the module's own output stays ("the module defers to itself").

Example: inputs of width 1, two rows of five tokens, and a codebook of two keys with eps = 0.5.

    kept              key 2 with value a, key 7 with value b
    position          0     1     2     3     4            0     1     2     3     4
    input x           0     1     2     3     4            9     8     7.25  6     5
    nearest key       2     2     2     2     2            7     7     7     7     7
    distance          2     1     0     1     2            2     1     0.25  1     2
    matched           .     .     2     .     .            .     .     7     .     .

    replace_last      .     .     a     .     .            .     .     b     .     .
    replace_all       a     a     a     .     .            b     b     b     .     .
    replace_prompt    a     a     .     .     .            b     b     .     .     .

Both rows run as always; the codebook replaces the module's output at the positions of the last three lines, by the rule
that the edits have (position_rule.py), and leaves it as it is at a dot.

A new edit has a query q (the module's input at the edit's position) and an answer. Let k_i be the key nearest to q, d
its distance, and eps the radius that new keys get. The paper's rules (algorithm 1) say what changes:

    new       d > eps + eps_i           add the key q with radius eps
    split     the answers differ        add the key q with radius d / 2; eps_i = d / 2 - min(1e-5, d / 4)
    expand    they agree, d > eps_i     eps_i = d ("coverage"), or also k_i moves half way to q ("moving_average")
    keep      they agree, d <= eps_i    no radius changes
    revise    they differ, d is 0       the key gets the new answer

In the last three the edit's value replaces v_i. Two things differ from the authors' code. Answers are equal if their
token ids are; the authors compare the means of the ids. And their split has no d / 4: keys nearer than 2e-5 would leave
the older one without reach. "revise" is not in the paper: a split at distance 0 would give both keys the radius 0, and
neither would ever match, although the user has only corrected an answer once more.

A query that is computed again, in a batch of another shape, differs in its last bits. So "0" and "<=" allow a
difference of `rounding` times the length of the key, or of a query that the key was to answer.

Devices and precision: the codebook follows the hidden state. After the model has moved, its hook moves keys, radii and
values at the next forward pass; until then a query moves to the codebook. Distances are computed in the dtype of the
first correction's key: the working dtype that the model had then (float64 for float64, else float32), even if the model
is converted later. Values are returned in the dtype of the module's output. A model that is converted to a lower
precision than its edits were computed in has queries that differ by more than their rounding. Its keys then match as
far as their radii reach.

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
from errata.editors.core.model.parts import features

Expansion = Literal["coverage", "moving_average"]
Rule = Literal["new", "split", "expand", "keep", "revise"]
# A split makes the older radius smaller by this much, so that no query lies within both radii. The authors' code has
# the same number; here it is a quarter of the distance at most.
GAP = 1e-5
# Products (queries x keys) held at a time: 2^24 in float32 are 64 MiB.
PRODUCTS = 1 << 24
# A squared distance computed from products is wrong by at most this share of the squared lengths, also in TF32. So
# products only find the positions and keys that may be near. Their exact distances are then computed by subtraction.
PRODUCT_ERROR = 1e-3
# Nearest keys by product whose exact distance is computed.
CANDIDATES = 32
# Records that are compared with all keys at a time, when many are replayed.
GROUP = 256


@dataclass(frozen=True, eq=False)
class Correction(Adapter):
    """What one edit adds to a codebook: the query, the value and the answer of each of its m requests.

    Attributes:
        keys: (m, d) inputs of the module at the key's position: the queries.
        values: (m, d_v) outputs that make the model give the answers.
        labels: Token ids of the answers.
        eps: Radius of the new keys, or one per key.
        replacement: Which positions of a row a matched key replaces, see `spread_keys`.
        eps_expand: How an older key with the same answer grows.
        rounding: How much a query may differ when it is computed again, as a share of its length.
        reads: Name of the module whose inputs are the queries; None for the module itself.
    """

    keys: Tensor
    values: Tensor
    labels: tuple[tuple[int, ...], ...]
    eps: float | tuple[float, ...]
    replacement: Replacement
    eps_expand: Expansion
    rounding: float
    reads: str | None = None

    kind: ClassVar[str] = "grace"
    acts_by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keys.ndim != 2 or self.values.ndim != 2 or not len(self.keys) == len(self.values) == len(self.labels):
            shapes = f"{tuple(self.keys.shape)}, {tuple(self.values.shape)} and {len(self.labels)} labels"
            raise LedgerError(f"expected keys (m, d), values (m, d_v) and m labels, got {shapes}")
        if isinstance(self.eps, tuple) and len(self.eps) != len(self.keys):
            raise LedgerError(f"expected one radius or {len(self.keys)}, one per key, got {len(self.eps)}")

    def radius(self, index: int) -> float:
        """Return the radius of a new key for one of the requests."""
        return self.eps[index] if isinstance(self.eps, tuple) else self.eps

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    @property
    def numbers(self) -> Mapping[str, Any]:
        eps = list(self.eps) if isinstance(self.eps, tuple) else self.eps
        return {"labels": [list(label) for label in self.labels], "eps": eps, **self._settings}

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("replacement", "eps_expand", "rounding")
        # Files of edits that read their own module stay as they were before edits could read another.
        return {name: getattr(self, name) for name in names} | ({} if self.reads is None else {"reads": self.reads})

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            settings = {name: value for name, value in numbers.items() if name != "labels"}
            labels = tuple(tuple(label) for label in numbers["labels"])
            if isinstance(settings["eps"], list):
                settings["eps"] = tuple(settings["eps"])
            return cls(tensors["keys"], tensors["values"], labels, **settings)
        except (KeyError, TypeError) as error:
            raise LedgerError(f"expected the parts of a codebook's correction, got others: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        first = adapters[0]
        if any(adapter._settings != first._settings for adapter in adapters):
            raise LedgerError("corrections of one edit have one replacement")
        radii = tuple(a.radius(i) for a in adapters for i in range(len(a.keys)))
        keys, values = (torch.cat([getattr(a, name) for a in adapters]) for name in ("keys", "values"))
        labels = tuple(label for a in adapters for label in a.labels)
        eps = radii[0] if len(set(radii)) == 1 else radii
        return replace(first, keys=keys, values=values, labels=labels, eps=eps)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> Codebook:
        return Codebook.empty(adapters[0]).extended(adapters)

    def check(self, module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if self.reads is not None:
            if isinstance(weight, Tensor) and weight.shape[0] != self.values.shape[1]:
                raise LedgerError(
                    f"expected a module that gives d_v = {self.values.shape[1]} features, got one with a weight of "
                    f"{tuple(weight.shape)}"
                )
            return
        # A packed weight has another shape than its map.
        expected = features(module) or (tuple(weight.shape) if isinstance(weight, Tensor) else ())
        if expected != (self.values.shape[1], self.keys.shape[1]):
            widths = f"from d = {self.keys.shape[1]} to d_v = {self.values.shape[1]} features"
            raise LedgerError(f"expected a linear map {widths}, got one with a weight (d_v, d) of {expected}")

    def to(self, device: torch.device) -> Correction:
        """Return the correction on another device; `self` if it is there already."""
        if self.keys.device == device == self.values.device:
            return self
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))

    def norm(self) -> float:
        """Frobenius norm of the values."""
        return float(self.values.double().norm())


Record = tuple[Correction, int]  # a correction, and the index of one of its requests


class Decision(NamedTuple):
    """The rule that applies to an edit, the index of its nearest key (-1 if there is none), and their distance."""

    rule: Rule
    nearest: int
    distance: float


@dataclass(frozen=True, eq=False)
class Codebook(Folded):
    """The codebook of one module after some corrections. It is immutable: `extended` returns a new one.

    Attributes:
        rows: (n, d) the keys.
        radii: (n,) eps of each.
        slack: (n,) distance that is allowed for rounding, on top of the radius.
        slots: (n,) index of the record that holds each key's value and label; on the CPU.
        records: Records in the order of the ledger. Codebooks share the list; this one owns the first `count`.
        count: Records of this codebook.
        replacement: The position rule, the same for all corrections.
        reads: The module whose inputs are the queries, the same for all corrections; None for the module itself.
    """

    rows: GrowingMatrix
    radii: Tensor
    slack: Tensor
    slots: Tensor
    records: list[Record]
    count: int
    replacement: Replacement
    reads: str | None = None

    kind: ClassVar[str] = "grace"

    @classmethod
    def empty(cls, like: Correction) -> Codebook:
        """Return a codebook without keys, for corrections like this one."""
        none = like.keys.new_empty(0)
        rows = GrowingMatrix.empty(like.keys)
        return cls(rows, none, none, torch.empty(0, dtype=torch.int64), [], 0, like.replacement, like.reads)

    @property
    def keys(self) -> Tensor:
        """(n, d)."""
        return self.rows.matrix

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        values = {f"value.{i}": self.value(i) for i in range(len(self.slots))}
        return {"keys": self.keys, "radii": self.radii, **values}

    @property
    def kept_tensors(self) -> Sequence[Tensor]:
        return [*self.tensors.values(), self.rows.squares, self.slack, self.slots]

    def record(self, key: int) -> Record:
        """Return the record that holds the value and label of a key."""
        return self.records[int(self.slots[key])]

    def value(self, key: int) -> Tensor:
        """Return the value (d_v,) of a key."""
        correction, index = self.record(key)
        return correction.values[index]

    def label(self, key: int) -> tuple[int, ...]:
        """Return the token ids of the answer that a key stands for."""
        correction, index = self.record(key)
        return correction.labels[index]

    @property
    def looks_ahead(self) -> bool:
        return looks_ahead(self.replacement)

    # --- growing ----------------------------------------------------------------------------------------------------

    def decide(self, query: Tensor, label: tuple[int, ...], eps: float, rounding: float = 0.0) -> Decision:
        """Return which rule would apply to a correction with this query (d,), on any device and in any dtype."""
        if not len(self.slots):
            return Decision("new", -1, float("inf"))
        query = query.to(self.keys)
        distance, nearest = _exact_distances(self.keys, query[None])[:, 0].min(0)
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
            if correction.reads != self.reads:
                raise LedgerError(
                    f"expected keys that are inputs of {self.reads or 'the module'}, as those of its other corrections "
                    f"are, got inputs of {correction.reads or 'the module'}; undo those first"
                )
        # The newest correction was made where the model is now. Older ones may come from files, on the CPU.
        device = adapters[-1].keys.device
        items = [(made, index) for made in (a.to(device) for a in adapters) for index in range(len(made.labels))]
        book, start, size = self.to(device), 0, 1
        with arithmetic.plain_arithmetic(device.type):
            while start < len(items):
                group = items[start : start + size]
                # Most queries are far from all keys, and many of these are recognised and added at once. The first
                # that may be near needs the rules, one at a time.
                new = book._count_leading_new(group)
                book = book._with_new(group[:new]) if new else book._with_one(*group[0])
                start, size = start + max(1, new), min(2 * size, GROUP) if new == len(group) else 1
        return book

    def _count_leading_new(self, items: Sequence[Record]) -> int:
        """Return how many of the first records certainly make new keys, because no key is near their queries."""
        queries = torch.stack([correction.keys[index] for correction, index in items]).to(self.keys)  # (c, d)
        eps = self.radii.new_tensor([correction.radius(index) for correction, index in items])
        reach = eps + torch.cat([self.radii, eps]).max().clamp_min(0)
        lengths = queries.square().sum(1)
        among = GrowingMatrix.empty(queries).extended(queries)
        near = lengths.new_zeros(len(items), dtype=torch.bool)
        for rows, earlier in ((self.rows, False), (among, True)):
            if not rows.count:
                continue
            squared = rows.products(queries) + lengths[:, None]
            limit = reach.square() + PRODUCT_ERROR * (lengths + rows.squares.max())
            close = squared <= limit[:, None]
            near |= (close.tril(-1) if earlier else close).any(1)
        return int(near.nonzero()[0]) if bool(near.any()) else len(items)

    def _with_new(self, items: Sequence[Record]) -> Codebook:
        """Return the codebook with a new key for each record."""
        queries = torch.stack([correction.keys[index] for correction, index in items]).to(self.keys)
        eps = self.radii.new_tensor([correction.radius(index) for correction, index in items])
        rounding = self.radii.new_tensor([correction.rounding for correction, _ in items])
        return replace(
            self,
            rows=self.rows.extended(queries),
            radii=torch.cat([self.radii, eps]),
            slack=torch.cat([self.slack, self._slack(queries, rounding)]),
            slots=torch.cat([self.slots, torch.arange(self.count, self.count + len(items))]),
            records=self._append_records(items),
            count=self.count + len(items),
        )

    def _with_one(self, correction: Correction, index: int) -> Codebook:
        """Return the codebook after one record, by the rule that applies to it."""
        query = correction.keys[index].to(self.keys)
        rule, near, d = self.decide(query, correction.labels[index], correction.radius(index), correction.rounding)
        if rule in ("new", "split"):
            book = self._with_new([(correction, index)])
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
        records = self._append_records([(correction, index)])
        return replace(self, rows=rows, radii=radii, slack=slack, slots=slots, records=records, count=self.count + 1)

    def _slack(self, queries: Tensor, rounding: float | Tensor) -> Tensor:
        """Return how far queries (..., d) may move when they are computed again, (...).

        That is at least what rounding them to the dtype of the keys loses.
        """
        share = torch.as_tensor(rounding, dtype=queries.dtype, device=queries.device)
        return share.clamp_min(2 * torch.finfo(queries.dtype).eps) * queries.norm(dim=-1)

    def _append_records(self, items: Sequence[Record]) -> list[Record]:
        """Return the shared list with `items` appended; a copy if another codebook has appended to it already."""
        records = self.records if len(self.records) == self.count else self.records[: self.count]
        records.extend(items)
        return records

    def copy(self) -> Codebook:
        """Return an equal codebook with memory of its own, so that extending it does not make this one copy."""
        return replace(self, rows=self.rows.copy(), records=self.records[: self.count])

    def to(self, device: torch.device) -> Codebook:
        if self.radii.device == device:
            return self
        rows, radii, slack = (part.to(device) for part in (self.rows, self.radii, self.slack))
        moved: dict[int, Correction] = {}
        for correction, _ in self.records[: self.count]:
            if id(correction) not in moved:
                moved[id(correction)] = correction.to(device)
        records = [(moved[id(correction)], index) for correction, index in self.records[: self.count]]
        return replace(self, rows=rows, radii=radii, slack=slack, records=records)

    # --- looking up -------------------------------------------------------------------------------------------------

    def lookup(self, x: Tensor) -> Tensor:
        """Return the key that each position matches, (m,); -1 where the module's own output stays.

        Args:
            x: (m, d) inputs of the module.
        """
        found = torch.full((len(x),), -1, device=x.device)
        if not len(self.slots):
            return found
        step = max(1, PRODUCTS // max(1, len(self.slots)))
        for first in range(0, len(x), step):
            part = x[first : first + step].to(self.radii)
            rows, keys = self._match(part)
            found[first + rows] = keys
        return found

    def _match(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of x (m, d) that lie within the radius of their nearest key, and these keys."""
        lengths = x.square().sum(1)  # (m,)
        error = PRODUCT_ERROR * (lengths + self.rows.squares.max())
        products = self.rows.products(x)  # (m, n)
        reach = (self.radii + self.slack).max().clamp_min(0)
        # Products rule out almost all positions cheaply. Only the rest needs exact distances.
        rows = (products.min(1).values + lengths <= reach.square() + error).nonzero().squeeze(1)
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
                f"{self.replacement} needs inputs (rows, positions, width), and {type(module).__name__} got "
                f"{tuple(x.shape)}; use replace_last with this model"
            )
        with arithmetic.plain_arithmetic(x.device.type):
            keys = self.lookup(x.reshape(-1, x.shape[-1]))
            source = spread_keys(keys.reshape(x.shape[:-1]), self.replacement).flatten()
            positions = (source >= 0).nonzero().squeeze(1)
            if not len(positions):
                return None
            used, which = source[positions].unique(return_inverse=True)
            values = torch.stack([self.value(key) for key in used.tolist()]).to(output)
        flat = output.reshape(-1, output.shape[-1]).index_copy(0, positions, values[which])
        return flat.reshape(output.shape)


def _exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return distances (len(a), len(b)) by subtraction, which is accurate to the last digits also near zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
