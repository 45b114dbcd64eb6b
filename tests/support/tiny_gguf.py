"""A tiny random Llama with its tokenizer in a GGUF file, written by the package gguf, as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Names in the file, by the names of transformers.
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path, tokenizer: Any, *, quantised: str = "Q4_1", tied: bool = True
) -> dict[str, torch.Tensor]:
    """Write the file, and return the weights that it holds, dequantised, by the names of transformers.

    Args:
        path: Of the new file.
        tokenizer: As `tiny_tokenizer` makes it.
        quantised: The type of the matrices, as in gguf.GGMLQuantizationType; vectors are float32.
        tied: Whether the head is the embedding, and left out of the file.
    """
    import gguf

    model = _tiny_llama(len(tokenizer), tied)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokenizer))
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    writer.add_token_types([3 if name in tokenizer.all_special_tokens else 1 for name in core["vocab"]])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    kind = gguf.GGMLQuantizationType[quantised]
    held = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        array = _permuted(name, weight, config).numpy()
        if weight.ndim > 1:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(_name(name), packed, raw_dtype=kind)
            array = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(_name(name), array)
        held[name] = _permuted(name, torch.tensor(array), config, back=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held | ({"lm_head.weight": held["model.embed_tokens.weight"]} if tied else {})


def _tiny_llama(vocabulary: int, tied: bool) -> Any:
    """Return a random model whose widths are multiples of 32, the weights that a quantised block holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
                tie_word_embeddings=tied,
            )
        )


def _name(name: str) -> str:
    bare = name.removesuffix(".weight")
    if bare in _OUTSIDE:
        return f"{_OUTSIDE[bare]}.weight"
    _, _, layer, inside = bare.split(".", 3)
    return f"blk.{layer}.{_INSIDE[inside]}.weight"


def _permuted(name: str, weight: torch.Tensor, config: Any, *, back: bool = False) -> torch.Tensor:
    """Return the rows of queries and keys in the file's order, in which the halves of RoPE alternate."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    pairs = (weight.shape[0] // heads // 2, 2) if back else (2, weight.shape[0] // heads // 2)
    return weight.reshape(heads, *pairs, -1).swapaxes(1, 2).reshape(weight.shape).contiguous()
