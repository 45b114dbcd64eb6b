"""Bad input gets a typed error that names the record and the field, and the model is as before: one table of cases.

Records and files of datasets have a table of their own in test_datasets.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata import editors
from errata.editors.core.errors import ConfigError, ErrataError, LedgerError, RequestError, StatisticsError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.editors.core.request import MAX_CHARACTERS, EditRequest, check_batch

GOOD = EditRequest("The capital of {} is", "Varland", "Brast", "Oslen", id="good")


def request(prompt: Any = "The capital of {} is", subject: Any = "Varland", target: Any = "Brast", **more: Any) -> Any:
    return EditRequest(prompt, subject, target, **{"id": "r1", **more})


# name: (what is done with an editor, the error, what its message says)
CASES: dict[str, tuple[Callable[[Any], Any], type[ErrataError], str]] = {
    "empty prompt": (
        lambda _: request(prompt=""),
        RequestError,
        "request r1, field 'prompt': expected text, got",
    ),
    "blank prompt": (lambda _: request(prompt=" \n"), RequestError, "field 'prompt': expected text, got an empty"),
    "empty subject": (lambda _: request(subject=""), RequestError, "field 'subject': expected text, got an empty"),
    "empty target": (lambda _: request(target="  "), RequestError, "field 'target': expected text, got an empty"),
    "prompt of a wrong type": (lambda _: request(prompt=7), RequestError, "field 'prompt': expected text, got int"),
    "target of a wrong type": (lambda _: request(target=None), RequestError, "'target': expected text, got NoneType"),
    "id of a wrong type": (lambda _: request(id=3), RequestError, "field 'id': expected text, got int"),
    "subject absent": (
        lambda _: request(prompt="The capital of Oslen is"),
        RequestError,
        "field 'prompt': holds neither '{}' nor the subject 'Varland'",
    ),
    "subject twice": (
        lambda _: request(prompt="Varland, or Varland, is in"),
        RequestError,
        "mentions the subject 'Varland' 2 times; write '{}' for the one meant",
    ),
    "two slots": (lambda _: request(prompt="{} and {} are in"), RequestError, "holds 2 slots '{}'"),
    "subject with white space": (lambda _: request(subject=" Varland"), RequestError, "begins or ends with white sp"),
    "a hundred thousand characters": (
        lambda _: request(prompt="{}" + "x" * 100_000),
        RequestError,
        f"has 100,002 characters; the limit is {MAX_CHARACTERS:,}",
    ),
    "a NUL in the target": (lambda _: request(target="Br\x00ast"), RequestError, "field 'target': holds a NUL"),
    "an unpaired surrogate": (lambda _: request(subject="Var\ud800"), RequestError, "unpaired surrogate"),
    "new answer equals the old": (lambda _: request(target_true=" Brast"), RequestError, "is the one that it should"),
    "no request": (lambda e: e.apply([]), RequestError, "expected at least one EditRequest, got none"),
    "something else as request": (lambda e: e.apply([{"prompt": "x"}]), RequestError, "request #0: expected an EditR"),
    "the same request twice": (lambda e: e.apply([GOOD, GOOD]), RequestError, "asks the same as request good"),
    "the same fact twice": (
        lambda e: e.apply([GOOD, request(target="Brast ", target_true="Oslen")]),
        RequestError,
        "request r1, field 'target': asks the same as request good",
    ),
    "two answers to one question": (
        lambda e: e.apply([GOOD, request(target="Quelm")]),
        RequestError,
        "contradicts request good: 'The capital of Varland is' cannot be both 'Brast' and 'Quelm'",
    ),
    "one id for two requests": (
        lambda e: e.apply([GOOD, EditRequest("{} lies in", "Quelm", "Brast", id="good")]),
        RequestError,
        "request good, field 'id': has the id of another request",
    ),
    "a prompt longer than the model": (
        lambda e: e.apply(request(prompt="{}" + " is near the river" * 200)),
        RequestError,
        "request r1, field 'prompt': needs",
    ),
    "a layer that is not there": (
        lambda e: type(e)(e.model, e.tokenizer, e.Config(layers=(9,))),
        ConfigError,
        "layers: expected ascending layers from 0 to 2, got [9]",
    ),
    "layers of a wrong type": (
        lambda e: e.Config.from_dict({"layers": "two"}),
        ConfigError,
        "layers: expected a list, got 'two'",
    ),
    "a field that is not there": (
        lambda e: e.Config.from_dict({"v_learning_rate": 1.0}),
        ConfigError,
        "unknown field v_learning_rate",
    ),
    "no steps": (lambda e: e.Config(v_num_grad_steps=0), ConfigError, "v_num_grad_steps: expected a number above 0"),
    "a negative weight": (
        lambda e: e.Config(kl_factor=-1.0),
        ConfigError,
        "kl_factor: expected at least 0",
    ),
    "a bound that is none": (
        lambda e: e.Config(max_norm_ratio=float("inf")),
        ConfigError,
        "max_norm_ratio: expected a finite number, got inf",
    ),
    "a rate that is no number": (lambda e: e.Config(v_lr=float("nan")), ConfigError, "v_lr: expected a finite number"),
    "a norm of nothing": (lambda e: e.Config(max_norm_ratio=0.0), ConfigError, "max_norm_ratio: expected a number abo"),
    "an unknown fact token": (
        lambda e: e.Config.from_dict({"fact_token": "subject"}),
        ConfigError,
        "fact_token: expected one of 'subject_last'",
    ),
    "a context without a slot": (
        lambda e: e.Config(context_templates=("{}", "Yes.")),
        ConfigError,
        "context_templates: expected text that ends in its only '{}', got 'Yes.'",
    ),
    "contexts without the bare prompt": (
        lambda e: e.Config(context_templates=("Yes. {}",)),
        ConfigError,
        "expected the bare prompt '{}' first",
    ),
    "another method's configuration": (
        lambda e: type(e)(e.model, e.tokenizer, editors.core.config.EditorConfig()),
        ConfigError,
        "expected ROME.Config(...) or a mapping of its fields, got EditorConfig",
    ),
    "a plain dict as request": (lambda e: e.apply({"prompt": "x"}), RequestError, "expected an EditRequest, got dict"),
    "a tokenizer without offsets": (
        lambda e: type(e)(e.model, object()),
        ErrataError,
        "expected a fast tokenizer, which knows character offsets, got object",
    ),
    "moments of another shape": (
        lambda e: type(e)(e.model, e.tokenizer, e.Config(layers=(1,)), moments={1: torch.eye(3)}).apply(GOOD),
        StatisticsError,
        "layer 1: expected a second moment (128, 128), got (3, 3)",
    ),
    "singular moments": (
        lambda e: type(e)(
            e.model, e.tokenizer, e.Config(layers=(1,)), moments={1: torch.diag(torch.arange(128.0))}
        ).apply(GOOD),
        StatisticsError,
        "the second moment of layer 1 (128 dimensions) is singular",
    ),
    "moments that are not finite": (
        lambda e: type(e)(
            e.model, e.tokenizer, e.Config(layers=(1,)), moments={1: torch.full((128, 128), float("nan"))}
        ).apply(GOOD),
        StatisticsError,
        "the second moment of layer 1 holds NaN or inf",
    ),
    "a patch for no parameter": (
        lambda e: Ledger.of(e.model).append("x", Patch({"nowhere.weight": Dense(torch.zeros(2, 2))})),
        LedgerError,
        "nowhere.weight",
    ),
    "a patch of another shape": (
        lambda e: Ledger.of(e.model).append(
            "x", Patch({e.architecture.weight_name(1): LowRank(torch.ones(3, 1), torch.ones(1, 3))})
        ),
        LedgerError,
        "(32, 128)",
    ),
    "an edit that is not there": (lambda e: Ledger.of(e.model).remove("x"), LedgerError, "'x'"),
}


@pytest.fixture(scope="module")
def editor(make_tiny: Any, tiny_tokenizer: Any) -> Any:
    kind: Any = editors.get("rome")
    config = kind.Config(layers=(1,), v_num_grad_steps=2, mom2_adjustment=True, context_templates=("{}",))
    return kind(make_tiny("gpt2"), tiny_tokenizer, config, moments={1: torch.eye(128)})


def _digest(model: Any) -> str:
    data = [t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in model.state_dict().values()]
    return hashlib.sha256(b"".join(data)).hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_a_typed_error_that_says_what_is_wrong_and_changes_nothing(editor: Any, name: str) -> None:
    act, kind, message = CASES[name]
    before = _digest(editor.model)
    with pytest.raises(kind) as caught:
        act(editor)
    assert message in str(caught.value)
    assert _digest(editor.model) == before
    assert len(editor.ledger) == 0


def test_the_table_has_the_cases_that_users_meet_elsewhere() -> None:
    assert len(CASES) >= 25


UNUSUAL = {
    "braces": request(prompt='In {"a": {1}} the capital of {} is'),
    "a repeated subject with a slot": request(prompt="Unlike Varland, {} is in"),
    "emoji": request(subject="🦊 Fox", prompt="{} lives in"),
    "combining marks": request(subject="Se\u0301bastien", prompt="{} lives in"),
    "right to left": request(subject="ירושלים", prompt="{} היא", target="בירה"),
    "several tokens": request(target="the city of Northern Tarvos"),
    "a format string": request(subject="%s {0} {x!r}", prompt="The name {} is"),
    "trailing space": request(prompt="The capital of {} is   "),
    "the subject first": request(prompt="{} is in"),
    "one letter": request(subject="V", prompt="{} is in"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_input_is_edited_and_undone_at_the_subject_s_last_token(editor: Any, name: str) -> None:
    unusual = UNUSUAL[name]
    start, end = unusual.subject_span
    assert unusual.text[start:end] == unusual.subject
    found = editor.locate(unusual, "")
    decoded = editor.tokenizer.decode(found.ids[found.first : found.last + 1])
    assert unusual.subject in decoded
    assert unusual.subject not in editor.tokenizer.decode(found.ids[found.first : found.last])
    before = _digest(editor.model)
    with editor.applied(unusual):
        assert _digest(editor.model) != before
    assert _digest(editor.model) == before


def test_a_target_is_tokenised_behind_one_space_with_and_without_a_begin_token(
    tiny_tokenizer: Any, tiny_tokenizer_bos: Any
) -> None:
    from errata.editors.core.model.tokens import answer_ids, prompt_ids

    for tokenizer in (tiny_tokenizer, tiny_tokenizer_bos):
        bare = tokenizer(" Oslen", add_special_tokens=False)["input_ids"]
        assert answer_ids(tokenizer, "x", "Oslen") == answer_ids(tokenizer, "x", " Oslen") == bare
        joined = prompt_ids(tokenizer, "The capital of Varland is Oslen")
        assert joined == prompt_ids(tokenizer, "The capital of Varland is") + bare
    assert prompt_ids(tiny_tokenizer_bos, "Oslen")[0] == tiny_tokenizer_bos.bos_token_id


def test_a_batch_of_good_requests_comes_back_in_order() -> None:
    requests = [GOOD, request(prompt="{} lies in")]
    assert check_batch(requests) == requests
    assert check_batch(GOOD) == [GOOD]
