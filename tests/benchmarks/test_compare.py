"""`errata compare`: the same cases by their ids, and a refusal with its reason where runs are not alike."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata.benchmarks.reports import comparing
from errata.benchmarks.reports.publish import publish
from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.runs.results import read_results
from errata.cli import main
from errata.editors.core.errors import ConfigError
from errata.editors.core.files import jsonl

MakeRun = Callable[..., Path]
_COLLAPSE = ["perplexity_ratio", "perplexity_ratio_worst", "neighborhood_kl", "retention"]
_COLLAPSE += [f"{name}_{moment}" for name in ("perplexity", "fluency") for moment in ("before", "after")]
# Of a results.json what is not compared.
NOTHING: dict[str, Any] = {
    "summary": {},
    "before": {},
    "collapse": dict.fromkeys(_COLLAPSE),
    "speed": {"seconds_per_edit": None},
    "versions": {"errata": "0"},
    "machine": {"precision": "float32", "device": "cpu"},
    "command": "errata bench",
    "warnings": [],
}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("rome", [True, False], ...)`: a finished run of two probes per case: the first is answered where
    the list says so, the second always."""

    def make(editor: str, right: list[bool], *, ids: list[str] | None = None, **changes: Any) -> Path:
        config: dict[str, Any] = {"time_limit": changes.pop("time_limit", None)}
        settings = {"model": "m", "dataset": "d", "cases": "c", "seed": 0, "batch_size": 1, "place": editor, **changes}
        folder = tmp_path / "runs" / settings["place"]
        folder.mkdir(parents=True)
        names = {"editor": editor, "model": settings["model"], "dataset": settings["dataset"], "protocol": "single"}
        config |= {"seed": settings["seed"], "confidence": 0.95, "batch_size": settings["batch_size"]}
        config["dataset"] = {"name": settings["dataset"]}
        digests = {"settings": editor, "model": settings["model"], "cases": settings["cases"]}
        counts = {"edits": len(right), "failed": 0, "disabling": 0}
        results: dict[str, Any] = {
            "schema_version": 1,
            "names": names,
            "config": {**config, "editor": {"name": editor, "v": editor}},
        }
        results |= {"digests": digests, "counts": counts, **NOTHING}
        (folder / "results.json").write_text(json.dumps(results))
        records = [_record(case, is_right) for case, is_right in zip(ids or map(str, range(99)), right, strict=False)]
        (folder / "records.jsonl").write_bytes(b"".join(map(jsonl.render, records)))
        return folder

    return make


def _record(case: str, is_right: bool, **damage: Any) -> dict[str, Any]:
    def said(target: float) -> dict[str, Any]:
        words = {"target_correct": [], "other_correct": [], "target_choice": []}
        return {"nll_target": target, "nll_other": 2.0, "text": None, **words}

    probes = [
        {"kind": kind, "prompt": f"{kind} {case}", "target": "a", "other": "b", "before": said(3.0), "after": after}
        for kind, after in (("rewrite", said(1.0 if is_right else 3.0)), ("paraphrase", said(1.0)))
    ]
    damage = {"perplexity_before": 2.0, "perplexity": 2.0, "neighborhood_kl": 0.5, "retention": None, **damage}
    return {"place": 0, "case": case, "status": "ok", "reason": None, "warnings": [], "probes": probes, **damage}


def test_cases_are_matched_by_their_ids(make_run: MakeRun) -> None:
    a = make_run("rome", [True, False, False, False], ids=["w", "x", "y", "z"])
    b = make_run("memit", [True, True, True, False], ids=["z", "y", "x", "w"])
    found = comparing.compare(a, b)
    row = found.rows[0]
    assert (row.scoring, row.metric, row.a, row.b) == ("probability", "reliability", 0.25, 0.75)
    assert (row.difference.wins, row.difference.losses, row.difference.n) == (3, 1, 4)
    assert found.cases == 4
    assert found.settings == {"editor.v": ("rome", "memit")}
    assert [row.metric for row in found.rows] == ["reliability", "generalization", "perplexity", "drift"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "their models are 'm' and 'other'"),
        ({"dataset": "other"}, "their datasets are 'd' and 'other'"),
        ({"cases": "other", "seed": 1}, "their cases differ (2 edits, seed 0; 2 edits, seed 1)"),
        ({"ids": ["0", "7"]}, "2 cases are in one of them alone, such as '1'"),
    ],
)
def test_runs_that_were_not_asked_the_same_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str, make_run: MakeRun
) -> None:
    a, b = make_run("rome", [True, True]), make_run("memit", [True, True], **changes)
    with pytest.raises(ConfigError) as caught:
        comparing.compare(a, b)
    assert reason in str(caught.value)


def test_a_case_that_was_asked_something_else_is_refused(make_run: MakeRun) -> None:
    a, b = make_run("rome", [True]), make_run("memit", [True])
    records = b / "records.jsonl"
    changed = json.loads(records.read_text().replace("paraphrase 0", "another paraphrase"))
    records.write_bytes(jsonl.render({name: value for name, value in changed.items() if name != jsonl.DIGEST}))
    with pytest.raises(ConfigError, match="case '0' was asked other things"):
        comparing.compare(a, b)


