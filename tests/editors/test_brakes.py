"""Brakes on the core: past keys, penalties, the stop of the search, RECT and SPHERE, alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build

import errata
from errata import editors
from errata.editors.core.algebra.mask_rules import Below, RectAlphaEdit
from errata.editors.core.algebra.masking import masked_patch
from errata.editors.core.brakes.sphere import leading_directions, off_sphere
from errata.editors.core.errors import ConfigError
from errata.editors.core.families import value_search
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch, merge
from errata.editors.core.solve.null_space import GrowingFactor
from errata.testing.laws import digest, parts

CPU = torch.device("cpu")
FAMILY = ("memit", "emmet", "alphaedit")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rectified(update: LowRank, W: torch.Tensor, share: float) -> Masked:
    rule = RectAlphaEdit(keep=share)
    made = masked_patch(Patch({"w": update}), rule, {"w": Below(W, transposed=False)}).updates["w"]
    assert isinstance(made, Masked)
    return made


# --- past keys ------------------------------------------------------------------------------------------------------


def test_a_sequence_with_past_keys_writes_what_one_batch_writes() -> None:
    """Recursive least squares: with the values held fixed, no further term is needed."""
    d, n, penalty = 12, 5, 3.0
    W0, K, V = numbers(4, d), numbers(d, n, seed=1), numbers(4, n, seed=2)
    C = penalty * torch.eye(d, dtype=torch.float64)
    one = W0 + (V - W0 @ K) @ K.T @ torch.linalg.inv(C + K @ K.T)
    W, factor = W0.clone(), GrowingFactor.empty(1.0)
    for i in range(n):
        k = K[:, i : i + 1]
        adjoint, factor = factor.append(k / penalty**0.5)
        W = W + (V[:, i : i + 1] - W @ k) @ (adjoint / penalty**0.5).T
    torch.testing.assert_close(W, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", FAMILY)
def test_past_keys_are_those_of_the_edits_on_the_model_and_go_with_an_undo(
    make_tiny: Any, tiny_tokenizer: Any, method: str
) -> None:
    def make(**fields: Any) -> Any:
        return build(method, make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer, **fields)

    keeps, forgets = make(past_keys=True), make(past_keys=False)
    alone = parts(forgets.compute(REQUESTS[1])[0])
    torch.testing.assert_close(parts(keeps.compute(REQUESTS[1])[0]), alone, rtol=1e-7, atol=1e-9)
    first = keeps.apply(REQUESTS[0])
    assert set(first.state) == {"keys.0", "keys.1"}
    assert forgets.apply(REQUESTS[0]).state == {}
    with_past, without = keeps.compute(REQUESTS[1])[0], forgets.compute(REQUESTS[1])[0]
    key = first.state["keys.0"]
    name = keeps.architecture.weight_name(0)
    moved = [float((edit.patch.updates[name].matrix(torch.float64, CPU) @ key).norm()) for edit in (with_past, without)]
    assert moved[0] < moved[1]
    first.undo()
    torch.testing.assert_close(parts(keeps.compute(REQUESTS[1])[0]), alone, rtol=1e-7, atol=1e-9)


def test_the_growing_factor_gives_what_one_factorisation_of_the_sum_gives(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build(
        "memit", make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer, past_keys=True, norm_penalty=2.0
    )
    edits = [editor.apply(request) for request in REQUESTS[:2]]
    K = numbers(editor.architecture.d_mlp, 2)
    M = torch.cat([*(edit.state["keys.0"] for edit in edits), K], dim=1)
    weight = editor.settings.mom2_update_weight
    system = weight * editor.moment(0).double() + 2 * torch.eye(len(K), dtype=torch.float64) + M @ M.T
    torch.testing.assert_close(editor.adjoint(0, K), torch.linalg.solve(system, K), rtol=1e-8, atol=1e-10)


def test_a_norm_penalty_makes_updates_smaller(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    norms = [
        sum(build("memit", model, tiny_tokenizer, norm_penalty=mu).compute(REQUESTS[0])[0].patch.norms().values())
        for mu in (0.0, 1.0, 100.0)
    ]
    assert norms == sorted(norms, reverse=True)


# --- the stop of the search -----------------------------------------------------------------------------------------


def test_the_search_ends_once_the_answer_has_been_on_top_often_enough(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of no tokens is always on top; the golden numbers have answers that come to be."""
    monkeypatch.setattr(value_search, "_counted_tokens", lambda _: 0)
    fields: dict[str, Any] = {"v_num_grad_steps": 9, "v_lr": 1e-6, "stop_loss": 0.0, "context_templates": ("{}", "{}")}
    for count in (None, 1, 3):
        editor = build("memit", make_tiny("gpt2"), tiny_tokenizer, **fields, stop_when_top=count)
        (report,) = editor.compute(REQUESTS[0])[0].diagnostics
        assert report["steps"] == (count or 9)
        assert report.get("on_top", []) == [0] * (count or 0)


