"""WISE's memory by hand: shards, merges, routes, and what is left after an undo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from torch import Tensor, nn

from errata.editors.core.errors import ConfigError, LedgerError, NumericalError
from errata.editors.core.side_memory.shards import NONE, ShardPart, ShardRule, Shards, ShardUpdate
from errata.editors.core.side_memory.side_editor import median_lengths
from errata.editors.core.side_memory.sparse_change import SparseChange
from errata.editors.core.side_memory.ties import ties
from errata.editors.wise import WISEConfig

MASK = torch.tensor([[True, False, True], [False, True, True]])


def update(shard: int, value: float, min_act: float = 1.0, mask: Tensor | None = MASK, **rule: Any) -> ShardUpdate:
    change = SparseChange.of(torch.full((2, 3), value) * (MASK if mask is not None else 1), mask)
    fields: dict[str, Any] = {"save_freq": 2, "merge_freq": 4, "retrieve": True, "densities": 1.0} | rule
    return ShardUpdate(
        (ShardPart(shard, 1, min_act, change),),
        ShardRule(**fields, act_ratio=0.5, activation="linear", side_bars=False),
    )


def test_ties_of_three_changes_of_two_by_two() -> None:
    a, b = torch.tensor([[4.0, -1.0], [3.0, 0.5]]), torch.tensor([[-2.0, -3.0], [1.0, 0.1]])
    c = torch.tensor([[-1.0, 2.0], [0.2, -4.0]])
    # Kept are a's 4 and 3, b's -2 and -3, c's 2 and -4; signs of the sums are +, -, +, -.
    assert ties([a, b, c], [1 / 3] * 3, 0.5).tolist() == [[4.0, -3.0], [3.0, -4.0]]
    assert torch.allclose(ties([a, b], [0.25, 0.75], 1.0), torch.tensor([[-2.0, -2.5], [1.5, 0.2]]))


def test_shards_fill_merge_and_stay_where_they_are_after_an_undo() -> None:
    records = [update(n // 2, 2.0**n, 1.0 + n) for n in range(5)]
    book = ShardUpdate.folded
    sums = [[round(float(m.delta[0, 0]), 4) for m in book(records[: n + 1]).memories()] for n in range(5)]
    assert sums == [[1.0], [3.0], [4.0, 3.0], [7.5], [16.0, 7.5]]
    assert [m.threshold for m in book(records).memories()] == [2.5, 0.5]
    assert book(records[:4]).open_shard is None
    assert book(records[:4]).next_number == 2
    left = book([records[0], *records[2:]])
    assert [float(m.delta[0, 0]) for m in left.memories()] == [16.0, 6.5]
    assert not left.memories()[0].delta[~MASK].any()


def test_a_record_is_what_its_parts_say_and_joined_records_are_their_sum() -> None:
    record = ShardUpdate.joined([update(0, 1.0, 3.0), update(0, 2.0, 2.0), update(1, 4.0)])
    assert [(part.shard, part.count, part.min_act) for part in record.parts] == [(0, 2, 2.0), (1, 1, 1.0)]
    assert [len(tensor) for tensor in record.tensors.values()] == [4, 1, 4, 1]
    again = ShardUpdate.from_parts(record.tensors, record.numbers)
    assert again.numbers == record.numbers
    assert torch.equal(again.parts[0].change.matrix, 3.0 * MASK)
    with pytest.raises(LedgerError, match="expected 4 values"):
        ShardUpdate.from_parts({**record.tensors, "values0": torch.zeros(3)}, record.numbers)
    with pytest.raises(LedgerError, match="expected the rule of the module's other edits"):
        ShardUpdate.folded([update(0, 1.0), update(0, 1.0, save_freq=4)])


def test_every_row_has_its_own_route_and_a_rejected_side_copy_bars_no_memory() -> None:
    book = ShardUpdate.folded([update(0, 1.0, 2.0), update(0, 1.0, 2.0), update(1, 3.0, 4.0)])
    d = [torch.tensor([1.9, 2.5, 2.5, 0.1]), torch.tensor([1.5, 2.0, 3.0, 0.9])]
    assert book.route(d, [2.0, 1.0]).tolist() == [1, 0, 1, NONE]
    barred = Shards(ShardRule(2, 4, True, 1.0, 0.5, "linear", side_bars=True), book.shards)
    assert barred.route(d, [2.0, 1.0]).tolist() == [NONE, 0, 1, NONE]
    layer = nn.Linear(3, 2, bias=False)
    x = torch.tensor([[[1.0, 0.0, 1.0]] * 4, [[0.01, 0.0, 0.0]] * 4])
    y = layer(x)
    found = book(layer, (x,), y)
    assert found is not None
    assert torch.equal(found[1], y[1])
    torch.testing.assert_close(found[0], y[0] + torch.tensor([6.0, 3.0]))


def test_a_second_edit_trains_on_the_copy_of_the_first_within_the_mask(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("wise", make_tiny("gpt2"), tiny_tokenizer, save_freq=2, merge_freq=4)
    reports = [editor.apply(request).diagnostics[0] for request in REQUESTS]
    assert [report["shard"] for report in reports] == [0, 0, 1]
    shards = editor.memory().shards
    assert torch.equal(shards[0].changes[0].mask, editor.draw_mask(0))
    assert not torch.equal(editor.draw_mask(0), editor.draw_mask(1))
    assert len(shards[0].changes) == 1
    assert max(float(editor.memory().delta(shard).abs().max()) for shard in shards) <= 1.0
    whole = editor.shape[0] * editor.shape[1]
    assert reports[0]["patch_bytes"] == 4 * int(editor.draw_mask(0).sum()) + whole // 8


def test_lengths_are_converted_and_an_edit_alone_is_found_by_its_prompt(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    plain: Any = build("wise", model, tiny_tokenizer)
    assert plain.units == (1.0, 1.0)
    edit = plain.compute([REQUESTS[0]])[0]
    report = edit.diagnostics[0]
    assert report["threshold"] <= plain.config.act_ratio * report["distance"]
    own = median_lengths(plain, plain.sentences[:20])
    same: Any = build("wise", model, tiny_tokenizer, meant_for=own)
    assert same.compute([REQUESTS[0]])[0].diagnostics[0]["losses"] == report["losses"]
    # Where lengths were ten times as long, an element may change by a tenth.
    short: Any = build("wise", model, tiny_tokenizer, meant_for=(own[0], 10 * own[1]), edit_lr=1e4)
    assert short.units == pytest.approx((1.0, 0.1))
    (update,) = short.compute([REQUESTS[0]])[0].patch.adapters.values()
    assert float(update.parts[0].change.values.abs().max()) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ConfigError, match="meant_for: expected two lengths above 0"):
        WISEConfig(meant_for=(0.0, 1.0))
    with torch.no_grad():
        model.get_submodule("transformer.h.1.mlp.c_fc").weight.zero_()
        model.get_submodule("transformer.h.1.mlp.c_fc").bias.zero_()
    silent: Any = build("wise", model, tiny_tokenizer, meant_for=own)
    with pytest.raises(NumericalError, match="expected inputs and outputs of a median length above 0, got 0"):
        silent.compute([REQUESTS[0]])


def test_margins_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of save_freq"):
        WISEConfig(save_freq=500, merge_freq=700)
