"""Subjects at a first token that the model makes an attention sink of are edited where their key is their own.

The tiny model has the sink by construction: a neuron of block 1 sees the first position and writes a huge vector.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import editors
from errata.editors.core.errors import DisablingEditWarning, RequestError
from errata.editors.core.forward.state_norms import last_state_norms
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.request import EditRequest
from errata.editors.rome import WEAK_RATIO

FIRST = EditRequest("{} is in", "V", "Oslen", id="first")
ELSEWHERE = EditRequest("The capital of {} is", "V", "Oslen", id="elsewhere")
SETTINGS = {
    "layers": [2],
    "v_num_grad_steps": 25,
    "context_templates": ["{}", "The capital. {}", "What is it? {}", "Near the river. {}"],
}
SINK = 1


@pytest.fixture(scope="module")
def model(make_tiny: Any) -> Any:
    model = make_tiny("gpt2", dtype=torch.float64, n_layers=5)
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0.0  # the first number of a hidden state says whether it is the first
        model.transformer.wpe.weight[:, 0] = 0.0
        model.transformer.wpe.weight[0, 0] = 3.0
        for block in model.transformer.h:
            block.attn.c_proj.weight[:, 0] = 0.0
            block.mlp.c_proj.weight[:, 0] = 0.0
        mlp = model.transformer.h[SINK].mlp
        mlp.c_fc.weight[:, 0] = 0.0
        mlp.c_fc.weight[0, 0], mlp.c_fc.bias[0] = 10.0, -4.0
        mlp.c_proj.weight[0] = 0.0
        mlp.c_proj.weight[0, 1] = 100.0
    return model


@pytest.fixture(scope="module")
def moments(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tensor]:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?", k=6)) for _ in range(400)]
    cache = tmp_path_factory.mktemp("moments")
    return second_moments(model, tiny_tokenizer, [0, 2], texts, cache_dir=cache).matrices


def make(name: str, model: Any, tokenizer: Any, moments: dict[int, Tensor], **fields: Any) -> Any:
    method: Any = editors.get(name)
    return method(model, tokenizer, {**SETTINGS, **fields}, moments=moments)


def test_the_model_has_a_sink_at_its_first_token(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("r_rome", model, tiny_tokenizer, {})
    rows = [tiny_tokenizer("V")["input_ids"], tiny_tokenizer("The capital V")["input_ids"]]
    alone, behind = last_state_norms(editor.architecture, rows, 2, pad=0)
    assert alone[0] < 2 * behind[0]
    assert alone[1] > 10 * behind[1]


@pytest.mark.parametrize("name", ["rome", "r_rome", "c_rome"])
def test_an_edit_with_a_weak_key_moves_below_the_sink_and_other_edits_stay_as_they_are(
    name: str, model: Any, tiny_tokenizer: Any, moments: dict[int, Tensor]
) -> None:
    first, elsewhere = make(name, model, tiny_tokenizer, moments).compute([FIRST, ELSEWHERE])
    (moved,) = first.diagnostics
    assert (first.requests, moved["request"], moved["layer"]) == ((FIRST,), "first", 0)
    assert moved["weak_ratio"] < WEAK_RATIO <= moved["key_ratio"]
    assert list(first.patch.updates) == ["transformer.h.0.mlp.c_proj.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisablingEditWarning)
        there, alone = make(name, model, tiny_tokenizer, moments, weak_key="edit").compute([FIRST, ELSEWHERE])
    assert there.diagnostics[0]["layer"] == 2
    assert moved["final"]["nll"] < there.diagnostics[0]["final"]["nll"]  # at the sink less can be written
    ((path, update),) = elsewhere.patch.updates.items()
    assert path == "transformer.h.2.mlp.c_proj.weight"
    written = [part.matrix(torch.float64, torch.device("cpu")) for part in (update, alone.patch.updates[path])]
    assert torch.allclose(*written, rtol=1e-9, atol=1e-12)


def test_rome_warns_where_it_edits_a_weak_key_and_recommends_what_helps(
    model: Any, tiny_tokenizer: Any, moments: dict[int, Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DisablingEditWarning)
        (moved,) = make("rome", model, tiny_tokenizer, moments).compute(FIRST)
    with pytest.warns(DisablingEditWarning, match="set weak_key=earlier_layer"):
        (there,) = make("rome", model, tiny_tokenizer, moments, weak_key="edit").compute(FIRST)
    assert there.diagnostics[0]["update_ratio"] > 3 * moved.diagnostics[0]["update_ratio"]


def test_a_weak_key_is_refused_on_request(model: Any, tiny_tokenizer: Any, moments: dict[int, Tensor]) -> None:
    editor = make("r_rome", model, tiny_tokenizer, moments, weak_key="refuse")
    with pytest.raises(RequestError, match="request first, field 'subject': the key of the bare prompt is weak"):
        editor.compute([ELSEWHERE, FIRST])
    assert editor.compute(ELSEWHERE)[0].diagnostics[0]["layer"] == 2


def test_an_edit_stays_where_the_earlier_layer_has_no_second_moment(
    model: Any, tiny_tokenizer: Any, moments: dict[int, Tensor]
) -> None:
    (edit,) = make("r_rome", model, tiny_tokenizer, {2: moments[2]}).compute(FIRST)
    assert edit.diagnostics[0]["layer"] == 2
