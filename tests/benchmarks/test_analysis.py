"""Reports on sweeps: settings and records as columns, seeds as one row, numbers of cases, examples, paper tables."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import latex_tables
import pytest
import written_runs
from rich.console import Console
from typed_commands import run
from written_runs import (
    BEFORE,
    MakeRun,
    asked_probe,
    line_with,
    shown_table,
)

import errata
from errata.benchmarks.reports import comparing, groups, publish, report, tables
from errata.benchmarks.reports.counts import count_of
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError
from errata.evaluate import metric_table, metrics


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return written_runs.run_maker(tmp_path)


# --- numbers of cases ---------------------------------------------------------------------------------------------


def test_a_mean_over_fewer_cases_than_the_table_states_them_everywhere(make_run: MakeRun) -> None:
    """A column that exists for 1 case of 12 does not look like a mean over 12."""
    for editor, is_right in (("rome", True), ("memit", False)):
        root = make_run(editor, [True] * 12, extra=[asked_probe("portability", "p", is_right)]).parent
    assert "n=1" in line_with(shown_table(root), "Portability")
    assert "n=" not in line_with(shown_table(root), "Reliability")
    assert "Means over 12 cases" in shown_table(root)
    publish.publish(root)
    for name, mark in (("table.md", "n = 1"), ("table.tex", "$n=$1"), ("index.html", "n = 1")):
        text = (root / "report" / name).read_text(encoding="utf-8")
        assert mark in text, name
        assert "Means over 12 cases" in text, name
    assert "Portability (n = 1)" in (root / "report" / "index.html").read_text(encoding="utf-8")
    compared = run("compare", str(root), "rome", "memit")
    assert "n=1" in line_with(compared, "Portability")
    assert "n=" not in line_with(compared, "Generalization")


def test_nothing_is_marked_between_0_and_100_on_one_case(make_run: MakeRun) -> None:
    for editor, is_right in (("rome", True), ("memit", False)):
        root = make_run(editor, [True] * 12, extra=[asked_probe("portability", "p", is_right)]).parent
    (group,) = groups.groups(publish.finished(root))
    cells = [cell for cell in group.cells["probability", "portability"] if cell]
    assert [(cell.mean, cell.n, cell.is_best, cell.is_tied) for cell in cells] == [
        (1.0, 1, False, False), (0.0, 1, False, False)
    ]  # fmt: skip


def test_means_whose_intervals_are_apart_are_no_tie_however_few_the_cases() -> None:
    row = [groups.Cell(1, 1, 1, 2), groups.Cell(0, 0, 0, 2), groups.Cell(0.5, 0, 1, 2)]

    def tied(best: int, index: int) -> groups.Verdict:
        assert best != index
        return "tied"

    marks = groups._with_marks(row, tied)
    assert [(cell.is_best, cell.is_tied) for cell in marks if cell] == [(True, False), (False, False), (False, True)]
    assert groups._with_marks(row[:2], tied) == row[:2]


# --- a metric of one's own ----------------------------------------------------------------------------------------


def test_a_declared_metric_is_in_results_tables_pictures_and_page(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/adding-a-dataset.md says: one entry in METRICS, and nothing else."""
    own = metrics.Metric("margin", "Wide margin", "The wanted answer wins <clearly>.", ("rewrite",), _margin)
    monkeypatch.setattr(metric_table, "METRICS", (*metrics.METRICS, own))
    root = make_run("rome", [True, False]).parent
    make_run("memit", [True, True])
    table = errata.load_results(root)
    assert sorted(table["summary.probability.margin.mean"]) == [0.5, 1.0]
    assert "100.0" in line_with(shown_table(root), "Wide margin")
    publish.publish(root)
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert "<dt>Wide margin</dt><dd>The wanted answer wins &lt;clearly&gt;.</dd>" in page
    assert "<h4>Wide margin</h4>" in page
    assert "Wide margin" in (root / "report" / "table.md").read_text(encoding="utf-8")
    tex = (root / "report" / "table.tex").read_text(encoding="utf-8")
    assert "Wide margin" in tex
    assert latex_tables.problems(tex) == []
    assert "Wide margin" in run("compare", str(root), "rome", "memit")


def _margin(outcome: metrics.Outcome) -> dict[str, float]:
    score = outcome.score
    if score.nll_target is None or score.nll_other is None:
        return {}
    return {"probability": float(score.nll_target < score.nll_other - 0.5)}


def test_a_metric_of_results_that_no_package_here_declares_is_shown_under_its_name(make_run: MakeRun) -> None:
    folder = make_run("rome", [True, False])
    results = json.loads((folder / "results.json").read_text())
    for part in ("summary", "before"):
        results[part]["probability"]["far_reach"] = results[part]["probability"]["reliability"]
    (folder / "results.json").write_text(json.dumps(results))
    assert "50.0" in line_with(shown_table(folder.parent), "Far reach")
    assert "locality unchanged" not in shown_table(folder.parent).lower()


# --- examples -----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_model_said_to_edits_that_failed_and_held(make_run: MakeRun) -> None:
    hostile = asked_probe("paraphrase", "<script>alert(1)</script>", False, "<b>" + "x" * 5000)
    root = make_run("rome", [True, False] * 10, extra=[hostile]).parent
    publish.publish(root)
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert '<details class="examples"><summary>ROME: 10 of 20 edited prompts failed</summary>' in page
    assert page.count("rewrite c") == 6  # three that failed, three that held
    assert BEFORE in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "x" * 200 not in page


