"""MEND's parts against plain formulas, and what is trained as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import ELSEWHERE, elsewhere, spread_out
from torch import Tensor
from torch.func import functional_call

from errata.editors.core.errors import CheckpointError, ConfigError, RequestError
from errata.editors.core.families.hypernetwork import Hypernetwork, RunningNorm
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.request import EditRequest
from errata.editors.mend import MEND

REQUESTS = [
    EditRequest("The capital of {} is", "Varland", "Brast"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("{} lies in", "São Verão", "Northern Tarvos"),
]
# In float64; transformers' Llama and NeoX turn positions and norms in float32 whatever the model's precision.
ROUNDING = {"gpt2": 1e-10, "llama": 1e-6, "neox": 1e-6}
ARCHITECTURES = tuple(ROUNDING)
MakeMend = Callable[..., MEND]


@pytest.fixture
def make_mend(make_tiny: Any, tiny_tokenizer: Any) -> MakeMend:
    def make(
        architecture: str = "gpt2",
        *,
        trained: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **fields: Any,
    ) -> MEND:
        config = MEND.Config.from_dict({"layers": [1, 2], "rank": 8, "edit_lr": 0.01, **fields})
        return MEND(make_tiny(architecture, dtype=dtype, seed=seed), tiny_tokenizer, config, trained=trained)

    return make


def shaken(editor: MEND, seed: int = 0) -> MEND:
    """With a network that is no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in editor.network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return editor


def lesson(editor: MEND, request: EditRequest) -> TrainingExample:
    """Asked as it is and behind a word; another request's prompt is kept."""
    row = editor.row(request)
    kept = editor.row(REQUESTS[0] if request is not REQUESTS[0] else REQUESTS[1]).ids
    return TrainingExample(
        request, (row, AnsweredRow((5, *row.ids), row.answer)), (KeptRow(kept), KeptRow(kept[:4], 2))
    )


# --- the mathematics ----------------------------------------------------------------------------------------------


def oriented(module: Any, tensor: Tensor) -> Tensor:
    """A tensor stored like the module's weight as (d_out, d_in), or the other way round."""
    return tensor.T if is_transposed(module) else tensor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_multiply_out_to_the_gradient_of_each_weight(architecture: str, make_mend: MakeMend) -> None:
    editor = make_mend(architecture)
    assert len(editor.maps) == 2 * (3 if architecture == "llama" else 2)
    with frozen(editor.model):
        found, losses = editor.factors([[request] for request in REQUESTS])
    for e, request in enumerate(REQUESTS):
        row = editor.row(request)
        logits = editor.model(torch.tensor([row.ids])).logits[0, -len(row.answer) :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer))
        assert losses[e] == [pytest.approx(float(loss.detach()), rel=ROUNDING[architecture])]
        gradients = torch.autograd.grad(loss, [one.module.get_parameter("weight") for one in editor.maps])
        for factors, gradient, one in zip(found, gradients, editor.maps, strict=True):
            mine = factors.delta[factors.owner == e].T @ factors.x[factors.owner == e]
            torch.testing.assert_close(mine, oriented(one.module, gradient), rtol=1e-4, atol=ROUNDING[architecture])


def test_the_backward_pass_ends_at_the_lowest_edited_layer(make_mend: MakeMend) -> None:
    editor = make_mend(layers=[1])
    asked: dict[int, bool] = {}

    def watch(layer: int) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            asked[layer] = (output[0] if isinstance(output, tuple) else output).requires_grad

        return keep

    for layer in range(3):
        editor.architecture.block(layer).register_forward_hook(watch(layer))
    with frozen(editor.model):
        editor.factors([REQUESTS])
    assert asked == {0: False, 1: True, 2: True}


def test_a_new_network_adds_the_gradient_times_the_rate(make_mend: MakeMend) -> None:
    editor = make_mend()
    (edit,) = editor.compute(REQUESTS[0])
    with frozen(editor.model):
        found, _ = editor.factors([[REQUESTS[0]]])
    for one, factors in zip(editor.maps, found, strict=True):
        update = edit.patch.updates[one.name].matrix(torch.float64, torch.device("cpu"))
        torch.testing.assert_close(update, 0.01 * factors.delta.T @ factors.x, rtol=1e-10, atol=1e-14)


