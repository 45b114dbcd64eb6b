"""How fast GRACE trains its values, and what a forward pass pays for looking up keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errata.benchmarks.speed import synthetic
from errata.benchmarks.speed.grace_reference import nearest_within, trained_value
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, Timing, difference, repeated, timed
from errata.editors.core.codebook.codebook import Codebook, Correction
from errata.editors.core.codebook.growing_matrix import GrowingMatrix
from errata.editors.grace import GRACE

PROMPT_TOKENS = 12
FEW_KEYS = 1000
RADIUS = 1.0
# Look-ups and forward passes are so short that the fastest of several counts.
TIMES = 15
# Near some key, to compare what is found.
QUERIES = 64


def compare(stage: Stage) -> list[TimedPair]:
    """Values of all requests, and look-ups among few keys and many, for a prompt and for a step with a cache."""
    editor = GRACE(stage.model, stage.tokenizer, {"n_iter": stage.config.steps})
    forwards = {PROMPT_TOKENS: _prompt(stage), 1: _cached_step(stage)}
    found = [_values(stage, editor)]
    for count in sorted({min(FEW_KEYS, stage.config.keys), stage.config.keys}):
        book = codebook(count, stage.architecture.d_model, stage.config.seed, stage.device)
        found += [_look_up(stage, editor, book, tokens, forward) for tokens, forward in forwards.items()]
    return found


def _values(stage: Stage, editor: GRACE) -> TimedPair:
    """Independent edits of all requests, against one request after another."""
    config = stage.config
    requests = [case.request for case in synthetic.cases(stage.words, config.requests, config.seed)]
    editor.compute(requests[:2])  # the first products of a process pay for threads and page faults
    edits, fast = timed(lambda: editor.compute(requests))
    rows = [editor.row(request) for request in requests]
    settings: dict[str, Any] = {"lr": editor.config.edit_lr, "steps": config.steps}

    def plainly() -> list[Tensor]:
        return [
            trained_value(
                stage.model, editor.module, row, editor.replaced_columns(row), editor.cold_start(request), **settings
            )
            for request, row in zip(requests, rows, strict=True)
        ]

    values, plain = timed(plainly)
    ours = [edit.patch.adapters[editor.module_name].tensors["values"][0] for edit in edits]
    agreement = max(difference(a, b) for a, b in zip(ours, values, strict=True))
    settings |= {"requests": config.requests, "layer": editor.layer}
    return TimedPair("grace", "values", fast, plain, agreement, stage.target(1.5, 2.0), settings)


def codebook(count: int, width: int, seed: int, device: torch.device) -> Codebook:
    """Of random keys (count, width) far from each other, as many edits would leave it, but made at once."""
    keys = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(device)
    values, radii = keys.new_zeros(1, 1).expand(count, 1), keys.new_full((count,), RADIUS)
    correction = Correction(keys, values, ((1,),) * count, RADIUS, "replace_last", "coverage", 0.0)
    records = [(correction, place) for place in range(count)]
    rows = GrowingMatrix.empty(keys).extended(keys)
    return Codebook(rows, radii, 0 * radii, torch.arange(count), records, count, "replace_last")


def _look_up(stage: Stage, editor: GRACE, book: Codebook, tokens: int, forward: Timing) -> TimedPair:
    """The module's hook where no key is near, as nearly everywhere; agreement is of what queries near some key meet."""
    noise = torch.Generator().manual_seed(stage.config.seed + 1)
    width, count = book.keys.shape[1], len(book.slots)
    far = torch.randn(1, tokens, width, generator=noise).to(book.keys) * 3
    output = far.new_zeros(1, tokens, editor.width, dtype=stage.dtype)
    _, fast = repeated(lambda: book(editor.module, (far,), output), TIMES)
    _, plain = repeated(lambda: nearest_within(book.keys, book.radii, far[0]), TIMES)
    away = torch.nn.functional.normalize(torch.randn(QUERIES, width, generator=noise))
    away *= 1.4 * RADIUS * torch.rand(QUERIES, 1, generator=noise)
    near = book.keys[torch.randint(count, (QUERIES,), generator=noise)] + away.to(book.keys)
    different = (book.lookup(near) != nearest_within(book.keys, book.radii, near)).double().mean()
    settings = {
        "keys": count,
        "tokens": tokens,
        "width": width,
        "forward_seconds": forward.seconds,
        "forward_cpu_seconds": forward.cpu_seconds,
    }
    name = f"look-up, {count:,} keys, {tokens} token{'s' * (tokens > 1)}"
    return TimedPair("grace", name, fast, plain, float(different), None, settings)


@torch.inference_mode()
def _prompt(stage: Stage) -> Timing:
    """A forward pass over a prompt, without a codebook."""
    ids = _ids(stage)
    return repeated(lambda: stage.model(input_ids=ids, use_cache=True, logits_to_keep=1), TIMES)[1]


@torch.inference_mode()
def _cached_step(stage: Stage) -> Timing:
    """A forward pass of one token behind a prompt in the cache, without a codebook."""
    ids = _ids(stage)
    cache = stage.model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    def step() -> None:
        stage.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return repeated(step, TIMES)[1]


def _ids(stage: Stage) -> Tensor:
    generator = torch.Generator().manual_seed(stage.config.seed)
    return torch.randint(1, 2000, (1, PROMPT_TOKENS), generator=generator).to(stage.device)
