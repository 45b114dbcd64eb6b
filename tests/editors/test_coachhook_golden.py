"""CoachHooK against a run of the authors' code, on every model folder that has one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart
from safetensors.torch import load_file
from torch import Tensor

from errata import editors
from errata.editors import CoachHooK
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.model.tokens import Batch
from errata.editors.core.request import EditRequest
from errata.editors.core.side_memory.hook_layers import HookLayer, z_scores

# Of f64 files; moments are stored in float32, which both use as they are.
TOLERANCE = {"f32": 1e-4, "f64": 1e-9}


class Theirs(CoachHooK):
    """What of the original is an accident of its batches: rows of a batch are padded together. The values of later
    batches, which are searched under hooks that see this padding, are the file's."""

    stored: dict[str, Tensor]
    worst: dict[str, float]
    batch: int

    def groups(self, rows: Any) -> list[list[int]]:
        return [list(range(len(rows)))]

    def note(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), apart(ours, theirs))

    def targets(self, requests: Any, layer: int, site: Any) -> Any:
        z = self.stored[f"batch{self.batch}.z"]
        if self.batch == 0:
            found = super().targets(requests, layer, site)
            self.note("z", torch.stack([target.initial + target.delta for target in found]), z)
            return found
        given, self.settings = self.settings, replace(self.settings, v_num_grad_steps=1)
        found, self.settings = super().targets(requests, layer, site), given
        return [replace(target, delta=value - target.initial) for target, value in zip(found, z, strict=True)]

    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        self.note("keys", K.T, self.stored[f"batch{self.batch}.layer{layer}.keys"])
        return super().adjoint(layer, K)


@pytest.fixture(autouse=True)
def _masked_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask the padding, whose tokens count in mean and std, and count its positions on, as transformers does."""

    def base(architecture: Any, batch: Batch) -> Tensor:
        given = {"input_ids": batch.ids, "attention_mask": batch.mask}
        return architecture.base(**given, use_cache=False).last_hidden_state

    monkeypatch.setattr("errata.editors.coachhook.run_base", base)


def _editor(root: Path, path: Path) -> Theirs:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, meta = path.parts[-3], json.loads(path.read_text())
    given = meta["hparams"]
    fields = {field: value for field, value in given.items() if field in Theirs.Config.__dataclass_fields__}
    for unused in ("mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_adjustment"):
        fields.pop(unused, None)
    fields |= {"alpha": meta["alpha_start"]}
    fields |= {"context_templates": [template for group in meta["context_templates"] for template in group]}
    model: Any = AutoModelForCausalLM.from_pretrained(
        root / "models" / name, attn_implementation="eager", dtype=torch.float32
    )
    model = model.double() if meta["dtype"] == "f64" else model
    moments = load_file(root / name / "stats" / "mom2.safetensors")
    moments |= load_file(root / name / "stats" / "mom2_layers24.safetensors")
    moments = {layer: moments[f"layer{layer}.mom2_f32"] for layer in (2, 3, 4)}
    editor = Theirs(model, AutoTokenizer.from_pretrained(root / "tokenizer"), fields, moments=moments)
    editor.stored, editor.worst = load_file(path.with_suffix(".safetensors")), {}
    return editor


@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")
def test_values_keys_copies_thresholds_and_scopes_are_the_originals(golden_root: Path) -> None:
    found = sorted(golden_root.glob("*/coachhook/*.json"))
    for path in found:
        meta, editor = json.loads(path.read_text()), _editor(golden_root, path)
        tolerance, requests = TOLERANCE[meta["dtype"]], list(meta["requests"])
        weights = {layer: editor.architecture.weight(layer).detach() for layer in editor.layers}
        for editor.batch, batch in enumerate(meta["batches"]):
            taken, requests = requests[: batch["n"]], requests[batch["n"] :]
            editor.apply([EditRequest(r["prompt"], r["subject"], r["target_new"]) for r in taken])
            for layer in editor.layers:
                held = editor._held(layer)
                assert held is not None
                theirs = batch["alpha"][str(layer)]
                editor.worst["alpha"] = max(editor.worst.get("alpha", 0.0), abs(held.alpha / theirs - 1))
                copy = editor.stored.get(f"batch{editor.batch}.layer{layer}.W_h")
                if copy is not None:
                    copy = copy.T if is_transposed(editor.architecture.down(layer)) else copy
                    editor.note("W_h", held.factors.matrix(copy.dtype, copy.device), copy - weights[layer])
        for name, probe in meta["probes"].items():
            _probed(editor, name, probe)
        assert max(editor.worst.values()) < tolerance, (path, editor.worst)
    assert len(found) >= 4
    assert editors.get("coachhook") is CoachHooK


@torch.no_grad()
def _probed(editor: Theirs, name: str, probe: dict[str, Any]) -> None:
    """Compare norms, scores and scopes at every layer, and the logits at the last real token."""
    ids, mask = torch.tensor(probe["input_ids"]), torch.tensor(probe["attention_mask"])
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in editor.layers:
        handles.append(
            editor.architecture.down(layer).register_forward_hook(
                lambda _module, args, _output, layer=layer: seen.update({layer: args[0]}) or None
            )
        )
    logits = editor.model(input_ids=ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    last = logits[torch.arange(len(ids)), mask.sum(1) - 1]
    editor.note("logits", last, editor.stored[f"probe.{name}.logits_last"])
    for layer in editor.layers:
        held = editor._held(layer)
        assert isinstance(held, HookLayer)
        norms = held.change(seen[layer]).norm(dim=-1)
        z = z_scores(norms, "row")
        inside = [[t for t, value in enumerate(row) if value >= held.alpha] for row in z.tolist()]
        assert inside == probe["in_scope"][str(layer)], (name, layer)
        if ids.shape[1] > 1:
            editor.note("norms", norms, editor.stored[f"probe.{name}.layer{layer}.norms"])
            editor.note("z_scores", z, editor.stored[f"probe.{name}.layer{layer}.z_scores"])
