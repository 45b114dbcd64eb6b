"""PMET: two vectors found together, one of them written; numbers from the authors' code where they are at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from safetensors.torch import load_file

from errata.editors.core.errors import ArchitectureError, ConfigError
from errata.editors.core.families.search_rows import PromptRow, make_buckets
from errata.editors.core.families.value_search import find_targets
from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.forward.state_norms import last_state_norms
from errata.editors.core.forward.suffix import vector_modules
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.architecture import describe, is_transposed
from errata.editors.core.request import EditRequest
from errata.editors.pmet import PMET, PMETConfig

TOLERANCE = {"f64": 1e-9, "f32": 1e-3}  # of traces; sensitivity of the original to float32 is 3.6e-4
UPDATES = {"f64": 1e-9, "f32": 1e-4}


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


def _golden_editor(root: Path, path: Path, meta: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, given = path.parts[-3], meta["hparams"]
    unused = ("mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_adjustment")
    fields = {
        key: value for key, value in given.items() if key in PMETConfig.__dataclass_fields__ and key not in unused
    }
    fields["context_templates"] = [template for group in meta["context_templates"] for template in group]
    stored = load_file(root / name / "stats" / "mom2.safetensors")
    stored |= load_file(root / name / "stats" / "mom2_layers24.safetensors")
    moments = {layer: stored[f"layer{layer}.mom2_f32"] for layer in (2, 3, 4)}
    model = AutoModelForCausalLM.from_pretrained(root / "models" / name, dtype=torch.float32)
    model = model.double() if meta["dtype"] == "f64" else model
    return PMET(model, AutoTokenizer.from_pretrained(root / "tokenizer"), fields, moments=moments)


def test_a_batch_is_the_originals(golden_root: Path) -> None:
    found = sorted(golden_root.glob("*/pmet/*_f??.json"))
    assert found
    for path in found:
        meta, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        editor = _golden_editor(golden_root, path, meta)
        requests = [
            EditRequest(record["prompt"], record["subject"], record["target_new"]["str"]) for record in meta["requests"]
        ]
        targets = editor._searched(requests)
        assert [len(target.losses) for target in targets] == meta["n_iterations"]
        traces, updates = TOLERANCE[meta["dtype"]], UPDATES[meta["dtype"]]
        wanted = torch.stack([target.initial + target.delta for target in targets])
        assert _error(wanted[:, 0], tensors["z_attn"]) <= traces, path
        assert _error(wanted[:, 1], tensors["z_mlp"]) <= traces, path
        for target, theirs in zip(targets, meta["losses"], strict=True):
            for ours, key in (("loss", "loss"), ("weighted_nll", "nll_times_factor"), ("weight_decay", "wd")):
                assert [one[ours] for one in target.losses] == pytest.approx(theirs[key], rel=traces, abs=traces), path
        # Updates are compared from their values, so that what a search does to rounding is not in them.
        z = torch.stack([tensors["z_attn"], tensors["z_mlp"]], dim=1)
        theirs_found = [
            replace(target, delta=value.to(target.initial) - target.initial)
            for target, value in zip(targets, z, strict=True)
        ]
        editor._searched = lambda _requests, found=theirs_found: found
        edit = editor.compute_together([requests])
        for layer, norm in meta["upd_norm"].items():
            update = edit.patch.updates[editor.architecture.weight_name(int(layer))]
            assert update.norm() == pytest.approx(norm, rel=updates)
            if (theirs := tensors.get(f"layer{layer}.weight_delta")) is not None:
                matrix = update.matrix(torch.float64, torch.device("cpu"))
                ours = matrix.T if is_transposed(editor.architecture.down(int(layer))) else matrix
                assert _error(ours, theirs) <= updates, path


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
def test_suffixes_with_a_vector_at_each_sublayer_give_what_hooks_on_whole_rows_give(
    make_tiny: Any, tiny_tokenizer: Any, architecture: str
) -> None:
    model = make_tiny(architecture, dtype=torch.float64)
    editor: Any = build("pmet", model, tiny_tokenizer, context_templates=("{}", "Then. {}"))
    (problem,) = [editor.problem(REQUESTS[0])]
    parts = describe(model)
    last = parts.n_layers - 1
    buckets, initial = make_buckets(parts, [problem], layer=1, last=last, site="sublayers", pad=0, pass_tokens=32)
    assert initial.shape == (1, 2, parts.d_model)
    vectors = torch.randn(1, 2, parts.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bucket in buckets:
        ours = bucket.suffixes.readout(bucket.suffixes.run(vectors[bucket.owner]))
        for b, member in enumerate(bucket.members):
            hooks = []
            for index, module in enumerate(vector_modules(parts, 1, "sublayers")):

                def add(_module: Any, _args: Any, output: torch.Tensor, index: int = index, at: int = member.row.start):
                    rows = output.reshape(1, -1, output.shape[-1]).clone()
                    rows[0, at] += vectors[0, index]
                    return rows.reshape(output.shape)

                hooks.append(module.register_forward_hook(add))
            logits = model(torch.tensor([member.row.ids])).logits[0, member.row.start :]
            for hook in hooks:
                hook.remove()
            close = 1e-8 if architecture == "gpt2" else 1e-4  # rotary angles and Llama's norms are float32
            torch.testing.assert_close(ours[b, : len(logits)], logits, rtol=close, atol=close)


def test_a_walk_reads_what_the_last_down_projection_gives_with_the_updates_in_place(
    make_tiny: Any,
) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    parts = describe(model)
    rows = [[1, 2, 3, 4], [5, 6, 7], [5, 6, 7]]
    seen: list[torch.Tensor] = []

    def outputs() -> torch.Tensor:
        hook = parts.down(1).register_forward_hook(
            lambda _m, _a, output: seen.append(output.reshape(-1, parts.d_model))
        )
        for row in rows:
            model(torch.tensor([row]))
        hook.remove()
        found = torch.stack([output[-1] for output in seen])
        seen.clear()
        return found

    walk = LayerWalk(parts, rows, (0, 1), pad=0, watched=range(3), site="mlp")
    torch.testing.assert_close(walk.hidden, outputs())
    for layer in (0, 1):
        generator = torch.Generator().manual_seed(layer)
        U, V = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) / 9
            for shape in ((parts.d_model, 2), (2, parts.d_mlp))
        )
        update = LowRank(U, V)
        walk.advance(update)
        parts.weight(layer).add_(U @ V)
        torch.testing.assert_close(walk.hidden, outputs())


def test_once_the_answer_is_the_likeliest_the_search_weighs_it_less_and_may_end(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2")
    editor: Any = build("pmet", model, tiny_tokenizer, context_templates=("{}",), stop_loss=0.0)
    problem = editor.problem(REQUESTS[0])
    (row,) = problem.rows
    ids = row.ids[: len(row.ids) - len(row.answer) + 1]
    top = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    known = replace(problem, rows=(PromptRow(ids, row.start, (top,)),))
    (fresh, done) = editor._found([problem, known], 1, "sublayers")
    assert len(fresh.losses) == 4
    assert len(done.losses) == 1
    assert not bool(done.delta.any())


def test_the_reported_nll_is_that_of_the_answer_also_where_the_loss_counts_a_tenth_of_it(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2")
    editor: Any = build("pmet", model, tiny_tokenizer, context_templates=("{}",))
    problem = editor.problem(REQUESTS[0])
    (row,) = problem.rows
    ids = row.ids[: len(row.ids) - len(row.answer) + 1]
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
    known = replace(problem, rows=(PromptRow(ids, row.start, (int(log_p.argmax()),)),))
    objective = replace(editor.settings.objective, v_lr=1e-7, stop_loss=0.0, stop_kl=-1.0)  # it hardly moves
    places: Any = {"layer": 1, "loss_layer": editor.architecture.n_layers - 1, "site": "sublayers", "pad": editor.pad}
    (target,) = find_targets(editor.architecture, [known], objective, **places)
    nll = -log_p.max().item()
    assert [one["nll"] for one in target.losses] == pytest.approx([nll] * 4, rel=1e-4)
    assert [one["weighted_nll"] for one in target.losses] == pytest.approx([nll, *[nll / 10] * 3], rel=1e-4)
    for one in target.losses:
        assert one["loss"] == pytest.approx(one["weighted_nll"] + one["kl"] + one["weight_decay"], rel=1e-5)


def test_what_pmet_cannot_do_is_refused(make_tiny: Any) -> None:
    with pytest.raises(ConfigError, match="nas"):
        PMETConfig(nas=1.0)
    parts = describe(make_tiny("gpt2"))
    for name, child in list(parts.block(1).named_children()):
        if "attn" in name:
            setattr(parts.block(1), name, torch.nn.Identity())
            assert child is not None
    with pytest.raises(ArchitectureError, match="attention"):
        parts.attention_out(1)


def test_a_relative_search_counts_in_the_hidden_state_that_both_vectors_are_added_to(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("llama", dtype=torch.float64)
    shared = {"context_templates": ("{}",), "v_weight_decay": 0.0, "clamp_norm_factor": 1e6, "v_num_grad_steps": 3}
    relative: Any = build("pmet", model, tiny_tokenizer, v_relative=True, v_lr=0.1, **shared)
    row = relative.problem(REQUESTS[0]).rows[0]
    (norm,) = last_state_norms(describe(model), [row.ids[: row.start + 1]], relative.layers[-1] + 1, pad=0)[:, -1]
    unit = float(norm) / describe(model).d_model ** 0.5
    absolute: Any = build("pmet", model, tiny_tokenizer, v_lr=0.1 * unit, **shared)
    found, same = (editor._searched([REQUESTS[0]])[0].delta for editor in (relative, absolute))
    torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-6)  # norms compute in float32
    limited: Any = build(
        "pmet", model, tiny_tokenizer, v_relative=True, v_lr=0.1, **{**shared, "clamp_norm_factor": 0.01}
    )
    lengths = limited._searched([REQUESTS[0]])[0].delta.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01 * float(norm)), rtol=1e-6, atol=0)
