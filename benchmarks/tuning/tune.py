"""One run of `errata tune`: settings of a method for a model, found on a few facts and compared on others.

    folder = run(TuneConfig.of(values))

1. Some facts that the model knows are traced (benchmarks/tracing/traced_layers.py).
2. Settings are tried on development facts, one field after another, each by a run of the bench with single edits. A
   value replaces the present one if it is better by more than the noise of so few facts: if the 68 % interval of the
   paired gain, which is about one standard error, lies above 0.
3. The settings found and those of the beginning edit facts that neither the trace nor the search has seen. Where the
   settings found are no better there, the search has fitted its own facts, and the settings of the beginning stay.

The folder holds errata.json with the settings, tune.json with everything that was measured, tune.png, the ids of both
sets of facts, and runs/. Every run is found again by its configuration, so that the same command goes on where it was
stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from errata import editors, models
from errata.benchmarks.bench import auto_layers
from errata.benchmarks.bench.auto_layers import layers_of
from errata.benchmarks.bench.config import BenchConfig, editor_config, editor_name
from errata.benchmarks.bench.execution import carry_out
from errata.benchmarks.bench.preparation import prepare
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.datasets import registry
from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.runs.results import read_records
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS
from errata.benchmarks.runs.stopping import Stop
from errata.benchmarks.tracing.trace_summary import facts_of
from errata.benchmarks.tracing.traced_layers import TracedLayers, traced_layers
from errata.benchmarks.tuning import pictures, summaries
from errata.benchmarks.tuning.candidates import LAYERS, fields_to_search, layer_candidates, value_candidates
from errata.benchmarks.tuning.setting_scores import Values, fact_values, gain_of, metric_means, score_of
from errata.editors.core.config import check_layers
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.files import locks
from errata.editors.core.files.atomic import make_folder, write_atomically
from errata.editors.core.files.plain_files import read_json
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.model_settings import FILE, read_model_settings
from errata.editors.core.progress import Progress, silent
from errata.evaluate.intervals import Interval
from errata.evaluate.probes import Case

NUMBERS, PICTURE, RUNS = "tune.json", "tune.png", "runs"
DEVELOPMENT, UNSEEN = "development.json", "unseen.json"
# A value replaces the present one if this interval of its gain lies above 0.
KEPT_CONFIDENCE = 0.68
_LAYERS_AT_ONCE = 8  # whose second moments are in memory together

Report = Callable[["Tried"], object]


@dataclass(frozen=True)
class Tried:
    """A setting that was measured.

    Attributes:
        part: "development" or "unseen".
        name: The field that it differs in from the settings so far; "start" or "found" otherwise.
        value: Its value.
        folder: Of its run.
        facts: The smooth values of each fact, by case.
        score: Their harmonic mean, with its interval.
        gain: By how much the score is higher than that of the settings so far, with a paired interval; None of the
            first.
        is_kept: Whether it has replaced them.
        results: results.json of the run.
    """

    part: str
    name: str
    value: Any
    folder: Path
    facts: Mapping[str, Values]
    score: Interval
    gain: Interval | None
    is_kept: bool
    results: Mapping[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: of the run, what comparisons of settings read."""
        found, speed = self.results, self.results["speed"]
        return {
            "part": self.part,
            "name": self.name,
            "value": self.value,
            "run": self.folder.name,
            "layers": found["layers"],
            "score": self.score.as_dict(),
            "gain": None if self.gain is None else self.gain.as_dict(),
            "kept": self.is_kept,
            "metrics": metric_means(list(self.facts.values())),
            "papers": found["papers"],
            "collapse": found["collapse"],
            "counts": found["counts"],
            "cpu_seconds_per_edit": speed["cpu_seconds_per_edit"],
            "total_seconds": speed["total_seconds"],
        }


