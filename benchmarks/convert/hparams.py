"""Hyper-parameter files of other repositories, read as configurations of errata.

    found = read("hparams/ROME/gpt2-xl.yaml")
    found.method, found.fields          # "rome", {"layers": [17], "v_lr": 0.5, ...}: errata.editors.ROME takes them
    found.rows                          # every field of the file, and what became of it

EasyEdit (YAML; zjunlp/EasyEdit, hparams/), and the JSON of kmeng01/rome, kmeng01/memit, jianghoucheng/AlphaEdit and
scalable-model-editing/unified-model-editing. Most fields are called the same here. Module names are not needed, for the
parts of a model are found by structure; what says where and how to run belongs to the command, not to a method.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from errata import editors
from errata.benchmarks.bench.compose import read_mapping
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

Fate = Literal["kept", "left out", "differs", "unknown"]

# What their files call a method. The fine-tuning methods share one name there, and differ in a field.
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "ROME": "rome",
        "R-ROME": "r_rome",
        "MEMIT": "memit",
        "EMMET": "emmet",
        "AlphaEdit": "alphaedit",
        "GRACE": "grace",
        "MEND": "mend",
        "FT": "ft_l",
        "LoRA": "lora",
    }
)
_OBJECTIVES = MappingProxyType({"prompt_last": "ft_l", "target_new": "ft_m"})
_DATASETS = MappingProxyType(
    {
        "wikipedia": ("wikimedia/wikipedia:20231101.en:train", "of November 2023; theirs is of 2020 or 2022"),
        "wikitext": ("Salesforce/wikitext:wikitext-103-raw-v1:train", ""),
    }
)
# The last part of the down projection's name in the models of their files.
_DOWN = ("c_proj", "fc_out", "dense_4h_to_h", "down_proj", "fc2")
_UP = ("c_fc", "fc_in", "dense_h_to_4h", "up_proj", "fc1")

_OF_TRAINING = (
    *(
        "archive",
        "model_save_pt",
        "max_epochs",
        "max_iters",
        "final_eval",
        "val_interval",
        "val_batch_size",
        "val_steps",
    ),
    *("early_stop_patience", "early_stop_key", "eval_only", "results_dir", "save", "debug"),
    *("silent", "verbose", "log_interval", "eval_log_interval"),
)
_STRUCTURE = "found by the structure of the model"
_COMMAND = "said to the command: "
_LEFT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp"), _STRUCTURE),
        **dict.fromkeys(("ln_f_module", "lm_head_module", "model_class"), _STRUCTURE),
        **dict.fromkeys(("tokenizer_class", "tokenizer_name"), "the model's own"),
        "stats_dir": "moments have a cache of their own; `errata convert moments` reads theirs",
        "P_loc": "`errata convert projectors` says how to bring it here",
        "device": f"{_COMMAND}device=cuda:1",
        "model_parallel": f"{_COMMAND}device=cuda:1",
        "fp16": f"{_COMMAND}precision=float16",
        "batch_size": f"{_COMMAND}batch_size=100",
        "max_length": "requests are never cut",
        "half": f"{_COMMAND}precision=bfloat16",
        "calculate_objective_value": "a printout",
        **dict.fromkeys(_OF_TRAINING, "of training and its printouts"),
    }
)
# Fields that nothing reads in the code of their authors.
_IDLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "AlphaEdit": ("mom2_update_weight",),
        "LoRA": ("norm_constraint",),
        "GRACE": ("dist_fn", "val_train", "val_reg", "reg", "num_pert", "dropout"),
        "MEND": ("cbase",),
    }
)
# Fields that have one value here.
_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "layer_selection": ("all",),
        **dict.fromkeys(("prob_cutoff", "norm_control", "wd_power_law"), (0, None)),
        **dict.fromkeys(("dropout", "no_grad_layers", "hidden_dim"), (0, None)),
        **dict.fromkeys(("train_base", "one_sided", "x_only", "delta_only"), (False,)),
        "init": ("id",),
        "act": ("relu",),
        "mlp_class": ("IDMLP",),
        "opt": ("Adam",),
        "lr_scale": (1.0,),
    }
)


@dataclasses.dataclass(frozen=True)
class ConvertedField:
    """A field of a file, and what became of it.

    Attributes:
        field, value: As the file has it.
        fate: Kept, as the fields `ours` of the method's Config, or as the method or the model; left out, or another
            thing here, for the reason in `note`; or not known.
    """

    field: str
    value: Any
    fate: Fate
    note: str = ""
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ConvertedConfig:
    """A file as it is understood here.

    Attributes:
        method: Registered name.
        fields: Of the method's Config; those that the file names, plain values.
        model: What the file calls its model: a folder or a Hugging Face id. None: it does not say.
        rows: One a field, in the order of the file.
    """

    method: str
    fields: dict[str, Any]
    model: str | None
    rows: tuple[ConvertedField, ...]


Rule = Callable[[str, Any], ConvertedField]


def read(path: str | Path, *, method: str | None = None) -> ConvertedConfig:
    """Read a file and check what it says against the method's Config.

    Args:
        path: YAML or JSON.
        method: The method as their files call it ("ROME"; a field may say which of several), or by our name. None:
            what `alg_name` says, or else the name of the folder, as in the authors' repositories, whose files do not
            say.

    Raises:
        ConfigError: not such a file; a method or a value that errata does not have, named with its field; a file whose
            fields are of another method than ours that is named.
    """
    path = Path(path)
    values = {name: _number(value) for name, value in read_mapping(path).items()}
    theirs = _method(path, values, method)
    try:
        ours = _ours(theirs, values, method if method in editors.METHODS else None)
        known = set(editors.get(ours).Config.__dataclass_fields__)
        rows = tuple(_row(theirs, known, name, value) for name, value in values.items())
        fields = {name: value for row in rows for name, value in row.ours.items()}
        editors.get(ours).Config.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    model = values.get("model_name")
    return ConvertedConfig(ours, fields, None if model is None else str(model), rows)


def _number(value: Any) -> Any:
    """A number that stands there as text, as 1e-5 does for most readers of YAML."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value.strip()):
        return float(value)
    return value


