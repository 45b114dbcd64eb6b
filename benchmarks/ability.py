"""General ability: what lm-eval's tasks say of a model as it stands, in this process, with its edits on.

    scores = measure(model, tokenizer, AbilityConfig(tasks=("arc_easy", "lambada_openai"), limit=200))
    scores["arc_easy"].value

Tasks are lm-eval's own by name, those of a folder of its YAMLs (`path`), and "world_facts": a choice between four
objects for every fact of the testbed. The extra `lm-eval` installs it. Names that begin with `glue_` are the tasks of
AlphaEdit's code (glue.py), from JSON files in `path`, and need no lm-eval. Its caches of answers and of requests are
never used: they would give the answers of weights that are no longer there. Its seeds stay its own.

A task of lm-eval may name a dataset of the Hub, which is then fetched; a YAML may hold `!function`, which is code
beside it that lm-eval runs: give `path` only folders that you trust.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks import glue
from errata.editors.core.config import check_least, did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import digest_of_file, write_atomically
from errata.editors.core.files.plain_files import read_json

WORLD = "world_facts"
# Of the metrics of a task the first that it has stands for it.
PRIMARY = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity", "byte_perplexity", "bits_per_byte")
# Means of yes and no over questions: their standard error follows from their value.
YES_OR_NO = ("acc_norm", "acc", "exact_match")
# What can be averaged over tasks.
SHARES = (*YES_OR_NO, "f1")


# Several tasks by one name: those on which CrispEdit reports, those of AlphaEdit's code, and two that are soon done.
SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "capability": ("arc_challenge", "gsm8k", "ifeval", "mmlu", "truthfulqa_mc2"),
        "glue": tuple(glue.TASKS),
        "quick": ("arc_easy", "lambada_openai"),
    }
)


@dataclass(frozen=True)
class AbilityConfig:
    """Which tasks of lm-eval measure general ability."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, world_facts, glue_sst, glue_mrpc, glue_cola, glue_rte, glue_nli and glue_mmlu, and of
    suites: capability, glue, quick; asked of the untouched model and at checkpoints; []: not measured."""
    path: str | None = None
    """A folder of lm-eval's YAMLs with further tasks, and of the JSON files of the glue tasks."""
    limit: int | None = None
    """The first questions of a task, this many; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each question; null: as each task says."""
    batch_size: int = 8
    """Rows of a forward pass."""

    def __post_init__(self) -> None:
        check_least(self, {"limit": 1, "num_fewshot": 0, "batch_size": 1}, "ability.")
        if self.path is not None and not Path(self.path).is_dir():
            raise ConfigError(f"ability.path: expected a folder of task files, got {self.path!r}")

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """Every task once, those of suites by their own names."""
        return tuple(dict.fromkeys(task for name in self.tasks for task in SUITES.get(name, (name,))))

    @property
    def glue_tasks(self) -> list[str]:
        """The tasks of AlphaEdit's code."""
        return [task for task in self.all_tasks if task in glue.TASKS]

    def without_glue(self) -> AbilityConfig:
        """The same with lm-eval's tasks alone."""
        return replace(self, tasks=tuple(task for task in self.all_tasks if task not in glue.TASKS))


