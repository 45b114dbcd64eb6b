"""Rows of one batch run through their own edits, and give what each edit gives when it is written to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.editors.core.codebook.codebook import Correction
from errata.editors.core.forward import row_patches
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches, lowest_block, reason_alone
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded

ROWS = ((5, 6, 7), (5, 6, 7), (5, 6, 7), (8, 9), (8, 9), (10, 11, 12, 13))
OWNERS = (0, 1, UNTOUCHED, 2, 0, 3)


def patches(model: Any) -> list[Patch]:
    """Factors of two ranks over two layers, a matrix, and a codebook."""
    parts, drawn = describe(model), torch.Generator().manual_seed(0)

    def low(layer: int, rank: int) -> tuple[str, LowRank]:
        d_out, d_in = parts.map_at(layer).shape
        U, V = (torch.randn(*shape, generator=drawn, dtype=parts.dtype) for shape in ((d_out, rank), (rank, d_in)))
        return parts.weight_name(layer), LowRank(U, V)

    d_out, d_in = parts.map_at(2).shape
    delta = torch.randn(d_out, d_in, generator=drawn, dtype=parts.dtype)
    key = torch.zeros(1, d_in, dtype=parts.dtype)
    value = torch.randn(1, d_out, generator=drawn, dtype=parts.dtype)
    book = Correction(key, value, ((1,),), 1e3, "replace_last", "coverage", 1e-9)
    return [
        Patch(dict([low(1, 1)])),
        Patch(dict([low(1, 3), low(2, 1)])),
        Patch({parts.weight_name(2): Dense(delta)}),
        Patch({}, {parts.weight_name(1).removesuffix(".weight"): book}),
    ]


def written(model: Any, found: Sequence[Patch]) -> list[Tensor]:
    """What each row gives with its edit on the model, one row at a time."""
    ledger, parts, states = Ledger.of(model), describe(model), []
    for row, owner in zip(ROWS, OWNERS, strict=True):
        if owner != UNTOUCHED:
            ledger.append("one", found[owner], max_norm_ratio=1e9)
        states.append(run_base(parts, right_padded([row], 0))[0])
        ledger.clear()
    return states


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("at_once", [2**24, 1])
@torch.no_grad()
def test_rows_give_what_their_edits_give_when_written(
    architecture: str, at_once: int, make_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(architecture, dtype=torch.float64)
    monkeypatch.setattr(row_patches, "_FACTORS_AT_ONCE", at_once)
    found = patches(model)
    assert [lowest_block(describe(model), patch) for patch in found] == [1, 1, 2, 1]
    assert [reason_alone(model, patch) for patch in found] == [None] * 4
    expected = written(model, found)
    states = RowPatches(model, found).hidden_states(ROWS, OWNERS, 0)
    for row, own, alone in zip(ROWS, states, expected, strict=True):
        torch.testing.assert_close(own[: len(row)], alone, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_blocks_below_the_edits_run_once_for_equal_rows(make_tiny: Any) -> None:
    model = make_tiny("llama")
    parts, ran = describe(model), []
    together = RowPatches(model, patches(model))
    together.hidden_states(ROWS, OWNERS, 0)  # the trial of the blocks runs once per model
    hooks = [
        parts.down(i).register_forward_hook(lambda _module, args, _output, i=i: ran.append((i, args[0].shape[0])))
        for i in range(3)
    ]
    with hooked(*hooks):
        together.hidden_states(ROWS, OWNERS, 0)
    # Block 1, the lowest edited one, runs for the distinct rows too, since the form of its output is needed.
    assert ran == [(0, 3), (1, 3), (1, 6), (2, 6)]


def test_an_edit_that_rows_cannot_share_a_batch_with_says_why(make_tiny: Any) -> None:
    half = make_tiny("llama", dtype=torch.bfloat16)
    assert "bfloat16 rounds" in str(reason_alone(half, patches(half)[0]))
    tied = make_tiny("gpt2")
    rows, width = tied.get_input_embeddings().weight.shape
    update = LowRank(torch.ones(rows, 1), torch.ones(1, width))
    (name,) = (n for n, p in tied.named_parameters() if p is tied.get_input_embeddings().weight)
    assert "not the weight of a linear map" in str(reason_alone(tied, Patch({name: update})))
    assert lowest_block(describe(tied), Patch({name: update})) is None
    model = make_tiny("llama")
    book = patches(model)[3]
    Ledger.of(model).append("before", book)
    assert "carries adapters" in str(reason_alone(model, book))

    class Shy(Correction):
        acts_by_row = False

    ((at, record),) = book.adapters.items()
    shy = Shy(record.keys, record.values, record.labels, 1.0, "replace_last", "coverage", 0.0)  # type: ignore[attr-defined]
    assert "do not say" in str(reason_alone(make_tiny("llama"), Patch({}, {at: shy})))
