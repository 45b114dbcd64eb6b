"""The components of a model that can be ablated: single input units of its linear maps, or groups of them.

Ablating a component sets the columns of its units in a weight (d_out, d_in) to zero; biases stay. For an input that is
finite, that is the same as setting the units themselves to zero, so that no weight has to be written to try it.

| kind | a component | of GPT-2 small |
|---|---|---|
| `rows` | an input unit of a linear map of a block: a row of a weight as GPT-2 stores it (Shah et al. 2024) | 64,512 |
| `heads` | the units that an attention head gives to the output projection | 144 |
| `neurons:64` | 64 neighbouring neurons of an MLP; `neurons` has one each | 576 |
| `attention`, `mlp` | the whole sublayer | 12 each |

Shapes: C components, n rows, d_in inputs of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ArchitectureError, ConfigError
from errata.editors.core.model.architecture import Architecture, LinearMap
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.parts import find_attention_out, text_config

KINDS = ("rows", "heads", "neurons", "attention", "mlp")


@dataclass(frozen=True)
class Component:
    """Neighbouring input units of one linear map.

    Attributes:
        name: How tables call it: "3.head.2", "0.neurons.64-127", "3.mlp.c_proj.17".
        layer: Its block, from 0.
        kind: One of KINDS; for `rows` the last part of the map's name, such as "c_proj", behind its holder.
        map: The full name of the map's module.
        first: Its first unit.
        end: One past its last.
    """

    name: str
    layer: int
    kind: str
    map: str
    first: int
    end: int


@dataclass(frozen=True)
class Components:
    """Components of one model, in the order of its blocks.

    Attributes:
        each: The components; no two share a unit of a map.
        maps: The maps by the full names of their modules.
    """

    each: tuple[Component, ...]
    maps: Mapping[str, LinearMap]

    def __len__(self) -> int:
        return len(self.each)

    @property
    def first_layer(self) -> int:
        """The lowest block that has a component."""
        return min(component.layer for component in self.each)

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        """For each map, the component of each unit, (d_in,); C where it belongs to none."""
        found = {name: torch.full((linear.shape[1],), len(self.each)) for name, linear in self.maps.items()}
        for index, component in enumerate(self.each):
            found[component.map][component.first : component.end] = index
        return found

    def units(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the units of some components by the name of their map, ascending."""
        of_map: dict[str, list[int]] = {}
        for index in chosen:
            component = self.each[index]
            of_map.setdefault(component.map, []).extend(range(component.first, component.end))
        return {name: torch.tensor(sorted(units)) for name, units in of_map.items()}

    def dead(self) -> Tensor:
        """Return whether all columns of a component are zero already, (C,), so that ablating it changes nothing."""
        dead = torch.zeros(len(self.each), dtype=torch.bool)
        for name, index in self._index.items():
            alive = (self.maps[name].weight != 0).any(0).cpu()
            own = index < len(self.each)
            dead[index[own]] = True
            dead[index[own & alive]] = False
        return dead

    @contextmanager
    def ablated(self, keep: Tensor) -> Iterator[None]:
        """Let the model compute without some components, inside the `with`, for batches of n rows.

        No weight is written.

        Args:
            keep: (n, C) bool, per row of the batch the components that stay.
        """
        padded = torch.cat([keep, keep.new_ones(len(keep), 1)], dim=1)
        with ExitStack() as stack, hooked():
            for name, index in self._index.items():
                gates = padded[:, index.to(keep.device)]
                if not bool(gates.all()):
                    hook = self.maps[name].module.register_forward_pre_hook(_closing(gates))
                    stack.callback(hook.remove)  # at once: none may stay if memory runs out for a later one
            yield


