"""A GGUF file becomes a plain model: it saves, edits, exports and says that its weights were quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_tiny_gguf

import errata
from errata import gguf_models, models
from errata.benchmarks.bench.run_results import _quantised
from errata.benchmarks.runs import environment
from errata.editors import ROME
from errata.editors.core.errors import ConfigError

REQUEST = errata.EditRequest("The capital of {} is", subject="Varland", target=" Brast")
SETTINGS = {"mom2_adjustment": False, "layers": [1], "v_num_grad_steps": 3, "context_templates": ["{}"]}


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama in a GGUF file of type Q4_1, and its weights."""
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_gguf(path, tiny_tokenizer)


@pytest.fixture(scope="session")
def loaded(gguf_file: tuple[Path, Any]) -> tuple[Any, Any]:
    return errata.load(gguf_file[0], device="cpu")


def test_the_weights_are_those_of_the_file_and_the_tokens_those_of_its_tokenizer(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], loaded: tuple[Any, Any], tiny_tokenizer: Any
) -> None:
    model, tokenizer = loaded
    state = model.state_dict()
    assert state.keys() == gguf_file[1].keys()
    assert all(torch.equal(state[name], weight) for name, weight in gguf_file[1].items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    text = "The capital of Varland is Oslen."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_no_trace_of_quantisation_is_left_and_the_model_saves_to_the_same_bits(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    again, _ = errata.load(tmp_path / "plain", device="cpu")
    ids = tokenizer("The capital of Varland is", return_tensors="pt")["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_it_is_edited_saved_and_exported_and_the_cards_name_the_type(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = ROME(model, tokenizer, SETTINGS).apply(REQUEST)
    errata.save_edits(model, tmp_path / "edits", tokenizer=tokenizer)
    errata.export_lora(model, tmp_path / "lora")
    errata.export_merged(model, tmp_path / "merged", tokenizer)
    edited = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit.undo()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    merged, _ = errata.load(tmp_path / "merged", device="cpu")
    assert all(torch.equal(merged.state_dict()[name], weight) for name, weight in edited.items())
    for folder in ("edits", "lora", "merged"):
        assert "dequantised from a file that has them as Q4_1" in (tmp_path / folder / "README.md").read_text()
    errata.load_edit(tmp_path / "edits", model, tokenizer).undo()


def test_results_name_the_types_of_the_file(loaded: tuple[Any, Any]) -> None:
    machine = environment.machine(loaded[0])
    assert machine["dequantised_from"] == "Q4_1 (100 % of the weights)"
    assert "Q4_1" in _quantised(machine)[0]
    assert not _quantised({"precision": "float32"})


def test_what_is_known_before_loading_needs_no_weights(gguf_file: tuple[Path, Any], tmp_path: Path) -> None:
    path = gguf_file[0]
    assert models.layer_count(path) == 3
    assert models.resolved_dtype(path) == torch.float32
    other = tmp_path / "other.gguf"
    content = bytearray(path.read_bytes())
    other.write_bytes(content)
    assert models.fingerprint(other) == models.fingerprint(path)
    content[-1] ^= 1
    other.write_bytes(content)
    assert models.fingerprint(other) != models.fingerprint(path)


def test_a_file_of_plain_floats_was_not_quantised(tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "floats.gguf"
    write_tiny_gguf(path, tiny_tokenizer, quantised="F32", tied=False)
    header = gguf_models.read_header(path)
    assert header.quantised_as is None
    assert set(header.weights) == {"F32"}


def test_without_the_package_the_error_says_how_to_install_it(
    gguf_file: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_models, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[gguf\]'"):
        errata.load(gguf_file[0])


def test_a_device_map_is_refused(gguf_file: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="device_map cannot spread"):
        errata.load(gguf_file[0], device_map="auto")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no GGUF file at"):
        errata.load(tmp_path / "gone.gguf")


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 4000])
def test_a_damaged_file_is_refused_in_one_line(gguf_file: tuple[Path, Any], tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file[0].read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"cut\.gguf is no GGUF file, or a damaged one"):
        errata.load(path)


def test_lengths_that_cannot_be_true_are_refused(gguf_file: tuple[Path, Any], tmp_path: Path) -> None:
    content = bytearray(gguf_file[0].read_bytes())
    content[16:24] = (2**40).to_bytes(8, "little")  # the number of entries
    path = tmp_path / "long.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="states a length of"):
        models.layer_count(path)
