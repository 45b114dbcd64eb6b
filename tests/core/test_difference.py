"""Differences of two models: what comes back, in which form, and how edits are taken back without a ledger."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_patches import DOWN, SQUARE, low_rank, noise, patch
from transformers import AutoModelForCausalLM

import errata
from errata.editors.core.algebra.derivation import described
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, ExportError, NumericalError, OtherBaseError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.testing.laws import digest


@pytest.fixture(params=["gpt2", "llama"])
def pair(request: Any, make_tiny: Callable[..., Any]) -> tuple[Any, Any]:
    return make_tiny(request.param, n_layers=2), make_tiny(request.param, n_layers=2)


def test_a_tuned_model_comes_back_vectors_included_and_leaves_no_trace(pair: tuple[Any, Any], tmp_path: Path) -> None:
    base, tuned = pair
    with torch.no_grad():
        for index, parameter in enumerate(tuned.parameters()):
            if index % 2:
                parameter.add_(noise(*parameter.shape, seed=index), alpha=0.01 * float(parameter.std() + 0.1))
    before = digest(base)
    edit = errata.difference(base, tuned)
    numbers = edit.derived["numbers"]
    assert numbers["low_rank"] == 0 < numbers["dense"] and numbers["units"] <= 1
    assert numbers["bytes"] == sum(update.tensors[0].nbytes for update in edit.patch.updates.values())
    edit.apply()
    for ours, theirs in zip(base.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    again = errata.difference(base, tuned)
    assert (
        sum(update.norm() for update in again.patch.updates.values())
        < 1e-4 * edit.patch.norms()[next(iter(edit.patch.updates))]
    )
    edit.save(tmp_path / "tuning")
    edit.undo()
    assert digest(base) == before
    loaded = errata.load_edit(tmp_path / "tuning", base)
    assert loaded.derived == edit.derived and loaded.id == edit.id
    loaded.undo()
    with (-edit).applied(), (0.5 * edit).applied(), edit.masked("ignore_top").applied():
        assert digest(base) != before
    assert digest(base) == before
    exported = AutoModelForCausalLM.from_pretrained(edit.export_merged(tmp_path / "merged"))
    for ours, theirs in zip(exported.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    with pytest.raises(ExportError, match="not the weight of a linear map"):
        edit.export_lora(tmp_path / "lora")


def test_a_change_of_low_rank_is_kept_as_factors(make_tiny: Callable[..., Any]) -> None:
    base, tuned = make_tiny("gpt2", n_layers=2), make_tiny("gpt2", n_layers=2)
    given = Patch({DOWN: low_rank(1, 0.01), SQUARE: Dense(0.01 * noise(32, 32))})
    Ledger.of(tuned).append("tuned", given)
    edit = errata.difference(base, tuned)
    down, square = edit.patch.updates[DOWN], edit.patch.updates[SQUARE]
    assert isinstance(down, LowRank) and down.U.shape[1] == 2 and isinstance(square, Dense)
    assert (edit.derived["numbers"]["low_rank"], edit.derived["numbers"]["dense"]) == (1, 1)
    assert edit.derived["numbers"]["units"] <= 1
    torch.testing.assert_close(
        down.matrix(torch.float64, torch.device("cpu")),
        given.updates[DOWN].matrix(torch.float64, torch.device("cpu")),
        rtol=1e-4,
        atol=1e-6,
    )
    exact = errata.difference(base, tuned, units=0)
    assert isinstance(exact.patch.updates[DOWN], Dense)  # rounding has moved single elements by one unit
    # Flips of single units are no zeros: they are kept, although zeros would be off by one unit only.
    flipped = copy.deepcopy(base)
    with torch.no_grad():
        weight = flipped.get_parameter(DOWN)
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
    flips = errata.difference(base, flipped)
    assert isinstance(flips.patch.updates[DOWN], Dense) and flips.derived["numbers"]["off"] == 0
    assert errata.difference(base, copy.deepcopy(base)).patch.updates == {}


def test_other_architectures_and_precisions_and_broken_weights_are_refused(make_tiny: Callable[..., Any]) -> None:
    base = make_tiny("gpt2", n_layers=2)
    for other, said in (
        (make_tiny("gpt2", n_layers=3), "only one of them has"),
        (make_tiny("gpt2", n_layers=2, dtype=torch.bfloat16), "load both in one precision"),
    ):
        with pytest.raises(AlgebraError, match=said):
            errata.difference(base, other)
    broken = copy.deepcopy(base)
    name, weight = next(iter(broken.named_parameters()))
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            weight.view(-1)[0] = value
        with pytest.raises(NumericalError, match=f"{name}: expected finite numbers"):
            errata.difference(base, broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_edit_is_taken_back_from_a_merged_model(
    make_tiny: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_tiny("gpt2", n_layers=2, dtype=dtype)
    edit = Edit("made", (), patch(1), (), {}, model)
    edit.save(tmp_path / "edit")
    merged = copy.deepcopy(model)
    edit_on_merged = Edit("made", (), patch(1), (), {}, merged).apply()
    Ledger.of(merged).rebase()  # as after a merge: the weights are what they are, and the ledger is empty
    with pytest.raises(OtherBaseError):
        errata.load_edit(tmp_path / "edit", merged, apply=False)
    loaded = errata.load_edit(tmp_path / "edit", merged, apply=False, force=True)
    assert not loaded.is_applied and loaded.id == edit_on_merged.id
    (-loaded).apply()
    left = errata.difference(model, merged)
    size = sum(value**2 for value in edit.patch.norms().values()) ** 0.5
    remains = sum(value**2 for value in left.patch.norms().values()) ** 0.5
    assert remains < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * size
    assert described(left.derived).count(" - ") == 1
