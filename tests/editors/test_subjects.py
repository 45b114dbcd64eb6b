"""Requests without a subject: refused by the methods that edit at it, carried out by all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import errata
from errata import editors
from errata.benchmarks.bench import case_selection
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.editors import get
from errata.editors.core.errors import RequestError
from errata.editors.core.request import EditRequest

AT_THE_SUBJECT = ("rome", "r_rome", "c_rome", "memit", "pmet", "emmet", "alphaedit", "coachhook")


def test_the_methods_that_locate_a_subject_are_those_that_need_one() -> None:
    assert {name for name in editors.METHODS if get(name).needs_subject} == set(AT_THE_SUBJECT)


def test_a_request_has_no_span_without_a_subject_and_keeps_its_prompt() -> None:
    request = EditRequest("Two and two is", None, "five")
    assert (request.text, request.template, request.as_dict()["subject"]) == (
        "Two and two is",
        ("Two and two is", ""),
        None,
    )
    with pytest.raises(RequestError, match="subject"):
        _ = request.subject_span
    with pytest.raises(RequestError, match=r"is missing, and '\{\}' stands for it"):
        EditRequest("The capital of {} is", None, "five")


def test_a_request_without_a_subject_is_refused_by_name_or_edited() -> None:
    model, tokenizer = errata.load("world", device="cpu")
    request = EditRequest("The neighbours know it as a", None, "baker", id="trade")
    with pytest.raises(RequestError, match=r"trade.*a method that edits at the subject needs to know it"):
        get("rome")(model, tokenizer, {"mom2_adjustment": False}).compute(request)
    with get("ft_m")(model, tokenizer).applied(request) as edit:
        assert edit.is_applied
    with get("grace")(model, tokenizer).applied(request) as edit:
        assert edit.requests == (request,)


def test_a_bench_keeps_records_without_a_subject_for_the_methods_that_never_look_at_it(tmp_path: Path) -> None:
    record = {"prompt": "Two and two is", "target_new": "five", "rephrase_prompt": "2 + 2 is"}
    named = {**record, "prompt": "Varland lies in", "subject": "Varland"}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([record, named]))
    given = ["dataset=easyedit", f"dataset.path={path}"]
    kept = {}
    for method in ("grace", "rome"):
        config = BenchConfig.of(compose("bench", [f"editor={method}", *given]))
        kept[method] = case_selection.candidates(config)
    assert [case.request.subject for case in kept["grace"].cases] == [None, "Varland"]
    assert [case.request.subject for case in kept["rome"].cases] == ["Varland"]
    assert [(entry.record, entry.field) for entry in kept["rome"].dropped] == [("#0", "subject")]
