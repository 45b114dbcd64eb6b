"""What several files of these tests share because it takes seconds to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fact_folders import QUICK, SUBJECTS, write
from survival_runs import COMPRESS, config_of_survival
from typed_commands import run


@pytest.fixture(scope="session")
def applied_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with facts.jsonl, which was applied; tests work in copies of it."""
    folder = tmp_path_factory.mktemp("applied")
    run("apply", str(write(folder / "facts.jsonl", SUBJECTS)), *QUICK)
    return folder


@pytest.fixture(scope="session")
def survived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two edits keep of a merged and pruned model, with the folder of the numbers."""
    from errata.benchmarks.bench.survival import SurvivalPlan, SurvivalStudy

    out = tmp_path_factory.mktemp("survival")
    return out, SurvivalStudy(SurvivalPlan([COMPRESS]), out=out).measure(config_of_survival())
