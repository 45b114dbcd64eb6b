"""MINT against a run of the authors' toolkit, on every model folder that has one: each score, try, patch and vector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import EPS, apart
from safetensors.torch import load_file
from torch import Tensor

from errata import editors
from errata.editors import MINT
from errata.editors.core.request import EditRequest

TOLERANCE = {"f32": 1e-4, "f64": 1e-9}
WORDS = {"attr": "attribution", "actv": "activation", "half": "half", "all": "all"}


class Theirs(MINT):
    """Compares what it finds for a token with what the file has."""

    tokens: Iterator[tuple[str, dict[str, Any]]]
    stored: dict[str, Tensor]
    worst: dict[str, float]
    farthest: float = 0.0
    at: str
    token: dict[str, Any]
    rounds: Iterator[dict[str, Any]]

    def note(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), apart(ours, theirs))

    def locate(self, row: Any, wanted: int, *args: Any) -> Any:
        self.at, self.token = next(self.tokens)
        self.rounds = iter(self.token["rounds"])
        assert self.tokenizer.decode(row.ids) == self.token["prompt"]
        assert wanted == self.token["target"]
        found = super().locate(row, wanted, *args)
        theirs = self.stored[f"{self.at}.scores"]
        for layer, scores in found.scores.items():
            self.note("scores", scores, theirs[layer])
        self.note(
            "threshold", *(torch.tensor([t], dtype=torch.float64) for t in (found.threshold, self.token["threshold"]))
        )
        assert [list(neuron) for neuron in found.neurons] == self.token["neurons"]
        return found

    def directions(self, row: Any, wanted: int, chosen: int, history: Any) -> Any:
        assert chosen == self.token["argmax_at_start"]
        found = super().directions(row, wanted, chosen, history)
        for layer, direction in found.items():
            self.note("directions", direction, self.stored[f"{self.at}.direction.layer{layer}"])
        return found

    def gaps(self, row: Any, changes: Any, steps: Any, wanted: int, chosen: int) -> Any:
        theirs = next(self.rounds)
        assert chosen == theirs["argmax"]
        gaps, probabilities = super().gaps(row, changes, steps, wanted, chosen)
        ordered = sorted(zip(gaps, (list(neuron) for neuron, _ in steps), strict=True))
        assert ordered[0][1] == theirs["gaps"][0][1]
        by_neuron = {tuple(neuron): gap for gap, neuron in theirs["gaps"]}
        rounded = gaps
        if probabilities.dtype == torch.float64:  # `generate` gave them float32 logits there too
            coarse = row.logits(changes, steps).float().softmax(-1)
            rounded = (coarse[:, chosen].double() - coarse[:, wanted].double()).tolist()
        far = [abs(gap - by_neuron[neuron]) for gap, (neuron, _) in zip(rounded, steps, strict=True)]
        self.farthest = max(self.farthest, *far)
        return gaps, probabilities


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


def _editor(root: Path, path: Path, models: dict[str, Any]) -> Theirs:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meta = json.loads(path.read_text())
    name, dtype = path.parts[-3], {"f32": torch.float32, "f64": torch.float64}[meta["dtype"]]
    if name not in models:
        models[name] = AutoModelForCausalLM.from_pretrained(root / "models" / name, attn_implementation="eager")
    fields = {
        "factor": meta["factor"],
        "depth": WORDS[meta["layers"]],
        "locate": WORDS[meta["locating"]],
        "direction": meta["semantic"],
        "orthogonal": meta["orthogonalise_to_history"],
        "max_patches": meta["max_patches"],
    }
    editor = Theirs(models[name].to(dtype), AutoTokenizer.from_pretrained(root / "tokenizer"), fields)
    editor.stored, editor.worst = load_file(path.with_suffix(".safetensors")), {}
    return editor


# Between them, these have every option, the history of directions, tokens that are given up, and several tokens.
FEW = ("basis_all_actv_f32", "delta_f64", "delta_scale40_f32", "runner_up_scale40_f32")
OTHERS = pytest.param(FEW, False, marks=pytest.mark.slow, id="others")


@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")
@pytest.mark.parametrize(("names", "among"), [pytest.param(FEW, True, id="few"), OTHERS])
def test_scores_directions_tries_patches_and_vectors_are_the_originals(
    golden_root: Path, models: dict[str, Any], names: tuple[str, ...], among: bool
) -> None:
    found = [path for path in sorted(golden_root.glob("*/mint/*.json")) if (path.stem in names) == among]
    for path in found:
        meta, editor = json.loads(path.read_text()), _editor(golden_root, path, models)
        for i, case in enumerate(meta["cases"]):
            tokens = case["tokens"]
            editor.tokens = iter([(f"case{i}.tok{j}", token) for j, token in enumerate(tokens)])
            (edit,) = editor.compute(EditRequest(case["source"], None, case["target"], join=""))
            (report,) = edit.diagnostics
            assert next(editor.tokens, None) is None, "fewer tokens than theirs were wrong"
            assert [tuple(n) for n in report["neurons"]] == [tuple(n) for t in tokens for n in t["accepted"]]
            assert len(report["skipped_tokens"]) == sum(not token["accepted"] for token in tokens)
            assert report["tries"] == [len(token["rounds"]) for token in tokens]
            wanted = zip(case["post"], case["target_tokens"], strict=True)
            assert report["wrong_tokens"] == [k for k, (ours, theirs) in enumerate(wanted) if ours != theirs]
            for layer, column in case["changed_neurons"]:
                update = edit.patch.updates[editor.architecture.weight_name(layer)]
                W = editor.architecture.weight(layer)
                vector = (W + update.matrix(W.dtype, W.device))[:, column]
                editor.note("vectors", vector, editor.stored[f"case{i}.final.layer{layer}.neuron{column}"])
        assert max(editor.worst.values()) < TOLERANCE[meta["dtype"]], (path, editor.worst)
        assert editor.farthest < (EPS if meta["dtype"] == "f64" else TOLERANCE["f32"]), (path, editor.farthest)
    assert len(found) >= 4
    assert editors.get("mint") is MINT
