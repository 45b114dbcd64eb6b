"""Facts of one batch with the same key: the methods that write batches say which, and count them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from quick_editors import build

from errata import EditRequest
from errata.editors.core import SharedKeyWarning

FIRST = [
    EditRequest("{} was born in", "Ada Orlik", "Brast", id="born"),
    EditRequest("{} works for", "Ada Orlik", "Varl", id="works"),
    EditRequest("{} was born in", "Otto Brand", "Brast", id="other"),
]
BEHIND = [
    EditRequest("The birthplace of {} is", "Ada Orlik", "Brast", id="born"),
    EditRequest("The employer of {} is", "Ada Orlik", "Varl", id="works"),
]


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_facts_with_one_key_in_a_batch_are_named_and_counted(make_tiny: Any, tiny_tokenizer: Any, method: str) -> None:
    editor = build(method, make_tiny("gpt2"), tiny_tokenizer)
    with pytest.warns(SharedKeyWarning) as heard:
        edit = editor.apply(FIRST)
    said = [warning for warning in heard if warning.category is SharedKeyWarning]
    assert [str(warning.message).split(" of this batch")[0] for warning in said] == [
        "request born ('Ada Orlik was born in') has the same key as request works",
        "request works ('Ada Orlik works for') has the same key as request born",
    ]
    assert "words before the subject" in str(said[0].message)
    assert [report.get("shared_key") for report in edit.diagnostics] == [2, 2, None]


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_facts_with_different_keys_or_solved_alone_are_not_named(
    make_tiny: Any, tiny_tokenizer: Any, method: str
) -> None:
    editor = build(method, make_tiny("gpt2"), tiny_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedKeyWarning)
        edits = [*editor.compute(FIRST), editor.apply(BEHIND)]
    assert not any("shared_key" in report for edit in edits for report in edit.diagnostics)
