"""One run of `errata bench`: a configuration in, a folder with its results out.

    folder = run(BenchConfig.of(values))

The folder holds results.json (configuration, versions, digests, summary), records.jsonl (every probe of every edit),
curve.json, report.md and plots; before.json (what the untouched model said), seconds.jsonl and, of a sequence, what
sequence_log.py writes. The same configuration again does nothing, or goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from errata import editors, models
from errata.benchmarks.bench import case_selection, guard, known_facts, protocols, sequences
from errata.benchmarks.bench.baseline import BEFORE, Baseline, baseline
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.config import BenchConfig, editor_name
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.bench.measurements import fitting
from errata.benchmarks.bench.own_files import baseline_fault, check_complete, own_records
from errata.benchmarks.bench.patch_room import check_room
from errata.benchmarks.bench.preparation import PreparedRun, prepare, run_names
from errata.benchmarks.bench.run_results import results_of
from errata.benchmarks.bench.sequence_log import SequenceLog
from errata.benchmarks.bench.text_scores import VERDICTS, TextScores, Verdicts
from errata.benchmarks.datasets import world
from errata.benchmarks.datasets.json_records import Dropped
from errata.benchmarks.datasets.references import References
from errata.benchmarks.reports import report
from errata.benchmarks.runs import partial_results, rank_folders, run_status, summary
from errata.benchmarks.runs.phase_memory import PhaseMemory
from errata.benchmarks.runs.run_folder import CURVE, RECORDS, RESULTS, SECONDS, RunFolder
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.benchmarks.runs.trackers import TrackedRun, Trackers, flat
from errata.editors.core import ranks
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.moments import collect
from errata.editors.core.progress import Progress, silent
from errata.evaluate import judging
from errata.evaluate.probes import Case, Probe


def run(config: BenchConfig, *, progress: Progress = silent, stop: Stop | None = None) -> Path:
    """Carry out a configuration, or what is left of it.

    Args:
        config: See bench/config.py.
        progress: Told how many edits are done.
        stop: Asks the run to end early, as `config.time_limit` does. Ranks of one run take neither.

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
    prepared: PreparedRun,
    *,
    progress: Progress = silent,
    stop: Stop | None = None,
    patience: float = 1.0,
    loaded: tuple[Any, Any] | None = None,
) -> Path:
    """Carry out a prepared run, or what is left of it, and return its folder.

    Args:
        prepared: The run.
        progress: See `run`.
        stop: See `run`.
        patience: Seconds to wait for another process that is at work in the run's folder; negative: for ever.
        loaded: The untouched model and its tokenizer, if they are loaded already; they are untouched again behind runs
            of single edits.

    Raises:
        ConfigError: Another process is still at work there, or several ranks are asked for what they cannot do.
    """
    if ranks.count() > 1:
        _check_shared(prepared.config, stop)
    stop = stop or Stop()
    stop.limit(prepared.config.time_limit)
    if prepared.folder.done:
        prepared.folder.clear_left_behind()
        return prepared.folder.path
    said = command(prepared.config, prepared.editor)
    with rank_folders.opened(prepared.folder, patience) as folder:
        if not folder.done:  # another process may have finished it meanwhile
            with run_status.marked(folder, command=said, names=run_names(prepared.config), edits=prepared.edits):
                trackers = prepared.config.trackers if ranks.rank() == 0 else ()
                told = Trackers(trackers, TrackedRun(folder.path, flat(prepared.settings["config"])))
                held = dataclasses.replace(prepared, folder=folder)
                try:
                    _carry_out(held, _stoppable(progress, stop), stop, told, loaded)
                finally:
                    told.finish()
    return prepared.folder.path


