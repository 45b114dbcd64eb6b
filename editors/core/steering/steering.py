"""Directions that contrast sets give, and the edits of behaviour that are made of them at any strength.

    steering = errata.learn_steering(model, tokenizer, contrasts, "caa", layer=15)
    edit = steering.edit(2.0)               # an Edit: apply, undo, save, load, and for additions 0.5 * edit
    control = steering.random(seed=0)       # the same with random directions of the same lengths

    kind             what the edit does
    caa              adds strength x (mean of positives - mean of negatives) to the output of a block
    ace              removes what is along that direction, sets the negatives' mean in its place, adds strength x it
    leace            erases the direction as LEACE does, around the mean of all, and adds strength x it
    ablate           removes the direction after every block
    actadd           adds strength x (activations of one prompt - those of another), a row per token
    iti              adds strength x direction x deviation to what some heads give, at the last token of each pass
    surgery          weights: moves the rows of gates that oppose the negatives' direction towards it
    ablate_weights   weights: removes the direction from all that attentions and MLPs write

Adapters carry all but the last two, which are patches of weights and can be exported as such.

Sources: Turner et al. 2023, "Activation addition" (montemac/activation_additions); Rimsky et al. 2024, "Steering
Llama 2 via contrastive activation addition", and Marshall et al. 2024, "Refusal in LLMs is an affine function" (both as
in EleutherAI/steering-llama3); Li et al. 2023, "Inference-time intervention" (likenneth/honest_llama); Wang et al.
2024, "Model surgery" (lucywang720/model-surgery); Arditi et al. 2024, "Refusal in language models is mediated by a
single direction".

Legend: d hidden size; r direction; v direction of the negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Edit
from errata.editors.core.errors import ConfigError
from errata.editors.core.ledger.adapter import Adapter
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.architecture import Architecture, LinearMap, describe
from errata.editors.core.model.parts import find_base
from errata.editors.core.steering.affine import Affine, Change
from errata.editors.core.steering.kinds import STRENGTHS
from errata.editors.core.steering.positions import EVERYWHERE, Where
from errata.editors.core.steering.weight_changes import ablated_writers, moved_gates


@dataclass(frozen=True, eq=False)
class Steering:
    """What a contrast set has given, from which edits of any strength are made.

    Attributes:
        model: The model.
        kind: See the table above.
        directions: {module: (d,)} what is added, removed or moved along; (n, d) for `actadd`; for `iti` inputs of the
            output projections; for weights one direction, under the name "".
        fixed: Further tensors that do not depend on the direction's sign or strength, by name.
        where: The positions.
        width: Numbers that belong to one direction: d, or the width of a head.
        settings: How the directions were found, for the record of an edit.
    """

    model: nn.Module = field(repr=False)
    kind: str
    directions: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    where: Where = EVERYWHERE
    width: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def default_strength(self) -> float | None:
        """The strength where none is given; None: the kind has none."""
        return dict(STRENGTHS)[self.kind]

    def edit(self, strength: float | None = None) -> Edit:
        """Return the edit of this strength, which is not applied.

        Args:
            strength: See the table above; None: the kind's own.

        Raises:
            ConfigError: The kind has no strength, and one is given.
            ArchitectureError: The model lacks the weights that are changed.
        """
        own = self.default_strength
        if own is None and strength is not None:
            raise ConfigError(f"{self.kind} removes a direction and has no strength, got {strength:g}")
        factor = own if strength is None else float(strength)
        numbers = {"kind": self.kind, **({} if factor is None else {"strength": factor}), **self.settings}
        derived = {"operation": "steer", "numbers": numbers, "parents": []}
        with torch.no_grad():
            patch = self._patch(describe(self.model), factor)
        return Edit("", (), patch, (), {}, self.model, derived=derived)

    def random(self, seed: int = 0) -> Steering:
        """Return it with random directions of the same lengths: what any change of that size does.

        Modules that share a direction, as those of `ablate` do, share the random one, too.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[int, Tensor] = {}
        for direction in self.directions.values():
            if id(direction) not in drawn:
                rows = direction.reshape(-1, self.width or direction.shape[-1])
                noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
                noise = noise / noise.norm(dim=1, keepdim=True) * rows.double().norm(dim=1, keepdim=True)
                drawn[id(direction)] = noise.to(direction).reshape(direction.shape)
        directions = {name: drawn[id(direction)] for name, direction in self.directions.items()}
        fixed = {name: tensor for name, tensor in self.fixed.items() if name not in ("left", "right")}
        return replace(self, directions=directions, fixed=fixed, settings={**self.settings, "random": seed})

    def _patch(self, architecture: Architecture, strength: float | None) -> Patch:
        if self.kind == "surgery":
            return moved_gates(architecture, self.directions[""], strength or 0.0, int(self.settings["rows"]))
        if self.kind == "ablate_weights":
            return ablated_writers(architecture, self.directions[""])
        return Patch({}, {name: self._adapter(name, architecture, strength) for name in self.directions})

    def _adapter(self, name: str, architecture: Architecture, strength: float | None) -> Adapter:
        r, factor = self.directions[name], 0.0 if strength is None else strength
        reads = find_base(self.model, architecture.blocks_path) if self.where.needs_layout else None
        dtype, device = working_dtype(architecture.dtype), architecture.device
        if self.kind in ("caa", "actadd"):
            changes = {"b": factor * r}
        elif self.kind == "iti":
            changes = {"b": _output_of(self.model.get_submodule(name), factor * r.to(device, dtype))}
        else:
            left, right, offset = self._projection(r.double())
            changes = {"b": offset + factor * r.double(), "U": -left, "V": right}
        return Affine((Change(**{k: t.to(device, dtype) for k, t in changes.items()}, where=self.where),), reads)

    def _projection(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a projection removes, as left (d, k) and right (k, d), and what it adds in its place (d,)."""
        if "left" in self.fixed:
            left, right = self.fixed["left"].double(), self.fixed["right"].double()
        else:
            left = (r / r.norm())[:, None]
            right = left.T
        centre = self.fixed.get("centre")
        return left, right, torch.zeros_like(r) if centre is None else left @ (right @ centre.double())


def _output_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a change of a linear map's input changes of its output: W x, without the bias."""
    found = LinearMap("", module)
    if found.is_plain:
        return found.weight.to(x.dtype) @ x
    # A packed weight is applied to the change and to nothing: the difference drops the bias.
    zero = torch.zeros_like(x)[None]
    return (module(x[None]) - module(zero))[0]