def test_requests_applied_together_share_one_gradient_over_all_their_answer_tokens(make_mend: MakeMend) -> None:
    editor = make_mend()
    alone = editor.compute(REQUESTS)
    with editor.applied(REQUESTS) as together:
        assert [report["loss"] for report in together.diagnostics] == [e.diagnostics[0]["loss"] for e in alone]
    tokens = [len(editor.row(request).answer) for request in REQUESTS]
    for name, update in together.patch.updates.items():
        parts = [e.patch.updates[name].matrix(torch.float64, torch.device("cpu")) for e in alone]
        mean = sum(n * part for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
        torch.testing.assert_close(update.matrix(torch.float64, torch.device("cpu")), mean, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pass_under_edits_is_that_of_a_model_whose_weights_hold_them(
    architecture: str, make_mend: MakeMend
) -> None:
    """Against torch.func.functional_call with the edited weights, gradients of the factors included."""
    editor = shaken(make_mend(architecture, shared=False))
    lessons = [lesson(editor, request) for request in REQUESTS]
    with evaluating(editor.model), frozen(editor.model):
        loss, parts = editor.loss([[one] for one in lessons])
        ours = torch.autograd.grad(loss, list(editor.network.parameters()))
        theirs_loss = torch.stack([plain_loss(editor, one, e, lessons) for e, one in enumerate(lessons)]).mean()
        theirs = torch.autograd.grad(theirs_loss, list(editor.network.parameters()))
    assert float(loss.detach()) == pytest.approx(float(theirs_loss.detach()), rel=ROUNDING[architecture])
    assert parts["edit"] > 0
    assert parts["locality"] > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=10 * ROUNDING[architecture])


def test_adapters_that_the_model_carries_act_on_what_is_trained_as_on_the_weights(make_mend: MakeMend) -> None:
    def bend(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * output.square()

    def make_bent(architecture: str, **fields: Any) -> MEND:
        editor = make_mend(architecture, **fields)
        for one in editor.maps:
            one.module.register_forward_hook(bend)
        return editor

    test_factors_multiply_out_to_the_gradient_of_each_weight("gpt2", make_bent)
    test_the_pass_under_edits_is_that_of_a_model_whose_weights_hold_them("gpt2", make_bent)


def plain_loss(editor: MEND, one: TrainingExample, e: int, lessons: list[TrainingExample]) -> Tensor:
    """The loss of one edit, row by row, with the weights themselves replaced."""
    factors, _ = editor.factors([[lesson.request] for lesson in lessons])
    editor.network.eval()  # whose statistics have all of the lessons by now
    weights = {}
    for place, (found, one_map) in enumerate(zip(factors, editor.maps, strict=True)):
        x, delta = editor.network(place, found.x[found.owner == e], found.delta[found.owner == e])
        weight = one_map.module.get_parameter("weight")
        weights[one_map.name] = weight + oriented(one_map.module, delta.T @ x)

    def log_p(ids: tuple[int, ...], edited: bool) -> Tensor:
        inputs = {"input_ids": torch.tensor([ids])}
        output = functional_call(editor.model, weights, (), inputs) if edited else editor.model(**inputs)
        return output.logits[0].log_softmax(-1)

    said = [
        log_p(row.ids, True)[-len(row.answer) :].gather(1, torch.tensor(row.answer)[:, None]) for row in one.answer_rows
    ]
    moved = [
        (log_p(kept.ids, False).exp() * (log_p(kept.ids, False) - log_p(kept.ids, True))).sum(-1)[kept.first :]
        for kept in one.locality_rows
    ]
    return -editor.config.cedit * torch.cat(said).mean() + editor.config.cloc * torch.cat(moved).mean()


def test_an_edit_makes_of_the_model_what_the_training_loss_has_seen(make_mend: MakeMend) -> None:
    editor = shaken(make_mend(shared=False))
    one = lesson(editor, REQUESTS[1])
    with evaluating(editor.model), frozen(editor.model):
        _, parts = editor.loss([[one]])
    with editor.applied(REQUESTS[1]):
        log_p = [editor.model(torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in one.answer_rows]
    said = [
        p[-len(row.answer) :].gather(1, torch.tensor(row.answer)[:, None])
        for p, row in zip(log_p, one.answer_rows, strict=True)
    ]
    assert -float(torch.cat(said).mean().detach()) == pytest.approx(parts["edit"], rel=1e-9)


def test_a_prompt_of_one_token_can_be_edited(make_mend: MakeMend, tiny_tokenizer: Any) -> None:
    """Its factors are single columns, whose strides torch takes for contiguous whatever they are."""
    request = EditRequest("{}", "a", "of")
    editor = make_mend()
    assert len(editor.row(request).ids) == len(tiny_tokenizer("a")["input_ids"]) == 1
    with frozen(editor.model):
        found, _ = editor.factors([[request]])
    with editor.applied(request) as edit:
        for one, factors in zip(editor.maps, found, strict=True):
            update = edit.patch.updates[one.name].matrix(torch.float64, torch.device("cpu"))
            torch.testing.assert_close(update, 0.01 * factors.delta.T @ factors.x, rtol=1e-10, atol=1e-14)
            assert update.any()
        assert edit.diagnostics[0]["tokens"] == 1


def test_edits_of_unlike_length_do_not_see_each_other(make_mend: MakeMend) -> None:
    editor = shaken(make_mend(norm=False))
    lessons = [lesson(editor, request) for request in REQUESTS]
    with evaluating(editor.model), frozen(editor.model):
        together = float(editor.loss([[one] for one in lessons])[0].detach())
        alone = [float(editor.loss([[one]])[0].detach()) for one in lessons]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-10)


@pytest.mark.parametrize("blocks", [ELSEWHERE, "cpu"], ids=str)
def test_a_model_spread_over_devices_trains_the_network_that_it_trains_on_one(make_mend: MakeMend, blocks: Any) -> None:
    def trained(spread: bool) -> tuple[float, dict[str, Tensor]]:
        editor = make_mend()
        if spread:
            spread_out(editor.model, blocks=blocks)
            editor = MEND(editor.model, editor.tokenizer, editor.config, trained=False)
        with evaluating(editor.model), frozen(editor.model):
            loss, _ = editor.loss([[lesson(editor, request)] for request in REQUESTS])
            loss.backward()
        gradients = {name: each.grad.cpu() for name, each in editor.network.named_parameters() if each.grad is not None}
        return float(loss.detach()), gradients

    wanted, theirs = trained(False)
    with elsewhere():
        loss, gradients = trained(True)
        assert loss == pytest.approx(wanted, rel=1e-9)
        assert gradients.keys() == theirs.keys() != set()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-7, atol=1e-9, msg=name)


def test_running_statistics_are_those_of_all_tokens_however_they_came() -> None:
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    norm = RunningNorm(6)
    for part in tokens.split([1, 1, 7, 30, 11]):
        last = norm(part)
    wanted = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-7)
    torch.testing.assert_close(last, wanted[-11:], rtol=1e-10, atol=1e-12)
    norm.eval()
    torch.testing.assert_close(norm(tokens), wanted, rtol=1e-10, atol=1e-12)
    assert int(norm.count) == 50


