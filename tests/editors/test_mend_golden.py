"""MEND against numbers from the authors' code, on every model folder that has them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.families.gradient_editor import GradientEditorConfig
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.request import EditRequest
from errata.editors.mend import MEND

TOLERANCE = 1e-4  # relative Frobenius error
EDITS = {"shared_combined", "shared_combined_perturbed", "unshared_two_sided_perturbed"}


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


@functools.cache
def _model(root: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root / "models" / name, dtype=torch.float32)


def _editor(root: Path, name: str, meta: dict[str, Any]) -> MEND:
    """An untrained editor with the settings of the original; its list of names as layers and projections."""
    from transformers import AutoTokenizer

    own = {*MEND.Config.__annotations__, *GradientEditorConfig.__annotations__}
    fields = {k: v for k, v in {**meta["config"], **meta["config"]["mend"]}.items() if k in own}
    names = meta["inner_params"]
    layers = sorted({int(number) for n in names for number in re.findall(r"\.(\d+)\.", n)})
    projections = {n.split(".")[-2] for n in names}
    config = MEND.Config.from_dict(
        {**fields, "lr": meta["config"]["lr"], "layers": layers, "projections": sorted(projections)}
    )
    editor = MEND(_model(root, name), AutoTokenizer.from_pretrained(root / "tokenizer"), config, trained=False)
    assert {found.name for found in editor.maps} == set(names)
    return editor


def _ours(editor: MEND, theirs: str) -> str:
    """A name in their state, `(256, 64).mlp.layers.0.mode_scale.weight`, in ours, `transforms.1.nets.0.0.s`."""
    owner, net, _, layer, kind, *_ = theirs.split(".") if theirs[0] == "(" else theirs.replace("#", "/").split(".")
    networks: Any = editor.network.transforms
    if owner[0] == "(":
        shape = tuple(map(int, owner.strip("()").split(",")))
        transform = next(i for i, found in enumerate(networks.children()) if found.shape == shape)
    else:
        transform = [found.name for found in editor.maps].index(owner.replace("/", "."))
    mine = {"u": "U", "v": "V", "bias": "b", "mode_scale": "s", "mode_shift": "o"}[kind]
    return f"transforms.{transform}.nets.{int(net[3:] or 1) - 1}.{layer}.{mine}"


def _load(editor: MEND, tensors: dict[str, Tensor], prefix: str = "editor0.") -> bool:
    """Put their weights into the editor; whether there are any."""
    state = {_ours(editor, n.removeprefix(prefix)): t for n, t in tensors.items() if n.startswith(prefix)}
    assert not editor.network.load_state_dict(state, strict=False).unexpected_keys
    return bool(state)


def _statistics(editor: MEND, owner: str) -> dict[str, Tensor]:
    """The running statistics of one transform under their names."""
    name = _ours(editor, f"{owner}.mlp.layers.0.u").split(".")
    norms: Any = editor.network.get_submodule(".".join(name[:2])).norms
    found: dict[str, Tensor] = {"k": norms[0].count[None]}
    for letter, norm in zip("uv", norms, strict=True):
        deviation = (norm.squares / (norm.count - 1)).sqrt()
        found |= {f"{letter}_mean": norm.mean, f"{letter}_s": norm.squares, f"{letter}_std": deviation}
    return found


def _golden(root: Path, kind: str) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    paths = sorted(root.glob(f"*/mend/{kind}_*.json"))
    return [(p.parts[-3], json.loads(p.read_text()), load_file(p.with_suffix(".safetensors"))) for p in paths]


def _check_edit(editor: MEND, step: dict[str, Any], golden: dict[str, Tensor]) -> int:
    """One edit of theirs made by us; how many of their tensors were compared."""
    tag, record = step["tag"], step["request"]
    request = EditRequest(record["prompt"], record["subject"], record["target_new"]["str"])
    row = editor.row(request)
    assert (*row.ids, row.answer[-1]) == tuple(golden[f"{tag}.input_ids"][0].tolist())
    (factors, losses) = editor.factors([[request]])
    assert losses[0][0] == pytest.approx(step["nll_before"], rel=TOLERANCE)
    editor.network.train(step["train_mode"])
    with torch.no_grad():
        turned = editor.transform(factors)
        rates = editor.network.edit_lrs.detach()
        after = EditRequest(record["prompt"], record["subject"], record["target_new"]["str"], id="after")
    compared = 0
    for i, (found, mine) in enumerate(zip(editor.maps, factors, strict=True)):
        update = turned[i][1].T @ turned[i][0]
        ours = {
            "x": mine.x,
            "delta": mine.delta,
            "x_tilde": turned[i][0] / rates[i],
            "delta_tilde": turned[i][1],
            "weight_update": update if found.module.weight.shape == update.shape else update.T,
        }
        assert float(update.norm()) == pytest.approx(step["update_norms"][found.name], rel=TOLERANCE)
        for name, tensor in ours.items():
            if (theirs := golden.get(f"{tag}.{found.name}.{name}")) is not None:
                if name in ("x", "delta"):
                    theirs = theirs[0][golden[f"{tag}.{found.name}.delta"][0].any(-1)]
                assert _error(tensor, theirs) < TOLERANCE, (tag, found.name, name)
                compared += 1
    if not step["train_mode"]:
        with editor.applied(after):
            assert editor.factors([[after]])[1][0][0] == pytest.approx(step["nll_after"], rel=TOLERANCE)
    return compared


def test_factors_transformed_factors_updates_and_statistics_are_the_originals(golden_root: Path) -> None:
    found = _golden(golden_root, "edit")
    assert {meta["variant"] for _, meta, _ in found} == EDITS
    for name, meta, golden in found:
        editor = _editor(golden_root, name, meta)
        is_loaded = _load(editor, golden)
        assert is_loaded or meta["variant"] == "shared_combined"  # of the identity no weights are stored
        order = [meta["inner_params"].index(found.name) for found in editor.maps]
        editor.network.edit_lrs.data.copy_(golden["edit_lrs0"][order])
        compared = 0
        with evaluating(editor.model), frozen(editor.model):
            for step in meta["steps"]:
                compared += _check_edit(editor, step, golden)
                prefix = "stats_before_eval_req2."
                if step["tag"] == "edit_train_req1":
                    for key in (key for key in golden if key.startswith(prefix)):
                        owner, _, kind = key.removeprefix(prefix).rpartition(".")
                        assert _error(_statistics(editor, owner)[kind], golden[key]) < TOLERANCE, key
                        compared += 1
        assert compared >= 18, (name, meta["variant"], compared)


def _lesson(batch: dict[str, Any], request: EditRequest) -> TrainingExample:
    """One of their batches: where labels are set on the asked row, and real tokens on the kept rows."""
    (ids,), (labels,) = batch["edit_outer"]["input_ids"], batch["edit_outer"]["labels"]
    answer = tuple(label for label in labels if label != -100)
    kept = tuple(
        KeptRow(tuple(token for token, real in zip(row, mask, strict=True) if real))
        for row, mask in zip(batch["loc"]["input_ids"], batch["loc"]["attention_mask"], strict=True)
    )
    assert tuple(ids[-len(answer) :]) == answer
    return TrainingExample(request, (AnsweredRow(tuple(ids[:-1]), answer),), kept)


class _Ids(MEND):
    """Takes the rows of the edits as they are stored."""

    rows: dict[str | None, AnsweredRow]

    def row(self, request: EditRequest) -> AnsweredRow:
        return self.rows[request.id]


def _train(editor: MEND, meta: dict[str, Any]) -> None:
    """Their four steps. The first step of theirs never reaches the optimiser: its gradient joins the second's."""
    lessons, rows = [], {}
    for i, batch in enumerate(meta["batches"]):
        (ids,), (labels,) = batch["edit_inner"]["input_ids"], batch["edit_inner"]["labels"]
        answer = tuple(label for label in labels if label != -100)
        request = EditRequest("{} a", "subject", "target", id=str(i))
        rows[request.id] = AnsweredRow(tuple(ids[:-1]), answer)
        lessons.append(_lesson(batch, request))
    editor.__class__ = _Ids
    editor.rows = rows  # type: ignore[attr-defined]
    optimiser = torch.optim.Adam(editor.parameter_groups())
    for i, (lesson, step) in enumerate(zip(lessons, meta["steps"], strict=True)):
        loss, parts = editor.loss([[lesson]])
        assert parts["edit"] == pytest.approx(step["loss/edit"], rel=TOLERANCE), i
        assert parts["locality"] == pytest.approx(step["loss/loc"], rel=TOLERANCE, abs=1e-7), i
        assert float(loss.detach()) == pytest.approx(step["loss/total_edit"], rel=TOLERANCE), i
        loss.backward()
        if i > 0:
            norm = torch.nn.utils.clip_grad_norm_(editor.network.parameters(), editor.config.grad_clip)
            assert float(norm) == pytest.approx(step["grad"], rel=1e-3), i
            optimiser.step()
            optimiser.zero_grad()


def test_four_steps_of_training_have_the_losses_and_give_the_weights_of_the_originals(golden_root: Path) -> None:
    found = _golden(golden_root, "train")
    starts = {(name, meta["variant"]): golden for name, meta, golden in _golden(golden_root, "edit")}
    trained = []
    for name, meta, golden in found:
        editor = _editor(golden_root, name, meta)
        start = starts.get((name, meta["variant"]), {})
        if not (_load(editor, golden) or _load(editor, start)):
            continue  # the network that they began with is not stored
        with evaluating(editor.model), frozen(editor.model):
            _train(editor, meta)
        order = [meta["inner_params"].index(found.name) for found in editor.maps]
        rates = editor.network.edit_lrs
        assert _error(rates.detach(), golden["edit_lrs_after4"][order]) < TOLERANCE
        for key in (key for key in golden if key.startswith("editor_after4.")):
            mine = editor.network.get_parameter(_ours(editor, key.removeprefix("editor_after4.")))
            assert _error(mine.detach(), golden[key]) < 1e-3, key
        trained.append((name, meta["variant"]))
    assert ("gpt2_tr", "shared_combined") in trained
    assert len(trained) >= len(found) - 1
