"""Name second moments in the cache by everything that they depend on, as one digest.

A moment of layer l depends on the texts, on the tokenizer, and on every weight that a token passes before it reaches
the down projection of layer l. All of that is hashed by content. Names of models and files play no part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files.digests import add_bytes, json_digest
from errata.editors.core.ledger.adapter_hooks import Hook, Listener
from errata.editors.core.model.architecture import Architecture

# Raise this whenever equal inputs would give other moments, or the form of an entry changes.
FORMAT = 1

# Entries of a model's configuration that change no hidden state: its origin, and what happens to its output.
_IRRELEVANT = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"}
    | {"output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
)


@dataclass(frozen=True)
class MomentsKey:
    """Everything that the moment of one layer depends on.

    Attributes:
        layer: Counted from 0.
        weights: SHA-256 of the parameters and buffers of the embeddings and of the blocks up to `layer`.
        architecture: SHA-256 of the model's class, its configuration and the name of the down projection.
        tokenizer: SHA-256 of the tokenizer.
        texts: SHA-256 of the texts.
        n_texts: Number of texts.
        max_length: Tokens kept of each text.
        dtype: Dtype of the model's weights. The moments are float64 for float64, and float32 otherwise.
        precision: Precision of float32 products: "highest", or less on a GPU where torch allows it.
        format: Version of the computation and of the file.
    """

    layer: int
    weights: str
    architecture: str
    tokenizer: str
    texts: str
    n_texts: int
    max_length: int
    dtype: str
    precision: str
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, in hex; names the entry in the cache."""
        return json_digest(asdict(self))


def weights_digests(architecture: Architecture, layers: Sequence[int]) -> dict[int, str]:
    """Return the digest of all weights before the down projection of each layer, in one pass over the weights.

    Raises:
        StatisticsError: a weight is on the meta device. It is not loaded, so its content cannot be hashed.
    """
    wanted, digest = set(layers), hashlib.sha256()
    for name, tensor in _outside_blocks(architecture):
        _add_tensor(digest, name, tensor)
    digests: dict[int, str] = {}
    for layer in range(max(wanted) + 1):
        for name, tensor in _tensors(architecture.block(layer)):
            _add_tensor(digest, f"{layer}.{name}", tensor)
        if layer in wanted:
            digests[layer] = digest.copy().hexdigest()
    return digests


def tensors_digest(module: nn.Module) -> str:
    """Return the digest of all parameters and buffers of a module, by name.

    Raises:
        StatisticsError: a weight is on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(module):
        _add_tensor(digest, name, tensor)
    return digest.hexdigest()


def architecture_digest(architecture: Architecture) -> str:
    """Return the digest of the model's class, its configuration, and where its down projections are."""
    config = getattr(architecture.model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    names = [type(architecture.base).__qualname__, type(architecture.block(0)).__qualname__, architecture.down_path]
    return json_digest([names, _relevant(settings)])


def matmul_precision(device: torch.device) -> str:
    """Return the precision of float32 products on this device. Only GPUs may round more than float32 does."""
    if device.type != "cuda":
        return "highest"
    # Newer versions of torch have the first setting. Once it is used, reading the older one raises.
    return getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


def foreign_hooks(architecture: Architecture, layers: Sequence[int]) -> list[str]:
    """Return the names of modules, up to the last of the layers, that carry a forward hook from other code.

    Such a hook can change the input of a down projection, and no digest of weights covers it. Hooks of transformers and
    accelerate only move or record tensors, and the hooks of a ledger do nothing while they are asleep.
    """
    later = {id(m) for block in list(architecture.blocks)[max(layers) + 1 :] for m in block.modules()}
    names = []
    for name, module in architecture.model.named_modules():
        # These attributes are private, but torch has no public list of hooks.
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(map(_is_foreign, hooks)) and id(module) not in later:
            names.append(name or type(module).__name__)
    return names


def _is_foreign(hook: Any) -> bool:
    if isinstance(hook, Hook):
        return not hook.disabled
    if isinstance(hook, Listener):
        return False  # it changes nothing
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "accelerate."))


def _outside_blocks(architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    inside = {id(tensor) for block in architecture.blocks for _, tensor in _tensors(block)}
    return ((name, tensor) for name, tensor in _tensors(architecture.base) if id(tensor) not in inside)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise StatisticsError(f"the weight {name} is not in memory (meta device); load the whole model first")
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    add_bytes(digest, tensor)


def _relevant(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(name): _relevant(value) for name, value in settings.items() if name not in _IRRELEVANT}
    return settings
