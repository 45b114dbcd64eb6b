"""Another package's dataset, metric, kind of probe, protocol, report column and kind of adapter, as the pages show."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import installed_package
import pytest
import torch
from installed_package import register

import errata
from errata.benchmarks.bench import protocols
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.reports import added_columns, tables
from errata.benchmarks.runs import summary
from errata.cli import overrides
from errata.editors.core.errors import ConfigError, DatasetError, LedgerError, RequestError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.evaluate import metrics
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import ProbeScore
from errata.testing.tiny_models import tiny_model

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "adding-a-dataset.md").read_text(encoding="utf-8")
QUICK = "generation.tokens=4 generation.fluency_tokens=0 collapse.n_texts=2 collapse.known_facts=3 editor.num_steps=3"


def files_of_the_page() -> dict[str, str]:
    """The files that the page names, and its other blocks of Python below them as one module."""
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
    _, _, rest = PAGE.partition("## A kind of probe\n")
    measures = re.findall(r"```python\n(.*?)```", rest, flags=re.DOTALL)
    return {**files, "capitals_measures.py": "\n".join(measures)}


def commands_of_the_page() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("errata bench")]
    return [[*shlex.split(line)[1:], *QUICK.split(), "out=runs"] for line in lines]


@dataclass(frozen=True)
class Used:
    """What the page's commands printed and wrote."""

    folder: Path
    target: Path
    shown: str
    runs: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Used:
    """The page's package, installed; its commands, a report of them and the help, in one process."""
    folder = tmp_path_factory.mktemp("capitals")
    target = installed_package.install(files_of_the_page(), folder / "source", folder / "target")
    words = [*commands_of_the_page(), ["report", "runs"], ["bench", "--help"], ["completion", "bash"]]
    ran = installed_package.python(
        installed_package.COMMANDS, json.dumps(words), target=target, folder=folder / "source"
    )
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("results.json")}
    return Used(folder / "source", target, ran, found)


def run_of(used: Used, **config: Any) -> dict[str, Any]:
    """The one run whose names or dataset options are these."""
    found = [run for run in used.runs.values() if all(_said(run)[name] == value for name, value in config.items())]
    (run,) = found
    return run


def _said(run: dict[str, Any]) -> dict[str, Any]:
    return {**run["names"], "options": run["config"]["dataset"].get("options", {})}


def test_the_dataset_is_read_with_its_options_and_what_it_dropped_is_counted(used: Used) -> None:
    plain = run_of(used, protocol="single", options={})
    assert plain["names"]["dataset"] == "capitals"
    assert plain["counts"]["edits"] == 4
    assert plain["dropped"][0]["record"] == "Dairesse"
    assert plain["dropped"][0]["field"] == "target"
    other = run_of(used, options={"prompt": "The capital of {} is"})
    assert other["digests"]["cases"] != plain["digests"]["cases"]
    assert "dataset=capitals" in plain["command"]
    assert "dataset.options=" in other["command"]


def test_the_protocol_decides_the_order_of_the_edits(used: Used) -> None:
    forwards, backwards = run_of(used, protocol="single", options={}), run_of(used, protocol="backwards")
    assert cases_of(used, backwards) == cases_of(used, forwards)[::-1]
    assert len(cases_of(used, backwards)) == 4
    assert backwards["sequence"] is True
    assert forwards["sequence"] is False


def cases_of(used: Used, run: dict[str, Any]) -> list[str]:
    """The cases of a run in the order of their edits."""
    name = next(name for name, found in used.runs.items() if found is run)
    lines = (used.folder / "runs" / name / "records.jsonl").read_text().splitlines()
    return [record["case"] for record in sorted(map(json.loads, lines), key=lambda record: record["place"])]


def test_the_names_are_in_the_help_and_in_completion(used: Used) -> None:
    assert re.search(r"dataset=  .*\bcapitals\b", used.shown)
    assert re.search(r"protocol=  .*\bbackwards\b", used.shown)
    assert re.search(r"\bworld_zsre\b.*\bcapitals\b|\bcapitals\b.*\bworld_zsre\b", used.shown)


