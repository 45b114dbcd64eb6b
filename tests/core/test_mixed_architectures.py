"""Models whose blocks differ, whose head scales, whose weights are quantised, or that carry adapters of PEFT.

Each is read as it computes, edited where that is well defined, and else refused when the editor is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from errata.editors import FTM, GRACE, MEMIT, ROME, LoRA
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ArchitectureError
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.forward.whole_rows import blocks_chain, suffixes_agree
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model import own_forward, tokens
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest
from errata.evaluate import scoring
from errata.evaluate.probes import Probe

REQUEST = EditRequest("The capital of {} is", "Varland", "Oslen")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_MOMENTS = {"mom2_adjustment": False, "context_templates": ["{}"], "v_num_grad_steps": 12, "v_lr": 0.3}


def build(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def own_nll(model: Any, tokenizer: Any) -> float:
    """The nll of the answer by the model's own forward."""
    prompt = tokens.prompt_ids(tokenizer, REQUEST.text)
    answer = tokens.answer_ids(tokenizer, REQUEST.text, REQUEST.target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return float(-logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].mean())


def score(model: Any, tokenizer: Any) -> float:
    (found,) = scoring.score(model, tokenizer, [Probe("rewrite", REQUEST.text, REQUEST.target)])
    assert found.nll_target is not None
    return found.nll_target


def check_edit(editor: Editor) -> None:
    """An edit teaches the answer and is undone bit for bit."""
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    asked = own_nll(editor.model, editor.tokenizer)
    edit = editor.apply(REQUEST)
    assert own_nll(editor.model, editor.tokenizer) < asked
    assert score(editor.model, editor.tokenizer) == pytest.approx(own_nll(editor.model, editor.tokenizer), rel=1e-4)
    edit.undo()
    after = editor.model.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())


def moments(model: Any) -> dict[int, Tensor]:
    parts = describe(model)
    dense = [layer for layer, path in enumerate(parts.down_paths) if path is not None]
    return {layer: torch.eye(parts.map_at(layer).shape[1]) for layer in dense}


# --- a head that scales, and a mixer beside the MLP ---------------------------------------------------------------


@pytest.fixture
def falcon_h1(tiny_tokenizer: Any) -> Any:
    sizes: dict[str, Any] = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    }
    return build(hf.FalconH1Config(**SIZES, **sizes, vocab_size=len(tiny_tokenizer), lm_head_multiplier=0.04))


def test_a_head_that_scales_in_a_way_of_its_own_is_the_models_own(falcon_h1: Any, tiny_tokenizer: Any) -> None:
    assert score(falcon_h1, tiny_tokenizer) == pytest.approx(own_nll(falcon_h1, tiny_tokenizer), rel=1e-5)
    assert score(falcon_h1, tiny_tokenizer) == pytest.approx(5.76, abs=0.3)  # nearly even over the vocabulary


def test_the_down_projection_is_the_mlps_and_not_the_state_space_layers(falcon_h1: Any, tiny_tokenizer: Any) -> None:
    parts = describe(falcon_h1)
    assert set(parts.down_paths) == {"feed_forward.down_proj"}
    assert parts.up(0).name == "model.layers.0.feed_forward.up_proj.weight"
    assert list(parts.mlp_maps(1)) == ["gate_proj", "up_proj", "down_proj"]
    check_edit(FTM(falcon_h1, tiny_tokenizer, {"num_steps": 3, "lr": 1e-2}))


