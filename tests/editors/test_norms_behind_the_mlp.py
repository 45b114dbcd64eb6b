"""What is written arrives, in every form of block: whatever stands between the MLP and the residual stream.

The forms are random models of transformers: the MLP's output is added as it is (GPT-2, Llama; Cohere, beside the
attention), times a factor (Granite), behind a norm (Gemma 2 and 3, OLMo 2), or the sum is normed (OPT-350m).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_config
from torch import Tensor

from errata import editors
from errata.editors.core.doubts import doubts
from errata.editors.core.errors import ConfigError, DoubtfulEditWarning, LedgerError
from errata.editors.core.forward.norm_behind import norm_behind
from errata.editors.core.forward.residual_gain import residual_gains
from errata.editors.core.forward.row_patches import RowPatches
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.loading import load_edit
from errata.editors.core.model.activations import run_base, run_until_captured
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.request import EditRequest

REQUEST = EditRequest("The capital of {} is", "Varland", "Seattle", id="one")
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "cohere": {},
    "granite": {"residual_multiplier": 0.22},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "opt": {"do_layer_norm_before": False},
}
NORMED = {"gemma2", "gemma3_text", "olmo2", "opt"}
# One context, so that the key that is solved at is the key of the prompt; as good as no other keys to preserve.
EXACT: dict[str, dict[str, Any]] = {
    "memit": {"mom2_update_weight": 1e-10},
    "emmet": {},
    "alphaedit": {"nullspace_energy": 0.5, "L2": 1e-10},
}


@pytest.fixture(scope="module")
def form(tiny_tokenizer: Any) -> Any:
    """`form(name)`: a random model of that form in float64, made once."""
    import transformers as hf

    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            config = tiny_config(name, len(tiny_tokenizer))
            for field, value in FORMS[name].items():
                setattr(config, field, value)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                made[name] = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
        return made[name]

    return make


def make(method: str, model: Any, tokenizer: Any, **fields: Any) -> Any:
    width = describe(model).d_mlp
    X = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = dict.fromkeys(range(4), X.T @ X / len(X) * 0.1)
    settings = {"layers": [1], "v_num_grad_steps": 4, "v_lr": 0.1, "context_templates": ["{}"], **EXACT.get(method, {})}
    kind: Any = editors.get(method)
    return kind(model, tokenizer, {**settings, **fields}, moments=moments)


@pytest.mark.parametrize("name", FORMS)
def test_a_block_is_seen_to_be_plain_to_have_a_factor_or_to_have_a_norm(name: str, form: Any) -> None:
    gains = residual_gains(describe(form(name)), [0, 2])
    expected = None if name in NORMED else FORMS[name].get("residual_multiplier", 1.0)
    assert list(gains) == [0, 2]
    for gain in gains.values():
        assert gain is None if expected is None else gain == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "granite", "gemma2", "olmo2"])
def test_the_form_of_a_block_is_seen_in_low_precision_too(name: str, dtype: torch.dtype, form: Any) -> None:
    (gain,) = residual_gains(describe(copy.deepcopy(form(name)).to(dtype)), [1]).values()
    if name in NORMED:
        assert gain is None
    else:
        assert gain == pytest.approx(FORMS[name].get("residual_multiplier", 1.0), rel=0.02)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", FORMS)
def test_the_value_that_was_searched_for_is_what_the_edited_model_computes(
    name: str, method: str, form: Any, tiny_tokenizer: Any
) -> None:
    editor = make(method, form(name), tiny_tokenizer)
    site = "mlp" if name in NORMED else "block"
    assert reached(editor, site) < 1e-5  # norms compute in float32
    (target,) = editor.targets([REQUEST], 1, site)
    assert target.losses[-1]["nll"] < target.losses[0]["nll"]


@pytest.mark.parametrize("name", ["gpt2", "cohere", "granite"])
def test_several_layers_reach_one_hidden_state_where_no_norm_stands_between(
    name: str, form: Any, tiny_tokenizer: Any
) -> None:
    assert reached(make("memit", form(name), tiny_tokenizer, layers=[0, 1, 2]), "block") < 1e-5


def reached(editor: Any, site: Any) -> float:
    """Return how far the edited model is from the value, as a share of the way, once the report says the same."""
    (target,) = editor.targets([REQUEST], editor.layers[-1], site)
    with editor.applied(REQUEST) as edit:
        report = edit.diagnostics[0]
        left = float((target.initial + target.delta - read_at(editor, site)).norm() / target.delta.norm())
    assert report["written"] == pytest.approx(1 - left, abs=1e-5)
    assert len(report["distances"]) == len(editor.layers)
    assert report["distance_after"] < 1e-6 * report["distances"][0]
    return left


@pytest.mark.parametrize(("name", "several"), [("gpt2", True), ("granite", True), ("gemma3_text", False)])
def test_the_distance_after_the_last_layer_is_that_of_the_edited_model(
    name: str, several: bool, form: Any, tiny_tokenizer: Any
) -> None:
    """With a weight that leaves a part of the way, and contexts, so that the prompt's key is not the one solved at."""
    model = form(name)
    fields = {"layers": [0, 2] if several else [1], "mom2_update_weight": 20.0, "context_templates": ["{}", "So: {}"]}
    editor = make("memit", model, tiny_tokenizer, **fields)
    site = "block" if several else "mlp"
    (target,) = editor.targets([REQUEST], editor.layers[-1], site)
    with editor.applied(REQUEST) as edit:
        report = edit.diagnostics[0]
        reached = read_at(editor, site)
    left = float((target.initial + target.delta - reached).norm())
    assert report["distance_after"] == pytest.approx(left, rel=1e-6)
    assert report["written"] == pytest.approx(1 - left / report["distances"][0], rel=1e-6)
    assert 0 < report["written"] < 1


