"""Records and files that are not what their format says: each is dropped by name, or an error that says why."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dataset_records import COUNTERFACT, EASYEDIT, ZSRE, changed, written
from hypothesis import given
from hypothesis import strategies as st

from errata.benchmarks.datasets import counterfact, easyedit, zsre
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Dropped, Loaded, convert
from errata.editors.core.errors import DatasetError
from errata.evaluate.probes import Probe

# --- bad records ----------------------------------------------------------------------------------------------------

BAD_COUNTERFACT = [
    ("requested_rewrite", ..., "requested_rewrite.prompt", "got nothing"),
    ("requested_rewrite", "text", "requested_rewrite", "expected an object, got a text"),
    ("requested_rewrite.prompt", 3, "requested_rewrite.prompt", "got a number"),
    ("requested_rewrite.prompt", "The capital is", "prompt", "holds neither"),
    ("requested_rewrite.prompt", "{} and {}", "prompt", "2 slots"),
    ("requested_rewrite.subject", " ", "requested_rewrite.subject", "an empty one"),
    ("requested_rewrite.subject", None, "requested_rewrite.subject", "got nothing"),
    ("requested_rewrite.target_new", "Brast", "requested_rewrite.target_new", "expected an object, got a text"),
    ("requested_rewrite.target_new.str", "", "requested_rewrite.target_new.str", "an empty one"),
    ("requested_rewrite.target_new.str", "Oslen", "target_true", "is the one that it should replace"),
    ("requested_rewrite.target_true.str", ["Oslen"], "requested_rewrite.target_true.str", "got a list"),
    ("requested_rewrite.target_new.str", "a\x00b", "target", "NUL"),
    ("case_id", ..., "case_id", "got nothing"),
    ("case_id", True, "case_id", "got true or false"),
    ("paraphrase_prompts", ..., "paraphrase_prompts", "expected a list of texts, got nothing"),
    ("neighborhood_prompts", "text", "neighborhood_prompts", "expected a list of texts, got a text"),
    ("neighborhood_prompts", ["a", {"prompt": "b"}], "neighborhood_prompts[1]", "got an object"),
    ("attribute_prompts", ["a", ""], "attribute_prompts[1]", "an empty one"),
    ("generation_prompts", {}, "generation_prompts", "got an object"),
]
BAD_ZSRE = [
    ("subject", "Tarvos", "subject", "found it 0 times"),
    ("src", "Is Varland in Varland?", "subject", "found it 2 times"),
    ("src", ..., "src", "got nothing"),
    ("answers", [], "answers", "at least one answer"),
    ("answers", "Oslen", "answers", "expected a list of texts"),
    ("rephrase", "", "rephrase", "an empty one"),
    ("loc", None, "loc", "got nothing"),
    ("loc_ans", 4, "loc_ans", "got a number"),
]
BAD_EASYEDIT = [
    ("prompt", "The capital is", "prompt", "holds neither"),
    ("target_new", "Oslen", "target_true", "should replace"),
    ("ground_truth", 7, "ground_truth", "expected an answer"),
    ("rephrase_prompt", 1, "rephrase_prompt", "expected a text"),
    ("locality_ground_truth", ..., "locality_prompt", "a prompt and its answer"),
    ("locality_prompt", ["a", "b"], "locality_prompt", "an answer for each of 2"),
    ("locality", ["a"], "locality", "named groups"),
    ("portability", {"Reasoning": "a"}, "portability.Reasoning", "a list or an object"),
    ("portability", {"Reasoning": [{"prompt": "a"}]}, "portability.Reasoning[0]", "a prompt and its answer"),
]
TABLE = [
    *((counterfact.load, COUNTERFACT, *row) for row in BAD_COUNTERFACT),
    *((zsre.load, ZSRE, *row) for row in BAD_ZSRE),
    *((easyedit.load, EASYEDIT, *row) for row in BAD_EASYEDIT),
]


@pytest.mark.parametrize(("load", "good", "path", "value", "field", "reason"), TABLE)
def test_a_bad_record_is_dropped_by_name_and_its_neighbors_are_used(
    load: Any, good: dict[str, Any], path: str, value: Any, field: str, reason: str, tmp_path: Path
) -> None:
    other = {**good, "case_id": 8}
    bad = changed(good, path, value)
    loaded: Loaded = load(written(tmp_path, [bad, other]))
    assert len(loaded.cases) == 1
    (dropped,) = loaded.dropped
    assert dropped.field == field
    assert reason in dropped.reason
    assert dropped.record == ("#0" if "case_id" not in bad or type(bad["case_id"]) is not int else "7")


@pytest.mark.parametrize("item", [None, 3, "text", [COUNTERFACT], True])
def test_a_record_that_is_no_object_is_dropped_by_its_place(item: Any, tmp_path: Path) -> None:
    loaded = counterfact.load(written(tmp_path, [COUNTERFACT, item]))
    assert len(loaded.cases) == 1
    assert loaded.dropped[0].record == "#1"
    assert "expected an object" in loaded.dropped[0].reason


def test_a_second_record_with_the_same_id_is_dropped(tmp_path: Path) -> None:
    loaded = counterfact.load(written(tmp_path, [COUNTERFACT, COUNTERFACT]))
    assert loaded.dropped == [Dropped("#1", "case_id", "the id 7 is that of an earlier record")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([(counterfact.to_case, COUNTERFACT), (zsre.to_case, ZSRE), (easyedit.to_case, EASYEDIT)]),
    st.data(),
    JSON,
)
def test_whatever_stands_in_a_field_a_record_is_used_or_dropped_never_lost(
    format_: tuple[Any, dict[str, Any]], data: st.DataObject, value: Any
) -> None:
    to_case, good = format_
    extra = {"locality": {"a": []}, "portability": {"a": []}, "case_id": 1}
    record = {**extra, **good}
    loaded = convert([{**record, data.draw(st.sampled_from(sorted(record))): value}], to_case, id_field="case_id")
    assert len(loaded.cases) + len(loaded.dropped) == 1


# --- white space, missing subjects, empty answers ---------------------------------------------------------------------


def test_the_white_space_of_prompts_and_answers_is_kept_and_blank_fields_are_refused(tmp_path: Path) -> None:
    chat = "<|user|>\nWhat is the capital of Varland?\n<|assistant|>\n"
    record = {**EASYEDIT, "prompt": chat, "rephrase_prompt": f" {chat}", "target_new": "Brast\n"}
    (case,) = easyedit.load(written(tmp_path, [record])).cases
    assert (case.request.text, case.request.target) == (chat, "Brast\n")
    assert case.probes[:2] == (
        Probe("rewrite", chat, "Brast\n", "Oslen"),
        Probe("paraphrase", f" {chat}", "Brast\n", "Oslen"),
    )
    edited = changed(COUNTERFACT, "requested_rewrite.prompt", "The capital of {} is:\n")
    (case,) = counterfact.load(written(tmp_path, [edited, changed(edited, "paraphrase_prompts", ["\n"])])).cases
    assert case.request.text == "The capital of Varland is:\n"
    (case,) = zsre.load(written(tmp_path, [changed(ZSRE, "src", "Capital of Varland?\nA: ")])).cases
    assert case.request.text == "Capital of Varland?\nA: "


WITHOUT_SUBJECT = [
    (
        counterfact.load,
        changed(changed(COUNTERFACT, "requested_rewrite.prompt", "2 + 2 is"), "requested_rewrite.subject", None),
    ),
    (zsre.load, changed(ZSRE, "subject", ...)),
    (zsre.load, changed(ZSRE, "src", "Which city is it?")),
    (easyedit.load, changed(EASYEDIT, "subject", ...)),
    (easyedit.load, changed(EASYEDIT, "prompt", "Varland or Varland? It is")),
]


@pytest.mark.parametrize(("load", "record"), WITHOUT_SUBJECT)
def test_a_record_without_a_subject_is_kept_for_methods_that_never_look_at_it(
    load: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, [record])
    (case,) = load(path, needs_subject=False).cases
    assert case.request.subject is None
    assert case.probes[0].prompt == case.request.text
    with pytest.raises(DatasetError, match="no usable record is left of 1"):
        load(path)


def test_a_question_with_an_empty_answer_is_left_out_and_counted_and_its_fact_is_kept(tmp_path: Path) -> None:
    record = {
        **EASYEDIT,
        "ground_truth": [""],
        "locality": {
            "Relation_Specificity": {"prompt": ["Varland lies in", "Varland is"], "ground_truth": [[], ["x"]]}
        },
        "portability": {
            "Reasoning": [
                {"prompt": "Varland's mayor is", "ground_truth": [[""]]},
                {"prompt": "a", "ground_truth": "b"},
            ]
        },
    }
    loaded = easyedit.load(written(tmp_path, [record]))
    (case,) = loaded.cases
    assert case.request.target_true is None
    assert [probe.prompt for probe in case.probes if probe.kind == "neighborhood"][1:] == ["Varland is"]
    assert [probe.prompt for probe in case.probes if probe.kind == "portability"] == ["a"]
    assert not loaded.dropped
    assert [entry.field for entry in loaded.left_out] == ["locality.Relation_Specificity", "portability.Reasoning[0]"]


def test_knowedits_other_names_are_read_and_fields_that_nothing_reads_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = {key: value for key, value in EASYEDIT.items() if key != "rephrase_prompt"}
    several = {**flat, "rephrase": "Varland is governed from", "portability_r": "x"}
    biography = {
        "text": "A passage about varland. Varland",
        "concept": "varland",
        "labels": "is a land.",
        "prompt": None,
    }
    loaded = easyedit.load(written(tmp_path, [several, {**several, "case_id": 9}, biography]))
    assert Probe("paraphrase", "Varland is governed from", "Brast", "Oslen") in loaded.cases[0].probes
    request = loaded.cases[2].request
    assert (request.text, request.subject, request.target) == (biography["text"], "varland", "is a land.")
    assert loaded.unread == {"portability_r": 2}
    assert sum("'portability_r' (2 records)" in message for message in caplog.messages) == 1


def test_no_field_of_the_published_formats_is_called_unread(tmp_path: Path) -> None:
    for load, record in (
        (counterfact.load, {**COUNTERFACT, "pararel_idx": 1}),
        (zsre.load, ZSRE),
        (easyedit.load, EASYEDIT),
    ):
        assert load(written(tmp_path, [record])).unread == {}


def test_a_dataset_can_be_read_as_messages_of_a_chat(tmp_path: Path) -> None:
    path = written(tmp_path, [COUNTERFACT])
    (plain,) = datasets.load("counterfact", path).cases
    (chat,) = datasets.load("counterfact", path, chat=True).cases
    assert chat.request == replace(plain.request, chat=True)
    assert chat.probes == tuple(replace(probe, chat=True) for probe in plain.probes)


# --- bad files ------------------------------------------------------------------------------------------------------

GOOD_GZIP = gzip.compress(json.dumps([COUNTERFACT]).encode())
BAD_FILES = [
    (b"", "is empty"),
    (b"  \n", "is empty"),
    (b"[{", "not JSON: .* at line 1, column 3"),
    (b'[\n{"case_id": 1},\n{"case', "at line 3"),
    (b"\x80\x81\x82", "not UTF-8 text: byte 0 is 0x80"),
    (b"{}", "expected a list of records at the top, got an object"),
    (b'"text"', "got a text"),
    (b"null", "got nothing"),
    (b"[]", "holds an empty list"),
    (b"[1, 2]", "no usable record is left of 2.*expected an object"),
    (b"[" * 100_000, "nested too deeply"),
    (GOOD_GZIP[:-12], "damaged gzip"),
    (GOOD_GZIP[:20] + b"\xff\xff\xff" + GOOD_GZIP[23:], "damaged gzip"),
    (b"\x1f\x8b\x08", "damaged gzip"),
]


@pytest.mark.parametrize("load", [counterfact.load, zsre.load, easyedit.load])
@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_bad_file_is_an_error_that_names_the_file_and_the_fault(
    load: Any, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        counterfact.load(tmp_path / "absent.json")
    with pytest.raises(DatasetError, match="directory"):
        counterfact.load(tmp_path)


def test_gzip_is_known_by_its_first_bytes_not_by_the_name(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(GOOD_GZIP)
    (tmp_path / "data.json.gz").write_text(json.dumps([COUNTERFACT]))
    assert counterfact.load(tmp_path / "data.json") == counterfact.load(tmp_path / "data.json.gz")
