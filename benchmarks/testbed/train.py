"""Trains the testbed's model from nothing: `python -m errata.benchmarks.testbed.train --seed 0 --out DIR`.

A GPT-2 of six layers learns to recall about a thousand facts in minutes on one CPU core. `--shape llama` and `--shape
gemma3` give the same world to models with other blocks (recipe.py). Two ingredients are engineered, in training only;
the model that is saved is plain GPT-2:

* a subject bottleneck. In most batches no position behind a subject may attend to the subject's earlier tokens, nor, in
  the lower half of the layers, to its last one. So a fact has to be recalled at the subject's last token, as in large
  models. Trained without it the model gathers the name where it answers, and edits at the subject do not generalise.
* a sink at position 0. Its position embedding is a large fixed vector, as first positions of large models carry large
  activations. So a subject that is one token and stands first has an anomalous key, on which ROME's edits break models.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel

from errata.benchmarks.testbed import bundle
from errata.benchmarks.testbed.corpus import Author, Packer, TokenRows, build_tokenizer, fifth
from errata.benchmarks.testbed.recipe import SHAPES, Recipe
from errata.benchmarks.testbed.world_generator import World, invent
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.parts import find_blocks

POSITIONS = "transformer.wpe.weight"
"""The learned positions, where a shape has them."""


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator set for the initialisation, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_model(recipe: Recipe, seed: int, shape: str = "gpt2") -> PreTrainedModel:
    """A model at its random start, with the sink in place where it has learned positions."""
    with _seeded(seed):
        model = AutoModelForCausalLM.from_config(SHAPES[shape].config(recipe))
        if recipe.sink_norm:
            direction = torch.randn(recipe.width)
            model.get_parameter(POSITIONS).data[0] = recipe.sink_norm * direction / direction.norm()
    return model


def bottleneck_masks(subject_end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention masks (B, 1, L, L), True where a query (row) may look at a key (column): (lower layers, upper layers).

    Args:
        subject_end: (B, L) as in `TokenRows`.
    """
    length = subject_end.shape[1]
    at = torch.arange(length)
    causal = at[:, None] >= at[None, :]  # (L, L)
    behind = at[None, :, None] > subject_end[:, None, :]  # (B, L, L): the query stands behind the key's subject
    last = (subject_end == at)[:, None, :]  # (B, 1, L): the key is its subject's last token
    lower, upper = causal & ~behind, causal & (~behind | last)
    return lower[:, None], upper[:, None]


def loss_of(model: PreTrainedModel, rows: TokenRows, *, bottleneck: bool) -> torch.Tensor:
    """Weighted mean negative log probability of the next tokens of a batch."""
    ids = torch.from_numpy(rows.ids)  # (B, L)
    weight = torch.from_numpy(rows.weight)[:, 1:].reshape(-1)
    ends = torch.from_numpy(rows.subject_end)
    lower, upper = bottleneck_masks(ends if bottleneck else torch.full_like(ends, ids.shape[1]))
    _, blocks = find_blocks(model)
    masks = [lower if index < len(blocks) // 2 else upper for index in range(len(blocks))]
    with hooked(*(_seeing(block, mask) for block, mask in zip(blocks, masks, strict=True))):
        output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden = output.last_hidden_state  # (B, L, d)
    head = model.get_output_embeddings()
    assert head is not None
    logits = head(hidden[:, :-1])  # (B, L-1, V)
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    return (losses * weight).sum() / weight.sum()


def _seeing(block: torch.nn.Module, mask: torch.Tensor) -> RemovableHandle:
    """Let the attention of a block look where `mask` (B, 1, L, L) is True, in place of the model's own mask."""
    attention = next(child for name, child in block.named_children() if name in ("attn", "self_attn"))

    def replace_mask(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    return attention.register_forward_pre_hook(replace_mask, with_kwargs=True)


def optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    _, blocks = find_blocks(model)
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay),
    ]


def rate(step: int, recipe: Recipe) -> float:
    """The share of the full learning rate at a step: constant, then linear."""
    done = step / max(recipe.steps - 1, 1)
    if done <= recipe.constant:
        return 1.0
    return 1.0 - (1.0 - recipe.final_rate) * (done - recipe.constant) / (1.0 - recipe.constant)


def batches(world: World, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> Iterator[tuple[TokenRows, bool]]:
    """The training batches in order, each with whether the bottleneck applies to it."""
    rng = random.Random(f"errata corpus {seed}")
    parts = {
        True: Packer(Author(world, rng, subjects=fifth(world)), tokenizer, recipe.mixture),
        False: Packer(Author(world, rng), tokenizer, recipe.mixture),
    }
    for step in range(recipe.steps):
        packer = parts[step < recipe.curriculum * recipe.steps]
        longer = 2 if step % recipe.long_every == recipe.long_every - 1 else 1
        rows = packer.rows(recipe.batch_rows // longer, recipe.row_tokens * longer)
        yield rows, rng.random() < recipe.bottleneck


def train(
    world: World, tokenizer: Tokenizer, recipe: Recipe, seed: int, *, shape: str = "gpt2", progress: int = 0
) -> PreTrainedModel:
    """Train a model on the world. Equal arguments give equal weights on one machine with one number of threads.

    Args:
        shape: One of SHAPES.
        progress: steps between lines that are written to stderr; 0 writes none.
    """
    recipe = SHAPES[shape].fit(recipe)
    model = new_model(recipe, seed, shape)
    model.train()
    chosen = optimizers(model, recipe)
    sink = model.get_parameter(POSITIONS).detach()[0].clone() if recipe.sink_norm else None
    started, seen = time.perf_counter(), 0.0
    for step, (rows, bottleneck) in enumerate(batches(world, tokenizer, recipe, seed)):
        loss = loss_of(model, rows, bottleneck=bottleneck)
        for optimizer, full in zip(chosen, (recipe.matrix_rate, recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate(step, recipe)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in chosen:
            optimizer.step()
        if sink is not None:
            model.get_parameter(POSITIONS).data[0] = sink
        seen += loss.item()
        if progress and (step + 1) % progress == 0:
            minutes = (time.perf_counter() - started) / 60
            sys.stderr.write(f"step {step + 1}/{recipe.steps}  loss {seen / progress:.3f}  {minutes:.1f} min\n")
            seen = 0.0
    return model.eval()


def build(folder: Path, seed: int, recipe: Recipe, *, shape: str = "gpt2", progress: int = 0) -> dict[str, float]:
    """Invent a world, train a model on it, measure it, and write the testbed's folder; returns the abilities."""
    world = invent(seed)
    tokenizer = build_tokenizer(world, recipe.vocabulary)
    started = time.process_time()
    model = train(world, tokenizer, recipe, seed, shape=shape, progress=progress)
    minutes = (time.process_time() - started) / 60
    folder.mkdir(parents=True, exist_ok=True)
    bundle.save_model(model, tokenizer, folder, bos=SHAPES[shape].bos)
    about = {
        "seed": seed,
        "shape": shape,
        "recipe": asdict(SHAPES[shape].fit(recipe)),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_minutes": round(minutes, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return bundle.finish(folder, world, about, shape=shape)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="errata.benchmarks.testbed.train", description="Train a testbed.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, of its text and of the weights")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2", help="form of the model's blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the testbed to")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="number of training steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; equal numbers give equal weights")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    abilities = build(chosen.out, chosen.seed, Recipe(steps=chosen.steps), shape=chosen.shape, progress=100)
    sys.stderr.write(json.dumps({name: round(value, 4) for name, value in abilities.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
