"""Brakes on values and on whole sequences: NAS gives values one norm, PRUNE closes a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build

import errata
from errata.editors.core.brakes.pruning import FUNCTIONS, largest_singular_value, pruning, singular_triplets
from errata.editors.core.errors import ConfigError, LedgerError, NumericalError
from errata.editors.core.families.anchored_values import anchor_of
from errata.editors.core.ledger.patch import Dense, LowRank, summed
from errata.testing.laws import digest, parts


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- PRUNE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_pruned_sum_has_no_singular_value_that_grows_beyond_the_function(function: Any) -> None:
    W = numbers(6, 9)
    top = largest_singular_value(W)
    assert top == pytest.approx(float(torch.linalg.matrix_norm(W, 2)))
    updates = [LowRank(numbers(6, 2, seed=i), numbers(2, 9, seed=i + 9)) for i in range(2)]
    before = singular_triplets(updates)[1]
    closing = pruning(updates, W, function)
    assert closing is not None
    after = singular_triplets([summed([*updates, closing])])[1]
    large = before >= top
    assert closing.U.shape[1] == int(large.sum()) > 0
    wanted = torch.where(large, FUNCTIONS[function](before, top), before)
    torch.testing.assert_close(after[: len(before)].sort().values, wanted.sort().values)
    assert float(FUNCTIONS[function](before.new_tensor([top]), top)) == pytest.approx(top)  # continuous
    dense = pruning([Dense(update.matrix(torch.float64, W.device)) for update in updates], W, function)
    assert dense is not None
    torch.testing.assert_close(dense.matrix(torch.float64, W.device), closing.matrix(torch.float64, W.device))
    assert pruning([LowRank(1e-9 * updates[0].U, updates[0].V)], W, function) is None


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_closing_step_is_an_edit_of_its_own_and_is_undone_to_the_bit(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, method: str
) -> None:
    model, other = make_tiny("gpt2"), make_tiny("gpt2")
    editor = build(method, model, tiny_tokenizer, prune="log", v_lr=50.0, clamp_norm_factor=1e3, mom2_update_weight=0.1)
    assert editor.finish() is None  # there are no edits
    for request in REQUESTS[:2]:
        editor.apply(request)
    edited = digest(model)
    with editor.finished() as closing:
        assert closing is not None
        assert closing.requests == ()
        assert digest(model) != edited
        errata.save_edits(model, tmp_path / "edits")
        errata.load_ledger(tmp_path / "edits", other)
        assert digest(other) == digest(model)
    assert digest(model) == edited
    assert len(editor.ledger) == 2
    assert build(method, model, tiny_tokenizer).finish() is None


def test_a_closing_step_is_undone_before_another_one_and_before_the_next_edit(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, other = make_tiny("gpt2"), make_tiny("gpt2")
    editor = build("rome", model, tiny_tokenizer, prune="log", v_lr=5.0)
    editor.apply(REQUESTS[0])
    closing = editor.finish()
    assert closing is not None
    closed = digest(model)
    for again in (editor.finish, lambda: editor.apply(REQUESTS[1])):
        with pytest.raises(LedgerError, match=f"{closing.id}.*undo it first"):
            again()
        assert digest(model) == closed
    errata.save_edits(model, tmp_path / "edits")
    errata.load_ledger(tmp_path / "edits", other)
    with pytest.raises(LedgerError, match="undo it first"):
        build("rome", other, tiny_tokenizer, prune="log").finish()
    build("rome", other, tiny_tokenizer).apply(REQUESTS[1])  # has no closing step, and so stands on top of any
    closing.undo()
    editor.apply(REQUESTS[1])
    assert editor.finish() is not None


def test_a_single_edit_is_closed_as_a_sequence_of_one(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    editor = build("rome", model, tiny_tokenizer, prune="log", v_lr=5.0)
    (edit,) = editor.compute(REQUESTS[0])
    closed = editor.closed(edit)
    assert sum(closed.patch.norms().values()) < sum(edit.patch.norms().values())
    edit.apply()
    editor.finish()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    editor.rollback()
    closed.apply()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name])
    assert build("rome", model, tiny_tokenizer).closed(edit) is edit


# --- NAS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_every_value_gets_the_norm_of_the_anchor(make_tiny: Any, tiny_tokenizer: Any, method: str) -> None:
    model = make_tiny("llama", dtype=torch.float64)
    free: Any = build(method, model, tiny_tokenizer)
    site = "mlp" if method == "rome" else "block"
    layer = free.layers[-1]
    found = free.targets(REQUESTS, layer, site)
    outputs, gain = free._mlp_outputs(REQUESTS, found, layer, site)
    norms = [float((v0 + target.delta / gain).norm()) for v0, target in zip(outputs, found, strict=True)]
    anchor = max(norms)
    tied: Any = build(method, model, tiny_tokenizer, nas=anchor)
    for v0, target, own in zip(outputs, tied.targets(REQUESTS, layer, site), norms, strict=True):
        assert float((v0 + target.delta / gain).norm()) == pytest.approx(anchor)
        assert target.report()["found_norm"] == pytest.approx(own)
    same = tied.targets([REQUESTS[norms.index(anchor)]], layer, site)[0]
    torch.testing.assert_close(same.delta, found[norms.index(anchor)].delta, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_far_too_long_is_refused_scaled_or_dropped(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    for beyond, sizes in (("scale", (0.0, 1e9)), ("drop", (-1.0, 1e-5))):
        edit = build("memit", model, tiny_tokenizer, nas=1e-3, nas_beyond=beyond).compute(REQUESTS[0])[0]
        assert edit.diagnostics[0]["dropped"] == (beyond == "drop")
        assert sizes[0] < sum(edit.patch.norms().values()) < sizes[1]
    with pytest.raises(NumericalError, match="times the anchor"):
        build("memit", model, tiny_tokenizer, nas=1e-3).apply(REQUESTS[0])


def test_the_anchor_is_read_from_facts_on_the_untouched_model(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "facts.json"
    facts = [{"prompt": r.prompt, "subject": r.subject, "target": r.target} for r in REQUESTS[1:]]
    file.write_text(json.dumps(facts), encoding="utf-8")
    editor: Any = build("memit", make_tiny("gpt2"), tiny_tokenizer, nas_facts=str(file), nas_beyond="scale")
    editor.apply(REQUESTS[0])
    anchor = editor.anchor(editor.layers[-1], "block")
    editor.rollback()
    assert anchor == pytest.approx(anchor_of(editor.anchor_norms(REQUESTS[1:], editor.layers[-1], "block")))
    assert anchor_of(torch.arange(40.0)) == pytest.approx(sum(range(38)) / 38)
    given = build("memit", make_tiny("gpt2"), tiny_tokenizer, nas=anchor, nas_beyond="scale").compute(REQUESTS[0])[0]
    torch.testing.assert_close(parts(given), parts(editor.compute(REQUESTS[0])[0]))
    for content in ("{", "[]", '[{"prompt": "a"}]'):
        file.write_text(content, encoding="utf-8")
        wrong = build("memit", make_tiny("gpt2"), tiny_tokenizer, nas_facts=str(file))
        with pytest.raises(ConfigError, match="nas_facts"):
            wrong.compute(REQUESTS[0])
    with pytest.raises(ConfigError, match="nas_facts"):
        build("memit", make_tiny("gpt2"), tiny_tokenizer, nas=1.0, nas_facts=str(file))
