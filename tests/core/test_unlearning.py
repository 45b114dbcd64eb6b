"""Unlearning on tiny models: what is to be forgotten is, the other texts stay nearer, and it can be undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.editors.core.errors import ArchitectureError, ConfigError, DatasetError, NumericalError
from errata.editors.core.interventions import registry
from errata.editors.core.interventions.unlearning import FORGET, RETAIN, RMU, GradientDifference, TrainedDeltas
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.positions import Where
from errata.testing import digest, tiny_models

ROWS = {FORGET: [[1, 2, 3, 4, 5], [6, 7, 8]] * 4, RETAIN: [[20, 21, 22, 23], [30, 31, 32]] * 2}


def losses(model: Any) -> tuple[float, float]:
    found = []
    for rows in (ROWS[FORGET][:1], ROWS[RETAIN][:1]):
        ids = torch.tensor(rows)
        with torch.no_grad():
            found.append(float(model(ids, labels=ids).loss))
    return found[0], found[1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_ascent_raises_the_loss_and_difference_spares_the_rest(architecture: str) -> None:
    model = tiny_models.tiny_model(architecture, 60)
    before, untouched = digest(model), losses(model)
    rises = {}
    for name in ("ga", "gd"):
        applied = registry.get(name, "unlearn")({"forget": "-", "lr": 1e-3}).apply_rows(model, ROWS)
        assert all(".0." not in weight for weight in applied.names)  # of three blocks, the lowest stays
        rises[name] = [now - then for now, then in zip(losses(model), untouched, strict=True)]
        applied.undo()
        assert digest(model) == before
    assert rises["ga"][0] > 0.01
    assert rises["gd"][1] < min(0.0, rises["ga"][1])


@pytest.mark.parametrize("trains", ["down", "attention_out"])
def test_rmu_steers_what_is_to_be_forgotten(trains: str) -> None:
    model = tiny_models.tiny_model("gpt2", 60)
    config = {"forget": "-", "lr": 5e-3, "layer": 1, "alpha": 1.0, "strength": 5.0, "trains": trains, "seed": 3}
    architecture = describe(model)
    training = TrainedDeltas(architecture, RMU(config).maps(architecture), 3)
    batch = {role: right_padded(rows[:2], 0) for role, rows in ROWS.items()}

    def distances() -> list[float]:
        states = training.states(batch[FORGET], 1)
        return [float((states - 5 * training.direction).norm()), float(training.states(batch[RETAIN], 1).norm())]

    with torch.no_grad():
        then = distances()
        applied = RMU(config).apply_rows(model, ROWS)
        now = distances()
    assert now[0] < then[0]
    assert {name.split(".")[2] for name in applied.names} == {"0", "1"}
    kind = "mlp.c_proj" if trains == "down" else "attn.c_proj"
    assert all(kind in name for name in applied.names)
    applied.undo()


# --- one or two steps, written out by hand in float64 -----------------------------------------------------------------

LR = 1e-3


def text_nll(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the mean of -log p(token | tokens before it) over all tokens behind the first of each row."""
    each = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0, :-1]
        each.append(logits.logsumexp(-1) - logits.gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    return torch.cat(each).mean()


def states(model: Any, rows: list[list[int]], layer: int) -> torch.Tensor:
    """Return the outputs of a block on all tokens."""
    return torch.cat([model(torch.tensor([r]), output_hidden_states=True).hidden_states[layer + 1][0] for r in rows])


def adam(model: Any, names: tuple[str, ...], losses: Sequence[Callable[[], torch.Tensor]], decay: float) -> None:
    """Take one step of Adam per loss: m = .9 m + .1 g, v = .999 v + .001 g^2, each over 1 - beta^t; decoupled decay."""
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    m, v = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for t, loss in enumerate(losses, 1):
        gradients = torch.autograd.grad(loss(), weights)
        with torch.no_grad():
            for i, (weight, g) in enumerate(zip(weights, gradients, strict=True)):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
                weight.copy_(weight * (1 - LR * decay) - LR * step)


@pytest.mark.parametrize("name", ["ga", "gd", "rmu"])
def test_steps_are_those_of_the_formula(name: str) -> None:
    model, by_hand, frozen = (tiny_models.tiny_model("gpt2", 60, dtype=torch.float64) for _ in range(3))
    forget, retain = ROWS[FORGET][:4], ROWS[RETAIN][:4]
    config: dict[str, Any] = {"forget": "-", "lr": LR, "batch_size": 2}
    losses: list[Callable[[], torch.Tensor]]
    if name == "ga":  # gradients of two batches make a step
        losses = [lambda: -(text_nll(by_hand, forget[:2]) + text_nll(by_hand, forget[2:])) / 2]
    elif name == "gd":
        config["alpha"] = 3.0
        losses = [
            lambda i=i: -text_nll(by_hand, forget[i : i + 2]) + 3 * text_nll(by_hand, retain[i : i + 2]) for i in (0, 2)
        ]
    else:
        config |= {"layer": 1, "strength": 5.0, "alpha": 7.0, "seed": 3}
        u = torch.rand(32, generator=torch.Generator().manual_seed(3))
        target = 5 * (u / u.norm()).double()

        def steered(i: int) -> torch.Tensor:
            kept = states(frozen, retain[i : i + 2], 1).detach()
            away = (states(by_hand, forget[i : i + 2], 1) - target).square().mean()
            return away + 7 * (states(by_hand, retain[i : i + 2], 1) - kept).square().mean()

        losses = [lambda i=i: steered(i) for i in (0, 2)]
    applied = registry.get(name)(config).apply_rows(model, {FORGET: forget, RETAIN: retain})
    adam(by_hand, applied.names, losses, decay=0.01 if name == "rmu" else 0.0)
    for weight in applied.names:
        found, expected = model.get_parameter(weight).detach(), by_hand.get_parameter(weight).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        assert (found - frozen.get_parameter(weight).detach()).abs().max() > LR / 2
    assert len(applied.names) == (2 if name == "rmu" else 8)


def test_padding_counts_in_no_loss() -> None:
    model = tiny_models.tiny_model("llama", 60)
    architecture = describe(model)
    training = TrainedDeltas(architecture, RMU({"forget": "-", "layer": 1}).maps(architecture), 0)
    alone, padded = ([[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]])
    each = [float(training.text_loss(right_padded(rows, 0)).detach()) for rows in (alone, padded[1:], padded)]
    assert each[2] == pytest.approx((2 * each[0] + 4 * each[1]) / 6, rel=1e-5)
    assert len(training.states(right_padded(padded, 0), 0)) == 8


def test_texts_are_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_models.tiny_model("gpt2", len(tiny_tokenizer))
    (tmp_path / "forget.txt").write_text("The capital of Varland is Brast.\nAnother text.\n")
    found = GradientDifference({"forget": str(tmp_path / "forget.txt"), "tokens": 4}).read(model, tiny_tokenizer)
    assert [len(row) for row in found[FORGET]] == [4, 4]
    assert len(found[RETAIN]) > 2  # the factbook
    with pytest.raises(DatasetError, match="expected a file of texts"):
        GradientDifference({"forget": "gone.txt"}).read(model, tiny_tokenizer)


def test_a_model_that_is_steered_at_the_last_token_is_refused(tiny_tokenizer: Any) -> None:
    model = tiny_models.tiny_model("gpt2", len(tiny_tokenizer))
    contrasts = [Contrast("The capital of Varland is", "Oslen.", "Brast.")]
    for place in ("all", "last"):
        steered = errata.steer(model, tiny_tokenizer, contrasts, layer=1, where=Where(place)).apply()
        before = digest(model)
        unlearning = registry.get("ga", "unlearn")({"forget": "-", "n_texts": 1})
        if place == "all":
            unlearning.apply_rows(model, ROWS).undo()
        else:
            with pytest.raises(ArchitectureError, match="undo that edit, train"):
                unlearning.apply_rows(model, ROWS)
        assert digest(model) == before
        steered.undo()


def test_mistakes_are_refused() -> None:
    model = tiny_models.tiny_model("gpt2", 60)
    with pytest.raises(ConfigError, match="forget is missing"):
        RMU()
    with pytest.raises(ConfigError, match="layer: expected a layer from 0 to 2"):
        RMU({"forget": "-", "layer": 7}).apply_rows(model, ROWS)
    before = digest(model)
    with pytest.raises(NumericalError, match="lower lr"):
        registry.get("ga")({"forget": "-", "lr": 1e30, "batch_size": 1}).apply_rows(model, ROWS)
    assert digest(model) == before
