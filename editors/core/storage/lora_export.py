"""Edits as a LoRA adapter, the form that PEFT, vLLM and others load beside a model and merge into it.

    W' = W + (lora_alpha / r) B A,    lora_alpha = r

(Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.) The factors of the edits are the
adapter, as they stand: taken from the difference of the weights instead, in bfloat16, they would have the rank of its
rounding errors. Every module gets the largest rank among them, filled up with zeros, since vLLM reads the one `r` and
no `rank_pattern`. Modules are named in full, so that no other layer is adapted. Weights of GPT-2's Conv1D lie the other
way round; `fan_in_fan_out` says so, and the factors stay as they are.

Factors are written in float32, or float64 for models of float64, whatever the precision of the model: PEFT keeps them
so. Merged in float32 the weights agree with those that errata writes to the last digits, and in 16 bits to a rounding,
for PEFT rounds the update before it adds it. PEFT's `unmerge` brings the base back neither way.

vLLM (as its documents say; not run here): start it with `--enable-lora --max-lora-rank N`, N one of 1, 8, 16, 32, 64,
128, 256, 320, 512 and no less than the adapter's rank; 16 if left out. It rounds the factors to the model's precision,
and takes adapters for the architectures alone that it lists as supporting LoRA.

Legend: B (d_out, r), A (r, d_in); LowRank's U and V.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ExportError, NumericalError
from errata.editors.core.files import atomic
from errata.editors.core.ledger.entry import Entry, find_weight
from errata.editors.core.ledger.patch import Dense, LowRank, Update, merge
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.storage.merged_export import check_exportable, new_folder, write_manifest
from errata.editors.core.storage.provenance import model_name

MAX_RANK = 512  # the most that vLLM serves
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraExport:
    """An adapter that was written.

    Attributes:
        folder: Where it is.
        rank: r of every module.
        errors: ||W' - W - B A|| / ||W' - W|| by weight, in Frobenius norm; 0.0 where the factors are the edit's own.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]


def write_lora(
    model: nn.Module, entries: Sequence[Entry], folder: str | Path, *, rank: int | None = None
) -> LoraExport:
    """Write the entries as one adapter. Needs no PEFT; the model is not touched.

    Args:
        model: A model of transformers.
        entries: The edits, in the model's ledger or not; their updates are added up.
        folder: A new folder, or an empty one.
        rank: Cut updates of more than this down to their best approximations of this rank; the errors are returned, and
            written into the folder. None: keep them whole, or refuse.

    Raises:
        ExportError: an edit is no change of weights, or of weights that no adapter reaches; more than `MAX_RANK` would
            be needed and no `rank` is given; the folder is there already.
        NumericalError: NaN or inf in an update, or beyond the range of float32.
    """
    check_exportable(entries)
    patch = merge([entry.patch for entry in entries])
    patch.check_finite()
    modules = {name: _module_name(model, name) for name in patch.updates}
    _check_ranks(patch.updates, rank)
    factors = {name: _factors(update, rank or MAX_RANK) for name, update in patch.updates.items()}
    errors = {name: _error(patch.updates[name], written) for name, written in factors.items()}
    r = max(written.U.shape[1] for written in factors.values())
    tensors = {}
    for name, module in modules.items():
        B, A = _stored(factors[name].U, name), _stored(factors[name].V, name)
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(A, (0, 0, 0, r - len(A))).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(B, (0, r - B.shape[1])).contiguous()
    with new_folder(folder) as path:
        _write(path, tensors, _config(model, sorted(modules.values()), r))
        write_manifest(path, "lora", model, entries, {"rank": r, "relative_errors": errors})
    return LoraExport(Path(folder), r, errors)


def _module_name(model: nn.Module, name: str) -> str:
    """The module whose weight this is.

    Raises:
        ExportError: it is no linear map, or its weight is another module's, too.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last != "weight" or not (isinstance(module, nn.Linear) or is_transposed(module)):
        raise ExportError(
            f"{name} is not the weight of a linear map, and adapters reach these alone; use export_merged instead"
        )
    parameter = find_weight(model, name).parameter
    names = [other for other, entry in model.named_parameters(remove_duplicate=False) if entry is parameter]
    if len(names) > 1:
        raise ExportError(
            f"{' and '.join(names)} are one weight, and an adapter reaches one of them; use export_merged"
        )
    return path


def _bound(update: Update) -> int:
    """The rank that is enough for it, whatever its numbers."""
    return min(update.shape) if isinstance(update, Dense) else min(update.U.shape[1], *update.shape)


def _check_ranks(updates: Mapping[str, Update], rank: int | None) -> None:
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ExportError(f"rank: expected 1 to {MAX_RANK}, got {rank}")
    name, needed = max(((name, _bound(update)) for name, update in updates.items()), key=lambda pair: pair[1])
    if rank is None and needed > MAX_RANK:
        kind = "is no low-rank update and" if isinstance(updates[name], Dense) else "together"
        raise ExportError(
            f"the edits of {name} {kind} may need rank {needed}; adapters hold up to {MAX_RANK}. Give rank={MAX_RANK} "
            "for the nearest one that fits, with its error, or use export_merged"
        )


def _factors(update: Update, rank: int) -> LowRank:
    """The update's own factors where they fit; else the nearest ones, by singular values (Eckart and Young 1936)."""
    rank = min(rank, _bound(update))
    if isinstance(update, LowRank):
        if update.U.shape[1] <= rank:
            return update
        left, over = torch.linalg.qr(update.U.double())
        right, under = torch.linalg.qr(update.V.double().T)
        core = over @ under.T
    else:
        left, right, core = None, None, update.delta.double()
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    root, dtype = S[:rank].sqrt(), update.tensors[0].dtype
    U, V = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return LowRank((U if left is None else left @ U).to(dtype), (V if right is None else V @ right.T).to(dtype))


def _error(update: Update, written: LowRank) -> float:
    if update is written:
        return 0.0
    size = update.norm()
    if isinstance(update, Dense):
        off = float((update.delta.double() - written.matrix(torch.float64, update.delta.device)).norm())
    else:
        U, V = torch.cat([update.U.double(), -written.U], dim=1), torch.cat([update.V.double(), written.V])
        off = LowRank(U, V).norm()
    return off / size if size else 0.0


def _stored(factor: Tensor, name: str) -> Tensor:
    dtype = working_dtype(factor.dtype)
    stored = factor.detach().cpu().to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"the update of {name} is beyond the range of {dtype}; nothing is written")
    return stored


def _config(model: nn.Module, modules: Sequence[str], r: int) -> dict[str, Any]:
    """adapter_config.json. Every field that changes the result is named: defaults of other versions may differ."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name(model) or None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "fan_in_fan_out": any(is_transposed(model.get_submodule(name)) for name in modules),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    atomic.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
