"""Edits and runs on disk are exported by `errata export`; what is wrong is said before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_adapters import opened, same, weights_of
from safetensors.torch import load_file
from typed_commands import run

from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import world
from errata.editors import ROME
from errata.editors.core.errors import (
    ConfigError,
    DamagedEditsError,
    ExportError,
    LedgerError,
    OtherBaseError,
)
from errata.editors.core.storage import lora_export as lora
from errata.editors.core.storage.merged_export import check_base

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

pytest.importorskip("peft", reason="pip install -c constraints.txt -e '.[peft]'")

QUICK = {"v_num_grad_steps": 3, "context_template_length_params": [[3, 2]]}


@pytest.fixture(scope="module")
def edited_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of one edit of the testbed, and the weights of the model with it."""
    model, tokenizer = models.load("world", device="cpu")
    (edit,) = ROME(model, tokenizer, {**QUICK, "layers": [1]}).compute(world.cases()[0].request)
    folder = edit.save(tmp_path_factory.mktemp("edits") / "edit")
    with edit.applied():
        return folder, weights_of(model)


def a_sequence(out: Path, **changes: Any) -> Path:
    """The run of a sequence of two edits."""
    quiet = {"generation": {"tokens": 0, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 0}}
    values = {
        "editor": {"name": "memit", **QUICK},
        "model": {"name": "world"},
        "dataset": {"name": "world"},
        "n_edits": 4,
    }
    values |= {"protocol": {"name": "sequential"}, "batch_size": 2, "device": "cpu", **quiet}
    return bench.run(BenchConfig.of({**values, "out": str(out), **changes}))


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_sequence(tmp_path_factory.mktemp("runs"))


def test_an_edit_that_was_written_is_exported_as_it_was_made(
    edited_alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, wanted = edited_alone
    shown = run("export", str(folder), f"lora={tmp_path / 'adapter'}", f"merged={tmp_path / 'model'}")
    assert "1 edit, rank 1, error 0:" in shown
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "LoRA adapter with 1 edit of world" in card
    assert "base = errata.load('world')[0]" in card
    assert 'PeftModel.from_pretrained(base, "FOLDER")' in card
    assert card.index('check_base("FOLDER", base)') < card.index("PeftModel.from_pretrained(base")
    assert "# Model with 1 edit of" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    merged, _ = models.load(tmp_path / "model", device="cpu")
    assert same(weights_of(merged), wanted)
    untouched, _ = models.load("world", device="cpu")
    check_base(tmp_path / "adapter", untouched)
    with_adapter = opened(untouched, tmp_path / "adapter").merge_and_unload()
    for name, tensor in with_adapter.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_the_edits_of_a_sequence_are_exported_together(sequence: Path, tmp_path: Path) -> None:
    shown = run("export", str(sequence), f"lora={tmp_path / 'adapter'}", f"merged={tmp_path / 'model'}")
    assert "2 edits, rank 4, error 0:" in shown
    ids = torch.tensor([[5, 17, 230, 41, 8, 99]])
    merged, _ = models.load(tmp_path / "model", device="cpu")
    untouched, _ = models.load("world", device="cpu")
    before = untouched(ids).logits
    assert (merged(ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(
        opened(untouched, tmp_path / "adapter")(ids).logits, merged(ids).logits, rtol=1e-5, atol=2e-5
    )
    assert "rank 2" in run("export", str(sequence), f"lora={tmp_path / 'cut'}", "rank=2")


def test_a_run_is_exported_in_its_own_precision(tmp_path: Path) -> None:
    editor = {"name": "r_rome", **QUICK, "mom2_adjustment": False}
    folder = a_sequence(tmp_path / "runs", editor=editor, precision="float64", n_edits=2, batch_size=1)
    for number, given in enumerate((folder, folder / "journal")):
        run("export", str(given), f"lora={tmp_path / str(number)}")
        factors = load_file(tmp_path / str(number) / lora.WEIGHTS)
        assert {tensor.dtype for tensor in factors.values()} == {torch.float64}
    with pytest.raises(OtherBaseError, match=r"float64 .* there, float32 .* here"):
        run("export", str(folder), f"lora={tmp_path / 'other'}", "precision=float32")


def test_edits_are_not_exported_over_another_model_nor_from_damaged_files(
    edited_alone: tuple[Path, dict[str, torch.Tensor]], sequence: Path, tmp_path: Path
) -> None:
    other, tokenizer = models.load("world", device="cpu")
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    out = f"lora={tmp_path / 'adapter'}"
    for folder in (edited_alone[0], sequence):
        with pytest.raises(LedgerError, match="another"):
            run("export", str(folder), f"model={tmp_path / 'other'}", out)
    copy = tmp_path / "copy"
    shutil.copytree(edited_alone[0], copy)
    (copy / "edits-00000.blocks").unlink()
    with pytest.raises(DamagedEditsError, match="cannot be read"):
        run("export", str(copy), out)
    with pytest.raises(LedgerError, match=r"nothing.manifest\.json"):
        run("export", str(tmp_path / "nothing"), out)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "lora=FOLDER or merged=FOLDER"),
        (["lora=there"], "is there already"),
        (["lora=a", "rank=many"], "expected a number"),
        (["lroa=a"], "did you mean 'lora'"),
    ],
)
def test_what_is_wrong_with_an_export_is_said_before_anything_is_loaded(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises((ConfigError, ExportError), match=said):
        run("export", "edits/none", *arguments)
