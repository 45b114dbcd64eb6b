"""Rules of masks and merges: hand-made examples, laws, and what edits under a rule are on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_editors import REQUESTS, build
from random_patches import low_rank, noise
from torch import Tensor

from errata.cli import derive, merge
from errata.editors.core.algebra.mask_rules import RULES, Below, Breadcrumbs, IgnoreTop, MaskRule, Rect
from errata.editors.core.algebra.masking import masked_patch, merged_patch, weights_below
from errata.editors.core.algebra.merge_rules import MERGES, Ties, elected_signs, stacked
from errata.editors.core.algebra.patch_arithmetic import negated, scaled
from errata.editors.core.algebra.rule_texts import merge_rule_of, rule_of, rule_of_text, text_of
from errata.editors.core.edit import Edit, merge_edits
from errata.editors.core.errors import AlgebraError, ConfigError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Masked, Patch
from errata.testing.laws import digest

CPU = torch.device("cpu")
TAU = (
    (1, -0.2, 0.5, 0, -2, 0.3, -0.1, 0.8, 0.05, -0.6),
    (-0.4, 0.9, 0.6, -0.7, 1.5, 0.1, 0.2, -0.3, 0, 1.1),
    (0.2, 0.1, -0.9, 0.4, -1, -0.5, 0.7, 0.6, -0.3, -0.8),
)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def mask(rule: MaskRule, delta: Tensor, weight: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    below = {"w": Below(torch.ones_like(delta) if weight is None else weight, transposed)}
    return rule.masks({"w": delta}, below)["w"]


# --- hand-made examples, computed with the authors' functions -------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "signs", "merged"),
    [
        (0.2, "++-+-+++++", (1, 0.9, -0.9, 0, -1.5, 0, 0, 0.8, 0, 1.1)),
        (0.5, "+++---+++-", (1, 0.9, 0.55, -0.7, -1.5, -0.5, 0.7, 0.7, 0, -0.7)),
    ],
)
def test_ties_is_that_of_its_authors(keep: float, signs: str, merged: tuple[float, ...]) -> None:
    edits = [{"w": vector(*row)} for row in TAU]
    rule = Ties(keep=keep)
    elected = elected_signs(stacked(rule.sparsified(edits, {})))["w"]
    assert "".join("+" if sign > 0 else "-" for sign in elected.tolist()) == signs
    torch.testing.assert_close(rule.merged(edits, {}, (1, 1, 1))["w"], vector(*merged), rtol=0, atol=1e-12)
    # Split over two weights, the whole is trimmed together.
    halves = [{"a": edit["w"][:4], "b": edit["w"][4:]} for edit in edits]
    both = rule.merged(halves, {}, (1, 1, 1))
    torch.testing.assert_close(torch.cat([both["a"], both["b"]]), vector(*merged), rtol=0, atol=1e-12)


def test_breadcrumbs_is_that_of_its_authors() -> None:
    row = vector(1, -2, 3, -4, 5, -6, 7, -8, 9, -10)
    assert (row * mask(Breadcrumbs(remove=0.1, keep=0.2), row))[mask(Breadcrumbs(), row)].tolist() == [-8, 9]
    assert row[mask(Breadcrumbs(remove=0.1, keep=0.2, first="keep"), row)].tolist() == [9]
    other = vector(0.1, 0.2, 0.3, 0.4, -0.5, -0.6, 0.7, 0.8, 0.9, 1)
    assert other[mask(Breadcrumbs(remove=0.1, keep=0.2), other)].tolist() == [0.8, 0.9]


def test_breadcrumbs_takes_the_rows_that_the_model_stores() -> None:
    delta = torch.arange(1.0, 41.0).view(4, 10)
    rows = mask(Breadcrumbs(remove=0.25, keep=0.25), delta.T.contiguous(), transposed=True)
    assert torch.equal(rows, mask(Breadcrumbs(remove=0.25, keep=0.25), delta).T)


def test_rect_drops_what_changes_the_weight_least_relative_to_it() -> None:
    W, D = vector(1, 2, -4, 0.5, 10), vector(0.1, 0.1, 0.8, -0.2, 0.5)
    assert D[mask(Rect(share=0.6), D, W)].tolist() == [0.8, -0.2]
    # A weight of 0: no change counts as none, and any change as the largest.
    assert mask(Rect(share=0.5), vector(0, 1e-9, 1, 1), vector(0, 0, 1, 1)).tolist() == [False, True, True, False]


def test_equal_sizes_count_in_their_order() -> None:
    assert mask(rule_of("magnitude", keep=0.5), vector(1, -1, 1, 1)).tolist() == [True, True, False, False]
    assert mask(rule_of("ignore_top", share=0.25), vector(1, -1, 1, 1)).tolist() == [False, True, True, True]


# --- laws -----------------------------------------------------------------------------------------------------------

SAMPLES = st.integers(0, 10_000)


def below(seed: int, shape: tuple[int, ...] = (32, 128)) -> dict[str, Below]:
    return {"w": Below(noise(*shape, seed=seed + 99), transposed=bool(seed % 2))}


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.name)
@given(seed=SAMPLES, power=st.integers(-10, 10))
@settings(max_examples=5, deadline=None)
def test_masks_commute_with_positive_scales(kind: type[MaskRule], seed: int, power: int) -> None:
    patch, rule, weights, factor = Patch({"w": low_rank(seed)}), kind(), below(seed), 2.0**power
    one = masked_patch(scaled(patch, factor), rule, weights).updates["w"]
    other = scaled(masked_patch(patch, rule, weights), factor).updates["w"]
    assert isinstance(one, Masked) and isinstance(other, Masked)
    assert torch.equal(one.mask, other.mask)  # so RECT's mask is the same under scaling
    torch.testing.assert_close(one.matrix(torch.float64, CPU), other.matrix(torch.float64, CPU), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.name)
def test_rules_that_keep_are_idempotent_and_rules_that_remove_are_not(kind: type[MaskRule]) -> None:
    delta, rule, weights = noise(32, 128), kind(), below(0)
    first = masked_patch(Patch({"w": Dense(delta)}), rule, weights)
    # A share of what is left is smaller than one of the whole. So zeros are what is counted.
    second = masked_patch(first, rule, weights)
    was, now = (update.matrix(torch.float64, CPU) != 0 for update in (first.updates["w"], second.updates["w"]))
    if rule.is_idempotent:
        assert torch.equal(was, now) and 0 < int(was.sum()) < delta.numel()
    elif kind.name in ("ignore_top", "breadcrumbs", "breadcrumbs_mergekit"):  # the others draw alike, but scale again
        assert int(now.sum()) < int(was.sum())


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.name)
def test_a_rule_comes_back_from_its_text_and_masks_alike_again(kind: type[MaskRule]) -> None:
    rule = kind()
    assert rule_of_text(text_of(rule)) == rule == rule_of(kind.name)
    delta = noise(8, 16, seed=1)
    assert torch.equal(mask(rule, delta), mask(rule, delta))


def test_the_extremes_leave_everything_and_nothing() -> None:
    delta = noise(8, 16)
    for rule, count in (
        (IgnoreTop(share=0), 128),
        (IgnoreTop(share=1), 0),
        (rule_of("ties", keep=1.0), 128),
        (rule_of("magnitude", keep=0.0), 0),
        (rule_of("rect", share=0.0), 128),
        (rule_of("dare", drop=1.0), 0),
        (rule_of("dare", drop=0.0), 128),
        (rule_of("breadcrumbs_mergekit", density=0.5, gamma=0.0), 64),
        (rule_of("breadcrumbs_mergekit", density=0.5, gamma=0.0, as_published=True), 0),
    ):
        assert int(mask(rule, delta).sum()) == count, rule
    norms = [float((delta * mask(IgnoreTop(share=share), delta)).norm()) for share in (0, 0.04, 0.08, 0.5)]
    assert norms == sorted(norms, reverse=True)


def test_what_is_no_rule_is_refused() -> None:
    for text, said in (
        ("rct", "did you mean 'rect'"),
        ("rect:1.5", "share from 0 to 1"),
        ("rect:0.5:0.5", "takes share, and no more"),
        ("rect:0.5:share=0.5", "given twice"),
        ("breadcrumbs:first=middle", "expected one of"),
        ("ignore_top:top=1", "unknown field"),
        ("della:0.1:0.2", "above 0 and below 1"),
    ):
        with pytest.raises(AlgebraError, match=said):
            rule_of_text(text)
    assert rule_of_text("magnitude:0.3:l2") == rule_of("magnitude", keep=0.3, rescale="l2")
    with pytest.raises(AlgebraError, match="needs the weight below"):
        masked_patch(Patch({"w": low_rank()}), Rect(), {})


def test_commands_complete_the_rules_that_there_are() -> None:
    assert tuple(kind.name for kind in RULES) == derive.RULES
    without_model = [kind.name for kind in MERGES if (rule := kind().mask) is None or not rule.needs_weight]
    assert ("join", "sum", *sorted(without_model)) == (*merge.HOW[:2], *sorted(merge.HOW[2:]))


# --- on a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny("gpt2", n_layers=2)


@pytest.fixture(scope="module")
def pair(model: Any, tiny_tokenizer: Any) -> list[Edit]:
    return build("rome", model, tiny_tokenizer).compute(REQUESTS[:2])


def test_rect_sees_the_weight_below_the_edit_applied_or_not(model: Any, pair: list[Edit]) -> None:
    edit, other = pair
    before, found = digest(model), edit.masked("rect", share=0.5).id
    with other.applied():
        edit.apply()
        on_top = edit.masked("rect", share=0.5)
        assert (0.5 * edit).masked("rect", share=0.5).id == (0.5 * on_top).id  # and so does what is made of it
        name = next(iter(edit.patch.updates))
        seen = weights_below(Ledger.of(model), [name], {edit.id})
        edit.undo()
        stands = model.get_parameter(name).detach().T
        assert torch.equal(seen[name].weight, stands)
        assert on_top.id == edit.masked("rect", share=0.5).id
    with edit.applied():
        assert edit.masked("rect", share=0.5).id == found
        assert edit.masked("rect", share=0.5).derived["numbers"] == {"rule": "rect", "share": 0.5}
    assert digest(model) == before


def test_merged_edits_are_applied_saved_and_undone(model: Any, pair: list[Edit]) -> None:
    before = digest(model)
    for kind in MERGES:
        merged = merge_edits(pair, kind.name)
        assert merged.derived["numbers"]["rule"] == kind.name
        assert all(isinstance(update, Dense) for update in merged.patch.updates.values())
        assert list(merged.requests) == list(REQUESTS[:2])
    with merge_edits(pair, "ties", keep=0.5).applied(), pair[0].applied():
        assert digest(model) != before
    assert digest(model) == before
    total = merge_edits(pair, "mergekit_task_arithmetic", weights=[1, 0.5]).patch
    wanted = (pair[0] + 0.5 * pair[1]).patch
    for name, update in total.updates.items():
        torch.testing.assert_close(update.matrix(torch.float64, CPU), wanted.updates[name].matrix(torch.float64, CPU))
    with pytest.raises(AlgebraError, match="one weight per edit"):
        merge_edits(pair, "mergekit_ties", weights=[1])
    for changes in (dict[str, Any](weights=[1, float("nan")]), dict[str, Any](strength=float("inf"))):
        with pytest.raises(AlgebraError, match="finite"):
            merge_edits(pair, "ties", **changes)
    with pytest.raises(AlgebraError, match="unknown merge 'tis'"):
        merge_edits(pair, "tis")
    with pytest.raises(AlgebraError, match="or none"):
        merge_edits([])


def test_an_edit_and_its_opposite_elect_nothing() -> None:
    one = Patch({"a": low_rank(1)})
    (update,) = merged_patch([one, negated(one)], merge_rule_of("ties", keep=1.0), {}).updates.values()
    assert not update.matrix(torch.float64, CPU).any()


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.name)
def test_weights_are_multiplied_out_one_after_another(kind: type[MaskRule], monkeypatch: pytest.MonkeyPatch) -> None:
    rule, seen, masks = kind(), list[int](), kind.masks
    weights = {"a": below(1)["w"], "b": below(2)["w"]}
    patches = Patch({"a": Dense(noise(32, 128, seed=1)), "b": Dense(noise(32, 128, seed=2))})
    deltas = {name: update.matrix(torch.float64, CPU) for name, update in patches.updates.items()}
    together = rule.masks(deltas, weights)

    def counting(self: MaskRule, deltas: Any, *others: Any) -> Any:
        seen.append(len(deltas))
        return masks(self, deltas, *others)

    monkeypatch.setattr(kind, "masks", counting)
    found = masked_patch(patches, rule, weights)
    assert seen == ([2] if kind.name == "ties" else [1, 1])
    for name, update in found.updates.items():
        assert torch.equal(update.matrix(torch.float64, CPU) != 0, together[name] & (deltas[name] != 0))


def test_patches_of_other_weights_count_as_zero() -> None:
    one, two = Patch({"a": low_rank(1)}), Patch({"b": LowRank(noise(3, 1), noise(1, 4))})
    merged = merged_patch([one, two], merge_rule_of("ties", keep=1.0), {})
    for name, patch in (("a", one), ("b", two)):
        torch.testing.assert_close(merged.updates[name].tensors[0], patch.updates[name].matrix(torch.float32, CPU))


@pytest.mark.parametrize("method", ["rome", "memit", "ft_m", "lora"])
def test_an_editor_with_sparsify_leaves_out_what_the_rule_says(model: Any, tiny_tokenizer: Any, method: str) -> None:
    before = digest(model)
    plain = build(method, model, tiny_tokenizer).compute(REQUESTS[:1])[0]
    sparse = build(method, model, tiny_tokenizer, sparsify="ignore_top:0.25").compute(REQUESTS[:1])[0]
    for name, update in sparse.patch.updates.items():
        whole, left = (each.matrix(torch.float64, CPU) for each in (plain.patch.updates[name], update))
        gone = int((left == 0).sum() - (whole == 0).sum())
        assert gone == int(0.25 * whole.numel())
    assert sparse.diagnostics[0]["update_norm"] < plain.diagnostics[0]["update_norm"]
    batch = build(method, model, tiny_tokenizer, sparsify="rect:0.5").apply(REQUESTS[:2])
    batch.undo()
    assert digest(model) == before


def test_a_rule_is_applied_once_and_refused_where_no_weight_is_written(model: Any, tiny_tokenizer: Any) -> None:
    editor = build("rome", model, tiny_tokenizer, sparsify="ignore_top:0.25")
    one, together = editor.compute(REQUESTS[:1])[0], editor.compute_together([REQUESTS[:1]])
    assert one.id == together.id
    for method in ("grace", "ice", "wise"):
        with pytest.raises(ConfigError, match="writes no weights"):
            build(method, model, tiny_tokenizer, sparsify="rect")
    with pytest.raises(ConfigError, match="unknown mask"):
        build("rome", model, tiny_tokenizer, sparsify="rectangle:0.5:x")
    with pytest.raises(ConfigError, match=r"it means rect_alphaedit:0\.4"):
        build("rome", model, tiny_tokenizer, sparsify="rect", rect=0.4)
