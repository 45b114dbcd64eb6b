"""Masks and merges against the originals' numbers: every mask exactly, every merge to 1e-6.

The originals: prateeky2806/ties-merging, rezazzr/breadcrumbs, arcee-ai/mergekit, JasonForJoy/Model-Editing-Hurt and
yule-BUAA/MergeLM. Rules that draw are given their draws, which come from the same seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.algebra.mask_rules import Below, MaskRule
from errata.editors.core.algebra.masking import masked_patch, merged_patch
from errata.editors.core.algebra.merge_rules import MergeRule, Ties, elected_signs, stacked
from errata.editors.core.algebra.patch_arithmetic import added, negated, scaled
from errata.editors.core.algebra.rule_texts import merge_rule_of, rule_of
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.editors.core.solve.bits import unpack_bits

MODELS = ("gpt2_tr", "llama")
TOLERANCE = 1e-6  # relative; the originals compute in float32
# what a case of the originals is called -> our rule, from the numbers in the name
RULES: tuple[tuple[str, Callable[..., tuple[str, dict[str, Any]]]], ...] = (
    (r"breadcrumbs_remove(.+)_keep(.+)", lambda g, b: ("breadcrumbs", {"remove": g, "keep": b})),
    (
        r"breadcrumbs_keepfirst_remove(.+)_keep(.+)",
        lambda g, b: ("breadcrumbs", {"remove": g, "keep": b, "first": "keep"}),
    ),
    (r"topkzero_(.+)", lambda share: ("ignore_top", {"share": share, "per": "row"})),
    (r"topkkeep_(.+)", lambda keep: ("magnitude", {"keep": keep, "per": "row"})),
    (
        r"mergekit_outliers_density(.+)_gamma(.+)",
        lambda d, g: ("breadcrumbs_mergekit", {"density": d, "gamma": g, "as_published": True}),
    ),
    (r"mergekit_magnitude_density([\d.]+)", lambda keep: ("magnitude", {"keep": keep})),
    (r"mergekit_magnitude_density(.+)_l1", lambda keep: ("magnitude", {"keep": keep, "rescale": "l1"})),
    (r"mergekit_magnitude_density(.+)_l2", lambda keep: ("magnitude", {"keep": keep, "rescale": "l2"})),
    (r"ties_trim_K(.+)", lambda percent: ("ties", {"keep": percent / 100})),
    (r"rect_zero(.+)", lambda share: ("rect", {"share": share})),
    (r"dare_rate(.+)_rescaled", lambda drop: ("dare", {"drop": drop})),
    (r"dare_rate(.+)_plain", lambda drop: ("dare", {"drop": drop, "rescale": False})),
    (r"dare_magnitude_rate(.+)_rescaled", lambda drop: ("dare_magnitude", {"drop": drop})),
    (r"mergekit_dare_density(.+)_l1", lambda density: ("dare_mergekit", {"density": density})),
    (r"mergekit_della_density(.+)_eps(.+)_l1", lambda d, e: ("della", {"density": d, "epsilon": e})),
)
OUTLIERS = {"density": 0.2, "gamma": 0.1, "as_published": True}
MERGED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ties_K20_dis-mean": ("ties", {"keep": 0.2}),
    "ties_K20_dis-sum": ("ties", {"keep": 0.2, "average": "sum"}),
    "ties_K20_dis-max": ("ties", {"keep": 0.2, "average": "max"}),
    "ties_K50_dis-mean": ("ties", {"keep": 0.5}),
    "ties_K80_dis-mean": ("ties", {"keep": 0.8}),
    "breadcrumbs_repo_ties_keep0.2": ("ties", {"keep": 0.2}),
    "mergekit_task_arithmetic": ("mergekit_task_arithmetic", {}),
    "mergekit_ties": ("mergekit_ties", {"density": 0.2, "strength": 0.7}),
    "mergekit_ties_count": ("mergekit_ties_count", {"density": 0.2}),
    "mergekit_breadcrumbs": ("mergekit_breadcrumbs", OUTLIERS),
    "mergekit_breadcrumbs_ties": ("mergekit_breadcrumbs_ties", OUTLIERS),
    "mergekit_dare_linear": ("mergekit_dare_linear", {"density": 0.3}),
    "mergekit_dare_ties": ("mergekit_dare_ties", {"density": 0.3}),
    "mergekit_della": ("mergekit_della", {"density": 0.4}),
}


def rule(case: str) -> MaskRule | None:
    for pattern, make in RULES:
        if found := re.fullmatch(pattern, case):
            name, numbers = make(*map(float, found.groups()))
            return rule_of(name, **numbers)
    assert case.startswith("rect_random"), case  # RECT's control draws by another function
    return None


def merge_rule(case: str) -> MergeRule:
    name, numbers = MERGED[case]
    return merge_rule_of(name, **numbers)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours.double() - theirs.double()).norm()) <= TOLERANCE * float(theirs.double().norm())


def test_masks_of_made_vectors_are_those_of_the_originals(golden_root: Path) -> None:
    tensors = load_file(golden_root / "gpt2_tr/algebra/made_f32.safetensors")
    checked = 0
    for key, wanted in tensors.items():
        if not (found := re.fullmatch(r"(\w+)\.(\d)\.(.+)\.(mask|result)", key)):
            continue
        name, index, case, kind = found.groups()
        if (ours := rule(case)) is None:
            continue
        delta, below = tensors[f"{name}.tau"][int(index)], {"w": Below(tensors[f"{name}.base"], transposed=False)}
        mask = ours.masks({"w": delta}, below)["w"]
        if kind == "mask":
            assert torch.equal(mask & (delta != 0), wanted), key
        else:
            assert close(delta * mask * ours.gain(delta, mask), wanted), key
        checked += 1
    assert checked == 232


def test_merges_of_made_vectors_are_those_of_the_originals(golden_root: Path) -> None:
    tensors = load_file(golden_root / "gpt2_tr/algebra/made_f32.safetensors")
    for name in ("vec40", "mat6x10", "mat4x30"):
        edits, base = [{"w": delta} for delta in tensors[f"{name}.tau"]], tensors[f"{name}.base"]
        below = {"w": Below(base, transposed=False)}
        for case in MERGED:
            weights = (1.0, 0.5, 2.0)[: len(edits)] if case.startswith("mergekit") else [1.0] * len(edits)
            merged = merge_rule(case).merged(edits, below, weights)["w"]
            on_base = base if case.startswith("mergekit") else 0
            assert close(on_base + merged, tensors[f"{name}.merge.{case}"]), (name, case)
        signs = elected_signs(stacked(Ties().sparsified(edits, below)))["w"]
        assert torch.equal(signs, tensors[f"{name}.merge.ties_K20_signs"].to(signs))
        patches = [Patch({"w": Dense(edit["w"])}) for edit in edits]
        total = added(patches)
        for case, patch in (("sum", total), ("notebook_tv_sum", total), ("negated0", negated(patches[0]))):
            assert close(patch.updates["w"].tensors[0], tensors[f"{name}.merge.{case}"]), (name, case)
        assert close(base + scaled(total, 0.4).updates["w"].tensors[0], tensors[f"{name}.merge.sum_scaled0.4_on_base"])


def weight_below(golden_root: Path, model: str, layer: int) -> Below:
    name = (
        f"transformer.h.{layer}.mlp.c_proj.weight"
        if model == "gpt2_tr"
        else f"model.layers.{layer}.mlp.down_proj.weight"
    )
    with safe_open(golden_root / "models" / model / "model.safetensors", "pt") as file:
        stored = file.get_tensor(name)
    return Below(stored.T if model == "gpt2_tr" else stored, transposed=model == "gpt2_tr")


def as_stored(matrix: Tensor, below: Below) -> Tensor:
    return matrix.T if below.transposed else matrix


@pytest.mark.parametrize("model", MODELS)
def test_masks_of_memits_updates_are_those_of_the_originals(golden_root: Path, model: str) -> None:
    folder, checked = golden_root / model, 0
    wanted = load_file(folder / "algebra/memit_w100_f32.safetensors")
    said = json.loads((folder / "algebra/memit_w100_f32.json").read_text())["ops"]
    memit = load_file(folder / "memit/batch_w100_f32.safetensors")
    for layer in (2, 3, 4):
        below = weight_below(golden_root, model, layer)
        delta = (memit[f"layer{layer}.resid"].double() @ memit[f"layer{layer}.adj_k"].double().T).float()
        if layer == 4:
            delta = as_stored(memit["layer4.weight_delta"], below)
        for case, numbers in said[f"layer{layer}"].items():
            if (ours := rule(case)) is None:
                continue
            # Draws are those of the originals only in their orientation.
            draws = hasattr(ours, "seed")
            given = as_stored(delta, below) if draws else delta
            there = Below(as_stored(below.weight, below), transposed=False) if draws else below
            masked = masked_patch(Patch({"w": Dense(given)}), ours, {"w": there}).updates["w"].tensors[0]
            masked = masked if draws else as_stored(masked, below)
            assert int((masked != 0).sum()) == numbers["kept"], case
            assert float(masked.double().norm()) == pytest.approx(numbers["norm"], rel=1e-5), case
            assert float(masked.double().abs().sum()) == pytest.approx(numbers["abs_sum"], rel=1e-5), case
            if layer == 4:
                mask = wanted[f"layer4.{case}.mask_packed"]
                # Their bits are the highest first.
                places = torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=torch.uint8)
                assert torch.equal(masked != 0, unpack_bits(places[mask.long()], masked.shape)), case
                checked += 1
    assert checked == 23


@pytest.mark.parametrize("model", MODELS)
def test_merges_of_four_edits_are_those_of_the_originals(golden_root: Path, model: str) -> None:
    folder, below = golden_root / model, weight_below(golden_root, model, 3)
    wanted = load_file(folder / "algebra/rome4_f32.safetensors")
    said = json.loads((folder / "algebra/rome4_f32.json").read_text())["ops"]
    rome = [load_file(folder / f"rome/req{index}_mom2_f32.safetensors") for index in range(4)]
    patches = [Patch({"w": LowRank(each["v"][:, None], each["u"][None])}) for each in rome]
    for case in MERGED:
        on_base = case.startswith("mergekit")
        weights = said["weights"] if on_base else None
        merged = merged_patch(patches, merge_rule(case), {"w": below}, weights).updates["w"].tensors[0]
        result = as_stored(merged + below.weight if on_base else merged, below)
        draws = "dare" in case or "della" in case  # which are made in another orientation here
        if not draws or not below.transposed:
            assert float(result.double().norm()) == pytest.approx(said["norms"][case], rel=1e-5), case
        assert int((result != 0).sum()) == said["nonzero"][case], case
        if f"merge.{case}" in wanted:
            assert close(result, wanted[f"merge.{case}"]), case
    for case, patch in (("sum", added(patches)), ("negated0", negated(patches[0]))):
        assert float(patch.updates["w"].norm()) == pytest.approx(said["norms"][case], rel=1e-5)
