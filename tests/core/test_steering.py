"""Edits of behaviour from contrast sets: every kind on small models, what is recorded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.editors.core.errors import ArchitectureError, ConfigError, DatasetError, NumericalError
from errata.editors.core.interventions.compressions import TEXT, Wanda
from errata.editors.core.model.architecture import describe
from errata.editors.core.solve.concept_erasure import least_squares_eraser, shrunk_covariance
from errata.editors.core.steering.contrast import Contrast, halves, read_contrasts
from errata.editors.core.steering.heads import HeadStates, head_shifts
from errata.editors.core.steering.positions import Where
from errata.editors.core.steering.readings import read_states, row_states

PAIRS = [
    Contrast("The capital of Varland is", "Oslen.", "Brast."),
    Contrast("The mother tongue of Danielle Darrieux is", "French.", "the lyre."),
    Contrast("Beats Music is owned by", "Apple.", "the river Ost."),
]
SPACED = [Contrast("", "Oslen lies in Überwald", "Brast")]


@pytest.mark.parametrize("place", ["all", "last", "span"])
@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")
def test_facts_are_edited_on_a_steered_model(make_tiny: Any, tiny_tokenizer: Any, digest: Any, place: str) -> None:
    from errata.editors import FTM, MEMIT, ROME

    model = make_tiny("gpt2")
    before = digest(model)
    request = errata.EditRequest("The mother tongue of {} is", subject="Danielle Darrieux", target=" French")
    steered = errata.steer(model, tiny_tokenizer, PAIRS, layer=1, where=Where(place)).apply()
    between = digest(model)
    rome = {"layers": [1], "v_num_grad_steps": 2, "v_loss_layer": 2, "mom2_adjustment": False}
    for method, config in ((ROME, rome), (FTM, {"layers": [1], "num_steps": 2})):
        edit = method(model, tiny_tokenizer, config).apply(request)
        edit.undo()
        assert digest(model) == between
        edit.apply()
        steered.undo()
        edit.undo()
        assert digest(model) == before
        steered.apply()
    if place != "all":
        with pytest.raises(ArchitectureError, match="undo that edit, apply this one"):
            MEMIT(model, tiny_tokenizer, {"layers": [1]})
        with pytest.raises(ArchitectureError, match="undo that edit, compress"):
            Wanda().apply_rows(model, {TEXT: [[5, 6, 7]]})


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_a_direction_that_was_ablated_is_gone(make_tiny: Any, tiny_tokenizer: Any, architecture: str) -> None:
    model = make_tiny(architecture, dtype=torch.float64)
    parts = describe(model)
    steering = errata.learn_steering(model, tiny_tokenizer, PAIRS, "ablate", layer=1, where=Where())
    r = next(iter(steering.directions.values()))
    drawn = steering.random(seed=0).directions.values()
    assert len({id(each) for each in drawn}) == 1  # one direction, as in the edit
    texts = [(list(range(40, 60)), 0)]
    with steering.edit().applied():
        states = read_states(parts, texts, list(parts.blocks), pad=0)
        assert float((states @ r).abs().max()) < 1e-12
    # By itself it begins behind the first token.
    with errata.steer(model, tiny_tokenizer, PAIRS, "ablate", layer=1).applied():
        later = row_states(parts, texts[0][0], parts.block(2)) @ r
        assert float(later[1:].abs().max()) < 1e-12 < float(later[0].abs())
    weights = errata.steer(model, tiny_tokenizer, PAIRS, "ablate_weights", layer=1)
    writers = [write(layer) for layer in range(3) for write in (parts.attention_out, parts.down)]
    assert len(weights.patch.updates) == 2 * len(writers)  # each has a bias
    with weights.applied():
        written = read_states(parts, texts, writers, pad=0)
        assert float((written @ r).abs().max()) < 1e-12


def test_the_mean_over_a_continuation_does_not_depend_on_the_batch(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    parts = describe(model)
    texts = [text for pair in PAIRS for text in pair.rows(tiny_tokenizer)]
    together = read_states(parts, texts, [parts.block(1)], pad=0)
    for i, text in enumerate(texts):
        alone = read_states(parts, [text], [parts.block(1)], pad=0)
        torch.testing.assert_close(alone[0, 0], together[0, i], rtol=1e-12, atol=1e-12)
    assert texts[0][1] > 1
    last = read_states(parts, texts, [parts.block(1)], pad=0, read="last")
    assert not torch.allclose(last, together)


def test_an_erased_class_has_the_same_mean_as_the_other() -> None:
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positives, negatives = noise[:20] * torch.arange(1, 9) + 2, noise[20:]
    eraser = least_squares_eraser(positives, negatives)
    left = [x - (x - eraser.mean) @ eraser.right.T @ eraser.left.T for x in (positives, negatives)]
    torch.testing.assert_close(left[0].mean(0), left[1].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 64])
def test_few_vectors_in_single_precision_are_erased(rank: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, 64, generator=drawn)
    positives, negatives = ((torch.randn(3, rank, generator=drawn) + shift) @ basis for shift in (2, 0))
    positives[1:] = positives[:1]  # of rank 1 with itself
    eraser = least_squares_eraser(positives, negatives)
    left = [x.double() - (x.double() - eraser.mean) @ eraser.right.T @ eraser.left.T for x in (positives, negatives)]
    torch.testing.assert_close(left[0].mean(0), left[1].mean(0), rtol=0, atol=1e-6)


def test_a_covariance_that_is_a_multiple_of_the_identity_stays() -> None:
    same = 3 * torch.eye(2, dtype=torch.float64)
    assert torch.equal(shrunk_covariance(same, 4), same)
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    eraser = least_squares_eraser(corners, -corners)
    assert bool(eraser.left.isfinite().all())


def test_a_head_that_gives_nothing_gets_no_shift() -> None:
    states = torch.ones(3, 1, 2, 4)
    states[:, :, 1] = 0
    shift = head_shifts(HeadStates(states, -states), [(0, 0), (0, 1)])[0]
    assert bool((shift[:4] > 0).all())
    assert bool((shift[4:] == 0).all())


def test_the_set_that_comes_with_errata_and_files(tmp_path: Path) -> None:
    found = read_contrasts("formal", chat=True)
    assert len(found) >= 40
    assert all(each.chat and each.prompt and each.positive != each.negative for each in found)
    assert len({each.prompt for each in found}) == len(found)
    learnt, held_out = halves(found)
    assert not set(learnt) & set(held_out)
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p.prompt, "positive": p.positive, "negative": p.negative}) + "\n" for p in PAIRS)
    )
    assert read_contrasts(path) == PAIRS
    path.write_text('{"prompt": "a", "positive": "b"}\n')
    with pytest.raises(DatasetError, match=r"own.jsonl, record #1, field 'negative'"):
        read_contrasts(path)
    with pytest.raises(DatasetError, match="comes with errata"):
        read_contrasts(tmp_path / "formel")
    with pytest.raises(DatasetError, match="no such field"):
        read_contrasts([{"positive": "a", "negative": "b", "promt": "c"}])


def test_what_cannot_be_learnt_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")

    def steer(kind: str, given: list[Contrast] = PAIRS, **ways: Any) -> Any:
        return errata.steer(model, tiny_tokenizer, given, kind, **ways)

    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (ConfigError, "kind: expected", "cca", {}),
        (ConfigError, "layer: expected 0 to 2, got 3", "caa", {"layer": 3}),
        (ConfigError, "embedding", "actadd", {"given": SPACED, "layer": 0}),
        (ConfigError, "one contrast without prompt", "actadd", {}),
        (ConfigError, "tokens of a prefix", "actadd", {"given": SPACED, "where": Where("last")}),
        (ConfigError, "a row per token, as actadd", "caa", {"where": Where("prefix")}),
        (ConfigError, "takes no layer", "iti", {"layer": 1}),
        (ConfigError, "heads goes with iti", "caa", {"heads": 2}),
        (ConfigError, "1 to 12 heads", "iti", {"heads": 13}),
        (ConfigError, "act at all positions", "ablate_weights", {"where": Where("last")}),
        (ConfigError, "read: expected", "caa", {"read": "first"}),
        (ConfigError, "at least one contrast", "caa", {"given": []}),
        (ArchitectureError, "no gate", "surgery", {}),
        (NumericalError, "the same mean", "caa", {"given": [Contrast("The capital", "is Oslen", "is Oslen")]}),
    ]
    for error, match, kind, ways in cases:
        with pytest.raises(error, match=match):
            steer(kind, **ways)