def _check_shared(config: BenchConfig, stop: Stop | None) -> None:
    """Refuse what several processes cannot do in one run.

    Raises:
        ConfigError: It says what to leave out.
    """
    if config.model.device_map is not None:
        raise ConfigError("each process of torchrun has a GPU for the whole model; leave model.device_map out")
    if config.time_limit is not None or stop is not None:
        # The others would wait for one that leaves a step earlier.
        raise ConfigError(
            "the processes of torchrun cannot stop behind the same step; leave time_limit and stop out, and let the "
            "scheduler end the command and start it again: it continues behind the last edit on disk"
        )


def _stoppable(progress: Progress, stop: Stop) -> Progress:
    """Progress during which a run can be left where it takes hours before the first edit, and goes on from there."""

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, what)
        if what.startswith(collect.PROGRESS_LABEL):
            stop.advanced()  # it is saved when it is left
            stop.check()

    return report


def _leavable(progress: Progress, stop: Stop) -> Progress:
    """Progress of an editor, which leaves a computation as soon as someone asks. Nothing of it has been written yet."""

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, what)
        stop.check_request()

    return report


def _carry_out(
    prepared: PreparedRun, progress: Progress, stop: Stop, told: Trackers, loaded: tuple[Any, Any] | None
) -> None:
    config, folder = prepared.config, prepared.folder
    memory = PhaseMemory()
    with memory.phase("loading"):
        bench = dataclasses.replace(_bench(prepared, progress, stop, loaded), memory=memory)
    bench.editor.clock.watch = memory.phase
    folder.records(SECONDS)  # cuts a torn line off
    if config.dataset.known is not None:
        prepared = _chosen(prepared, bench)
        bench = dataclasses.replace(bench, cases=prepared.cases, known=_known(config, prepared.cases))
    bench, unfit = fitting(dataclasses.replace(bench, track=told.log))
    prepared = _without(prepared, bench.cases, unfit)
    stop.check()
    done = {record["case"] for record in folder.records(RECORDS, own_records(bench.cases))}
    check_room(bench, folder.path)
    with memory.phase("untouched"):
        before = _baseline(bench, folder)
    scores = _text_scores(bench, folder)

    def write(record: dict[str, Any], seconds: dict[str, float]) -> None:
        if seconds:
            folder.append(SECONDS, {"case": record["case"], **seconds})
        folder.append(RECORDS, scores.completed(record))

    try:
        protocols.protocol(config.protocol.name)(bench, before, done, write)
    except Stopped:
        folder.append(SECONDS, {"peaks": memory.peaks})
        raise
    folder.append(SECONDS, {"peaks": memory.peaks})
    records = folder.records(RECORDS)
    order = protocols.order_of_edits(config.protocol.name, bench.cases, records)
    check_complete(folder.path / RECORDS, records, order, may_end_early=_may_end_early(config))
    if ranks.rank() > 0:
        return  # the first sums up
    results = results_of(prepared, bench.model)
    points = summary.curve(folder.records(RECORDS)) if bench.log is None else bench.log.points
    folder.write_json(CURVE, points)
    report.write(folder, results, folder.records(RECORDS))
    folder.write_json(RESULTS, results)
    told.log(results["counts"]["edits"], {name: results[name] for name in ("summary", "collapse", "speed")})
    partial_results.forget(folder)
    folder.finish()


def _text_scores(bench: Bench, folder: RunFolder) -> TextScores:
    """What is measured on the texts of each record, with the judge and the reference texts that this takes."""
    config, source = bench.config, bench.config.dataset.references
    references = None if source is None else References.read(source)
    return TextScores(config, {case.id: case for case in bench.cases}, _verdicts(config, folder), references)


def _verdicts(config: BenchConfig, folder: RunFolder) -> Verdicts | None:
    """Return the judge of a run, with the verdicts that an earlier start has; None without a judge."""
    name = config.wild.judge
    if name is None:
        return None
    if name == judging.MODEL:
        model, tokenizer = models.load(str(config.wild.judge_model), device=config.device)
        judge = judging.model_judge(model, tokenizer, batch_tokens=config.scoring.batch_tokens)
    else:
        judge = judging.find_judge(name, trust_code=config.wild.trust_judge_code)
    known = {entry["claim"]: entry["verdict"] for entry in folder.records(VERDICTS)}
    return Verdicts(name, judge, known, partial(folder.append, VERDICTS))


