"""Tables with the columns of published ones, from records made up: numbers, errors, collapse points, forms."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import latex_tables
import pytest

from errata.benchmarks.reports.publish import publish_styled
from errata.benchmarks.reports.styles import Measured, collapse_point
from errata.benchmarks.runs import summary
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.files import jsonl

Make = Callable[..., Path]


def probe(kind: str, group: str | None, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    asked = {"kind": kind, "prompt": "p", "target": "Oslen", "other": "Brast"}
    return {**asked, **({"group": group} if group else {}), "before": dict(before), "after": dict(after)}


def said(is_right: bool, wild: str) -> dict[str, Any]:
    nlls = {"nll_target": 1.0 if is_right else 3.0, "nll_other": 2.0}
    return {**nlls, "target_correct": [is_right], "other_correct": [], "target_choice": [1], "text": "t", "wild": wild}


def record(place: int, is_right: bool) -> dict[str, Any]:
    damage = {"perplexity_before": 2.0, "perplexity": 2.0, "neighborhood_kl": None, "retention": None}
    no, yes = said(False, " Brast"), said(True, " Oslen")
    probes = [
        probe("rewrite", None, no, yes if is_right else no),
        probe("paraphrase", None, no, yes),
        probe("neighborhood", "Forgetfulness", yes, yes if place else no),
        probe("portability", "Reasoning", no, yes if is_right else no),
    ]
    writing = {"before": {"fluency": 600.0 + place, "consistency": 20.0}, "after": {"fluency": 500.0 + place}}
    edit = {"place": place, "case": f"c{place}", "status": "ok", "reason": None, "warnings": [], "diagnostics": {}}
    return {**edit, "request": {"prompt": "{} is", "subject": "S", "target": "Oslen"}, "probes": probes,
            "writing": writing, **damage}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("memit", dataset="zsre", curve=[...])`: a finished run of ten cases, nine of them right."""

    def finished(editor: str, *, dataset: str = "counterfact", curve: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path / f"{editor}-{dataset}"
        folder.mkdir()
        records = [record(place, is_right=place != 3) for place in range(10)]
        summed = summary.summarise(records, dataset=dataset)
        task = {"metric": "acc", "value": 0.5, "stderr": 0.03, "n": 100, "chance": 0.25}
        results = {
            "schema_version": 1,
            "names": {"editor": editor, "model": "m", "dataset": dataset, "protocol": "sequential"},
            "config": {"seed": 0, "confidence": 0.95, "editor": {"name": editor}, "dataset": {"name": dataset}},
            "digests": {"settings": folder.name, "model": "m", "cases": "c"},
            "counts": {**summed.counts},
            "summary": summed.after,
            "before": summed.before,
            "papers": summed.papers,
            "collapse": summed.collapse,
            "speed": {"seconds_per_edit": 0.25},
            "ability": {"before": {"a": task}, "after": {"a": task, "b": {**task, "value": 0.3, "stderr": 0.04}}},
            "versions": {"errata": "0"},
            "machine": {"precision": "float32", "device": "cpu"},
            "command": "errata bench",
            "warnings": [],
        }
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "records.jsonl").write_bytes(b"".join(map(jsonl.render, records)))
        (folder / "curve.json").write_text(json.dumps(curve or []))
        return folder

    return finished


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def point(edits: int, mean: float) -> dict[str, Any]:
    entry = {"mean": mean, "low": mean, "high": mean, "n": 5}
    return {
        "edits": edits,
        "perplexity_ratio": 1.0,
        "retention": None,
        "summary": {"probability": {"reliability": entry}, "teacher_forced": {"reliability": entry}},
    }


NINE = stdev([1.0] * 9 + [0.0]) / math.sqrt(10)  # standard error of nine of ten


