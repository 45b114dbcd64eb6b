"""Editors of every registered method that are quick on tiny models."""

from __future__ import annotations

from typing import Any

import torch

from errata import editors
from errata.editors.core.editor import Editor
from errata.editors.core.families.learned_editor import TrainedEditor
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.model.architecture import describe
from errata.testing import laws

REQUESTS = laws.REQUESTS
METHODS = editors.METHODS
# What every method is given that has such a field, to be quick on models this small.
QUICK: dict[str, Any] = {"v_num_grad_steps": 4, "layers": (1,), "context_template_length_params": ((3, 2),)}
# What a method needs beside that: two layers, and solves on the scale of their keys.
FIELDS: dict[str, dict[str, Any]] = {
    "memit": {"layers": (0, 1), "mom2_update_weight": 10.0},
    "pmet": {"layers": (0, 1), "mom2_update_weight": 10.0},
    "emmet": {"layers": (0, 1)},
    "alphaedit": {"layers": (0, 1), "nullspace_energy": 0.3, "L2": 0.1},
    "anyedit": {"layers": (0, 1), "nullspace_energy": 0.3, "L2": 0.1, "window": 6},
    "ft_l": {"layers": (0, 1), "num_steps": 3},
    "ft_m": {"layers": (0, 1), "num_steps": 3},
    "locft": {"layers": (0, 1), "num_steps": 3},
    "lora": {"num_steps": 3},
    "mend": {"layers": (0, 1), "rank": 8, "edit_lr": 0.01},
    "grace": {"n_iter": 4, "edit_lr": 0.1},
    "ike": {"k": 2},
    "scr": {"threshold": None},
    "ultraedit": {"layers": (0, 1), "lr": 1e-3},
    "stableedit": {"layers": (0, 1), "lr": 1e-3},
    "malmen": {"layers": (0, 1), "rank": 8, "edit_lr": 0.1},
    "rledit": {"layers": (0, 1), "rank": 8, "edit_lr": 0.1},
    "crispedit": {"layers": (0, 1), "num_steps": 3, "mom2_n_samples": 4},
    "coar": {"components": "heads,neurons:8", "n_masks": 24, "n_references": 3, "reference_tokens": 6},
    "coachhook": {"layers": (0, 1), "mom2_update_weight": 10.0, "alpha": 0.5},
    "memoir": {"n_iter": 3},
    "mint": {"layers": (1, 2), "factor": 3.0, "max_patches": 3},
    "wise": {"n_iter": 3, "alpha": 0.5, "beta": 2.0, "gamma": 1.0, "act_ratio": 0.5, "mask_ratio": 0.5},
}


def having(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a Config has a field for."""
    return {name: value for name, value in values.items() if name in kind.__dataclass_fields__}


def build(method: str, model: Any, tokenizer: Any, **fields: Any) -> Editor:
    """An editor that is quick on a tiny model, with second moments of random keys where it needs any."""
    kind: Any = editors.get(method)
    config: Any = kind.Config(**having(kind.Config, {**QUICK, **FIELDS.get(method, {}), **fields}))
    if issubclass(kind, TrainedEditor):
        return kind(model, tokenizer, config, trained=False)
    if not issubclass(kind, LocateThenEdit):
        return kind(model, tokenizer, config)
    width = describe(model).d_mlp
    factor = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    moment = factor @ factor.T / width + 0.1 * torch.eye(width)
    moments: Any = dict.fromkeys(config.layers, moment)
    return kind(model, tokenizer, config, moments=moments)
