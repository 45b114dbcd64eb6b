"""Trains the testbed's model from nothing: `python -m errata.benchmarks.testbed.train --seed 0 --out DIR`.

A GPT-2 of six layers learns to recall about a thousand facts in minutes on one CPU core. Two ingredients are
engineered, in training only; the model that is saved is plain GPT-2:

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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from errata.benchmarks.testbed import bundle
from errata.benchmarks.testbed.corpus import Author, Mixture, Packer, TokenRows, build_tokenizer, fifth
from errata.benchmarks.testbed.world_generator import World, invent


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on besides the seed."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    positions: int = 128
    vocabulary: int = 1536
    row_tokens: int = 64
    batch_rows: int = 8
    long_every: int = 4
    """Each such batch has rows twice as long and half as many: they train the upper half of the positions."""
    steps: int = 2400
    curriculum: float = 0.2
    """The first part of the steps reads about a fifth of the subjects only; it ends the plateau before recall."""
    bottleneck: float = 0.7
    """Share of the batches with the subject bottleneck."""
    sink_norm: float = 12.0
    """Norm of the fixed position embedding of position 0; 0 for no sink."""
    matrix_rate: float = 0.02
    """Muon's rate, for the matrices inside the blocks."""
    other_rate: float = 2e-3
    """AdamW's rate, for embeddings, biases and norms."""
    weight_decay: float = 0.05
    constant: float = 0.5
    """Share of the steps at the full rate; afterwards it falls linearly."""
    final_rate: float = 0.02
    """The last step's rate, as a share of the full one."""
    mixture: Mixture = field(default_factory=Mixture)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator set for the initialisation, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_model(recipe: Recipe, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 at its random start, with the sink in place."""
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with _seeded(seed):
        model = GPT2LMHeadModel(config)
        if recipe.sink_norm:
            direction = torch.randn(recipe.width)
            model.transformer.wpe.weight.data[0] = recipe.sink_norm * direction / direction.norm()
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


def loss_of(model: GPT2LMHeadModel, rows: TokenRows, *, bottleneck: bool) -> torch.Tensor:
    """Weighted mean negative log probability of the next tokens of a batch."""
    ids = torch.from_numpy(rows.ids)  # (B, L)
    weight = torch.from_numpy(rows.weight)[:, 1:].reshape(-1)
    ends = torch.from_numpy(rows.subject_end)
    lower, upper = bottleneck_masks(ends if bottleneck else torch.full_like(ends, ids.shape[1]))
    decoder = model.transformer
    hidden = decoder.wte(ids) + decoder.wpe(torch.arange(ids.shape[1]))  # (B, L, d)
    for index, block in enumerate(decoder.h):
        hidden = block(hidden, attention_mask=lower if index < len(decoder.h) // 2 else upper)
    logits = model.lm_head(decoder.ln_f(hidden)[:, :-1])  # (B, L-1, V)
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    return (losses * weight).sum() / weight.sum()


def optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
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


def train(world: World, tokenizer: Tokenizer, recipe: Recipe, seed: int, *, progress: int = 0) -> GPT2LMHeadModel:
    """Train a model on the world. Equal arguments give equal weights on one machine with one number of threads.

    Args:
        progress: steps between lines that are written to stderr; 0 writes none.
    """
    model = new_model(recipe, seed)
    model.train()
    chosen = optimizers(model, recipe)
    sink = model.transformer.wpe.weight.detach()[0].clone()
    started, seen = time.perf_counter(), 0.0
    for step, (rows, bottleneck) in enumerate(batches(world, tokenizer, recipe, seed)):
        loss = loss_of(model, rows, bottleneck=bottleneck)
        for optimizer, full in zip(chosen, (recipe.matrix_rate, recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate(step, recipe)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in chosen:
            optimizer.step()
        if recipe.sink_norm:
            model.transformer.wpe.weight.data[0] = sink
        seen += loss.item()
        if progress and (step + 1) % progress == 0:
            minutes = (time.perf_counter() - started) / 60
            sys.stderr.write(f"step {step + 1}/{recipe.steps}  loss {seen / progress:.3f}  {minutes:.1f} min\n")
            seen = 0.0
    return model.eval()


def build(folder: Path, seed: int, recipe: Recipe, *, progress: int = 0) -> dict[str, float]:
    """Invent a world, train a model on it, measure it, and write the testbed's folder; returns the abilities."""
    world = invent(seed)
    tokenizer = build_tokenizer(world, recipe.vocabulary)
    started = time.process_time()
    model = train(world, tokenizer, recipe, seed, progress=progress)
    minutes = (time.process_time() - started) / 60
    folder.mkdir(parents=True, exist_ok=True)
    bundle.save_model(model, tokenizer, folder)
    about = {
        "seed": seed,
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_minutes": round(minutes, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return bundle.finish(folder, world, about)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="errata.benchmarks.testbed.train", description="Train a testbed.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, of its text and of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the testbed to")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="number of training steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; equal numbers give equal weights")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    abilities = build(chosen.out, chosen.seed, Recipe(steps=chosen.steps), progress=100)
    sys.stderr.write(json.dumps({name: round(value, 4) for name, value in abilities.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