def test_the_metrics_are_measured_beside_ours(used: Used) -> None:
    summary = run_of(used, protocol="single", options={})["summary"]
    assert summary["teacher_forced"]["reversal"]["n"] == 4
    assert summary["teacher_forced"]["first_token"]["n"] == 4
    assert "first_token" not in summary["probability"]
    assert "reversal_unchanged" not in summary["teacher_forced"]


def test_the_metrics_are_in_the_terminal_on_the_page_and_in_the_tables(used: Used) -> None:
    (page,), (table,) = used.folder.glob("runs/**/*.html"), used.folder.glob("runs/**/table.md")
    html, markdown = page.read_text(encoding="utf-8"), table.read_text(encoding="utf-8")
    for title in ("Reversal", "First token"):
        assert re.search(rf"^ +{title} ", used.shown, flags=re.MULTILINE)
        assert f"<span>{title}</span>" in html
        assert f"| {title} |" in markdown
    assert "The new answer leads back to the subject." in html


def test_a_comparison_has_the_metric_and_a_conversion_the_options_of_the_dataset(used: Used) -> None:
    name = next(iter(used.runs))
    dataset = ["dataset", "dataset=capitals", "dataset.path=capitals.csv", "dataset.options.prompt=The city of {} is"]
    words = [["compare", f"runs/{name}", f"runs/{name}"], ["convert", *dataset, "out=theirs.json"]]
    ran = installed_package.python(
        installed_package.COMMANDS, json.dumps(words), target=used.target, folder=used.folder
    )
    assert "Reversal" in ran
    assert "First token" in ran
    assert json.loads((used.folder / "theirs.json").read_text())[0]["prompt"] == "The city of Gavaria is"


def test_reports_tell_a_sequence_by_what_its_results_say(used: Used) -> None:
    backwards = {**run_of(used, protocol="backwards"), "folder": "backwards"}
    forwards = {**run_of(used, protocol="single", options={}), "folder": "forwards"}
    assert tables.damage([forwards, backwards])["disabling edits"][1] == "-"
    assert tables.damage([forwards, backwards])["disabling edits"][0] != "-"


def test_results_name_the_package_and_its_version(used: Used) -> None:
    assert all(run["versions"]["capitals"] == "0.1" for run in used.runs.values())


def test_the_column_is_in_the_terminal_on_the_page_and_in_the_csv(used: Used) -> None:
    (page,), (table,) = used.folder.glob("runs/**/*.html"), used.folder.glob("runs/**/*.csv")
    assert re.search(r"edits per minute +[\d,]+", used.shown)
    html = page.read_text(encoding="utf-8")
    assert '<th scope="row">edits per minute</th>' in html
    assert "How many edits the method alone makes in a minute." in html
    with table.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert all(60 / float(row["seconds_per_edit"]) == pytest.approx(float(row["edits_per_minute"])) for row in rows)


# --- what another package may not register ----------------------------------------------------------------------------

BAD = """
from errata import Case, EditRequest, Probe
from errata.benchmarks.bench.edit_protocol import EditProtocol
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.reports.added_columns import ReportColumn
from errata.evaluate.metrics import Metric
from errata.evaluate.probes import ProbeKind

request = EditRequest("{} is", "Oslen", "here")
case = Case("a", request, (Probe("rewrite", "Oslen is", "here"),))
def crash(outcome): raise KeyError("subject")
def broken(path=None): raise KeyError("subject")
def nothing(): return Loaded([case])
def twice(path=None): return Loaded([case, case])
def plain(path=None): return [case]
def needs(path, *, language): return Loaded([case])
def strange(path=None): return Loaded([Case("a", request, (Probe("rewrit", "Oslen is"),))])
def fine(path=None): return Loaded([case])
THIEF = Metric("locality", "", "", ("rewrite",))
OTHER = Metric("other", "", "", ("rewrit",))
CRASH = Metric("crash", "", "", ("rewrite",), crash)
PERCENT = Metric("percent", "", "", ("rewrite",), lambda outcome: {"probability": 93.0})
SAME = ProbeKind("same", metric="locality")
COLUMN = ReportColumn("column", "", "", lambda run: [1])
"""


@pytest.fixture
def bad(installed: Path) -> Path:
    """A module with things that cannot be what they are registered as."""
    (installed / "bad_things.py").write_text(BAD, encoding="utf-8")
    return installed


