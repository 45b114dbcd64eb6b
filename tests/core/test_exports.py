"""Exported edits, opened by the programs that they are meant for: PEFT and transformers."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_adapters import complaints_are_errors, opened, same, weights_of
from safetensors.torch import load_file

import errata
from errata.editors.core.edit import Edit
from errata.editors.core.errors import (
    ConfigError,
    ExportError,
    LedgerError,
    NumericalError,
)
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch, Update
from errata.editors.core.request import EditRequest
from errata.editors.core.storage import lora_export as lora
from errata.editors.core.storage.merged_export import MANIFEST, check_base

peft = pytest.importorskip("peft", reason="pip install -c constraints.txt -e '.[peft]'")

ARCHITECTURES = ("gpt2", "llama")
DOWN = {"gpt2": "transformer.h.{}.mlp.c_proj.weight", "llama": "model.layers.{}.mlp.down_proj.weight"}
IDS = torch.tensor([[5, 17, 230, 41, 8, 99], [7, 7, 19, 250, 3, 11]])


def shape_of(model: Any, name: str) -> tuple[int, int]:
    rows, columns = model.get_parameter(name).shape
    return (columns, rows) if ".c_" in name else (rows, columns)


def factors(model: Any, name: str, rank: int, seed: int = 0) -> LowRank:
    """A change that is felt: about as large as the weight itself."""
    d_out, d_in = shape_of(model, name)
    made = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=made), torch.randn(rank, d_in, generator=made) / d_in**0.5)


def an_edit(model: Any, updates: Mapping[str, Update], target: str = "Brast") -> Edit:
    return Edit("made", (EditRequest("The capital of {} is", "Varland", target),), Patch(updates), ({},), {}, model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_answers_as_the_edited_model_and_merges_into_its_weights(
    make_tiny: Any, tmp_path: Path, architecture: str
) -> None:
    model, name = make_tiny(architecture), DOWN[architecture]
    edit = an_edit(model, {name.format(i): factors(model, name.format(i), rank) for i, rank in ((0, 1), (2, 5))})
    before = logits(model)
    edit.apply()
    wanted, weights = logits(model), weights_of(model)
    assert edit.export_lora(tmp_path / "adapter") == lora.LoraExport(
        tmp_path / "adapter", 5, dict.fromkeys(edit.patch.updates, 0.0)
    )

    wrapped = opened(make_tiny(architecture), tmp_path / "adapter")
    adapted = [key for key, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert [f"{key}.weight" for key in adapted] == list(edit.patch.updates)
    assert (wanted - before).abs().max() > 0.1
    assert close(logits(wrapped), wanted)
    merged = wrapped.merge_and_unload()
    assert close(logits(merged), wanted)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-6, msg=key)


def test_every_module_has_the_one_rank_that_the_configuration_states_and_scales_by_one(
    make_tiny: Any, tmp_path: Path
) -> None:
    model, name = make_tiny("llama"), DOWN["llama"]
    an_edit(model, {name.format(i): factors(model, name.format(i), i + 1) for i in range(3)}).export_lora(
        tmp_path / "a"
    )
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    tensors = load_file(tmp_path / "a" / lora.WEIGHTS)
    assert len(tensors) == 6
    assert {tensor.shape[0 if ".lora_A." in key else 1] for key, tensor in tensors.items()} == {3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_of_several_edits_stack_and_the_ledger_writes_them_as_one(
    make_tiny: Any, tmp_path: Path, architecture: str
) -> None:
    model, name = make_tiny(architecture), DOWN[architecture]
    shared, own = name.format(1), name.format(2)
    first = an_edit(model, {shared: factors(model, shared, 2, seed=1)}).apply()
    only_first = logits(model)
    second = an_edit(model, {shared: factors(model, shared, 1, seed=2), own: factors(model, own, 1)}, "Ost").apply()
    both = logits(model)
    first.export_lora(tmp_path / "first")
    second.export_lora(tmp_path / "second")
    assert errata.export_lora(model, tmp_path / "both").rank == 3
    assert close(logits(opened(make_tiny(architecture), tmp_path / "both")), both)

    stacked = opened(make_tiny(architecture), tmp_path / "first")
    assert close(logits(stacked), only_first)
    with complaints_are_errors():
        stacked.load_adapter(str(tmp_path / "second"), adapter_name="second")
        stacked.base_model.set_adapter(["default", "second"])
    assert close(logits(stacked), both)
    assert (both - only_first).abs().max() > 0.1


def test_an_adapter_of_a_bfloat16_model_keeps_the_rank_and_precision_of_the_factors(
    make_tiny: Any, tmp_path: Path
) -> None:
    model, name = make_tiny("llama", dtype=torch.bfloat16), DOWN["llama"].format(1)
    update = factors(model, name, 2)
    edit = an_edit(model, {name: update}).apply()
    wanted, weight = logits(model), model.get_parameter(name).detach().clone()
    assert edit.export_lora(tmp_path / "adapter").rank == 2
    tensors = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    assert len(tensors) == 2
    assert all(tensor.equal(update.V if ".lora_A." in key else update.U) for key, tensor in tensors.items())
    wrapped = opened(make_tiny("llama", dtype=torch.bfloat16), tmp_path / "adapter")
    assert {p.dtype for key, p in wrapped.named_parameters() if "lora_" in key} == {torch.float32}
    spread = float(wanted.float().std())
    assert float((logits(wrapped) - wanted).float().abs().max()) < 0.1 * spread
    merged = wrapped.merge_and_unload().get_parameter(name).detach().float()
    # PEFT rounds the update to 8 bits of mantissa before it adds it, errata the sum.
    largest = torch.maximum(weight.float().abs(), update.matrix(torch.float32, torch.device("cpu")).abs())
    assert bool(((merged - weight.float()).abs() <= 2**-7 * largest).all())


def test_a_dense_update_is_written_whole_where_its_rank_fits(make_tiny: Any, tmp_path: Path) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    delta = torch.randn(shape_of(model, name), generator=torch.Generator().manual_seed(3)) / 8
    edit = an_edit(model, {name: Dense(delta)})
    written = edit.export_lora(tmp_path / "adapter")
    assert written.rank == 32
    assert 0 < written.errors[name] < 1e-6
    with edit.applied():
        wanted = logits(model)
    assert close(logits(opened(make_tiny("gpt2"), tmp_path / "adapter")), wanted)


@pytest.mark.parametrize("dense", [True, False])
def test_an_update_cut_to_a_rank_is_the_nearest_one_and_its_error_is_recorded(
    make_tiny: Any, tmp_path: Path, dense: bool
) -> None:
    model, name = make_tiny("llama"), DOWN["llama"].format(0)
    low = factors(model, name, 6)
    delta = low.matrix(torch.float64, torch.device("cpu"))
    written = an_edit(model, {name: Dense(delta.float()) if dense else low}).export_lora(tmp_path / "a", rank=2)
    A, B = (load_file(tmp_path / "a" / lora.WEIGHTS)[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB")
    singular = torch.linalg.svdvals(delta)
    best = float(singular[2:].norm() / singular.norm())
    assert A.dtype == B.dtype == torch.float32
    assert float((delta - B.double() @ A.double()).norm() / delta.norm()) == pytest.approx(best, rel=1e-5)
    assert written.rank == len(A) == 2
    assert written.errors[name] == pytest.approx(best, rel=1e-5)
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["relative_errors"] == dict(written.errors)
    assert best > 0.1


def test_more_factors_than_a_matrix_has_rows_are_brought_down_to_its_rank(make_tiny: Any, tmp_path: Path) -> None:
    model, name = make_tiny("llama"), DOWN["llama"].format(0)
    edit = an_edit(model, {name: factors(model, name, 700)})
    written = edit.export_lora(tmp_path / "adapter")
    assert written.rank == 32
    assert written.errors[name] < 1e-6


def wide(make_tiny: Any, update: Callable[[int], Update]) -> Edit:
    """An edit of a Llama one of whose weights is replaced by one of 600 x 600."""
    model = make_tiny("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(600, 600, bias=False)
    return an_edit(model, {DOWN["llama"].format(1): update(600)})


@pytest.mark.parametrize(
    ("update", "word"),
    [
        (lambda d: LowRank(torch.ones(d, 513), torch.ones(513, d)), "together may need rank 513"),
        (lambda d: Dense(torch.eye(d)), "are dense and may need rank 600"),
    ],
    ids=["factors", "dense"],
)
def test_a_rank_above_512_is_refused_with_what_to_do_instead(
    make_tiny: Any, tmp_path: Path, update: Callable[[int], Update], word: str
) -> None:
    edit = wide(make_tiny, update)
    with pytest.raises(ExportError, match=rf"{word}.*rank=512.*export_merged"):
        edit.export_lora(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    assert edit.export_lora(tmp_path / "adapter", rank=512).rank == 512


def refused(model: Any) -> dict[str, tuple[Edit, type[Exception], str]]:
    down = DOWN["gpt2"].format(0)
    nan = factors(model, down, 1)
    nan.U[0, 0] = float("nan")
    embeddings = "transformer.wte.weight"  # tied to the head
    size = model.get_parameter(embeddings).shape
    return {
        "NaN": (an_edit(model, {down: nan}), NumericalError, "NaN"),
        "embeddings": (
            an_edit(model, {embeddings: Dense(torch.ones(size))}),
            ExportError,
            "not the weight of a linear",
        ),
        "head": (an_edit(model, {"lm_head.weight": Dense(torch.ones(size))}), ExportError, "export_merged"),
        "nothing": (an_edit(model, {}), ExportError, "no change of weights alone"),
        "shape": (
            an_edit(model, {down: LowRank(torch.ones(3, 1), torch.ones(1, 4))}),
            LedgerError,
            "expected an update",
        ),
    }


@pytest.mark.parametrize("case", ["NaN", "embeddings", "head", "nothing", "shape"])
def test_what_no_adapter_can_hold_is_refused_and_nothing_is_written(make_tiny: Any, tmp_path: Path, case: str) -> None:
    edit, error, word = refused(make_tiny("gpt2"))[case]
    with pytest.raises(error, match=word):
        edit.export_lora(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_linear_weight_is_refused_and_the_untied_one_is_not(make_tiny: Any, tmp_path: Path) -> None:
    model, names = make_tiny("llama"), [DOWN["llama"].format(i) for i in range(2)]
    edit = an_edit(model, {names[0]: factors(model, names[0], 1)})
    edit.export_lora(tmp_path / "untied")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ExportError, match=r"layers.0.* and .*layers.1.* are one weight"):
        edit.export_lora(tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_an_empty_ledger_has_nothing_to_export(make_tiny: Any, tmp_path: Path) -> None:
    ledger = Ledger.of(model := make_tiny("gpt2"))
    assert ledger.model is model
    with pytest.raises(ExportError, match="expected at least one edit to export, got none"):
        errata.export_lora(model, tmp_path / "a")
    with pytest.raises(ExportError, match="expected at least one edit to export, got none"):
        errata.export_merged(model, tmp_path / "a")


def test_an_existing_folder_is_left_as_it_is_unless_it_is_empty(make_tiny: Any, tmp_path: Path) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    edit = an_edit(model, {name: factors(model, name, 1)})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "empty").mkdir()
    for write in (edit.export_lora, edit.export_merged):
        with pytest.raises(ExportError, match="not written over"):
            write(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]
    edit.export_lora(tmp_path / "empty")
    assert (tmp_path / "empty" / lora.WEIGHTS).is_file()


def test_the_folder_that_is_worked_in_is_no_place_for_an_export(
    make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    edit = an_edit(model, {name: factors(model, name, 1)})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "here", ""):
        with pytest.raises(ExportError, match="current working folder"):
            edit.export_lora(folder)
    with pytest.raises(ExportError, match="not written over"):
        edit.export_lora("..")
    assert not any((tmp_path / "here").iterdir())
    edit.export_lora("../here/adapter")
    assert (tmp_path / "here" / "adapter" / lora.WEIGHTS).is_file()


def test_a_full_disk_leaves_no_part_of_an_export(
    make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    edit = an_edit(model, {name: factors(model, name, 1)})
    written: list[str] = []

    def full(folder: Path, *_: Any) -> None:
        written.extend(path.name for path in folder.iterdir())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lora, "write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        edit.export_lora(tmp_path / "adapter")
    assert sorted(written) == [lora.CONFIG, lora.WEIGHTS]  # it failed between files
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_is_bit_for_bit_one_that_carries_the_edit_alone(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, name = make_tiny(architecture, dtype=dtype), DOWN[architecture]
    one, two = name.format(0), name.format(1)
    edit = an_edit(model, {one: factors(model, one, 3), two: factors(model, two, 1)})
    with edit.applied():
        alone = weights_of(model)
    an_edit(model, {one: factors(model, one, 1, seed=9), two: factors(model, two, 2, seed=9)}, "Ost").apply()
    edit.apply()
    both = weights_of(model)
    edit.export_merged(tmp_path / "alone", tiny_tokenizer)
    errata.export_merged(model, tmp_path / "both")
    assert same(weights_of(model), both)
    for folder, wanted in (("alone", alone), ("both", both)):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype, attn_implementation="eager")
        assert same(weights_of(found), wanted)
    assert not same(alone, both)
    assert not same(alone, weights_of(make_tiny(architecture, dtype=dtype)))
    assert AutoTokenizer.from_pretrained(tmp_path / "alone").get_vocab() == tiny_tokenizer.get_vocab()


def test_a_merged_model_holds_an_edit_of_tied_embeddings_under_both_names(make_tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_tiny("gpt2")
    size = model.lm_head.weight.shape
    edit = an_edit(model, {"lm_head.weight": Dense(torch.full(size, 0.5))})
    edit.export_merged(tmp_path / "merged")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.lm_head.weight is found.transformer.wte.weight
    assert torch.equal(found.lm_head.weight, model.lm_head.weight + 0.5)


def test_files_of_a_tokenizer_in_folders_of_their_own_are_checked_too(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, name, tokenizer = make_tiny("gpt2"), DOWN["gpt2"].format(0), copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    an_edit(model, {name: factors(model, name, 1)}).export_merged(tmp_path / "merged", tokenizer)
    (template,) = (tmp_path / "merged").glob("*/*")
    assert template.stat().st_mode == (tmp_path / "merged" / "config.json").stat().st_mode
    check_base(tmp_path / "merged", model)
    template.write_text("{{ nothing }}")
    with pytest.raises(ExportError, match=template.name):
        check_base(tmp_path / "merged", model)


def test_the_base_of_an_export_is_told_from_other_weights(make_tiny: Any, tmp_path: Path) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    edit = an_edit(model, {name: factors(model, name, 1)}).apply()
    edit.export_lora(tmp_path / "adapter")
    check_base(tmp_path / "adapter", model)  # edited, but on that base
    check_base(tmp_path / "adapter", make_tiny("gpt2"))
    stranger = make_tiny("gpt2", seed=1)
    assert opened(stranger, tmp_path / "adapter") is not None  # PEFT has no objection
    with pytest.raises(ExportError, match="other bytes"):
        check_base(tmp_path / "adapter", make_tiny("gpt2", seed=1))
    with pytest.raises(ExportError, match="another model"):
        check_base(tmp_path / "adapter", make_tiny("llama"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_export_is_noticed(make_tiny: Any, tmp_path: Path, damage: str) -> None:
    model, name = make_tiny("gpt2"), DOWN["gpt2"].format(0)
    an_edit(model, {name: factors(model, name, 1)}).export_lora(tmp_path / "adapter")
    path = tmp_path / "adapter" / (MANIFEST if damage == "manifest" else lora.WEIGHTS)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    else:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError):
        check_base(tmp_path / "adapter", model)


def test_an_adapter_is_refused_as_a_model_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a LoRA adapter: expected a whole model"):
        errata.load(str(tmp_path))


def test_edits_of_a_folder_are_shown_by_their_ids_and_not_by_their_numbers() -> None:
    assert repr(errata.Edits((), {"name": "world"}, {})) == "Edits of world: none"