def test_alphaedits_columns_in_percent_with_errors_for_two_datasets(make: Make, tmp_path: Path) -> None:
    falling = [point(100, 0.9), point(200, 0.59), point(300, 0.7)]
    make("memit", curve=falling)
    make("memit", dataset="zsre", curve=[point(100, 0.9), point(1200, 0.8)])
    make("rome")
    files = publish_styled(tmp_path, style="alphaedit")
    assert [path.name for path in files] == ["alphaedit.md", "alphaedit.tex", "alphaedit.csv", "alphaedit-efficacy.png"]
    before, rome, memit = rows(files[2])
    assert [row["method"] for row in (before, rome, memit)] == ["before", "ROME", "MEMIT"]
    assert (before["CounterFact: Eff"], before["CounterFact: Spe"]) == ("0.0000", "100.0000")
    assert (float(memit["CounterFact: Eff"]), float(memit["CounterFact: Eff error"])) == (
        pytest.approx(90, abs=1e-3), pytest.approx(100 * NINE, abs=1e-3))  # fmt: skip
    assert float(memit["CounterFact: S"]) == pytest.approx(100 * 3 / (1 / 0.9 + 1 + 1 / 0.9), abs=1e-3)
    assert 0 < float(memit["CounterFact: S error"]) < 10
    assert (before["CounterFact: Flu"], memit["CounterFact: Flu"]) == ("604.5000", "504.5000")
    assert (before["CounterFact: Consis"], memit["CounterFact: Consis"]) == ("20.0000", "")
    assert (memit["CounterFact: CP@60"], memit["zsRE: CP@60"]) == ("200", "> 1,200")
    assert rome["zsRE: Eff"] == rome["CounterFact: CP@60"] == ""
    text = files[0].read_text(encoding="utf-8")
    assert f"| 90.0 ± {100 * NINE:.1f} |" in text
    assert "zsRE: 10 edits, Teacher-forced tokens" in text
    assert latex_tables.problems(files[1].read_text(encoding="utf-8")) == []


def test_wilds_columns(make: Make, tmp_path: Path) -> None:
    make("memit", dataset="zsre")
    before, memit = rows(publish_styled(tmp_path, style="wild")[2])
    assert (memit["zsRE: Rel"], memit["zsRE: Gen"], memit["zsRE: Loc"]) == ("90.0000", "100.0000", "90.0000")
    assert (before["zsRE: Loc"], before["zsRE: Time, s"]) == ("", "")
    assert (before["zsRE: Cap"], memit["zsRE: Cap"], memit["zsRE: Time, s"]) == ("50.0000", "40.0000", "0.2500")
    assert float(memit["zsRE: Cap error"]) == pytest.approx(100 * math.hypot(0.03, 0.04) / 2, abs=1e-3)
    assert "zsRE: Rel, judged" not in memit
    assert "Cap by guessing 25.0" in publish_styled(tmp_path, style="wild")[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["[", '{"edits": 3}', '[{"edits": 3}]', "[4]", "nonsense"])
def test_a_damaged_curve_ends_a_report_in_one_line(make: Make, tmp_path: Path, content: str) -> None:
    (make("memit") / "curve.json").write_text(content)
    with pytest.raises(DatasetError, match=r"curve\.json: is damaged: .*run its command again"):
        publish_styled(tmp_path, style="alphaedit")


def test_general_ability_has_a_row_per_checkpoint_and_chance_beside_each_choice(make: Make, tmp_path: Path) -> None:
    choice = {"metric": "acc", "value": 0.5, "stderr": 0.03, "n": 100, "chance": 0.25}
    written = {"metric": "exact_match", "value": 0.3, "stderr": 0.02, "n": 100, "chance": None}
    part = {**choice, "value": 0.9, "part_of": "mmlu"}
    text = {"metric": "word_perplexity", "value": 12.345, "stderr": None, "n": 5}
    curve = [
        {
            **point(edits, 0.9),
            "ability": {"mmlu": {**choice, "value": value}, "law": part, "gsm8k": written, "wiki": text},
        }
        for edits, value in ((1, 0.45), (10, 0.2))
    ]
    make("memit", curve=curve)
    make("rome", dataset="zsre")
    files = publish_styled(tmp_path, style="ability")
    table = {row["method"]: row for row in rows(files[2])}
    assert list(table) == ["before", "CounterFact, MEMIT, 1 edit", "CounterFact, MEMIT, 10 edits"]
    after = table["CounterFact, MEMIT, 10 edits"]
    assert after["General ability: mmlu (chance 25.0)"] == "20.0000"
    assert after["General ability: gsm8k"] == "30.0000"
    assert after["General ability: wiki"] == "12.3450"
    assert table["before"]["General ability: a (chance 25.0)"] == "50.0000"
    assert not [name for name in after if "law" in name]  # a part of mmlu
    assert "45.0 ± 3.0" in files[0].read_text(encoding="utf-8")


