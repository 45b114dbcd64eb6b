"""One run of `errata bench`: a configuration in, a folder with its results out.

    folder = run(BenchConfig.of(values))

The folder holds results.json (configuration, versions, digests, summary), records.jsonl (every probe of every edit),
curve.json, report.md and plots; before.json (what the untouched model said), seconds.jsonl and, of a sequence, what
sequence_log.py writes. The same configuration again does nothing, or goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from errata import editors, models
from errata.benchmarks import ability
from errata.benchmarks.bench import case_selection, context, guard, input_digests, known_facts, protocols, sequences
from errata.benchmarks.bench.baseline import Baseline, baseline
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.config import BenchConfig, editor_config, editor_name
from errata.benchmarks.bench.measurements import fitting
from errata.benchmarks.bench.sequence_log import CHECKPOINTS, SequenceLog
from errata.benchmarks.datasets.json_records import Dropped, Loaded
from errata.benchmarks.reports import report
from errata.benchmarks.runs import environment, partial_results, run_status, summary, trackers
from errata.benchmarks.runs.results import SCHEMA_VERSION, SEQUENCES
from errata.benchmarks.runs.run_folder import CURVE, RECORDS, RESULTS, SECONDS, RunFolder
from errata.benchmarks.runs.stopping import Stop
from errata.benchmarks.runs.trackers import TrackedRun, Trackers, flat
from errata.editors.core.config import EditorConfig, choose
from errata.editors.core.errors import DatasetError
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import read_texts
from errata.editors.core.moments import collect
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import Case, Probe

BEFORE = "before.json"


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run before its model is loaded: everything that decides its results, and the folder that this gives.

    With `dataset.known`, `loaded` are the candidates until the model has been asked which of them it knows; `asked`
    then says how many it was asked. `probes_apart`: left out since they are about another edit's subject.
    """

    config: BenchConfig
    editor: EditorConfig
    loaded: Loaded
    probes_apart: int
    texts: tuple[str, ...]
    settings: dict[str, Any]
    folder: RunFolder
    asked: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        return self.loaded.cases

    @property
    def edits(self) -> int | None:
        """How many will be made; None where the model has to be asked first."""
        return self.config.n_edits if self.config.dataset.known else len(self.cases)


def run(config: BenchConfig, *, progress: Progress = silent, stop: Stop | None = None) -> Path:
    """Carry out a configuration, or what is left of it.

    Args:
        config: See hparams/config.yaml.
        progress: Told how many edits are done.
        stop: Asks the run to end early, as `config.time_limit` does.

    Returns:
        The run's folder, inside `config.out`.

    Raises:
        ConfigError: a value that does not fit, an unknown model, another process in the same folder.
        DatasetError: a dataset or text that cannot be read.
        ArchitectureError, StatisticsError: the model cannot be edited with this configuration.
        Stopped: it was asked to, and ended behind an edit; call again to go on.
    """
    return carry_out(prepare(config), progress=progress, stop=stop)


def carry_out(
    prepared: PreparedRun, *, progress: Progress = silent, stop: Stop | None = None, patience: float = 1.0
) -> Path:
    """A prepared run, or what is left of it; see `run`. `patience`: seconds to wait for another process that is at work
    in the run's folder; negative: for as long as it takes."""
    stop = stop or Stop()
    stop.limit(prepared.config.time_limit)
    if prepared.folder.done:
        return prepared.folder.path
    said = command(prepared.config, prepared.editor)
    with prepared.folder.opened(patience) as folder:
        folder.set_aside_damaged()
        if not folder.done:  # another process may have finished it meanwhile
            with run_status.marked(folder, command=said, names=_names(prepared.config), edits=prepared.edits):
                told = Trackers(prepared.config.trackers, TrackedRun(folder.path, flat(prepared.settings["config"])))
                try:
                    _carry_out(prepared, _stoppable(progress, stop), stop, told)
                finally:
                    told.finish()
    return folder.path


