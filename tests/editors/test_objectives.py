"""Fine-tuning on the losses of canonical examples: their values are the authors', and training lowers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.editors.core.config import EditorConfig
from errata.editors.core.edit import Edit
from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.ledger.patch import Dense
from errata.editors.core.request import EditRequest
from errata.editors.finetune import FTM, LocFT
from errata.editors.lora import LoRA

OBJECTIVES = ("good", "bad", "balance", "good-v-bad")
REQUESTS = [
    EditRequest("the janitor said", None, " he", " she"),
    EditRequest("a river runs", None, " through it", " away"),
    EditRequest("danielle darrieux speaks", None, " french", " english"),
    EditRequest("the capital is", None, " paris", " rome"),
]


@pytest.fixture(scope="module")
def tiny(make_tiny: Any, tiny_tokenizer: Any) -> tuple[Any, Any]:
    return make_tiny("gpt2"), tiny_tokenizer


def losses(edit: Edit) -> list[list[float]]:
    return [report["losses"] for report in edit.diagnostics]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_loss_is_that_of_the_authors_training(golden_root: Path, objective: str) -> None:
    said = json.loads((golden_root / "gpt2_tr/canonical/losses_f32.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(golden_root / "models/gpt2_tr", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(golden_root / "tokenizer")
    if objective in ("balance", "good-v-bad"):
        cases, wanted = [(c["prefix"], c["suffix1"], c["suffix2"]) for c in said["pair_cases"]], "training_loss_batch1"
    else:
        cases, wanted = [(c["prefix"], c["suffix"], None) for c in said["single_cases"]], "mean_token_loss_batch1"
    requests = [EditRequest(prefix, None, target, other, join="") for prefix, target, other in cases]
    editor = FTM(model, tokenizer, {"objective": objective, "num_steps": 1, "lr": 1e-4, "layers": (3,)})
    found = [losses(edit)[0][0] for edit in editor.compute(requests)]
    assert found == pytest.approx(said["results"][objective][wanted], rel=1e-4)


@pytest.mark.parametrize("method", [FTM, LoRA])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_lowers_the_mean_loss(tiny: tuple[Any, Any], method: Any, objective: str) -> None:
    fields = {"objective": objective, "num_steps": 4, "lr": 1e-3, "stop_loss": 0.0, "batch_size": 4}
    found = losses(method(*tiny, fields).compute_together([REQUESTS]))
    assert sum(own[-1] for own in found) < sum(own[0] for own in found)


def test_requests_trained_together_are_those_trained_apart(tiny: tuple[Any, Any]) -> None:
    editor = FTM(*tiny, {"objective": "balance", "num_steps": 2, "lr": 1e-3})
    together = [losses(edit)[0] for edit in editor.compute(REQUESTS[:2])]
    apart = [losses(edit)[0] for request in REQUESTS[:2] for edit in editor.compute(request)]
    assert [value for own in together for value in own] == pytest.approx([v for own in apart for v in own], rel=1e-5)


def test_the_published_loop_steps_on_the_last_request_of_each_batch_alone(tiny: tuple[Any, Any]) -> None:
    shared = {"num_steps": 2, "lr": 1e-3, "stop_loss": 0.0}
    published = FTM(*tiny, {**shared, "batch_size": 2, "accumulate": "last"}).compute_together([REQUESTS])
    every_second = FTM(*tiny, {**shared, "batch_size": 1}).compute_together([REQUESTS[1::2]])
    proper = FTM(*tiny, {**shared, "batch_size": 2}).compute_together([REQUESTS])
    ((name, found),) = published.patch.updates.items()
    wanted, other = every_second.patch.updates[name], proper.patch.updates[name]
    assert isinstance(found, Dense)
    assert isinstance(wanted, Dense)
    assert isinstance(other, Dense)
    assert torch.equal(found.delta, wanted.delta)
    assert not torch.equal(found.delta, other.delta)
    assert [len(own) for own in losses(published)] == [0, 2, 0, 2]


def test_the_published_loop_ends_with_a_pass_below_the_bound(tiny: tuple[Any, Any]) -> None:
    # A pass over shuffled requests trains one of them. What the others had in earlier passes does not count.
    fields = {"num_steps": 40, "lr": 1e-2, "stop_loss": 4.0, "batch_size": 2, "accumulate": "last"}
    found = losses(LocFT(*tiny, fields).compute_together([REQUESTS[:2]]))
    assert sum(map(len, found)) < 40
    assert sum(loss < 4.0 for own in found for loss in own) == 1


def test_what_cannot_be_trained_is_refused(tiny: tuple[Any, Any]) -> None:
    editor = FTM(*tiny, {"objective": "balance"})
    with pytest.raises(RequestError, match="compares the new answer with the true one"):
        editor.compute(EditRequest("the janitor said", None, " he"))
    with pytest.raises(ConfigError, match="give lr"):
        FTM.Config(objective="bad")


def test_an_objective_left_out_changes_no_digest() -> None:
    plain: EditorConfig = FTM.Config()
    assert not {"objective", "accumulate"} & set(plain.to_dict())
    assert FTM.Config(objective="balance").to_dict()["objective"] == "balance"
