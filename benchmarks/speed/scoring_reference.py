"""Scoring as plain as the originals: whole logits, a record or an answer at a time. Nothing in the library uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.model import tokens
from errata.editors.core.model.own_forward import evaluating
from errata.evaluate.probes import Case, Probe


def by_record(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[float]:
    """As the originals batch: all prompts of a record with both answers each in one padded pass."""
    records = [[probe for probe in case.probes if probe.target is not None] for case in cases]
    return nlls(model, tokenizer, records, together=True)


@torch.inference_mode()
def nlls(model: Any, tokenizer: Any, groups: Sequence[Sequence[Probe]], *, together: bool = False) -> list[float]:
    """Mean negative log-probability a token of every answer, target before other, from the whole logits.

    Args:
        groups: Probes, one group per pass.
        together: One padded pass per group; else one pass per answer.
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
    return [(prompt, tokens.answer_ids(tokenizer, probe.prompt, answer)) for answer in answers]


def _nll(logits: Tensor, start: int, answer: list[int]) -> float:
    logprobs = logits[start - 1 : start - 1 + len(answer)].float().log_softmax(-1)
    return -float(logprobs.gather(1, torch.tensor(answer, device=logits.device)[:, None]).mean())
