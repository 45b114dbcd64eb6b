"""Hyper-parameter files of other repositories: every field has a fate, and what is kept is what the method gets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typed_commands import run

from errata import editors
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig, ModelConfig, editor_config
from errata.benchmarks.convert import hparams
from errata.cli import overrides
from errata.editors.core.errors import ConfigError

MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
PLACE = {
    "model_name": "./cache/some-model",
    "device": 3,
    "stats_dir": "./stats",
    "model_parallel": False,
    "fp16": False,
}
LOCATED = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 22,
    "v_lr": 0.4,
    "v_loss_layer": 47,
    "v_weight_decay": 0.25,
    "kl_factor": 0.125,
    "clamp_norm_factor": 3,
    "mom2_adjustment": True,
    "mom2_n_samples": 5000,
    "mom2_dtype": "float32",
}
MASS = {**LOCATED, "layers": [3, 4], "mom2_update_weight": 123, "layer_selection": "all"}
WIKIPEDIA = "wikimedia/wikipedia:20231101.en:train"
TUNED = {"num_steps": 9, "lr": 1e-3, "weight_decay": 0, "kl_factor": 0, "batch_size": 1, "max_length": 30}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


# (what their file holds, our method, the fields that it gets)
FILES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ROME": (
        {**LOCATED, **MODULES, **PLACE, "layers": [17], "context_template_length_params": [[5, 10], [10, 10]]}
        | {"alg_name": "ROME", "mom2_dataset": "wikipedia", "max_length": 40},
        "rome",
        {**LOCATED, "layers": [17], "context_template_length_params": [[5, 10], [10, 10]], "mom2_dataset": WIKIPEDIA},
    ),
    "MEMIT": ({**MASS, **MODULES, "batch_size": 10}, "memit", without(MASS, "layer_selection")),
    "EMMET": (
        {**MASS, **MODULES, **PLACE, "update_norm_lambda": 0, "emmet_lambda": 0.1, "calculate_objective_value": False}
        | {"prob_cutoff": 0, "norm_control": 0},
        "emmet",
        {**without(MASS, "layer_selection"), "update_norm_lambda": 0, "emmet_lambda": 0.1},
    ),
    "AlphaEdit": (
        {**MASS, **MODULES, **PLACE, "nullspace_threshold": 0.03, "L2": 5, "P_loc": "./null_space_project.pt"},
        "alphaedit",
        {**without(MASS, "layer_selection", "mom2_update_weight"), "nullspace_threshold": 0.03, "L2": 5},
    ),
    "FT": (
        {**TUNED, **MODULES, **PLACE, "alg_name": "FT", "layers": [21], "norm_constraint": 2e-4},
        "ft_l",
        {**without(TUNED, "max_length"), "layers": [21], "norm_constraint": 2e-4},
    ),
    "LoRA": (
        {**TUNED, **PLACE, "alg_name": "LoRA", "layers": [], "lora_type": "lora", "rank": 4, "lora_alpha": 16}
        | {"lora_dropout": 0.0, "norm_constraint": False, "target_modules": ["q_proj"]},
        "lora",
        {**without(TUNED, "max_length"), "rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}
        | {"target_modules": ["q_proj"]},
    ),
    "GRACE": (
        {"alg_name": "GRACE", "inner_params": ["transformer.h[35].mlp.c_fc.weight"], "device": 0, "model_name": "x"}
        | {"edit_lr": 0.5, "n_iter": 20, "eps": 2.0, "dist_fn": "euc", "val_init": "warm", "val_train": "sgd"}
        | {"val_reg": "None", "reg": "early_stop", "replacement": "replace_all", "eps_expand": "coverage"}
        | {"num_pert": 8, "dropout": 0.0},
        "grace",
        {"layers": [35], "module": "up", "edit_lr": 0.5, "n_iter": 20, "eps": 2.0, "val_init": "warm"}
        | {"replacement": "replace_all", "eps_expand": "coverage"},
    ),
    "MEND": (
        {
            "alg_name": "MEND",
            "alg": "MEND",
            "archive": "./m.pt",
            "model_class": "GPT2LMHeadModel",
            "tokenizer_name": "x",
        }
        | {"inner_params": [f"transformer.h.{n}.mlp.{end}.weight" for n in (46, 47) for end in ("c_proj", "c_fc")]}
        | {"lr": "1e-6", "edit_lr": 1e-3, "lr_lr": 1e-4, "lr_scale": 1.0, "seed": 42, "cedit": 0.2, "cloc": 1.0}
        | {"cbase": 1.0, "dropout": 0.0, "train_base": False, "no_grad_layers": None, "init": "id", "norm": True}
        | {"act": "relu", "rank": 64, "mlp_class": "IDMLP", "shared": True, "batch_size": 1, "max_iters": 100000}
        | {"early_stop_key": "loss/total_edit_val", "half": False, "accumulate_bs": 10, "opt": "Adam"}
        | {"grad_clip": 100.0, "results_dir": "./results"},
        "mend",
        {"layers": [46, 47], "projections": ["c_proj", "c_fc"], "lr": 1e-6, "edit_lr": 1e-3, "lr_lr": 1e-4}
        | {"seed": 42, "cedit": 0.2, "cloc": 1.0, "norm": True, "rank": 64, "shared": True, "edit_bs": 1}
        | {"accumulate_bs": 10, "grad_clip": 100.0},
    ),
}


def write(folder: Path, content: dict[str, Any], name: str = "some.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def test_every_method_of_theirs_is_one_of_ours() -> None:
    assert set(hparams.METHODS.values()) <= set(editors.METHODS)
    assert {ours for _, ours, _ in FILES.values()} | {"r_rome"} == set(hparams.METHODS.values())


@pytest.mark.parametrize("method", FILES)
def test_every_field_is_kept_or_left_out_with_a_reason(method: str, tmp_path: Path) -> None:
    content, ours, fields = FILES[method]
    found = hparams.read(write(tmp_path / method, content))
    assert (found.method, found.fields, found.model) == (ours, fields, content.get("model_name"))
    assert [row.field for row in found.rows] == list(content)
    assert {row.fate for row in found.rows if row.field != "lr_lr"} == {"kept", "left out"}
    assert all(row.note for row in found.rows if row.fate == "left out")
    config = editors.get(ours).Config.from_dict(found.fields)
    assert config != editors.get(ours).Config()


def test_values_that_are_switched_off_by_false_or_written_as_text_are_numbers_and_null_here(tmp_path: Path) -> None:
    content = {**TUNED, "alg_name": "FT", "norm_constraint": False, "weight_decay": False, "lr": "5e-4"}
    content["objective_optimization"] = "target_new"
    found = hparams.read(write(tmp_path, content))
    assert found.method == "ft_m"
    kept = {name: found.fields[name] for name in ("norm_constraint", "weight_decay", "lr")}
    assert kept == {"norm_constraint": None, "weight_decay": 0.0, "lr": 5e-4}
    (tmp_path / "plain.yaml").write_text("alg_name: ROME\nv_lr: 5e-1\nv_weight_decay: 1e-3\nlayers: [5]\n")
    assert hparams.read(tmp_path / "plain.yaml").fields == {"v_lr": 0.5, "v_weight_decay": 1e-3, "layers": [5]}


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        ({}, "rome"),
        ({"original_implementation": True, "enable_prompt_keys": False}, "rome"),
        ({"original_implementation": False, "enable_prompt_keys": True, "enable_random_prefix_keys": False}, "r_rome"),
        ({"original_implementation": False, "enable_prompt_keys": False, "enable_random_prefix_keys": True}, "c_rome"),
    ],
)
def test_rome_with_its_keys_repaired_is_the_method_that_repairs_them(
    flags: dict[str, bool], ours: str, tmp_path: Path
) -> None:
    assert hparams.read(write(tmp_path, {"alg_name": "ROME", "layers": [5], **flags})).method == ours


def test_the_method_is_named_by_the_caller_the_file_or_its_folder(tmp_path: Path) -> None:
    named = write(tmp_path / "MEMIT", {"alg_name": "R-ROME", "layers": [5]})
    bare = write(tmp_path / "MEMIT", {"layers": [5]}, "bare.json")
    assert hparams.read(named).method == "r_rome"
    assert hparams.read(bare).method == "memit"
    assert hparams.read(bare, method="ROME").method == hparams.read(bare, method="rome").method == "rome"
    with pytest.raises(ConfigError, match="method=ROME"):
        hparams.read(write(tmp_path / "elsewhere", {"layers": [5]}))


@pytest.mark.parametrize("ours", editors.METHODS)
def test_our_name_of_a_method_is_the_method_where_the_file_does_not_say(ours: str, tmp_path: Path) -> None:
    # Every method has this field; a method without layers refuses them.
    assert hparams.read(write(tmp_path, {"max_norm_ratio": 10.0}), method=ours).method == ours


@pytest.mark.parametrize(
    ("asked", "fields", "said"),
    [
        ("ft_m", {"objective_optimization": "prompt_last"}, "ft_l"),
        ("ft_l", {"objective_optimization": "target_new"}, "ft_m"),
        ("rome", {"original_implementation": False, "enable_prompt_keys": True}, "r_rome"),
        ("r_rome", {"original_implementation": False, "enable_prompt_keys": False}, "c_rome"),
        ("c_rome", {"original_implementation": True}, "rome"),
    ],
)
def test_our_name_of_a_method_is_refused_where_the_file_says_another(
    asked: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"layers": [5], **fields})
    with pytest.raises(ConfigError, match=f"those of {said}"):
        hparams.read(path, method=asked)
    assert hparams.read(path, method=said).method == said


def test_an_unknown_field_is_named_with_the_nearest_known_one_and_not_carried_over(tmp_path: Path) -> None:
    found = hparams.read(write(tmp_path, {"alg_name": "ROME", "v_lrr": 0.1, "use_chat_template": True}))
    assert found.fields == {}
    rows = {row.field: row for row in found.rows if row.fate == "unknown"}
    assert rows.keys() == {"v_lrr", "use_chat_template"}
    assert "did you mean 'v_lr'" in rows["v_lrr"].note


def test_what_means_another_thing_here_is_said(tmp_path: Path) -> None:
    notes = {row.field: row for row in hparams.read(write(tmp_path, {"alg_name": "LoRA", "lora_type": "adalora"})).rows}
    assert notes["lora_type"].fate == "differs"
    notes = {
        row.field: row for row in hparams.read(write(tmp_path, {"alg_name": "ROME", "mom2_adjustment": False})).rows
    }
    assert "not the method of the paper" in notes["mom2_adjustment"].note
    (row,) = hparams.read(write(tmp_path, {"alg_name": "MEND", "lr_lr": 1e-4})).rows[1:]
    assert (row.fate, row.ours) == ("differs", {"lr_lr": 1e-4})
    assert "no effect in its authors' code" in row.note


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"alg_name": "WISE", "layers": [3]}, "'WISE'"),
        ({"alg_name": "MEMIT", "layer_selection": "random"}, "layer_selection.*'all'"),
        ({"alg_name": "FT", "rewrite_module_tmp": "transformer.h.{}"}, "rewrite_module_tmp.*down projection"),
        ({"alg_name": "FT", "wd_power_law": [-0.9, 0.2]}, "wd_power_law"),
        ({"alg_name": "FT", "objective_optimization": "everything"}, "objective_optimization"),
        ({"alg_name": "ROME", "v_lr": -1}, "v_lr.*above 0"),
        ({"alg_name": "ROME", "layers": "all"}, "layers.*list"),
        ({"alg_name": "FT", "kl_factor": 0.5}, "kl_factor"),
        ({"alg_name": "MEND", "inner_params": ["h.1.mlp.c_fc.weight", "h.2.mlp.c_proj.weight"]}, "inner_params.*each"),
        ({"alg_name": "MEND", "inner_params": "h.1.mlp.c_fc.weight"}, "inner_params.*list"),
        ({"alg_name": "MEND", "inner_params": ["lm_head.weight"]}, "inner_params.*one layer"),
        ({"alg_name": "MEND", "act": "gelu"}, "act.*'relu'"),
        ({"alg_name": "GRACE", "inner_params": ["transformer.h[3].attn.c_attn.weight"]}, "inner_params.*projection"),
        ({}, "expected fields"),
        ([1, 2], "expected fields"),
    ],
)
def test_what_errata_does_not_have_is_refused_by_name(content: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=said) as caught:
        hparams.read(path)
    assert str(path) in str(caught.value)


def test_a_file_cannot_run_code_or_read_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"alg_name: ROME\nv_lr: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'run'}]\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        hparams.read(path)
    assert not (tmp_path / "run").exists()
    path.write_text("alg_name: ROME\nmodel_name: ${oc.env:HOME}\n")
    assert hparams.read(path).model == "${oc.env:HOME}"
    with pytest.raises(ConfigError, match="cannot be read"):
        hparams.read(tmp_path / "missing.yaml")


# --- as a command -----------------------------------------------------------------------------------------------------


# Not on this machine, so that no count of layers is known that the files' layers could be held against.
ELSEWHERE = "org/model"


def config_of(line: str) -> Any:
    """The method's Config that a printed command gives."""
    words = shlex.split(line)
    assert words[:2] == ["errata", "bench"]
    words = [*(word for word in words[2:] if not word.startswith("model=")), f"model={ELSEWHERE}"]
    config = BenchConfig.of(compose("bench", overrides.translated(words, "bench")))
    return editor_config(config.editor, config.model)