def test_wikibigedits_rows_are_intervals_in_order(make: Make, tmp_path: Path) -> None:
    folder = make("memit", dataset="wikibigedit")
    path, results = folder / "records.jsonl", folder / "results.json"
    months = ["2024-03-01 to 2024-03-20"] * 6 + ["2024-02-01 to 2024-02-20"] * 4
    dated = [{**record(place, is_right=place != 3), "interval": month} for place, month in enumerate(months)]
    path.write_bytes(b"".join(map(jsonl.render, dated)))
    found = {**json.loads(results.read_text()), "intervals": summary.intervals(dated, confidence=0.95, seed=0)}
    assert list(found["intervals"]) == sorted(set(months))
    assert found["intervals"][months[0]]["edits"] == 6
    entry = found["intervals"][months[0]]["summary"]["teacher_forced"]["reliability"]
    assert (entry["mean"], entry["n"]) == (pytest.approx(5 / 6), 6)
    assert entry["low"] < 5 / 6 < entry["high"]
    results.write_text(json.dumps(found))
    table = rows(publish_styled(tmp_path, style="wikibigedit")[2])
    assert [row["method"] for row in table] == [
        f"{name}, {month}" for name in ("before", "MEMIT") for month in sorted(set(months))
    ]
    assert [row["WikiBigEdit: Update"] for row in table] == ["0.0000", "0.0000", "100.0000", "83.3333"]
    assert [row["WikiBigEdit: n"] for row in table] == ["4", "6", "4", "6"]


def test_knowedits_columns_have_the_groups(make: Make, tmp_path: Path) -> None:
    make("memit", dataset="knowedit")
    _, memit = rows(publish_styled(tmp_path, style="knowedit")[2])
    found = {name.removeprefix("KnowEdit: "): value for name, value in memit.items() if not name.endswith("error")}
    assert found["Edit Succ."] == found["Portability"] == found["Portability: Reasoning"] == "90.0000"
    assert found["Locality: Forgetfulness"] == "90.0000"
    assert found["Fluency"] == "504.5000"


def test_a_table_stands_without_its_records_but_then_without_errors(make: Make, tmp_path: Path) -> None:
    (make("memit") / "records.jsonl").unlink()
    _, memit = rows(publish_styled(tmp_path, style="alphaedit")[2])
    assert (memit["CounterFact: Eff"], memit["CounterFact: Eff error"]) == ("90.0000", "")


def test_a_style_that_no_run_can_fill_is_refused(make: Make, tmp_path: Path) -> None:
    folder = make("memit")
    results = json.loads((folder / "results.json").read_text())
    del results["summary"]["wild"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "records.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"wild\.tokens=50"):
        publish_styled(tmp_path, style="wild")
    with pytest.raises(ConfigError, match="did you mean 'alphaedit'"):
        publish_styled(tmp_path, style="alphaedt")


@pytest.mark.parametrize(
    ("means", "expected"),
    [([0.9, 0.5, 0.9], "200"), ([0.59], "100"), ([0.9, 0.6], "> 200"), ([], None)],
)
def test_the_collapse_point_is_the_first_checkpoint_below_sixty(means: list[float], expected: str | None) -> None:
    curve = [point(100 * (i + 1), mean) for i, mean in enumerate(means)]
    assert collapse_point(curve, "probability") == expected


def test_the_error_of_a_harmonic_mean_of_equal_metrics_is_that_of_each(make: Make) -> None:
    measured = Measured({"folder": str(make("memit"))})
    same = [
        {"probability": dict.fromkeys(("reliability", "generalization", "locality"), float(i > 0))} for i in range(9)
    ]
    measured.__dict__["cases"] = same
    found = measured.score("probability")
    assert found is not None
    assert found.mean == pytest.approx(100 * 8 / 9)
    assert found.error == pytest.approx(100 * stdev([0.0] + [1.0] * 8) / 3)
