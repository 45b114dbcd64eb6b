"""WISE against a run of the authors' code, on every model folder that has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart, nudge
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from errata.editors import WISE
from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.forward import upper_blocks, whole_rows
from errata.editors.core.model.activations import run_until_captured
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.model.tokens import Batch, right_padded
from errata.editors.core.request import EditRequest
from errata.editors.core.side_memory.shards import NONE, Shards, activated, row_distance
from errata.editors.core.side_memory.ties import ties
from errata.editors.wise import SideCopy

TOLERANCE = 1e-4
# Steps of 0.3 on a random model may amplify one rounding further. What a rounding does is allowed this many times.
ROUNDINGS = 3
FIELDS = (
    *("edit_lr", "n_iter", "mask_ratio", "alpha", "beta", "gamma", "act_ratio", "merge_freq", "save_freq"),
    *("retrieve", "densities", "norm_constraint"),
)


class Theirs(WISE):
    """What of the original is an accident of its data: rows are padded on the left by token 0, which distances count;
    masks and unrelated texts are those of the file."""

    file: dict[str, Any]
    stored: dict[str, Tensor]
    number: int

    def training_rows(self, request: EditRequest) -> list[TrainingRow]:
        edit, rows = self.file["edits"][self.number], []
        found = [*(self.answered_row(request, prefix) for prefix in self.prefixes)]
        found.append(self.plain_row(edit["request"]["loc_prompt"]))
        width = len(edit["input_ids"][0])
        for row, ids in zip(found, edit["input_ids"], strict=True):
            # The row that is read stops before the last token of the answer, and theirs with it.
            read = [*row.ids, row.answer[-1]] if row.answer else list(row.ids)
            left = width - len(read)
            assert [*[0] * left, *read] == ids
            rows.append(TrainingRow(row.name, tuple(ids), tuple(left + c for c in row.columns), row.answer))
        return rows

    def subject_columns(self, request: EditRequest) -> list[Any]:  # noqa: ARG002
        (masks,) = self.file["edits"][self.number]["act_mask"]
        return [[column for column, inside in enumerate(mask) if inside] for mask in masks]

    def draw_mask(self, shard: int) -> Tensor:
        first = shard * self.config.save_freq
        mask = self.stored[f"edit{first}.mask"].bool()
        return mask.view(*self.shape[::-1]).T if is_transposed(self.module) else mask.view(*self.shape)


@pytest.fixture
def _one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply by the whole copy, as theirs. Rounded as W x + D x, losses of the random Llama move by up to 8e-4."""

    def output(copy: SideCopy, x: Tensor, base: Tensor) -> Tensor:  # noqa: ARG001
        bias = copy.editor.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return linear(x, copy.copy, bias)

    monkeypatch.setattr(SideCopy, "output", output)


@pytest.fixture
def _padded_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask the padding on the left, which positions count, as transformers does without position ids."""

    def base(architecture: Any, batch: Batch) -> Tensor:
        mask = (batch.ids != 0).int().cummax(1).values
        return architecture.base(input_ids=batch.ids, attention_mask=mask, use_cache=False).last_hidden_state

    for module in (upper_blocks, whole_rows):
        monkeypatch.setattr(module, "run_base", base)


@pytest.mark.usefixtures("_padded_on_the_left", "_one_product")
def test_losses_copies_merges_distances_and_routes_are_the_originals(golden_root: Path) -> None:
    found, moved = sorted(golden_root.glob("*/wise/*.json")), 0
    for path in found:
        editor, worst = _editor(golden_root, path), dict[str, float]()
        meta, stored, merge = editor.file, editor.stored, 0
        weight, turn = editor.architecture.weight(3).detach().clone(), is_transposed(editor.module)
        oriented = {name: t.T if turn and t.ndim == 2 else t for name, t in stored.items()}
        for number, edit in enumerate(meta["edits"]):
            editor.number, given = number, edit["request"]
            (report,) = editor.apply(EditRequest(given["prompt"], None, given["target_new"])).diagnostics
            off = {"loss": max(abs(a / b - 1) for a, b in zip(report["losses"], edit["losses"]["loss"], strict=True))}
            shards = editor.memory()
            assert isinstance(shards, Shards)
            memories = shards.memories()
            if shards.open_shard is not None:
                off["min_act"] = abs(shards.open_shard.min_act / edit["side_min_act"] - 1)
                if f"edit{number}.side_weight" in stored:
                    theirs = oriented[f"edit{number}.side_weight"] - weight
                    off["side_weight"] = apart(memories[0].delta, theirs)
            if (number + 1) % meta["hparams"]["merge_freq"] == 0:
                off["merge input"] = _merged(editor, shards, meta["merges"][merge], stored, merge)
                merge += 1
            (probes,) = [probe for probe in meta["probes"] if probe["after"] == f"edit{number}"]
            off["distance"] = _probed(editor, shards, probes)
            worst = {name: max(off.get(name, 0.0), worst.get(name, 0.0)) for name in worst | off}
        if max(worst.values()) >= TOLERANCE:
            moved += 1
            assert max(worst.values()) < ROUNDINGS * _moved(golden_root, path), (path, worst)
    assert len(found) >= 7
    assert moved <= 1


def _editor(root: Path, path: Path, seed: int | None = None) -> Theirs:
    """Return an editor with the file's settings, on a model that is moved by one rounding if there is a seed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meta = json.loads(path.read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(
        root / "models" / path.parts[-3], attn_implementation="eager", dtype=torch.float32
    )
    if seed is not None:
        nudge(model, seed)
    fields = {name: meta["hparams"][name] for name in FIELDS} | {"layers": [3], "as_released": True}
    fields |= {"context_templates": meta["context_templates"]}
    fields |= {"contrast": "subject"} if "subject" in path.stem else {}
    editor = Theirs(model, AutoTokenizer.from_pretrained(root / "tokenizer"), fields)
    editor.file, editor.stored = meta, load_file(path.with_suffix(".safetensors"))
    return editor