def test_two_methods_of_a_folder_are_paired_where_only_the_method_differs(make_run: MakeRun) -> None:
    a, b = make_run("rome", [True]), make_run("memit", [True])
    make_run("memit", [True], batch_size=2, place="of another batch size")
    make_run("r_rome", [True], time_limit=5)
    assert comparing.pairs([str(a.parent), "rome", "r_rome"]) == [(a, a.parent / "r_rome")]
    make_run("memit", [True], dataset="other", place="of another dataset")
    assert comparing.pairs([str(a.parent), "rome", "memit"]) == [(a, b)]
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        comparing.pairs([str(a.parent), "rome", "memt"])
    with pytest.raises(ConfigError, match="no run of rome and run of emmet"):
        make_run("emmet", [True], cases="other")
        comparing.pairs([str(a.parent), "rome", "emmet"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "got 0"),
        (["x"], "none"),
        (["x", "."], "no results.json"),
        (["x", "y"], "none"),
        (["x", "a", "b"], "none"),
        (["x", "a", "b", "c"], "got 4"),
    ],
)
def test_words_that_name_no_runs_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        comparing.pairs(words)


def test_one_method_is_compared_with_itself_in_other_settings(make_run: MakeRun) -> None:
    a = make_run("rome", [True])
    root = a.parent
    with pytest.raises(ConfigError, match="no two runs of rome"):
        comparing.pairs([str(root)])
    b = make_run("rome", [True], place="other settings")
    for words in ([], ["rome"], ["rome", "rome"]):
        (pair,) = comparing.pairs([str(root), *words])
        assert set(pair) == {a, b}
    make_run("memit", [True])
    with pytest.raises(ConfigError, match="name the method or the two methods to compare: memit, rome"):
        comparing.pairs([str(root)])


def test_the_command_shows_a_table_or_json(make_run: MakeRun) -> None:
    a, b = make_run("rome", [True] * 3 + [False] * 9), make_run("r_rome", [True] * 12)

    def run(*arguments: str) -> str:
        console = Console(file=(out := io.StringIO()), width=160)
        assert main.run(["compare", *arguments], console, console) == 0
        return out.getvalue()

    shown = run(str(a), str(b))
    line = next(line for line in shown.splitlines() if "Reliability" in line)
    assert line.split()[:4] == ["Reliability", "25.0", "100.0", "+75.0"]
    assert "0.004" in line
    assert "editor.v: rome / r_rome" in shown
    (found,) = json.loads(run("--json", str(a.parent), "rome", "r_rome"))
    assert found["rows"][0]["difference"]["wins"] == 9
    with pytest.raises(ConfigError, match="unknown option"):
        run("--jsn")


def _with_damage(folder: Path, *damage: dict[str, Any]) -> Path:
    """The run with these numbers of damage, a case each."""
    records = [_record(str(place), True, **numbers) for place, numbers in enumerate(damage)]
    (folder / "records.jsonl").write_bytes(b"".join(map(jsonl.render, records)))
    return folder


def test_an_edit_without_a_finite_perplexity_counts_as_the_worst_and_is_counted_beside_the_mean(
    make_run: MakeRun,
) -> None:
    whole, broken = [{"perplexity": 2.0}] * 12, [{"perplexity": "inf"}] * 5 + [{"perplexity": "nan"}] * 5
    a = _with_damage(make_run("rome", [True] * 12), *whole)
    b = _with_damage(make_run("memit", [True] * 12), *broken, {"perplexity": 2.0}, {"perplexity": 2.0})
    row = next(row for row in comparing.compare(a, b).rows if row.metric == "perplexity")
    assert (row.a, row.b, row.not_finite, row.difference.n) == (0.0, 0.0, (0, 10), 12)
    assert (row.difference.wins, row.difference.losses, row.difference.test) == (10, 0, "signed_rank")
    assert row.difference.is_significant
    console = Console(file=(out := io.StringIO()), width=200)
    assert main.run(["compare", str(a), str(b)], console, console) == 0
    assert "0.000 (10 of 12 not finite)" in out.getvalue()


def test_damage_of_which_nothing_is_finite_has_no_mean_and_a_drift_that_is_none_counts_as_the_worst(
    make_run: MakeRun,
) -> None:
    a = _with_damage(make_run("rome", [True] * 2), *[{"neighborhood_kl": "nan"}] * 2)
    b = _with_damage(make_run("memit", [True] * 2), {"neighborhood_kl": 0.5}, {"neighborhood_kl": "inf"})
    row = next(row for row in comparing.compare(a, b).rows if row.metric == "drift")
    assert math.isnan(row.a)
    assert (row.b, row.not_finite, row.difference.wins, row.difference.losses) == (0.5, (2, 1), 0, 1)
    console = Console(file=(out := io.StringIO()), width=200)
    assert main.run(["compare", str(a), str(b)], console, console) == 0
    assert "- (2 of 2 not finite)" in out.getvalue()
    json.loads(json.dumps(encodable(row.as_dict()), allow_nan=False))


@pytest.mark.parametrize(
    "part", ["config", "digests", "counts", "summary", "collapse", "speed", "versions", "machine", "command"]
)
def test_results_without_what_is_read_of_them_are_refused_before_anything_is_made(part: str, make_run: MakeRun) -> None:
    path = make_run("rome", [True]) / "results.json"
    whole = json.loads(path.read_text())
    assert read_results(path) == whole
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != part}))
    with pytest.raises(ConfigError, match=f"{part}.* is not what it is there"):
        publish(path.parent)
    assert sorted(each.name for each in path.parent.iterdir()) == ["records.jsonl", "results.json"]
