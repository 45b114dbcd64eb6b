"""How fast whole runs of the bench are: edits, scores, free texts and perplexity, of `single` and `batch`.

Everything but loading, contexts and second moments is timed, on both paths. `model` and `data` of the settings name a
real model and a file of CounterFact; else the model is random and its records are made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from errata.benchmarks.bench import single_edits
from errata.benchmarks.bench.baseline import Baseline, baseline
from errata.benchmarks.bench.checkpoints import Checkpoints
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.sequence_log import EditOutcome
from errata.benchmarks.runs import environment
from errata.benchmarks.runs.phase_memory import PhaseMemory
from errata.benchmarks.speed import synthetic, whole_runs_reference
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, Timing, timed
from errata.editors import MEMIT, ROME
from errata.editors.core.editor import Editor
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.model.texts import read_texts
from errata.evaluate.probes import Case

E = TypeVar("E", bound=LocateThenEdit)
Records = Sequence[dict[str, Any]]


def compare(stage: Stage) -> list[TimedPair]:
    """`single` with ROME and `batch` with MEMIT, each against one record after another."""
    cases, texts = chosen_cases(stage), _texts(stage)
    kinds: dict[str, tuple[type[LocateThenEdit], float]] = {"single": (ROME, 5.0), "batch": (MEMIT, 7.0)}
    return [
        _compared(stage, protocol, method, cases, texts, stage.target(target, target))
        for protocol, (method, target) in kinds.items()
        if protocol in stage.config.protocols
    ]


def _compared(
    stage: Stage,
    protocol: str,
    method: type[LocateThenEdit],
    cases: Sequence[Case],
    texts: Sequence[str],
    target: float,
) -> TimedPair:
    editor = make_editor(stage, method)
    for layer in editor.layers:
        editor.factor(layer)
    watch, plain_watch = Watched(), Watched()
    bench = replace(_bench(stage, protocol, editor, cases, texts), memory=watch)
    with editor.applied(cases[0].request):  # the first products of a process pay for threads and page faults
        pass
    run = _single if protocol == "single" else _batch
    ours, fast = timed(lambda: run(bench))
    is_batch = protocol == "batch"
    few = replace(bench, cases=cases[: stage.config.plain_records], memory=plain_watch)
    plain, slow = timed(lambda: whole_runs_reference.run(few, editor, together=is_batch))
    share = len(cases) / len(few.cases)
    once = whole_runs_reference.spent_once(plain, together=is_batch)
    slow = Timing(*(share * (spent - once) + once for spent in (slow.seconds, slow.cpu_seconds)))
    before = next(iter(ours))["perplexity_before"]
    # A batch of fewer records is another edit.
    ours = ours[: len(few.cases)] if share == 1 or not is_batch else run(replace(few, texts=(), memory=Watched()))
    said = [text for record in ours for text in _texts_of(record)]
    theirs = [text for answers in plain for text in answers.texts]
    settings = {
        "requests": len(cases),
        "plain_requests": len(few.cases),
        "method": editor.name,
        "layers": list(editor.layers),
        "probes": sum(len(case.probes) for case in cases),
        "texts": len(texts),
        "perplexity_before": before,
        "different_texts": sum(a != b for a, b in zip(said, theirs, strict=True)) / max(1, len(said)),
        "parts_cpu_seconds": whole_runs_reference.parts(plain),
        "our_parts_cpu_seconds": watch.seconds,
        "peak_bytes": {"ours": watch.measured(), "plain": plain_watch.measured()},
    }
    apart = max(
        abs(a - b)
        for record, answers in zip(ours, plain, strict=True)
        for a, b in zip(_nlls(record), answers.nlls, strict=True)
    )
    largest = max(abs(nll) for answers in plain for nll in answers.nlls)
    return TimedPair("whole_runs", f"{method.__name__}, {protocol}", fast, slow, apart / largest, target, settings)


def make_editor(stage: Stage, method: type[E]) -> E:
    """The method with its own defaults on a real model; with made-up moments and contexts on a random one."""
    if stage.config.model is not None:
        return method(stage.model, stage.tokenizer, text=stage.config.text)
    moment = synthetic.Spectrum.power_law(stage.sizes[1], largest=1.0, seed=stage.config.seed).moment()
    moment = moment.float().to(stage.device)
    every = range(stage.architecture.n_layers)
    steps = stage.config.steps
    fields = {"v_num_grad_steps": steps, "context_templates": synthetic.contexts(stage.words, seed=stage.config.seed)}
    return method(stage.model, stage.tokenizer, fields, moments=dict.fromkeys(every, moment))


def chosen_cases(stage: Stage) -> list[Case]:
    """As many records as `records` of the settings says."""
    if stage.config.data is None:
        return synthetic.cases(stage.words, stage.config.records, stage.config.seed)
    from errata.benchmarks.datasets import registry

    return registry.load("counterfact", stage.config.data).cases[: stage.config.records]


def _texts(stage: Stage) -> list[str]:
    """As many texts for perplexity as `perplexity_texts` of the settings says."""
    count = stage.config.perplexity_texts
    if stage.config.text is None:
        return synthetic.texts(stage.words, count, stage.config.seed)
    return read_texts(stage.config.text, max_texts=count)


def _bench(stage: Stage, protocol: str, editor: Editor, cases: Sequence[Case], texts: Sequence[str]) -> Bench:
    values = {
        "editor": {"name": editor.name},
        "model": {"name": "of the stage"},
        "dataset": {"name": "counterfact"},
        "protocol": {"name": protocol},
        "batch_size": len(cases),
        "seed": stage.config.seed,
    }
    return Bench(BenchConfig.of(values), editor, cases, texts=texts)


def _single(bench: Bench) -> Records:
    records: list[dict[str, Any]] = []
    with bench.memory.phase("untouched"):
        before = baseline(bench)
    single_edits.single(bench, before, (), lambda record, _: records.append(record))
    return records


def _batch(bench: Bench) -> Records:
    with bench.memory.phase("untouched"):
        before: Baseline = baseline(bench)
    with bench.memory.phase("edits"):
        edit = bench.editor.apply([case.request for case in bench.cases])
    try:
        asked = Checkpoints(bench, before, _NoLog())  # type: ignore[arg-type]
        with bench.memory.phase("evaluation"):
            return asked.evaluated([EditOutcome({})] * len(bench.cases), is_end=True)[0]
    finally:
        edit.undo()


class Watched(PhaseMemory):
    """The peaks of memory and the CPU seconds of each phase.

    Attributes:
        resident: Bytes in use before the first phase.
        seconds: CPU seconds by the name of the phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resident: int | None = None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.resident is None:
            environment.take_peak_memory()
            self.resident = environment.take_peak_memory()  # since that call, which is what is in use now
        started = time.process_time()
        try:
            with super().phase(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

    def measured(self) -> dict[str, int | None]:
        """Return the peaks in bytes, and as "before" what was in use before the first phase."""
        return {"before": self.resident, **self.peaks}


class _NoLog:
    """The log of a run that keeps no files."""

    def parts(self, *_: Any) -> _NoLog:
        return self

    def kept(self, make: Callable[[], Any]) -> Any:
        return make()

    def seconds(self, *_: Any) -> None:
        pass


def _texts_of(record: dict[str, Any]) -> list[str]:
    return [probe["after"]["text"] for probe in record["probes"] if probe["after"]["text"] is not None]


def _nlls(record: dict[str, Any]) -> list[float]:
    """Every negative log-probability of a record, target before other."""
    said = [probe["after"] for probe in record["probes"]]
    return [one[name] for one in said for name in ("nll_target", "nll_other") if one[name] is not None]