class _Louder(nn.Module):
    """A decoder whose output is changed on the way to the head, where no one looks for it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, **given: Any) -> Any:
        output = self.inner(**given)
        output.logits = output.logits * 0.5
        return output


def test_what_acts_behind_the_head_where_nothing_can_repeat_it_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model: Any = _Louder(make_tiny("llama"))
    with pytest.raises(ArchitectureError, match="gives other logits than its decoder LlamaModel and its head"):
        describe(model)
    with pytest.raises(ArchitectureError, match="gives other logits"):
        ROME(model, tiny_tokenizer, NO_MOMENTS)


def test_a_model_that_looks_ahead_is_refused(tiny_tokenizer: Any) -> None:
    sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    bert = build(hf.BertConfig(**sizes, vocab_size=len(tiny_tokenizer)))
    with pytest.raises(ArchitectureError, match=r"is no causal decoder.*set is_decoder=True"):
        describe(bert)
    bert = build(hf.BertConfig(**sizes, vocab_size=len(tiny_tokenizer), is_decoder=True))
    check_edit(ROME(bert, tiny_tokenizer, NO_MOMENTS))


def test_the_trial_runs_once_per_model_and_again_for_another_head(
    make_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = make_tiny("llama"), []
    agrees = own_forward._agrees

    def counted(*given: Any) -> bool:
        tried.append(1)
        return agrees(*given)

    monkeypatch.setattr(own_forward, "_agrees", counted)
    for _ in range(3):
        describe(model)
    assert len(tried) == 1
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    describe(model)
    assert len(tried) == 2


def test_the_trial_leaves_modes_hooks_and_random_numbers_alone(make_tiny: Any) -> None:
    model = make_tiny("gpt2").train()
    seen: list[int] = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    describe(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.transformer.h[0]._forward_hooks) == [handle.id]
    assert not model.state_dict().keys() & {own_forward.CHECKED}


def test_a_model_without_bytes_is_described_without_a_trial(make_tiny: Any) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(make_tiny("llama").config)
    assert describe(model).n_layers == 3


# --- mixtures of experts ------------------------------------------------------------------------------------------


@pytest.fixture
def glm4_moe(tiny_tokenizer: Any) -> Any:
    experts: dict[str, Any] = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
    }
    return build(
        hf.Glm4MoeConfig(**SIZES, **experts, topk_group=1, first_k_dense_replace=1, vocab_size=len(tiny_tokenizer))
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda m, t: ROME(m, t, {**NO_MOMENTS, "layers": [0]}),
        lambda m, t: FTM(m, t, {"layers": [0], "num_steps": 3, "lr": 1e-2}),
        lambda m, t: GRACE(m, t, {"layers": [0], "n_iter": 20, "edit_lr": 0.3}),
        lambda m, t: LoRA(m, t, {"num_steps": 5, "rank": 2}),
    ],
    ids=["rome", "ft_m", "grace", "lora"],
)
def test_what_needs_no_expert_works_in_a_mixture(
    glm4_moe: Any, tiny_tokenizer: Any, make: Callable[..., Editor]
) -> None:
    assert score(glm4_moe, tiny_tokenizer) == pytest.approx(own_nll(glm4_moe, tiny_tokenizer), rel=1e-5)
    check_edit(make(glm4_moe, tiny_tokenizer))


@pytest.mark.parametrize("method", [ROME, FTM, GRACE])
def test_an_edit_inside_experts_is_refused_and_names_the_block(
    glm4_moe: Any, tiny_tokenizer: Any, method: type[Editor]
) -> None:
    wanted = r"model\.layers\.2 holds a mixture of experts.*layers that can be edited: 0"
    with pytest.raises(ArchitectureError, match=wanted):
        method(glm4_moe, tiny_tokenizer, {"layers": [2]})


# --- several residual streams, linear attention -------------------------------------------------------------------


def test_gemma_3n_is_edited_on_whole_rows(tiny_tokenizer: Any) -> None:
    vocabulary = len(tiny_tokenizer)
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = hf.Gemma3nTextConfig(
        **sizes,
        vocab_size=vocabulary,
        intermediate_size=[48] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=vocabulary,
        laurel_rank=8,
    )
    model = build(config)
    assert score(model, tiny_tokenizer) == pytest.approx(own_nll(model, tiny_tokenizer), rel=1e-5)
    assert not blocks_chain(describe(model))
    check_edit(ROME(model, tiny_tokenizer, {**NO_MOMENTS, "layers": [0]}))
    check_edit(FTM(model, tiny_tokenizer, {"layers": [1], "num_steps": 3, "lr": 1e-2}))
    check_edit(GRACE(model, tiny_tokenizer, {"layers": [1], "n_iter": 20, "edit_lr": 0.3}))
    with pytest.raises(ArchitectureError, match=r"model\.layers of this model do not hand over one hidden state"):
        MEMIT(model, tiny_tokenizer, {"layers": [0, 1]})


@pytest.fixture
def qwen3_5(tiny_tokenizer: Any) -> Any:
    linear: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    return build(hf.Qwen3_5TextConfig(**SIZES, **linear, linear_value_head_dim=8, vocab_size=len(tiny_tokenizer)))


@pytest.mark.parametrize(
    "make",
    [
        lambda m, t: ROME(m, t, {**NO_MOMENTS, "layers": [1]}),
        lambda m, t: MEMIT(m, t, {"context_templates": ["{}"], "layers": [1, 2], "v_lr": 0.3}, moments=moments(m)),
        lambda m, t: ROME(m, t, {**NO_MOMENTS, "layers": [1], "context_templates": None}),
    ],
    ids=["rome", "memit", "rome with contexts of its own"],
)
def test_linear_attention_is_edited_on_whole_rows(
    qwen3_5: Any, tiny_tokenizer: Any, make: Callable[..., LocateThenEdit]
) -> None:
    assert len(set(qwen3_5.config.layer_types)) == 2
    parts = describe(qwen3_5)
    assert blocks_chain(parts)
    assert not suffixes_agree(parts)
    check_edit(make(qwen3_5, tiny_tokenizer))


def test_nothing_is_collected_before_it_is_known_that_a_model_can_be_edited(
    glm4_moe: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("second moments were collected")

    monkeypatch.setattr("errata.editors.core.moments.second_moments.second_moments", never)
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        MEMIT(glm4_moe, tiny_tokenizer, {"layers": [0, 1]}, text=["a text"])


# --- quantised weights --------------------------------------------------------------------------------------------


class _Quantised(nn.Linear):
    """A linear map with weights of 8 bits, or packed ones, multiplied out in its forward."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        self.kind, self.scale = kind, weight.abs().max() / (240 if kind == "fp8" else 127)
        scaled = weight / self.scale
        data = scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)
        if kind == "packed":
            data = data.view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        data = self.weight.data
        if self.kind == "packed":
            data = data.view(torch.int8).reshape(self.out_features, self.in_features)
        return nn.functional.linear(x, data.float() * self.scale)


