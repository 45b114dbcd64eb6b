"""AWQ: 4-bit rounding that protects the input channels with large inputs, by a search for scales and for cuts.

What is written is the effective weight W' = Q(W s) / s (solve/activation_scales.py). A deployed AWQ model has Q(W s) in
its map and 1 / s in the norm or the map before it, and computes the same up to rounding. So nothing else than the maps
changes here, and an edit of such a weight is an edit of what the model computes with.

Source: mit-han-lab/llm-awq (awq/quantize/pre_quant.py, auto_scale.py, auto_clip.py), and `by_weights` from
casper-hansen/AutoAWQ, which hartvigsen-group/composable-interventions calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errata.editors.core.errors import NumericalError
from errata.editors.core.interventions.block_walk import BlockWalk
from errata.editors.core.interventions.calibration import CalibratedConfig, calibration_rows
from errata.editors.core.interventions.compressions import TEXT, Compressed, GridConfig, step_of
from errata.editors.core.interventions.intervention import Intervention, Kind, Rows, Step, maps_of, working
from errata.editors.core.interventions.kept import OnGrid
from errata.editors.core.model.architecture import Architecture, LinearMap, is_transposed
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress
from errata.editors.core.solve.activation_scales import RATIOS, channel_scales, cut, relative_size, scaled_rounding
from errata.editors.core.solve.quantising import Points, grid_of

_NOT_CUT = ("q_", "k_")  # in a map's own name: products of two outputs amplify what a cut takes away


class AWQ(Intervention):
    """Scales, cuts and rounds the maps of each block (Lin et al., arXiv 2306.00978).

    Maps that share an input share their scales. Of the ratios the one is taken that disturbs the output of the module
    that holds these maps least, such as the attention for queries, keys and values; a map that shares its input with no
    other is its own module. As in the code, every block gets the inputs of the model that is not quantised, and the
    output projection of an attention with grouped queries is not scaled, since nothing could hold its scales.
    """

    name = "awq"
    kind: ClassVar[Kind] = "compress"

    @dataclass(frozen=True, kw_only=True)
    class Config(GridConfig, CalibratedConfig):
        points: Points = "awq"
        by_weights: bool = False
        """Whether scales also fall with the size of a channel's weights, as AutoAWQ has them by default."""
        cuts: bool = True
        """Whether large elements are cut where this disturbs the outputs less; those of maps of queries or keys alone
        never are."""

        def __post_init__(self) -> None:
            GridConfig.__post_init__(self)
            CalibratedConfig.__post_init__(self)

    def read(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, Rows]:
        return {TEXT: calibration_rows(model, tokenizer, self.config)}

    def steps(self, architecture: Architecture, rows: Mapping[str, Rows], progress: Progress) -> Iterator[Step]:
        walk = BlockWalk(architecture, rows[TEXT])
        for layer in range(architecture.n_layers):
            inputs = SharedInputs(maps_of(architecture, layer))
            walk.read(layer, inputs.maps, inputs.add)
            groups = inputs.groups()
            calls = [_Calls(architecture.model, group.maps) for group in groups]
            with hooked(*(hook for one in calls for hook in one.hooks())):
                walk.advance(layer)  # before the block is compressed
            fixed = None if _holds_scales(architecture) else _attention_out(architecture, layer)
            found: dict[str, Compressed] = {}
            for group, own in zip(groups, calls, strict=True):
                can_scale = all(one.module is not fixed for one in group.maps)
                found |= self._compressed(group, self._scales(group, own, can_scale=can_scale))
            yield step_of(found)
            progress(layer + 1, architecture.n_layers, f"{self.name} of blocks")

    def _scales(self, group: SharedInput, calls: _Calls, *, can_scale: bool) -> Tensor:
        """Return the scales (d_in,) whose rounding disturbs the output least; of equal ones, of the lowest ratio."""
        mean, given = group.mean, self.config
        weights = [working(one.weight) for one in group.maps]
        sizes = relative_size(weights, given.group) if given.by_weights else None
        best, least = None, torch.inf
        for ratio in RATIOS if can_scale else ():
            scales = channel_scales(mean, ratio, sizes)
            rounded = [scaled_rounding(one, scales, given.bits, given.group, given.points)[0] for one in weights]
            error = calls.error(rounded) if calls.is_needed else _gram_error(rounded[0] - weights[0], group.gram)
            if error < least:
                best, least = scales, error
        if best is None and can_scale:
            names = ", ".join(one.name for one in group.maps)
            raise NumericalError(f"awq: no scales of {names} give a finite output; look at the model before it")
        return torch.ones_like(mean) if best is None else best

    def _compressed(self, group: SharedInput, scales: Tensor) -> dict[str, Compressed]:
        """Return the rounded maps of a group, with the grid that they lie on."""
        given, found = self.config, {}
        gram = group.gram / torch.outer(scales, scales)
        for one in group.maps:
            scaled = working(one.weight) * scales
            own = one.name.split(".")[-2]
            if given.cuts and not any(part in own for part in _NOT_CUT):
                scaled = cut(scaled, gram, given.bits, given.group, given.points)
            grid = grid_of(scaled, given.bits, given.group, given.points)
            found[one.name] = (grid.nearest(scaled) / scales, OnGrid(grid, scales))
        return found


