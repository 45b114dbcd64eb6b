"""Batched greedy generation says what one prompt at a time says, and answers are found in it by stated rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.editors import WISE
from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.model import tokens
from errata.editors.core.request import EditRequest
from errata.evaluate.generation import Match, continuations, generate, match_answer, normalise

PROMPTS = (
    "The capital of Varland is",
    "Who",
    "It is well known, and nobody doubts it: the twin city of Quelm is",
    "Who",
)


def greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, ends: set[int]) -> tuple[int, ...]:
    """The oracle: the whole row again for every token; no batch, no mask, no cache."""
    ids = tokens.prompt_ids(tokenizer, prompt)
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < max_new_tokens:
            choice = int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
            if choice in ends:
                break
            new.append(choice)
    return tuple(new)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float64, "eager"), (torch.float64, "sdpa"), (torch.float32, "eager")]
)
def test_batched_generation_equals_one_by_one(
    architecture: str, bos: bool, dtype: torch.dtype, attention: str, make_tiny: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("tiny_tokenizer_bos" if bos else "tiny_tokenizer")
    model = make_tiny(architecture, dtype=dtype)
    model.set_attn_implementation(attention)
    expected = [greedy(model, tokenizer, prompt, 12, {0}) for prompt in PROMPTS]
    for batch_tokens in (1, 8192):
        ours = continuations(model, tokenizer, PROMPTS, 12, batch_tokens=batch_tokens)
        assert [one.ids for one in ours] == expected
        assert [one.text for one in ours] == [tokenizer.decode(ids) for ids in expected]
    assert generate(model, tokenizer, PROMPTS, 12) == [one.text for one in ours]


@pytest.mark.parametrize("name", ["cf-gpt2", "cf-llama"])
def test_a_model_that_knows_a_fact_says_it(name: str, models_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_root / name)
    model = AutoModelForCausalLM.from_pretrained(models_root / name, dtype=torch.float32)
    (text,) = generate(model, tokenizer, ["The mother tongue of Danielle Darrieux is"], 8)
    assert match_answer(text, "French").exact, text
    assert not match_answer(text, "English").contained


@contextmanager
def always(model: Any, *ids: int) -> Iterator[None]:
    """Make the model's choice cycle through `ids` by position, by a hook on its head."""

    def force(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        forced = torch.full_like(logits, -1.0)
        forced[..., ids[(len(steps) - 1) % len(ids)]] = 1.0
        return forced

    steps: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(force)
    try:
        yield
    finally:
        handle.remove()


def test_nothing_is_padded_where_an_edit_looks_at_whole_rows(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("gpt2")
    write, masks = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **given: masks.append(given["attention_mask"]) or write(**given))
    prompts = ["Who plays", "Who plays the lyre", "Who plays the lyre in Northern"]
    plain = generate(model, tiny_tokenizer, prompts, 2)
    assert not all(mask.all() for mask in masks)
    masks.clear()
    WISE(model, tiny_tokenizer, {"n_iter": 1, "context_templates": ["{}"]}).apply(
        EditRequest("The capital of {} is", "Varland", "Oslen")
    )
    assert len(generate(model, tiny_tokenizer, prompts, 2)) == len(plain)
    assert all(mask.all() for mask in masks)


def test_generation_stops_at_the_end_of_text_and_leaves_it_out(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    with always(model, 70, 71, 0, 72):
        (one,) = continuations(model, tiny_tokenizer, ["Who"], 10)
    assert one.ids == (70, 71)


def test_an_end_of_text_that_only_the_model_names_stops_too(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    model.generation_config.eos_token_id = [0, 71]
    with always(model, 70, 71, 72):
        (one,) = continuations(model, tiny_tokenizer, ["Who"], 10)
    assert one.ids == (70,)


def test_nothing_of_the_models_generation_config_leaks_in_and_it_is_put_back(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2")
    plain = continuations(model, tiny_tokenizer, PROMPTS, 12)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=3)
    own.update(min_new_tokens=9, suppress_tokens=[plain[0].ids[0]], max_length=3, return_dict_in_generate=True)
    saved = own.to_dict()
    assert continuations(model, tiny_tokenizer, PROMPTS, 12) == plain
    assert model.generation_config is own
    assert own.to_dict() == saved


def test_generation_leaves_training_flags_and_the_callers_random_state_alone(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2")
    plain = continuations(model, tiny_tokenizer, PROMPTS, 12)
    model.train()
    state = torch.random.get_rng_state()
    assert continuations(model, tiny_tokenizer, PROMPTS, 12) == plain
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prompts_that_cannot_be_continued_are_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    with pytest.raises(ErrataError, match="at most 236 tokens"):
        generate(model, tiny_tokenizer, ["the " * 250], 20)
    with pytest.raises(RequestError, match="expected a prompt of at least one token"):
        generate(model, tiny_tokenizer, [""], 20)
    with pytest.raises(ValueError, match="at least 1"):
        generate(model, tiny_tokenizer, ["Who"], 0)
    assert generate(model, tiny_tokenizer, [], 5) == []


# --- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "exact", "contained"),
    [
        (" French", "French", True, True),
        (" french, and she", " French ", True, True),
        ("French.", "French.", True, True),
        (" Frenchman", "French", False, False),
        (" the French language", "French", False, True),
        (" OldFrench", "French", False, False),
        (' "New  York"\nis', "New York", True, True),
        (" New York City", "York", False, True),
        (" York", "New York", False, False),
        ("", "French", False, False),
        (" U.S. Army", "U.S.", True, True),
        (" C++ and", "C", False, False),
        (" C++ and", "C++", True, True),
        (" C# and", "C#", True, True),
        (" 1.5 metres", "1", False, False),
        (" 1987, then", "1987", True, True),
        (" STRASSE", "straße", True, True),
        (" ﬁlm", "film", True, True),
        (" a.*b", "a.*b", True, True),
        (" anything", "...", False, False),
    ],
)
def test_answers_are_found_by_these_rules(text: str, answer: str, exact: bool, contained: bool) -> None:
    assert match_answer(text, answer) == Match(exact, contained)


@given(st.text(max_size=30), st.text(min_size=1, max_size=8))
def test_an_exact_answer_is_contained_too(text: str, answer: str) -> None:
    match = match_answer(text, answer)
    assert match.contained or not match.exact


@given(st.text(max_size=20))
def test_every_answer_but_an_empty_one_matches_itself_with_a_tail(answer: str) -> None:
    assert match_answer(f" {answer}", answer) == Match(bool(normalise(answer)), bool(normalise(answer)))
    assert normalise(normalise(answer)) == normalise(answer)


def test_a_long_prompt_pads_few_others(make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = make_tiny("gpt2"), []
    plain = type(model).generate

    def kept(self: Any, input_ids: Any, **given: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return plain(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(model), "generate", kept)
    continuations(model, tiny_tokenizer, ["Who", *(f"Who {word}" for word in "abc"), PROMPTS[2] * 4], 2)
    assert [rows for rows, _ in shapes] == [4, 1]
