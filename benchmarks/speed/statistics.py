"""How much faster second moments are than the plain way, and how well the two agree, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from errata.benchmarks.speed.statistics_reference import reference_moments
from errata.editors.core.architecture import describe
from errata.editors.core.statistics import second_moments

T = TypeVar("T")


def measure(
    model: Any, tokenizer: Any, layers: Sequence[int], texts: Sequence[str], *, max_length: int = 256
) -> dict[str, Any]:
    """Time second moments of `layers` over `texts`, ours (with hashing and writing the cache) and the plain ways.

    Returns:
        CPU seconds of `ours`, of the reference with the originals' batches (`grouped`) and with one text at a time
        (`one_by_one`); `speedup` over each; `agreement`, the largest relative Frobenius distance to the reference; and
        `floor`, that of the two references to each other.
    """
    modules = {layer: describe(model).down(layer) for layer in layers}
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32

    def plain(*, grouped: bool) -> dict[int, torch.Tensor]:
        return reference_moments(model, tokenizer, modules, texts, max_length=max_length, dtype=dtype, grouped=grouped)

    # The first products of a process pay for threads and page faults; nobody shall be charged for that.
    reference_moments(model, tokenizer, modules, texts[:2], max_length=max_length, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        seconds, ours = _timed(lambda: second_moments(
            model, tokenizer, layers, texts, max_length=max_length, cache_dir=folder
        ))  # fmt: skip
    grouped_seconds, grouped = _timed(lambda: plain(grouped=True))
    single_seconds, single = _timed(lambda: plain(grouped=False))
    return {
        "layers": list(layers),
        "texts": len(texts),
        "tokens": ours.tokens,
        "threads": torch.get_num_threads(),
        "seconds": {"ours": seconds, "grouped": grouped_seconds, "one_by_one": single_seconds},
        "speedup": {"grouped": grouped_seconds / seconds, "one_by_one": single_seconds / seconds},
        "agreement": _distance(ours.matrices, grouped),
        "floor": _distance(single, grouped),
    }


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of this process, which neighbours on the machine disturb less than the clock's."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _distance(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> float:
    return max(float((ours[layer] - C).double().norm() / C.double().norm()) for layer, C in theirs.items())