def read_at(editor: Any, site: str, layer: int | None = None, request: EditRequest = REQUEST) -> Tensor:
    """Return the value at the edited token of the bare prompt, of the last edited layer if none is given."""
    subject = editor.locate(request, "")
    layer, seen = editor.layers[-1] if layer is None else layer, []
    module = editor.architecture.block(layer) if site == "block" else editor.architecture.down(layer)

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).reshape(len(subject.ids), -1)[subject.last])

    with hooked(module.register_forward_hook(keep)), torch.no_grad():
        editor.model(input_ids=torch.tensor([subject.ids]))
    return seen[0]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", sorted(NORMED))
def test_several_layers_behind_norms_each_write_the_vector_that_was_searched_for_them_together(
    name: str, method: str, form: Any, tiny_tokenizer: Any
) -> None:
    """At a prompt's first token, where an update of the lower layer changes nothing else that the upper one reads."""
    first = EditRequest("{} has its capital in", "Varland", "Seattle", id="first")
    editor = make(method, form(name), tiny_tokenizer, layers=[0, 1], fact_token="subject_first")
    assert editor.locate(first, "").last == 0
    (target,) = editor.targets([first], (0, 1), "mlp")
    with hooked(*(adding(editor, layer, target.delta[layer]) for layer in (0, 1))):
        searched = torch.stack([read_at(editor, "mlp", layer, first) for layer in (0, 1)])
    with editor.applied(first) as edit:
        report = edit.diagnostics[0]
        written = torch.stack([read_at(editor, "mlp", layer, first) for layer in (0, 1)])
    assert float((written - searched).norm() / target.delta.norm()) < 1e-5  # norms compute in float32
    assert report["written"] == pytest.approx(1, abs=1e-6)
    assert report["distances"][0] > report["distances"][1] > 1e6 * report["distance_after"]


def adding(editor: Any, layer: int, vector: Tensor) -> Any:
    """Add a vector to what a layer's down projection gives at the first token; return the hook's handle."""

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[..., 0, :] += vector
        return moved

    return editor.architecture.down(layer).register_forward_hook(add)


