"""Laws of causal tracing, on tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_architectures
import torch

from errata.editors.core.errors import ArchitectureError, ConfigError, RequestError
from errata.editors.core.locating import patched_cells, tracing
from errata.editors.core.locating.corruption import Noise, Swap
from errata.editors.core.locating.grids import Grid, grids_of
from errata.editors.core.locating.tracing import FactTrace, trace
from errata.editors.core.model.architecture import describe

PROMPT, SUBJECT, OTHER = "The capital of {} is", "Varland", "Oslen"
ALL = (*grids_of(["state", "mlp", "attention", "severed_mlp", "severed_both"]), Grid("mlp", 3))


@pytest.fixture(scope="module")
def model(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def other(tiny_tokenizer: Any) -> str:
    """A subject with as many tokens as SUBJECT."""
    count = len(tiny_tokenizer(f" {SUBJECT}")["input_ids"])
    words = ("Northern", "Seattle", "Tarvos", "Brast", "Quelm", "Music", "Apple", "French", "Danielle", "Beats")
    return next(word for word in words if len(tiny_tokenizer(f" {word}")["input_ids"]) == count)


def whole(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> FactTrace:
    """A trace that runs each cell as whole rows, which is the plain way."""
    with monkeypatch.context() as patched:
        patched.setattr(tracing, "runs_ends", lambda _: False)
        return trace(*arguments, **options)


def worst(one: FactTrace, another: FactTrace) -> float:
    """The largest difference of any score of any cell."""
    return max(
        float((cells - another.grids[grid][score]).abs().max())
        for grid, scores in one.grids.items()
        for score, cells in scores.items()
    )


@pytest.mark.parametrize(
    ("kind", "direction"),
    [
        ("gpt2", "denoising"),
        ("llama", "noising"),
        ("opt", "denoising"),
        ("falcon", "noising"),
        ("gemma2", "denoising"),
        ("bloom", "noising"),
        ("mamba", "denoising"),
    ],
)
def test_ends_of_rows_give_what_whole_rows_give(
    kind: str, direction: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_architectures.tiny_model(kind, len(tiny_tokenizer)).eval().double()
    grids = ALL if kind != "mamba" else (Grid(),)
    noise = Noise("0.3", samples=2, draws="two")
    options: Any = {"grids": grids, "direction": direction, "batch_tokens": 64}
    ours = trace(model, tiny_tokenizer, PROMPT, SUBJECT, noise, **options)
    theirs = whole(monkeypatch, model, tiny_tokenizer, PROMPT, SUBJECT, noise, **options)
    assert worst(ours, theirs) < 1e-6
    assert all(cells["probability"].std() > 0 for cells in ours.grids.values())


def test_states_that_are_all_there_is_restore_everything(model: Any, tiny_tokenizer: Any, other: str) -> None:
    found = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other))
    first = found.subject_range[0]
    for grid in found.grids:
        shares = found.effects(grid, "logit_difference", normalised=True)
        assert shares[:first].abs().max() == 0  # nothing differs before the subject
    states = found.effects("state", "logit_difference", normalised=True)
    assert float(states[-1, -1]) == pytest.approx(1)  # the last state is what the prediction is made of
    assert states[:-1, -1].abs().max() == 0
    assert float(found.effects("state", "kl", normalised=True)[-1, -1]) == pytest.approx(1)
    assert found.clean["kl"] == pytest.approx(0, abs=1e-12)


def test_noise_of_nothing_changes_nothing(model: Any, tiny_tokenizer: Any) -> None:
    found = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Noise("0", samples=2))
    assert all(
        cells["probability"].numpy() == pytest.approx(found.clean["probability"]) for cells in found.grids.values()
    )


def test_both_directions_share_their_ends(model: Any, tiny_tokenizer: Any, other: str) -> None:
    there = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other), direction="denoising")
    back = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other), direction="noising")
    assert (there.clean, there.corrupted) == (back.clean, back.corrupted)
    # With one token's last state replaced, the prediction is that of the other run.
    assert float(back.effects("state", "logit_difference", normalised=True)[-1, -1]) == pytest.approx(1)


def test_the_last_subject_token_is_the_row_of_that_token(model: Any, tiny_tokenizer: Any, other: str) -> None:
    every = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other))
    one = trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other), tokens="subject_last")
    (row,) = one.rows
    assert row == one.subject_range[1] - 1
    torch.testing.assert_close(one.grids["mlp"]["kl"][0], every.grids["mlp"]["kl"][row], rtol=0, atol=1e-12)


def test_cells_that_agree_run_as_one_row(
    model: Any, tiny_tokenizer: Any, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets: list[int] = []
    through = patched_cells._EndRuns._through_block

    def counting(self: Any, layer: int, ends: Any) -> Any:
        sets.append(len(ends.sets))
        return through(self, layer, ends)

    monkeypatch.setattr(patched_cells._EndRuns, "_through_block", counting)
    trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other), grids=(Grid(),), tokens="subject_last")
    assert sets == [1, 2]  # three layers: the state of layer 0 in block 1, and also that of layer 1 in block 2
    sets.clear()
    trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(other), grids=(Grid("mlp", 9),), tokens="subject_last")
    assert sets == [1, 1, 1]  # every window holds all layers


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_the_last_block_runs_for_the_last_token_alone(
    make_tiny: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, asked = make_tiny(kind, dtype=torch.float64), (tiny_tokenizer, PROMPT, SUBJECT, Noise("0.3", samples=2))
    architecture, widths = describe(model), []
    narrow = trace(model, *asked)
    modules = (architecture.attention_out(architecture.n_layers - 1), architecture.down(architecture.n_layers - 1))
    for module in modules:
        module.register_forward_hook(lambda _module, _args, output: widths.append(output.shape[1]))
    again = trace(model, *asked)
    assert worst(narrow, again) == 0
    assert sum(width > 1 for width in widths) == 4, "two modules, in the clean and the corrupted run"
    monkeypatch.setattr(patched_cells, "last_tokens_agree", lambda _: False)
    assert worst(narrow, trace(model, *asked)) < 1e-10


def test_a_block_without_an_mlp_is_named_and_its_states_can_be_traced(tiny_tokenizer: Any) -> None:
    experts = tiny_architectures.tiny_model("mixtral", len(tiny_tokenizer))
    with pytest.raises(ArchitectureError, match="grids=state"):
        trace(experts, tiny_tokenizer, PROMPT, SUBJECT, Noise("0.3", samples=2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in experts.modules())
    found = trace(experts, tiny_tokenizer, PROMPT, SUBJECT, Noise("0.3", samples=2), grids=(Grid(),))
    assert float(found.effects("state", "kl", normalised=True)[-1, -1]) == pytest.approx(1, abs=1e-5)


def test_mistakes_are_told(model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="neither"):
        trace(model, tiny_tokenizer, "The capital of France is", SUBJECT, Noise())
    with pytest.raises(RequestError, match="must differ in the subject's tokens alone"):
        trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap("a very long name of a country"))
    with pytest.raises(RequestError, match="the same as"):
        trace(model, tiny_tokenizer, PROMPT, SUBJECT, Swap(SUBJECT))
    with pytest.raises(ConfigError, match="rule of noise 'x3'"):
        Noise("x3")
    with pytest.raises(ConfigError, match=r"'u5%' is a percentage: write u0\.05"):
        Noise("u5%")
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        grids_of(["atention"])
    with pytest.raises(ConfigError, match="did you mean 'noising'"):
        trace(model, tiny_tokenizer, PROMPT, SUBJECT, Noise(), direction="noisng")  # type: ignore[arg-type]
