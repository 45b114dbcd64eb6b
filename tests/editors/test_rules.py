"""Defaults that scale with the model: against the authors' values on their models, and free of a model's units."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from errata import editors
from errata.editors.core.errors import StatisticsError
from errata.editors.core.families.layer_choice import single_layer, spread_layers
from errata.editors.core.request import EditRequest

HPARAMS = Path(__file__).resolve().parents[2] / "hparams" / "model"


class Published(NamedTuple):
    """A model of the papers: its depth, the width of its keys, and the authors' settings for it."""

    n_layers: int
    d_mlp: int
    settings: dict[str, Any]


SIZES = {"gpt2-xl": (48, 6400), "gpt-j": (28, 16384), "llama-3-8b": (32, 14336)}
PUBLISHED = {
    name: Published(*sizes, yaml.safe_load((HPARAMS / f"{name}.yaml").read_text(encoding="utf-8"))["editors"])
    for name, sizes in SIZES.items()
}


def second_moment(width: int, scale: float = 1.0) -> Tensor:
    X = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X *= torch.logspace(0, -2, width, dtype=torch.float64) * scale
    return X.T @ X / len(X)


def make(name: str, make_tiny: Any, tokenizer: Any, *, scale: float = 1.0, **fields: Any) -> Any:
    model = make_tiny("gpt2", dtype=torch.float64)
    moments = {layer: second_moment(128, scale) for layer in range(3)}
    kind: Any = editors.get(name)
    return kind(model, tokenizer, {"layers": [1], **fields}, moments=moments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layers_of_the_rule_are_the_authors_on_their_models(name: str) -> None:
    depth, _, settings = PUBLISHED[name]
    assert [single_layer(depth)] == settings["rome"]["layers"]
    for method in ("memit", "alphaedit"):
        assert list(spread_layers(depth)) == settings[method]["layers"]


def test_memit_s_weight_is_the_width_of_a_key_which_is_near_the_authors_weights() -> None:
    ratios = {name: model.settings["memit"]["mom2_update_weight"] / model.d_mlp for name, model in PUBLISHED.items()}
    assert ratios == pytest.approx({"gpt2-xl": 3.125, "gpt-j": 0.916, "llama-3-8b": 1.046}, abs=1e-3)


def test_emmet_s_weight_writes_nearly_the_share_of_a_usual_key_that_the_authors_weights_write() -> None:
    """g / (g + epsilon lambda), with g = d_in, the mean over the text of the second moment."""
    weights = {name: model.settings["emmet"].get("mom2_update_weight") for name, model in PUBLISHED.items()}
    shares = {name: 1 / (1 + 0.1 * w / PUBLISHED[name].d_mlp) for name, w in weights.items() if w is not None}
    assert shares == pytest.approx({"gpt2-xl": 0.985, "gpt-j": 0.942}, abs=1e-3)
    assert min(shares.values()) - 1 / (1 + 0.1) < 0.04


@pytest.mark.parametrize(
    ("name", "field", "ruled", "published"),
    [
        ("rome", "clamp_norm_factor", 2.0, 4.0),
        ("r_rome", "clamp_norm_factor", 2.0, 4.0),
        ("c_rome", "clamp_norm_factor", 4.0, 4.0),
        ("memit", "clamp_norm_factor", 0.75, 0.75),
        ("memit", "mom2_update_weight", 128.0, 15000.0),
        ("emmet", "mom2_update_weight", 128.0, 1000.0),
        ("alphaedit", "nullspace_energy", None, None),
        ("alphaedit", "nullspace_threshold", 0.02, 0.02),
        ("alphaedit", "L2", 10.0, 10.0),
    ],
)
def test_a_null_field_takes_the_rule_s_value_or_the_published_one_and_a_given_one_stays(
    name: str, field: str, ruled: Any, published: Any, make_tiny: Any, tiny_tokenizer: Any
) -> None:
    assert getattr(make(name, make_tiny, tiny_tokenizer).settings, field) == ruled
    assert getattr(make(name, make_tiny, tiny_tokenizer, as_published=True).settings, field) == published
    given = make(name, make_tiny, tiny_tokenizer, as_published=True, **{field: 0.5})
    assert getattr(given.settings, field) == 0.5


def test_an_edit_keeps_what_was_given_and_its_report_what_was_filled_in(make_tiny: Any, tiny_tokenizer: Any) -> None:
    given = {"mom2_adjustment": False, "v_num_grad_steps": 2, "context_templates": ["{}"]}
    editor: Any = editors.ROME(make_tiny("gpt2"), tiny_tokenizer, given)
    assert (editor.settings.layers, editor.settings.clamp_norm_factor) == ((1,), 2.0)
    (edit,) = editor.compute(EditRequest("The capital of {} is", "Varland", "Seattle"))
    assert edit.config == editors.ROME.Config.from_dict(given).to_dict()
    assert edit.config["layers"] is edit.config["clamp_norm_factor"] is None
    assert edit.diagnostics[0]["filled_in"] == {"layers": [1], "clamp_norm_factor": 2.0}


def test_fields_that_are_new_and_left_alone_are_not_written_so_that_older_runs_keep_their_names() -> None:
    config = editors.AlphaEdit.Config.from_dict({"nullspace_energy": 0.3, "L2": 0.1})
    assert "as_published" not in config.to_dict()
    assert config.to_dict()["nullspace_threshold"] == 0.02  # without effect, as it was then
    assert editors.MEMIT.Config(as_published=True).to_dict()["as_published"] is True


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_with_the_rules_the_unit_of_activations_does_not_matter(name: str, make_tiny: Any, tiny_tokenizer: Any) -> None:
    """Keys c times as long, with a second moment to match, give the same update of the values."""
    K = torch.randn(128, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fields = {"nullspace_energy": 0.02} if name == "alphaedit" else {}
    one = make(name, make_tiny, tiny_tokenizer, **fields).adjoint(1, K).T @ K
    other = make(name, make_tiny, tiny_tokenizer, scale=30.0, **fields).adjoint(1, 30 * K).T @ (30 * K)
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-9, atol=1e-12)
    if name == "alphaedit":
        with pytest.raises(StatisticsError, match="no eigenvalue of the second moment is small enough"):
            make(name, make_tiny, tiny_tokenizer, as_published=True, scale=30.0).adjoint(1, 30 * K)


def test_alphaedit_s_ridge_is_a_tenth_of_what_keys_have_in_the_null_space(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = make("alphaedit", make_tiny, tiny_tokenizer, nullspace_energy=0.02)
    P, C = editor.projector(1), editor.moment(1)
    assert editor.ridge(1) == pytest.approx(float((P.matrix() @ C).trace()) / 10, rel=1e-9)
    assert editor.ridge(1) <= 0.1 * 0.02 * float(C.trace())
    given = editors.AlphaEdit(editor.model, tiny_tokenizer, {"layers": [1]}, projectors={1: P.matrix()})
    assert given.ridge(1) == 10.0


def test_grace_s_radius_is_a_share_of_its_key(make_tiny: Any, tiny_tokenizer: Any) -> None:
    request, fields = EditRequest("The capital of {} is", "Varland", "Seattle"), {"layers": [1], "n_iter": 1}
    model = make_tiny("gpt2")
    (edit,) = editors.GRACE(model, tiny_tokenizer, fields).compute(request)
    (report,) = edit.diagnostics
    assert (report["final"], report["doubts"]) == ({"nll": report["losses"][-1]}, ["search"])  # after one step
    assert report["filled_in"] == {"eps": pytest.approx(0.25 * report["key_norm"], rel=1e-6)}
    (published,) = editors.GRACE(model, tiny_tokenizer, {**fields, "as_published": True}).compute(request)
    assert published.diagnostics[0]["filled_in"] == {"eps": 1.0}
    assert editors.GRACE.Config.from_dict({"eps": 6.0}).to_dict().keys() & {"eps_share", "as_published"} == set()


def test_a_model_of_one_layer_is_edited_there(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2", n_layers=1)
    assert [tuple(kind(model, tiny_tokenizer).layers) for kind in (editors.FTM, editors.FTL, editors.LocFT)] == [
        (0,)
    ] * 3
    assert editors.GRACE(model, tiny_tokenizer).layer == editors.WISE(model, tiny_tokenizer).layer == 0
