"""Pictures made of panels. A panel is a title and a function that draws on axes.

The same panels become one PNG for a slide, or one SVG each for a page, which wraps them to its width and gives them its
own ink, light or dark.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from errata.benchmarks.reports.palette import GRID, INK, LOOKS, MUTED, variable

STYLE: Any = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 170,
}
_ID = re.compile(r' id="(?!m[0-9a-f]{6,}|p[0-9a-f]{6,})[^"]*"')  # ids that nothing refers to


@dataclass(frozen=True)
class Panel:
    """A title, a function that draws on matplotlib's axes, and the size in inches."""

    title: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (3.3, 2.4)


def png(panels: Sequence[Panel], *, across: int = 5, title: str | None = None) -> bytes:
    """Return all panels on one canvas, in rows of one length of at most `across`. The same numbers give the same bytes.

    Args:
        panels: At least one.
        across: Most panels in a row.
        title: Above all panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    across = math.ceil(len(panels) / math.ceil(len(panels) / across))
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    heights = [max(panel.size[1] for panel in row) for row in rows]
    width = max(panel.size[0] for panel in panels) * across
    with rc_context(STYLE):
        canvas = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
        axes = canvas.subplots(len(rows), across, squeeze=False, height_ratios=heights)
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel.draw(axis)
            axis.set_title(panel.title)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        _name_rows_once(axes)
        if title is not None:
            canvas.suptitle(title, fontsize=9.5, parse_math=False)  # it may hold a model's answer
        if labelled := _labelled(canvas):
            canvas.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=len(labelled))
        return saved(canvas)


def _name_rows_once(axes: Any) -> None:
    """Remove the names along the vertical axis of panels whose left neighbour has the same rows."""
    for row in axes:
        shown = [axis for axis in row if axis.get_figure() is not None]  # the last row may have fewer panels
        names = [[label.get_text() for label in axis.get_yticklabels()] for axis in shown]
        for left, own, axis in zip(names, names[1:], shown[1:], strict=False):
            if own == left and not any(map(_is_number, own)):
                axis.set_yticklabels([])


def _is_number(text: str) -> bool:
    return text.strip("\u2212-").replace(".", "").replace(",", "").isdigit()


def saved(canvas: Any) -> bytes:
    """Return a matplotlib figure as PNG, without a date and version: the same numbers give the same file."""
    buffer = BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _labelled(canvas: Any) -> dict[str, Any]:
    """Return {label: what it stands for} of everything that no axis names already."""
    found = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in canvas.axes)
    return {label: handle for pairs in found for handle, label in pairs}


def svg(panel: Panel, name: str) -> str:
    """Return one panel as an `<svg>` element for a page, without its title.

    Colours are the page's variables, with those on white where a page has none.

    Args:
        panel: What is drawn.
        name: Keeps the ids of several pictures of one page apart.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    salt = hashlib.sha256(f"{name} {panel.title}".encode()).hexdigest()
    with rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
        canvas = Figure(figsize=panel.size, layout="constrained")
        panel.draw(canvas.subplots())
        buffer = BytesIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue().decode("utf-8"), panel.title)


def _for_page(text: str, title: str) -> str:
    from html import escape

    body = text[text.index("<svg") :]
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = _ID.sub("", re.sub(r"<!--.*?-->\s*", "", rest))
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
    rest = re.sub(r"\s*font-family: [^;\"]*;?", "", rest)
    for colour, name in _variables():
        rest = re.sub(colour, f"var({name}, {colour})", rest, flags=re.IGNORECASE)
    label = escape(title, quote=True)
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{label}">{rest}'


def _variables() -> list[tuple[str, str]]:
    own = [(INK, "--ink"), (MUTED, "--muted"), (GRID, "--line")]
    return [*own, *((look.colour, variable(look.colour)) for look in LOOKS.values())]
