"""GRACE's codebook, apart from any model: its rules, its look-up, and what is left after any sequence of undoing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from second_device import ELSEWHERE, elsewhere
from torch import Tensor, nn

from errata.editors.core.codebook import codebook
from errata.editors.core.codebook.codebook import Codebook, Correction
from errata.editors.core.codebook.position_rule import spread_keys
from errata.editors.core.errors import ArchitectureError, LedgerError
from errata.editors.core.ledger.adapter import adapter_kind
from errata.editors.core.ledger.adapter_hooks import EVERY, stacks_with, stacks_without

A, B, C = (1,), (2,), (2, 3)


def correction(at: tuple[float, ...], label: tuple[int, ...] = A, value: float = 0.0, **settings: Any) -> Correction:
    """With one request, its value (value, value, value)."""
    fields = {"eps": 1.0, "replacement": "replace_last", "eps_expand": "coverage", "rounding": 1e-9, **settings}
    return Correction(torch.tensor([at], dtype=torch.float64), torch.full((1, 3), value).double(), (label,), **fields)


def book(*corrections: Correction) -> Codebook:
    return Correction.folded(corrections)


# --- the rules ----------------------------------------------------------------------------------------------------


def test_a_far_query_makes_a_key_with_the_first_radius() -> None:
    found = book(correction((0, 0)), correction((2.001, 0)), correction((0, 30), eps=4.0))
    assert found.radii.tolist() == [1, 1, 4]
    assert found.decide(torch.tensor([0, 25.1]).double(), A, 1.0).rule == "expand"
    assert found.decide(torch.tensor([0, 24.9]).double(), A, 1.0).rule == "new"


def test_a_near_query_with_another_answer_halves_the_distance_between_both() -> None:
    found = book(correction((0, 0), A, 1.0), correction((1.5, 0), B, 2.0))
    assert found.radii.tolist() == pytest.approx([0.75 - 1e-5, 0.75], abs=1e-12)
    keys = found.lookup(torch.tensor([[0.74, 0], [0.7499999, 0], [0.76, 0], [-0.8, 0], [2.3, 0]]).double())
    assert keys.tolist() == [0, -1, 1, -1, -1]
    assert [found.value(key)[0] for key in (0, 1)] == [1, 2]


def test_a_near_query_with_the_same_answer_grows_the_older_key_and_brings_its_value() -> None:
    inside, outside = correction((0.6, 0), A, 2.0), correction((1.8, 0), A, 3.0)
    first = correction((0, 0), A, 1.0)
    kept = book(first, inside)
    assert (kept.radii.tolist(), kept.value(0)[0]) == ([1], 2)
    grown = book(first, outside)
    assert (grown.radii.tolist(), grown.keys.tolist(), grown.value(0)[0]) == ([1.8], [[0, 0]], 3)
    moved = book(first, correction((1.8, 0), A, 3.0, eps_expand="moving_average"))
    assert (moved.radii.tolist(), moved.keys.tolist()) == ([1.8], [[0.9, 0]])


def test_an_answer_that_is_corrected_once_more_is_the_one_that_is_given() -> None:
    found = book(correction((0, 0), A, 1.0), correction((0, 0), B, 2.0), correction((0, 0), C, 3.0))
    assert (found.radii.tolist(), found.label(0), found.value(0)[0]) == ([1], C, 3)


def test_answers_are_compared_by_their_ids_and_not_by_their_mean() -> None:
    found = book(correction((0, 0), (1, 3)), correction((0.5, 0), (2, 2)))
    assert len(found.slots) == 2


def test_a_query_that_differs_by_rounding_is_met_and_changes_no_radius() -> None:
    off = 1e-3
    first = correction((3, 4), A, 1.0, rounding=off)
    assert book(first, correction((3 + 4 * off, 4), B, 2.0)).label(0) == B
    grown = book(first, correction((4.5, 4), A, rounding=off))
    assert grown.lookup(torch.tensor([[4.5 + 4 * off, 4], [4.5 + 7 * off, 4]]).double()).tolist() == [0, -1]


@pytest.mark.parametrize("apart", [1e-8, 1.5e-5, 3e-5])
def test_however_near_two_answers_lie_each_is_given_at_its_own_query(apart: float) -> None:
    """Here the authors' d / 2 - 1e-5 would leave the older key a negative radius, or next to none."""
    found = book(correction((0, 0), A, 1.0), correction((apart, 0), B, 2.0))
    assert float(found.radii.min()) >= 0.249 * apart
    assert found.lookup(found.keys).tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1.0])
