"""MEMIT, EMMET and AlphaEdit against numbers from the original implementations, on every model folder that is there."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata import editors
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.request import EditRequest

# Relative Frobenius error allowed.
TOLERANCE = {"f64": 1e-8, "f32": 1e-4}


def _request(record: dict[str, Any]) -> EditRequest:
    target = record["target_new"]
    return EditRequest(record["prompt"], record["subject"], target if isinstance(target, str) else target["str"])


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


@functools.cache
def _model(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.double() if dtype == "f64" else model


@functools.cache
def _tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "tokenizer")


@functools.cache
def _moments(root: Path, name: str, dtype: str, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Of the corpus of the golden numbers; the stored one where it is stored."""
    stored = load_file(root / name / "stats" / "mom2.safetensors") if dtype == "f32" else {}
    found = {layer: stored[f"layer{layer}.mom2_f32"] for layer in layers if f"layer{layer}.mom2_f32" in stored}
    if missing := [layer for layer in layers if layer not in found]:
        texts = json.loads((root / "corpus_200.json").read_text())
        model = _model(root / "models" / name, dtype)
        found |= second_moments(model, _tokenizer(root), missing, texts, max_length=256).matrices
    return found


def _editor(root: Path, name: str, method: str, meta: dict[str, Any], dtype: str, **options: Any) -> Any:
    kind: Any = editors.get(method)
    fields = {field: value for field, value in meta["hparams"].items() if field in kind.Config.__dataclass_fields__}
    for unused in ("mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_adjustment"):
        fields.pop(unused, None)
    templates = [template for group in meta["context_templates"] for template in group]
    config = kind.Config.from_dict({**fields, "context_templates": templates})
    moments = _moments(root, name, dtype, config.layers)
    return kind(_model(root / "models" / name, dtype), _tokenizer(root), config, moments=moments, **options)


def _golden(root: Path, method: str) -> list[tuple[str, str, dict[str, Any], dict[str, Tensor]]]:
    found = []
    for folder in sorted(root.glob(f"*/{method}")):
        for path in sorted(folder.glob("*_f??.json")):
            meta = json.loads(path.read_text())
            if "hparams" in meta:
                tensors = load_file(path.with_suffix(".safetensors"))
                found.append((folder.parent.name, path.stem[-3:], {**meta, "file": str(path)}, tensors))
    return found


def _check(
    editor: Any, edit: Any, tensors: dict[str, Tensor], prefix: str, tolerance: float, where: str
) -> Counter[str]:
    """Every stored tensor of a batch: adjoints, residual shares, updates. Returns how many there were of each kind."""
    checked: Counter[str] = Counter()
    for layer in editor.layers:
        update = edit.patch.updates[editor.architecture.weight_name(layer)]
        assert isinstance(update, LowRank)
        named = {"adj_k": update.V.T, "resid": update.U}
        for name, ours in named.items():
            if (theirs := tensors.get(f"{prefix}layer{layer}.{name}")) is not None:
                assert _error(ours, theirs) <= tolerance, (where, layer, name)
                checked[name] += 1
        if (theirs := tensors.get(f"{prefix}layer{layer}.weight_delta")) is not None:
            theirs = theirs.T if is_transposed(editor.architecture.down(layer)) else theirs
            assert _error(update.matrix(torch.float64, theirs.device), theirs) <= tolerance, (where, layer)
            checked["weight_delta"] += 1
        if (theirs := tensors.get(f"{prefix}layer{layer}.delta_at_keys")) is not None:
            keys = tensors[f"{prefix}layer{layer}.keys"].double()
            ours = update.matrix(torch.float64, theirs.device) @ keys.T
            assert _error(ours, theirs) <= tolerance, (where, layer, "delta_at_keys")
            checked["delta_at_keys"] += 1
    return checked


@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_updates_of_a_batch_equal_those_of_the_originals(golden_root: Path, method: str) -> None:
    checked: Counter[str] = Counter()
    for name, dtype, meta, tensors in _golden(golden_root, method):
        editor = _editor(golden_root, name, method, meta, dtype)
        with editor.applied([_request(record) for record in meta["requests"]]) as edit:
            checked += _check(editor, edit, tensors, "", TOLERANCE[dtype], meta["file"])
            for j, report in enumerate(edit.diagnostics):
                assert report["steps"] == meta["n_iterations"][j], meta["file"]
                checked["steps"] += 1
    assert set(checked) == {"adj_k", "resid", "weight_delta", "steps"}, "not every kind of number was found"