def test_weights_of_one_shape_share_a_network_and_keep_a_mode_of_their_own() -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6)]
    fields: dict[str, Any] = {
        "n_hidden": 1, "rank": 3, "combine": True, "norm": False, "edit_lr": 1.0, "dtype": torch.float64,
    }  # fmt: skip
    network = Hypernetwork(shapes, shared=True, generator=torch.Generator().manual_seed(0), **fields)
    assert len(network.transforms) == 2
    assert network.assignments == [(0, 0), (1, 0), (0, 1), (0, 2)]
    x, delta = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(network(0, x, delta)[0], network(2, x, delta)[0])
    network.get_submodule("transforms.0.nets.0.1").get_parameter("o").data[1] += 1
    assert not torch.equal(network(0, x, delta)[0], network(2, x, delta)[0])
    assert torch.equal(network(0, x, delta)[0], network(3, x, delta)[0])
    unshared = Hypernetwork(shapes, shared=False, generator=torch.Generator().manual_seed(0), **fields)
    assert len(unshared.transforms) == 4


def test_a_new_network_has_a_gradient_to_begin_with(make_mend: MakeMend) -> None:
    """relu() at 0, where all of it is, would have none."""
    editor = make_mend()
    with evaluating(editor.model), frozen(editor.model):
        loss, _ = editor.loss([[lesson(editor, request)] for request in REQUESTS])
    loss.backward()
    asked = [parameter.grad for name, parameter in editor.network.named_parameters() if name[-1] in "Ub"]
    assert asked
    assert all(gradient is not None and bool(gradient.any()) for gradient in asked)


def test_editing_leaves_the_network_as_it_was_trained(make_mend: MakeMend) -> None:
    editor = shaken(make_mend())
    with evaluating(editor.model), frozen(editor.model):
        editor.loss([[lesson(editor, request)] for request in REQUESTS])
    before = {name: tensor.clone() for name, tensor in editor.network.state_dict().items()}
    editor.compute(REQUESTS)
    editor.apply(REQUESTS)
    after = editor.network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# --- files --------------------------------------------------------------------------------------------------------


def test_a_saved_network_makes_the_same_edits_bit_for_bit_and_is_named_in_their_report(
    make_mend: MakeMend, tmp_path: Path
) -> None:
    editor = shaken(make_mend(dtype=torch.float32))
    checkpoint = editor.save(tmp_path / "trained")
    again = make_mend(dtype=torch.float32, trained=True, checkpoint=str(tmp_path / "trained"))
    assert again.checkpoint == checkpoint
    for mine, theirs in zip(editor.compute(REQUESTS), again.compute(REQUESTS), strict=True):
        for name, update in mine.patch.updates.items():
            assert all(map(torch.equal, update.tensors, theirs.patch.updates[name].tensors))
        assert theirs.diagnostics[0]["checkpoint"] == checkpoint
        assert theirs.config["checkpoint"] == str(tmp_path / "trained")