def test_the_published_rule_counts_five_tokens_whatever_the_answer(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = build("memit", make_tiny("gpt2"), tiny_tokenizer, stop_when_top=1, stop_rule="published")
    for report in editor.apply(REQUESTS).diagnostics:
        assert 5 not in report["on_top"][:-1]


# --- RECT -----------------------------------------------------------------------------------------------------------


def test_rect_keeps_the_largest_relative_changes_and_zeroes_the_rest() -> None:
    W, update = numbers(6, 10), LowRank(numbers(6, 2, seed=1), numbers(2, 10, seed=2))
    D = update.matrix(torch.float64, CPU)
    ratio = (D / W).abs()
    kept = rectified(update, W, 0.4)
    assert int(kept.mask.sum()) == 60 - int(0.6 * 60) + 1
    assert float(ratio[kept.mask].min()) >= float(ratio[~kept.mask].max())
    torch.testing.assert_close(kept.matrix(torch.float64, CPU), D * kept.mask)
    assert kept.norm() == pytest.approx(float((D * kept.mask).norm()))
    assert kept.bits.nbytes == 8  # of 60 elements
    assert bool(rectified(update, W, 1.0).mask.all())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_update_is_added_saved_and_undone_like_any_other(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model, other = make_tiny(architecture, dtype=dtype), make_tiny(architecture, dtype=dtype)
    editor = build("memit", model, tiny_tokenizer, rect=0.4)
    before = digest(model)
    edit = editor.apply(REQUESTS)
    errata.load_edit(edit.save(tmp_path / "edit"), other)
    assert digest(model) == digest(other) != before
    (name, update), *_ = edit.patch.updates.items()
    assert isinstance(update, Masked)
    base = editor.ledger.base(name).float()
    stored = model.get_parameter(name).float() - base
    mask = update.mask if stored.shape == update.shape else update.mask.T
    assert not bool(stored[~mask].any())
    export = edit.export_lora(tmp_path / "lora", rank=4)
    assert max(export.errors.values()) > 0
    edit.undo()
    assert digest(model) == before


def test_masked_updates_merge_to_their_sum_and_are_refused_with_other_bits() -> None:
    W, update = numbers(3, 5), LowRank(numbers(3, 1, seed=1), numbers(1, 5, seed=2))
    masked = rectified(update, W, 0.5)
    merged = merge([Patch({"w": masked}), Patch({"w": update})]).updates["w"]
    assert isinstance(merged, Dense)
    torch.testing.assert_close(merged.delta, masked.matrix(torch.float64, CPU) + update.matrix(torch.float64, CPU))
    with pytest.raises(ValueError, match="expected bits"):
        Masked(update.U, update.V, torch.zeros(1, dtype=torch.uint8))
    state = W.clone()
    arithmetic.add_update(state, masked, transposed=False)
    turned = W.T.clone()
    arithmetic.add_update(turned, masked, transposed=True)
    torch.testing.assert_close(turned.T, state)


# --- SPHERE ---------------------------------------------------------------------------------------------------------


def test_sphere_takes_the_leading_directions_out_of_the_update() -> None:
    W, update = numbers(20, 8), LowRank(numbers(20, 3, seed=1), numbers(3, 8, seed=2))
    Q = leading_directions(W, 0.5)
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64))
    D = update.matrix(torch.float64, CPU)
    assert float((off_sphere(update, Q, 1.0).matrix(torch.float64, CPU) @ Q).abs().max()) < 1e-12
    torch.testing.assert_close(off_sphere(update, Q, 0.0).matrix(torch.float64, CPU), D)
    torch.testing.assert_close(off_sphere(update, Q, 0.3).matrix(torch.float64, CPU), D - 0.3 * D @ Q @ Q.T)


# --- together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rome", *FAMILY])
def test_brakes_combine_with_every_method_and_each_edit_is_undone_to_the_bit(
    make_tiny: Any, tiny_tokenizer: Any, method: str
) -> None:
    model = make_tiny("gpt2")
    past = {} if method == "rome" else {"past_keys": True}
    editor = build(method, model, tiny_tokenizer, rect=0.4, sphere=0.5, stop_when_top=2, **past)
    before = digest(model)
    first, second = editor.apply(REQUESTS[0]), editor.apply(REQUESTS[1])
    first.undo()
    second.undo()
    assert digest(model) == before


def test_brakes_that_are_left_out_leave_the_configuration_of_an_edit_as_it_was() -> None:
    fields = {"past_keys", "norm_penalty", "stop_when_top", "stop_rule", "rect", "sphere", "sphere_energy"}
    fields |= {"past_values", "lyaplock", "prune", "nas", "nas_facts", "nas_beyond"}
    for method in ("rome", *FAMILY):
        kind = editors.get(method).Config
        assert not fields & kind().to_dict().keys()
        changed = kind.from_dict({"rect": 0.4, "sphere": 0.5, "stop_when_top": 2})
        assert {"rect", "sphere", "stop_when_top"} <= changed.to_dict().keys()
        assert kind.from_dict(changed.to_dict()) == changed
    for fields_ in ({"rect": 0.0}, {"rect": 1.5}, {"sphere": -1.0}, {"stop_when_top": 0}):
        with pytest.raises(ConfigError):
            editors.get("memit").Config.from_dict(fields_)