def prepare(config: BenchConfig) -> PreparedRun:
    """Check everything that can be checked without the model."""
    choose(config.protocol.name, protocols.PROTOCOLS, "protocol")
    editor = editor_config(config.editor, config.model, seed=config.seed)
    ability.check(config.ability)
    trackers.check(config.trackers)
    loaded, left_out = _cases(config)
    texts = _texts(config)
    fields = {"name": editor_name(config.editor), **editor.to_dict()}
    without = ["out", "time_limit", "trackers"]  # which change no result
    if config.protocol.name == "batch":
        without.append("batch_size")  # all cases are one
    settings = {
        **environment.identity(config, fields, case_selection.digest_of(loaded), texts, without=without),
        **input_digests.digests(config, editor),
    }
    folder = RunFolder.at(config.out, _name(config, loaded), settings)
    return PreparedRun(config, editor, loaded, left_out, tuple(texts), settings, folder)


def _cases(config: BenchConfig) -> tuple[Loaded, int]:
    """The cases to edit, and how many of their probes are left out; with `dataset.known`, all that can be asked."""
    loaded = case_selection.candidates(config)
    if config.dataset.known is not None:
        return loaded, 0
    return case_selection.without_other_subjects(
        config, case_selection.require_enough(config, case_selection.take(config, loaded))
    )


def _stoppable(progress: Progress, stop: Stop) -> Progress:
    """Progress during which a run can be left where it takes hours before the first edit, and goes on from there."""

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, what)
        if what.startswith(collect.PROGRESS_LABEL):
            stop.advanced()  # it is saved when it is left
            stop.check()

    return report


def _carry_out(prepared: PreparedRun, progress: Progress, stop: Stop, told: Trackers) -> None:
    config, folder = prepared.config, prepared.folder
    bench = _bench(prepared, progress, stop)
    done = {record["case"] for record in folder.records(RECORDS)}
    folder.records(SECONDS)  # cuts a torn line off
    if config.dataset.known is not None:
        prepared = _chosen(prepared, bench)
        bench = dataclasses.replace(bench, cases=prepared.cases, known=_known(config, prepared.cases))
    bench, unfit = fitting(dataclasses.replace(bench, track=told.log))
    prepared = _without(prepared, bench.cases, unfit)
    stop.check()
    before = _baseline(bench, folder)

    def write(record: dict[str, Any], seconds: dict[str, float]) -> None:
        if seconds:
            folder.append(SECONDS, {"case": record["case"], **seconds})
        folder.append(RECORDS, record)

    protocols.PROTOCOLS[config.protocol.name](bench, before, done, write)
    results = _results(prepared, bench.model)
    points = summary.curve(folder.records(RECORDS)) if bench.diary is None else bench.diary.points
    folder.write_json(CURVE, points)
    report.write(folder, results, folder.records(RECORDS))
    folder.write_json(RESULTS, results)
    told.log(results["counts"]["edits"], {name: results[name] for name in ("summary", "collapse", "speed")})
    partial_results.forget(folder)
    folder.finish()


def _bench(prepared: PreparedRun, progress: Progress, stop: Stop) -> context.Bench:
    """The model with its editor, and what is asked of it."""
    config = prepared.config
    model, tokenizer = config.model.load(config.precision, config.device)
    method = editors.get(editor_name(config.editor))
    return context.Bench(
        editor=method(model, tokenizer, prepared.editor, progress=progress),
        cases=prepared.cases,
        texts=prepared.texts,
        known=_known(config, prepared.cases),
        batch_size=config.batch_size,
        batch_tokens=config.scoring.batch_tokens,
        generation_tokens=config.generation.tokens,
        fluency_tokens=config.generation.fluency_tokens,
        perplexity_each=config.collapse.perplexity_each,
        eval_every=config.eval_every,
        confidence=config.confidence,
        seed=config.seed,
        ability=config.ability if config.ability.tasks else None,
        guard=None if config.guard.name == "none" else config.guard,
        diary=_diary(prepared),
        stop=stop,
        progress=progress,
    )


