"""Component attribution: components, ablations against written weights, and the regression on masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError, FewMasksWarning, RequestError
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, Patch, Update
from errata.editors.core.locating import components
from errata.editors.core.locating.ablated_margins import ablated_margins
from errata.editors.core.locating.attribution import (
    answered_row,
    attribute,
    component_scores,
    correlations,
    default_masks,
    drawn_masks,
    text_row,
)
from errata.editors.core.locating.components import Components, components_of
from errata.editors.core.model.architecture import describe
from errata.editors.core.solve.mask_regression import SagaSettings, least_squares, saga

ARCHITECTURES = ("gpt2", "llama", "neox")


def masks_of(count: int, components: int, keep: float = 0.8) -> Tensor:
    return drawn_masks(count, components, keep, torch.Generator().manual_seed(1))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- regression -----------------------------------------------------------------------------------------------------


def test_a_line_is_found_again_and_predicts() -> None:
    weights, level, masks = random(3, 12), random(3), masks_of(40, 12)
    fit = least_squares(masks, masks.double() @ weights.T + level)
    torch.testing.assert_close(fit.weights, weights)
    torch.testing.assert_close(fit.intercepts, level)
    fresh = ~masks
    torch.testing.assert_close(fit.predicted(fresh), fresh.double() @ weights.T + level)


@pytest.mark.parametrize("case", ["more masks", "fewer masks", "two components alike", "one never ablated"])
def test_least_squares_is_the_smallest_of_the_best_fits(case: str) -> None:
    masks, outputs = masks_of(9 if case == "fewer masks" else 40, 12), random(40, 3)
    if case == "two components alike":
        masks[:, 4] = masks[:, 7]
    if case == "one never ablated":
        masks[:, 5] = True
    outputs = outputs[: len(masks)]
    X, Y = (each.double() - each.double().mean(0) for each in (masks, outputs))
    fit = least_squares(masks, outputs)
    torch.testing.assert_close(fit.weights, (torch.linalg.pinv(X, rtol=1e-8) @ Y).T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fit.predicted(masks).mean(0), outputs.mean(0))


@pytest.mark.parametrize("count", [9, 40])
def test_a_ridge_adds_to_the_variances(count: int) -> None:
    masks, outputs = masks_of(count, 12), random(count, 3)
    X, Y = (each.double() - each.double().mean(0) for each in (masks, outputs))
    gram = X.T @ X
    added = 0.1 * gram.diagonal().mean()
    wanted = torch.linalg.solve(gram + added * torch.eye(12), X.T @ Y).T
    if count > 12:
        torch.testing.assert_close(least_squares(masks, outputs, ridge=0.1).weights, wanted)
    else:  # the same problem, solved over the masks
        kernel = X @ X.T + 0.1 * X.square().sum(0).mean() * torch.eye(count)
        torch.testing.assert_close(wanted, (X.T @ torch.linalg.solve(kernel, Y)).T)
        torch.testing.assert_close(least_squares(masks, outputs, ridge=0.1).weights, wanted)


def test_the_loop_leaves_a_component_alone_that_is_never_ablated() -> None:
    masks = masks_of(60, 6)
    masks[:, 2] = True
    outputs = masks.double() @ random(2, 6).T
    fit = saga(masks, outputs, settings=SagaSettings(lr=0.2, batch=25, eps=1e-20))
    assert (fit.weights[:, 2] == 0).all()
    torch.testing.assert_close(fit.predicted(masks), outputs, rtol=1e-6, atol=1e-6)


def test_scores_and_correlations_where_nothing_varies() -> None:
    same = torch.ones(3, 2)
    assert component_scores(same, same).tolist() == [0.0, 0.0]
    assert correlations(same, random(3, 2)).tolist() == [0.0, 0.0]


# --- components and their ablation ----------------------------------------------------------------------------------


def test_the_components_of_a_block(make_tiny: Any) -> None:
    architecture = describe(make_tiny("llama"))
    width, d_mlp = architecture.d_model, architecture.d_mlp
    assert len(components_of(architecture, "rows", [0])) == 6 * width + d_mlp  # q, k, v, o, gate and up; down
    pooled = components_of(architecture, "heads,neurons:8")
    names = [component.name for component in pooled.each if component.layer == 2]
    assert names[:5] == ["2.head.0", "2.head.1", "2.head.2", "2.head.3", "2.neurons.0-7"]
    assert sum(component.end - component.first for component in pooled.each) == 3 * (width + d_mlp)
    assert [component.name for component in components_of(architecture, "mlp,attention", [1]).each] == [
        "1.mlp",
        "1.attention",
    ]
    assert components_of(architecture, "neurons", [0]).each[3].name == "0.neurons.3"
    assert default_masks(components_of(architecture, "mlp", [0])) == 2


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ("row", "did you mean 'rows'"),
        ("neurons:0", "a size above 0"),
        ("heads:2", "a size above 0"),
        ("rows,mlp", "names units twice"),
        ("heads,attention", "names units twice"),
        ("mlp,mlp", "names units twice"),
    ],
)
def test_kinds_that_there_are_not(kinds: str, said: str, make_tiny: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        components_of(describe(make_tiny("gpt2")), kinds)
    with pytest.raises(ConfigError, match="0 to 2"):
        components_of(describe(make_tiny("gpt2")), "mlp", [3])


def without(components: Components, keep: Tensor) -> Patch:
    """The patch that writes zeros into the columns of what is not kept."""
    updates: dict[str, Update] = {}
    for name, units in components.units((~keep).nonzero()[:, 0].tolist()).items():
        delta = torch.zeros_like(components.maps[name].weight)
        delta[:, units] = -components.maps[name].weight[:, units]
        updates[components.maps[name].name] = Dense(delta)
    return Patch(updates)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kinds", ["rows", "heads,neurons:8"])
def test_ablations_are_what_zeros_in_the_weights_give(
    name: str, kinds: str, make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny(name, dtype=torch.float64)
    architecture = describe(model)
    rows = [
        answered_row(tiny_tokenizer, "The capital of Varland is", "Brast"),
        text_row(tiny_tokenizer, "The mother tongue of Danielle Darrieux is French", most_tokens=7),
    ]
    components = components_of(architecture, kinds, [1, 2])
    keep = masks_of(3, len(components))
    keep[0] = True
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = ablated_margins(architecture, components, rows, keep, pad=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ledger = Ledger.of(model)
    for mask, mean, least in zip(keep, found.mean, found.least, strict=True):
        ledger.append("cut", without(components, mask), EditInfo("test", (), {}, ()))
        for row, own_mean, own_least in zip(rows, mean, least, strict=True):
            logits = model(torch.tensor([row.ids])).logits[0, list(row.positions)].detach()
            margins = []
            for line, token in zip(logits, row.answer, strict=True):
                others = torch.cat([line[:token], line[token + 1 :]])
                margins.append(float(line[token] - others.max()))
            assert float(own_mean) == pytest.approx(sum(margins) / len(margins), abs=1e-6)
            assert float(own_least) == pytest.approx(min(margins), abs=1e-6)
        ledger.remove("cut")


def test_no_hook_stays_where_a_later_one_cannot_be_made(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = components_of(describe(make_tiny("gpt2")), "attention,mlp")
    made: list[Tensor] = []

    def closing(gates: Tensor) -> Any:
        if made:
            raise MemoryError
        made.append(gates)
        return lambda _module, args: args

    monkeypatch.setattr(components, "_closing", closing)
    with pytest.raises(MemoryError), found.ablated(torch.zeros(1, len(found), dtype=torch.bool)):
        pass
    assert not any(linear.module._forward_pre_hooks for linear in found.maps.values())


def test_an_attribution_predicts_what_it_was_not_fitted_to(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    rows = [answered_row(tiny_tokenizer, "The capital of Varland is", answer) for answer in ("Brast", "English")]
    said: list[tuple[int, int, str]] = []
    found = attribute(
        model,
        tiny_tokenizer,
        rows,
        "attention,mlp",
        keep=0.9,
        n_masks=30,
        keep_rates=(0.9, 0.8),
        check_masks=12,
        progress=lambda done, total, what: said.append((done, total, what)),
    )
    assert found.weights.shape == (2, 6)
    assert [check.keep for check in found.checks] == [0.9, 0.8]
    assert all(check.measured.shape == (12, 2) for check in found.checks)
    assert float(found.checks[0].correlations.min()) > 0.8
    assert said[-1] == (110, 110, "ablations")
    wrong: Any
    for wrong in ({"keep": 1.0}, {"n_masks": 1}, {"ridge": -1.0}, {"keep_rates": (0.0,)}):
        with pytest.raises(ConfigError, match="expected"):
            attribute(model, tiny_tokenizer, rows, "mlp", **wrong)
    with pytest.warns(FewMasksWarning, match="3 masks cannot tell 3 components apart.*more than 3 masks .by default 5"):
        attribute(model, tiny_tokenizer, rows, "mlp", n_masks=3)
    with pytest.raises(RequestError, match="at least two tokens"):
        text_row(tiny_tokenizer, "a", most_tokens=1)