@pytest.fixture(params=["fp8", "int8", "packed"])
def quantised(request: pytest.FixtureRequest, make_tiny: Any) -> Any:
    model = make_tiny("llama")
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                block.set_submodule(name, _Quantised(linear, request.param))
    return model


@pytest.mark.parametrize("method", [ROME, MEMIT, FTM, LoRA])
def test_methods_that_write_weights_refuse_quantised_ones_when_they_are_made(
    quantised: Any, tiny_tokenizer: Any, method: type[Editor]
) -> None:
    with pytest.raises(ArchitectureError, match=r"model\.layers\.\d.*weight is quantised or sharded.*GRACE"):
        method(quantised, tiny_tokenizer)


@pytest.mark.parametrize("module", ["up", "down"])
def test_a_codebook_and_scores_work_beside_quantised_weights(quantised: Any, tiny_tokenizer: Any, module: str) -> None:
    assert score(quantised, tiny_tokenizer) == pytest.approx(own_nll(quantised, tiny_tokenizer), rel=1e-5)
    check_edit(GRACE(quantised, tiny_tokenizer, {"layers": [1], "module": module, "n_iter": 20, "edit_lr": 0.3}))


# --- adapters of PEFT ---------------------------------------------------------------------------------------------


def with_adapter(model: Any, **settings: Any) -> Any:
    """The model inside a PeftModel, with an adapter that does something."""
    peft = pytest.importorskip("peft")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        found = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return found.eval()


@pytest.mark.parametrize("inside", [True, False], ids=["PeftModel", "the model that it holds"])
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj", "v_proj"]], ids=str)
@pytest.mark.parametrize("method", ["rome", "ft_m", "grace", "lora"])
def test_an_edit_goes_into_the_base_layer_and_leaves_the_adapter_alone(
    make_tiny: Any, tiny_tokenizer: Any, inside: bool, targets: Any, method: str
) -> None:
    wrapped = with_adapter(make_tiny("llama"), target_modules=targets)
    model = wrapped if inside else wrapped.get_base_model()
    settings: dict[str, tuple[type[Editor], dict[str, Any]]] = {
        "rome": (ROME, {**NO_MOMENTS, "layers": [1]}),
        "ft_m": (FTM, {"layers": [1], "num_steps": 3, "lr": 1e-2}),
        "grace": (GRACE, {"layers": [1], "n_iter": 20, "edit_lr": 0.3}),
        "lora": (LoRA, {"num_steps": 5, "rank": 2, "target_modules": ["v_proj"]}),
    }
    made, config = settings[method]
    assert score(model, tiny_tokenizer) == pytest.approx(own_nll(model, tiny_tokenizer), rel=1e-5)
    editor = made(model, tiny_tokenizer, config)
    edit = editor.apply(REQUEST)
    names = [*edit.patch.updates, *edit.patch.adapters]
    assert names
    assert not any("lora_" in name for name in names)
    edit.undo()
    check_edit(editor)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_other_architectures_are_edited_under_an_adapter_too(
    make_tiny: Any, tiny_tokenizer: Any, architecture: str
) -> None:
    model = with_adapter(make_tiny(architecture), target_modules="all-linear")
    check_edit(ROME(model, tiny_tokenizer, {**NO_MOMENTS, "layers": [1]}))


def test_an_adapter_that_depends_on_its_weight_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = with_adapter(make_tiny("llama"), target_modules="all-linear", use_dora=True)
    with pytest.raises(ArchitectureError, match=r"down_proj\.base_layer carries a PEFT adapter.*merge_and_unload\(\)"):
        ROME(model, tiny_tokenizer, {**NO_MOMENTS, "layers": [1]})


def test_an_adapter_that_is_merged_for_the_time_being_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = with_adapter(make_tiny("llama"), target_modules="all-linear")
    model.merge_adapter()
    with pytest.raises(ArchitectureError, match=r"merged into its weight.*merge_and_unload\(\)"):
        FTM(model, tiny_tokenizer, {"layers": [1]})
    model.unmerge_adapter()
    check_edit(FTM(model, tiny_tokenizer, {"layers": [1], "num_steps": 3, "lr": 1e-2}))


def test_a_model_whose_adapter_was_merged_for_good_is_edited_as_any_other(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = with_adapter(make_tiny("llama"), target_modules="all-linear").merge_and_unload()
    editor = ROME(model, tiny_tokenizer, {**NO_MOMENTS, "layers": [1]})
    assert list(editor.apply(REQUEST).patch.updates) == ["model.layers.1.mlp.down_proj.weight"]
    assert len(Ledger.of(model)) == 1