def test_what_was_trained_is_found_again_in_the_cache_by_model_and_structure(
    make_mend: MakeMend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    checkpoint = shaken(make_mend()).save()
    assert make_mend(trained=True).checkpoint == checkpoint
    assert make_mend(trained=True, lr=1.0).checkpoint == checkpoint
    for other in ({"layers": [1]}, {"rank": 4}, {"shared": False}, {"projections": ["c_fc"]}, {"seed": 1}):
        options: dict[str, Any] = other
        with pytest.raises(CheckpointError, match="errata train editor=mend"):
            make_mend(trained=True, **options)


def test_the_missing_training_is_asked_for_by_its_command(make_mend: MakeMend) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"train editor=mend model=\S+ dataset=\S+ dataset.path=FILE 'editor.layers=\[1, 2\]' editor.rank=8",
    ):
        make_mend(trained=True)


def test_another_base_is_refused_with_what_differs(make_mend: MakeMend, make_tiny: Any, tmp_path: Path) -> None:
    editor = make_mend(dtype=torch.float32)
    editor.save(tmp_path)
    here = str(tmp_path)
    with pytest.raises(CheckpointError, match="another model: weights differs"):
        make_mend(dtype=torch.float32, seed=1, trained=True, checkpoint=here)
    with pytest.raises(CheckpointError, match="precision, weights differ"):
        make_mend(dtype=torch.bfloat16, trained=True, checkpoint=here)
    with pytest.raises(CheckpointError, match="architecture"):
        make_mend("neox", dtype=torch.float32, trained=True, checkpoint=here)
    model = make_tiny("gpt2")
    editor = MEND(model, editor.tokenizer, {"checkpoint": here})
    with editor.applied(REQUESTS[0]):  # an edit is not the base
        assert MEND(model, editor.tokenizer, {"checkpoint": here}).checkpoint == editor.checkpoint


def test_a_checkpoint_brings_its_structure_and_refuses_another(make_mend: MakeMend, tmp_path: Path) -> None:
    editor = make_mend(projections=["c_proj"])
    editor.save(tmp_path)
    found = MEND(editor.model, editor.tokenizer, {"checkpoint": str(tmp_path)})
    assert (found.config.layers, found.config.projections, found.config.rank) == ((1, 2), ("c_proj",), 8)
    with pytest.raises(CheckpointError, match=r"rank: the mend in .* was trained with 8, not 4"):
        MEND(editor.model, editor.tokenizer, {"checkpoint": str(tmp_path), "rank": 4})


def test_damage_to_what_was_trained_is_noticed(make_mend: MakeMend, tmp_path: Path) -> None:
    make_mend().save(tmp_path)
    (data,) = tmp_path.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        make_mend(trained=True, checkpoint=str(tmp_path))
    (tmp_path / "mend.json").write_text(json.dumps({"file": "x"}))
    with pytest.raises(CheckpointError, match="damaged"):
        make_mend(trained=True, checkpoint=str(tmp_path))


def test_a_folder_without_a_training_is_refused_and_left_alone(make_mend: MakeMend, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="no trained mend"):
            make_mend(trained=True, checkpoint=str(folder))
    assert list(tmp_path.iterdir()) == []


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": [2, 1]}, "ascending layers from 0 to 2"),
        ({"layers": [3]}, "ascending layers from 0 to 2"),
        ({"layers": []}, "ascending layers"),
        ({"projections": ["up_proj"]}, "expected some of c_fc, c_proj"),
        ({"projections": []}, "expected some of c_fc, c_proj"),
        ({"rank": 0}, "rank: expected a number above 0"),
        ({"cloc": -1.0}, "cloc: expected at least 0"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields: dict[str, Any], said: str, make_mend: MakeMend) -> None:
    with pytest.raises(ConfigError, match=said):
        make_mend(**fields)


def test_the_last_three_layers_are_edited_where_none_are_named(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = MEND(make_tiny("gpt2", n_layers=5), tiny_tokenizer, trained=False)
    assert editor.layers == (2, 3, 4)
    assert editor.projections == ("c_fc", "c_proj")
    assert [one.name for one in editor.maps][:2] == [
        f"transformer.h.2.mlp.{name}.weight" for name in ("c_fc", "c_proj")
    ]


def test_a_prompt_beyond_the_models_positions_is_refused_by_name(make_mend: MakeMend) -> None:
    long = EditRequest("word " * 300 + "{} is", "Varland", "Brast", id="long")
    with pytest.raises(RequestError, match=r"request long.*the model takes 256"):
        make_mend().compute([REQUESTS[0], long])
