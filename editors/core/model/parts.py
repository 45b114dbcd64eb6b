"""Which modules of a model are what: its blocks, their linear maps, attentions and MLPs, and the final norm.

Nothing is looked up by the model's name: parts are recognised by what they are. Only names that all models share are
read ("attn", "expert"), for what no shape tells.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from errata.editors.core.errors import ArchitectureError

# Modules through which a token sees others, by the name of the module or of its class: no part of an MLP.
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MIXER = re.compile(r"attention|attn|mamba|shortconv|recurrent_?block|deltanet|lstm", re.IGNORECASE)
_SENSES = re.compile(r"vision|visual|image|audio|speech|video", re.IGNORECASE)
_INWARD = re.compile(r"\.([qkvg]_|gate|query|key|value)[^.]*$|indexer", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|(^|_)moe($|_)|^router$|^gate_router$", re.IGNORECASE)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear module stores its weight as (d_in, d_out): GPT-2's Conv1D does, `nn.Linear` does not."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def text_config(model: nn.Module) -> Any:
    """Return the part of a model's configuration that describes its decoder."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a linear map, also where its weight is packed; None of another module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_transposed(module):
        return module.nf, module.nx  # type: ignore[return-value]
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    plain = all(isinstance(size, int) for size in sizes) and not isinstance(module, nn.Bilinear)
    # A wrapper of PEFT has the sizes of the map that it wraps.
    return sizes if plain and wrapped(module) is None else None  # type: ignore[return-value]


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return the map that an adapter of PEFT wraps, None if the module is no such wrapper."""
    base = module._modules.get("base_layer")
    return base if isinstance(base, nn.Module) else None


def linears(block: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the linear maps of a module by name, in the order of the module tree.

    Of an adapter of PEFT it is the map that is wrapped; the adapter's own matrices are left alone.
    """
    if (base := wrapped(block)) is not None:
        return linears(base, f"{prefix}base_layer.")
    if features(block) is not None:
        return {prefix.removesuffix("."): block}
    found: dict[str, nn.Module] = {}
    for name, child in block.named_children():
        found |= linears(child, f"{prefix}{name}.")
    return found


def adapter_refusal(block: nn.Module, name: str) -> str | None:
    """Return why the map at `name` cannot be edited under an adapter of PEFT; None if it can, or there is none."""
    parent, _, own = name.rpartition(".")
    if own != "base_layer":
        return None
    wrapper = block.get_submodule(parent)
    if getattr(wrapper, "merged", False):
        return "carries a PEFT adapter that is merged into its weight for the time being"
    if len(getattr(wrapper, "lora_magnitude_vector", ())):
        return "carries a PEFT adapter (DoRA) that depends on its weight"
    return None


def short_name(name: str) -> str:
    """Return the last part of a linear map's name, without what PEFT adds."""
    return name.removesuffix(".base_layer").rpartition(".")[2]


def holder(name: str) -> str:
    """Return the name of the module that holds a linear map, without what PEFT adds."""
    return name.removesuffix(".base_layer").rpartition(".")[0]


