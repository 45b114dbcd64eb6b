"""Reports on sweeps: settings and records as columns, seeds as one row, numbers of cases, examples, paper tables."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import latex_tables
import pandas as pd
import pytest
from rich.console import Console

import errata
from errata.benchmarks.reports import charts, comparing, groups, naming, panels, publish, report, tables
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.seeds import combined
from errata.benchmarks.runs import summary
from errata.cli import main
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError
from errata.editors.core.files import jsonl
from errata.evaluate import metric_table, metrics

MakeRun = Callable[..., Path]
KINDS = ("rewrite", "paraphrase", "neighborhood")
BEFORE, WANTED = "the old answer", "a"


def _answer(is_right: bool, text: str | None) -> dict[str, Any]:
    said = {"nll_target": 1.0 if is_right else 3.0, "nll_other": 2.0, "text": text}
    return {**said, "target_correct": [is_right], "other_correct": [not is_right], "target_choice": [1]}


def _probe(kind: str, prompt: str, is_right: bool, text: str | None = "said") -> dict[str, Any]:
    asked = {"kind": kind, "prompt": prompt, "target": WANTED, "other": "b"}
    return {**asked, "before": _answer(False, BEFORE), "after": _answer(is_right, text)}


def _record(place: int, case: str, probes: list[dict[str, Any]]) -> dict[str, Any]:
    damage = {"perplexity_before": 2.0, "perplexity": 2.0, "neighborhood_kl": 0.5, "retention": None}
    request = {"prompt": "{} is", "subject": f"subject {case}", "target": WANTED}
    edit = {"place": place, "case": case, "status": "ok", "reason": None, "warnings": [], "request": request}
    return {**edit, "diagnostics": {}, "probes": probes, **damage}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("rome", [True, False], seed=1, fields={"lr": 0.1})`: a finished run. Every case has one probe of each
    of three kinds, the first answered as wanted where the list says so; `extra` are probes of the first case."""

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
        folder = tmp_path / "runs" / f"{editor}-{dataset}-{seed}-{len(list(tmp_path.rglob('results.json')))}"
        folder.mkdir(parents=True)
        records = []
        for place, is_right in enumerate(right):
            case = f"{cases}{place}"
            probes = [_probe(kind, f"{kind} {case}", is_right or kind != "rewrite") for kind in KINDS]
            records.append(_record(place, case, probes + (extra or [] if place == 0 else [])))
        summed = summary.summarise(records, dataset=dataset, seed=seed)
        config = {"seed": seed, "confidence": 0.95, "n_edits": len(right), "batch_size": 1, "editor": own}
        results: dict[str, Any] = {
            "schema_version": 1,
            "names": {"editor": editor, "model": "m", "dataset": dataset, "protocol": "single"},
            "config": {**config, "dataset": {"name": dataset}},
            "digests": {"settings": folder.name, "model": "m", "cases": cases},
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
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "records.jsonl").write_bytes(b"".join(map(jsonl.render, records)))
        return folder

    return make


def _command(*arguments: str) -> str:
    console = Console(file=(out := io.StringIO()), width=200)
    assert main.run(list(arguments), console, console) == 0
    return out.getvalue()


def _shown(root: Path) -> str:
    console = Console(file=(out := io.StringIO()), width=200)
    report.show(publish.finished(root), console)
    return out.getvalue()


# --- numbers of cases ---------------------------------------------------------------------------------------------


def _line(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_a_mean_over_fewer_cases_than_the_table_states_them_everywhere(make_run: MakeRun) -> None:
    """A column that exists for 1 case of 12 does not look like a mean over 12."""
    for editor, is_right in (("rome", True), ("memit", False)):
        root = make_run(editor, [True] * 12, extra=[_probe("portability", "p", is_right)]).parent
    assert "n=1" in _line(_shown(root), "Portability")
    assert "n=" not in _line(_shown(root), "Reliability")
    assert "Means over 12 cases" in _shown(root)
    publish.publish(root)
    for name, mark in (("table.md", "n = 1"), ("table.tex", "$n=$1"), ("index.html", "n = 1")):
        text = (root / "report" / name).read_text(encoding="utf-8")
        assert mark in text, name
        assert "Means over 12 cases" in text, name
    assert "Portability (n = 1)" in (root / "report" / "index.html").read_text(encoding="utf-8")
    compared = _command("compare", str(root), "rome", "memit")
    assert "n=1" in _line(compared, "Portability")
    assert "n=" not in _line(compared, "Generalization")


def test_nothing_is_marked_between_0_and_100_on_one_case(make_run: MakeRun) -> None:
    for editor, is_right in (("rome", True), ("memit", False)):
        root = make_run(editor, [True] * 12, extra=[_probe("portability", "p", is_right)]).parent
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
    shown = _shown(swept)
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
    root = make_run("rome", [True], extra=[_probe("elsewhere", "p", True), _probe("attribute", "q", False)]).parent
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
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    there: dict[str, Any] = {}
    exec(block, there)
    assert len(there["failed"]) == 1


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
    assert "75.0  ± 25.0" in _line(_shown(seeded), "Reliability")
    assert "Means over 4 cases per seed, ± standard deviation between seeds." in _shown(seeded)
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
    shown = _command("compare", str(seeded), "rome", "memit")
    assert shown.count("ROME and MEMIT") + shown.count("rome and memit") == 1
    assert "12 cases, 3 seeds" in shown
    assert "75.0 ± 25.0" in _line(shown, "Reliability")
    (found,) = json.loads(_command("compare", "--json", str(seeded), "rome", "memit"))
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
    assert "100.0" in _line(_shown(root), "Wide margin")
    publish.publish(root)
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert "<dt>Wide margin</dt><dd>The wanted answer wins &lt;clearly&gt;.</dd>" in page
    assert "<h4>Wide margin</h4>" in page
    assert "Wide margin" in (root / "report" / "table.md").read_text(encoding="utf-8")
    tex = (root / "report" / "table.tex").read_text(encoding="utf-8")
    assert "Wide margin" in tex
    assert latex_tables.problems(tex) == []
    assert "Wide margin" in _command("compare", str(root), "rome", "memit")


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
    assert "50.0" in _line(_shown(folder.parent), "Far reach")
    assert "locality unchanged" not in _shown(folder.parent).lower()


# --- examples -----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_model_said_to_edits_that_failed_and_held(make_run: MakeRun) -> None:
    hostile = _probe("paraphrase", "<script>alert(1)</script>", False, "<b>" + "x" * 5000)
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
    root = make_run("rome", [True], extra=[_probe("portability", "p", False, None)]).parent
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
    shown = _command("report", str(root), "style=paper", "scoring=teacher_forced")
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
        _command("report", str(folder.parent), *words)


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
    shown = _command("compare", str(root), "rome", "memit")
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
