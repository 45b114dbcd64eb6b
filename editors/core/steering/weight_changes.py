"""Edits of behaviour that are patches of weights: Model Surgery, and the ablation of a direction.

Both have rank 1 per weight, so that they are small, and go into merged models and LoRA adapters like other patches.

Legend: d hidden size; d_mlp width of an MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ArchitectureError
from errata.editors.core.ledger.patch import Dense, LowRank, Patch, Update
from errata.editors.core.model.architecture import Architecture, LinearMap


def gate(architecture: Architecture, layer: int) -> LinearMap:
    """Return the gate of a block's MLP, a linear map from (..., d) to (..., d_mlp) in front of the activation.

    Raises:
        ArchitectureError: The MLP has none of its own, as in GPT-2, or one map for gate and up projection (Phi 3).
    """
    down, up = architecture.map_at(layer), architecture.up(layer)
    shape = (down.shape[1], architecture.d_model)
    maps = architecture.mlp_maps(layer).values()
    gates = [found for found in maps if found.name not in (down.name, up.name) and found.shape == shape]
    if len(gates) != 1:
        raise ArchitectureError(
            f"Model Surgery moves rows of the gate of an MLP, and {architecture.blocks_path}.{layer} has no gate of "
            f"shape {shape} beside its up projection; use caa, or ablate_weights"
        )
    return gates[0]


def gate_cosines(architecture: Architecture, v: Tensor) -> Tensor:
    """Return the cosine of every gate's rows with a direction v (d,), (layers, d_mlp) in float32 or float64."""
    weights = (gate(architecture, layer).weight for layer in range(architecture.n_layers))
    wide = (weight.to(working_dtype(weight.dtype)) for weight in weights)  # one at a time
    return torch.stack([torch.nn.functional.cosine_similarity(w, v.to(w), dim=1) for w in wide])


def moved_gates(architecture: Architecture, v: Tensor, strength: float, rows: int) -> Patch:
    """Return the patch of Model Surgery: strength x v is added to the rows of gates that oppose v most.

    The neurons that answer against v then fire with it, which is the sign of the authors' released code.

    Args:
        architecture: The model.
        v: (d,) direction of the behaviour to remove, as long as it is to count.
        strength: Factor of v.
        rows: How many rows of all layers together.

    Raises:
        ArchitectureError: As `gate`; or there are fewer rows.
    """
    cosines = gate_cosines(architecture, v)
    if not 1 <= rows <= cosines.numel():
        raise ArchitectureError(f"expected 1 to {cosines.numel()} rows of gates to move, got {rows}")
    chosen = torch.zeros(cosines.numel(), dtype=torch.bool, device=cosines.device)
    chosen[cosines.flatten().sort(stable=True).indices[:rows]] = True
    updates: dict[str, Update] = {}
    for layer, mine in enumerate(chosen.reshape(cosines.shape)):
        if bool(mine.any()):
            found = gate(architecture, layer)
            like = torch.empty(0, dtype=working_dtype(found.weight.dtype), device=found.weight.device)
            updates[found.name] = LowRank(strength * mine.to(like)[:, None], v.to(like)[None])
    return Patch(updates)


def ablated_writers(architecture: Architecture, r: Tensor) -> Patch:
    """Return the patch that takes a direction out of everything that attentions and MLPs write: W - r r^T W.

    Their biases lose it, too. The embeddings keep theirs: a model often ties them to its head, which reads with them.

    Args:
        architecture: The model.
        r: (d,) the direction, of any length.

    Raises:
        ArchitectureError: A block has no dense MLP or no attention with an output projection.
    """
    updates: dict[str, Update] = {}
    names = {id(module): name for name, module in architecture.model.named_modules()}
    for layer in range(architecture.n_layers):
        for module in (architecture.attention_out(layer), architecture.down(layer)):
            found = LinearMap(f"{names[id(module)]}.weight", module)
            weight = found.weight.to(working_dtype(found.weight.dtype))
            unit = r.double().to(weight.device)
            unit = (unit / unit.norm()).to(weight)
            updates[found.name] = LowRank(-unit[:, None], (unit @ weight)[None])
            bias = module._parameters.get("bias")
            if bias is not None:
                wide = bias.detach().to(weight)
                updates[f"{names[id(module)]}.bias"] = Dense(-unit * (unit @ wide))
    return Patch(updates)
