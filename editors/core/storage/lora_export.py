"""Export of edits as a LoRA adapter, which PEFT, vLLM and other programs load beside a model or merge into it.

    W' = W + (lora_alpha / r) B A,    lora_alpha = r

(Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.) The factors of the edits become the
adapter unchanged. Factors of the difference of bfloat16 weights would instead have the rank of its rounding errors. All
modules get the largest rank among them, filled up with zeros, since vLLM reads `r` but not `rank_pattern`. Modules are
given by their full names, so that no other layer is adapted. GPT-2's Conv1D stores weights transposed: `fan_in_fan_out`
says so, and the factors stay as they are.

Factors are written in float32, or in float64 for float64 models, and PEFT keeps this precision. Weights that PEFT
merges in float32 agree with errata's to the last digits. In 16 bits they differ by a rounding, since PEFT rounds the
update before adding it. PEFT's `unmerge` does not restore the base exactly in either case.

vLLM (from its documentation; not run here): start it with `--enable-lora --max-lora-rank N`. N is one of 1, 8, 16, 32,
64, 128, 256, 320, 512, and at least the adapter's rank; the default is 16. vLLM rounds the factors to the model's
precision, and accepts adapters only for the architectures that it lists as supporting LoRA.

Legend: B (d_out, r), A (r, d_in); they are U and V of a LowRank update.
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
from errata.editors.core.ledger.patch import LowRank, Update, merge
from errata.editors.core.model.architecture import is_transposed
from errata.editors.core.storage.merged_export import check_exportable, new_folder, write_manifest
from errata.editors.core.storage.provenance import model_name

MAX_RANK = 512  # the largest rank that vLLM serves
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraExport:
    """An adapter that was written.

    Attributes:
        folder: The folder of the adapter.
        rank: r of every module.
        errors: ||W' - W - B A|| / ||W' - W|| by weight, in Frobenius norm; 0.0 if the edit's factors were not cut.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]


def write_lora(
    model: nn.Module, entries: Sequence[Entry], folder: str | Path, *, rank: int | None = None
) -> LoraExport:
    """Write the entries as one adapter. PEFT is not needed, and the model stays unchanged.

    Args:
        model: A model of transformers.
        entries: The edits, whose updates are added up; they need not be in the model's ledger.
        folder: A new or empty folder.
        rank: Replace updates of higher rank by their best approximation of this rank. The errors are returned, and
            written into the folder. None: keep all updates exact, or refuse.

    Returns:
        The folder, the rank and the errors.

    Raises:
        ExportError: An edit is not a change of weights, or changes weights that no adapter can; the rank would exceed
            `MAX_RANK` and `rank` is None; the folder exists already.
        NumericalError: An update holds NaN or inf, or exceeds the range of float32.
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
    # Zeros fill every module up to the same rank r, since vLLM reads no `rank_pattern`.
    for name, module in modules.items():
        B, A = _stored(factors[name].U, name), _stored(factors[name].V, name)
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(A, (0, 0, 0, r - len(A))).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(B, (0, r - B.shape[1])).contiguous()
    with new_folder(folder) as path:
        _write(path, tensors, _config(model, sorted(modules.values()), r))
        write_manifest(path, "lora", model, entries, {"rank": r, "relative_errors": errors})
    return LoraExport(Path(folder), r, errors)


def _module_name(model: nn.Module, name: str) -> str:
    """Return the name of the module that a weight belongs to.

    Raises:
        ExportError: The module is not a linear map, or shares its weight with another module.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last != "weight" or not (isinstance(module, nn.Linear) or is_transposed(module)):
        raise ExportError(
            f"{name} is not the weight of a linear map, and adapters can change only these; use export_merged instead"
        )
    parameter = find_weight(model, name).parameter
    names = [other for other, entry in model.named_parameters(remove_duplicate=False) if entry is parameter]
    if len(names) > 1:
        raise ExportError(
            f"{' and '.join(names)} are one weight, and an adapter would change only one of them; use export_merged"
        )
    return path


def _bound(update: Update) -> int:
    """Return an upper bound on the update's rank, from its shape."""
    return min(update.U.shape[1], *update.shape) if isinstance(update, LowRank) else min(update.shape)


def _check_ranks(updates: Mapping[str, Update], rank: int | None) -> None:
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ExportError(f"rank: expected 1 to {MAX_RANK}, got {rank}")
    name, needed = max(((name, _bound(update)) for name, update in updates.items()), key=lambda pair: pair[1])
    if rank is None and needed > MAX_RANK:
        kind = "together" if isinstance(updates[name], LowRank) else "are dense and"
        raise ExportError(
            f"the edits of {name} {kind} may need rank {needed}; adapters hold up to {MAX_RANK}. Give rank={MAX_RANK} "
            "for the nearest one that fits, with its error, or write the whole model: export_merged, or merged=FOLDER"
        )


def _factors(update: Update, rank: int) -> LowRank:
    """Return the update's factors if their rank is small enough; else the best ones (Eckart and Young 1936)."""
    rank = min(rank, _bound(update))
    if isinstance(update, LowRank):
        if update.U.shape[1] <= rank:
            return update
        # U V = left (over under^T) right^T with orthonormal left and right: the SVD of the small core is enough.
        left, over = torch.linalg.qr(update.U.double())
        right, under = torch.linalg.qr(update.V.double().T)
        core = over @ under.T
    else:
        left, right, core = None, None, update.matrix(torch.float64, update.tensors[0].device)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    root, dtype = S[:rank].sqrt(), update.tensors[0].dtype
    U, V = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return LowRank((U if left is None else left @ U).to(dtype), (V if right is None else V @ right.T).to(dtype))


def _error(update: Update, written: LowRank) -> float:
    if update is written:
        return 0.0
    size = update.norm()
    if not isinstance(update, LowRank):
        device = update.tensors[0].device
        error = float((update.matrix(torch.float64, device) - written.matrix(torch.float64, device)).norm())
    else:
        # The difference of two low-rank updates is one itself: no (d_out, d_in) matrix is needed.
        U, V = torch.cat([update.U.double(), -written.U], dim=1), torch.cat([update.V.double(), written.V])
        error = LowRank(U, V).norm()
    return error / size if size else 0.0


def _stored(factor: Tensor, name: str) -> Tensor:
    dtype = working_dtype(factor.dtype)  # float32 at least: 16 bits would round the factors once more
    stored = factor.detach().cpu().to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"the update of {name} exceeds the range of {dtype}; nothing is written")
    return stored


def _config(model: nn.Module, modules: Sequence[str], r: int) -> dict[str, Any]:
    """Return adapter_config.json with every field that changes the result, since PEFT's defaults may change."""
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
        "target_modules": list(modules),  # full names: a last part alone would match every layer
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