def run(
    config: TuneConfig, *, progress: Progress = silent, report: Report = lambda _: None, stop: Stop | None = None
) -> Path:
    """Search for settings, or go on with a search that was stopped.

    Args:
        config: As `errata tune` takes it.
        progress: Called behind every traced fact and every edit.
        report: Called with every setting that was measured, and again with one that is kept.
        stop: Asked between edits whether to stop there.

    Returns:
        `config.out`, with errata.json in it.

    Raises:
        ConfigError: a value that does not fit, a method without settings to search, another process in the same folder.
        DatasetError: a dataset that cannot be read, or too few cases.
        Stopped: `stop` asked for it, or the time limit; the same configuration goes on from there.
    """
    folder = Path(config.out)
    base = _base(config)
    own = models.locate(config.model.name)
    if isinstance(own, Path) and own.is_dir() and folder.exists() and folder.samefile(own):
        raise ConfigError("out: expected another folder than the model's own; copy errata.json there when it is done")
    development, unseen, rest = _parts(config, base)
    make_folder(folder)
    with _held(folder):
        for name, cases in ((DEVELOPMENT, development), (UNSEEN, unseen)):
            write_atomically(folder / name, (json.dumps([case.id for case in cases]) + "\n").encode())
        search = _Search(config, base, folder, development, unseen, rest, progress, report, stop or Stop())
        write_atomically(folder / NUMBERS, _json(result := search.result()))
        write_atomically(folder / PICTURE, pictures.picture(result))
        _write_settings(folder, editor_name(config.editor), result["settings"])
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Read the tune.json of a finished search."""
    return json.loads((folder / NUMBERS).read_text(encoding="utf-8"))


def _json(value: Any) -> bytes:
    return (json.dumps(encodable(value), indent=2, allow_nan=False) + "\n").encode()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder against a second search.

    Raises:
        ConfigError: another process is at work there.
    """
    try:
        with locks.hold(folder / ".lock", 1.0, named=True):
            yield
    except locks.LockHeldError as error:
        raise ConfigError(
            f"{locks.described(error.owner)} is at work in {folder}; wait for it, or give another `out=`"
        ) from None


def _base(config: TuneConfig) -> BenchConfig:
    """Return the configuration that the runs of the search share, checked without the model."""
    split = config.dataset.split if registry.has_halves(config.dataset.name) else None
    base = BenchConfig(
        editor=config.editor,
        model=config.model,
        dataset=dataclasses.replace(config.dataset, split=split),
        batch_size=config.batch_size,
        seed=config.seed,
        precision=config.precision,
        device=config.device,
        time_limit=config.time_limit,
        generation=config.generation,
        scoring=config.scoring,
        collapse=config.collapse,
        confidence=config.confidence,
    )
    base = auto_layers.with_layers(base)
    editor_config(base.editor, base.model, seed=base.seed)
    known = [entry.name for entry in dataclasses.fields(editors.get(editor_name(base.editor)).Config)]
    fields_to_search(config, known, has_layers="layers" in known)
    count = models.layer_count(config.model.name, config.model.revision)
    if count is not None and config.layers != "all":
        check_layers(config.layers or (0,), count)
    return base


def _parts(config: TuneConfig, base: BenchConfig) -> tuple[list[Case], list[Case], list[Case]]:
    """Return the development cases, the unseen ones, and those that may be traced.

    The unseen ones share no subject with any of the others.

    Raises:
        DatasetError: there are too few.
    """
    data = base.dataset
    loaded = registry.load(
        data.name,
        data.path,
        target=data.target,
        split=data.split,
        ids=data.ids,
        order=data.order,
        seed=config.seed if data.shuffle else None,
        options=data.options or None,
        needs_subject=editors.get(editor_name(base.editor)).needs_subject,
        chat=data.chat,
    )
    development, others = loaded.cases[: config.n_edits], loaded.cases[config.n_edits :]
    seen = frozenset().union(*(case.subjects for case in development))
    unseen = [case for case in others if not case.subjects & seen][: config.n_unseen]
    for name, wanted, got in (("n_edits", config.n_edits, development), ("n_unseen", config.n_unseen, unseen)):
        if len(got) < wanted:
            raise DatasetError(f"{name}={wanted}, but only {len(got)} cases can be had for it", path=data.path)
    names, hidden = {case.id for case in unseen}, frozenset().union(*(case.subjects for case in unseen))
    rest = [case for case in loaded.cases if case.id not in names and not case.subjects & hidden]
    return development, unseen, rest


