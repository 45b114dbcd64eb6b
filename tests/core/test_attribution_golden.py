"""COAR against numbers from the authors' program: margins under ablations, regression, scores and the edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.locating.ablated_margins import ablated_margins
from errata.editors.core.locating.attribution import checked, component_scores, text_row
from errata.editors.core.locating.components import Components, components_of
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.solve.mask_regression import SagaSettings, least_squares, saga

F32: Any = {"rtol": 1e-4, "atol": 1e-5}  # relative, of the README of the golden numbers; margins near 0 have no ratio


class GoldenAttribution(NamedTuple):
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    masks: Tensor
    architecture: Architecture
    components: Components
    rows: list[AnsweredRow]

    def margins(self, keep: Tensor) -> Tensor:
        return ablated_margins(self.architecture, self.components, self.rows, keep, pad=0).mean


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> GoldenAttribution:
    folder = golden_root / "gpt2_tr" / "coar"
    if not folder.is_dir():
        pytest.skip("the golden numbers hold no coar")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meta = json.loads((folder / "layer3_f32.json").read_text())
    tensors = load_file(folder / "layer3_f32.safetensors")
    count = sum(meta["components"].values())
    masks = torch.from_numpy(np.unpackbits(tensors["masks_packed"].numpy(), axis=1)[:, :count].astype(bool))
    tokenizer = AutoTokenizer.from_pretrained(golden_root / "tokenizer")
    path = golden_root / "models" / "gpt2_tr"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    architecture = describe(model)
    components = components_of(architecture, "rows", [3])
    rows = [text_row(tokenizer, text) for text in meta["texts"]]
    return GoldenAttribution(meta, tensors, masks, architecture, components, rows)


def test_the_components_are_those_of_the_published_code(golden: GoldenAttribution) -> None:
    own: dict[str, int] = {}
    for component in golden.components.each:
        own[f"{component.map}.weight"] = own.get(f"{component.map}.weight", 0) + 1
        assert component.end == component.first + 1
    assert own == golden.meta["components"]
    assert list(own) == list(golden.meta["components"])
    assert len(components_of(golden.architecture)) == golden.meta["all_components_of_the_model"]


def test_margins_under_ablations(golden: GoldenAttribution) -> None:
    whole = torch.ones(1, len(golden.components), dtype=torch.bool)
    untouched = torch.tensor([golden.meta["margins_unablated"]], dtype=torch.float64)
    torch.testing.assert_close(golden.margins(whole), untouched, **F32)
    some = torch.cat([torch.arange(0, 900, 18), torch.arange(900, 1020, 4)])
    torch.testing.assert_close(golden.margins(golden.masks[some]), golden.tensors["margins"][some].double(), **F32)


@pytest.mark.slow
def test_margins_under_every_ablation(golden: GoldenAttribution) -> None:
    torch.testing.assert_close(golden.margins(golden.masks), golden.tensors["margins"].double(), **F32)


def test_regression_and_its_predictions(golden: GoldenAttribution) -> None:
    margins = golden.tensors["margins"].double()
    fit = least_squares(golden.masks[:900], margins[:900])
    torch.testing.assert_close(fit.weights, golden.tensors["attributions"].double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        fit.intercepts, torch.tensor(golden.meta["intercepts"], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    for name, rows in (("keep0.95", slice(900, 960)), ("keep0.85", slice(960, 1020))):
        found = checked(fit, golden.masks[rows], margins[rows], 0.95).correlations
        torch.testing.assert_close(found, torch.tensor(golden.meta["correlations"][name], dtype=torch.float64), **F32)


def test_scores_and_the_edit(golden: GoldenAttribution) -> None:
    edit, weights = golden.meta["edit"], golden.tensors["attributions"]
    scores = component_scores(weights[edit["targets"]], weights[edit["references"]])
    torch.testing.assert_close(scores, golden.tensors["scores"].double(), **F32)
    for name, sign in (("top6", 1), ("bottom6", -1)):
        order = (sign * scores).argsort(descending=True)[:6].tolist()
        assert order == edit[name]
        torch.testing.assert_close(scores[order].tolist(), edit[f"{name}_scores"], **F32)
        whole = torch.ones(1, len(golden.components), dtype=torch.bool)
        cut = whole.clone()
        cut[0, order] = False
        wanted = torch.tensor([edit[f"margins_after_{name}_ablated"]], dtype=torch.float64)
        torch.testing.assert_close(golden.margins(cut), wanted, **F32)
    hand = golden.meta["hand_made"]
    columns = [torch.tensor(hand[name], dtype=torch.float64)[:, None] for name in ("targets", "references")]
    torch.testing.assert_close(float(component_scores(*columns)), hand["score"], **F32)


def test_the_published_loop_ends_at_least_squares_where_it_may_go_on(golden: GoldenAttribution) -> None:
    masks, margins = golden.masks[:900], golden.tensors["margins"][:900].double()
    closed = least_squares(masks, margins)
    loop = saga(masks, margins, settings=SagaSettings(lr=0.5, eps=1e-18))
    torch.testing.assert_close(loop.weights, closed.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loop.intercepts, closed.intercepts, rtol=1e-5, atol=1e-6)
    # With fewer masks than one published batch, the published rule stops it after a few steps.
    assert float(saga(masks, margins).weights.norm()) < 0.1 * float(closed.weights.norm())
