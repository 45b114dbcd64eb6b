"""Models of real shapes with random weights, for measuring speed where no weights can be had."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

# name -> (config class of transformers, fields)
SHAPES = MappingProxyType(
    {
        "tiny": (
            "GPT2Config",
            {"n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0},
        ),
        "gpt2": ("GPT2Config", {}),  # 124M: 12 layers of 768
        "gpt2-xl": ("GPT2Config", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
        "llama-3-8b": (
            "LlamaConfig",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
        "llama-3-70b": (
            "LlamaConfig",
            {
                "vocab_size": 128256,
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
    }
)


def configuration(shape: str) -> Any:
    """The configuration of a shape, as transformers has it."""
    import transformers

    kind, fields = SHAPES[shape]
    return getattr(transformers, kind)(**fields)


def sizes(shape: str) -> tuple[int, int, int]:
    """(parameters, d, d_in): counted without allocating any weight."""
    import transformers

    from errata.editors.core.model.architecture import describe

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configuration(shape))
    architecture = describe(model)
    return sum(p.numel() for p in model.parameters()), architecture.d_model, architecture.d_mlp


def edited_layers(n_layers: int) -> tuple[int, ...]:
    """Five layers where MEMIT edits GPT-2 XL (13 to 17 of 48), in proportion."""
    last = round(n_layers * 17 / 48)
    return tuple(range(max(0, last - 4), last + 1))


def random_model(shape: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """A decoder of this shape with its library's own random initialisation, in evaluation mode."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(configuration(shape), dtype=dtype)
    return model.eval()