def _write_settings(folder: Path, method: str, fields: Mapping[str, Any]) -> None:
    """Write errata.json. What an earlier search has found there for other methods stays."""
    others = dict(read_model_settings(folder).editors)
    write_atomically(folder / FILE, _json({"editors": {**others, method: dict(fields)}}))


@dataclass(frozen=True)
class _Search:
    """The search at work."""

    config: TuneConfig
    base: BenchConfig
    folder: Path
    development: Sequence[Case]
    unseen: Sequence[Case]
    rest: Sequence[Case]
    progress: Progress
    report: Report
    stop: Stop

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded once for all runs."""
        return self.base.model.load(self.base.precision, self.base.device)

    def editor(self, fields: Mapping[str, Any]) -> Editor:
        """Return the method with some fields on the model, for what it makes of them."""
        base = self.base
        method = editors.get(editor_name(base.editor))
        return method(*self.loaded, editor_config(fields, base.model, seed=base.seed))

    def result(self) -> dict[str, Any]:
        """Return everything that tune.json holds."""
        start = dict(self.base.editor)
        first = self.editor(start)
        known = [entry.name for entry in dataclasses.fields(first.config)]
        names = fields_to_search(self.config, known, has_layers="layers" in known)
        traced = self._traced() if LAYERS in names and self.config.n_traced else None
        tried = [self._measured("development", "start", None, start)]
        found, best = start, tried[0]
        for name in names:
            stage = self._stage(name, found, best, traced)
            tried += stage
            if kept := [one for one in stage if one.is_kept]:
                best = kept[0]
                found = {**found, name: best.value}
        ends = self._ends(start, found)
        kept_fields = found if not ends or ends["gain"].mean > 0 else start
        return {
            **summaries.heading(self.config, self.base, self.loaded[0]),
            "fields": names,
            "start": {"layers": list(layers_of(first)) if "layers" in known else None, **_plain(start)},
            "found": _plain(found),
            "settings": self._settings(kept_fields, names),
            "is_changed": found != start,
            "is_kept": kept_fields == found,
            "trace": summaries.of_trace(traced, self.config),
            "localisation": summaries.localisation(traced, self._layers_tried(tried, first), self.config),
            "tried": [one.as_dict() for one in [*tried, *ends.get("runs", ())]],
            "development": summaries.gain(best, tried[0], self.config),
            "unseen": None if not ends else summaries.gain(ends["runs"][-1], ends["runs"][0], self.config),
        }

    def _traced(self) -> TracedLayers:
        return traced_layers(
            *self.loaded,
            facts_of(self.rest),
            n_facts=self.config.n_traced,
            named=auto_layers.naming(self.base),
            seed=self.config.seed,
            progress=self._told,
        )

    def _stage(self, name: str, present: Mapping[str, Any], best: Tried, traced: TracedLayers | None) -> list[Tried]:
        """Measure the values of one field; at most one of them is kept."""
        editor = self.editor(present)
        if name == LAYERS:
            by_rule = layers_of(self.editor({**present, LAYERS: None}))
            start, count = layers_of(editor), editor.architecture.n_layers
            values: list[Any] = [list(w) for w in layer_candidates(self.config, traced, count, start, by_rule)]
            self._collect_moments(present, sorted({layer for choice in (start, *values) for layer in choice}))
        else:
            value = getattr(editor.config, name)
            filled = editor.filled_in.get(name) if value is None else value
            values = value_candidates(self.config, name, filled)
        stage = [self._measured("development", name, value, {**present, name: value}, best) for value in values]
        better = [one for one in stage if self._is_better(one, best)]
        chosen = max(better, key=lambda one: one.score.mean, default=None)
        stage = [dataclasses.replace(one, is_kept=one is chosen) for one in stage]
        if kept := [one for one in stage if one.is_kept]:
            self.report(kept[0])
        return stage

    def _collect_moments(self, present: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Read the text for second moments once for several layers, where each run would read it for its own."""
        for first in range(0, len(layers), _LAYERS_AT_ONCE):
            some = list(layers[first : first + _LAYERS_AT_ONCE])
            editor = self.editor({**present, LAYERS: some})
            if isinstance(editor, LocateThenEdit) and editor.config.mom2_adjustment:
                editor.moment(some[0])

    def _is_better(self, one: Tried, best: Tried) -> bool:
        """Return whether a setting is better by more than the noise of so few facts."""
        mine, other = list(one.facts.values()), list(best.facts.values())
        return gain_of(mine, other, seed=self.config.seed, confidence=KEPT_CONFIDENCE).low > 0

    def _ends(self, start: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the settings of the beginning and those found on unseen facts; nothing without such facts."""
        if not self.unseen:
            return {}
        first = self._measured("unseen", "start", None, start)
        if found == start:
            last = dataclasses.replace(first, name="found", gain=Interval(0.0, 0.0, 0.0, len(self.unseen)))
            return {"runs": [last], "gain": last.gain}
        last = self._measured("unseen", "found", None, found, first)
        return {"runs": [first, last], "gain": last.gain}

    def _measured(
        self, part: str, name: str, value: Any, fields: Mapping[str, Any], base: Tried | None = None
    ) -> Tried:
        """Edit the facts of a part with some settings, or read what an earlier start has measured."""
        file, cases = (UNSEEN, self.unseen) if part == "unseen" else (DEVELOPMENT, self.development)
        data = dataclasses.replace(self.base.dataset, ids=str(self.folder / file), order="ids", shuffle=False)
        config = dataclasses.replace(
            self.base, editor=dict(fields), dataset=data, n_edits=len(cases), out=str(self.folder / RUNS)
        )
        prepared = prepare(config)
        loaded = None if prepared.folder.done else self.loaded
        path = carry_out(prepared, progress=self._told, stop=self.stop, loaded=loaded)
        if loaded is not None and Ledger.of(loaded[0]).entries:
            raise AssertionError(
                "a run of single edits has left an edit on the model"
            )  # ours: later runs would be wrong
        records = sorted(read_records(path / RECORDS), key=lambda record: record["place"])
        facts = {record["case"]: fact_values(record) for record in records}
        options: dict[str, Any] = {"seed": self.config.seed, "confidence": self.config.confidence}
        score = score_of(list(facts.values()), **options)
        gain = None if base is None else gain_of(list(facts.values()), list(base.facts.values()), **options)
        found = Tried(part, name, value, path, facts, score, gain, base is None, read_json(path / RESULTS))
        self.report(found)
        return found

    def _told(self, done: int, total: int, what: str) -> None:
        self.stop.check_request()  # also while facts are traced
        self.progress(done, total, "edits with these settings" if what == "edits" else what)

    def _layers_tried(self, tried: Sequence[Tried], first: Editor) -> list[tuple[list[int], Tried]]:
        """Return the layers that were tried with the other settings of the beginning, from below."""
        rows = [(list(one.value), one) for one in tried if one.name == LAYERS]
        if rows:
            rows.append((list(layers_of(first)), tried[0]))
        return sorted(rows, key=lambda row: row[0])

    def _settings(self, fields: Mapping[str, Any], searched: Sequence[str]) -> dict[str, Any]:
        """Return what errata.json says of the method, so that edits are made as they were scored.

        It has the fields that were searched or given, and those that differ from the method's defaults, as they may
        by the model's own errata.json. Files and texts are left out, which errata.json cannot name.
        """
        editor = self.editor(fields)
        plain, default = editor.config.to_dict(), type(editor.config)().to_dict()
        if LAYERS in plain and plain[LAYERS] is None and LAYERS in searched:
            plain[LAYERS] = list(layers_of(editor))
        elsewhere = {"seed", "mom2_dataset", *editor.config.FILES, *editor.config.TEXTS}
        told = {*searched, *fields} | {name for name, value in plain.items() if value != default.get(name)}
        return {name: _plain_value(plain[name]) for name in plain if name in told - elsewhere}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in fields.items() if name != "name"}


def _plain_value(value: Any) -> Any:
    return [_plain_value(entry) for entry in value] if isinstance(value, list | tuple) else value
