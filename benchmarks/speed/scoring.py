"""How much faster probes are scored and continued than the plain way, and how well the results agree, in one run.

    python -m errata.benchmarks.speed.scoring --model MODEL --dataset counterfact --path FILE --records 40

Two plain ways: every answer in a forward pass of its own (`one_by_one`), and the originals' batches (`by_record`): all
prompts of a record with both answers each, padded, logits at every position. Nothing in the library uses them.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from errata.benchmarks import datasets, models
from errata.editors.core import tokens
from errata.editors.core.activations import evaluating
from errata.evaluate.generation import continuations
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import score

logger = logging.getLogger(__name__)
T = TypeVar("T")


def measure(model: Any, tokenizer: Any, cases: Sequence[Case], *, new_tokens: int = 20) -> dict[str, Any]:
    """Time scoring of all probes with answers, and generation behind the first case's prompts.

    Returns:
        CPU seconds of `ours`, `one_by_one` and `by_record`; `speedup` over each; `agreement`, the largest
        difference of a negative log-probability to `one_by_one`, and `floor`, that of the two plain ways; the same
        under `generation`, where `agreement` is the share of equal continuations.
    """
    probes = [probe for case in cases for probe in case.probes if probe.target is not None]
    score(model, tokenizer, probes[:8])  # the first products of a process pay for threads and page faults
    seconds, scores = _timed(lambda: score(model, tokenizer, probes))
    ours = [nll for one in scores for nll in (one.nll_target, one.nll_other) if nll is not None]
    single_seconds, single = _timed(lambda: nlls(model, tokenizer, [[probe] for probe in probes]))
    records = [[probe for probe in case.probes if probe.target is not None] for case in cases]
    record_seconds, by_record = _timed(lambda: nlls(model, tokenizer, records, together=True))
    return {
        "probes": len(probes),
        "seconds": {"ours": seconds, "one_by_one": single_seconds, "by_record": record_seconds},
        "speedup": {"one_by_one": single_seconds / seconds, "by_record": record_seconds / seconds},
        "agreement": _largest_difference(ours, single),
        "floor": _largest_difference(by_record, single),
        "generation": _generation(model, tokenizer, [probe.prompt for probe in probes[:100]], new_tokens),
    }


@torch.inference_mode()
def nlls(model: Any, tokenizer: Any, groups: Sequence[Sequence[Probe]], *, together: bool = False) -> list[float]:
    """Mean negative log-probability a token of every answer, target before other, from the whole logits.

    Args:
        groups: Probes, split as the passes shall be.
        together: One padded pass a group; else one pass an answer.
    """
    found: list[float] = []
    with evaluating(model):
        for group in groups:
            rows = [row for probe in group for row in _rows(tokenizer, probe)]
            for part in [rows] if together else [[row] for row in rows]:
                batch = tokens.right_padded([prompt + answer for prompt, answer in part], 0).to(model.device)
                logits = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
                found += [_nll(one, len(prompt), answer) for one, (prompt, answer) in zip(logits, part, strict=True)]
    return found


def _rows(tokenizer: Any, probe: Probe) -> list[tuple[list[int], list[int]]]:
    prompt = tokens.prompt_ids(tokenizer, probe.prompt)
    answers = [answer for answer in (probe.target, probe.other) if answer is not None]
    return [(prompt, tokens.target_ids(tokenizer, answer)) for answer in answers]


def _nll(logits: Tensor, start: int, answer: list[int]) -> float:
    logprobs = logits[start - 1 : start - 1 + len(answer)].float().log_softmax(-1)
    return -float(logprobs.gather(1, torch.tensor(answer, device=logits.device)[:, None]).mean())


def _generation(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> dict[str, Any]:
    seconds, ours = _timed(lambda: continuations(model, tokenizer, prompts, new_tokens))
    plain_seconds, plain = _timed(
        lambda: [continuations(model, tokenizer, [prompt], new_tokens)[0] for prompt in prompts]
    )
    return {
        "prompts": len(prompts),
        "seconds": {"ours": seconds, "one_by_one": plain_seconds},
        "speedup": {"one_by_one": plain_seconds / seconds},
        "agreement": sum(a == b for a, b in zip(ours, plain, strict=True)) / len(prompts),
    }


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of this process, which neighbours on the machine disturb less than the clock's."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Measure and log one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.WORLD, help="as for errata.load")
    parser.add_argument("--dataset", default="counterfact")
    parser.add_argument("--path", default=None)
    parser.add_argument("--ids", default=None, help="JSON file of case ids")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(options.model)
    cases = datasets.load(options.dataset, options.path, limit=options.records, ids=options.ids, seed=0).cases
    logger.info("%s", json.dumps({**vars(options), "torch": torch.__version__, **measure(model, tokenizer, cases)}))


if __name__ == "__main__":
    main()
