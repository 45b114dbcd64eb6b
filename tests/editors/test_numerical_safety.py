"""Where numbers go wrong an edit is finite, or is refused with the reason: every method, on inputs made to break it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from everyday import triples
from quick_editors import METHODS, REQUESTS, build
from torch import Tensor

from errata import EditRequest, editors
from errata.editors import anyedit
from errata.editors.core.errors import ConfigError, ErrataError, NumericalError
from errata.editors.core.families import mass_editing
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.families.mass_editing import MassEditor
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.tokens import prompt_ids
from errata.testing.laws import digest

Make = Callable[..., Any]


@dataclass(frozen=True)
class Ended:
    """How an edit ended: the reason of its refusal, or None."""

    refusal: str | None


def tried(editor: Any, requests: Any) -> Ended:
    """Apply; what is applied must be finite, in the weights and in what the model says, and go without a trace."""
    before = digest(editor.model)
    try:
        edit = editor.apply(requests)
    except ErrataError as error:
        assert digest(editor.model) == before
        assert len(editor.ledger) == 0
        assert str(error)
        return Ended(str(error))
    first = requests[0] if isinstance(requests, list | tuple) else requests
    ids = torch.tensor([prompt_ids(editor.tokenizer, first.text)])
    assert bool(torch.isfinite(editor.model(ids).logits).all())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in editor.model.parameters())
    assert all(bool(torch.isfinite(t).all()) for _, t in edit.patch.tensors)
    edit.undo()
    assert digest(editor.model) == before
    return Ended(None)


# --- second moments -----------------------------------------------------------------------------------------------


def spectrum(width: int, values: Tensor) -> Tensor:
    """A moment with these eigenvalues in random directions."""
    turned, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())
    return ((turned * values) @ turned.T).float()


MOMENTS: dict[str, Callable[[int], Tensor]] = {
    "zero": lambda d: torch.zeros(d, d),
    "of rank one": lambda d: spectrum(d, torch.eye(d, dtype=torch.float64)[0]),
    "of half the rank": lambda d: spectrum(d, (torch.arange(d) < d // 2).double()),
    "of condition 1e14": lambda d: spectrum(d, torch.logspace(0, -14, d, dtype=torch.float64)),
    "negative": lambda d: -torch.eye(d),
    "not finite": lambda d: torch.full((d, d), float("nan")),
    "of 1e-30": lambda d: 1e-30 * torch.eye(d),
    "of 1e30": lambda d: 1e30 * torch.eye(d),
}
# What cannot be edited with them. EMMET and ROME's family need the inverse; MEMIT and PMET add the keys of the batch,
# which does not help a moment that sees few directions; AlphaEdit and AnyEdit take what a moment does not see for their
# null space.
REFUSED = {
    "zero": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "coachhook"},
    "of rank one": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "coachhook"},
    "of half the rank": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "coachhook"},
    "of condition 1e14": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "coachhook"},
    "negative": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "alphaedit", "anyedit", "coachhook"},
    "not finite": {"rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "alphaedit", "anyedit", "coachhook"},
}
WITH_MOMENTS = [name for name in METHODS if issubclass(editors.get(name), LocateThenEdit)]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", WITH_MOMENTS)
def test_second_moments_that_cannot_be_inverted_are_refused_and_others_give_finite_edits(
    make_tiny: Make, tiny_tokenizer: Any, method: str, moment: str
) -> None:
    editor: Any = build(method, make_tiny("gpt2"), tiny_tokenizer, mom2_adjustment=True)
    width = describe(editor.model).d_mlp
    given = dict.fromkeys(editor.config.layers, MOMENTS[moment](width))
    try:
        editor = type(editor)(editor.model, tiny_tokenizer, editor.config, moments=given)
    except ErrataError as error:
        ended = Ended(str(error))
    else:
        ended = tried(editor, REQUESTS)
    assert (ended.refusal is not None) == (method in REFUSED.get(moment, ())), ended


def test_a_value_of_zero_is_refused_with_the_advice_to_edit_another_layer(make_tiny: Make, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    editor: Any = build("rome", model, tiny_tokenizer, mom2_adjustment=False)
    with torch.no_grad():
        for parameter in describe(model).down(editor.config.layers[0]).parameters():
            parameter.zero_()
    with pytest.raises(NumericalError, match="the value that it starts from is zero, so edit another layer"):
        editor.apply(REQUESTS[0])


def test_no_method_is_advised_to_do_what_it_refuses(make_tiny: Make, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    for method in WITH_MOMENTS:
        kind: Any = editors.get(method)
        advice = kind.text_advice + kind.singular_advice
        try:
            editor: Any = build(method, model, tiny_tokenizer, mom2_adjustment=False)
        except ConfigError as error:
            assert "mom2_adjustment" in str(error)
            assert "mom2_adjustment" not in advice, method
        else:
            assert editor.factor(1) is None, method
            assert advice.count("mom2_adjustment=false") == 2, method


# --- requests -----------------------------------------------------------------------------------------------------


def likeliest(editor: Any, text: str) -> str:
    """What the model answers anyway."""
    ids = torch.tensor([prompt_ids(editor.tokenizer, text)])
    best = editor.model(ids).logits[0, -1].argsort(descending=True).tolist()
    return next(said for token in best if (said := editor.tokenizer.decode([token]).strip()).isalnum())


ASKED: dict[str, Callable[[Any], Any]] = {
    "the subject is the first token": lambda _: EditRequest("{} is the capital of", "V", "Brast"),
    "the prompt is the subject": lambda _: EditRequest("{}", "Varland", "Brast"),
    "the model answers so already": lambda e: EditRequest(
        "The capital of {} is", "Varland", likeliest(e, "The capital of Varland is")
    ),
    "five hundred tokens": lambda _: EditRequest(f"{'We read of it. ' * 50}The capital of {{}} is", "Varland", "Brast"),
    "an answer of forty tokens": lambda _: EditRequest("The capital of {} is", "Varland", "x, " * 20),
    "two subjects that share all but the end": lambda _: [
        EditRequest("The capital of {} is", "Varland", "Brast"),
        EditRequest("The capital of {} was", "Varland", "Oslen"),
    ],
}


@pytest.mark.parametrize(("method", "asked", "dtype"), triples(METHODS, tuple(ASKED), (torch.float32, torch.bfloat16)))
def test_requests_at_the_edge_give_finite_edits(
    make_tiny: Make, tiny_tokenizer: Any, method: str, asked: str, dtype: torch.dtype
) -> None:
    model = make_tiny("llama", dtype=dtype)
    model.config.max_position_embeddings = 2048  # positions are angles: every number of them exists
    editor = build(method, model, tiny_tokenizer)
    request = ASKED[asked](editor)
    if asked == "five hundred tokens":
        assert len(prompt_ids(tiny_tokenizer, request.text)) >= 500
    ended = tried(editor, request)
    assert ended.refusal is None, ended


# --- models -------------------------------------------------------------------------------------------------------


def mute(model: Any) -> None:
    """Every key is zero: the edited layers read nothing."""
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data.zero_()
        block.mlp.c_fc.bias.data.zero_()


def broken(model: Any) -> None:
    model.transformer.h[2].mlp.c_proj.weight.data[0, 0] = float("nan")


def huge(model: Any) -> None:
    model.transformer.h[1].mlp.c_proj.weight.data.mul_(1e20)


def silent(model: Any) -> None:
    """The edited weights are zero, so that no update is small beside them."""
    for block in model.transformer.h:
        block.mlp.c_proj.weight.data.zero_()


MODELS = {"every key is zero": mute, "a weight is not finite": broken, "weights of 1e20": huge, "weights of 0": silent}


# A value of zero has no length that a search could be measured by, a key of zero nothing that could be sent anywhere.
REFUSED_ON: dict[str, set[str]] = {
    "every key is zero": {"rome", "r_rome", "c_rome", "pmet", "emmet"},
    "a weight is not finite": set(METHODS),
    "weights of 1e20": set(METHODS),
    "weights of 0": {"rome", "r_rome", "c_rome", "pmet"},
}


@pytest.mark.parametrize("state", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_models_that_are_broken_already_are_left_as_they_are(
    make_tiny: Make, tiny_tokenizer: Any, method: str, state: str
) -> None:
    model = make_tiny("gpt2")
    with torch.no_grad():
        MODELS[state](model)
    ended = tried(build(method, model, tiny_tokenizer), REQUESTS[0])
    assert (ended.refusal is not None) == (method in REFUSED_ON[state]), ended


RATES = [
    (method, field)
    for method in METHODS
    for field in ("v_lr", "lr", "edit_lr")
    if field in editors.get(method).Config().to_dict()
]


@pytest.mark.parametrize(("method", "field"), RATES)
def test_a_step_far_too_large_ends_in_a_refusal_or_in_a_finite_edit(
    make_tiny: Make, tiny_tokenizer: Any, method: str, field: str
) -> None:
    without = {"ice", "ike", "scr", "coar", "mint"}  # the first three compute nothing; none has a rate
    assert {method for method, _ in RATES} == set(METHODS) - without
    tried(build(method, make_tiny("gpt2"), tiny_tokenizer, **{field: 1e30}), REQUESTS[0])


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_elsewhere_are_refused_by_name(make_tiny: Make, tiny_tokenizer: Any, method: str) -> None:
    """As accelerate leaves them when it keeps them on the disk or moves them in for each pass."""
    accelerate = pytest.importorskip("accelerate")
    model = make_tiny("gpt2")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer.h[1].mlp.c_proj.weight.device.type == "meta"
    with pytest.raises(ErrataError, match="meta device"):
        build(method, model, tiny_tokenizer).apply(REQUESTS[0])


@pytest.mark.parametrize("bad", [0.0, math.nan], ids=["zero", "not finite"])
@pytest.mark.parametrize("method", WITH_MOMENTS)
def test_the_request_whose_key_is_none_is_named(
    make_tiny: Make, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, method: str, bad: float
) -> None:
    editor: Any = build(method, make_tiny("gpt2"), tiny_tokenizer)
    requests = [EditRequest("The capital of {} is", name, "Brast", id=name) for name in ("Varland", "Quelm", "Oslen")]
    spoilt = torch.tensor([1.0, bad, 1.0])
    keys, mean = editor.keys, mass_editing.grouped_mean
    monkeypatch.setattr(editor, "keys", lambda *of: {at: K * spoilt[:, None, None] for at, K in keys(*of).items()})
    monkeypatch.setattr(mass_editing, "grouped_mean", lambda found: mean(found) * spoilt[:, None])
    split = anyedit._split  # reads AnyEdit's keys, one for each of these answers
    monkeypatch.setattr(anyedit, "_split", lambda *of: ((found := split(*of))[0] * spoilt, *found[1:]))
    solve = editor.solve_batch if isinstance(editor, MassEditor) else editor.solve
    if bad == 0 and isinstance(editor, MassEditor):
        solve(requests)  # their ridge takes a key of zero
        return
    with pytest.raises(NumericalError, match="request Quelm: the key is zero or not finite"):
        solve(requests)
