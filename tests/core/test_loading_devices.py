"""Where a model is loaded: one device by its name or its number, or spread over several by a device map."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import errata
from errata import models
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig, EditConfig
from errata.cli import overrides
from errata.editors import ROME
from errata.editors.core.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("given", "found"), [(0, "cuda:0"), ("0", "cuda:0"), ("1", "cuda:1"), ("cuda:1", "cuda:1"), (None, "cuda")]
)
def test_a_number_is_a_gpu(given: Any, found: str) -> None:
    assert models.resolved_device(given) == torch.device(found)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("given", [2, "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused_before_the_weights_are_read(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"the GPUs here are cuda:0 to cuda:1"):
        models.resolved_device(given)


@pytest.mark.parametrize("given", ["0,1", "auto", "cuda:0,cuda:1"])
def test_several_devices_are_answered_with_the_device_map(given: str) -> None:
    with pytest.raises(ConfigError, match=r"as cpu or cuda:0.*model\.device_map=auto"):
        errata.load("world", device=given)


@pytest.mark.parametrize("given", ["gpu", "cuda:x", "-1", ""])
def test_what_is_no_device_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(ConfigError, match=r"cpu, cuda or cuda:0"):
        models.resolved_device(given)


@pytest.mark.parametrize(("word", "value"), [("0", "0"), ("0,1", "0,1"), ("auto", "auto"), ("cuda:1", "cuda:1")])
def test_the_command_line_hands_a_device_on_as_it_is_typed(word: str, value: str) -> None:
    assert EditConfig.of(compose("edit", overrides.translated([f"device={word}"], "edit"))).device == value


def test_null_is_still_no_device_and_a_sweep_still_takes_several() -> None:
    words = ["editor=rome", "dataset=world", "device=null"]
    assert BenchConfig.of(compose("bench", overrides.translated(words, "bench"))).device is None
    lines = overrides.translated(["dataset=world", "device=cuda:0,cuda:1"], "bench", sweep=True)
    assert "device='cuda:0','cuda:1'" in lines


# --- device maps ------------------------------------------------------------------------------------------------------


def test_a_model_that_is_spread_by_a_map_is_edited_as_on_one_device() -> None:
    pytest.importorskip("accelerate")
    spread, tokenizer = errata.load("world", device_map={"": "cpu"})
    whole, _ = errata.load("world", device="cpu")
    request = errata.EditRequest("The capital of {} is", subject="Gavaria", target="Praminster")
    fields = {"v_num_grad_steps": 2, "mom2_adjustment": False}
    (one,), (other,) = (ROME(model, tokenizer, fields).compute(request) for model in (spread, whole))
    for name, update in one.patch.updates.items():
        assert all(map(torch.equal, update.tensors, other.patch.updates[name].tensors))


def test_the_command_line_hands_the_map_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    asked: dict[str, Any] = {}

    def refuse(*_: Any, **options: Any) -> Any:
        asked.update(options)
        raise ValueError("not loaded here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    config = EditConfig.of(compose("edit", overrides.translated(["model.device_map=auto"], "edit")))
    with pytest.raises(ConfigError, match="not loaded here"):
        config.model.load(config.precision, config.device)
    assert asked["device_map"] == "auto"
    with pytest.raises(ConfigError, match="both given"):
        config.model.load(None, "cpu")


def test_a_map_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown device_map 'atuo'; did you mean 'auto'"):
        errata.load("world", device_map="atuo")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        errata.load("world", device_map="auto")
