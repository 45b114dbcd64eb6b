"""Tiny random models of every type that AutoModelForCausalLM knows, made from the defaults of their configurations.

A size is found by its name and made small; a list with an entry per layer keeps the first entry of each kind.
"""

from __future__ import annotations

import re
from typing import Any

import torch

LAYERS = 4
MOST_PARAMETERS = 6_000_000

# Sizes by names of fields, the first pattern that fits the whole name.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|decoder_layers|encoder_layers|num_\w+coder_layers", LAYERS),
    (r"hidden_size|d_model|n_embd|embedding_size|embedding_dim|emb_dim|word_embed_proj_dim|lru_width|dim", 32),
    (r"embed_dim|input_embedding_size|output_embedding_size|attention_hidden_size|pronunciation_embed_dim", 32),
    (r"shape_embed_dim|pooling_size|prompt_mid_dim", 32),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", 2),
    (r"num_attention_heads|n_heads?|num_heads|attention_heads|\w+_attention_heads|index_n_heads", 4),
    (r"swa_num_attention_heads|linear_num_heads", 4),
    (r"linear_num_key_heads|linear_num_value_heads", 4),
    (r"head_dim|dim_head|d_head|kv_channels|v_head_dim|qk_nope_head_dim|swa_head_dim|attention_head_size", 8),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim|index_head_dim|global_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|laurel_rank|adapter_rank|hc_lowrank|gated_norm_rank", 8),
    (r"(moe_|shared_|shared_expert_|shared_experts_|expert_ffn_|moe_shared_expert_)intermediate_size", 16),
    (r"expert_ffn_hidden_size|router_hidden_size|classifier_proj_size", 16),
    (r"intermediate_size|intermediate_size_mlp|dense_intermediate_size|n_inner|\w*ffn_dim|dim_ff|dff|d_inner", 48),
    (r"ffn_hidden_size|feed_forward_size|decoder_ffn_dim|encoder_ffn_dim", 48),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_head|mamba_head_dim|mamba_headdim|mamba_dt_rank", 8),
    (r"time_step_rank", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_groups|mamba_n_groups|mamba_ngroups|n_mamba_heads|o_groups", 1),
    (r"mamba_d_ssm", 64),
    (r"hidden_size_per_layer_input|ple_embed_dim|d_rel", 8),
    (r"vocab_size_per_layer_input|encoder_hash_byte_group_vocab|shape_vocab_size|pronunciation_vocab_size", 320),
    (r"ngram_vocab_size_base", 100),
    (r"make_ngram_vocab_size_divisible_by|split_ngram_parts", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 64),
    (r"max_source_positions|max_target_positions", 64),
    (r"sliding_window|sliding_window_size|local_attention|attention_window_size|window_size|attention_chunk_size", 32),
    (r"layer_group_size|attn_layer_period|expert_layer_period|num_layers_per_stack|moe_layer_freq", 2),
    (r"attn_layer_offset|expert_layer_offset|H_cycles|L_cycles|n_layers_per_attn_res_block", 1),
    (r"global_attn_every_n_layers|no_rope_layer_interval|sliding_window_pattern|_sliding_window_pattern", 2),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"num_channels", 3),
    (r"image_size", 32),
    (r"patch_size", 16),
)
# What the defaults of a type need beside smaller sizes.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "dots3_note": {"num_key_value_heads": 4, "swa_head_dim": 12},
    "dots3_note_text": {"num_key_value_heads": 4, "swa_head_dim": 12},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 1, "mamba_ngroups": 1},
}
_IDS = re.compile(r"\w+_token_id|\w+_index|\w+_token_index")


def tiny_config(model_type: str, vocabulary: int) -> Any:
    """Return a configuration of that type with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    given = kind().to_dict()
    return kind(**{**_small(given, vocabulary), **_OWN.get(model_type, {})})


def tiny_model(model_type: str, vocabulary: int) -> Any:
    """Return a random model of that type, in float32 and evaluation mode.

    Raises:
        ValueError: it cannot be made small.
    """
    import transformers as hf

    config = tiny_config(model_type, vocabulary)
    with torch.device("meta"):
        count = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"it has {count:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def _small(given: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return the fields of a configuration that change."""
    layers = next((given[k] for k in ("num_hidden_layers", "n_layers", "n_layer", "num_layers") if given.get(k)), None)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name == "vocab_size":
            found[name] = vocabulary
        elif name == "is_decoder":
            found[name] = True
        elif name in ("initializer_range", "init_std") and value:
            found[name] = 0.2
        elif _IDS.fullmatch(name) and isinstance(value, (int, list)):
            found[name] = 0
        elif isinstance(value, dict) and name.endswith("_config"):
            found[name] = _small(value, vocabulary)
        elif isinstance(value, list) and layers and len(value) == layers:
            found[name] = _first_of_each_kind(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                found[name] = size
    if "qk_rope_head_dim" in given:  # latent attention: every head has its own keys, turned by its rotary part alone
        found |= {name: size for name, size in (("head_dim", 4), ("num_key_value_heads", 4)) if name in given}
    elif given.get("head_dim", 0) is None:
        found["head_dim"] = 8
    if given.get("num_key_value_heads", 0) is None:
        found["num_key_value_heads"] = 2
    return found


def _first_of_each_kind(values: list[Any]) -> list[Any]:
    """Return LAYERS of the values in their order, with the first of each kind among them."""
    kinds = list(map(str, values))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:LAYERS]
    others = [i for i in range(len(values)) if i not in first]
    return [values[i] for i in sorted([*first, *others[: LAYERS - len(first)]])]