@dataclass(frozen=True)
class Score:
    """What a task gave.

    Attributes:
        metric: Its name.
        value: Its value.
        stderr: Its standard error, of `YES_OR_NO`.
        n: Over how many questions.
        chance: What guessing would give, of tasks with a choice between answers; None where that is not known.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    chance: float | None = field(default=None, compare=False)


def measure(model: Any, tokenizer: Any, config: AbilityConfig) -> dict[str, Score]:
    """Ask every task, in the order of their names.

    Args:
        model, tokenizer: Of transformers. The model is as before afterwards, and so are the global random states.
        config: With at least one task.

    Returns:
        {task: score}; of a group of tasks its own, as lm-eval weighs it, and each of its tasks'.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or its data cannot be had.
    """
    asked, rest = config.glue_tasks, config.without_glue()
    found = glue.measure(model, tokenizer, asked, _glue_folder(config), limit=config.limit) if asked else {}
    scores = {name: Score(one.metric, one.value, None, one.n, one.chance) for name, one in found.items()}
    if rest.tasks or not asked:
        scores |= _by_lm_eval(model, tokenizer, rest)
    return dict(sorted(scores.items()))


def _glue_folder(config: AbilityConfig) -> Path:
    if config.path is None:
        raise ConfigError("ability.path: give the folder of the JSON files of the glue tasks (sst.json, rte.json, ...)")
    return Path(config.path)


def _by_lm_eval(model: Any, tokenizer: Any, config: AbilityConfig) -> dict[str, Score]:
    lm_eval = _imported()
    manager, wanted = _found(lm_eval, config)
    with _as_it_was(model), _quietly():
        language_model = _language_model(model, tokenizer, config.batch_size)
        try:
            found = lm_eval.simple_evaluate(
                model=language_model,
                tasks=wanted,
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                use_cache=None,
                cache_requests=False,
                bootstrap_iters=0,
                log_samples=True,  # the number of answers to choose from
                task_manager=manager,
            )
        except OSError as error:  # no network, no such dataset
            raise ConfigError(f"ability: the data of {', '.join(config.tasks)} cannot be had: {error}") from error
    results, counts = {**found["results"], **found.get("groups", {})}, found.get("n-samples", {})
    samples = found.get("samples", {})
    return {task: _score(results[task], counts.get(task), samples.get(task, ())) for task in sorted(results)}


def mean(scores: Mapping[str, Score]) -> float | None:
    """Of the tasks whose metric is a share (`SHARES`), unweighted; None where there are none."""
    # Some tasks of lm-eval state F1 in percent.
    values = [score.value for score in scores.values() if score.metric in SHARES and 0 <= score.value <= 1]
    return sum(values) / len(values) if values else None


def plain(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """As JSON holds it."""
    return {task: asdict(score) for task, score in scores.items()}


def mean_of_plain(scores: Mapping[str, Mapping[str, Any]] | None) -> float | None:
    """`mean` of what `plain` gave; None where nothing was asked."""
    return mean({task: Score(**score) for task, score in (scores or {}).items()})


def chance_of_plain(scores: Mapping[str, Mapping[str, Any]] | None) -> float | None:
    """What guessing would give in place of `mean_of_plain`; None where not all of its tasks state it."""
    own = [score for score in (scores or {}).values() if score["metric"] in SHARES]
    known = [score["chance"] for score in own if score.get("chance") is not None]
    return sum(known) / len(known) if known and len(known) == len(own) else None


def check(config: AbilityConfig) -> None:
    """That everything can be asked, before a long run begins. Raises as `measure`."""
    for task in config.glue_tasks:
        glue.questions(glue.TASKS[task], _glue_folder(config), config.limit)
    rest = config.without_glue()
    if rest.tasks:
        _found(_imported(), rest)


def digests(config: AbilityConfig) -> dict[str, str] | None:
    """Of what decides the scores beside the model: lm-eval's version, and the files of the folder of tasks. None where
    nothing is asked."""
    if not config.tasks:
        return None
    found = {"lm-eval": version("lm-eval")} if config.without_glue().tasks else {}
    found |= {name: ",".join(SUITES[name]) for name in config.tasks if name in SUITES}
    if config.path is not None:
        folder = Path(config.path)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
        found |= {str(path.relative_to(folder)): digest_of_file(path) for path in files}
    return found


def _imported() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ability needs lm-eval ({error.name} is missing): pip install -e '.[lm-eval]'; ability.tasks=[] does "
            "without"
        ) from error
    return lm_eval


def _found(lm_eval: Any, config: AbilityConfig) -> tuple[Any, list[Any]]:
    """What knows the tasks, and the tasks as lm-eval takes them."""
    if not config.tasks:
        raise ConfigError("ability.tasks: expected at least one task")
    wanted = [_world_facts() if task == WORLD else task for task in config.tasks]
    with _quietly():
        manager = lm_eval.tasks.TaskManager(include_path=config.path, include_defaults=False)
    known = [WORLD, *SUITES, *glue.TASKS, *manager.all_tasks]
    if set(config.tasks) <= set(known):
        return manager, wanted
    from errata.editors.core.files.tensor_cache import cache_folder

    # Reading its own thousands of files takes lm-eval some ten seconds, so their names are kept for the next mistake.
    folder = Path(lm_eval.tasks.__file__).parent
    kept = cache_folder(what="lm-eval") / f"tasks-{_digest_of_names(folder)}.json"
    names = _kept_names(kept)
    if names is None or set(config.tasks) <= {*known, *names}:
        with _quietly():
            manager = lm_eval.tasks.TaskManager(include_path=config.path, include_defaults=True)
        names = [*manager.all_tasks]
        _keep(kept, names, own=known)
    known += names
    if set(config.tasks) <= set(known):
        return manager, wanted
    unknown = next(task for task in config.tasks if task not in known)
    raise ConfigError(f"ability.tasks: unknown task {unknown!r}{did_you_mean(unknown, known)}")


def _digest_of_names(folder: Path) -> str:
    """Return a digest of the names, sizes and times of lm-eval's own task files."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*.yaml"))]
    known = [[str(path), found.st_size, found.st_mtime_ns] for path, found in files]
    return hashlib.sha256(json.dumps(known).encode("utf-8")).hexdigest()[:16]


