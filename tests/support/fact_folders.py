"""Files of facts, and the folders of edits that follow them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errata.editors.core.storage.edit_folder import Edits

QUICK = ["editor=alphaedit"]
SUBJECTS = {"Gavaria": "Praminster", "Mesmar": "Kesford", "Sovaria": "Naistford"}


def write(path: Path, answers: dict[str, str], prompt: str = "The capital of {} is") -> Path:
    rows = [{"prompt": prompt, "subject": subject, "target": target} for subject, target in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def facts_of(edits: Edits) -> dict[str | None, str]:
    return {request.subject: request.target for entry in edits.entries for request in entry.info.requests}


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def work_in_copy(applied: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a folder, work in the copy from now on, and return it."""
    shutil.copytree(applied, copy)
    monkeypatch.chdir(copy)
    return copy
