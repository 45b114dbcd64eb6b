"""The papers' experiments: each composes, brings its sweep along, and is scaled to the testbed by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata import editors
from errata.benchmarks.bench.compose import choices, compose, swept
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.job_plan import expand
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.reports import glossary
from errata.cli import overrides
from errata.editors.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = [name for name in choices("experiment") if "/" not in name]


def test_every_experiment_has_one_for_the_testbed() -> None:
    assert len(EXPERIMENTS) >= 5
    assert {f"testbed/{name}" for name in EXPERIMENTS} == set(choices("experiment")) - set(EXPERIMENTS)


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_job_of_an_experiment_is_a_configuration(name: str) -> None:
    line = f"experiment={name}"
    jobs = expand([*swept([line]), line])
    assert len(jobs) > 1
    for job in jobs:
        config = BenchConfig.of(compose("bench", job))
        assert config.editor["name"] in editors.METHODS
        assert config.n_edits is None or config.n_edits >= 20


def test_the_papers_numbers_are_in_their_experiments() -> None:
    table = BenchConfig.of(compose("bench", ["experiment=alphaedit_table1"]))
    assert (table.n_edits, table.batch_size, table.protocol.name) == (2000, 100, "sequential")
    sizes = swept(["experiment=batch_size_study"])
    assert "batch_size=1,16,64,256,1024,4096" in sizes
    assert compose("bench", ["experiment=batch_size_study"])["n_edits"] == 4096


def test_what_is_typed_is_stronger_than_what_an_experiment_brings_along() -> None:
    lines = overrides.translated(["experiment=testbed/butterfly", "editor=emmet", "n_edits=3"], "bench", sweep=True)
    (job,) = expand([*swept(lines), *lines])
    config = BenchConfig.of(compose("bench", job))
    assert (config.editor["name"], config.n_edits, config.dataset.name) == ("emmet", 3, "world_first")


def test_a_folder_stands_for_the_file_of_each_dataset_in_it(tmp_path: Path) -> None:
    import json

    (tmp_path / "multi_counterfact.json").write_text(json.dumps(world.records("counterfact")[:3]))
    (tmp_path / "zsre_mend_eval.json").write_text(json.dumps(world.records("zsre")[:2]))
    found = [len(datasets.load(name, tmp_path).cases) for name in ("counterfact", "counterfact_plus", "zsre")]
    assert found == [3, 3, 2]
    with pytest.raises(ConfigError, match="no file of easyedit"):
        datasets.load("easyedit", tmp_path)


def test_every_term_of_a_report_stands_on_the_page_about_results() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    terms = [title for _, title, _ in (*glossary.metric_terms(), *glossary.SCORINGS, *glossary.DAMAGE)]
    assert [title for title in terms if title not in page] == []
