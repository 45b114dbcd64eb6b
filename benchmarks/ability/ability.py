"""General ability: what lm-eval's tasks say of a model as it stands, in this process, with its edits on.

    scores = measure(model, tokenizer, AbilityConfig(tasks=("arc_easy", "lambada_openai"), limit=200))
    scores["arc_easy"].value

Tasks are lm-eval's own by name, those of a folder of its YAMLs (`path`), and "world_facts": a choice between four
objects for every fact of the testbed. The extra `lm-eval` installs it. Names that begin with `glue_` are the tasks of
AlphaEdit's code (glue.py), from JSON files in `path`, and need no lm-eval; those that begin with `gu8_` are lm-eval
files of this package (gu_tasks/), which read their authors' data in `path`. lm-eval's caches of answers and of requests
are never used: they would give the answers of weights that are no longer there. Its seeds stay its own.

A task of lm-eval may name a dataset of the Hub, which is then fetched; a YAML may hold `!function`, which is code
beside it that lm-eval runs: give `path` only folders that you trust.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from errata.benchmarks.ability import glue
from errata.benchmarks.ability.gu_tasks import records
from errata.benchmarks.ability.scores import SHARES, Score, chance_of_mean, error_of_mean, mean, scores_of
from errata.benchmarks.ability.tasks import GU_PREFIX, GU_TASKS, SUITES, WORLD, AskedTask, asked
from errata.editors.core.config import check_least, did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import digest_of_file, write_atomically
from errata.editors.core.files.plain_files import read_json

__all__ = ["SHARES", "SUITES", "WORLD", "Score", "chance_of_mean", "error_of_mean", "mean"]
GU_FOLDER = str(Path(__file__).parent / "gu_tasks")


@dataclass(frozen=True)
class AbilityConfig:
    """Which tasks of lm-eval measure general ability."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, NAME:EXAMPLES for solved examples before each question, world_facts, glue_sst and its
    like, and suites: capability, glue, gu8, quick, should_we_edit; asked of the untouched model and at checkpoints."""
    path: str | None = None
    """A folder of lm-eval's YAMLs with further tasks, of the JSON files of the glue tasks, or of the data of gu8."""
    limit: int | None = None
    """The first questions of a task, this many; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each question of a task without a number of its own; null: as each task says."""
    batch_size: int = 8
    """Rows of a forward pass."""

    def __post_init__(self) -> None:
        check_least(self, {"limit": 1, "num_fewshot": 0, "batch_size": 1}, "ability.")
        if self.path is not None and not Path(self.path).is_dir():
            raise ConfigError(f"ability.path: expected a folder of task files, got {self.path!r}")
        asked(self.tasks)

    @property
    def glue_tasks(self) -> list[str]:
        """The tasks of AlphaEdit's code."""
        return [task.name for task in asked(self.tasks) if task.name in glue.TASKS]

    @property
    def lm_eval_tasks(self) -> tuple[AskedTask, ...]:
        """Every other task once, those of suites by their own names."""
        return tuple(task for task in asked(self.tasks) if task.name not in glue.TASKS)


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
    names, rest = config.glue_tasks, config.lm_eval_tasks
    found = glue.measure(model, tokenizer, names, _glue_folder(config), limit=config.limit) if names else {}
    scores = {name: Score(one.metric, one.value, None, one.n, one.chance) for name, one in found.items()}
    if rest or not names:
        scores |= _by_lm_eval(model, tokenizer, config)
    return dict(sorted(scores.items()))


def _glue_folder(config: AbilityConfig) -> Path:
    if config.path is None:
        raise ConfigError("ability.path: give the folder of the JSON files of the glue tasks (sst.json, rte.json, ...)")
    return Path(config.path)


