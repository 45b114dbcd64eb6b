"""Every architecture is found by its structure, read and run the same way: laws over a table of tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from errata.benchmarks.speed.targets import problems_like_counterfact
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.errors import ArchitectureError
from errata.editors.core.families.search_rows import ON_ACCELERATOR, ON_CPU
from errata.editors.core.families.value_search import Objective, find_targets
from errata.editors.core.forward import whole_rows
from errata.editors.core.forward.upper_blocks import prepare_upper_blocks
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import last_keys, run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.request import EditRequest
from errata.editors.grace import GRACE
from errata.evaluate import scoring
from errata.evaluate.probes import Probe

V = 96
_COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48,
        "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_OPT = {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}
_OPT.pop("intermediate_size")
_OPT.pop("initializer_range")
_FALCON = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
           "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
# A window shorter than the rows, so that the mask of sliding layers matters. Run by the kernel that takes a query that
# sees nothing, as the plain loop's padding does then (Gemma 2 has none such, and a wide window).
_SLIDING = {**_GROUPED, "head_dim": 8, "sliding_window": 10}

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**_GPT),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=4),
    "neox": lambda: hf.GPTNeoXConfig(**_COMMON),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "opt-post-norm": lambda: hf.OPTConfig(**{**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_SLIDING),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**{**_SLIDING, "sliding_window": 32}),
    "gemma3": lambda: hf.Gemma3TextConfig(**_SLIDING, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "phi": lambda: hf.PhiConfig(**_COMMON),
    "phi3": lambda: hf.Phi3Config(**_COMMON),
    "olmo": lambda: hf.OlmoConfig(**_COMMON),
    "olmo2": lambda: hf.Olmo2Config(**_COMMON),
    "falcon": lambda: hf.FalconConfig(**_FALCON),
    "falcon-alibi": lambda: hf.FalconConfig(
        **_FALCON, alibi=True, new_decoder_architecture=False, parallel_attn=False, multi_query=False
    ),
    "granite": lambda: hf.GraniteConfig(**_GROUPED, logits_scaling=3.0, residual_multiplier=0.5),
    "cohere": lambda: hf.CohereConfig(**_GROUPED, logit_scale=0.25),
}
# Those in which the MLP's output does not reach the residual stream as it is.
NOT_PLAIN = {"gemma2", "gemma3", "olmo2", "granite", "opt-post-norm"}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Norms, rotary embeddings and some logits are computed in float32 whatever the model's dtype."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, check_dtype=False)


def _model(name: str, *, dtype: torch.dtype = torch.float64, attention: str | None = None) -> Any:
    attention = attention or ("sdpa" if name in ("mistral", "gemma3") else "eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_found_compute_what_the_model_computes(name: str) -> None:
    model = _model(name)
    architecture = describe(model)
    batch = right_padded([[3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 9]], 0)
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = architecture.blocks[-1].register_forward_hook(keep)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
        hidden = run_base(architecture, batch)
        hook.remove()
    real = batch.mask.bool()
    close(architecture.logits(hidden)[real], logits[real])
    close(architecture.readout(outputs[0])[real], logits[real])
    weight = model.get_parameter(architecture.weight_name(1))
    assert weight is architecture.down(1).weight
    assert tuple(architecture.weight(1).shape) == (architecture.d_model, architecture.d_mlp)
    assert architecture.n_layers == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_up_projection_begins_in_the_hidden_size_and_feeds_the_down_projection(name: str) -> None:
    model = _model(name)
    architecture = describe(model)
    found = architecture.up(1)
    assert found.name.split(".")[-2] in ("c_fc", "fc_in", "dense_h_to_4h", "fc1", "up_proj", "gate_up_proj")
    assert model.get_submodule(found.name.removesuffix(".weight")) is found.module
    shapes: list[torch.Size] = []
    up, down = found.module, architecture.down(1)
    handles = [module.register_forward_pre_hook(lambda *call: shapes.append(call[1][0].shape)) for module in (up, down)]
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    assert [shape[-1] for shape in shapes] == [architecture.d_model, architecture.d_mlp]


def test_an_mlp_without_an_up_projection_is_refused_where_one_is_asked_for() -> None:
    model = _model("llama")
    architecture = describe(model)
    for block in model.model.layers:
        block.mlp.up_proj = block.mlp.gate_proj = nn.Identity()
    with pytest.raises(ArchitectureError, match=r"no MLP up projection found in model\.layers\.1"):
        architecture.up(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_read_in_one_truncated_pass_are_the_inputs_of_the_down_projections(name: str) -> None:
    model = _model(name)
    architecture = describe(model)
    rows = [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [9, 8, 7]]
    read = last_keys(architecture, rows, [2, 0], pad=0)
    for layer in (0, 2):
        for i, row in enumerate(rows):
            seen: list[torch.Tensor] = []

            def keep(_module: Any, args: Any, seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0])

            hook = architecture.down(layer).register_forward_pre_hook(keep)
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
            hook.remove()
            close(read[layer][i], seen[0].reshape(len(row), -1)[-1])


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_found_on_suffixes_equal_those_of_the_plain_loop(name: str, site: Any) -> None:
    architecture = describe(_model(name))
    problems = problems_like_counterfact(3, V, (0, 5, 9), seed=1)
    # The first request stops early in most models, so that rows leave the batch.
    objective = Objective(5, 0.3, 0.1, 3.0, 0.0625, stop_loss=2.5)
    options: dict[str, Any] = {"layer": 1, "site": site, "pad": 0}
    exact = replace(ON_CPU, pass_tokens=0)
    ours = find_targets(architecture, problems, objective, **options, loss_layer=2, pace=exact)
    padded = find_targets(architecture, problems, objective, **options, loss_layer=2, pace=ON_ACCELERATOR)
    plain = find_targets_reference(architecture, problems, objective, **options)
    for found, one_bucket, wanted in zip(ours, padded, plain, strict=True):
        assert len(found.losses) == len(one_bucket.losses) == len(wanted.losses)
        close(found.initial, wanted.initial)
        close(found.delta, wanted.delta)
        # With rows of other lengths beside them, norms in float32 round differently, which Adam enlarges.
        assert (one_bucket.delta - wanted.delta).norm() <= 1e-5 * wanted.delta.norm()


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "granite", "gemma2", "gemma3", "olmo2"])
def test_values_found_jointly_for_several_layers_equal_those_of_the_plain_loop(
    name: str, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_rows, "suffixes_agree", lambda _architecture: is_split)
    architecture = describe(_model(name))
    problems = problems_like_counterfact(2, V, (0, 5), seed=1)
    objective = Objective(4, 0.3, 0.1, 1.5, 0.0625)
    ours = find_targets(architecture, problems, objective, layer=(0, 1), loss_layer=2, site="mlp", pad=0)
    plain = find_targets_reference(architecture, problems, objective, layer=(0, 1), site="mlp", pad=0)
    for found, wanted in zip(ours, plain, strict=True):
        assert found.delta.shape == (2, architecture.d_model)
        close(found.initial, wanted.initial)
        close(found.delta, wanted.delta)


FUSED = {"gpt2": "c_attn", "neox": "query_key_value", "phi3": "qkv_proj"}
FUSED |= dict.fromkeys(("falcon", "falcon-alibi"), "query_key_value")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_maps_of_queries_and_values_are_found(name: str) -> None:
    architecture = describe(_model(name))
    names = architecture.query_value(2)
    assert all(found.startswith(f"{architecture.blocks_path}.2.") for found in names)
    assert sorted(found.rpartition(".")[2] for found in names) == (
        [FUSED[name]] if name in FUSED else ["q_proj", "v_proj"]
    )


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_upper_part_of_a_model_gives_what_the_whole_does(name: str, first: int) -> None:
    """Rows of unequal lengths, some of them taken away, while a module of the upper part is changed."""
    model = _model(name)
    architecture = describe(model)
    rows = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7], [8, 9, 8, 9, 4]]
    ready = prepare_upper_blocks(architecture, rows, first=first, pad=0)

    def louder(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5

    with hooked(architecture.down(first).register_forward_hook(louder)), torch.no_grad():
        together, again = ready.run(), ready.run()
        assert torch.equal(together, again)
        part = ready.select([0, 2])
        assert part is not None or name == "falcon-alibi"
        for i, row in enumerate(rows):
            whole = model(input_ids=torch.tensor([row])).logits[0]
            close(architecture.readout(together[i, : len(row)]), whole)
            if part is not None and i != 1:
                close(architecture.readout(part.run()[(0, None, 1)[i], : len(row)]), whole)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "falcon"])
def test_attention_kernels_agree_with_the_plain_loop_too(name: str) -> None:
    architecture = describe(_model(name, attention="sdpa"))
    problems = problems_like_counterfact(4, V, (0, 5, 9), seed=2)
    objective = Objective(4, 0.3, 0.1, 3.0, 0.0625)
    ours = find_targets(architecture, problems, objective, layer=0, loss_layer=2, site="mlp", pad=0)
    plain = find_targets_reference(architecture, problems, objective, layer=0, site="mlp", pad=0)
    for found, wanted in zip(ours, plain, strict=True):
        close(found.delta, wanted.delta)


@pytest.mark.parametrize("module", ["up", "down"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_codebook_works_in_every_architecture_and_leaves_no_trace(
    name: str, module: str, tiny_tokenizer: Any
) -> None:
    config = CONFIGS[name]()
    config.vocab_size = len(tiny_tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    editor = GRACE(model, tiny_tokenizer, {"layers": [1], "module": module, "n_iter": 8, "edit_lr": 0.1, "eps": 0.01})
    request = EditRequest("The capital of {} is", "Varland", "of")
    probe = Probe("rewrite", request.text, request.target)
    ids = torch.tensor([tokens.prompt_ids(tiny_tokenizer, request.text)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        edit = editor.apply(request)
        (score,) = scoring.score(model, tiny_tokenizer, [probe])
        assert score.nll_target is not None
        assert score.nll_target < edit.diagnostics[0]["losses"][0]
        edit.undo()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_without_blocks_is_refused_with_what_was_looked_for() -> None:
    class Odd(nn.Module):
        config = hf.GPT2Config(**_GPT)

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def get_output_embeddings(self) -> nn.Module:
            return self.layers[0]

    with pytest.raises(ArchitectureError, match="looked for a ModuleList of modules"):
        describe(Odd())


def test_blocks_without_a_down_projection_are_refused_with_what_was_found() -> None:
    model = _model("llama")
    for block in model.model.layers:
        block.mlp = nn.Identity()
    with pytest.raises(ArchitectureError, match=r"no MLP down projection found in model\.layers\.0"):
        describe(model).down(0)


def test_mixtures_encoder_decoders_headless_and_other_objects_are_refused() -> None:
    mixture = hf.AutoModelForCausalLM.from_config(hf.MixtralConfig(**_GROUPED, num_local_experts=2))
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1 holds a mixture of experts.*no layer can be edited"):
        describe(mixture).down(1)
    with pytest.raises(ArchitectureError, match="has no language-model head"):
        describe(hf.AutoModel.from_config(CONFIGS["gpt2"]()))
    t5: Any = hf.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ArchitectureError, match="encoder-decoder"):
        describe(hf.T5ForConditionalGeneration(t5))
    with pytest.raises(ArchitectureError, match="expected a language model of transformers, got Linear"):
        describe(nn.Linear(2, 2))


def test_a_norm_behind_the_mlp_is_run_through_and_a_factor_multiplies() -> None:
    from errata.editors.core.forward.suffix import prepare_suffixes

    for name in CONFIGS:
        architecture = describe(_model(name))
        suffixes = prepare_suffixes(architecture, [[3, 4, 5, 6]], [2], layer=1, last=2, site="mlp", pad=0)
        assert bool(suffixes.hooks) == (name in NOT_PLAIN - {"granite"}), name
        assert (suffixes.gain != 1) == (name == "granite"), name
