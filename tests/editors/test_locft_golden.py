"""LocFT-BF against a run of the authors' code, on every model folder that has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errata.editors import LocFT
from errata.editors.core.families.joint_training import Training
from errata.editors.core.forward import upper_blocks, whole_rows
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.model.tokens import Batch, right_padded
from errata.editors.core.request import EditRequest

# Relative error of losses and of the change of the weight, by precision and by the file's learning rate.
TOLERANCE = {("f64", 5e-4): 1e-9, ("f32", 5e-4): 1e-4, ("f32", 2e-2): 1e-3}
FILES = ("down3_lr5e-4_bs3_ep4", "down3_lr2e-2_bs3_stop")


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each row the positions of the authors' code: GPT-2 counts the padding on the left as positions."""
    width = [0]
    pieces = Training._pieces

    def measured(self: Training, members: Any, first: int, pad: int) -> Any:
        width[0] = max(len(row.ids) for _, _, row in members)
        return pieces(self, members, first, pad)

    def padded(rows: Any, pad: int) -> Batch:
        batch = right_padded(rows, pad)
        shift = torch.tensor([[width[0] - len(row)] for row in rows])
        return Batch(batch.ids, batch.mask, batch.positions + shift)

    monkeypatch.setattr(Training, "_pieces", measured)
    for module in (upper_blocks, whole_rows):
        monkeypatch.setattr(module, "right_padded", padded)


def _golden(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*/locft/*.json")) if path.stem[:-4] in FILES]


@pytest.mark.usefixtures("shifted")
def test_orders_losses_and_the_change_of_the_weight_are_the_originals(golden_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = _golden(golden_root)
    for path in found:
        meta, given = json.loads(path.read_text()), json.loads(path.read_text())["hparams"]
        model = AutoModelForCausalLM.from_pretrained(golden_root / "models" / path.parts[-3], dtype=torch.float32)
        model = model.double() if meta["dtype"] == "f64" else model
        tolerance = TOLERANCE[meta["dtype"], given["lr"]]
        names = ("lr", "batch_size", "num_steps")
        fields = {**{name: given[name] for name in names}, "layers": [given["layer"]]}
        editor = LocFT(model, AutoTokenizer.from_pretrained(golden_root / "tokenizer"), fields)
        requests = [
            EditRequest(record["prompt"], None, record["target_new"], id=str(i))
            for i, record in enumerate(meta["requests"])
        ]
        first = meta["first_epoch_inputs"][0]
        for i, ids, mask in zip(meta["epochs"][0]["order"], first["input_ids"], first["attention_mask"], strict=False):
            row = editor.row(requests[i])
            assert [*row.ids, row.answer[-1]] == [token for token, real in zip(ids, mask, strict=True) if real]
        edit = editor.apply(requests)
        losses = [report["losses"] for report in edit.diagnostics]
        assert len(losses[0]) == len(meta["epochs"])
        for number, epoch in enumerate(meta["epochs"]):
            start = 0
            for batch in epoch["batches"]:
                rows = epoch["order"][start : start + batch["n"]]
                mean = sum(losses[i][number] for i in rows) / len(rows)
                assert mean == pytest.approx(batch["loss"], rel=tolerance, abs=1e-5 if tolerance > 1e-4 else None), path
                assert (mean >= 1e-2) == batch["step"]
                start += batch["n"]
        (update,) = edit.patch.updates.values()
        theirs = load_file(path.with_suffix(".safetensors"))["weight_delta"].double()
        theirs = theirs.T if is_transposed(editor.maps[0].module) else theirs
        ours = update.matrix(torch.float64, theirs.device)
        assert float((ours - theirs).norm() / theirs.norm()) <= tolerance, path
    assert len(found) >= 5