def test_what_rules_choose_behind_norms(form: Any, tiny_tokenizer: Any) -> None:
    fields = {"layers": None, "mom2_update_weight": None}
    for name, share in (("granite", 1), ("gemma2", 10)):
        editor = make("memit", form(name), tiny_tokenizer, **fields)
        assert editor.layers == (0, 1)
        assert editor.settings.mom2_update_weight == editor.architecture.d_mlp / share


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_behind_a_norm_the_length_of_what_the_mlp_gives_means_nothing(
    method: str, form: Any, tiny_tokenizer: Any
) -> None:
    """An MLP that says the same a thousand times as loud is searched in the same steps, to the same losses."""
    quiet = form("olmo2")
    loud = copy.deepcopy(quiet)
    for layer in (0, 1):
        describe(loud).weight(layer).data *= 1000.0
    found = []
    for model in (quiet, loud):
        editor = make(method, model, tiny_tokenizer, layers=[1] if method == "rome" else [0, 1])
        found += editor.targets([REQUEST], 1 if method == "rome" else (0, 1), "mlp")
    low, high = found
    assert [step["loss"] for step in high.losses] == pytest.approx([step["loss"] for step in low.losses], rel=1e-3)
    torch.testing.assert_close(high.delta, 1000 * low.delta, rtol=1e-2, atol=1)


# --- doubts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({}, []),
        ({"final": {"nll": 0.6}, "distances": [3.0, 2.0], "distance_after": 1.0, "written": 0.67}, []),
        ({"final": {"nll": 0.8}}, ["search"]),
        ({"distances": [1.0, 1.2], "distance_after": 0.5, "written": 0.5}, []),
        ({"distances": [1.0], "distance_after": 1.5, "written": -0.5}, ["distance"]),
        ({"distances": [1.0], "distance_after": 0.94, "written": 0.06}, ["share"]),
        ({"update_ratio": 36.0}, ["size"]),
        ({"update_ratio": None}, []),
    ],
)
def test_signs_of_an_edit_that_will_not_hold(report: dict[str, Any], expected: list[str]) -> None:
    assert doubts(report) == expected


def test_each_sign_warns_once_and_says_what_to_do(form: Any, tiny_tokenizer: Any) -> None:
    two = EditRequest("The capital of {} is", "Oslen", "Seattle", id="two")
    editor = make("memit", form("gpt2"), tiny_tokenizer, mom2_update_weight=1e6)
    with pytest.warns(DoubtfulEditWarning) as caught, editor.applied([REQUEST, two]) as edit:
        assert [report["doubts"] for report in edit.diagnostics] == [["search", "share"]] * 2
    messages = [str(w.message) for w in caught if issubclass(w.category, DoubtfulEditWarning)]
    assert len(messages) == 2
    assert messages[0].startswith("2 of 2 requests, the first one: the search for the value ended with the answer")
    assert "less than a quarter of the way to the value (0 %); lower mom2_update_weight" in messages[1]


@pytest.mark.parametrize(("name", "site"), [("llama", "block"), ("gemma3_text", "mlp")])
def test_a_relative_search_is_one_whose_rate_is_in_units_of_the_value(
    name: str, site: Any, form: Any, tiny_tokenizer: Any
) -> None:
    rate = {"v_lr": 0.1, "v_weight_decay": 0.0}
    relative = make("memit", form(name), tiny_tokenizer, v_relative=True, **rate)
    (target,) = relative.targets([REQUEST], 1, site)
    unit = float(target.initial.square().mean().sqrt())
    absolute = make("memit", form(name), tiny_tokenizer, v_relative=False, **{**rate, "v_lr": 0.1 * unit})
    (same,) = absolute.targets([REQUEST], 1, site)
    torch.testing.assert_close(target.delta, same.delta, rtol=1e-3, atol=1e-6)  # norms compute in float32
    default = make("memit", form(name), tiny_tokenizer, v_lr=0.1, v_weight_decay=0.0)
    (other,) = default.targets([REQUEST], 1, site)
    assert torch.equal(other.delta, target.delta) == (name == "gemma3_text")


# --- GRACE: the value behind the norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_the_norm_between_mlp_and_hidden_state_is_found_where_there_is_one(name: str, form: Any) -> None:
    parts = describe(form(name))
    found = norm_behind(parts, 1)
    if name not in NORMED - {"opt"}:  # OPT norms the sum, which a long value dominates
        assert found is None
        return
    assert found is not None
    assert found[0] == f"{parts.blocks_path}.1.post_feedforward_layernorm"
    assert found[1] is parts.model.get_submodule(found[0])


