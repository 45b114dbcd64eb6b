"""Results of runs that were never carried out, for tables and marks."""

from __future__ import annotations

from typing import Any


def results_with(editor: str, **names: str) -> dict[str, Any]:
    return {
        "names": {"editor": editor, "model": "m", "dataset": "d", "protocol": "single", **names},
        "config": {"seed": 0, "confidence": 0.95, "editor": {"name": editor}},
        "digests": {"settings": f"{editor}-digest"},
        "before": {},
    }
