"""`errata report`: tables that agree with the results, a page that needs nothing else, one look for each method."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.markers import MarkerStyle
from result_values import results_with
from rich.console import Console

import errata
from errata import editors
from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.reports import batch_sizes, charts, glossary, groups, naming, palette, panels, publish, tables
from errata.benchmarks.reports import page as html_page
from errata.benchmarks.reports.seeds import combined
from errata.benchmarks.runs.sweeps import Sweep
from errata.cli import main
from errata.editors.core.errors import ConfigError
from errata.editors.core.files import jsonl

FAST = {"generation": {"tokens": 4, "fluency_tokens": 0}, "collapse": {"n_texts": 4, "known_facts": 10}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on zsRE, and a sequence."""
    out = tmp_path_factory.mktemp("runs & <more>")
    plain = {"model": {"name": "world"}, "device": "cpu", "n_edits": 3, "out": str(out), **FAST}
    quick = {"v_num_grad_steps": 4, "mom2_adjustment": False}
    for name in ("rome", "r_rome"):
        bench.run(BenchConfig.of({**plain, "editor": {"name": name, **quick}, "dataset": {"name": "world_zsre"}}))
    sequence = {"protocol": {"name": "sequential"}, "batch_size": 1, "eval_every": 1, "dataset": {"name": "world"}}
    bench.run(BenchConfig.of({**plain, **sequence, "editor": {"name": "c_rome", **quick}}))
    return out


@pytest.fixture(scope="module")
def written(sweep: Path) -> Path:
    console = Console(file=io.StringIO(), width=160)
    assert main.run(["report", str(sweep)], console, console) == 0
    return sweep / "report"