def grace(model: Any, tokenizer: Any, **fields: Any) -> Any:
    return editors.GRACE(model, tokenizer, {"layers": [2], "n_iter": 40, "edit_lr": 0.3, **fields})


@torch.no_grad()
def states(model: Any, row: tuple[int, ...]) -> Tensor:
    return run_base(describe(model), right_padded([row], 0))[0]


@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")  # random models
@pytest.mark.parametrize("name", ["gemma3_text", "olmo2"])
def test_grace_moves_the_hidden_state_farther_than_the_norm_lets_a_value_before_it(
    name: str, form: Any, tiny_tokenizer: Any
) -> None:
    model = form(name)
    parts, editor = describe(model), grace(model, tiny_tokenizer)
    row = editor.row(REQUEST)
    norm, plain = norm_behind(parts, 2), states(model, row.ids)
    assert norm is not None
    assert (editor.reads, editor.module_name) == (parts.up(2).name.removesuffix(".weight"), norm[0])
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    (edit,) = editor.compute([REQUEST])
    held = grace(model, tiny_tokenizer, value_at="module").compute([REQUEST])[0]
    assert edit.diagnostics[0]["losses"][-1] < held.diagnostics[0]["losses"][-1]
    assert edit.diagnostics[0]["value_at"] == "norm"
    (value,) = edit.patch.adapters[norm[0]].tensors["values"]
    with editor.ledger.transaction():
        edit.apply()
        torch.testing.assert_close(output_of(norm[1], model, row.ids)[row.columns[0]], value)
        edited = states(model, row.ids)
        assert not torch.allclose(edited[row.columns[0]], plain[row.columns[0]])
        twin = copy.deepcopy(model)
        edit.undo()
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(states(model, row.ids), plain)
    # A copy of the model has hooks of its own, and its own undo.
    assert torch.equal(states(twin, row.ids), edited)
    Ledger.of(twin).clear()
    assert torch.equal(states(twin, row.ids), plain)
    # Rows of this edit beside those of another, and untouched ones.
    other = (*row.ids[:-1], 7)
    together = RowPatches(model, [edit.patch]).hidden_states([other, row.ids, row.ids], [0, 0, -1], 0)
    torch.testing.assert_close(together[1:], torch.stack([edited, plain]), rtol=1e-9, atol=1e-9)


def output_of(module: Any, model: Any, ids: tuple[int, ...]) -> Tensor:
    seen: list[Tensor] = []
    with hooked(module.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))):
        states(model, ids)
    return seen[0]