def _closing(gates: Tensor) -> Any:
    """Return a hook that sets the units of each row (n, d_in) to zero whose gates are closed."""

    def close(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        rows = x.reshape(len(gates), -1, x.shape[-1])  # OPT flattens rows and positions
        return ((rows * gates.to(rows)[:, None]).reshape(x.shape), *args[1:])

    return close


def components_of(architecture: Architecture, kinds: str = "rows", layers: Sequence[int] | None = None) -> Components:
    """Return the components of some kinds.

    Args:
        architecture: The model.
        kinds: Names of the table above, separated by commas, as "heads,neurons:64".
        layers: The blocks; None: all.

    Raises:
        ConfigError: There is no such kind or layer, or two kinds share units.
        ArchitectureError: A block has no attention or MLP of this kind, or its heads cannot be told apart.
    """
    wanted = parsed_kinds(kinds)
    chosen = range(architecture.n_layers) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= min(chosen) <= max(chosen) < architecture.n_layers:
        raise ConfigError(f"layers: expected some of 0 to {architecture.n_layers - 1}, got {list(chosen)}")
    found: list[Component] = []
    maps: dict[str, LinearMap] = {}
    for layer in chosen:
        for kind, size in wanted:
            for name, linear, sizes, label in _maps_of(architecture, layer, kind, size):
                maps[name] = linear
                found += _pieces(name, linear.shape[1], layer, label, sizes)
    return Components(tuple(found), maps)


def parsed_kinds(kinds: str) -> list[tuple[str, int]]:
    """Return kinds with their sizes, from "heads,neurons:64".

    Raises:
        ConfigError: There is no such kind, a size is wrong, or two kinds share units.
    """
    wanted: list[tuple[str, int]] = []
    for text in kinds.split(","):
        kind, colon, size = text.strip().partition(":")
        if kind not in KINDS:
            raise ConfigError(f"components: expected {', '.join(KINDS)}, got {text!r}{did_you_mean(kind, KINDS)}")
        if colon and (kind != "neurons" or not size.isdecimal() or int(size) < 1):
            raise ConfigError(f"components: expected a size above 0, as in neurons:64, got {text!r}")
        wanted.append((kind, int(size) if colon else 1))
    names = [kind for kind, _ in wanted]
    shared = ({"rows", *KINDS[1:]}, {"heads", "attention"}, {"neurons", "mlp"})
    clash = "rows" in names and len(names) > 1
    if clash or len(set(names)) < len(names) or any(len(group & set(names)) > 1 for group in shared[1:]):
        raise ConfigError(
            f"components: {kinds!r} names units twice; rows stands alone, heads without attention, and "
            "neurons without mlp"
        )
    return wanted


def _maps_of(architecture: Architecture, layer: int, kind: str, size: int) -> Iterator[tuple[str, LinearMap, int, str]]:
    """Yield the maps of a block that have components of a kind: module name, map, units of each, label."""
    if kind == "rows":
        for name, module in architecture.linears(layer).items():
            label = name.removeprefix(f"{architecture.blocks_path}.{layer}.")
            yield name, LinearMap(f"{name}.weight", module), 1, label
    elif kind in ("neurons", "mlp"):
        linear = architecture.map_at(layer)
        yield linear.name.removesuffix(".weight"), linear, linear.shape[1] if kind == "mlp" else size, kind
    else:
        module = architecture.attention_out(layer)
        path = find_attention_out(architecture.block(layer), architecture.d_model)
        name = f"{architecture.blocks_path}.{layer}.{path}"
        linear = LinearMap(f"{name}.weight", module)
        width = linear.shape[1]
        if kind == "heads":
            width = _head_width(architecture, layer, width)
        yield name, linear, width, "head" if kind == "heads" else kind


def _head_width(architecture: Architecture, layer: int, width: int) -> int:
    heads = getattr(text_config(architecture.model), "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ArchitectureError(
            f"block {layer} gives {width} units to its attention's output projection, and the configuration counts "
            f"{heads} heads, so that no head has units of its own; use components=attention"
        )
    return width // heads


def _pieces(name: str, width: int, layer: int, label: str, size: int) -> Iterator[Component]:
    """Yield the components of one map."""
    whole = size >= width
    for place, first in enumerate(range(0, width, size)):
        end = min(first + size, width)
        which = str(place) if label == "head" or size == 1 else f"{first}-{end - 1}"
        own = f"{layer}.{label}" if whole and label in ("mlp", "attention") else f"{layer}.{label}.{which}"
        yield Component(own, layer, label, name, first, end)