def _bench(prepared: PreparedRun, progress: Progress, stop: Stop, loaded: tuple[Any, Any] | None) -> Bench:
    """The model with its editor, and what is asked of it."""
    config = prepared.config
    model, tokenizer = loaded or config.model.load(config.precision, config.device)
    method = editors.get(editor_name(config.editor))
    return Bench(
        config=config,
        editor=method(model, tokenizer, prepared.editor, progress=_leavable(progress, stop)),
        cases=prepared.cases,
        texts=prepared.texts,
        canonical=prepared.loaded.canonical,
        known=_known(config, prepared.cases),
        log=_log(prepared),
        stop=stop,
        progress=progress,
    )


def _chosen(prepared: PreparedRun, bench: Bench) -> PreparedRun:
    """Return the run with the cases whose fact the untouched model knows, or does not know."""
    config = prepared.config
    found = known_facts.choose_known(bench, prepared.folder, prepared.loaded, partial(case_selection.take, config))
    chosen = case_selection.with_priming(config, found.loaded)
    loaded, left_out = case_selection.without_other_subjects(config, chosen)
    settings = {**prepared.settings, "cases": case_selection.digest_of(loaded)}
    return dataclasses.replace(prepared, loaded=loaded, probes_apart=left_out, settings=settings, asked=found.counts)


def _log(prepared: PreparedRun) -> SequenceLog | None:
    """Return the log of a sequence; single edits need none, since each has its record."""
    if not is_sequence(prepared.config.protocol.name):
        return None
    model = prepared.config.model
    said = {"name": model.name, "revision": model.revision, "fingerprint": prepared.settings["model"]}
    return SequenceLog(prepared.folder, said)


def _baseline(bench: Bench, folder: RunFolder) -> Baseline:
    """What the untouched model says: asked once, in parts, also by a run that is killed and goes on."""

    def ask() -> dict[str, Any]:
        of_all = partial_results.PartialResults(folder, bench.stop, edits=0)
        watched = of_all.kept(partial(guard.untouched, bench))  # first, since it may refuse
        said = dataclasses.asdict(dataclasses.replace(baseline(bench, of_all.kept), guard=watched))
        folder.append(SECONDS, {"checkpoint": 0, "evaluation": of_all.seconds})
        return said

    return Baseline(**folder.keep(BEFORE, ask, partial(baseline_fault, bench.cases)))


def _may_end_early(config: BenchConfig) -> bool:
    """Whether the guard may end the run before its last case."""
    return is_sequence(config.protocol.name) and config.guard.name != "none" and config.guard.action == "stop"


def _without(prepared: PreparedRun, cases: Sequence[Case], unfit: Sequence[Dropped]) -> PreparedRun:
    """With the cases that this model can be asked; the others are named among the dropped."""
    if not cases:
        raise DatasetError(f"no case can be asked on this model; the first: {unfit[0].reason}", record=unfit[0].record)
    loaded = dataclasses.replace(prepared.loaded, cases=list(cases), dropped=[*prepared.loaded.dropped, *unfit])
    return dataclasses.replace(prepared, loaded=loaded)


def _known(config: BenchConfig, cases: Sequence[Case]) -> list[Probe]:
    """Return facts that a testbed's model knows; for other models no such list exists."""
    folder = models.locate(config.model.name)
    if config.collapse.known_facts == 0 or not isinstance(folder, Path) or not world.is_testbed(folder):
        return []
    probes = world.known_facts(folder)
    if is_sequence(config.protocol.name):
        probes = sequences.never_edited(probes, cases)
    if config.dataset.chat:
        probes = [dataclasses.replace(probe, chat=True) for probe in probes]
    return random.Random(config.seed).sample(probes, min(config.collapse.known_facts, len(probes)))
