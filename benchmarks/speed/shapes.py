"""Models of real shapes with random weights, for measuring speed where no weights can be had."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

# name -> (config class of transformers, fields)
SHAPES = MappingProxyType(
    {
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
    }
)


def random_model(shape: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """A decoder of this shape with its library's own random initialisation, in evaluation mode."""
    import transformers

    kind, fields = SHAPES[shape]
    config = getattr(transformers, kind)(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
