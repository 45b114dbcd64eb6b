"""Laws of edits that are calculated from edits: strength, sign and sum, on the model and on the disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_patches import DOWN, OTHER, SQUARE, low_rank, noise, patch

import errata
from errata.editors.core.algebra.patch_arithmetic import added, negated, scaled
from errata.editors.core.codebook.codebook import Correction
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.journal import Journal

UPDATES: tuple[LowRank | Dense | Masked, ...] = (
    low_rank(3),
    Dense(noise(32, 32, seed=4)),
    Masked.of(low_rank(5), noise(32, 128, seed=6) > 0),
)


def same_bits(one: Patch, other: Patch) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return list(one.updates) == list(other.updates) and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.fixture(scope="module")
def model(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny("gpt2", n_layers=2)


def make_edit(model: Any, seed: int, **extra: Any) -> Edit:
    request = EditRequest("The capital of {} is", f"land {seed}", f"city {seed}", id=f"r{seed}")
    report = {"loss": 0.5, "update_norm": 1.0, "update_ratio": 0.1}
    return Edit("made", (request,), patch(seed), (report,), {"seed": 0, "max_norm_ratio": 1e6}, model, **extra)


@given(st.integers(-20, 20), st.sampled_from(range(3)))
@settings(max_examples=30, deadline=None)
def test_powers_of_two_are_exact_to_the_bit(power: int, which: int) -> None:
    given_patch = Patch({"w": UPDATES[which]})
    factor = 2.0**power
    there = scaled(given_patch, factor)
    assert same_bits(scaled(there, 1 / factor), given_patch)
    exact = factor * UPDATES[which].matrix(torch.float64, torch.device("cpu"))
    assert torch.equal(there.updates["w"].matrix(torch.float64, torch.device("cpu")), exact)


@given(st.floats(-100, 100), st.sampled_from(range(3)))
@settings(max_examples=30, deadline=None)
def test_any_factor_is_right_to_rounding_and_two_signs_cancel(factor: float, which: int) -> None:
    given_patch, cpu = Patch({"w": UPDATES[which]}), torch.device("cpu")
    whole = UPDATES[which].matrix(torch.float64, cpu)
    there = scaled(given_patch, factor)
    made = there.updates["w"].matrix(torch.float64, cpu) if there.updates else torch.zeros_like(whole)
    torch.testing.assert_close(made, factor * whole, rtol=1e-6, atol=1e-6 * abs(factor) + 1e-30)
    assert scaled(given_patch, 1) is given_patch
    assert scaled(given_patch, 0).updates == {}
    assert same_bits(negated(negated(given_patch)), given_patch)
    nothing = added([given_patch, negated(given_patch)]).updates["w"].matrix(torch.float64, cpu)
    assert float(nothing.abs().max()) <= 1e-12


def test_a_sum_is_the_sum_of_the_matrices_in_factors_where_there_are_factors() -> None:
    cpu = torch.device("cpu")
    one, two = patch(1), Patch({DOWN: low_rank(9), SQUARE: UPDATES[1]})
    total = added([one, two])
    assert isinstance(total.updates[DOWN], LowRank) and isinstance(total.updates[SQUARE], Dense)
    for name in total.updates:
        parts = [each.updates[name].matrix(torch.float64, cpu) for each in (one, two) if name in each.updates]
        torch.testing.assert_close(total.updates[name].matrix(torch.float64, cpu), sum(parts), rtol=1e-6, atol=1e-6)
    many = added([Patch({OTHER: low_rank(seed)}) for seed in range(20)])
    assert isinstance(many.updates[OTHER], Dense)  # 40 factors of 160 numbers each are more than 32 x 128


def test_operators_make_edits_that_know_their_parents(model: Any) -> None:
    a, b = make_edit(model, 1), make_edit(model, 2)
    half = np.float64(0.5) * a
    assert half.derived == {"operation": "scale", "numbers": {"factor": 0.5}, "parents": [{"id": a.id}]}
    assert half.id == (a / 2).id == (np.float32(0.5) * a).id != a.id
    assert (half.method, half.requests, half.config) == (a.method, a.requests, a.config)
    assert half.diagnostics == ({"loss": 0.5},)  # the norms of the parent are not those of the half
    assert 1 * a is a and 0 + a is a
    whole = a - half + b
    assert [parent["id"] for parent in whole.derived["parents"]] == [a.id, (-half).id, b.id]
    assert whole.requests == a.requests + b.requests and len(whole.diagnostics) == 2
    assert f"{a.id} + (-1 (0.5 {a.id})) + {b.id}" in repr(whole)
    total = sum([a, b])
    assert isinstance(total, Edit) and total.id == (a + b).id
    for bad in (lambda: "x" * a, lambda: a + 1, lambda: a - 1, lambda: a / "x", lambda: True + a):
        with pytest.raises(TypeError):
            bad()


def test_derived_edits_are_undone_in_any_order(model: Any, digest: Callable[[Any], str]) -> None:
    a, b = make_edit(model, 1), make_edit(model, 2)
    edits = [a, b, 2 * a, -a, a + b, 0.3 * (a - b)]
    alone: dict[str, str] = {}
    before = digest(model)
    for edit in edits:
        with edit.applied():
            alone[edit.id] = digest(model)
    assert digest(model) == before
    draw = random.Random(0)
    for _ in range(3):
        for edit in (order := draw.sample(edits, len(edits))):
            edit.apply()
        *gone, last = draw.sample(order, len(order))
        for edit in gone:
            edit.undo()
        assert digest(model) == alone[last.id]
        last.undo()
        assert digest(model) == before


def test_derived_edits_come_back_from_the_disk(model: Any, digest: Callable[[Any], str], tmp_path: Path) -> None:
    edit = 0.25 * (make_edit(model, 1) - make_edit(model, 2))
    with edit.applied():
        after = digest(model)
    edit.save(tmp_path / "derived")
    loaded = errata.load_edit(tmp_path / "derived", model)
    assert (loaded.id, loaded.derived, digest(model)) == (edit.id, edit.derived, after)
    loaded.undo()
    assert edit.export_lora(tmp_path / "lora").rank <= 32
    (entry,) = Edits.read(tmp_path / "derived").entries
    assert entry.info.derived == edit.derived
    journal = Journal.open(tmp_path / "journal", {"name": "tiny", "revision": None})
    with edit.applied():
        journal.append(Ledger.of(model).entries[0], {}, Ledger.of(model))
    (record,) = Journal(tmp_path / "journal").records()
    assert record.entry is not None and record.entry.info == edit.info
    assert same_bits(record.entry.patch, edit.patch)


def test_state_stays_where_the_facts_are_still_meant_to_be_there(model: Any) -> None:
    edit = make_edit(model, 1, state={"keys": noise(1, 4)})
    for factor, kept in ((0.5, True), (2.0, False), (-1.0, False), (0.0, False)):
        made = factor * edit
        assert (set(made.state) == {"keys"}, "state" not in made.derived) == (kept, kept)
    assert (edit + make_edit(model, 2)).derived["state"] == "dropped"


def test_what_cannot_be_calculated_is_refused(model: Any, make_tiny: Callable[..., Any]) -> None:
    edit = make_edit(model, 1)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(AlgebraError, match="finite"):
            _ = factor * edit
    with pytest.raises(AlgebraError, match="divided by 0"):
        _ = edit / 0
    for no_edit in (np.zeros(2), [edit], 1):
        with pytest.raises(TypeError):
            _ = edit + no_edit
    other = Edit("made", edit.requests, edit.patch, edit.diagnostics, edit.config, make_tiny("gpt2", n_layers=2))
    with pytest.raises(AlgebraError, match="two models"):
        _ = edit + other
    codebook = Correction(noise(1, 128), noise(1, 32), ((5,),), 1.0, "replace_last", "coverage", 0.0)
    adapted = Edit("grace", (), Patch({}, {"transformer.h.0.mlp.c_proj": codebook}), (), {}, model)
    with pytest.raises(AlgebraError, match="grace"):
        _ = 2 * adapted
    with pytest.raises(AlgebraError, match="grace"):
        _ = edit - adapted
    assert not Ledger.of(model).entries
