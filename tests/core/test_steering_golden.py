"""Activation addition, CAA, affine concept editing, ITI and Model Surgery against runs of the authors' code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.errors import LedgerError
from errata.editors.core.model.architecture import describe
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.heads import HeadStates, head_accuracy, head_shifts
from errata.editors.core.steering.learning import learn_steering
from errata.editors.core.steering.positions import Where
from errata.editors.core.steering.readings import row_states
from errata.editors.core.steering.steering import Steering
from errata.editors.core.steering.weight_changes import gate, gate_cosines

TOLERANCE = {"f32": 1e-4, "f64": 1e-9}
# Tensors that the tests are given, that others hold already, or that are compared without a tolerance.
GIVEN = r"activation|_directions$|o_proj_input|^(positives|negatives|probe_accuracy)$|addition_norms|proj_(left|right)"
CASES = [("gpt2_tr", "f32"), ("gpt2_tr", "f64"), ("llama", "f32")]


class Theirs:
    """A golden model with the files of one system."""

    def __init__(self, root: Path, name: str, dtype: str, system: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = root / name / "steering" / f"{system}_{dtype}"
        self.meta = json.loads(path.with_suffix(".json").read_text())
        self.stored, self.tolerance = load_file(path.with_suffix(".safetensors")), TOLERANCE[dtype]
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            root / "models" / name, attn_implementation="eager", dtype=torch.float32
        )
        self.model = self.model.double() if dtype == "f64" else self.model
        self.tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
        self.parts = describe(self.model)
        self.compared: set[str] = set()

    def logits(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0, -1]

    def check(self, name: str, ours: Tensor) -> None:
        if name in self.stored:
            self.compared.add(name)
            assert apart(ours, self.stored[name]) < self.tolerance, name

    def learn(self, contrasts: list[Contrast], kind: str, **ways: Any) -> Steering:
        return learn_steering(self.model, self.tokenizer, contrasts, kind, **ways)


@pytest.fixture
def theirs(golden_root: Path, request: pytest.FixtureRequest) -> Iterator[Theirs]:
    found = Theirs(golden_root, *request.param)
    yield found
    assert not {name for name in found.stored if not re.search(GIVEN, name)} - found.compared


def test_every_file_is_compared(golden_root: Path) -> None:
    tested = {f"{name}/{system}_{dtype}" for system in ("actadd", "caa_ace") for name, dtype in CASES}
    tested |= {"gpt2_tr/iti_f32", "llama/iti_f32", "llama/model_surgery_f32"}
    files = [path for path in golden_root.glob("*/steering/*") if path.suffix == ".json"]
    assert {f"{path.parts[-3]}/{path.stem}" for path in files} == tested


@pytest.mark.parametrize("theirs", [(*case, "actadd") for case in CASES], indirect=True, ids=str)
def test_activation_addition(theirs: Theirs) -> None:
    ids = theirs.meta["prompt_ids"]
    plain = theirs.logits(ids)
    theirs.check("logits_plain_last", plain)
    for name, case in theirs.meta["cases"].items():
        contrast, layer, strength = Contrast("", case["plus"], case["minus"]), case["layer"], case["coefficient"]
        for align, theirs_of in (("front", "front"), ("middle", "mid"), ("back", "back")):
            if not any(stored.startswith(f"{name}.{theirs_of}.") for stored in theirs.stored):
                continue
            steering = theirs.learn([contrast], "actadd", layer=layer, where=Where("prefix", align))
            (rows,) = steering.directions.values()
            theirs.check(f"{name}.addition", strength * rows)
            with steering.edit(strength).applied():
                theirs.check(f"{name}.{theirs_of}.logits_last", theirs.logits(ids))
                block_input = row_states(theirs.parts, ids, theirs.parts.block(layer - 1))
                theirs.check(f"{name}.{theirs_of}.block_input", block_input)
                one = theirs.logits(ids[:1])
                with pytest.raises(LedgerError, match="expected a prompt of at least"):
                    theirs.logits(ids[:3])
            assert torch.equal(one, theirs.logits(ids[:1]))


@pytest.mark.parametrize("theirs", [(*case, "caa_ace") for case in CASES], indirect=True, ids=str)
def test_contrastive_addition_and_affine_concept_editing(theirs: Theirs) -> None:
    meta, ids, layer = theirs.meta, theirs.meta["probe_ids"], theirs.meta["layer"]
    contrasts = [Contrast("", *texts) for texts in zip(meta["positives"], meta["negatives"], strict=True)]
    ways: dict[str, Any] = {"layer": layer, "read": "last", "where": Where()}
    added, erased, edited = (theirs.learn(contrasts, kind, **ways) for kind in ("caa", "leace", "ace"))
    ((block, r),) = added.directions.items()
    theirs.check("vector", r)
    theirs.check("logits_last", theirs.logits(ids))
    theirs.check("block_output", row_states(theirs.parts, ids, theirs.parts.block(layer)))
    for eraser in ("leace", "orth"):
        theirs.check(f"{eraser}.bias", erased.fixed["centre"])
    orth = Steering(theirs.model, "leace", {block: r}, {"centre": erased.fixed["centre"]}, Where(), len(r), {})
    if "leace.proj_left" in theirs.stored:
        removed = theirs.stored["leace.proj_left"] @ theirs.stored["leace.proj_right"]
        assert apart(erased.fixed["left"] @ erased.fixed["right"], removed) < theirs.tolerance
    # With as many positives as negatives, an erased mean -1/2 and +1/2 are affine concept editing with 0 and 1.
    runs = [
        (name, {None: added, "orth": orth, "leace": erased}[run["eraser"]], run) for name, run in meta["runs"].items()
    ]
    runs += [(f"orth_{mu}", edited, {"multiplier": mu + 0.5, "start": None, "end": None}) for mu in (-0.5, 0.5)]
    for name, steering, run in runs:
        if run["start"] is not None or run["end"] is not None:
            where = Where("span", start=run["start"] or 0, stop=run["end"])
            steering = theirs.learn(contrasts, "caa", **{**ways, "where": where})
        with steering.edit(run["multiplier"]).applied():
            theirs.check(f"{name}.logits_last", theirs.logits(ids))
            theirs.check(f"{name}.block_output", row_states(theirs.parts, ids, theirs.parts.block(layer)))
    if "bias_1.5.logits_last" in theirs.stored:  # the vector as a bias of the down projection, in place of the block
        name = theirs.parts.weight_name(layer).removesuffix(".weight")
        with Steering(theirs.model, "caa", {name: r}, {}, Where(), len(r), {}).edit(1.5).applied():
            theirs.check("bias_1.5.logits_last", theirs.logits(ids))


@pytest.mark.parametrize("theirs", [(name, "f32", "iti") for name in ("gpt2_tr", "llama")], indirect=True, ids=str)
def test_inference_time_intervention(theirs: Theirs) -> None:
    meta, stored = theirs.meta, theirs.stored
    states = HeadStates(stored["activations"][:, 0], stored["activations"][:, 1])
    accuracy = head_accuracy(states, meta["train_questions"], meta["val_questions"])
    assert torch.equal(accuracy.flatten(), stored["probe_accuracy"].double())
    learnt = theirs.learn([Contrast("", *texts) for texts in meta["statements"]], "iti", heads=meta["K"])
    assert len(learnt.settings["heads"]) == meta["K"]
    shifts = head_shifts(states, [(layer, head) for layer, head in meta["top_heads"]], stored["tuning_activations"])
    names = {id(module): name for name, module in theirs.model.named_modules()}
    directions = {}
    for layer, shift in shifts.items():
        theirs.check(f"layer{layer}.direction_times_std", shift)
        directions[names[id(theirs.parts.attention_out(layer))]] = shift
    theirs.check("logits_plain_last", theirs.logits(meta["probe_ids"]))
    # The release adds in half precision while it generates. Its editor of weights adds directions to the biases as they
    # are, without the output projection, so that they act in other directions than those of the heads.
    alpha = meta["alpha"]
    half = {name: (shift.half() * alpha).float() for name, shift in directions.items()}
    for name, kind, place, each, strength in (
        ("float", "iti", "last", directions, alpha),
        ("half_as_released", "iti", "last", half, 1.0),
        ("baked_with_Wo", "iti", "all", directions, alpha),
        ("baked_without_Wo", "caa", "all", directions, alpha),
    ):
        steering = Steering(theirs.model, kind, each, {}, Where(place), states.shape[2], {})
        with steering.edit(strength).applied():
            theirs.check(f"{name}.logits_last", theirs.logits(meta["probe_ids"]))


@pytest.mark.parametrize("theirs", [("llama", "f32", "model_surgery")], indirect=True, ids=str)
def test_model_surgery(theirs: Theirs) -> None:
    meta, v = theirs.meta, theirs.stored["vector"]
    theirs.compared.add("vector")  # it is given here
    theirs.check("cosines", gate_cosines(theirs.parts, v))
    edit = Steering(theirs.model, "surgery", {"": v}, {}, Where(), len(v), {"rows": meta["rows"]}).edit(meta["alpha"])
    rows = []
    for layer in range(meta["layers"]):
        update = edit.patch.updates[gate(theirs.parts, layer).name]
        rows += [[layer, row] for row in update.tensors[0].flatten().nonzero().flatten().tolist()]
    assert rows == meta["changed_rows"]
    with edit.applied():
        theirs.check("layer3_gate_weight_after", gate(theirs.parts, 3).weight)
        theirs.check("logits_last", theirs.logits(meta["prompt_ids"]))