@pytest.mark.parametrize(
    ("thing", "options", "error", "said"),
    [
        ("gone", {}, ConfigError, "the dataset 'it' of the package bad, registered as 'bad_things:gone', cannot be"),
        ("case", {}, ConfigError, r"is not a function read\(path, \*\*options\) -> Loaded but Case"),
        ("nothing", {}, ConfigError, "the dataset 'it' .*, takes no path; its first argument must be the path"),
        ("broken", {}, DatasetError, "the dataset 'it' of the package bad, .* failed: KeyError: 'subject'"),
        ("twice", {}, DatasetError, "record a, field 'id': the dataset 'it' .* returned two cases with this id"),
        ("plain", {}, DatasetError, "returned list; it must return Loaded"),
        ("strange", {}, RequestError, "field 'kind': unknown kind of probe 'rewrit'; did you mean 'rewrite'"),
        ("needs", {}, ConfigError, "dataset.path is missing: the dataset 'it' of the package bad"),
        ("fine", {"langage": "de"}, ConfigError, "dataset.options.langage: the dataset 'it' .* has no such option"),
    ],
)
def test_a_dataset_that_breaks_the_contract_is_refused_by_name(
    bad: Path, thing: str, options: dict[str, str], error: type[Exception], said: str
) -> None:
    register(bad, "bad", "errata.datasets", {"it": f"bad_things:{thing}"})
    with pytest.raises(error, match=said):
        datasets.load("it", options=options)


def test_options_are_named_with_the_nearest_that_there_is(bad: Path) -> None:
    register(bad, "bad", "errata.datasets", {"it": "bad_things:needs"})
    with pytest.raises(ConfigError, match=r"dataset.options.langage: .* did you mean 'language'"):
        datasets.load("it", bad, options={"langage": "de"})
    with pytest.raises(ConfigError, match=r"dataset.options.language is missing"):
        datasets.load("it", bad)
    assert len(datasets.load("it", bad, options={"language": "de"}).cases) == 1
    with pytest.raises(ConfigError, match=r"dataset.options: the dataset 'world' takes none, got language"):
        datasets.load("world", options={"language": "de"})


@pytest.mark.parametrize(
    ("group", "name", "said"),
    [
        ("metrics", "other", "the metric 'other' is over unknown probes of the kind 'rewrit'; did you mean 'rewrite'"),
        ("metrics", "odd", "the metric 'odd' .* has the name 'other'; give both the same name"),
        ("metrics", "crash", "the metric 'crash' of the package bad, .* failed: KeyError: 'subject'"),
        ("metrics", "percent", r"returned {'probability': 93.0}; it must return a share from 0 to 1 per scoring"),
        ("probe_kinds", "same", "two metrics have the name 'locality'"),
    ],
)
def test_a_metric_that_breaks_the_contract_is_refused_by_name(bad: Path, group: str, name: str, said: str) -> None:
    register(bad, "bad", f"errata.{group}", {name: f"bad_things:{'OTHER' if name == 'odd' else name.upper()}"})
    probe = Probe("rewrite", "Oslen is", "here")
    with pytest.raises(ConfigError, match=said):
        metrics.case_values([metrics.Outcome(probe, ProbeScore(1.0, None, (True,), (), (3,)))])


def test_a_column_that_breaks_the_contract_is_refused_by_name(bad: Path) -> None:
    register(bad, "bad", "errata.report_columns", {"column": "bad_things:COLUMN"})
    with pytest.raises(ConfigError, match=r"the report column 'column' of the package bad, .* returned list; it must"):
        list(added_columns.added_values({}))


def test_no_name_of_ours_can_be_taken_and_none_twice(bad: Path) -> None:
    register(bad, "thief", "errata.datasets", {"world": "bad_things:broken", "it": "bad_things:fine"})
    register(bad, "metric_thief", "errata.metrics", {"locality": "bad_things:THIEF"})
    assert len(datasets.load("world", limit=2).cases) == 2
    assert metrics.declared() == metrics.METRICS
    register(bad, "second", "errata.datasets", {"it": "bad_things:fine"})
    with pytest.raises(ConfigError, match="the dataset 'it' is registered twice, by second and thief; uninstall one"):
        datasets.load("it")