def _losses(editor: Theirs) -> list[list[float]]:
    found = []
    for number, edit in enumerate(editor.file["edits"]):
        editor.number, given = number, edit["request"]
        (report,) = editor.apply(EditRequest(given["prompt"], None, given["target_new"])).diagnostics
        found.append(report["losses"])
    return found


def _moved(root: Path, path: Path) -> float:
    """Return how far a loss moves, relatively, when the weights move by one rounding."""
    plain, other = _losses(_editor(root, path)), _losses(_editor(root, path, seed=0))
    pairs = [(a, b) for mine, nudged in zip(plain, other, strict=True) for a, b in zip(mine, nudged, strict=True)]
    return max(abs(a / b - 1) for a, b in pairs)


def _merged(editor: Theirs, shards: Shards, merge: dict[str, Any], stored: dict[str, Tensor], k: int) -> float:
    """Merge the file's copies bit for bit, put theirs in the place of ours, and return how far our copies are off.

    Their threshold lies among the many equal changes that the decay has made, so that a rounding decides which of them
    are kept, and each of these halves the mean of its element.
    """
    weight = editor.architecture.weight(editor.layer).detach()
    weight = weight.T if is_transposed(editor.module) else weight
    names = [merge.get(f"input{j}_is", f"merge{k}.input{j}") for j in range(merge["n_inputs"])]
    output = stored[f"merge{k}.output"]
    merged = weight + ties([stored[name] - weight for name in names], merge["weights"], editor.config.densities)
    assert torch.equal(merged, output)
    group = shards.shards[-(editor.config.merge_freq // editor.config.save_freq) :]
    turned = is_transposed(editor.module)
    off = 0.0
    for name, shard in zip(names, group, strict=False):
        theirs = stored[name] - weight
        off = max(off, apart(shards.delta(shard), theirs.T if turned else theirs))
    ours = shards.memories()[-1].delta
    (key,) = [key for key, matrix in shards.made.items() if matrix is ours]
    shards.made[key] = ((output - weight).T if turned else output - weight).contiguous()
    return off


def _probed(editor: Theirs, shards: Shards, probes: dict[str, Any]) -> float:
    """Compare every probe's route, and return the largest relative difference of its distances."""
    off = 0.0
    memories = shards.memories()
    for result in probes["results"]:
        ids = editor.tokenizer(result["prompt"])["input_ids"]
        batch = right_padded([ids], 0)
        (x,) = run_until_captured(editor.architecture, batch, [editor.module])
        y = editor.module.forward(x).detach()
        own = activated(y, editor.rule.activation)
        d = [
            row_distance(activated(y + x.detach() @ memory.delta.T.detach(), editor.rule.activation), own)
            for memory in memories
        ]
        route = int(shards.route(d, [memory.threshold for memory in memories])) if memories else NONE
        theirs = result["act_distances_in_call_order"]
        has_side = shards.open_shard is not None
        # Where a shard is full, theirs asks a fresh side copy first, whose distance is 0.
        wanted = theirs if has_side else theirs[1:]
        for mine, their in zip(d, wanted, strict=False):
            off = max(off, abs(float(mine) / their - 1) if their else abs(float(mine)))
        names = (["side"] if has_side else []) + (
            [f"memory{i}" for i in range(len(memories))] if editor.config.retrieve else ["merged_layer"]
        )
        # A fresh copy is the map itself, and the file names both.
        assert ("original" if route == NONE else names[route]) in result["decision"], (probes["after"], result, d)
    return off
