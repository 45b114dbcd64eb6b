"""Finished runs that were never carried out: their files are written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from errata.benchmarks.reports import publish, report
from errata.benchmarks.runs import summary
from errata.editors.core.files import jsonl

MakeRun = Callable[..., Path]
KINDS = ("rewrite", "paraphrase", "neighborhood")
BEFORE, WANTED = "the old answer", "a"


def scored_answer(is_right: bool, text: str | None) -> dict[str, Any]:
    said = {"nll_target": 1.0 if is_right else 3.0, "nll_other": 2.0, "text": text}
    return {**said, "target_correct": [is_right], "other_correct": [not is_right], "target_choice": [1]}


def asked_probe(kind: str, prompt: str, is_right: bool, text: str | None = "said") -> dict[str, Any]:
    asked = {"kind": kind, "prompt": prompt, "target": WANTED, "other": "b"}
    return {**asked, "before": scored_answer(False, BEFORE), "after": scored_answer(is_right, text)}


def record_of(place: int, case: str, probes: list[dict[str, Any]]) -> dict[str, Any]:
    damage = {"perplexity_before": 2.0, "perplexity": 2.0, "neighborhood_kl": 0.5, "retention": None}
    request = {"prompt": "{} is", "subject": f"subject {case}", "target": WANTED}
    edit = {"place": place, "case": case, "status": "ok", "reason": None, "warnings": [], "request": request}
    return {**edit, "diagnostics": {}, "probes": probes, **damage}


def run_maker(folder: Path) -> MakeRun:
    """`make_run("rome", [True, False], seed=1, fields={"lr": 0.1})`: a finished run in a folder.

    Every case has one probe of each of three kinds, the first answered as wanted where the list says so; `extra` are
    probes of the first case."""

    def make(
        editor: str,
        right: list[bool],
        *,
        seed: int = 0,
        fields: Mapping[str, Any] | None = None,
        extra: list[dict[str, Any]] | None = None,
        cases: str = "c",
        dataset: str = "counterfact",
    ) -> Path:
        own = {"name": editor, "seed": seed, **(fields or {})}
        run = folder / "runs" / f"{editor}-{dataset}-{seed}-{len(list(folder.rglob('results.json')))}"
        run.mkdir(parents=True)
        records = []
        for place, is_right in enumerate(right):
            case = f"{cases}{place}"
            probes = [asked_probe(kind, f"{kind} {case}", is_right or kind != "rewrite") for kind in KINDS]
            records.append(record_of(place, case, probes + (extra or [] if place == 0 else [])))
        summed = summary.summarise(records, dataset=dataset, seed=seed)
        config = {"seed": seed, "confidence": 0.95, "n_edits": len(right), "batch_size": 1, "editor": own}
        results: dict[str, Any] = {
            "schema_version": 1,
            "names": {"editor": editor, "model": "m", "dataset": dataset, "protocol": "single"},
            "config": {**config, "dataset": {"name": dataset}},
            "digests": {"settings": run.name, "model": "m", "cases": cases},
            "counts": {**summed.counts},
            "summary": summed.after,
            "before": summed.before,
            "papers": summed.papers,
            "collapse": summed.collapse,
            "speed": {"seconds_per_edit": 1.0 + seed, "total_seconds": 2.0},
            "versions": {"errata": "0"},
            "machine": {"precision": "float32", "device": "cpu"},
            "command": f"errata bench editor={editor}",
            "warnings": [],
        }
        (run / "results.json").write_text(json.dumps(results))
        (run / "records.jsonl").write_bytes(b"".join(map(jsonl.render, records)))
        return run

    return make


def shown_table(root: Path) -> str:
    console = Console(file=(out := io.StringIO()), width=200)
    report.show(publish.finished(root), console)
    return out.getvalue()


def line_with(text: str, word: str) -> str:
    """Return the first line of a text that has a word."""
    return next(line for line in text.splitlines() if word in line)
