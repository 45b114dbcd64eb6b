"""UltraEdit and StableEdit against numbers from the authors' code, on every model folder that has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata import editors
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.request import EditRequest
from errata.editors.ultraedit import UltraEdit

TOLERANCE = {"f64": 1e-9, "f32": 1e-4}  # relative Frobenius error
FULL_ONLY = "stable"  # their name of the whitened form


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


def _requests(records: Sequence[dict[str, Any]]) -> list[EditRequest]:
    return [EditRequest(r["prompt"], r["subject"], r["target_new"]["str"]) for r in records]


def _editor(root: Path, name: str, meta: dict[str, Any], folder: Path) -> UltraEdit:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(root / "models" / name, dtype=torch.float32)
    if meta["dtype"] == "f64":
        model = model.double()
    given, fields = meta["hparams"], {}
    if meta["warm_up_requests"]:
        file = folder / "warm_up.json"
        records = [
            {"prompt": r.prompt, "subject": r.subject, "target": r.target} for r in _requests(meta["warm_up_requests"])
        ]
        file.write_text(json.dumps(records))
        fields = {"warm_up": str(file), "warm_up_stays": True, "warm_up_turn": given["n_edits_per_turn"]}
    if meta["method"] == "stableedit":
        fields["whiten"] = "full" if given["RunningMeanStd_mode"] == FULL_ONLY else "diagonal"
    kind: Any = editors.get(meta["method"])
    return kind(
        model,
        AutoTokenizer.from_pretrained(root / "tokenizer"),
        {
            "edit_modules": list(meta["map_order"]),
            "lr": given["lr"],
            "ridge": float(given["ridge"]),
            "mini_batch": given["mini_batch"],
            **fields,
        },
    )


def _check_turn(
    editor: UltraEdit, requests: list[EditRequest], tensors: dict[str, Tensor], tag: str
) -> dict[str, float]:
    """Compare what a turn measures and solves on the model as it stands; the worst error of each kind."""
    worst: dict[str, float] = {}

    def compare(kind: str, ours: Tensor, key: str) -> None:
        if (theirs := tensors.get(f"{tag}.{key}")) is not None:
            worst[kind] = max(worst.get(kind, 0.0), _error(ours, theirs))

    (turn,) = editor.measure([requests])
    past = editor.past_statistics()
    statistics = {shape: own.merged(past.get(shape)) for shape, own in editor.statistics(turn).items()}
    values, _ = editor.values(turn, statistics)
    for i, found in enumerate(editor.maps):
        compare("x", turn.x[i], f"map{i}.x")
        compare("g", turn.g[i], f"map{i}.g")
        compare("V", values[i], f"map{i}.V")
        update = editor.update(turn.x[i], values[i]).matrix(torch.float64, torch.device("cpu"))
        compare("D", update.T, f"map{i}.D")
        assert is_transposed(found.module) or update.shape == found.module.weight.shape
    for (d_out, d_in), each in statistics.items():
        prefix = f"norm{d_in}x{d_out}"
        assert each.count == int(tensors[f"{tag}.{prefix}.n"])
        compare("mean", each.mean, f"{prefix}.mean")
        compare("var", each.squares, f"{prefix}.var")
        compare("std", each.deviation(editor._eps), f"{prefix}.std")
        if each.scatter is not None:
            compare("cov", each.scatter, f"{prefix}.cov_value")
    return worst


@pytest.mark.parametrize("method", ["ultraedit", "stableedit"])
def test_turns_have_the_inputs_statistics_values_and_updates_of_the_originals(
    golden_root: Path, tmp_path: Path, method: str
) -> None:
    checked: Counter[str] = Counter()
    found = sorted(golden_root.glob(f"*/{method}/*_f??.json"))
    for path in found:
        meta, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        editor = _editor(golden_root, path.parts[-3], meta, tmp_path)
        size, requests = meta["hparams"]["n_edits_per_turn"], _requests(meta["requests"])
        untouched = {found.name: found.weight.clone() for found in editor.maps}
        with editor._at_work():
            for number, start in enumerate(range(0, len(requests), size)):
                chosen = requests[start : start + size]
                if number or not meta["warm_up_requests"]:  # the warm-up is a part of the first edit
                    worst = _check_turn(editor, chosen, tensors, f"turn{number}")
                    assert max(worst.values()) <= TOLERANCE[meta["dtype"]], (path, number, worst)
                    checked.update(worst.keys())
                editor.apply(chosen)
        for i, linear_map in enumerate(editor.maps):
            theirs = float(tensors[f"final.map{i}.weight_delta_norm"])
            ours = float((linear_map.weight - untouched[linear_map.name]).double().norm())
            assert ours == pytest.approx(theirs, rel=TOLERANCE[meta["dtype"]]), path
            checked["weights"] += 1
    assert {"x", "g", "V", "D", "mean", "var", "std", "weights"} <= set(checked), checked
    assert ("cov" in checked) == (method == "stableedit")
    assert len(found) >= 6
