"""Runs that differ by their settings or their seed: rows of a table, columns of `load_results`, and comparisons."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import written_runs
from typed_commands import run
from written_runs import (
    BEFORE,
    KINDS,
    MakeRun,
    asked_probe,
    line_with,
    shown_table,
)

import errata
from errata.benchmarks.reports import charts, comparing, groups, naming, panels, publish, report
from errata.benchmarks.reports.seeds import combined
from errata.editors.core.errors import ConfigError


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return written_runs.run_maker(tmp_path)


# --- sweeps over settings -----------------------------------------------------------------------------------------


LAYERS, RATES = ([3], [3, 4, 5, 6, 7, 8]), (0.5, 0.05, 1e-4, 10.0)


@pytest.fixture
def swept(make_run: MakeRun) -> Path:
    """A sweep over two settings, in no order."""
    for rate in RATES:
        for layers in LAYERS:
            root = make_run("ft_m", [True, False], fields={"layers": layers, "lr": rate}).parent
    return root


def test_rows_of_a_sweep_come_in_the_order_of_its_values_and_say_what_differs(swept: Path) -> None:
    runs = publish.finished(swept)
    ordered = [(run["config"]["editor"]["layers"], run["config"]["editor"]["lr"]) for run in runs]
    assert ordered == [(layers, rate) for layers in LAYERS for rate in sorted(RATES)]
    found = naming.labels(runs)
    assert found[0] == "layers=[3] lr=0.0001"
    assert not any("ft_m" in label or "editor." in label for label in found)
    assert naming.shared_method(runs) == "FT-M"
    shown = shown_table(swept)
    assert shown.startswith("FT-M ")
    assert shown.index("lr=0.0001") < shown.index("lr=0.05") < shown.index("lr=10.0")


def test_the_picture_of_a_sweep_has_room_for_its_panels(swept: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's "axes sizes collapsed to zero"
        (picture,) = report.write_comparisons(publish.finished(swept), tmp_path)
        shown = charts.scores(publish.finished(swept), "probability")
        for panel in shown:
            assert panels.svg(panel, "x")
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = charts.wrapped("first_setting=0.0001 second_setting=[3, 4, 5, 6, 7, 8] third_setting=x").split("\n")
    assert max(map(len, lines)) <= charts.WRAPPED


# --- as columns ---------------------------------------------------------------------------------------------------


def test_settings_are_columns_of_load_results(swept: Path) -> None:
    table = errata.load_results(swept)
    assert set(table["config.editor.lr"]) == set(RATES)
    assert set(table["config.editor.layers"]) == {tuple(layers) for layers in LAYERS}
    assert set(table["config.seed"]) == {0}
    assert set(table["config.n_edits"]) == {2}
    assert set(table["config.batch_size"]) == {1}
    grouped = table.groupby(["config.editor.lr", "config.editor.layers"])["summary.probability.reliability.mean"]
    means: Any = grouped.mean()
    assert dict(means) == {(rate, tuple(layers)): 0.5 for rate in RATES for layers in LAYERS}
    publish.publish(swept)
    assert len(errata.load_results(swept)) == 8


def test_load_records_has_one_row_per_case_and_probe(make_run: MakeRun) -> None:
    root = make_run("rome", [True, False], seed=3).parent
    table = errata.load_records(root)
    assert len(table) == 2 * len(KINDS)
    failed = table[(table["kind"] == "rewrite") & (table["after.probability"] == 0)]
    assert failed["case"].tolist() == ["c1"]
    row = failed.iloc[0]
    assert (row["editor"], row["seed"], row["index"], row["status"]) == ("rome", 3, 1, "ok")
    assert (row["prompt"], row["wanted"], row["other"], row["subject"]) == ("rewrite c1", "a", "b", "subject c1")
    assert (row["before.text"], row["after.text"], row["after.nll_wanted"]) == (BEFORE, "said", 3.0)
    assert (row["before.teacher_forced"], row["after.generation"]) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="folder of runs"):
        errata.load_records(root / "absent")


def test_probes_of_a_package_that_is_gone_are_rows_without_success(make_run: MakeRun) -> None:
    extra = [asked_probe("elsewhere", "p", True), asked_probe("attribute", "q", False)]
    root = make_run("rome", [True], extra=extra).parent
    table = errata.load_records(root).set_index("kind")
    assert math.isnan(table.loc["elsewhere", "after.probability"])
    assert table.loc["elsewhere", "after.nll_wanted"] == 1.0
    assert table.loc["attribute", "after.probability"] == 0.0
    (group,) = groups.groups(publish.finished(root))
    assert group.examples[0].counts.keys() == set(KINDS)


def test_the_python_of_the_page_about_results_runs(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_run("rome", [True, False], fields={"layers": [2]}).parent
    monkeypatch.chdir(root.parent)
    page = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    priming, tables = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    there: dict[str, Any] = {}
    exec(tables, there)
    assert len(there["failed"]) == 1
    exec(priming, there)
    assert there["found"].memorization.log10_s > 0


# --- seeds --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeded(make_run: MakeRun) -> Path:
    """Two methods, each with three seeds, which choose other cases."""
    for editor, shares in (("rome", (4, 3, 2)), ("memit", (1, 1, 1))):
        for seed, share in enumerate(shares):
            right = [index < share for index in range(4)]
            root = make_run(editor, right, seed=seed, cases=f"seed{seed}-").parent
    return root


def test_runs_that_differ_by_their_seed_alone_are_one_row_with_mean_and_deviation(seeded: Path) -> None:
    (group,) = groups.groups(publish.finished(seeded))
    assert group.labels == ["ROME (3 seeds)", "MEMIT (3 seeds)"]
    rome, memit = (cell for cell in group.cells["probability", "reliability"] if cell)
    assert (rome.mean, rome.deviation, rome.seeds, rome.n) == (0.75, 0.25, 3, 4)
    assert (memit.mean, memit.deviation) == (0.25, 0.0)
    assert rome.is_best
    assert not memit.is_tied
    assert len(group.values[0]) == 12
    assert group.runs[0]["speed"]["seconds_per_edit"] == 2.0
    assert group.runs[0]["counts"]["edits"] == 12
    assert "75.0  ± 25.0" in line_with(shown_table(seeded), "Reliability")
    assert "Means over 4 cases per seed, ± standard deviation between seeds." in shown_table(seeded)
    publish.publish(seeded)
    for name, said in (("table.md", "75.0** ± 25.0"), ("table.tex", r"\textbf{75.0} {\scriptsize $\pm$ 25.0}")):
        assert said in (seeded / "report" / name).read_text(encoding="utf-8")
    page = (seeded / "report" / "index.html").read_text(encoding="utf-8")
    assert "ROME (3 seeds)" in page
    assert "<small>± 25.0</small>" in page
    assert "6 runs, 24 edits in all" in page
    long = pd.read_parquet(seeded / "report" / "table.parquet")
    assert set(long[~long["metric"].isin(["drift", "perplexity"])]["seeds"]) == {3}


def test_seeds_over_the_same_cases_are_paired_by_case_and_no_case_counts_twice(make_run: MakeRun) -> None:
    for editor, right in (("rome", [True] * 6), ("memit", [False] * 6)):
        for seed in range(3):
            root = make_run(editor, right, seed=seed).parent
    (group,) = groups.groups(publish.finished(root))
    assert [len(values) for values in group.values] == [6, 6]
    (found,) = (comparing.compare_seeds(row) for row in comparing.seed_pairs([str(root), "rome", "memit"]))
    assert (found.cases, found.seeds, found.rows[0].difference.n) == (6, 3, 6)


def test_settings_of_one_method_are_compared_once_over_all_their_seeds(make_run: MakeRun) -> None:
    # The folders of the seeds come in another order of the settings each, as digests in their names do.
    for seed, rates in enumerate(([0.1, 0.2], [0.2, 0.1], [0.1, 0.2])):
        for rate in rates:
            root = make_run("rome", [rate > 0.1] * 4, seed=seed, fields={"lr": rate}).parent
    (row,) = comparing.seed_pairs([str(root)])
    found = comparing.compare_seeds(row)
    assert (found.labels, found.seeds) == (("lr=0.1", "lr=0.2"), 3)
    assert found.rows[0].difference.mean == 1.0


def test_compare_shows_methods_with_several_seeds_once(seeded: Path) -> None:
    (row,) = comparing.seed_pairs([str(seeded), "rome", "memit"])
    assert len(row) == 3
    shown = run("compare", str(seeded), "rome", "memit")
    assert shown.count("ROME and MEMIT") + shown.count("rome and memit") == 1
    assert "12 cases, 3 seeds" in shown
    assert "75.0 ± 25.0" in line_with(shown, "Reliability")
    (found,) = json.loads(run("compare", "--json", str(seeded), "rome", "memit"))
    assert found["rows"][0]["deviation"] == [0.25, 0.0]


def test_a_path_is_in_a_label_by_the_name_of_its_file_where_that_is_enough(make_run: MakeRun) -> None:
    for path in ("/data/texts/a.txt", "/data/texts/b.txt"):
        root = make_run("rome", [True], fields={"mom2_dataset": path}).parent
    (group,) = groups.groups(publish.finished(root))
    assert group.labels == ["mom2_dataset=a.txt", "mom2_dataset=b.txt"]
    make_run("rome", [True], fields={"mom2_dataset": "/other/a.txt"})
    (group,) = groups.groups(publish.finished(root))
    assert "mom2_dataset=/other/a.txt" in group.labels


def test_the_same_seed_twice_is_no_second_seed(make_run: MakeRun) -> None:
    root = make_run("rome", [True]).parent
    make_run("rome", [True])
    (group,) = groups.groups(publish.finished(root))
    assert len(group.runs) == 2
    one = group.runs[0]
    assert combined([one]) is one
