"""The score of a task of general ability, and what guessing would give in its place.

A task has several metrics, and one of them stands for it (`PRIMARY`). Chance is stated for choices between answers
alone: a broken model that writes its answers gets 0 there, and one whose answers are compared by probability gets
chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

# Of the metrics of a task the first that it has stands for it.
PRIMARY = (
    "acc_norm",
    "acc",
    "exact_match",
    "prompt_level_strict_acc",  # of ifeval
    "f1",
    "word_perplexity",
    "perplexity",
    "byte_perplexity",
    "bits_per_byte",
)
# Where the papers report another metric of a task than the first of PRIMARY.
_REPORTED: Mapping[str, str] = MappingProxyType({"toxigen": "acc"})
# Means of yes and no over questions: their standard error follows from their value.
YES_OR_NO = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
# What can be averaged over tasks.
SHARES = (*YES_OR_NO, "f1", "rouge", "recall")


@dataclass(frozen=True)
class Score:
    """What a task gave.

    Attributes:
        metric: Its name.
        value: Its value.
        stderr: Its standard error, of `YES_OR_NO`.
        n: Over how many questions.
        chance: What guessing would give, of tasks with a choice between answers; None where that is not known.
        part_of: The group of tasks whose own score has this one in it, so that no mean counts it twice.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    chance: float | None = field(default=None, compare=False)
    part_of: str | None = field(default=None, compare=False)


def scores_of(found: Mapping[str, Any]) -> dict[str, Score]:
    """Return {task or group of tasks: score} of what lm-eval's `simple_evaluate` returns."""
    results = {**found["results"], **found.get("groups", {})}
    counts, samples, configs = (found.get(name, {}) for name in ("n-samples", "samples", "configs"))
    groups = {group: tuple(tasks) for group, tasks in found.get("group_subtasks", {}).items() if tasks}
    scored = {name for name in results if _numbers(results[name])}
    parents = {task: group for group, tasks in groups.items() if group in scored for task in tasks}
    scores: dict[str, Score] = {}
    for name in sorted(scored):
        tasks = tuple(_leaves(name, groups))
        n = sum((counts.get(task) or {}).get("effective", 0) for task in tasks)
        chances = [_chance_of(task, results[task], samples.get(task, ()), configs.get(task, {})) for task in tasks]
        sizes = [(counts.get(task) or {}).get("effective", 0) for task in tasks]
        score = score_of(results[name], n, name=name, chance=_weighted(chances, sizes))
        stderr = _error_of(score, samples.get(name, ()))
        scores[name] = Score(**{**vars(score), "stderr": stderr, "part_of": parents.get(name)})
    return scores


def score_of(result: Mapping[str, Any], n: int | None, *, name: str = "", chance: float | None = None) -> Score:
    """Return the metric that stands for a task.

    Args:
        result: What lm-eval says: {"METRIC,FILTER": number, ...}.
        n: Number of questions; None: as the result says.
        name: Of the task.
        chance: What guessing would give; dropped of metrics that are no share of questions.
    """
    numbers = _numbers(result)
    order = (*((_REPORTED[name],) if name in _REPORTED else ()), *PRIMARY)
    metric = next((one for one in order if one in numbers), next(iter(numbers)))
    n, value = n or int(result.get("sample_len", 0)), numbers[metric]
    has_error = metric in YES_OR_NO and 0 <= value <= 1 and n > 1
    error = math.sqrt(value * (1 - value) / (n - 1)) if has_error else None
    return Score(metric, value, error, n, chance if metric in ("acc", "acc_norm") else None)


def chance_of_samples(samples: Sequence[Mapping[str, Any]], *, is_doubled: bool = False) -> float | None:
    """Return the share of questions that guessing gets right; None where some have no answers to choose from.

    Args:
        samples: Of lm-eval, with the likelihood of each answer.
        is_doubled: Whether each answer's likelihood is there twice, as for mutual information.
    """
    shares = [_guessed(sample, is_doubled=is_doubled) for sample in samples]
    known = [share for share in shares if share is not None]
    return fmean(known) if known and len(known) == len(shares) else None


def mean(scores: Mapping[str, Score]) -> float | None:
    """Return the unweighted mean of the tasks and groups whose metric is a share; None where there are none."""
    values = [score.value for score in scores.values() if _counts(score)]
    return sum(values) / len(values) if values else None


def chance_of_mean(scores: Mapping[str, Score]) -> float | None:
    """Return what guessing would give in place of `mean`; None where not all of its tasks state it."""
    chances = [score.chance for score in scores.values() if _counts(score)]
    known = [chance for chance in chances if chance is not None]
    return sum(known) / len(known) if known and len(known) == len(chances) else None


def error_of_mean(scores: Mapping[str, Score]) -> float | None:
    """Return the standard error of `mean` from those of its tasks; None where one of them has none."""
    errors = [score.stderr for score in scores.values() if _counts(score)]
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(e**2 for e in known)) / len(errors) if known and len(known) == len(errors) else None


def _counts(score: Score) -> bool:
    """Return whether a score is in the mean. Some tasks of lm-eval state F1 in percent."""
    return score.part_of is None and score.metric in SHARES and 0 <= score.value <= 1


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in result.items():
        if "," in name and "_stderr," not in name and isinstance(value, int | float):
            found.setdefault(name.partition(",")[0], float(value))  # of several filters the first
    return found


def _error_of(score: Score, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the standard error of a mean of shares, which is smaller than that of yes and no."""
    values = [sample[score.metric] for sample in samples if isinstance(sample.get(score.metric), int | float)]
    is_its_mean = score.stderr is not None and len(values) > 1 and math.isclose(fmean(values), score.value)
    return stdev(values) / math.sqrt(len(values)) if is_its_mean else score.stderr


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the tasks of a group, of groups within it as well; of a task, itself."""
    if name not in groups:
        yield name
    for task in groups.get(name, ()):
        yield from _leaves(task, groups)


def _chance_of(
    task: str, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> float | None:
    """Return what guessing gives in a task: as its file says, else from its questions."""
    stated = (config.get("metadata") or {}).get("chance")
    if stated is not None:
        return float(stated)
    if task.startswith("truthfulqa_mc2"):  # scored by the probability of all true answers together
        shares = [fmean(sample["doc"]["mc2_targets"]["labels"]) for sample in samples]
        return fmean(shares) if shares else None
    return chance_of_samples(samples, is_doubled="acc_mutual_info" in _numbers(result))


def _guessed(sample: Mapping[str, Any], *, is_doubled: bool) -> float | None:
    count = len(sample.get("filtered_resps", ())) // (2 if is_doubled else 1)
    target = sample.get("target")
    right = len(set(target)) if isinstance(target, list) else 1
    return right / count if count > 1 else None


def _weighted(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Return the mean, weighted by the number of questions; None where one is unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    total = sum(sizes)
    return fmean(known) if not total else math.fsum(v * n for v, n in zip(known, sizes, strict=True)) / total