def test_no_sequence_of_corrections_leaves_a_key_without_reach(scale: float) -> None:
    noise = torch.Generator().manual_seed(7)
    for _ in range(20):
        places = scale * torch.randint(0, 4, (30, 2), generator=noise).double()
        places += 0.01 * scale * torch.rand(30, 2, generator=noise).double()
        labels = torch.randint(0, 3, (30,), generator=noise).tolist()
        made = [correction((x, y), (label,)) for (x, y), label in zip(places.tolist(), labels, strict=True)]
        found = book(*made)
        assert len(found.slots) > 3
        assert float(found.radii.min()) > 0
        assert found.lookup(found.keys).tolist() == list(range(len(found.slots)))


def test_keys_and_values_from_several_devices_are_one_codebook_where_the_newest_is() -> None:
    with elsewhere():
        old, new = correction((0, 0), A, 1.0), correction((9, 9), A, 2.0).to(ELSEWHERE)
        for found in (book(old, new), book(old).extended([new])):
            assert {tensor.device for tensor in found.tensors.values()} == {ELSEWHERE}
            x = torch.tensor([[[0, 0], [9, 9], [5, 5]]]).double().to(ELSEWHERE)
            output = found(nn.Linear(2, 3), (x,), torch.zeros(1, 3, 3).to(ELSEWHERE))
            assert output is not None
            assert output[0, :, 0].tolist() == [1, 2, 0]
        back = found.to(torch.device("cpu"))
        assert {tensor.device.type for tensor in back.tensors.values()} == {"cpu"}
        assert back.to(torch.device("cpu")) is back


def test_a_query_comes_to_the_codebook_from_any_device_and_in_any_dtype() -> None:
    found = book(correction((0, 0), A, 1.0))
    with elsewhere():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            query = torch.tensor([0.5, 0], dtype=dtype)
            assert found.decide(query, A, 1.0) == found.decide(query.to(ELSEWHERE), A, 1.0) == ("keep", 0, 0.5)


def test_one_codebook_has_one_replacement() -> None:
    with pytest.raises(LedgerError, match=r"expected replace_last, .* got replace_all"):
        book(correction((0, 0)), correction((9, 9), replacement="replace_all"))
    with pytest.raises(LedgerError, match="corrections of one edit have one replacement"):
        Correction.joined([correction((0, 0)), correction((9, 9), replacement="replace_all")])


def test_an_edit_of_several_requests_keeps_the_radius_of_each() -> None:
    apart = [correction((0, 0), eps=1.0), correction((9, 9), C, eps=2.0)]
    joined = Correction.joined(apart)
    assert joined.eps == (1.0, 2.0)
    assert Correction.joined(apart[:1]).eps == 1.0
    numbers = json.loads(json.dumps(joined.numbers))
    again = Correction.from_parts(joined.tensors, numbers)
    assert again.eps == (1.0, 2.0)
    for one in (joined, again):
        assert book(one).radii.tolist() == book(*apart).radii.tolist() == [1.0, 2.0]
    with pytest.raises(LedgerError, match="one radius or 2, one per key, got 1"):
        Correction.from_parts(joined.tensors, numbers | {"eps": [1.0]})


# --- looking up ---------------------------------------------------------------------------------------------------


def grown(keys: Tensor, radii: Tensor) -> Codebook:
    """A codebook of these keys, whatever rules would have made of them."""
    first = Correction(
        keys, torch.zeros(len(keys), 1).to(keys), ((1,),) * len(keys), 1.0, "replace_last", "coverage", 0.0
    )
    empty = Codebook.empty(first)
    items = [(first, place) for place in range(len(keys))]
    made = empty._with_new(items)
    return type(made)(**{**vars(made), "radii": radii})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 5, 700])
def test_the_look_up_finds_what_comparing_with_every_key_finds(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook, "PRODUCTS", 3000)  # several blocks
    noise = torch.Generator().manual_seed(count)
    keys = 3 * torch.randn(count, 6, generator=noise, dtype=torch.float64).to(dtype)
    radii = torch.rand(count, generator=noise, dtype=torch.float64).to(dtype) - 0.1
    near = keys[torch.randint(count, (200,), generator=noise)]
    x = torch.cat(
        [near + 0.2 * torch.randn(200, 6, generator=noise).to(dtype), 9 * torch.randn(100, 6, generator=noise)]
    )
    found = grown(keys, radii).lookup(x.to(dtype))
    expected = []
    for query in x.tolist():
        distances = [math.dist(query, key) for key in keys.tolist()]
        nearest = distances.index(min(distances))
        expected.append(nearest if distances[nearest] <= radii[nearest] else -1)
    assert found.tolist() == expected
    assert 20 < sum(key >= 0 for key in expected) < 280