@dataclass
class SharedInput:
    """Maps that read the same input, and what is known of it.

    Attributes:
        maps: In the order in which the block runs them.
        gram: (d_in, d_in) sum of x x^T over tokens.
    """

    maps: list[LinearMap]
    gram: Tensor
    _sum: Tensor
    _tokens: int = 0

    @property
    def mean(self) -> Tensor:
        """Mean |x| over tokens, (d_in,). Above 0, since a scale of 0 would lose a channel that other texts use."""
        return (self._sum / max(self._tokens, 1)).clamp(min=torch.finfo(self._sum.dtype).tiny)

    def add(self, x: Tensor) -> None:
        """Add inputs (t, d_in)."""
        x = x.to(self.gram)
        self.gram += x.T @ x
        self._sum += x.abs().sum(0)
        self._tokens += len(x)


class SharedInputs:
    """Finds out which maps of a block share their inputs, and sums these up once.

    Args:
        maps: Of the block.
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps = maps
        self._by_name = {one.name: one for one in maps}
        self._of: dict[str, SharedInput] = {}
        self._now: dict[str, Tensor] = {}  # kept alive, so that no other input gets the same memory

    def add(self, name: str, x: Tensor) -> None:
        """Take the inputs (t, d_in) of a map; the maps of a group of rows come in the order in which they run."""
        if name in self._now:
            self._now = {}  # the next group of rows
        if not x.numel():
            return
        same = next((other for other, own in self._now.items() if _is_same(own, x)), None)
        self._now[name] = x
        if name not in self._of:
            self._of[name] = self._begun(x) if same is None else self._of[same]
            self._of[name].maps.append(self._by_name[name])
        if self._of[name].maps[0].name == name:
            self._of[name].add(x)

    @staticmethod
    def _begun(x: Tensor) -> SharedInput:
        like = working(x[:0])
        return SharedInput([], like.new_zeros(x.shape[1], x.shape[1]), like.new_zeros(x.shape[1]))

    def groups(self) -> list[SharedInput]:
        """Return the groups in the order in which they were read. A map that no token has reached is in none."""
        self._now = {}
        return list({id(one): one for one in self._of.values()}.values())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


@dataclass
class _Calls:
    """Calls of the module that holds the maps of a group, to be repeated with other weights."""

    model: nn.Module
    maps: Sequence[LinearMap]
    _made: list[tuple[Any, Any]] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)

    @property
    def is_needed(self) -> bool:
        """Whether the output is another one than the map's own."""
        return len(self.maps) > 1

    @property
    def path(self) -> str:
        """The name of the smallest module that holds all maps."""
        split = [one.name.split(".")[:-2] for one in self.maps]
        shared = next((i for i, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1), None)
        return ".".join(split[0][:shared])

    def hooks(self) -> Iterator[Any]:
        """Yield hooks that keep the calls."""
        if not self.is_needed:
            return

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._made.append((_copied(args), {name: _copied(value) for name, value in kwargs.items()}))

        yield self.model.get_submodule(self.path).register_forward_pre_hook(keep, with_kwargs=True)

    def error(self, weights: Sequence[Tensor]) -> float:
        """Return the mean squared change of the module's output when its maps have these weights (d_out, d_in)."""
        if not self._outputs:
            self._outputs = [self._run({}, *call) for call in self._made]
        below = {}
        for one, weight in zip(self.maps, weights, strict=True):
            stored = weight.T if is_transposed(one.module) else weight
            below[one.name.removeprefix(f"{self.path}.")] = stored.to(one.weight.dtype)
        total, count = 0.0, 0
        for call, before in zip(self._made, self._outputs, strict=True):
            total += float((self._run(below, *call) - before).double().square().sum())
            count += before.numel()
        return total / max(count, 1)

    def _run(self, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        # The block may add to its input in place.
        given = {name: _copied(value) for name, value in kwargs.items()}
        output = functional_call(self.model.get_submodule(self.path), weights, _copied(args), given)
        return working(output if isinstance(output, Tensor) else output[0])


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def _gram_error(off: Tensor, gram: Tensor) -> float:
    """Return the summed squared change of a map's outputs when its weight is off by (d_out, d_in)."""
    return float(((off @ gram) * off).sum())


def _holds_scales(architecture: Architecture) -> bool:
    """Return whether values have as many channels as the output projection of attention reads."""
    config: Any = architecture.model.config
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return getattr(text, "num_key_value_heads", heads) in (None, heads)


def _attention_out(architecture: Architecture, layer: int) -> nn.Module | None:
    return architecture.attention_out(layer) if architecture.has_attention(layer) else None