def _kept_names(path: Path) -> list[str] | None:
    """Return the names of lm-eval's own tasks as an earlier process kept them; None where there are none."""
    try:
        names = read_json(path)
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _keep(path: Path, names: Sequence[str], *, own: Sequence[str]) -> None:
    """Keep the names of lm-eval's own tasks, without those of the user's folder. Without a cache, nothing is kept."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(sorted({*names} - {*own})).encode("utf-8"))


def _world_facts() -> dict[str, Any]:
    """The testbed's known facts as a task: which of four objects is it?"""
    from datasets import Dataset

    from errata.benchmarks.testbed import cases

    rows = [{"question": question, "choices": choices} for question, choices in cases.questions()]
    return {
        "task": WORLD,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models import huggingface

    kind: Any = huggingface.HFLM
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _score(
    result: Mapping[str, Any], count: Mapping[str, int] | None, samples: Sequence[Mapping[str, Any]] = ()
) -> Score:
    """The metric that stands for a task, of what lm-eval says: {"METRIC,FILTER": number, ...}."""
    numbers: dict[str, float] = {}
    for name, value in result.items():
        if "," in name and "_stderr," not in name and isinstance(value, int | float):
            numbers.setdefault(name.partition(",")[0], float(value))  # of several filters the first
    metric = next((name for name in PRIMARY if name in numbers), next(iter(numbers)))
    n, value = (count or {}).get("effective", int(result.get("sample_len", 0))), numbers[metric]
    has_error = metric in YES_OR_NO and 0 <= value <= 1 and n > 1
    chance = _chance(samples) if metric in ("acc", "acc_norm") else None
    return Score(metric, value, math.sqrt(value * (1 - value) / (n - 1)) if has_error else None, n, chance)


def _chance(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of questions that guessing gets right; None where some have no answers to choose from."""
    choices = [len(sample.get("filtered_resps", ())) for sample in samples]
    return sum(1 / count for count in choices) / len(choices) if choices and min(choices) > 1 else None


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """The model's mode and generation settings, its tied weights, and the global random states, put back."""
    import numpy as np
    import torch

    from errata.editors.core.model.own_forward import evaluating

    settings, numbers, arrays = model.generation_config, random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with evaluating(model), torch.random.fork_rng(devices=devices):
        model.generation_config = copy.deepcopy(settings)
        try:
            yield
        finally:
            model.generation_config = settings
            random.setstate(numbers)
            np.random.set_state(arrays)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without lm-eval's bars and advice, and without what git says where there is no repository: lm-eval asks it for a
    commit."""
    from lm_eval import evaluator

    asks_git = evaluator.get_git_commit_hash
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        evaluator.get_git_commit_hash = asks_git
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
