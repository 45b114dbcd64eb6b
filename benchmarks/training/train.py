"""One run of `errata train`: a configuration in, a trained editor out.

    folder = run(TrainConfig.of(values))

The folder holds the best network (NAME.json and NAME-....safetensors, which `editor.checkpoint=FOLDER` takes),
training.json (configuration, versions, digests, losses and held-out scores), training.png and the last checkpoint. The
network also goes into the cache, where the method looks for it on this model. The same configuration again does
nothing, or continues where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata import editors, models
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.config import editor_config, editor_name
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Dropped
from errata.benchmarks.runs import environment
from errata.benchmarks.runs.json_values import digest
from errata.benchmarks.runs.results import SCHEMA_VERSION
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop
from errata.benchmarks.training import figure
from errata.benchmarks.training.examples import ExampleSampler, Split, fitting, split
from errata.benchmarks.training.loop import SUCCESS, Trainer, TrainingRecord
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.families.learned_editor import TrainedConfig, TrainedEditor, install
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import read_texts
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import Case

TRAINING = "training.json"
PICTURE = "training.png"

Report = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class PreparedTraining:
    """A training before its model is loaded: everything that decides its outcome, and the folder that this names."""

    config: TrainConfig
    method: type[TrainedEditor]
    editor: TrainedConfig
    cases: Sequence[Case]
    dropped: Sequence[Dropped]
    texts: tuple[str, ...]
    settings: dict[str, Any]
    folder: RunFolder


def run(
    config: TrainConfig, *, progress: Progress = silent, report: Report = lambda _: None, stop: Stop | None = None
) -> Path:
    """Train, or finish a training that was stopped.

    Args:
        config: As `errata train` takes it.
        progress: Called after every step.
        report: Called with every evaluation on the held-out cases.
        stop: Asked after every step whether to stop there.

    Returns:
        The training's folder, inside `config.out`.

    Raises:
        ConfigError: a value that does not fit, a method that is not trained, another process in the same folder.
        DatasetError: a dataset or text that cannot be read, or too few cases.
        NumericalError: the loss is no longer finite.
        Stopped: `stop` asked for it; the same configuration continues from there.
    """
    prepared = prepare(config)
    if not prepared.folder.done:
        with prepared.folder.opened() as folder:
            folder.set_aside_damaged()
            if not folder.done:  # another process may have finished it meanwhile
                _carry_out(prepared, progress, report, stop or Stop())
    install(prepared.folder.path, prepared.method.name)
    return prepared.folder.path


def read(folder: Path) -> dict[str, Any]:
    """Read the training.json of a finished training."""
    return json.loads((folder / TRAINING).read_text(encoding="utf-8"))


def line(entry: Mapping[str, Any]) -> str:
    """Return an evaluation in one line: losses, and held-out scores as shares of correct tokens.

    Shares of preferred answers follow in brackets where they were measured.
    """
    losses = ", ".join(f"{name} {value:.3g}" for name, value in entry["losses"].items())
    right, preferred = (entry["held_out"].get(name, {}) for name in ("teacher_forced", "probability"))
    shown = [f"{m} {right[m]['mean']:.1%}{_bracket(preferred.get(m))}" for m in SUCCESS if m in right]
    return f"step {entry['step']:>6}   {losses}   held out: {', '.join(shown)}"


def _bracket(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f" ({found['mean']:.1%})"


def prepare(config: TrainConfig) -> PreparedTraining:
    """Check everything that can be checked without the model."""
    name = editor_name(config.editor)
    method = editors.get(name)
    if not issubclass(method, TrainedEditor):
        trained = [other for other in editors.METHODS if issubclass(editors.get(other), TrainedEditor)]
        raise ConfigError(f"{name} needs no training{did_you_mean(name, trained)}")
    editor = editor_config(config.editor, config.model, seed=config.seed)
    assert isinstance(editor, TrainedConfig)
    if editor.checkpoint is not None:
        raise ConfigError("editor.checkpoint: training begins with a new network; leave it out")
    loaded = datasets.load(
        config.dataset.name,
        config.dataset.path,
        target=config.dataset.target,
        limit=config.n_cases,
        split=config.dataset.split if datasets.has_halves(config.dataset.name) else None,
        ids=config.dataset.ids,
        seed=config.seed,
        options=config.dataset.options or None,
        needs_subject=method.needs_subject,
        chat=config.dataset.chat,
    )
    texts = _texts(config)
    cases = digest([case.as_dict() for case in loaded.cases])
    settings = environment.identity(
        config, {"name": name, **editor.to_dict()}, cases, texts, without=["out", "checkpoint_every"]
    )
    model = Path(config.model.name).name
    folder = RunFolder.at(config.out, f"{name}-{model}-{config.dataset.name}", settings, data=(TRAINING,))
    return PreparedTraining(config, method, editor, loaded.cases, loaded.dropped, tuple(texts), settings, folder)


def _texts(config: TrainConfig) -> list[str]:
    """Return running text, if the configuration asks for it and there is any."""
    source = config.text or read_model_settings(models.locate(config.model.name)).text
    if source is None or config.rows.texts == 0:
        return []
    return read_texts(source, max_texts=config.n_texts)


def _carry_out(prepared: PreparedTraining, progress: Progress, report: Report, stop: Stop) -> None:
    config, folder = prepared.config, prepared.folder
    model, tokenizer = config.model.load(config.precision, config.device)
    cases, unfit = fitting(prepared.cases, model, tokenizer)
    if not cases:
        raise DatasetError(f"no case can be asked on this model; the first: {unfit[0].reason}", record=unfit[0].record)
    parts = split(cases, config.held_out, config.seed)
    editor = prepared.method(model, tokenizer, prepared.editor, trained=False, progress=progress)
    longest = editor.architecture.max_positions
    examples = ExampleSampler(parts.train, prepared.texts, tokenizer, config.rows, config.seed, longest=longest)
    about = {"model": prepared.settings["model"]}
    trainer = Trainer(
        editor, examples, parts.held_out, config, folder.path, about=about, report=report, progress=progress
    )
    record = trainer.run(stop)
    result = _result(prepared, model, record, parts, [*prepared.dropped, *unfit])
    folder.write_bytes(PICTURE, figure.curve(result))
    folder.write_json(TRAINING, result)
    folder.finish()
    trainer.forget()


def _result(
    prepared: PreparedTraining, model: Any, record: TrainingRecord, parts: Split, dropped: Sequence[Dropped]
) -> dict[str, Any]:
    config = prepared.config
    names = {"editor": prepared.method.name, "model": config.model.name, "dataset": config.dataset.name}
    counts = {"train": len(parts.train), "held_out": len(parts.held_out), "dropped": len(dropped)}
    edits = record.step * prepared.editor.accumulate_bs
    return {
        "schema_version": SCHEMA_VERSION,
        "names": names,
        "command": command(config, prepared.editor, verb="train", yaml="train"),
        "config": {**prepared.settings["config"], "out": config.out},
        "digests": {
            "settings": prepared.folder.key,
            **{name: prepared.settings[name] for name in ("model", "cases", "texts")},
        },
        "versions": environment.versions(),
        "machine": environment.machine(model),
        "trust_remote_code": config.model.trust_remote_code,
        "counts": {**counts, "steps": record.step, "edits": edits},
        "dropped": [dataclasses.asdict(entry) for entry in dropped[:100]],
        "best": record.best,
        "before": record.before,
        "history": record.history,
        "speed": {"seconds": record.seconds, "peak_memory_bytes": environment.peak_memory()},
    }
