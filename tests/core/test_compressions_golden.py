"""Pruning, quantisation, set F1 and order metrics against numbers from the code of composable interventions."""

from __future__ import annotations

import functools
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.interventions import registry
from errata.editors.core.interventions.compressions import TEXT
from errata.editors.core.model.activations import run_until_captured
from errata.editors.core.model.architecture import LinearMap, describe
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.tokens import answer_ids, right_padded
from errata.editors.core.solve.quantising import gptq, grid_of
from errata.evaluate.orders import order_free_error, order_sensitivity
from errata.evaluate.set_f1 import left_out_ids, set_match, written_ids


@functools.cache
def loaded(root: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    path = root / "models" / name
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def read(root: Path, model: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = root / model / "composable"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("case", ["wanda_0.5", "wanda_0.3", "sparsegpt_0.5", "magnitude_0.5"])
def test_pruning(golden_root: Path, case: str) -> None:
    meta, tensors = read(golden_root, "llama", f"{case}_f32")
    model, name = loaded(golden_root, "llama"), case.partition("_")[0]
    rows = tensors["calibration_input_ids"]
    applied = registry.get(name)({"sparsity": meta["sparsity_ratio"]}).apply_rows(model, {TEXT: rows.tolist()})
    weights = {found: model.get_parameter(f"model.layers.{found}.weight").detach() for found in _maps(tensors)}
    for found, weight in weights.items():
        assert torch.equal(weight == 0, tensors[f"layer{found}.mask"])
        if f"layer{found}.weight" in tensors:
            torch.testing.assert_close(weight, tensors[f"layer{found}.weight"], rtol=1e-4, atol=1e-6)
    for label, said in meta["maps"].items():
        weight = model.get_parameter(f"model.layers.{label.removeprefix('Layer').replace('_', '.', 1)}.weight")
        assert int((weight == 0).sum()) == said["zeros"]
        assert float(weight.detach().norm()) == pytest.approx(said["norm"], rel=1e-5)
    assert applied.average_bits() == pytest.approx(meta["average_bits"], abs=1e-9)
    with torch.no_grad():
        logits = model(rows[:1]).logits[0, -1]
    torch.testing.assert_close(logits, tensors["logits_row0_last"], rtol=1e-4, atol=1e-4)
    applied.undo()


def _maps(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removeprefix("layer").removesuffix(".mask") for name in tensors if name.endswith(".mask")]


@pytest.mark.parametrize("model_name", ["gpt2_tr", "llama"])
def test_quantising(golden_root: Path, model_name: str) -> None:
    meta, tensors = read(golden_root, model_name, "quantised_f32")
    model = loaded(golden_root, model_name)
    found = LinearMap(meta["module"], model.get_submodule(meta["module"]))
    rows = tensors["calibration_input_ids"]
    with torch.no_grad():
        (inputs,) = run_until_captured(describe(model), right_padded(rows.tolist(), 0), [found.module])
    X = inputs.flatten(0, 1)
    gram, weight = 2 / len(rows) * X.T @ X, found.weight
    torch.testing.assert_close(gram.diagonal(), tensors["H_diag"], rtol=1e-5, atol=0)
    is_turned = model_name == "gpt2_tr"
    for name, said in meta["variants"].items():
        if name == "norms":
            continue
        group = None if said["group_size"] == -1 else said["group_size"]
        points: Any = "symmetric" if said["sym"] else "asymmetric"
        given: Any = {"points": points, "by_activation": said["act_order"], "damp": said["percdamp"]}
        quantised, grid = gptq(weight, gram, said["bits"], group, **given)
        torch.testing.assert_close(grid.scale, tensors[f"{name}.scale"], rtol=1e-4, atol=0)
        assert torch.equal(grid.zero, tensors[f"{name}.zero"])
        assert torch.equal(grid.group, tensors[f"{name}.g_idx"].long())
        if (theirs := tensors.get(f"{name}.weight")) is None:
            assert float(quantised.norm()) == pytest.approx(meta["variants"]["norms"][f"{name}.weight"], rel=1e-4)
        else:
            # An element on the boundary between two points may fall on the other side.
            is_equal = (quantised - (theirs.T if is_turned else theirs)).abs() < 1e-6
            assert float(is_equal.double().mean()) > 0.994
        if (theirs := tensors.get(f"{name}.rtn")) is not None:
            rounded = grid_of(weight, said["bits"], group, points).nearest(weight)
            assert torch.equal(rounded, theirs.T if is_turned else theirs)
    for bits, group in ((4, 16), (2, 16), (4, 0)):
        name, grid = f"awq_rtn_b{bits}_g{group}", grid_of(weight, bits, group or None, "awq")
        assert torch.equal(grid.scale, tensors[f"{name}.scale"])
        assert torch.equal(grid.zero, tensors[f"{name}.zero"])
        if f"{name}.weight" in tensors:
            assert torch.equal(grid.nearest(weight), tensors[f"{name}.weight"])


@pytest.mark.parametrize("model_name", ["gpt2_tr", "llama"])
def test_set_f1(golden_root: Path, model_name: str) -> None:
    from transformers import AutoTokenizer

    said = json.loads((golden_root / model_name / "composable" / "set_f1.json").read_text())
    model, tokenizer = loaded(golden_root, model_name), AutoTokenizer.from_pretrained(golden_root / "tokenizer")
    left_out = left_out_ids(tokenizer)
    assert left_out == set(said["excluded_ids"])
    for entry in said["hand_made"]:
        assert set_match(entry["generated"], entry["target"]) == pytest.approx((entry["f1"], entry["recall"]))
    cases = [case for kind in said["cases"].values() for case in kind["cases"]]
    prompts = [as_read(tokenizer, case["prompt"]) for case in cases]
    answers = [answer_ids(tokenizer, case["prompt"], case["target"]) for case in cases]
    found = written_ids(model, tokenizer, prompts, list(map(len, answers)))
    for case, answer, written in zip(cases, answers, found, strict=True):
        assert set_match(written, answer, left_out) == pytest.approx((case["f1"], case["recall"]), abs=1e-9)


def test_order_metrics(golden_root: Path) -> None:
    said = json.loads((golden_root / "llama/composable/order_metrics.json").read_text())
    compressions, unlearnings = ("SparseGPT", "Wanda", "GPTQ", "AWQ"), ("RMU", "GA", "GD")
    edits = ("LoRA", "MEMIT", "Fine-tune")
    columns = {
        "mmlu": "mmlu accuracy",
        "edit": "Rewrite accuracy",
        "generalization": "Generalization",
        "locality": "Locality",
    }
    for one, other in (*product(edits, (*compressions, *unlearnings)), *product(unlearnings, compressions)):
        orders = [
            row
            for row in said["rows"]
            if {row["first"], row["second"]} == {one, other}
            and row["sparsity_ratio"] in (None, 0.25)
            and row["wbits"] in (None, 4)
        ]
        assert len(orders) == 2
        for name, column in columns.items():
            values = [row[column] for row in orders]
            assert order_sensitivity(*values) == pytest.approx(said["results"][f"{name}_oi_data"][one][other], abs=1e-9)
            assert order_free_error(*values) == pytest.approx(said["results"][f"{name}_mce_data"][one][other], abs=1e-9)
        known = [(row["wmdp_bio accuracy"] + row["wmdp_cyber accuracy"]) / 2 for row in orders]
        error = order_free_error(*known, lower_is_better=True)
        assert error == pytest.approx(said["results"]["wmdp_mce_data"][one][other], abs=6e-5)  # theirs are rounded
        assert order_sensitivity(*known) == pytest.approx(said["results"]["wmdp_oi_data"][one][other], abs=6e-5)