def _method(path: Path, values: Mapping[str, Any], method: str | None) -> str:
    folders = {name.lower(): name for name in METHODS}
    folder = folders.get(path.resolve().parent.name.lower())
    named = method or values.get("alg_name") or values.get("alg") or folder
    if named is None:
        raise ConfigError(f"{path} does not name its method; add method=ROME, or {', '.join(list(METHODS)[1:])}")
    # A method that none of their files names goes by our name, and its fields by their own.
    by_ours = {name: name for name in editors.METHODS}
    by_ours |= {ours: theirs for theirs, ours in METHODS.items()} | {"ft_m": "FT", "c_rome": "ROME"}
    found = folders.get(str(named).lower()) or by_ours.get(str(named))
    if found is None:
        raise ConfigError(f"{path}: errata has no method {named!r}{did_you_mean(str(named), METHODS)}")
    return found


def _ours(theirs: str, values: Mapping[str, Any], asked: str | None) -> str:
    """The registered name: the one that is asked for, unless a field says another; else what the fields say."""
    said = _said("ROME" if asked == "r_rome" else theirs, values)
    if asked is not None and said not in (None, asked):
        raise ConfigError(f"its fields are those of {said}; leave method={asked} out, or give method={said}")
    return asked or said or METHODS.get(theirs, theirs)


def _said(theirs: str, values: Mapping[str, Any]) -> str | None:
    """The registered name that a field chooses, where theirs stands for several."""
    if theirs == "FT" and "objective_optimization" in values:
        objective = values["objective_optimization"]
        if objective not in _OBJECTIVES:
            raise ConfigError(f"objective_optimization: expected {' or '.join(_OBJECTIVES)}, got {objective!r}")
        return _OBJECTIVES[objective]
    if theirs == "ROME" and "original_implementation" in values:
        if values["original_implementation"] is not False:
            return "rome"
        return "r_rome" if values.get("enable_prompt_keys") else "c_rome"
    return None


def _row(method: str, known: set[str], name: str, value: Any) -> ConvertedField:
    if name in _IDLE.get(method, ()):
        return ConvertedField(name, value, "left out", "nothing reads it in its authors' code")
    if special := _SPECIAL_OF.get(method, {}).get(name) or _SPECIAL.get(name):
        return special(name, value)
    if name in known:
        return _kept(name, value)
    if name in _FIXED:
        return _fixed(name, value)
    if name in _LEFT:
        return ConvertedField(name, value, "left out", _LEFT[name])
    near = did_you_mean(name, known)
    return ConvertedField(name, value, "unknown", f"not carried over{near if 'did you mean' in near else ''}")


# --- fields that need more than their name ----------------------------------------------------------------------------


def _kept(name: str, value: Any, ours: Any = None, note: str = "") -> ConvertedField:
    return ConvertedField(name, value, "kept", note, {name: value if ours is None else ours})


