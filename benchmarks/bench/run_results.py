"""What results.json holds: the configuration of a run, its digests, its summary, and warnings for a reader."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from errata import editors
from errata.benchmarks.bench import checkpoints, input_digests
from errata.benchmarks.bench.baseline import BEFORE
from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.composition_results import composition_results
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.bench.preparation import PreparedRun, run_names
from errata.benchmarks.bench.sequence_log import CHECKPOINTS
from errata.benchmarks.bench.sequences import interval_ends
from errata.benchmarks.bench.strength_results import strength_results, strength_warnings
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.runs import environment, priming_summary, summary
from errata.benchmarks.runs.results import SCHEMA_VERSION
from errata.benchmarks.runs.run_folder import RECORDS, SECONDS
from errata.editors.core.doubts import ADVICE, MEANINGS
from errata.editors.core.extensions import added_packages
from errata.editors.core.work_clock import OF_SINGLE_METHODS, ONE_OFF
from errata.evaluate import overlap


def results_of(prepared: PreparedRun, model: Any) -> dict[str, Any]:
    config, folder = prepared.config, prepared.folder
    records, seconds = folder.records(RECORDS), folder.records(SECONDS)
    summed = summary.summarise(records, dataset=config.dataset.name, confidence=config.confidence, seed=config.seed)
    doubts = summary.doubted(records)
    counts = {
        **summed.counts,
        "not_made": len(prepared.cases) - len(records),
        "dropped": len(prepared.loaded.dropped),
        **_without_subject(prepared.loaded),
        "probes_apart": prepared.probes_apart,
        **prepared.asked,
    }
    machine, strengths = environment.machine(model), strength_results(prepared)
    return {
        "schema_version": SCHEMA_VERSION,
        "names": run_names(config),
        "sequence": is_sequence(config.protocol.name),
        "command": command(config, prepared.editor),
        "config": {**prepared.settings["config"], "out": config.out, "time_limit": config.time_limit},
        "digests": {
            "settings": folder.key,
            **{name: prepared.settings[name] for name in ("model", "cases", "texts", *input_digests.NAMES)},
            **{name: prepared.settings[name] for name in input_digests.FURTHER if name in prepared.settings},
        },
        "versions": {**environment.versions(), **added_packages()},
        "machine": machine,
        "layers": _layers(records),
        "trust_remote_code": config.model.trust_remote_code,
        **_judge(config),
        "counts": counts,
        "took": sum(map(summary.took, records)),
        "doubts": doubts,
        **_left_out(prepared.loaded),
        "dropped": [dataclasses.asdict(entry) for entry in prepared.loaded.dropped[:100]],
        "failures": summed.failures,
        "summary": summed.after,
        "before": summed.before,
        "papers": summed.papers,
        **_intervals(config, records),
        "collapse": summed.collapse,
        **_writing(prepared, records),
        **_priming(config, records),
        "ability": _ability(prepared),
        "evaluation": _evaluation(prepared, records),
        "speed": _speed(seconds),
        "peak_memory_by_phase": _peaks(seconds),
        **strengths,
        **composition_results(prepared),
        "warnings": [
            *strength_warnings(strengths),
            *_quantised(machine),
            *_warnings(prepared, counts, doubts),
            *_alone(records),
        ],
    }


def _intervals(config: BenchConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of each interval of time by itself; nothing of datasets that have none."""
    found = summary.intervals(records, confidence=config.confidence, seed=config.seed)
    return {"intervals": found} if found else {}


def _judge(config: BenchConfig) -> dict[str, Any]:
    """Who judged the answers, and whether by code that was named on the command line; nothing without a judge."""
    wild = config.wild
    if wild.judge is None:
        return {}
    return {"judge": {"name": wild.judge, "model": wild.judge_model, "trust_judge_code": wild.trust_judge_code}}