class _Page(HTMLParser):
    """Which tags are open, which ids there are, and what is referred to."""

    VOID = ("meta", "br", "path", "use", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.references.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_runs_nothing(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert len(text) < 1_000_000


def test_ids_of_a_page_are_its_own_and_every_reference_finds_one(written: Path) -> None:
    page = _Page((written / "index.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)


def test_the_page_has_both_grounds_widths_and_print(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    for needed in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", 'name="viewport"'):
        assert needed in text


def test_the_page_says_what_was_run_and_how_to_repeat_it(written: Path, sweep: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    assert "<h1>ROME, r-ROME and C-ROME on world</h1>" in text
    assert text.count("<code>errata bench ") == 3
    assert "as the papers score zsRE" in text
    assert "runs &amp; &lt;more&gt;" in text
    assert sweep.name not in text, "a name of a folder was not escaped"
    shown = {metric for group in groups.groups(publish.finished(sweep)) for key in group.cells for metric in key}
    for name, title, meaning in (*glossary.metric_terms(), *glossary.SCORINGS):
        assert (name in shown) is (f"<dt>{title}</dt>" in text), name
        assert meaning


def test_the_page_of_the_same_runs_has_the_same_bytes(written: Path, sweep: Path, tmp_path: Path) -> None:
    command = next(iter(re.findall(r"<code>(errata report .*?)</code>", (written / "index.html").read_text())))
    again = publish.publish(sweep, tmp_path, command=html.unescape(command))
    assert any(path.suffix == ".html" for path in again)
    assert all(path.read_bytes() == (written / path.name).read_bytes() for path in again)
    assert len(again) == len([path for path in written.iterdir() if path.is_file()])


# --- tables -------------------------------------------------------------------------------------------------------


def test_every_number_of_the_tables_is_that_of_the_results(written: Path, sweep: Path) -> None:
    long = pd.read_parquet(written / "table.parquet")
    results = errata.load_results(sweep).set_index("run")
    shares = long[~long["scoring"].eq("damage") & ~long["metric"].eq("score")]
    assert len(shares) > 15
    for _, row in shares.iterrows():
        path = f"summary.{row['scoring']}.{row['metric']}"
        assert [row[name] for name in ("mean", "low", "high", "n")] == [
            results.loc[row["run"], f"{path}.{name}"] for name in ("mean", "low", "high", "n")
        ]
    assert pd.read_csv(written / "table.csv").shape == long.shape


def test_names_are_escaped_once(sweep: Path, tmp_path: Path) -> None:
    (run,) = sweep.glob("c_rome*")
    shutil.copytree(run, tmp_path / run.name)
    path = tmp_path / run.name / "results.json"
    results = json.loads(path.read_text())
    results["names"]["model"] = "R&D <1>"
    path.write_text(json.dumps(results))
    console = Console(file=io.StringIO(), width=160)
    assert main.run(["report", str(tmp_path)], console, console) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<title>C-ROME on R&amp;D &lt;1&gt;: errata</title>" in page
    assert "<h1>C-ROME on R&amp;D &lt;1&gt;</h1>" in page
    assert "&amp;amp;" not in page
    assert "&amp;lt;" not in page


def test_markdown_and_latex_say_the_level_of_their_intervals() -> None:
    run = results_with("rome")
    run["config"]["confidence"] = 0.9
    group = groups.Group("m", "m", [run], ["rome"], "probability", [{}], {})
    assert "90 % intervals" in tables.markdown([group])
    assert r"90\,\% intervals" in tables.latex([group])
    assert "90 or 95 % intervals" in tables.markdown([group, replace(group, runs=[results_with("rome")])])


def test_markdown_and_latex_hold_every_run_under_every_scoring(written: Path, sweep: Path) -> None:
    found = groups.groups(publish.finished(sweep))
    rows = sum(len(group.runs) * len(group.scorings()) for group in found)
    markdown, latex = (written / "table.md").read_text(), (written / "table.tex").read_text()
    assert rows >= 6
    assert len(re.findall(r"^\| (ROME|r-ROME|C-ROME) \|", markdown, flags=re.MULTILINE)) == rows
    assert len(re.findall(r"^(ROME|r-ROME|C-ROME) & .*\\\\$", latex, flags=re.MULTILINE)) == rows
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(found)


def test_zsre_is_scored_by_teacher_forced_tokens_as_in_its_papers(sweep: Path) -> None:
    (group,) = [group for group in groups.groups(publish.finished(sweep)) if "zsre" in group.title]
    assert group.scorings()[0][0] == "teacher_forced"
    papers = errata.load_results(sweep).query("dataset == 'world_zsre'")
    for name, metric in (("efficacy", "reliability"), ("paraphrase", "generalization"), ("specificity", "locality")):
        ours = papers[f"summary.teacher_forced.{metric}.mean"]
        assert papers[f"papers.{name}.mean"].tolist() == ours.tolist()
    low, mean, high = (papers[f"papers.score.{name}"].tolist() for name in ("low", "mean", "high"))
    assert all(a <= b <= c for a, b, c in zip(low, mean, high, strict=True))


# --- names and looks ----------------------------------------------------------------------------------------------


def test_runs_of_one_method_are_told_apart_by_the_settings_that_differ() -> None:
    runs = [results_with("memit"), results_with("memit"), results_with("rome")]
    for run, size in zip(runs, (1, 16, 16), strict=True):
        run["config"]["batch_size"] = size
    assert naming.labels(runs) == ["memit batch_size=1", "memit batch_size=16", "rome"]
    assert naming.readable("r_rome batch_size=1") == "r-ROME batch_size=1"


def test_a_time_limit_is_no_setting_that_tells_runs_apart() -> None:
    runs = [results_with("rome") for _ in range(2)]
    for run, limit, size in zip(runs, (None, 5), (1, 16), strict=True):
        run["config"] |= {"time_limit": limit, "batch_size": size}
    assert naming.labels(runs) == ["batch_size=1", "batch_size=16"]


def test_runs_without_a_difference_are_told_apart_by_their_digests() -> None:
    runs = [{**results_with("rome"), "digests": {"settings": digest}} for digest in ("abcdefgh", "ijklmnop")]
    assert naming.labels(runs) == ["rome abcdef", "rome ijklmn"]


def test_groups_that_are_called_alike_say_what_tells_them_apart() -> None:
    few, many = results_with("rome"), results_with("rome")
    few["config"]["n_edits"], many["config"]["n_edits"] = 10, 20
    assert naming.titles([[few], [many]]) == ["m, d, single, n_edits=10", "m, d, single, n_edits=20"]
    assert naming.titles([[few]]) == ["m, d, single"]


def test_titles_that_are_cut_alike_have_names_of_their_own() -> None:
    long = "a-model-with-quite-a-long-name, counterfact_plus, sequential, "
    titles = [f"{long}n_edits=10", f"{long}n_edits=20", "m, d, single", "M, d, single", "same", "same"]
    found = naming.file_names(titles)
    assert len({name.lower() for name in found}) == len(titles)
    assert all(name.startswith("a-model-with-quite-a-long-name") for name in found[:2])
    assert naming.file_names(["m, d, single"]) == ["m-d-single"]


@pytest.mark.slow
def test_groups_with_long_names_have_pictures_and_sections_of_their_own(sweep: Path, tmp_path: Path) -> None:
    (run,) = sweep.glob("c_rome*")
    for edits in (10, 20):
        shutil.copytree(run, tmp_path / str(edits))
        path = tmp_path / str(edits) / "results.json"
        results = json.loads(path.read_text())
        results["names"]["model"] = "a-model-whose-name-is-so-long-that-no-title-fits-into-sixty"
        results["config"]["n_edits"] = results["before"]["n_edits"] = edits  # groups of their own
        path.write_text(json.dumps(results))
    files = publish.publish(tmp_path)
    assert len([path for path in files if path.name.endswith("-curves.png")]) == 2
    page = _Page(files[0].read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))


def test_every_method_has_a_colour_and_a_mark_of_its_own() -> None:
    there = [palette.LOOKS[name] for name in palette.LOOKS]
    assert len({look.colour for look in there}) == len({look.marker for look in there}) == len(there)
    assert set(editors.METHODS) <= set(palette.LOOKS)
    assert palette.look("someone's") == palette.look("someone's")


def test_every_mark_is_seen_without_an_outline_and_has_a_sign_on_the_page() -> None:
    for name, look in palette.LOOKS.items():
        assert MarkerStyle(look.marker).is_filled(), name
        assert len(html_page._sign(look.marker).removesuffix(html_page._AS_TEXT)) == 1, name


def test_a_method_keeps_its_colour_whatever_stands_beside_it() -> None:
    alone = palette.looks([results_with("memit")])
    beside = palette.looks([results_with(name) for name in ("rome", "alphaedit", "memit")])
    assert alone[0].colour == beside[2].colour
    twice = palette.looks([results_with("memit"), results_with("memit")])
    assert twice[0].colour == twice[1].colour
    assert (twice[0].alpha, twice[0].dash) != (twice[1].alpha, twice[1].dash)


def test_runs_stand_in_one_order_by_method_and_batch_size() -> None:
    runs = [results_with(name) for name in ("memit", "memit", "someone's", "rome")]
    for run, size in zip(runs, (64, 8, 1, 1), strict=True):
        run["config"]["batch_size"] = size
    found = [(run["names"]["editor"], run["config"]["batch_size"]) for run in naming.ordered(runs)]
    assert found == [("rome", 1), ("memit", 8), ("memit", 64), ("someone's", 1)]


# --- pictures -----------------------------------------------------------------------------------------------------


def test_a_panel_in_a_page_takes_the_pages_ink_and_in_a_file_is_a_png(sweep: Path) -> None:
    (group,) = [group for group in groups.groups(publish.finished(sweep)) if "zsre" in group.title]
    trade_off = charts.trade_off(group.runs, "teacher_forced")
    assert trade_off is not None
    shown = [*charts.scores(group.runs, "teacher_forced"), trade_off]
    for panel in shown:
        text = panels.svg(panel, "x")
        ET.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        assert "var(--ink, #222222)" in text
        assert f"var({palette.variable(palette.VERMILION)}, {palette.VERMILION})" in text
        assert "<text" in text
        assert "date" not in text.lower()
    assert panels.png(shown).startswith(b"\x89PNG")
    assert panels.png(shown) == panels.png(shown)


def test_without_locality_there_is_no_trade_off_to_draw() -> None:
    run = {**results_with("rome"), "summary": {"probability": {"reliability": {"mean": 1.0, "low": 1.0, "high": 1.0}}}}
    assert charts.trade_off([run], "probability") is None


def test_a_sequence_has_curves_and_no_marks_of_single_edits(sweep: Path) -> None:
    (group,) = [group for group in groups.groups(publish.finished(sweep)) if "sequential" in group.title]
    assert [panel.title for panel in charts.collapse(group.runs)][-1] == "Perplexity"
    assert charts.damage(group.runs) is None
    assert tables.damage(group.runs)["disabling edits"] == ["-"]


def test_signs_of_doubt_have_a_row_where_any_run_shows_them(sweep: Path) -> None:
    runs = next(group for group in groups.groups(publish.finished(sweep)) if len(group.runs) == 2).runs
    sure, doubtful = ({**runs[0], "doubts": found} for found in ({}, {"search": 3, "size": 1}))
    old = {name: value for name, value in runs[0].items() if name != "doubts"}
    assert tables.damage([doubtful, sure, old])["doubtful edits"] == ["search 3, size 1", "0", "-"]
    assert "doubtful edits" not in tables.damage([sure, old])
    both = combined([doubtful, sure, {**doubtful, "doubts": {"size": 2}}])
    assert tables.damage([both])["doubtful edits"] == ["search 3, size 3"]


def test_what_a_sequence_holds_is_drawn_against_its_edits(tmp_path: Path) -> None:
    run = {**results_with("rome"), "folder": str(tmp_path)}
    run["names"]["protocol"] = "sequential"
    assert charts.growth([run]) == []
    for edits in range(1, 201):
        spent = {"edit": 0.1 * edits, "edits": edits, "memory": None, "disk": 1000 * edits}
        jsonl.append(tmp_path / "seconds.jsonl", {"case": str(edits), **spent})
    panels_ = charts.growth([run])
    assert [panel.title for panel in panels_] == ["Milliseconds per edit", "Edits on disk, MB"]
    assert charts._medians(charts._held(run), "disk")[:2] == [(2.5, 2500), (6.5, 6500)]
    assert panels.png(panels_).startswith(b"\x89PNG")
    run["names"]["protocol"] = "single"
    assert charts.growth([run]) == []


def _study(editor: str, size: int, *, seed: int = 0) -> dict[str, Any]:
    """A run of a study of batch sizes, with scores that say which it is."""
    run = results_with(editor, protocol="sequential", dataset="counterfact")
    run["config"] |= {"batch_size": size, "seed": seed}
    entry = {"mean": 1 / size, "low": 0.5 / size, "high": 1.0}
    run |= {"summary": {"probability": {"reliability": entry}}, "papers": {"score": entry}}
    return run | {"collapse": {"retention": 0.5, "perplexity_ratio": "inf" if size == 64 else 1.0 + size}}


def test_a_study_of_batch_sizes_is_drawn_as_a_line_a_method() -> None:
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    runs = [_study(editor, size) for editor in ("memit", "emmet") for size in (64, 1, 8)]
    shown = batch_sizes.panels(runs, "probability")
    assert [panel.title for panel in shown] == ["Score, %", "Reliability, %", "Known facts kept, %", "Perplexity"]
    axis = Figure().subplots()
    shown[1].draw(axis)
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "8", "64"]
    handles, names = axis.get_legend_handles_labels()
    assert names == ["MEMIT", "EMMET"]
    for handle, method in zip(handles, ("memit", "emmet"), strict=True):
        assert isinstance(handle, ErrorbarContainer)
        (data, *_) = handle.lines
        assert np.asarray(data.get_xdata()).tolist() == [1, 8, 64]
        assert np.asarray(data.get_ydata()).tolist() == [100.0, 12.5, 100 / 64]
        assert data.get_color() == palette.LOOKS[method].colour
    assert panels.png(shown, across=3).startswith(b"\x89PNG")
    assert all("<path" in panels.svg(panel, "x") for panel in shown)


def test_where_runs_differ_in_more_than_their_batches_there_is_no_line() -> None:
    sizes = [_study("memit", size) for size in (1, 8)]
    assert batch_sizes.panels(sizes, "probability")
    assert batch_sizes.panels(sizes[:1], "probability") == []
    assert batch_sizes.panels([*sizes, _study("memit", 8, seed=1)], "probability") == []
    single = [{**run, "names": {**run["names"], "protocol": "single"}} for run in sizes]
    assert batch_sizes.panels(single, "probability") == []


@pytest.mark.usefixtures("_nothing_rendered")
def test_runs_without_results_are_named_on_the_page(sweep: Path, tmp_path: Path) -> None:
    text = publish.publish(sweep, tmp_path)[0].read_text(encoding="utf-8")
    assert "not in this report" not in text
    plan = Sweep.begin(tmp_path / "more", "", [["editor=rome"], ["editor=memit"]])
    plan.fail(0, ConfigError("no such <layer>"))
    shutil.copytree(Path(publish.finished(sweep)[0]["folder"]), tmp_path / "more" / "run")
    text = publish.publish(tmp_path / "more")[0].read_text(encoding="utf-8")
    assert "2 runs not in this report" in text
    assert "no such &lt;layer&gt;" in text
    assert "pending" in text


# --- what cannot be reported --------------------------------------------------------------------------------------


def test_a_folder_without_finished_runs_is_refused_and_gets_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        publish.publish(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="which is none"):
        publish.publish(tmp_path / "absent")


@pytest.mark.usefixtures("_nothing_rendered")
def test_runs_whose_records_are_gone_are_reported_without_ties(sweep: Path, tmp_path: Path) -> None:
    for run in publish.finished(sweep):
        copy = tmp_path / Path(run["folder"]).name
        copy.mkdir()
        (copy / "results.json").write_bytes((Path(run["folder"]) / "results.json").read_bytes())
    page = publish.publish(tmp_path)[0]
    for path in (page, tmp_path / "report" / "table.md", tmp_path / "report" / "table.tex"):
        assert tables.UNPAIRED in path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_page_names_the_versions_of_all_runs(sweep: Path, tmp_path: Path) -> None:
    for place, run in enumerate(sorted(sweep.glob("*rome-world-world_zsre*"))):
        shutil.copytree(run, tmp_path / run.name)
        path = tmp_path / run.name / "results.json"
        results = json.loads(path.read_text())
        results["versions"]["torch"] = f"2.{place}"
        path.write_text(json.dumps(results))
    text = publish.publish(tmp_path)[0].read_text(encoding="utf-8")
    assert text.count("torch 2.0") == text.count("torch 2.1") == 1


def test_a_report_cannot_go_to_a_file(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be made"):
        publish.publish(sweep, tmp_path / "file")
