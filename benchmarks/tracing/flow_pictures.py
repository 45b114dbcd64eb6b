"""The picture of an information flow: the route to one token's prediction through layers and tokens.

Source of the form: Ferrando and Voita 2024, figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.palette import BLUE, GREY, INK, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

# Widths in points: of an edge of the share 1, and of a part of a state. A part that attention brings is drawn by the
# root of its share, since most are small.
_STREAM, _PART = 4.5, 5.5
# Attention of the first block brings every token a little of all others: it is this much higher than other blocks.
_FIRST = 2.5


def of_flow(found: Mapping[str, Any]) -> bytes:
    """Return the picture of a flow (`flow_files.flow_record`) as PNG."""
    return png([flow_panel(found)], across=1)


def flow_panel(found: Mapping[str, Any]) -> Panel:
    """Return the route of a flow: tokens across, layers up, and every edge as wide as its share."""
    tokens, layers = len(found["tokens"]), found["n_layers"]
    size = (max(4.2, 1.5 + 0.62 * tokens), max(2.6, 1.7 + 0.17 * layers))
    return Panel("", partial(_draw, found=found), size)


def _draw(axis: Any, *, found: Mapping[str, Any]) -> None:
    layers, names = found["n_layers"], [f"{token!r}"[1:-1] for token in found["tokens"]]
    levels = [_up(level) for level in range(layers + 1)]
    for token in range(len(names)):
        axis.plot([token] * (layers + 1), levels, ".", color=MUTED, markersize=1.2, alpha=0.35, zorder=1)
    for source, target, weight in found["route"]:
        _draw_edge(axis, _node(source), _node(target), weight)
    _draw_shares(axis, found["token_shares"], layers)
    for label, colour in (("residual stream", GREY), ("attention", BLUE), ("MLP", VERMILION)):
        axis.plot([], [], color=colour, linewidth=2.5, label=label)
    axis.annotate(
        f"{found['says'].strip() or repr(found['says'])} {found['probability']:.2f}",
        (found["token"], levels[-1]),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        fontweight="bold",
        parse_math=False,
    )
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", parse_math=False)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylim(-1.4 * _row(layers), levels[-1] + 1.4 * _row(layers))
    step = max(1, round(layers / 8))
    named = range(0, layers, step)
    axis.set_yticks([_up(layer + 0.5) for layer in named], [str(each) for each in named])
    axis.set_ylabel("layer")
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _up(level: float) -> float:
    """Return the height of a level: 0 is what enters the first block, 1 what leaves it."""
    return _FIRST * level if level < 1 else level + _FIRST - 1


def _row(layers: int) -> float:
    """Return the height of a line of text, in layers."""
    return max(1.0, layers / 16)


def _node(name: str) -> tuple[str, int, int]:
    kind, layer, token = name[0], *name[1:].split("_")
    return kind, int(layer), int(token)


def _draw_edge(axis: Any, source: tuple[str, int, int], target: tuple[str, int, int], weight: float) -> None:
    (kind, _, token), (into, above, end) = source, target
    height = above if into == "A" else above + 0.5
    if into == "A" and token != end:
        _draw_curve(axis, (token, _up(height)), (end, _up(height + 0.5)), weight)
    elif into == "A" or (kind == "A" and into == "I"):
        look = {"linewidth": _STREAM * weight, "solid_capstyle": "butt"}
        axis.plot([token, end], [_up(height), _up(height + 0.5)], color=GREY, zorder=2, **look)
    elif kind == "M":
        size = 1.0 + 6.5 * weight**0.5
        axis.plot([token], [_up(above + 0.75)], "o", color=VERMILION, markersize=size, markeredgewidth=0, zorder=4)


def _draw_curve(axis: Any, start: tuple[float, float], end: tuple[float, float], weight: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    # It leaves upward, and its slope follows from how far it goes, so that lines into or out of one state stay apart.
    rise, across = end[1] - start[1], end[0] - start[0]
    bends = [(start[0] + 0.1 * across, start[1] + 0.5 * rise), (start[0] + 0.5 * across, start[1] + 0.8 * rise)]
    line = Path([start, *bends, end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    look = {"linewidth": _PART * weight**0.5, "alpha": min(1.0, 0.35 + weight)}
    axis.add_patch(PathPatch(line, fill=False, edgecolor=BLUE, zorder=3, **look))


def _draw_shares(axis: Any, shares: Sequence[float], layers: int) -> None:
    """Write below each token how much of the last state comes from it."""
    most = max(shares)
    for token, share in enumerate(shares):
        axis.text(
            token,
            -0.4 * _row(layers),
            f"{100 * share:.0f} %",
            ha="center",
            va="top",
            fontsize=7.5,
            color=INK if share >= 0.02 else MUTED,
            fontweight="bold" if share == most else "normal",
        )