def _writing(prepared: PreparedRun, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fluency and consistency in the papers' form; nothing where they were not measured."""
    found = summary.writing(records, confidence=prepared.config.confidence, seed=prepared.config.seed)
    return {"writing": {moment: table["papers"] for moment, table in found.items()}} if found else {}


def _priming(config: BenchConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far the answers leak into other contexts; nothing where it was not measured."""
    found = priming_summary.summarise(records, confidence=config.confidence, seed=config.seed)
    return {"priming": found} if found else {}


def _cut_targets(prepared: PreparedRun) -> tuple[int, int]:
    """Return how many wanted answers hold a string that ends an answer, and of how many."""
    kinds = ("rewrite", "paraphrase")
    targets = [p.target for case in prepared.cases for p in case.probes if p.kind in kinds and p.target is not None]
    return sum(any(end in target for end in prepared.config.wild.stop) for target in targets), len(targets)


def _without_subject(loaded: Loaded) -> dict[str, int]:
    """How many records were dropped for want of a subject; nothing where none was."""
    count = sum("subject" in entry.field or "the subject" in entry.reason for entry in loaded.dropped)
    return {"dropped_without_subject": count} if count else {}


def _evaluation(prepared: PreparedRun, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the model was asked: how many edits were scored in one batch, how much text a perplexity read, and how many
    edits a checkpoint asked about. Of what an older version measured, not all is known."""
    config = prepared.config
    (before,) = prepared.folder.records(BEFORE)
    read, part = before["value"].get("perplexity_tokens"), before["value"].get("part")
    found: dict[str, Any] = {"perplexity_tokens": read}
    if config.wild.tokens:
        found["targets_with_stop_string"], found["targets"] = _cut_targets(prepared)
    if config.generation.overlap:
        found["overlap"] = {name: environment.version(name) for name in overlap.PACKAGES}
    if is_sequence(config.protocol.name):
        size = checkpoints.sample_size(config.eval_sample, len(prepared.cases), config.eval_every)
        found["checkpoint_perplexity_tokens"] = read if part is None else part["tokens"]
        is_asked = config.eval_every or config.eval_at or interval_ends(prepared.cases)
        found["checkpoint_sample"] = min(size, len(prepared.cases)) if is_asked else None
        return found
    sizes = Counter(record["together"] for record in records if "together" in record)
    found["edits_scored_together"] = {str(size): sizes[size] for size in sorted(sizes)}
    return found


def _alone(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say why single edits were scored one by one."""
    reasons = Counter(record["alone"] for record in records if "alone" in record)
    return [f"{_were(count, 'edit')} scored one by one: {reason}" for reason, count in reasons.items()]


def _left_out(loaded: Loaded) -> dict[str, Any]:
    """Questions that were not asked, and fields that nothing read; nothing where there are none."""
    found: dict[str, Any] = {}
    if loaded.left_out:
        found["left_out"] = [dataclasses.asdict(entry) for entry in loaded.left_out[:100]]
    if loaded.unread:
        found["unread"] = loaded.unread
    return found


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


def _layers(records: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the layers that the edits changed, which a rule may have chosen; None of a method that reports none."""
    for report in (record["diagnostics"] for record in records):
        if (found := report.get("layers", report.get("layer"))) is not None:
            return list(found) if isinstance(found, list) else [found]
    return None


def _quantised(machine: Mapping[str, Any]) -> list[str]:
    """Return a sentence about weights that came from a quantised file."""
    kinds = machine.get("dequantised_from")
    return [] if kinds is None else [f"the model's weights were dequantised from a file that has them as {kinds}"]


def _were(count: int, what: str) -> str:
    """Return the beginning of a sentence about a count: "1 edit was", "2 edits were"."""
    return f"1 {what} was" if count == 1 else f"{count} {what}s were"


def _warnings(prepared: PreparedRun, counts: Mapping[str, int], doubts: Mapping[str, int]) -> list[str]:
    """What a reader of the numbers has to know."""
    found = []
    if prepared.loaded.dropped:
        found.append(f"{_were(len(prepared.loaded.dropped), 'record')} dropped from the dataset; see `dropped`")
    if lacking := counts.get("dropped_without_subject", 0):
        others = ", ".join(editors.subject_free())
        found.append(
            f"{_were(lacking, 'record')} dropped since {prepared.config.editor['name']} edits at the subject, and the "
            f"prompt does not hold one just once; methods that keep such records: {others}"
        )
    if prepared.loaded.canonical is not None:
        found += [f"{entry.field} of {entry.record}: {entry.reason}" for entry in prepared.loaded.left_out]
    elif prepared.loaded.left_out:
        left_out = _were(len(prepared.loaded.left_out), "question")
        found.append(f"{left_out} not asked, since the dataset has no answer")
    if counts["failed"]:
        is_shared = is_sequence(prepared.config.protocol.name)
        how = "scored on the model as it stands" if is_shared else "counted with the untouched model's answers"
        found.append(f"{_were(counts['failed'], 'edit')} refused and {how}")
    if counts["undone"]:
        found.append(f"{_were(counts['undone'], 'edit')} undone by the guard and scored on the model as it stands")
    if counts["not_made"]:
        found.append(f"the guard stopped the sequence: {_were(counts['not_made'], 'edit')} not made")
    if counts["foretold_disabling"]:
        found.append(f"{_were(counts['foretold_disabling'], 'edit')} predicted by the key to disable the model")
    for name, count in doubts.items():
        found.append(f"in {count} of {counts['edits']} edits {MEANINGS[name]}; {ADVICE[name]}")
    if counts["disabling"]:
        edits = "1 edit" if counts["disabling"] == 1 else f"{counts['disabling']} edits"
        found.append(f"{edits} disabled the model: perplexity doubled or half of the known facts lost")
    if prepared.config.wild.tokens and (cut := _cut_targets(prepared))[0]:
        found.append(f"{cut[0]} of {cut[1]} wanted answers hold a string that ends an answer, and cannot be exact")
    if prepared.config.dataset.references and all(case.reference is None for case in prepared.cases):
        found.append("consistency and essence drift were not measured: no record names its relation and answer")
    if prepared.config.wild.trust_judge_code:
        found.append(f"answers were judged by code that was named on the command line: {prepared.config.wild.judge}")
    if prepared.config.collapse.n_texts == 0:
        found.append("perplexity was not measured: collapse.n_texts=0 leaves it out")
    elif not prepared.texts:
        found.append("perplexity was not measured: the model's folder brings no text, and collapse.text= names none")
    return found


def _speed(seconds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was written down of times; `total_seconds` is of all starts, with what a kill made them do again.

    Costs that come once for a model stand by themselves, and are in no edit's seconds.
    """
    # What was done again after a kill is there twice.
    each = {(entry.get("case"), entry.get("checkpoint")): entry for entry in seconds}.values()
    names = (*ONE_OFF, *OF_SINGLE_METHODS)
    once = [sum(entry.get(f"method_{name}_seconds", 0.0) for name in names) for entry in each]
    edits = [entry["edit"] - cost for entry, cost in zip(each, once, strict=True) if "edit" in entry]
    cpu = [entry["method_cpu_seconds"] for entry in each if "method_cpu_seconds" in entry]
    watched = [entry["guard"] for entry in each if "guard" in entry]
    return {
        "seconds_per_edit": sum(edits) / len(edits) if edits else None,
        "cpu_seconds_per_edit": sum(cpu) / len(cpu) if cpu else None,
        "edit_seconds": sum(edits),
        "one_off_seconds": sum(once),
        "guard_seconds": sum(watched) if watched else None,
        "evaluation_seconds": sum(entry.get("evaluation", 0.0) for entry in each),
        "total_seconds": sum(entry.get(part, 0.0) for entry in seconds for part in ("edit", "guard", "evaluation")),
        "peak_memory_bytes": max([environment.peak_memory() or 0, *_peaks(seconds).values()]) or None,
    }


def _peaks(seconds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bytes of memory by phase, the most of all starts that were not killed; nothing where the system does not say."""
    peaks: dict[str, int] = {}
    for phase, peak in (pair for entry in seconds for pair in entry.get("peaks", {}).items()):
        peaks[phase] = max(peak, peaks.get(phase, 0))
    return peaks