def _chosen(prepared: PreparedRun, bench: context.Bench) -> PreparedRun:
    """With the cases of which the untouched model knows, or does not know, the fact."""
    config = prepared.config
    found = known_facts.choose_known(
        bench, config, prepared.folder, prepared.loaded, partial(case_selection.take, config)
    )
    loaded, left_out = case_selection.without_other_subjects(config, found.loaded)
    settings = {**prepared.settings, "cases": case_selection.digest_of(loaded)}
    return dataclasses.replace(prepared, loaded=loaded, probes_apart=left_out, settings=settings, asked=found.counts)


def _diary(prepared: PreparedRun) -> SequenceLog | None:
    """The diary of a sequence; single edits need none, since each has its record."""
    if prepared.config.protocol.name not in SEQUENCES:
        return None
    model = prepared.config.model
    said = {"name": model.name, "revision": model.revision, "fingerprint": prepared.settings["model"]}
    return SequenceLog(prepared.folder, said)


def _baseline(bench: context.Bench, folder: RunFolder) -> Baseline:
    """What the untouched model says: asked once, in parts, also by a run that is killed and goes on."""

    def ask() -> dict[str, Any]:
        of_all = partial_results.PartialResults(folder, bench.stop, edits=0)
        watched = of_all.kept(partial(guard.untouched, bench))  # first, since it may refuse
        said = dataclasses.asdict(dataclasses.replace(baseline(bench, of_all.kept), guard=watched))
        folder.append(SECONDS, {"checkpoint": 0, "evaluation": of_all.seconds})
        return said

    return Baseline(**folder.keep(BEFORE, ask))


def _without(prepared: PreparedRun, cases: Sequence[Case], unfit: Sequence[Dropped]) -> PreparedRun:
    """With the cases that this model can be asked; the others are named among the dropped."""
    if not cases:
        raise DatasetError(f"no case can be asked on this model; the first: {unfit[0].reason}", record=unfit[0].record)
    loaded = Loaded(list(cases), [*prepared.loaded.dropped, *unfit])
    return dataclasses.replace(prepared, loaded=loaded)


def _texts(config: BenchConfig) -> list[str]:
    """Held-out texts, where they are wanted and there are any."""
    notes = read_model_settings(models.locate(config.model.name))
    source = config.collapse.text or notes.perplexity_text
    if source is None or config.collapse.n_texts == 0:
        return []
    return read_texts(source, max_texts=config.collapse.n_texts)


def _known(config: BenchConfig, cases: Sequence[Case]) -> list[Probe]:
    """Facts that a testbed's model knows; of other models nobody has told us any."""
    from errata.benchmarks.datasets import world

    folder = models.locate(config.model.name)
    if config.collapse.known_facts == 0 or not isinstance(folder, Path) or not world.is_testbed(folder):
        return []
    probes = world.known_facts(folder)
    if config.protocol.name in SEQUENCES:
        probes = sequences.never_edited(probes, cases)
    return random.Random(config.seed).sample(probes, min(config.collapse.known_facts, len(probes)))


def _names(config: BenchConfig) -> dict[str, str]:
    """What results are named by."""
    return {
        "editor": editor_name(config.editor),
        "model": config.model.name,
        "dataset": config.dataset.name,
        "protocol": config.protocol.name,
    }


def _name(config: BenchConfig, loaded: Loaded) -> str:
    model, known = Path(config.model.name).name, config.dataset.known
    edits = f"{known}-{config.n_edits or 'all'}" if known else len(loaded.cases)
    return f"{editor_name(config.editor)}-{model}-{config.dataset.name}-{config.protocol.name}-{edits}"