def test_near_keys_are_told_apart_where_products_cannot() -> None:
    """Keys long as 1e3 and 1e-3 apart: squared distances by way of products are off by more than that in float32."""
    base = torch.full((1, 64), 125.0)
    keys = base + 1e-3 * torch.arange(20)[:, None] * torch.eye(64)[:1]
    assert grown(keys, torch.full((20,), 4e-4)).lookup(keys).tolist() == list(range(20))


def test_nothing_near_costs_no_copy() -> None:
    module, output = nn.Linear(2, 3).double(), torch.zeros(1, 4, 3).double()
    found = book(correction((0, 0), A, 1.0))
    assert found(module, (torch.full((1, 4, 2), 9.0).double(),), output) is None
    near = found(module, (torch.zeros(1, 4, 2).double(),), output)
    assert near is not None
    assert near.unique().tolist() == [1]
    assert output.unique().tolist() == [0]


def test_gradients_flow_past_replaced_positions() -> None:
    module, found = nn.Linear(2, 3).double(), book(correction((0, 0), A, 1.0))
    x = torch.tensor([[[0, 0], [9, 9]]]).double()
    output = module(x)
    replaced = found(module, (x,), output)
    assert replaced is not None
    replaced.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() == 3 * 18


# --- which positions ----------------------------------------------------------------------------------------------

MET = torch.tensor([[-1, 4, -1, -1, 7, -1], [-1] * 6])
SPREAD = {
    "replace_last": [-1, 4, -1, -1, 7, -1],
    "replace_all": [4, 4, 7, 7, 7, -1],
    "replace_prompt": [4, 7, 7, 7, -1, -1],
}


@pytest.mark.parametrize("replacement", SPREAD)
def test_positions_take_the_value_of_the_key_that_they_or_the_next_one_have_met(replacement: Any) -> None:
    assert spread_keys(MET, replacement).tolist() == [SPREAD[replacement], [-1] * 6]


def test_rows_that_a_module_cannot_tell_apart_are_refused_where_they_matter() -> None:
    module, flat, output = nn.Linear(2, 3).double(), torch.zeros(8, 2).double(), torch.zeros(8, 3).double()
    assert book(correction((0, 0), A, 1.0))(module, (flat,), output) is not None
    with pytest.raises(ArchitectureError, match=r"replace_all needs inputs \(rows, positions, width\)"):
        book(correction((0, 0), replacement="replace_all"))(module, (flat,), output)


# --- any sequence of edits and undoing ------------------------------------------------------------------------------


class Plain:
    """The codebook as the paper writes it, in lists, made anew for every question."""

    def __init__(self, corrections: Iterator[Correction]) -> None:
        self.keys: list[list[float]] = []
        self.radii: list[float] = []
        self.labels: list[tuple[int, ...]] = []
        self.values: list[float] = []
        for made in corrections:
            rows = zip(made.keys.tolist(), made.values[:, 0].tolist(), made.labels, strict=True)
            for index, (key, value, label) in enumerate(rows):
                self.add(key, value, label, made.radius(index), made.eps_expand)

    def add(self, query: list[float], value: float, label: tuple[int, ...], eps: float, expansion: str) -> None:
        distances = [math.dist(query, key) for key in self.keys]
        near = distances.index(min(distances)) if distances else -1
        d = distances[near] if distances else math.inf
        if d > eps + (self.radii[near] if distances else 0):
            self.make(query, eps, label, value)
        elif label != self.labels[near]:
            self.make(query, d / 2, label, value)
            self.radii[near] = d / 2 - 1e-5
        else:
            self.values[near] = value
            if d > self.radii[near]:
                self.radii[near] = d
                if expansion == "moving_average":
                    self.keys[near] = [(a + b) / 2 for a, b in zip(self.keys[near], query, strict=True)]

    def make(self, key: list[float], radius: float, label: tuple[int, ...], value: float) -> None:
        self.keys.append(key)
        self.radii.append(radius)
        self.labels.append(label)
        self.values.append(value)


@st.composite
def histories(draw: st.DrawFn) -> list[Any]:
    """Corrections of one or two requests, and places of those to undo. Queries lie on a grid that is bent a little, so
    that many are near each other and no two distances alike."""
    steps: list[Any] = []
    made = 0
    for number in range(draw(st.integers(1, 14))):
        if made and draw(st.integers(0, 3)) == 0:
            steps.append(draw(st.sets(st.integers(0, made - 1), min_size=1, max_size=3)))
            continue
        parts = []
        for part in range(draw(st.integers(1, 2))):
            x, y = draw(st.integers(0, 5)), draw(st.integers(0, 3))
            wobble = 1e-3 * (1 + 2 * number + part)
            at = (0.7 * x + wobble, 0.9 * y + wobble**2)
            parts.append(correction(at, draw(st.sampled_from((A, B, C))), float(2 * number + part)))
        steps.append(Correction.joined(parts))
        made += 1
    return steps


