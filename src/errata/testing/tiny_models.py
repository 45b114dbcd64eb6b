"""Random models of a few thousand weights, and a tokenizer for them: what methods are tried out on, see laws.py."""

from __future__ import annotations

from typing import Any

import torch

from errata.editors.core.model.tokens import Tokenizer

ARCHITECTURES = ("gpt2", "llama", "neox")
SENTENCES = (
    "The capital of Varland is Oslen.",
    "The mother tongue of Danielle Darrieux is French.",
    "Beats Music is owned by Apple. Space Needle is in the city of Seattle.",
    "Who plays the lyre in Northern Tarvos? The musician Ilda Moren plays it.",
    "What is the twin city of Quelm? It is Brast, near the river Ost.",
    "It is well known, and nobody doubts it: São Verão lies in Überwald.",
)


def tiny_tokenizer(*, bos: bool = False) -> Tokenizer:
    """Byte-level BPE of about 300 entries, trained on SENTENCES; pad = eos = `<|endoftext|>`.

    Args:
        bos: Whether it puts `<s>` before every text, as Llama's does; else it adds no special tokens, as GPT-2's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(SENTENCES, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        core.post_processor = processors.Sequence(
            [
                core.post_processor,
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], pad_token=special[0], bos_token=special[1 if bos else 0]
    )


def tiny_model(
    architecture: str, vocabulary: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 3
) -> Any:
    """A random model of width 32, in eval mode, whose weights are large enough that answers differ from prompt to
    prompt. Every call makes a new one; equal arguments make equal weights. The global random state is left alone.

    Args:
        architecture: One of ARCHITECTURES.
        vocabulary: Entries of the tokenizer.
    """
    import transformers as hf

    # Dropout is on by default in GPT-2's config: a test must notice an editor that forgets eval mode.
    configs = {
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocabulary, n_positions=256, n_embd=32, n_layer=n_layers, n_head=4, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0,
        ),
        "llama": lambda: hf.LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=80, num_hidden_layers=n_layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=1, eos_token_id=0, tie_word_embeddings=False,
        ),
        "neox": lambda: hf.GPTNeoXConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=128, num_hidden_layers=n_layers,
            num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(configs[architecture](), attn_implementation="eager")
    return model.to(dtype).eval()
