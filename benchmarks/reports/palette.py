"""One colour and one mark for each method, the same in every picture and table.

The first six are Okabe and Ito's, the others Paul Tol's, which the colour-blind can tell apart; the marks tell them
apart without colour. Each has a second tone that is legible on a dark ground. Methods that are not listed get one of
the list by their name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from errata.benchmarks.reports.naming import Results

GREY, BLUE, VERMILION = "#b8b8b8", "#0072b2", "#d55e00"
# Drawn in these, a picture's ink becomes the page's own; see panels.py.
INK, MUTED, GRID = "#222222", "#6b6b6c", "#c9c9ca"


@dataclass(frozen=True)
class Look:
    """How a method's runs are drawn.

    Attributes:
        colour: On white.
        dark: On a dark ground.
        marker: matplotlib's letter for a filled mark, or a sign between dollars; pictures draw no outlines of marks.
        alpha, dash: Tell several runs of one method apart: the later, the paler and the more broken.
    """

    colour: str
    dark: str
    marker: str
    alpha: float = 1.0
    dash: str | tuple[int, tuple[float, ...]] = "-"


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "rome": Look(VERMILION, "#ff7f2a", "o"),
        "r_rome": Look(BLUE, "#4aa8e0", "s"),
        "c_rome": Look("#009e73", "#2fc79c", "^"),
        "memit": Look("#cc79a7", "#e39bc4", "D"),
        "emmet": Look("#e69f00", "#f2b632", "v"),
        "alphaedit": Look("#56b4e9", "#8fd0f7", "P"),
        "grace": Look("#332288", "#a99cf0", "X"),
        "mend": Look("#882255", "#d9679b", "*"),
        "ft_l": Look("#999933", "#c4c45a", "<"),
        "ft_m": Look("#7f4f24", "#c08a5a", ">"),
        "lora": Look("#117733", "#58b973", "h"),
        "locft": Look("#3f6b4f", "#7fb894", "d"),
        "ice": Look("#525252", "#b5b5b5", "$◗$"),
        "ike": Look("#8c6d1f", "#d8b65c", "$♠$"),
        "scr": Look("#1b7f8c", "#5cc4d1", "$♣$"),
        "ultraedit": Look("#b2182b", "#f4716f", "p"),
        "stableedit": Look("#5e3c99", "#b59ae0", "H"),
        "anyedit": Look("#2d5d8a", "#7fb2e5", "$♥$"),
        "pmet": Look("#a3195b", "#ee7fb1", "$♪$"),
        "coachhook": Look("#8a4fa3", "#c994de", "$✔$"),
        "memoir": Look("#6b6b00", "#c9c94a", "$☀$"),
        "malmen": Look("#8b1a4f", "#e07ba6", "$♯$"),
        "rledit": Look("#2f4b8f", "#8aa3e0", "$=$"),
        "crispedit": Look("#9c3d00", "#e8935a", "$✂$"),
        "coar": Look("#41521f", "#a3b86c", "$⊘$"),
        "mint": Look("#1d6f42", "#6cc08b", "$♦$"),
        "wise": Look("#00615f", "#45b5b2", "$∞$"),
    }
)
_DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (5, 1.5, 1, 1.5)))


def look(method: str) -> Look:
    """A method's look."""
    if method in LOOKS:
        return LOOKS[method]
    place = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4])
    return list(LOOKS.values())[place % len(LOOKS)]


def looks(runs: Sequence[Results]) -> list[Look]:
    """One for each run: its method's, and paler for a second and third run of the same method."""
    methods = [run["names"]["editor"] for run in runs]
    found = []
    for i, method in enumerate(methods):
        earlier, there = methods[:i].count(method), methods.count(method)
        own, alpha = look(method), 1 - 0.6 * earlier / max(1, there - 1)
        found.append(Look(own.colour, own.dark, own.marker, alpha, _DASHES[earlier % len(_DASHES)]))
    return found


def variable(colour: str) -> str:
    """The name of the CSS variable that a colour of LOOKS has in a page."""
    return f"--c{colour.removeprefix('#')}"