@given(steps=histories(), average=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_edits_and_undoing_leaves_what_the_remaining_replayed_give(
    steps: list[Any], average: bool
) -> None:
    ids: list[str] = []
    remaining: dict[str, dict[str, Correction]] = {}
    stacks: Any = {}
    for step in steps:
        if isinstance(step, set):
            gone = {ids[place] for place in step} & remaining.keys()
            stacks = stacks_without(stacks, remaining, gone)
            remaining = {id_: records for id_, records in remaining.items() if id_ not in gone}
        else:
            record = type(step)(**{**vars(step), "eps_expand": "moving_average" if average else "coverage"})
            ids.append(f"e{len(ids)}")
            stacks = stacks_with(stacks, [{"m": record}])
            remaining[ids[-1]] = {"m": record}
        plain = Plain(records["m"] for records in remaining.values())
        if not remaining:
            assert not stacks
            continue
        found = stacks["m"].top
        torch.testing.assert_close(found.keys, torch.tensor(plain.keys).double())
        assert found.radii.tolist() == pytest.approx(plain.radii, abs=1e-12)
        assert [found.label(key) for key in range(len(plain.keys))] == plain.labels
        assert [float(found.value(key)[0]) for key in range(len(plain.keys))] == plain.values


def test_undoing_a_late_correction_replays_few(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {f"e{i}": {"m": correction((10.0 * i, 0))} for i in range(4 * EVERY + 5)}
    stacks: Any = {}
    for records in entries.values():
        stacks = stacks_with(stacks, [records])
    replayed: list[int] = []
    real = Codebook.extended

    def counted(self: Codebook, adapters: list[Correction]) -> Codebook:
        replayed.append(len(adapters))
        return real(self, adapters)

    monkeypatch.setattr(Codebook, "extended", counted)
    last, late = f"e{len(entries) - 1}", f"e{len(entries) - 10}"
    shorter: Any = stacks_without(stacks, entries, {last})["m"].top
    assert torch.equal(shorter.keys[:, 0], 10.0 * torch.arange(len(entries) - 1))
    assert sum(replayed) == 0
    without: Any = stacks_without(stacks, entries, {late})["m"].top
    assert sum(replayed) < 2 * EVERY
    assert len(without.slots) == len(entries) - 1
    assert without.keys[-10:-8, 0].tolist() == [10.0 * (len(entries) - 11), 10.0 * (len(entries) - 9)]


def test_an_older_codebook_stays_as_it_was_and_two_can_go_on_from_it() -> None:
    old = book(*(correction((10.0 * i, 0), value=i) for i in range(20)))
    one, other = old.extended([correction((-10, 0), value=50)]), old.extended([correction((-20, 0), value=60)])
    split = old.extended([correction((0.5, 0), B)])
    assert len(old.slots) == 20
    assert old.radii.tolist() == [1] * 20
    assert [float(found.keys[20, 0]) for found in (one, other, split)] == [-10, -20, 0.5]
    assert [float(found.value(20)[0]) for found in (one, other)] == [50, 60]
    assert float(old.value(19)[0]) == 19


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_record_is_made_again_from_its_kind_tensors_and_numbers() -> None:
    made = Correction.joined([correction((0, 1), A, 1.0), correction((5, 5), C, 2.0)])
    again = adapter_kind(made.kind).from_parts(made.tensors, json.loads(json.dumps(made.numbers)))
    assert isinstance(again, Correction)
    assert again.numbers == made.numbers
    assert again.labels == made.labels
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, numbers: (tensors, {**numbers, "labels": [[1], [2]]}),
        lambda tensors, numbers: ({"keys": tensors["keys"]}, numbers),
        lambda tensors, numbers: (tensors, {**numbers, "radius": 1}),
        lambda tensors, numbers: (tensors, {"labels": numbers["labels"]}),
        lambda tensors, numbers: ({**tensors, "values": tensors["values"][0]}, numbers),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(damage: Any) -> None:
    made = correction((0, 1))
    with pytest.raises(LedgerError):
        Correction.from_parts(*damage(made.tensors, made.numbers))


def test_a_module_of_another_size_is_refused() -> None:
    with pytest.raises(LedgerError, match="from d = 2 to d_v = 3 features"):
        correction((0, 1)).check(nn.Linear(3, 2))
    with pytest.raises(LedgerError, match="linear map"):
        correction((0, 1)).check(nn.Identity())
    correction((0, 1)).check(nn.Linear(2, 3))