def _results(prepared: PreparedRun, model: Any) -> dict[str, Any]:
    config, folder = prepared.config, prepared.folder
    records, seconds = folder.records(RECORDS), folder.records(SECONDS)
    summed = summary.summarise(records, dataset=config.dataset.name, confidence=config.confidence, seed=config.seed)
    counts = {
        **summed.counts,
        "not_made": len(prepared.cases) - len(records),
        "dropped": len(prepared.loaded.dropped),
        "probes_apart": prepared.probes_apart,
        **prepared.asked,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "names": _names(config),
        "command": command(config, prepared.editor),
        "config": {**prepared.settings["config"], "out": config.out, "time_limit": config.time_limit},
        "digests": {
            "settings": folder.key,
            **{name: prepared.settings[name] for name in ("model", "cases", "texts", *input_digests.NAMES)},
        },
        "versions": environment.versions(),
        "machine": environment.machine(model),
        "trust_remote_code": config.model.trust_remote_code,
        "counts": counts,
        "dropped": [dataclasses.asdict(entry) for entry in prepared.loaded.dropped[:100]],
        "failures": summed.failures,
        "summary": summed.after,
        "before": summed.before,
        "papers": summed.papers,
        "collapse": summed.collapse,
        "ability": _ability(prepared),
        "speed": _speed(seconds),
        "warnings": _warnings(prepared, counts),
    }


def _ability(prepared: PreparedRun) -> dict[str, Any] | None:
    """Scores of lm-eval's tasks before the first edit and after the last."""
    if not prepared.config.ability.tasks:
        return None
    (before,), points = prepared.folder.records(BEFORE), prepared.folder.records(CHECKPOINTS)
    last = max(points, key=lambda point: point["edits"])
    return {
        "before": before["value"]["ability"],
        "after": last["ability"],
        "lm_eval": environment.version("lm-eval"),
    }


def _warnings(prepared: PreparedRun, counts: Mapping[str, int]) -> list[str]:
    """What a reader of the numbers has to know."""
    found = []
    if prepared.loaded.dropped:
        found.append(f"{len(prepared.loaded.dropped)} records of the dataset were dropped; see `dropped`")
    if counts["failed"]:
        is_sequence = prepared.config.protocol.name in SEQUENCES
        how = "are scored on the model as it stands" if is_sequence else "count with the untouched model's answers"
        found.append(f"{counts['failed']} edits were refused and {how}")
    if counts["undone"]:
        found.append(f"{counts['undone']} edits were undone by the guard and are scored on the model as it stands")
    if counts["not_made"]:
        found.append(f"the guard stopped the sequence: {counts['not_made']} edits were not made")
    if counts["foretold_disabling"]:
        found.append(f"{counts['foretold_disabling']} edits were foretold to disable the model by their keys")
    if counts["disabling"]:
        found.append(
            f"{counts['disabling']} edits disabled the model: perplexity doubled or half of the known facts lost"
        )
    if prepared.config.collapse.n_texts == 0:
        found.append("perplexity was not measured: collapse.n_texts=0 leaves it out")
    elif not prepared.texts:
        found.append("perplexity was not measured: the model's folder brings no text, and collapse.text= names none")
    return found


def _speed(seconds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was written down of times; `total_seconds` is of all starts, with what a kill made them do again."""
    # What was done again after a kill is there twice.
    each = {(entry.get("case"), entry.get("checkpoint")): entry for entry in seconds}.values()
    edits = [entry["edit"] for entry in each if "edit" in entry]
    watched = [entry["guard"] for entry in each if "guard" in entry]
    return {
        "seconds_per_edit": sum(edits) / len(edits) if edits else None,
        "edit_seconds": sum(edits),
        "guard_seconds": sum(watched) if watched else None,
        "evaluation_seconds": sum(entry.get("evaluation", 0.0) for entry in each),
        "total_seconds": sum(entry.get(part, 0.0) for entry in seconds for part in ("edit", "guard", "evaluation")),
        "peak_memory_bytes": environment.peak_memory(),
    }
