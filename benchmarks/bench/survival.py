"""What is left of edits once the merged model is rounded to a few bits: `errata survive`.

    study = SurvivalStudy(SurvivalPlan(compress=({"name": "rtn"}, {"name": "gptq"})))
    found = study.measure(BenchConfig.of(values))

It does what a user does. Edits are made in float32, a group of facts at a time. `write_merged` writes the model with
them, as `errata export merged=FOLDER` does, in float32 and in bfloat16. The folder is loaded again, each compression is
applied to it, and the same probes are asked behind every step.

All models are asked in float32, so that steps differ by their weights alone: those of a folder in bfloat16 are read
as float32, which changes none of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from errata import editors, models
from errata.benchmarks.bench.attempts import REFUSALS, reason_of
from errata.benchmarks.bench.config import BenchConfig, editor_name
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import fitting, held_out_texts
from errata.benchmarks.bench.preparation import PreparedRun, prepare, run_names
from errata.benchmarks.bench.update_on_grid import GridUpdate, edited_maps, update_on_grid
from errata.benchmarks.reports.survival import EDITED, METRICS, UNTOUCHED
from errata.benchmarks.runs.json_values import digest, encodable
from errata.editors.core.errors import ConfigError, DisablingEditWarning
from errata.editors.core.files.atomic import make_folder, write_atomically
from errata.editors.core.files.plain_files import read_json
from errata.editors.core.interventions import registry
from errata.editors.core.interventions.intervention import Intervention
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.progress import Progress, silent, without_bars
from errata.editors.core.storage.merged_export import check_exportable, write_merged
from errata.evaluate.metrics import case_values, outcomes
from errata.evaluate.probes import Case, rounds
from errata.evaluate.scoring import ProbeScore, score

SCORINGS = ("probability", "teacher_forced")
PRECISIONS = ("float32", "bfloat16")
_KINDS = ("rewrite", "paraphrase", "neighborhood")
_DIGITS = 12  # of the digest in a file's name


@dataclass(frozen=True)
class SurvivalPlan:
    """What the edited models go through.

    Attributes:
        compress: Name and fields of each compression, as `compose.compress` has them.
        merged: Precisions of the merged models.
        group: Facts that one edited model carries; 0: all.

    Raises:
        ConfigError: A compression or a precision is unknown or stands twice, or there is no precision.
    """

    compress: Sequence[Mapping[str, Any]] = ({"name": "rtn"}, {"name": "gptq"})
    merged: tuple[str, ...] = PRECISIONS
    group: int = 0

    def __post_init__(self) -> None:
        if not self.merged or not set(self.merged) <= set(PRECISIONS):
            raise ConfigError(f"merged: expected {' or '.join(PRECISIONS)}, got {','.join(self.merged) or 'none'}")
        if len(set(self.merged)) < len(self.merged):
            raise ConfigError(f"merged: expected each precision once, got {','.join(self.merged)}")
        if self.group < 0:
            raise ConfigError(f"group: expected a number of facts, or 0 for all, got {self.group}")
        self.compressions()

    def compressions(self) -> dict[str, Intervention]:
        """Return the compressions by name."""
        found = {}
        for said in self.compress:
            kind = registry.get(str(said["name"]), "compress")
            if kind.name in found:
                raise ConfigError(f"compress: expected each compression once, got {kind.name} twice")
            fields = {name: value for name, value in said.items() if name != "name"}
            found[kind.name] = kind(kind.Config.from_dict(fields, path="compress."))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"compress": [dict(said) for said in self.compress], "merged": list(self.merged), "group": self.group}


@dataclass
class _Measured:
    """What one state of the model has, summed over groups: values by scoring and metric, one per fact in its order."""

    values: dict[str, dict[str, list[float | None]]] = field(
        default_factory=lambda: {scoring: {metric: [] for metric in METRICS} for scoring in SCORINGS}
    )
    perplexity: list[float | None] = field(default_factory=list)

    def add(self, cases: Sequence[Case], scores: Sequence[Sequence[ProbeScore]], perplexity: float | None) -> None:
        for case, own in zip(cases, scores, strict=True):
            found = case_values(outcomes(case, own))
            for scoring, metrics in self.values.items():
                for metric, values in metrics.items():
                    values.append(found.get(scoring, {}).get(metric))
        self.perplexity.append(perplexity)


class SurvivalStudy:
    """Edits by several methods on one model, merged and compressed.

    Args:
        plan: What the edited models go through.
        out: A folder for the numbers of each method, which are read from there where they were measured already;
            None: nothing is kept.
        progress: Told how many groups are done.
    """

    def __init__(self, plan: SurvivalPlan, *, out: Path | None = None, progress: Progress = silent) -> None:
        self._plan, self._out, self._progress = plan, out, progress
        self._models: dict[str, tuple[Any, Any]] = {}
        self._controls: dict[str, dict[str, Any]] = {}

    def measure(self, config: BenchConfig) -> dict[str, Any]:
        """Make, merge and compress the edits of a configuration, and return what was measured.

        Args:
            config: Its method, model and cases count; its protocol does not.

        Returns:
            {"names", "n", "facts", "plan", "refused", "same_weights", "steps", "grid"}: `steps` has values per fact by
            step, such as "edited", "bfloat16" or "bfloat16 gptq"; `grid` how the updates lie on each grid.

        Raises:
            ConfigError: The precision is not float32, or the cases are drawn by what the model knows.
            ExportError: No file of weights can hold the edits of this method.
        """
        if config.precision not in (None, "float32"):
            raise ConfigError(f"edits are made in float32 here; leave precision={config.precision} out")
        if config.dataset.known is not None:
            raise ConfigError("dataset.known is for errata bench; name the cases by dataset.ids")
        prepared = prepare(replace(config, precision="float32"))
        settings = {"run": prepared.settings, "plan": self._plan.as_dict()}
        key = digest(settings)
        path = None if self._out is None else self._out / f"{editor_name(config.editor)}-{key[:_DIGITS]}.json"
        if path is not None and path.is_file():
            return read_json(path)
        found = encodable({**self._measured(prepared), "settings": key})
        if path is not None:
            make_folder(path.parent)
            write_atomically(path, (json.dumps(found) + "\n").encode())
        return found

    def _model(self, config: BenchConfig, precision: str) -> tuple[Any, Any]:
        """Return the untouched model in a precision, loaded once."""
        key = f"{config.model} {precision} {config.device}"
        if key not in self._models:
            self._models[key] = config.model.load(precision, config.device)
        return self._models[key]

    def _measured(self, prepared: PreparedRun) -> dict[str, Any]:
        config = prepared.config
        model, tokenizer = self._model(config, "float32")
        made = editors.get(editor_name(config.editor))(model, tokenizer, prepared.editor)
        cases = [replace(case, probes=tuple(p for p in case.probes if p.kind in _KINDS)) for case in prepared.cases]
        bench, _ = fitting(Bench(config=config, editor=made, cases=cases, texts=prepared.texts))
        run = _MethodRun(bench, self._plan, lambda precision: self._model(config, precision)[0])
        # What decides the untouched model's numbers, whatever the method is.
        same = [prepared.settings[name] for name in ("model", "computed", "cases", "texts")]
        key = digest([[case.id for case in bench.cases], self._plan.as_dict(), config.collapse.tokens, same])
        size = self._plan.group or len(bench.cases)
        starts = range(0, len(bench.cases), size)
        try:
            for done, start in enumerate(starts):
                run.group(bench.cases[start : start + size])
                self._progress(done + 1, len(starts), "groups of edits, merged and compressed")
        finally:
            made.rollback()
        if key not in self._controls:
            self._controls[key] = run.controls()
        return {
            "names": run_names(config),
            "n": len(bench.cases),
            "facts": [case.id for case in bench.cases],
            "groups": len(starts),
            "plan": self._plan.as_dict(),
            **run.result(self._controls[key]),
        }


class _MethodRun:
    """The edits of one method, group after group."""

    def __init__(self, bench: Bench, plan: SurvivalPlan, base: Any) -> None:
        self._bench, self._plan, self._base = bench, plan, base
        self._steps: dict[str, _Measured] = {}
        self._refused: dict[str, str] = {}
        self._same = True
        self._grid: dict[str, list[GridUpdate]] = {}

    def group(self, cases: Sequence[Case]) -> None:
        """Edit a group of facts, and measure the edited, the merged and the compressed models; then undo the edits."""
        bench = self._bench
        bench.editor.rollback()
        self._edit(cases)
        bench.editor.finish()
        entries = bench.editor.ledger.entries
        if entries:
            check_exportable(entries)
        self._ask(EDITED, bench.model, cases)
        for precision in self._plan.merged:
            self._merged(precision, entries, cases)
        bench.editor.rollback()

    def _edit(self, cases: Sequence[Case]) -> None:
        """Edit all facts together, as the method does several; of a group that is refused, each fact by itself."""
        editor = self._bench.editor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DisablingEditWarning)
            try:
                together = rounds(cases)
                if len(together) == 1:
                    editor.apply(*together)
                else:
                    editor.compute_together(together).apply()
            except REFUSALS as error:
                if len(cases) == 1:
                    self._refused[cases[0].id] = reason_of(error)
                    return
                for case in cases:
                    self._edit([case])

    def _merged(self, precision: str, entries: Sequence[Entry], cases: Sequence[Case]) -> None:
        bench, device = self._bench, self._bench.config.device
        with TemporaryDirectory() as scratch, without_bars():
            folder = Path(scratch) / "merged"
            base = self._base(precision)
            if entries:
                write_merged(base, entries, folder, bench.tokenizer)
            else:  # every edit was refused
                base.save_pretrained(folder)
                bench.tokenizer.save_pretrained(folder)
            merged, _ = models.load(folder, dtype="float32", device=device)
        if precision == "float32":
            self._same &= _same_weights(merged, bench.model)
        self._ask(precision, merged, cases)
        maps = edited_maps(merged, entries)
        texts = [(request.text, request.chat) for case in cases for request in case.requests]
        before = {name: found.weight.clone() for name, found in maps.items()}
        for name, compression in self._plan.compressions().items():
            applied = compression.apply(merged, bench.tokenizer)
            self._ask(f"{precision} {name}", merged, cases)
            if maps and precision == self._plan.merged[0]:
                found = update_on_grid(bench.editor.ledger, merged, bench.tokenizer, maps, before, applied, texts)
                self._grid.setdefault(name, []).append(found)
            applied.undo()

    def controls(self) -> dict[str, Any]:
        """Return what the untouched model has, as it is and compressed."""
        bench = self._bench
        bench.editor.rollback()
        kept, self._steps = self._steps, {}
        self._ask(UNTOUCHED, bench.model, bench.cases)
        for name, compression in self._plan.compressions().items():
            applied = compression.apply(bench.model, bench.tokenizer)
            try:
                self._ask(f"{UNTOUCHED} {name}", bench.model, bench.cases)
            finally:
                applied.undo()
        made, self._steps = _plain(self._steps), kept
        return made

    def _ask(self, step: str, model: Any, cases: Sequence[Case]) -> None:
        bench = self._bench
        probes = [probe for case in cases for probe in case.probes]
        scores = iter(score(model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens))
        own = [[next(scores) for _ in case.probes] for case in cases]
        asked = replace(bench, editor=_AsEditor(model, bench.tokenizer))  # pyright: ignore[reportArgumentType]
        texts = held_out_texts(asked, bench.config.collapse.tokens)
        self._steps.setdefault(step, _Measured()).add(cases, own, None if texts is None else texts.perplexity().value)

    def result(self, controls: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was measured, beside what the untouched model has."""
        return {
            "refused": self._refused,
            "same_weights": self._same if "float32" in self._plan.merged else None,
            "steps": {**controls, **_plain(self._steps)},
            "grid": {name: GridUpdate.together(own) for name, own in self._grid.items()},
        }


@dataclass(frozen=True)
class _AsEditor:
    """A model where the bench looks for it."""

    model: Any
    tokenizer: Any


def _plain(steps: Mapping[str, _Measured]) -> dict[str, Any]:
    return {name: {"values": own.values, "perplexity": own.perplexity} for name, own in steps.items()}


def _same_weights(one: Any, other: Any) -> bool:
    """Return whether two models have the same weights, bit for bit."""
    theirs = dict(other.named_parameters())
    return all(torch.equal(weight, theirs[name]) for name, weight in one.named_parameters())
