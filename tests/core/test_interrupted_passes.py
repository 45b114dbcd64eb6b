"""Ctrl-C is heard while text is read or written for minutes, and prompts that do not fit are refused before that."""

from __future__ import annotations

import copy
import json
import signal
from typing import Any

import pytest

from errata import editors
from errata.editors.core.errors import RequestError
from errata.editors.core.families import context_templates
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.families.mass_editing import MassEditor
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.moments import collect
from errata.editors.core.request import EditRequest

REQUEST = EditRequest("The capital of {} is", "Varland", "Brast")
TEXTS = [f"Varland {i} lies near Brast, and nobody doubts {i * i} of it." for i in range(200)]


def _raise_once_called(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Send SIGINT at the first call of a function and count its calls."""
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_ctrl_c_ends_the_collection_of_moments_within_a_batch(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    config = editors.ROME.Config(layers=(1,), context_templates=("{}",))
    editor = editors.ROME(make_tiny("gpt2"), tiny_tokenizer, config, text=TEXTS * 20)
    calls = _raise_once_called(monkeypatch, collect, "run_until_captured")
    with pytest.raises(KeyboardInterrupt):
        editor.compute(REQUEST)
    assert len(calls) == 1


def test_ctrl_c_ends_the_writing_of_contexts_within_a_token(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editors.ROME(make_tiny("gpt2"), tiny_tokenizer, editors.ROME.Config(layers=(1,), mom2_adjustment=False))
    calls = _raise_once_called(monkeypatch, Architecture, "logits")
    with pytest.raises(KeyboardInterrupt):
        editor.compute(REQUEST)
    assert len(calls) == 1


def test_ctrl_c_loses_no_batch_of_a_collection_however_long_ago_the_last_save_was(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    config = editors.ROME.Config(layers=(1,), context_templates=("{}",))
    editor = editors.ROME(make_tiny("gpt2"), tiny_tokenizer, config, text=TEXTS * 20)
    _raise_once_called(monkeypatch, collect, "run_until_captured")
    with pytest.raises(KeyboardInterrupt):
        editor.compute(REQUEST)
    (manifest,) = tmp_path.glob("partial-*.json")
    assert json.loads(manifest.read_text())["meta"]["position"] == 1


WITHOUT_CONTEXTS = {"anyedit"}  # its values are found behind the bare question
WITH_CONTEXTS = [
    name for name in editors.METHODS if issubclass(editors.get(name), LocateThenEdit) and name not in WITHOUT_CONTEXTS
]


@pytest.mark.parametrize("method", WITH_CONTEXTS)
def test_a_prompt_that_only_fits_without_its_contexts_is_refused_by_every_method_that_has_contexts(
    make_tiny: Any, tiny_tokenizer: Any, method: str
) -> None:
    kind: Any = editors.get(method)
    long = EditRequest("{}" + " is near the river" * 15, "Varland", "Brast", id="long")
    templates = ("{}", "word " * 200 + "{}")
    fields = {} if issubclass(editors.get(method), MassEditor) else {"mom2_adjustment": False}
    editor = kind(make_tiny("gpt2"), tiny_tokenizer, kind.Config(layers=(1,), context_templates=templates, **fields))
    with pytest.raises(RequestError, match=r"request long, field 'prompt': needs \d+ tokens with its contexts"):
        editor.compute(long)


def test_written_contexts_begin_as_texts_do(tiny_tokenizer: Any, tiny_tokenizer_bos: Any) -> None:
    """Words behind the tokenizer's begin-of-text token where it has one, and whole."""
    for tokenizer in (tiny_tokenizer, tiny_tokenizer_bos):
        assert context_templates._starts(tokenizer, ("Therefore",)) == [tokenizer("Therefore")["input_ids"]]
    assert context_templates._starts(tiny_tokenizer_bos, ()) == [[tiny_tokenizer_bos.bos_token_id]]
    assert context_templates._starts(tiny_tokenizer, ()) == [[tiny_tokenizer.eos_token_id]]  # it is bos as well


def test_contexts_never_begin_with_a_token_that_the_tokenizer_does_not_put_there(tiny_tokenizer: Any) -> None:
    """SmolLM2's bos is `<|im_start|>`, behind which a role stands, and no text begins with it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<s>"
    found = context_templates._starts(tokenizer, ())
    assert [tokenizer.decode(ids) for ids in found] == [f"\n\n{word}" for word in context_templates.WORDS]
    assert context_templates._starts(tokenizer, ("Therefore",)) == [tokenizer("\n\nTherefore")["input_ids"]]