def test_values_and_keys_of_the_originals_are_found(golden_root: Path) -> None:
    checked: Counter[str] = Counter()
    for method in ("memit", "emmet"):
        for name, dtype, meta, tensors in _golden(golden_root, method):
            editor = _editor(golden_root, name, method, meta, dtype)
            requests = [_request(record) for record in meta["requests"]]
            problems = [editor.problem(request) for request in requests]
            starts = [[row.start for row in (*problem.rows, *filter(None, [problem.essence]))] for problem in problems]
            assert starts == meta["lookup_idxs"], meta["file"]
            with editor._at_work():
                targets = editor.targets(requests, editor.layers[-1], "block")
            values = torch.stack([target.initial + target.delta for target in targets])
            assert _error(values, tensors["z"]) <= TOLERANCE[dtype], meta["file"]
            keys = editor.keys(requests, editor.layers[:1])[editor.layers[0]].double()
            ours = (keys[:, 0] + keys[:, 1:].mean(1)) / 2
            assert _error(ours, tensors[f"layer{editor.layers[0]}.keys"]) <= TOLERANCE[dtype], meta["file"]
            checked[method] += 1
    assert set(checked) == {"memit", "emmet"}, "no golden case was found"


def _projectors(root: Path, name: str, editor: Any, dtype: str) -> dict[int, Tensor]:
    """The original's projector where it is stored; the others from its own recipe, checked by their diagonals."""
    stored = load_file(root / name / "alphaedit" / "P_f32.safetensors")
    threshold = json.loads((root / name / "alphaedit" / "P_f32.json").read_text())["threshold"]
    projectors = {}
    for layer in editor.layers:
        U, values, _ = torch.linalg.svd(editor.moment(layer))
        small = U[:, values < threshold]
        P = stored.get(f"layer{layer}.P") if dtype == "f32" else None
        P = small @ small.T if P is None else P
        assert _error(P.diagonal(), stored[f"layer{layer}.P_diag"]) <= 1e-4
        projectors[layer] = P
    return projectors


def test_alphaedit_s_consecutive_batches_equal_those_of_the_original(golden_root: Path) -> None:
    checked: Counter[str] = Counter()
    for name, dtype, meta, tensors in _golden(golden_root, "alphaedit"):
        editor = _editor(golden_root, name, "alphaedit", meta, dtype)
        editor = _editor(
            golden_root, name, "alphaedit", meta, dtype, projectors=_projectors(golden_root, name, editor, dtype)
        )
        for i, batch in enumerate(meta["batches"]):
            edit = editor.apply([_request(record) for record in batch["requests"]])
            checked += _check(editor, edit, tensors, f"batch{i}.", TOLERANCE[dtype], meta["file"])
            for layer in editor.layers:
                ours = edit.state[f"keys.{layer}"].T
                for kept in ("keys", "keys_after_edit"):
                    assert _error(ours, tensors[f"batch{i}.layer{layer}.{kept}"]) <= TOLERANCE[dtype], meta["file"]
                    checked[kept] += 1
        editor.rollback()
    kinds = {"delta_at_keys", "weight_delta", "keys", "keys_after_edit"}
    assert set(checked) == kinds, "not every kind of tensor was found"


def test_our_null_space_is_the_original_s_up_to_its_float32(golden_root: Path) -> None:
    checked: Counter[str] = Counter()
    for folder in sorted(golden_root.glob("*/alphaedit")):
        name = folder.parent.name
        meta = json.loads((folder / "P_f32.json").read_text())
        stored = load_file(folder / "P_f32.safetensors")
        sequence = next(m for n, d, m, _ in _golden(golden_root, "alphaedit") if n == name and d == "f32")
        editor = _editor(golden_root, name, "alphaedit", sequence, "f32")
        for place, layer in enumerate(editor.layers):
            P = editor.projector(layer)
            assert P.dimensions == meta["null_dim"][place]
            assert _error(P.matrix().diagonal(), stored[f"layer{layer}.P_diag"]) <= 1e-3
            checked[name] += 1
        assert checked[name] == sum(key.endswith(".P_diag") for key in stored)
    assert checked, "no golden case was found"