def test_examples_without_texts_show_how_probable_the_answers_were(make_run: MakeRun) -> None:
    root = make_run("rome", [True], extra=[asked_probe("portability", "p", False, None)]).parent
    (group,) = groups.groups(publish.finished(root))
    (found,) = [example for example in group.examples[0].shown if example.kind == "portability"]
    assert found.after == f"b ({100 * math.exp(-2):.3g} %); a ({100 * math.exp(-3):.3g} %)"
    assert not found.held


def test_many_runs_show_fewer_examples_each_so_that_the_page_stays_small(make_run: MakeRun) -> None:
    for index in range(41):
        root = make_run("rome", [False] * 9, fields={"lr": index}).parent
    (group,) = groups.groups(publish.finished(root))
    from errata.benchmarks.reports import examples_page

    assert examples_page.examples_per_kind(1) == 3
    assert examples_page.examples_per_kind(41) == 2
    assert examples_page.details(group, 2).count("rewrite c") == 82


# --- tables for papers --------------------------------------------------------------------------------------------


def test_a_paper_table_has_methods_as_rows_and_datasets_with_metrics_as_columns(make_run: MakeRun) -> None:
    for dataset in ("counterfact", "zsre"):
        make_run("rome", [True] * 8, dataset=dataset)
        root = make_run("memit", [True] * 2 + [False] * 6, dataset=dataset).parent
    make_run("grace", [True] * 8, dataset="zsre")
    shown = run("report", str(root), "style=paper", "scoring=teacher_forced")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["Method", "---", "ROME", "MEMIT", "GRACE"]
    assert "CounterFact, Reliability" in rows[0]
    assert "zsRE, Reliability" in rows[0]
    assert rows[4].count(" - ") == rows[0].count("CounterFact, ")
    folder = root / "report"
    tex = (folder / "paper-teacher_forced.tex").read_text(encoding="utf-8")
    assert r"\multicolumn{4}{c}{CounterFact ($n=8$)}" in tex
    assert tex.count(r"\\") == 5
    assert latex_tables.problems(tex) == []
    found = list(csv.DictReader(io.StringIO((folder / "paper-teacher_forced.csv").read_text(encoding="utf-8"))))
    assert [row["method"] for row in found] == ["ROME", "MEMIT", "GRACE"]
    assert [row["zsRE, Reliability"] for row in found] == ["100.0", "25.0", "100.0"]
    assert found[2]["CounterFact, Reliability"] == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["style=papr"], "did you mean 'paper'"),
        (["style=paper", "scoring=probabilty"], "did you mean 'probability'"),
        (["style=paper", "scoring=generation_containment"], "no run measured it"),
        (["scoring=probability"], "needs style=paper"),
    ],
)
def test_a_paper_table_that_cannot_be_made_is_refused(words: list[str], said: str, make_run: MakeRun) -> None:
    folder = make_run("rome", [True])
    results = json.loads((folder / "results.json").read_text())
    del results["summary"]["generation_containment"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "records.jsonl").unlink()
    with pytest.raises(ConfigError, match=said):
        run("report", str(folder.parent), *words)


# --- small things -------------------------------------------------------------------------------------------------


def test_two_words_for_one_method_print_each_pair_once(make_run: MakeRun) -> None:
    root = make_run("rome", [True], fields={"lr": 1}).parent
    make_run("rome", [True], fields={"lr": 2})
    make_run("rome", [True], fields={"lr": 3})
    found = comparing.pairs([str(root), "rome", "rome"])
    assert len(found) == len({frozenset(pair) for pair in found}) == 3


def test_a_difference_that_rounds_to_zero_has_no_sign() -> None:
    assert [tables.signed(value, 1) for value in (0.0, -0.0, -0.04, 0.04, -0.06, 5.0)] == [
        "0.0", "0.0", "0.0", "0.0", "-0.1", "+5.0"
    ]  # fmt: skip


def test_compare_writes_no_signed_zero(make_run: MakeRun) -> None:
    root = make_run("rome", [True, False]).parent
    make_run("memit", [True, False])
    shown = run("compare", str(root), "rome", "memit")
    assert "+0.0" not in shown
    assert "-0.0" not in shown


def test_counts_have_rows_of_their_own_and_a_damage_that_was_not_measured_has_no_sign(make_run: MakeRun) -> None:
    (run,) = publish.finished(make_run("rome", [True]).parent)
    collapse = {**run["collapse"], "perplexity_ratio_worst": None}
    damage = tables.damage([{**run, "collapse": collapse}])
    assert (damage["edits"], damage["edits refused"], damage["perplexity, worst edit"]) == (["1"], ["0"], ["-"])
    assert "1 edit, 0 refused" in report.markdown({**run, "before": run["before"]}, [])
    assert count_of(1, "case") == "1 case"


def test_the_progress_of_a_sweep_names_its_run() -> None:
    console = Console(file=(out := io.StringIO()), width=20)
    with show_progress(console, run="editor=rome editor.layers=[3]") as progress:
        progress(0, 5, "edits")
    assert out.getvalue().startswith("editor=rome editor.layers=[3]: edits: 0 of 5")
