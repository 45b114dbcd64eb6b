"""MEMIT, EMMET and AlphaEdit: batches after batches, and a memory of earlier keys that goes where the edits go."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from second_device import ELSEWHERE, elsewhere
from torch import Tensor

from errata import editors
from errata.editors.core.errors import ConfigError, RequestError, StatisticsError
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import last_keys
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.null_space import Projector
from errata.editors.grace import GRACE

NAMES = ("Varland", "Oslen", "Brast", "Quelm", "Tarvos", "Ilda Moren", "Space Needle", "Beats Music")
REQUESTS = [EditRequest("The capital of {} is", name, "Seattle") for name in NAMES]
FIELDS: dict[str, Any] = {
    "layers": (0, 1, 2),
    "v_num_grad_steps": 4,
    "context_templates": ("{}", "It is well known. {}", "Nobody doubts it. {}"),
}


def second_moment(width: int) -> Tensor:
    X = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return X.T @ X / len(X) * 0.1


def make(name: str, model: Any, tokenizer: Any, **fields: Any) -> Any:
    kind: Any = editors.get(name)
    own = {"memit": {"mom2_update_weight": 5.0}, "alphaedit": {"nullspace_energy": 0.5, "L2": 0.1}}.get(name, {})
    config = kind.Config(**{**FIELDS, **own, **fields})
    return kind(model, tokenizer, config, moments=dict.fromkeys(config.layers, second_moment(128)))


@pytest.fixture
def model(make_tiny: Any) -> Any:
    return make_tiny("gpt2", dtype=torch.float64)


def weights(edit: Any) -> list[Tensor]:
    return [update.matrix(torch.float64, torch.device("cpu")) for update in edit.patch.updates.values()]


@pytest.mark.parametrize("carries", [False, True], ids=["", "carrying-a-codebook"])
@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_each_layer_s_keys_are_those_of_the_model_with_the_layers_below_edited(
    name: str, carries: bool, model: Any, tiny_tokenizer: Any
) -> None:
    """The walk overlays updates; here they are really written, and every key is read in a whole pass. A codebook that
    the model carries gives its value whatever the weights beneath it give; its key is met where the fact is."""
    editor = make(name, model, tiny_tokenizer)
    if carries:
        grace = GRACE(model, tiny_tokenizer, {"layers": [0], "module": "down", "n_iter": 2, "eps": 1e-3})
        grace.apply(replace(REQUESTS[0], prompt="The capital of {}", target="Brast"))
    edit = editor.compute(REQUESTS[:1])[0]
    found = [editor.locate(REQUESTS[0], prefix) for prefix in editor.prefixes]
    rows = [place.ids[: place.last + 1] for place in found]
    for place, layer in enumerate(editor.layers):
        update = edit.patch.updates[editor.architecture.weight_name(layer)]
        assert isinstance(update, LowRank)
        read = last_keys(editor.architecture, rows, [layer], pad=0)[layer].double()
        K = ((read[0] + read[1:].mean(0)) / 2)[:, None]
        torch.testing.assert_close(editor.adjoint(layer, K), update.V.T, rtol=1e-8, atol=1e-12)
        if place < len(editor.layers) - 1:
            weight = editor.architecture.weight(layer)
            weight += update.matrix(torch.float64, weight.device)


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_each_layer_takes_an_equal_share_of_what_is_still_missing(name: str, model: Any, tiny_tokenizer: Any) -> None:
    """R = (z - h) / (layers left): with h read in a whole pass of the model that carries the layers below."""
    editor = make(name, model, tiny_tokenizer)
    assert len(editor.layers) > 1
    (target,) = editor.targets(REQUESTS[:1], editor.layers[-1], "block")
    z = target.initial + target.delta
    edit = editor.compute(REQUESTS[:1])[0]
    place = editor.locate(REQUESTS[0], editor.prefixes[0])
    block = editor.architecture.block(editor.layers[-1])
    for i, layer in enumerate(editor.layers):
        below = [editor.architecture.weight_name(lower) for lower in editor.layers[:i]]
        editor.ledger.append("below", Patch({weight: edit.patch.updates[weight] for weight in below}))
        read: list[Tensor] = []
        handle = block.register_forward_hook(lambda _m, _a, out, read=read: read.append(first_of(out)[0, place.last]))
        model(torch.tensor([place.ids]))
        handle.remove()
        editor.ledger.clear()
        update = edit.patch.updates[editor.architecture.weight_name(layer)]
        assert isinstance(update, LowRank)
        h = read[0].detach()
        torch.testing.assert_close(update.U[:, 0], (z - h) / (len(editor.layers) - i), rtol=1e-9, atol=1e-11)


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_an_emptied_ledger_gives_the_very_first_edit_again(name: str, model: Any, tiny_tokenizer: Any) -> None:
    editor = make(name, model, tiny_tokenizer)
    first = editor.apply(REQUESTS[:2])
    editor.apply(REQUESTS[2:4])
    editor.rollback()
    again = editor.apply(REQUESTS[:2])
    for one, other in zip(weights(first), weights(again), strict=True):
        assert torch.equal(one, other)


def test_alphaedit_remembers_the_edits_that_the_model_carries_and_no_others(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", model, tiny_tokenizer)
    alone = weights(editor.compute(REQUESTS[4])[0])
    first, second = editor.apply(REQUESTS[:2]), editor.apply(REQUESTS[2:4])
    with_both = weights(editor.compute(REQUESTS[4])[0])
    first.undo()
    with_second = weights(editor.compute(REQUESTS[4])[0])
    second.undo()
    assert not torch.equal(with_both[0], with_second[0])
    for ours, wanted in zip(weights(editor.compute(REQUESTS[4])[0]), alone, strict=True):
        assert torch.equal(ours, wanted)
    first.apply()
    second.apply()
    for ours, wanted in zip(weights(editor.compute(REQUESTS[4])[0]), with_both, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_alphaedit_finds_its_past_keys_on_the_device_of_its_projectors(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", model, tiny_tokenizer)
    editor.apply(REQUESTS[:2])
    assert [keys.device.type for _, keys in editor._past_keys(1)] == ["cpu"]
    editor._projectors[1] = editor.projector(1).to(torch.device("meta"), torch.float64)
    assert [keys.device.type for _, keys in editor._past_keys(1)] == ["meta"]


def test_a_given_projector_has_the_width_of_its_own_layer(make_tiny: Any, tiny_tokenizer: Any) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    model = make_tiny("gpt2")
    model.transformer.h[1].mlp = GPT2MLP(48, model.config).eval()
    editor = editors.AlphaEdit(model, tiny_tokenizer, {"layers": [1]}, projectors={1: torch.eye(48)})
    assert editor.projector(1).dimensions == 48
    with pytest.raises(StatisticsError, match=r"expected a finite projector \(48, 48\), got \(128, 128\)"):
        editors.AlphaEdit(model, tiny_tokenizer, {"layers": [1]}, projectors={1: torch.eye(128)})


def test_emmet_says_at_once_that_an_explicit_inverse_keeps_no_past_keys() -> None:
    with pytest.raises(ConfigError, match="mom2_dtype=float64"):
        editors.EMMET.Config(past_keys=True, mom2_dtype="float32")
    assert editors.EMMET.Config(mom2_dtype="float32").past_keys is None


@pytest.mark.parametrize("exact", [True, False])
def test_alphaedit_edits_a_layer_on_another_device_than_its_projector(
    make_tiny: Any, tiny_tokenizer: Any, exact: bool
) -> None:
    """As where a model is spread over devices: projectors lie with the embeddings."""
    found = []
    for apart in (False, True):
        editor = make("alphaedit", make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer)
        with elsewhere():
            for layer in editor.layers:
                P = editor.projector(layer)
                P = P if exact else Projector.from_matrix(P.matrix() + 0.01)
                editor._projectors[layer], editor._exact[layer] = P.to(ELSEWHERE, P.dtype) if apart else P, P.is_exact
                assert P.is_exact == exact
            editor.apply(REQUESTS[:2])  # whose keys the next one finds
            (edit,) = editor.compute(REQUESTS[4])
        found.append(weights(edit))
        assert len(found[-1]) == 3
    for ours, wanted in zip(*found, strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_alphaedit_goes_on_upon_a_gpu_from_edits_that_were_read_from_files(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", model.to("cuda"), tiny_tokenizer)
    editor.apply(REQUESTS[:2])
    (entry,) = editor.ledger.entries
    wanted = editor.compute(REQUESTS[4])[0]
    editor.rollback()
    editor.ledger.extend([replace(entry, state={name: keys.cpu() for name, keys in entry.state.items()})])
    for ours, theirs in zip(weights(editor.compute(REQUESTS[4])[0]), weights(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_alphaedit_solves_with_the_past_keys_as_the_paper_s_system_does(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", model, tiny_tokenizer)
    past = [editor.apply(REQUESTS[:3]), editor.apply(REQUESTS[3:5])]
    edit = editor.compute(REQUESTS[5])[0]
    for layer in editor.layers:
        P, K = editor.projector(layer).matrix(), edit.state[f"keys.{layer}"]
        K_p = torch.cat([earlier.state[f"keys.{layer}"] for earlier in past], dim=1)
        system = P @ (K @ K.T + K_p @ K_p.T) + 0.1 * torch.eye(len(P), dtype=P.dtype)
        update = edit.patch.updates[editor.architecture.weight_name(layer)]
        truth = torch.linalg.solve(system, P @ K)
        torch.testing.assert_close(update.V.T, truth, rtol=1e-8, atol=1e-11)


def test_two_editors_of_one_model_share_the_past_and_two_models_never_meet(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model, other = (make_tiny("gpt2", dtype=torch.float64) for _ in range(2))
    one, two, far = (make("alphaedit", m, tiny_tokenizer) for m in (model, model, other))
    untouched = weights(far.compute(REQUESTS[4])[0])
    one.apply(REQUESTS[:3])
    assert torch.equal(weights(far.compute(REQUESTS[4])[0])[0], untouched[0])
    for a, b in zip(weights(one.compute(REQUESTS[4])[0]), weights(two.compute(REQUESTS[4])[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_foreign_projector_that_is_none_is_solved_directly_and_reported(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exact = make("alphaedit", model, tiny_tokenizer)
    projectors = {layer: exact.projector(layer).matrix() for layer in exact.layers}
    kind, config = type(exact), exact.config
    given = kind(model, tiny_tokenizer, config, projectors=projectors)
    for a, b in zip(weights(given.compute(REQUESTS[0])[0]), weights(exact.compute(REQUESTS[0])[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert "is none" not in caplog.text
    scaled = kind(model, tiny_tokenizer, config, projectors={layer: 1.1 * P for layer, P in projectors.items()})
    assert "layer 0: the matrix given is no projector" in caplog.text
    edit = scaled.compute(REQUESTS[0])[0]
    P, K = 1.1 * projectors[0], edit.state["keys.0"]
    truth = torch.linalg.solve(P @ K @ K.T + 0.1 * torch.eye(len(P), dtype=P.dtype), P @ K)
    update = edit.patch.updates[scaled.architecture.weight_name(0)]
    torch.testing.assert_close(update.tensors[1].T, truth, rtol=1e-8, atol=1e-11)
    with pytest.raises(StatisticsError, match=r"layer 1: expected a finite projector \(128, 128\)"):
        kind(model, tiny_tokenizer, config, projectors={1: torch.eye(3)})


def test_a_rank_deficient_moment_is_reported_once_and_solved_by_the_sum_where_that_has_an_inverse(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    editor = make("memit", model, tiny_tokenizer, layers=(1,))
    thin = second_moment(128)[:, :100]
    editor._moments[1] = thin @ thin.T
    for _ in range(2):
        with pytest.raises(StatisticsError, match="plus the keys of the batch"):
            editor.apply(REQUESTS)
    assert caplog.text.count("solving with the sum") == 1
    assert len(editor.ledger) == 0


def test_emmet_meets_every_value_of_the_batch_exactly_where_nothing_is_given_up(
    model: Any, tiny_tokenizer: Any
) -> None:
    editor = make("emmet", model, tiny_tokenizer, layers=(1,), emmet_lambda=0.0)
    edit = editor.apply(REQUESTS[:4])
    (update,) = edit.patch.updates.values()
    assert isinstance(update, LowRank)
    edit.undo()
    keys = editor.keys(REQUESTS[:4], [1])[1].double()
    K = ((keys[:, 0] + keys[:, 1:].mean(1)) / 2).T
    torch.testing.assert_close(update.V @ K, torch.eye(4, dtype=torch.float64), rtol=1e-7, atol=1e-8)


def test_a_batch_that_contradicts_itself_is_refused_with_both_named(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("memit", model, tiny_tokenizer)
    one = EditRequest("The capital of {} is", "Varland", "Brast", id="one")
    two = EditRequest("The capital of {} is", "Varland", "Quelm", id="two")
    with pytest.raises(RequestError, match=r"request two.*contradicts request one.*'Brast' and 'Quelm'"):
        editor.apply([one, two])


def test_memory_of_a_sequence_grows_by_the_factors_alone(model: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", model, tiny_tokenizer, layers=(1,))
    sizes = []
    for request in REQUESTS:
        editor.apply(request)
        sizes.append(editor.ledger.nbytes())
    growth = [b - a for a, b in pairwise(sizes)]
    assert set(growth) == {(32 + 2 * 128) * 8}, "an edit adds U (32, 1), V (1, 128) and its key (128, 1) in float64"
