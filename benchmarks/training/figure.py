"""The picture of one training: losses and held-out scores against the steps, the step that is kept marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.palette import BLUE, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

GREEN = "#009e73"
SCORES = (("reliability", BLUE, "o"), ("generalization", GREEN, "s"), ("locality", VERMILION, "^"))
LOSSES = (("edit", "#332288", "loss of new answers"), ("locality", "#aa4499", "divergence of what stays"))
PROTOCOLS = (("probability", "Held out: preferred"), ("teacher_forced", "Held out: tokens right"))


def curve(result: Mapping[str, Any]) -> bytes:
    """Three panels as PNG, of a training.json."""
    history, best = result["history"], result["best"]["step"]
    name = readable(result["names"]["editor"])
    panels = [Panel(f"{name}: training losses", lambda axis: _losses(axis, history, best))]
    for protocol, title in PROTOCOLS:
        panels.append(Panel(title, lambda axis, protocol=protocol: _scores(axis, result, protocol)))
    return png(panels)


def _losses(axis: Any, history: Sequence[Mapping[str, Any]], best: int) -> None:
    steps = [entry["step"] for entry in history]
    for name, colour, label in LOSSES:
        axis.plot(steps, [entry["losses"][name] for entry in history], color=colour, marker=".", label=label)
    axis.set_yscale("log")
    axis.set_ylabel("nats a token")
    _steps(axis, best)


def _scores(axis: Any, result: Mapping[str, Any], protocol: str) -> None:
    history = [{"step": 0, "held_out": result["before"]}, *result["history"]]
    for name, colour, marker in SCORES:
        points = [
            (entry["step"], 100 * entry["held_out"][protocol][name]["mean"])
            for entry in history
            if name in entry["held_out"].get(protocol, {})
        ]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, label=name)
    axis.set_ylim(0, 104)
    axis.set_ylabel("share of held-out edits, %")
    _steps(axis, result["best"]["step"])


def _steps(axis: Any, best: int) -> None:
    axis.axvline(best, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)))
    axis.set_xlabel("training steps (the dashed one is kept)")
    axis.grid(linewidth=0.4, alpha=0.5)