def _fixed(name: str, value: Any) -> ConvertedField:
    if value not in _FIXED[name]:
        raise ConfigError(f"{name}: errata has no other way than {_FIXED[name][0]!r}, got {value!r}")
    return ConvertedField(name, value, "left out", "the only way here")


def _read(name: str, value: Any) -> ConvertedField:
    """What has been heard already: it says which method, or which model."""
    return ConvertedField(name, value, "kept")


def _rewritten(name: str, value: Any) -> ConvertedField:
    if str(value).removesuffix(".weight").rpartition(".")[2] not in _DOWN:
        raise ConfigError(f"{name}: expected the down projection of an MLP ({', '.join(_DOWN)}), got {value!r}")
    return ConvertedField(name, value, "left out", f"the MLP's down projection, {_STRUCTURE}")


def _bound(name: str, value: Any) -> ConvertedField:
    return ConvertedField(name, value, "kept", ours={name: None if value is False else value})


def _decay(name: str, value: Any) -> ConvertedField:
    return _kept(name, value, 0.0 if value is False else value)


def _dataset(name: str, value: Any) -> ConvertedField:
    return _kept(name, value, *_DATASETS.get(str(value), ()))


def _adjustment(name: str, value: Any) -> ConvertedField:
    return _kept(name, value, note="" if value else "keys are not whitened: this is not the method of the paper")


def _layers(name: str, value: Any) -> ConvertedField:
    return _kept(name, value) if value else ConvertedField(name, value, "left out", "all layers, the default")


def _adapter(name: str, value: Any) -> ConvertedField:
    if value == "lora":
        return ConvertedField(name, value, "left out", "the only way here")
    return ConvertedField(name, value, "differs", "errata trains their lora_type: lora, by the same fields")


def _requests(name: str, value: Any) -> ConvertedField:
    return ConvertedField(name, value, "kept", "requests that are one edit in training", {"edit_bs": value})


def _rate_of_rates(name: str, value: Any) -> ConvertedField:
    note = "of no effect in its authors' code, where the learned rates move with lr; here they move with it"
    return ConvertedField(name, value, "differs", note, {name: value})


def _projections(name: str, value: Any) -> ConvertedField:
    """MEND's: every layer with every projection."""
    places = [_place(name, entry) for entry in _listed(name, value)]
    layers, ends = sorted({layer for layer, _ in places}), list(dict.fromkeys(end for _, end in places))
    if len(places) != len(set(places)) or len(places) != len(layers) * len(ends):
        raise ConfigError(f"{name}: errata edits the same projections in each layer, got {value!r}")
    return ConvertedField(name, value, "kept", ours={"layers": layers, "projections": ends})


def _one_module(name: str, value: Any) -> ConvertedField:
    """GRACE's: the layer that its codebook stands at. Others than the first are not looked at there, either."""
    layer, end = _place(name, _listed(name, value)[0])
    if end not in (*_DOWN, *_UP):
        raise ConfigError(f"{name}: expected a projection of an MLP ({', '.join((*_DOWN, *_UP))}), got {end!r}")
    return ConvertedField(name, value, "kept", ours={"layers": [layer], "module": "down" if end in _DOWN else "up"})


def _listed(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name}: expected a list of parameter names, got {value!r}")
    return value


def _place(name: str, parameter: str) -> tuple[int, str]:
    """Layer and projection of transformer.h.35.mlp.c_fc.weight, or transformer.h[35]..."""
    parts = re.sub(r"\[(\d+)\]", r".\1", parameter).removesuffix(".weight").split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) != 1:
        raise ConfigError(f"{name}: expected the name of a parameter of one layer, got {parameter!r}")
    return numbers[0], parts[-1]


_SPECIAL_OF: Mapping[str, Mapping[str, Rule]] = MappingProxyType(
    {
        "GRACE": {"inner_params": _one_module},
        "MEND": {"inner_params": _projections, "batch_size": _requests, "lr_lr": _rate_of_rates},
    }
)
_SPECIAL: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(("alg_name", "alg", "model_name", "objective_optimization"), _read),
        **dict.fromkeys(("original_implementation", "enable_prompt_keys", "enable_random_prefix_keys"), _read),
        "rewrite_module_tmp": _rewritten,
        "norm_constraint": _bound,
        "weight_decay": _decay,
        "mom2_dataset": _dataset,
        "mom2_adjustment": _adjustment,
        "layers": _layers,
        "lora_type": _adapter,
    }
)