@pytest.mark.parametrize("method", FILES)
def test_the_command_that_is_printed_runs_with_the_fields_of_the_file(method: str, tmp_path: Path) -> None:
    content, ours, fields = FILES[method]
    path = write(tmp_path / method, content)
    wanted = editor_config({"name": ours, **fields}, ModelConfig(ELSEWHERE))
    shown = run("convert", "hparams", str(path))
    assert all(name in shown for name in content)
    assert config_of(shown.strip().splitlines()[-1]) == wanted
    made = run("convert", "hparams", str(path), f"out={tmp_path / 'ours.yaml'}")
    assert f"editor={tmp_path / 'ours.yaml'}" in made
    assert config_of(made.strip().splitlines()[-1]) == wanted


def test_a_field_behind_the_file_of_a_method_overrides_it(tmp_path: Path) -> None:
    run(
        "convert",
        "hparams",
        str(write(tmp_path, {"alg_name": "R-ROME", "v_lr": 0.25, "layers": [1]})),
        f"out={tmp_path}/r.yaml",
    )
    config = config_of(f"errata bench model=world editor={tmp_path}/r.yaml editor.v_lr=0.75")
    assert (config.v_lr, config.layers) == (0.75, (1,))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hparam"], "did you mean 'hparams'"),
        (["hparams"], "expected a file"),
        (["hparams", "x.yaml", "--all"], "unknown option"),
        (["hparams", "x.yaml", "otu=y"], "did you mean 'out'"),
        (["moments", "x.npz"], "out is missing"),
        (["dataset", "dataset=wrld", "out=x.json"], "did you mean 'world'"),
        (["dataset", "n_edits=many", "out=x.json"], "expected a number"),
    ],
)
def test_what_is_wrong_with_a_conversion_is_said(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        run("convert", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_does_not_write_over_a_file(tmp_path: Path) -> None:
    path, out = write(tmp_path, {"alg_name": "ROME"}), tmp_path / "mine.yaml"
    out.write_text("mine")
    for arguments in (["hparams", str(path)], ["moments", "x.npz"], ["projectors", "x.npz"], ["dataset"]):
        with pytest.raises(ConfigError, match="not overwritten"):
            run("convert", *arguments, f"out={out}")
    assert out.read_text() == "mine"


def test_a_yaml_that_names_no_method_is_no_choice_of_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, said in (("layers: [1]\n", "name: METHOD"), ("name: rme\n", "name: METHOD"), ("", "expected fields")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            overrides.translated([f"editor={path}"], "bench")