def test_an_unknown_name_is_told_from_those_of_other_packages(bad: Path) -> None:
    register(bad, "bad", "errata.datasets", {"island_facts": "bad_things:fine"})
    register(bad, "worse", "errata.protocols", {"outwards": "bad_things:fine"})
    with pytest.raises(ConfigError, match="unknown dataset 'island_fact'; did you mean 'island_facts'"):
        datasets.load("island_fact")
    with pytest.raises(ConfigError, match=r"dataset: unknown choice 'iland_facts' .*; did you mean 'island_facts'"):
        overrides.translated(["dataset=iland_facts"], "bench")
    with pytest.raises(ConfigError, match="unknown protocol 'outward'; did you mean 'outwards'"):
        protocols.protocol("outward")
    with pytest.raises(ConfigError, match=r"the protocol 'outwards' .* is not an EditProtocol but"):
        protocols.protocol("outwards")


def test_an_unknown_kind_of_probe_is_refused_where_it_is_made() -> None:
    with pytest.raises(RequestError, match="unknown kind of probe 'neighbourhood'; did you mean 'neighborhood'"):
        Probe("neighbourhood", "The capital of Mesmar is", "Gumford")


def test_records_with_a_kind_that_is_not_installed_are_still_read(used: Used) -> None:
    name = next(name for name, run in used.runs.items() if run["names"]["protocol"] == "single")
    records = [json.loads(line) for line in (used.folder / "runs" / name / "records.jsonl").read_text().splitlines()]
    assert {probe["kind"] for probe in records[0]["probes"]} == {"rewrite", "reversal", "neighborhood"}
    assert {found.probe.kind for found in summary.outcomes(records[0])} == {"rewrite", "neighborhood"}


# --- a kind of adapter ------------------------------------------------------------------------------------------------

METHOD_PAGE = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
# One program: a child that knows the kind saves, and the parent, which has not met it, loads.
SAVED_AND_LOADED = """
import os, sys, torch, errata
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.testing.tiny_models import tiny_model

model = tiny_model("gpt2", 320)
folder, logits = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])

def save():
    from shift import Shift
    before = model(ids).logits
    Ledger.of(model).append("moved", Patch({}, {"transformer.h.1.mlp": Shift(torch.arange(32.0))}))
    errata.save_edits(model, folder)
    assert not torch.equal(model(ids).logits, before)
    torch.save(model(ids).logits, logits)

def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(repr(error))
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

in_a_child(save)
assert "shift" not in sys.modules
errata.load_ledger(folder, model)
assert torch.equal(model(ids).logits, torch.load(logits))
"""


def code_of_the_adapter() -> list[str]:
    """The page's module, and what it registers."""
    _, _, section = METHOD_PAGE.partition("## A kind of adapter\n")
    return [re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[0] for language in ("python", "toml")]


def test_the_kind_of_adapter_of_the_page_is_saved_and_loaded_again(tmp_path: Path) -> None:
    code, points = code_of_the_adapter()
    project = f'[project]\nname = "shift"\nversion = "0.1"\n{points}[tool.setuptools]\npy-modules = ["shift"]\n'
    files = {"shift.py": code, "pyproject.toml": project}
    target = installed_package.install(files, tmp_path / "source", tmp_path / "target")
    words = (str(tmp_path / "edits"), str(tmp_path / "logits.pt"))
    installed_package.python(SAVED_AND_LOADED, *words, target=target, folder=tmp_path)
    with pytest.raises(LedgerError, match="unknown kind of adapter 'shift'"):
        errata.load_ledger(tmp_path / "edits", tiny_model("gpt2", 320))


def test_adapters_that_nothing_could_load_again_are_not_saved(installed: Path, tmp_path: Path) -> None:
    (installed / "shift.py").write_text(code_of_the_adapter()[0], encoding="utf-8")
    kind = importlib.import_module("shift").Shift
    model = tiny_model("gpt2", 320)
    ledger = Ledger.of(model)
    ledger.append("a", Patch({}, {"transformer.h.1.mlp": kind(torch.zeros(32))}))
    with pytest.raises(LedgerError, match=r"adapters of kind 'shift' cannot be saved.*errata.adapters.*shift:Shift"):
        errata.save_edits(model, tmp_path / "edits")
    assert not (tmp_path / "edits").exists()