@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")  # random models
def test_earlier_values_behind_a_norm_count_in_later_edits_and_the_authors_way_stays(
    form: Any, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    model = form("gemma3_text")
    editor = grace(model, tiny_tokenizer, n_iter=3)
    published = grace(model, tiny_tokenizer, n_iter=3, as_published=True)
    assert (published.site, published.reads) == (published.module, None)
    with pytest.raises(ConfigError, match="value_at: expected a model with a norm"):
        grace(form("llama"), tiny_tokenizer, value_at="norm")
    again = EditRequest(REQUEST.prompt, REQUEST.subject, "Berlin", id="two")
    with editor.ledger.transaction():
        editor.apply(REQUEST)
        _, y = editor._read_rows([editor.row(REQUEST)])[0]
        second = editor.apply(again)
        assert second.diagnostics[0]["rule"] == "revise"
        changed = states(model, editor.row(again).ids)
        record = second.patch.adapters[editor.module_name]
        with pytest.raises(LedgerError, match="expected keys that are inputs of"):
            editor.ledger.append("other", Patch({}, {editor.module_name: replace(record, reads=editor.module_name)}))
        second.save(tmp_path / "second")
        second.undo()
        load_edit(tmp_path / "second", model)
        assert torch.equal(states(model, editor.row(again).ids), changed)
        editor.ledger.clear()
    # What values replace is read without the codebook.
    torch.testing.assert_close(editor._read_rows([editor.row(REQUEST)])[0][1], y)


# --- MEMOIR and WISE: the memory behind the norm --------------------------------------------------------------------


def memoir(model: Any, tokenizer: Any, **fields: Any) -> Any:
    settings = {"layers": [2], "n_iter": 6, "context_templates": ["{}"], **fields}
    return editors.MEMOIR(model, tokenizer, settings)


def test_memoirs_memory_is_added_behind_the_norm_where_there_is_one(
    form: Any, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    model = form("gemma3_text")
    editor = memoir(model, tiny_tokenizer)
    norm, row = norm_behind(describe(model), 2), editor.answered_row(REQUEST)
    assert norm is not None
    assert (editor.reads, editor.module_name) == (describe(model).map_at(2).name.removesuffix(".weight"), norm[0])
    given, plain, before = output_of(norm[1], model, row.ids), states(model, row.ids), editor.module.weight.clone()
    with editor.ledger.transaction():
        edit = editor.apply(REQUEST)
        losses = edit.diagnostics[0]["losses"]
        assert losses[-1] < losses[0]
        memory, edited = editor.memory(), states(model, row.ids)
        (x,) = run_until_captured(editor.architecture, right_padded([row.ids], 0), [editor.module])
        added = memory.change(x * memory._masks[0])
        torch.testing.assert_close(output_of(norm[1], model, row.ids), given + added[0])
        edit.save(tmp_path / "one")
        edit.undo()
        assert torch.equal(states(model, row.ids), plain)
        together = RowPatches(model, [edit.patch]).hidden_states([row.ids, row.ids], [0, -1], 0)
        torch.testing.assert_close(together, torch.stack([edited, plain]), rtol=1e-9, atol=1e-9)
        load_edit(tmp_path / "one", model)
        assert torch.equal(states(model, row.ids), edited)
        record = edit.patch.adapters[norm[0]]
        with pytest.raises(LedgerError, match="expected an edit that reads"):
            editor.ledger.append("other", Patch({}, {norm[0]: replace(record, reads=norm[0])}))
        editor.ledger.clear()
    assert torch.equal(editor.module.weight, before)
    held = memoir(model, tiny_tokenizer, added_at="module")
    assert (held.site, held.reads) == (held.module, None)
    with pytest.raises(ConfigError, match="added_at: expected a model with a norm"):
        memoir(form("llama"), tiny_tokenizer, added_at="norm")


def test_wises_copy_is_added_behind_the_norm_where_there_is_one(form: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    model = form("gemma3_text")
    settings = {"layers": [2], "n_iter": 4, "context_templates": ["{}"], "unrelated_text": "factbook"}
    editor: Any = editors.WISE(model, tiny_tokenizer, settings)
    norm, row = norm_behind(describe(model), 2), editor.answered_row(REQUEST)
    assert norm is not None
    assert (editor.reads, editor.module_name) == (describe(model).map_at(2).name.removesuffix(".weight"), norm[0])
    given, plain = output_of(norm[1], model, row.ids), states(model, row.ids)
    with editor.ledger.transaction():
        edit = editor.apply(REQUEST)
        assert edit.diagnostics[0]["losses"][-1] < edit.diagnostics[0]["losses"][0]
        edited = states(model, row.ids)
        (x,) = run_until_captured(editor.architecture, right_padded([row.ids], 0), [editor.module])
        added = x @ editor.memory().memories()[0].delta.to(x).T
        torch.testing.assert_close(output_of(norm[1], model, row.ids), given + added[0])
        edit.save(tmp_path / "one")
        edit.undo()
        assert torch.equal(states(model, row.ids), plain)
        load_edit(tmp_path / "one", model)
        assert torch.equal(states(model, row.ids), edited)
        record = edit.patch.adapters[norm[0]]
        with pytest.raises(LedgerError, match="expected an edit that reads"):
            editor.ledger.append("other", Patch({}, {norm[0]: replace(record, reads=norm[0])}))
        editor.ledger.clear()
    released = editors.WISE(model, tiny_tokenizer, {**settings, "as_released": True})
    assert (released.site, released.reads) == (released.module, None)
