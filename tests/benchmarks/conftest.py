"""What several files of these tests share because it takes seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest
from fact_folders import QUICK, SUBJECTS, write
from typed_commands import run


@pytest.fixture(scope="session")
def applied_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with facts.jsonl, which was applied; tests work in copies of it."""
    folder = tmp_path_factory.mktemp("applied")
    run("apply", str(write(folder / "facts.jsonl", SUBJECTS)), *QUICK)
    return folder
