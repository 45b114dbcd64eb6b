"""Affine adapters: what they compute, at which positions, alone and after one another, and what the ledger does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import errata
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, ConfigError, ExportError, LedgerError
from errata.editors.core.ledger.adapter_hooks import Hook, Listener
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.ledger.row_layout import RowLayout
from errata.editors.core.steering.affine import Affine, AffineMap, Change
from errata.editors.core.steering.positions import Where

ALL, LAST, PROMPT = Where(), Where("last"), Where("prompt")
BLOCK, BASE = "transformer.h.1", "transformer"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(*changes: Change) -> Affine:
    return Affine(changes, BASE if any(change.where.needs_layout for change in changes) else None)


def product(seed: int, d: int = 32, where: Where = ALL) -> Change:
    return Change(noise(d, seed=seed), noise(d, 2, seed=seed + 1) / d, noise(2, d, seed=seed + 2), where)


def edit_of(model: Any, *changes: Change) -> Edit:
    return Edit("", (), Patch({}, {BLOCK: of(*changes)}), (), {}, model, derived={"operation": "steer", "numbers": {}})


def logits(model: Any, rows: list[list[int]], mask: Any = None, **more: Any) -> Tensor:
    with torch.no_grad():
        given = None if mask is None else torch.tensor(mask)
        return model(input_ids=torch.tensor(rows), attention_mask=given, **more).logits


def ablated(r_plus: Any, r_minus: Any, alpha: float, v: Any) -> list[float]:
    """Affine concept editing as `Steering` makes it."""
    from errata.editors.core.steering.steering import Steering

    plus, minus = (torch.tensor(each, dtype=torch.float64) for each in (r_plus, r_minus))
    steering = Steering(nn.Identity(), "ace", {"x": plus - minus}, {"centre": minus})
    left, right, offset = steering._projection(plus - minus)
    change = Change(offset + alpha * (plus - minus), -left, right)
    return AffineMap((change,))(nn.Identity(), (), torch.tensor([[v]], dtype=torch.float64)).flatten().tolist()


def test_affine_concept_editing_by_hand() -> None:
    v, plus, minus = [1.0, 2.0, 3.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]
    assert ablated(plus, minus, 0, v) == [0, 2, 3]
    assert ablated(plus, minus, 1, v) == [2, 2, 3]
    plus, minus = [2.0, 1.5, 1.0], [0.5, 1.0, 1.0]
    for alpha, expected in ((0, [0.25, 1.75, 3]), (0.5, [1, 2, 3]), (1, [1.75, 2.25, 3])):
        assert ablated(plus, minus, alpha, v) == pytest.approx(expected, abs=1e-15)


def test_without_a_product_it_is_the_bias_of_the_map() -> None:
    plain, biased = nn.Linear(48, 32, bias=False, dtype=torch.float64), nn.Linear(48, 32, dtype=torch.float64)
    biased.weight = plain.weight
    x, b = noise(3, 5, 48), biased.bias.detach()
    with torch.no_grad():
        assert torch.equal(AffineMap((Change(b),))(plain, (x,), plain(x)), plain(x) + b)
        assert torch.equal(plain(x) + b, biased(x))


def test_removing_a_direction_leaves_nothing_of_it_and_does_so_once() -> None:
    r = noise(32) / noise(32).norm()
    remove = AffineMap((Change(torch.zeros(32, dtype=torch.float64), -r[:, None], r[None]),))
    once = remove(nn.Identity(), (), noise(2, 7, 32, seed=4))
    assert float((once @ r).abs().max()) < 1e-14
    torch.testing.assert_close(remove(nn.Identity(), (), once), once, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seconds", [0, 20], ids=["low rank", "more rank than width"])
def test_two_as_one_are_one_after_the_other(seconds: int) -> None:
    records = [of(product(seed)) for seed in range(2 + seconds)]
    together, y = Affine.folded(records), noise(2, 5, 32, seed=9)
    step = y
    for record in records:
        step = AffineMap(record.changes)(nn.Identity(), (), step)
    assert len(together.changes) == 1
    torch.testing.assert_close(together(nn.Identity(), (), y), step, rtol=1e-10, atol=1e-10)
    # Folding in groups gives the same bits, which undoing relies on.
    grouped = Affine.folded(records[:1]).extended(records[1:2]).extended(records[2:])
    assert all(torch.equal(a, b) for a, b in zip(together.tensors.values(), grouped.tensors.values(), strict=True))
    joined = Affine.joined(records)
    assert torch.equal(AffineMap(joined.changes)(nn.Identity(), (), y), together(nn.Identity(), (), y))


def test_changes_at_other_positions_stay_apart() -> None:
    folded = Affine.folded([of(Change(noise(32))), of(Change(noise(32), where=LAST)), of(Change(noise(32)))])
    assert [change.where.place for change in folded.changes] == ["all", "last", "all"]
    assert folded.looks_ahead


@pytest.mark.parametrize("place", ["last", "prefix", "span"])
def test_padded_rows_get_what_they_get_alone(make_tiny: Any, place: str) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    b = 3 * noise(2, 32) if place == "prefix" else 3 * noise(32)
    wheres = [Where(place, start=1, stop=3)] if place == "span" else [Where(place)]
    wheres += [Where("prefix", "middle"), Where("prefix", "back")] if place == "prefix" else []
    for where in wheres:
        with edit_of(model, Change(b, where=where)).applied():
            alone = [logits(model, [row])[0] for row in ([5, 6, 7, 8, 9], [11, 12, 13])]
            right = logits(model, [[5, 6, 7, 8, 9], [11, 12, 13, 0, 0]], [[1] * 5, [1, 1, 1, 0, 0]])
            places = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
            left = logits(model, [[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]], [[1] * 5, [0, 0, 1, 1, 1]], position_ids=places)
        for found in ([right[0], right[1, :3]], [left[0], left[1, 2:]]):
            for mine, wanted in zip(found, alone, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


def test_positions_in_generation_with_a_cache(make_tiny: Any) -> None:
    model = make_tiny("llama")  # in float64, eager attention turns rows with padding into NaN
    seen: list[tuple[int, Tensor]] = []
    plain = model.model.layers[1]

    def passes(where: Where, b: Tensor) -> list[Tensor]:
        seen.clear()
        patch = Patch({}, {"model.layers.1": Affine((Change(b, where=where),), "model")})
        before = plain.register_forward_hook(lambda _m, _a, out: seen.append((0, out)))
        with Edit("", (), patch, (), {}, model).applied():
            after = plain.register_forward_hook(lambda _m, _a, out: seen.append((1, out)))
            ids = torch.tensor([[0, 0, 11, 12, 13], [5, 6, 7, 8, 9]])
            mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
            after.remove()
        before.remove()
        pairs = zip([x for i, x in seen if i == 0], [x for i, x in seen if i == 1], strict=True)
        return [(a != b).any(-1).int() for b, a in pairs]

    one, two = noise(32), noise(2, 32)
    assert [each.sum().item() for each in passes(PROMPT, one)] == [10, 0, 0]
    assert [each.tolist() for each in passes(LAST, one)] == [[[0, 0, 0, 0, 1]] * 2, [[1]] * 2, [[1]] * 2]
    assert [each.tolist() for each in passes(Where("prefix"), two)] == [
        [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]],
        [[0]] * 2,
        [[0]] * 2,
    ]
    # Positions 3 and 4: the first row reaches them while it writes.
    assert [each.tolist() for each in passes(Where("span", start=3, stop=5), one)] == [
        [[0] * 5, [0, 0, 0, 1, 1]],
        [[1], [0]],
        [[1], [0]],
    ]


def test_what_a_position_cannot_be_told_from_is_refused(make_tiny: Any) -> None:
    model = make_tiny("gpt2")
    with edit_of(model, Change(noise(4, 32).float(), where=Where("prefix"))).applied():
        logits(model, [[5]])  # a prompt of one token is left alone
        with pytest.raises(LedgerError, match="prompt of at least 4 tokens, as the addition has, got 3"):
            logits(model, [[5, 6, 7]])
        with pytest.raises(LedgerError, match=r"mask \(rows, tokens\)"):
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(LedgerError, match="the decoder's arguments"):
        Affine((Change(noise(32), where=LAST),))
    with pytest.raises(LedgerError, match="width 16"):
        Ledger.of(model).append("a", Patch({}, {BLOCK: of(Change(noise(16)))}))
    with pytest.raises(ConfigError, match="positions"):
        Where("first")
    with pytest.raises(LedgerError, match="2 arguments without names"):
        RowLayout.of(("ids", "mask"), {})
    with pytest.raises(LedgerError, match="attention mask of"):
        RowLayout(0, torch.ones(2, 3)).last(2, 4, torch.device("cpu"))


def test_a_block_that_gives_a_tuple_keeps_the_rest(make_tiny: Any) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    change = Change(noise(32))
    with edit_of(model, change).applied():
        plain = logits(model, [[5, 6, 7]])
    block, caught = model.transformer.h[1], []
    block.register_forward_hook(lambda _m, _a, output: (output, "weights"))
    last = model.transformer.h[2]
    last.register_forward_pre_hook(lambda _m, args: (args[0][0] if isinstance(args[0], tuple) else args[0], *args[1:]))
    with edit_of(model, change).applied():
        block.register_forward_hook(lambda _m, _a, output: caught.append(output[1]))
        assert torch.equal(logits(model, [[5, 6, 7]]), plain)
    assert caught == ["weights"]


def test_undo_copies_and_files(make_tiny: Any, digest: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2")
    before, plain = digest(model), logits(model, [[5, 6, 7]])
    edits = [edit_of(model, Change(noise(32, seed=i).float(), where=w)) for i, w in enumerate((ALL, LAST, ALL, PROMPT))]
    edits.append(edit_of(model, product(7, where=ALL)))
    alone = []
    for edit in edits:
        edit.apply()
    for edit in (edits[1], edits[3]):
        edit.undo()
    alone = logits(model, [[5, 6, 7]])
    assert not model.transformer._forward_pre_hooks  # no edit needs the layout any more
    twin = make_tiny("gpt2")
    for edit in (edits[0], edits[2], edits[4]):
        record = edit.patch.adapters[BLOCK]
        assert isinstance(record, Affine)
        edit_of(twin, *record.changes).apply()
    assert torch.equal(logits(twin, [[5, 6, 7]]), alone)
    edits[1].apply()
    here = logits(model, [[5, 6, 7]])
    assert torch.equal(logits(copy.deepcopy(model), [[5, 6, 7]]), here)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), [[5, 6, 7]]), here)
    errata.save_edits(model, tmp_path / "edits")
    fresh = make_tiny("gpt2")
    errata.load_ledger(tmp_path / "edits", fresh)
    assert torch.equal(logits(fresh, [[5, 6, 7]]), here)
    for export in (errata.export_lora, errata.export_merged):
        with pytest.raises(ExportError):
            export(model, tmp_path / "whole")
    with Ledger.of(model).untouched():
        assert torch.equal(logits(model, [[5, 6, 7]]), plain)
    Ledger.of(model).clear()
    assert digest(model) == before
    assert not model.transformer._forward_pre_hooks


def test_hooks_that_older_versions_pickled_are_called() -> None:
    # They had no layout to read, were registered without keywords, and before that there was no listener.
    read, changed = nn.Linear(2, 2), nn.Linear(2, 2)
    listener, hook = Listener.__new__(Listener), Hook.__new__(Hook)
    listener.__setstate__({"handle": None, "_args": None})
    read.register_forward_pre_hook(listener)
    x = torch.ones(1, 2)
    read(x)
    assert listener.take() == (x,)
    hook.__setstate__({"folded": AffineMap((Change(torch.ones(2)),)), "disabled": False, "handle": None})
    plain = changed(x)
    hook.attach(changed)
    assert torch.equal(changed(x), plain + 1)


def test_additions_can_be_calculated_with_and_removals_cannot(make_tiny: Any) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    plus, last = (edit_of(model, Change(noise(32, seed=i), where=w)) for i, w in enumerate((ALL, LAST)))
    plain = logits(model, [[5, 6, 7]])
    with (0.5 * plus + plus / 2).applied():
        half = logits(model, [[5, 6, 7]])
    with plus.applied():
        torch.testing.assert_close(half, logits(model, [[5, 6, 7]]), rtol=1e-12, atol=1e-12)
    with (plus - plus + last - last).applied():
        torch.testing.assert_close(logits(model, [[5, 6, 7]]), plain, rtol=1e-12, atol=1e-12)
    with pytest.raises(AlgebraError, match="removes a direction"):
        _ = 0.5 * edit_of(model, product(3))
