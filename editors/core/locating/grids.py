"""What each cell of a heat map changes: at one token, the output of a block, of MLPs or of attentions.

A cell is (token t, layer l). It restores at t what a clean run has there:

    state                 the output of block l, which is the hidden state
    mlp, attention        what the MLPs (or attentions) of a window of layers around l give
    state, severed mlp    the state, while the MLPs of later layers at t are held at what they gave without it

All of that is a set of writes. Two cells whose writes agree up to a layer are one row up to there.

Source: Meng et al. 2022, section 2 and figure 3; kmeng01/rome, experiments/causal_trace.py and the notebook
causal_trace_frozen_mlp_attn for severed paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

Part = Literal["state", "mlp", "attention"]
PARTS: tuple[Part, ...] = ("state", "mlp", "attention")
SEVERED = "state, severed "


@dataclass(frozen=True)
class Write:
    """One value that is written over at the cell's token.

    Attributes:
        layer: The block, counted from 0.
        part: What of it is written over.
        held: Whether the value is that of the rows without the patch; otherwise it is the source's.
    """

    layer: int
    part: Part
    held: bool = False

    @property
    def stage(self) -> int:
        """When it happens: in block l at 2 l, behind it at 2 l + 1."""
        return 2 * self.layer + (self.part == "state")


Writes = frozenset[Write]


@dataclass(frozen=True)
class Grid:
    """One heat map.

    Attributes:
        part: What a cell restores.
        window: Layers around l whose MLP or attention is restored: from l - window // 2 on, `window` of them, as far as
            there are such layers.
        severed: Parts that are held at their values without the patch, at the cell's token.
        from_below: Whether they are held in every layer, not only above l. It is the same but where the values held
            come from another draw of the noise.

    Raises:
        ConfigError: There is no such part, the window is no positive number, a state has one, or what is severed is no
            MLP and no attention.
    """

    part: Part = "state"
    window: int = 1
    severed: tuple[Part, ...] = ()
    from_below: bool = False

    def __post_init__(self) -> None:
        for part in (self.part, *self.severed):
            if part not in PARTS:
                raise ConfigError(f"unknown part of a block {part!r}{did_you_mean(part, PARTS)}")
        if self.window < 1 or (self.part == "state" and self.window != 1):
            raise ConfigError(f"expected a window of at least 1 layer, and 1 for states, got {self.window}")
        if self.severed and (self.part != "state" or "state" in self.severed):
            raise ConfigError("paths are severed for states, and through mlp, attention or both")

    @property
    def name(self) -> str:
        """Return the name, as results have it: "state", "mlp", "mlp, window 10" or "state, severed mlp"."""
        if self.severed:
            return f"{SEVERED}{' and '.join(self.severed)}"
        return self.part if self.window == 1 else f"{self.part}, window {self.window}"

    def layers(self, layer: int, n_layers: int) -> range:
        """Return the layers that a cell restores."""
        return range(max(0, layer - self.window // 2), min(n_layers, layer - (-self.window // 2)))

    def writes(self, layer: int, n_layers: int) -> Writes:
        """Return what a cell of this layer writes over."""
        restored = {Write(each, self.part) for each in self.layers(layer, n_layers)}
        above = range(0 if self.from_below else layer + 1, n_layers)
        return frozenset(restored | {Write(each, part, held=True) for part in self.severed for each in above})


def grids_of(names: Sequence[str], window: int = 1) -> tuple[Grid, ...]:
    """Return grids by their names: state, mlp, attention, severed_mlp, severed_attention, severed_both.

    Args:
        names: At least one.
        window: Layers of a window of mlp and attention.

    Raises:
        ConfigError: There is no such grid, or no name.
    """
    severed: dict[str, tuple[Part, ...]] = {
        "severed_mlp": ("mlp",),
        "severed_attention": ("attention",),
        "severed_both": ("mlp", "attention"),
    }
    found = []
    for name in names:
        if name not in PARTS and name not in severed:
            raise ConfigError(f"unknown grid {name!r}{did_you_mean(name, [*PARTS, *severed])}")
        part = cast(Part, name)
        found.append(Grid(severed=severed[name]) if name in severed else Grid(part, 1 if part == "state" else window))
    if not found:
        raise ConfigError(f"expected at least one grid: {', '.join([*PARTS, *severed])}")
    return tuple(dict.fromkeys(found))


def until(writes: Writes, stage: int) -> Writes:
    """Return the writes that have happened when a stage has passed."""
    return frozenset(write for write in writes if write.stage <= stage)