def _by_lm_eval(model: Any, tokenizer: Any, config: AbilityConfig) -> dict[str, Score]:
    lm_eval = _imported()
    manager = _manager(lm_eval, config)
    scores: dict[str, Score] = {}
    with _as_it_was(model), _quietly():
        language_model = _language_model(model, tokenizer, config.batch_size)
        for shots, names in _by_shots(config).items():
            try:
                found = lm_eval.simple_evaluate(
                    model=language_model,
                    tasks=[_world_facts() if name == WORLD else name for name in names],
                    num_fewshot=shots,
                    limit=config.limit,
                    use_cache=None,
                    cache_requests=False,
                    bootstrap_iters=0,
                    log_samples=True,  # the number of answers to choose from
                    task_manager=manager,
                )
            except OSError as error:  # no network, no such dataset
                raise ConfigError(f"ability: the data of {', '.join(names)} cannot be had: {error}") from error
            scores |= scores_of(found)
    return scores


def _by_shots(config: AbilityConfig) -> dict[int | None, list[str]]:
    """Return the tasks that are asked with the same number of examples."""
    found: dict[int | None, list[str]] = {}
    for task in config.lm_eval_tasks:
        shots = config.num_fewshot if task.shots is None else task.shots
        found.setdefault(shots, []).append(task.name)
    return found


def plain(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """As JSON holds it."""
    return {task: asdict(score) for task, score in scores.items()}


def scores_of_plain(scores: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Score]:
    """Return what `plain` gave as scores again; none where nothing was asked."""
    return {task: Score(**score) for task, score in (scores or {}).items()}


def mean_of_plain(scores: Mapping[str, Mapping[str, Any]] | None) -> float | None:
    """`mean` of what `plain` gave; None where nothing was asked."""
    return mean(scores_of_plain(scores))


def chance_of_plain(scores: Mapping[str, Mapping[str, Any]] | None) -> float | None:
    """What guessing would give in place of `mean_of_plain`; None where not all of its tasks state it."""
    return chance_of_mean(scores_of_plain(scores))


def check(config: AbilityConfig) -> None:
    """That everything can be asked, before a long run begins. Raises as `measure`."""
    for task in config.glue_tasks:
        glue.questions(glue.TASKS[task], _glue_folder(config), config.limit)
    if config.lm_eval_tasks:
        _manager(_imported(), config)
    records.check([name.removeprefix(GU_PREFIX) for name in _gu_tasks(config)], config.path)


def digests(config: AbilityConfig) -> dict[str, str] | None:
    """Of what decides the scores beside the model: lm-eval's version, and the files of the folder of tasks. None where
    nothing is asked."""
    if not config.tasks:
        return None
    found = {"lm-eval": version("lm-eval")} if config.lm_eval_tasks else {}
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


def _gu_tasks(config: AbilityConfig) -> list[str]:
    return [task.name for task in config.lm_eval_tasks if task.name in GU_TASKS]


def _manager(lm_eval: Any, config: AbilityConfig) -> Any:
    """Return what knows the tasks.

    Raises:
        ConfigError: There is no task, or an unknown one.
    """
    if not config.tasks:
        raise ConfigError("ability.tasks: expected at least one task")
    names = {task.name for task in config.lm_eval_tasks}
    folders = [path for path in (GU_FOLDER if _gu_tasks(config) else None, config.path) if path is not None]

    data = {"metadata": {"folder": config.path}} if _gu_tasks(config) else {}

    def made(*, with_defaults: bool) -> Any:
        with _quietly():
            return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=with_defaults, **data)

    manager = made(with_defaults=False)
    known = [WORLD, *SUITES, *glue.TASKS, *GU_TASKS, *manager.all_tasks]
    if names <= set(known):
        return manager
    from errata.editors.core.files.tensor_cache import cache_folder

    # Reading its own thousands of files takes lm-eval some ten seconds, so their names are kept for the next mistake.
    folder = Path(lm_eval.tasks.__file__).parent
    kept = cache_folder(what="lm-eval") / f"tasks-{_digest_of_names(folder)}.json"
    own = _kept_names(kept)
    if own is None or names <= {*known, *own}:
        manager = made(with_defaults=True)
        own = [*manager.all_tasks]
        _keep(kept, own, own=known)
    known += own
    if names <= set(known):
        return manager
    unknown = next(task.name for task in config.lm_eval_tasks if task.name not in known)
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