def inside(pattern: re.Pattern[str], block: nn.Module, name: str, *, classes: bool = True) -> bool:
    """Return whether the module at `name`, or one that holds it, has a name (or a class) that fits the pattern."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        if pattern.search(parts[end - 1]):
            return True
        if classes and pattern.search(type(block.get_submodule(".".join(parts[:end]))).__name__):
            return True
    return False


def in_attention(block: nn.Module, name: str) -> bool:
    """Return whether a linear map of a block belongs to its attention."""
    return inside(_ATTENTION, block, name)


def mixes_tokens(block: nn.Module, name: str) -> bool:
    """Return whether a linear map of a block belongs to its attention, or to what is there in place of one."""
    return inside(_MIXER, block, name)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the blocks of a decoder and their name: the largest list of modules that holds some that mix tokens.

    Where the configuration counts layers, lists of that length come first. What reads images and sounds is left out.

    Raises:
        ArchitectureError: there is none.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    candidates = [
        (len(modules) == count, sum(p.numel() for p in modules.parameters()), name, modules)
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        and any(_holds_mixer(module) for module in modules)
        and not _EXPERTS.search(name.rpartition(".")[2])
        and not _SENSES.search(name)
    ]
    if not candidates:
        raise ArchitectureError(
            f"no blocks found in {type(model).__name__}: looked for a ModuleList of modules, each with an attention "
            "module of its own, or with what stands in its place"
        )
    *_, name, blocks = max(candidates, key=lambda entry: entry[:2])
    return name, blocks


def _holds_mixer(block: nn.Module) -> bool:
    return any(
        (_MIXER.search(name) or _MIXER.search(type(child).__name__)) and "norm" not in name
        for name, child in block.named_children()
    )


def find_base(model: nn.Module, blocks_path: str) -> str:
    """Return the name of the decoder: the smallest module around the blocks that takes token ids.

    Raises:
        ArchitectureError: it is the whole model.
    """
    import inspect

    path = blocks_path.rpartition(".")[0]
    while path:
        if "input_ids" in inspect.signature(type(model.get_submodule(path)).forward).parameters:
            return path
        path = path.rpartition(".")[0]
    raise ArchitectureError(f"no decoder that takes token ids found in {type(model).__name__}, around {blocks_path}")


def find_down(block: nn.Module, d_model: int, path: str) -> tuple[str | None, str]:
    """Return the name of the down projection of a block's MLP, or None and why there is none to edit.

    It is a linear map outside everything that mixes tokens, with as many outputs as the hidden size, behind another
    one from the hidden size to its inputs (or to twice as many). Of several it is the widest, then the last.

    Args:
        block: The block.
        d_model: Hidden size.
        path: The name of the block, for the message.
    """
    if any(inside(_EXPERTS, block, name, classes=False) for name, _ in block.named_modules() if _outside(block, name)):
        return None, f"{path} holds a mixture of experts, and which expert to edit is not defined"
    outside = {name: sizes for name, sizes in _sizes(block).items() if not mixes_tokens(block, name)}
    downs = [(name, d_in) for name, (d_out, d_in) in outside.items() if d_out == d_model]
    fed = [
        (name, d_in) for name, d_in in downs if {(d_in, d_model), (2 * d_in, d_model)} & set(_siblings(outside, name))
    ]
    best = max(fed or downs, key=lambda entry: entry[1], default=None)
    if best is None:
        found = [f"{name} {sizes}" for name, sizes in outside.items()]
        return None, (
            f"no MLP down projection found in {path}: looked outside its attention for a linear map with {d_model} "
            f"output features, found {found or 'no linear map'}"
        )
    widest = [name for name, d_in in fed or downs if d_in == best[1]]
    if (refusal := adapter_refusal(block, widest[-1])) is not None:
        return None, f"{path}.{widest[-1]} {refusal}; call merge_and_unload() on the PEFT model first"
    return widest[-1], ""


def find_attention_out(block: nn.Module, d_model: int) -> str | None:
    """Return the name of the attention's output projection: its last linear map to the hidden size; None without.

    Maps for queries, keys, values and gates, and those of an indexer, may have as many outputs, and are none.
    """
    found = [name for name, (d_out, _) in _sizes(block).items() if d_out == d_model and in_attention(block, name)]
    outward = [name for name in found if not _INWARD.search(f".{name.removesuffix('.base_layer')}")]
    return next(reversed(outward or found), None)


def _outside(block: nn.Module, name: str) -> bool:
    return bool(name) and not mixes_tokens(block, name)


def _sizes(block: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: sizes for name, module in linears(block).items() if (sizes := features(module)) is not None}


def _siblings(outside: dict[str, tuple[int, int]], name: str) -> list[tuple[int, int]]:
    """Return the sizes of the other maps of the same MLP."""
    return [sizes for other, sizes in outside.items() if other != name and holder(other) == holder(name)]


def find_tail(base: nn.Module, inner: str) -> tuple[nn.Module, ...]:
    """Return the final norm (and OPT-350m's projection): children of the decoder beside the blocks.

    Where several norms stand there, it is the last: whether it is the right one, a trial tells.

    Args:
        base: The decoder.
        inner: The name of the blocks in it.
    """
    parent, _, blocks_name = inner.rpartition(".")
    holder = base.get_submodule(parent)
    children = {n: m for n, m in holder.named_children() if n != blocks_name and m is not None}
    norms = {n: m for n, m in children.items() if "norm" in type(m).__name__.lower()}
    final = [m for n, m in norms.items() if not re.search(r"emb|proj|per_layer", n)]
    return (*(final or [*norms.values()])[-1:], *(m for n, m in children.items() if n == "project_out"))
