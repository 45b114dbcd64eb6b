"""Draw the figures of the pages from their data: `python docs/figures/draw.py [NAME ...]`.

docs/figures/NAME.json is what docs/NAME.png shows. The picture carries a digest of its data, so that a test can tell a
picture that was drawn from other numbers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import attribution
import behaviour
import composing
import equal_damage
import flow_facts
import leaks
import ledger
import locating
import moments
import quantising
import real_model
import real_sequences
import tuning
import unlearning
from PIL import Image, PngImagePlugin

from errata.benchmarks.reports import charts
from errata.benchmarks.reports.panels import png
from errata.benchmarks.runs.run_folder import CURVE
from errata.benchmarks.speed import report as speed_report
from errata.benchmarks.tracing import flow_pictures, head_pictures
from errata.benchmarks.training import figure as training_figure

FOLDER = Path(__file__).parent
CHUNK = "data-sha256"


def demo(data: Mapping[str, Any]) -> bytes:
    """Scores and damage of the runs of `make demo`."""
    with TemporaryDirectory() as scratch:
        runs = []
        for place, run in enumerate(data["runs"]):
            folder = Path(scratch) / str(place)
            folder.mkdir()
            points = [{"edit": i, "perplexity_ratio": ratio} for i, ratio in enumerate(run["perplexity_ratios"])]
            (folder / CURVE).write_text(json.dumps(points), encoding="utf-8")
            runs.append({**run, "folder": str(folder)})
        damage = charts.damage(runs)
        low = [replace(damage, size=(3.3, 1.8))] if damage else []
        return png([*charts.scores(runs, "probability"), *low], across=3)


DRAWN: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = MappingProxyType(
    {
        "behaviour": behaviour.picture,
        "behaviour_kinds": behaviour.picture_of_kinds,
        "leaks": leaks.picture,
        "ledger": ledger.picture,
        "speed": speed_report.picture,
        "growth": speed_report.picture,
        "training": training_figure.curve,
        "demo": demo,
        "moments": moments.picture,
        "locating": locating.picture,
        "information_flow": flow_pictures.of_flow,
        "flow_facts": flow_facts.picture,
        "heads": head_pictures.of_heads,
        "tuning": tuning.picture,
        "real_model": real_model.picture,
        "real_sequences": real_sequences.picture,
        "equal_damage": equal_damage.picture,
        "attribution": attribution.picture,
        "composing": composing.picture,
        "unlearning": unlearning.picture,
        "quantising": quantising.picture,
    }
)


def data_of(name: str) -> dict[str, Any]:
    """Return the data of a figure."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the data, whatever the layout of their file."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def drawn(name: str) -> bytes:
    """Return the figure as PNG, with the digest of its data in a text chunk."""
    data = data_of(name)
    image = Image.open(BytesIO(DRAWN[name](data)))
    told = PngImagePlugin.PngInfo()
    told.add_text(CHUNK, digest(data))
    buffer = BytesIO()
    image.save(buffer, format="png", pnginfo=told, optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    for asked in sys.argv[1:] or DRAWN:
        (FOLDER.parent / f"{asked}.png").write_bytes(drawn(asked))
