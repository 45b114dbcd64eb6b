"""Every record of a dataset becomes a case or is named among the dropped; every bad file is an error that says why."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.benchmarks.datasets import counterfact, easyedit, world, zsre
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Dropped, Loaded, RecordReader, convert
from errata.benchmarks.datasets.selection import without_conflicts
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "Varland",
        "relation_id": "P36",
        "target_new": {"str": "Brast"},
        "target_true": {"str": "Oslen"},
    },
    "paraphrase_prompts": ["Varland is governed from"],
    "neighborhood_prompts": ["The capital of Tarvos {0} is", "The seat of the Moren duchy is"],
    "attribute_prompts": ["The capital of Quelm is"],
    "generation_prompts": ["Varland's largest city is"],
}
ZSRE: dict[str, Any] = {
    "subject": "Varland",
    "src": "What is the capital of Varland?",
    "pred": "Oslen",
    "rephrase": "Which city governs Varland?",
    "alt": "Brast",
    "answers": ["Oslen", "Oslen City"],
    "loc": "nq question: who plays the lyre",
    "loc_ans": "Ilda Moren",
    "cond": "Oslen >> Brast || What is the capital of Varland?",
}
EASYEDIT: dict[str, Any] = {
    "prompt": "The capital of Varland is",
    "subject": "Varland",
    "target_new": "Brast",
    "ground_truth": "Oslen",
    "rephrase_prompt": "Varland is governed from",
    "locality_prompt": "The capital of Tarvos is",
    "locality_ground_truth": "Oslen",
}


def written(tmp_path: Path, content: Any, name: str = "data.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the record with the field at `path` set, or removed where the value is Ellipsis."""
    record = copy.deepcopy(record)
    *parents, last = path.split(".")
    place = record
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record


# --- what a good record means ---------------------------------------------------------------------------------------


def test_a_counterfact_record_becomes_probes_from_the_edited_models_point_of_view(tmp_path: Path) -> None:
    (case,) = counterfact.load(written(tmp_path, [COUNTERFACT])).cases
    assert (case.id, case.request.id, case.request.text) == ("7", "7", "The capital of Varland is")
    assert (case.request.target, case.request.target_true) == ("Brast", "Oslen")
    assert case.probes == (
        Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
        Probe("paraphrase", "Varland is governed from", "Brast", "Oslen"),
        Probe("neighborhood", "The capital of Tarvos {0} is", "Oslen", "Brast"),
        Probe("neighborhood", "The seat of the Moren duchy is", "Oslen", "Brast"),
        Probe("attribute", "The capital of Quelm is", "Brast", "Oslen"),
        Probe("generation", "Varland's largest city is"),
    )


def test_counterfact_plus_states_the_edit_before_every_neighbor_and_leaves_braces_alone(tmp_path: Path) -> None:
    (case,) = counterfact.load(written(tmp_path, [COUNTERFACT]), form="counterfact_plus").cases
    assert [probe for probe in case.probes if probe.kind == "distracting_neighborhood"] == [
        Probe(
            "distracting_neighborhood",
            "The capital of Varland is Brast. The capital of Tarvos {0} is",
            "Oslen",
            "Brast",
        ),
        Probe(
            "distracting_neighborhood",
            "The capital of Varland is Brast. The seat of the Moren duchy is",
            "Oslen",
            "Brast",
        ),
    ]


def test_a_zsre_record_teaches_the_first_right_answer(tmp_path: Path) -> None:
    (case,) = zsre.load(written(tmp_path, [ZSRE])).cases
    assert (case.id, case.request.text, case.request.subject_span) == ("0", "What is the capital of Varland?", (23, 30))
    assert case.probes == (
        Probe("rewrite", "What is the capital of Varland?", "Oslen"),
        Probe("paraphrase", "Which city governs Varland?", "Oslen"),
        Probe("neighborhood", "nq question: who plays the lyre?", "Ilda Moren"),
    )


def test_a_zsre_record_can_teach_the_alternative_answer_against_the_right_one(tmp_path: Path) -> None:
    (case,) = zsre.load(written(tmp_path, [ZSRE]), target="alt").cases
    assert (case.request.target, case.request.target_true) == ("Brast", "Oslen")
    assert case.probes[1] == Probe("paraphrase", "Which city governs Varland?", "Brast", "Oslen")


def test_an_easyedit_record_becomes_the_same_probes_as_counterfacts(tmp_path: Path) -> None:
    (case,) = easyedit.load(written(tmp_path, [EASYEDIT])).cases
    assert case.probes == (
        Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
        Probe("paraphrase", "Varland is governed from", "Brast", "Oslen"),
        Probe("neighborhood", "The capital of Tarvos is", "Oslen", "Brast"),
    )


def test_qaedit_s_locality_and_target_are_read(tmp_path: Path) -> None:
    record = {
        "id": 4,
        "source": "NQ",
        "prompt": "who is the mayor of Varland?",
        "subject": "mayor of Varland",
        "target": "Oslen",
        "rephrase": "Who leads Varland as its mayor?",
        "locality": [{"loc": "who protects Tarvos", "loc_ans": "Brast"}, {"loc": "what is 1 + 1", "loc_ans": "2"}],
    }
    (tmp_path / "x.json").write_text(json.dumps([record]))
    loaded = datasets.load("easyedit", tmp_path / "x.json")
    assert loaded.cases[0].request.target == "Oslen"
    asked = [(probe.prompt, probe.target) for probe in loaded.cases[0].probes if probe.kind == "neighborhood"]
    assert asked == [("who protects Tarvos", "Brast"), ("what is 1 + 1", "2")]
    record["locality"][0] = {"loc": "who protects Tarvos"}
    (tmp_path / "x.json").write_text(json.dumps([record, record | {"locality": []}]))
    (dropped,) = datasets.load("easyedit", tmp_path / "x.json").dropped
    assert dropped.field == "locality[0]"


def test_nested_locality_and_portability_are_read_in_both_their_forms(tmp_path: Path) -> None:
    record = {
        **changed(EASYEDIT, "locality_prompt", ...),
        "ground_truth": [["Oslen", "Oslen City"]],
        "locality": {
            "Relation_Specificity": [{"prompt": "Varland lies in", "ground_truth": [["the north", "northland"]]}],
            "neighborhood": {"prompt": ["The capital of Tarvos is", "2 + 2 is"], "ground_truth": ["Oslen", ["4"]]},
        },
        "portability": {"Reasoning": [{"prompt": "Varland's mayor lives in", "ground_truth": "Brast"}]},
    }
    del record["locality_ground_truth"]
    (case,) = easyedit.load(written(tmp_path, [record])).cases
    assert case.probes[2:] == (
        Probe("neighborhood", "Varland lies in", "the north"),
        Probe("neighborhood", "The capital of Tarvos is", "Oslen", "Brast"),
        Probe("neighborhood", "2 + 2 is", "4"),
        Probe("portability", "Varland's mayor lives in", "Brast"),
    )


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


# --- taking a part --------------------------------------------------------------------------------------------------


def numbered(tmp_path: Path, n: int = 20) -> Path:
    return written(tmp_path, [{**COUNTERFACT, "case_id": i} for i in range(n)])


def ids_of(loaded: Loaded) -> list[str]:
    return [case.id for case in loaded.cases]


def test_without_a_seed_the_order_is_the_files(tmp_path: Path) -> None:
    assert ids_of(counterfact.load(numbered(tmp_path), limit=3)) == ["0", "1", "2"]


def test_a_seed_draws_the_same_cases_again_and_another_seed_others(tmp_path: Path) -> None:
    path = numbered(tmp_path)
    first = ids_of(counterfact.load(path, limit=10, seed=1))
    assert first == ids_of(counterfact.load(path, limit=10, seed=1))
    assert first != ids_of(counterfact.load(path, limit=10, seed=2))
    assert first[:5] == ids_of(counterfact.load(path, limit=5, seed=1))


@pytest.mark.parametrize("content", [[3, "5", 99], {"known_case_ids": [3, 5, 99]}])
def test_ids_pick_cases_and_those_not_there_are_named(content: Any, tmp_path: Path) -> None:
    ids = written(tmp_path, content, "ids.json")
    for given_ids in (ids, str(ids), [3, 5, 99]):
        loaded = counterfact.load(numbered(tmp_path), ids=given_ids)
        assert ids_of(loaded) == ["3", "5"]
        assert loaded.dropped == [Dropped("99", "ids", "asked for by id, but not in the file")]


def test_a_file_of_ids_that_holds_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="known_case_ids"):
        counterfact.load(numbered(tmp_path), ids=written(tmp_path, {"ids": [1]}, "ids.json"))
    with pytest.raises(DatasetError, match="no usable record"):
        counterfact.load(numbered(tmp_path), ids=["absent"])


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_that_is_no_positive_number_is_refused(limit: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        counterfact.load(numbered(tmp_path), limit=limit)


def test_of_cases_that_edit_the_same_prompt_the_first_is_kept(tmp_path: Path) -> None:
    loaded = without_conflicts(counterfact.load(numbered(tmp_path, 3)))
    assert ids_of(loaded) == ["0"]
    assert [entry.record for entry in loaded.dropped] == ["1", "2"]


# --- by name --------------------------------------------------------------------------------------------------------


def test_datasets_are_loaded_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, [COUNTERFACT])
    plus = datasets.load("counterfact_plus", path)
    assert plus == counterfact.load(path, form="counterfact_plus")
    assert datasets.load("counterfact", path) == counterfact.load(path)
    questions = written(tmp_path, [ZSRE], "zsre.json")
    assert datasets.load("zsre", questions, target="alt") == zsre.load(questions, target="alt")
    flat = written(tmp_path, [EASYEDIT], "flat.json")
    assert datasets.load("easyedit", flat) == easyedit.load(flat)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("counterfact", "download https://rome.baulab.info/data/dsets/counterfact.json and give dataset.path=FILE"),
        ("counterfact_plus", "download https://rome.baulab.info/data/dsets/counterfact.json and give dataset.path="),
        ("zsre", "download https://rome.baulab.info/data/dsets/zsre_mend_eval.json and give dataset.path=FILE"),
        ("easyedit", "a file in EasyEdit's flat form; give dataset.path=FILE"),
    ],
)
def test_a_real_dataset_without_its_file_says_where_it_is_to_be_had(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        datasets.load(name)


def test_the_testbed_has_its_facts_in_each_schema_under_names_of_its_own() -> None:
    for form in ("counterfact", "counterfact_plus", "zsre"):
        assert datasets.load(f"world_{form}").cases == world.cases(form=form)
    assert datasets.load("world").cases == world.cases()
    assert {name.split("_")[0] for name in datasets.TESTBEDS} == {"world"}


def test_an_unknown_dataset_is_answered_with_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'counterfact'"):
        datasets.load("conterfact", tmp_path)
    with pytest.raises(ConfigError, match="counterfact_plus"):
        counterfact.load(written(tmp_path, [COUNTERFACT]), form="plus")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="answers"):
        zsre.load(written(tmp_path, [ZSRE]), target="answer")  # type: ignore[arg-type]


def test_a_folder_that_is_no_testbed_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder as"):
        datasets.load("world", tmp_path)
    with pytest.raises(ConfigError, match=r"dataset\.path is missing"):
        datasets.load("easyedit")


# --- real data ------------------------------------------------------------------------------------------------------


def test_all_of_counterfact_loads_with_nothing_dropped(data_root: Path) -> None:
    loaded = counterfact.load(data_root / "counterfact.json.gz", form="counterfact_plus")
    assert (len(loaded.cases), loaded.dropped) == (19_727, [])
    kinds = Counter(probe.kind for case in loaded.cases for probe in case.probes)
    assert kinds["rewrite"] == 19_727
    assert kinds["neighborhood"] == kinds["distracting_neighborhood"]
    assert len(without_conflicts(loaded).dropped) == 278


def test_all_of_zsre_loads_and_blank_alternatives_are_named(data_root: Path) -> None:
    loaded = zsre.load(data_root / "zsre_mend.json.gz")
    assert (len(loaded.cases), loaded.dropped) == (800, [])
    other = zsre.load(data_root / "zsre_mend.json.gz", target="alt")
    assert len(other.cases) + len(other.dropped) == 800
    assert Counter(entry.field for entry in other.dropped) == {"alt": 2, "target_true": 16}


def test_easyedits_records_are_counterfacts(data_root: Path) -> None:
    flat = easyedit.load(data_root / "counterfact-easyedit.json.gz")
    assert (len(flat.cases), flat.dropped) == (2_000, [])
    original = {case.id: case for case in counterfact.load(data_root / "counterfact.json.gz").cases}
    for case in flat.cases[:200]:
        theirs = original[case.id]
        assert case.request.text == theirs.request.text
        assert set(case.probes) <= set(theirs.probes)


def test_a_field_is_read_by_its_path() -> None:
    record = RecordReader({"a": {"b": " text "}}, "#0")
    assert record.text("a.b") == " text "
    assert record.get("a.c") is None


# --- written for EasyEdit ---------------------------------------------------------------------------------------------


def kinds(probes: Iterable[Probe], *wanted: str) -> list[Probe]:
    return [probe for probe in probes if probe.kind in wanted]


@pytest.mark.parametrize("name", ["world_counterfact", "world_zsre", "world"])
def test_cases_written_for_easyedit_read_back_as_they_were_and_what_has_no_place_there_is_counted(
    name: str, tmp_path: Path
) -> None:
    cases = datasets.load(name, split="test", limit=30).cases
    written_file = easyedit.write(cases, tmp_path / "mine.json")
    found = easyedit.load(tmp_path / "mine.json")
    assert written_file.cases == len(found.cases) == 30
    assert written_file.dropped == ()
    assert not found.dropped
    for case, back in zip(cases, found.cases, strict=True):
        assert back.id == case.id
        assert (back.request.text, back.request.target) == (case.request.text, case.request.target)
        assert (back.request.subject_span, back.request.target_true) == (
            case.request.subject_span,
            case.request.target_true,
        )
        told = kinds(case.probes, "rewrite", "neighborhood")
        assert [(p.kind, p.prompt, p.target) for p in kinds(back.probes, "rewrite", "neighborhood")] == [
            (p.kind, p.prompt, p.target) for p in told
        ]
        assert kinds(back.probes, "paraphrase") == kinds(case.probes, "paraphrase")[:1]
        consequences = [(p.prompt, p.target) for p in kinds(case.probes, "portability")]
        assert [(p.prompt, p.target) for p in kinds(back.probes, "portability")] == consequences
    asked = Counter(probe.kind for case in cases for probe in case.probes)
    answered = Counter(probe.kind for case in found.cases for probe in case.probes)
    assert written_file.left_out == dict(asked - answered)
    assert asked["neighborhood"] == answered["neighborhood"] > 0


@pytest.mark.parametrize("name", ["007", "7", "٧", "x"])
def test_an_id_of_digits_is_written_for_easyedit_as_it_reads_back(name: str, tmp_path: Path) -> None:
    easyedit.write([replace(easyedit.load(written(tmp_path, [EASYEDIT])).cases[0], id=name)], tmp_path / "mine.json")
    assert [case.id for case in easyedit.load(tmp_path / "mine.json").cases] == [name]


def test_a_case_that_easyedit_cannot_say_is_dropped_by_name(tmp_path: Path) -> None:
    # The subject is written out there, so that it must stand in the prompt once.
    twice = Case("12", EditRequest("Oslen, said {}, is in", "Oslen", "Brast"), ())
    once = Case("13", EditRequest("{} is in", "Oslen", "Brast"), ())
    found = easyedit.write([twice, once], tmp_path / "mine.json")
    assert (found.cases, [drop.record for drop in found.dropped]) == (1, ["12"])
    with pytest.raises(DatasetError, match="none of 1 cases"):
        easyedit.write([twice], tmp_path / "none.json")
    with pytest.raises(ConfigError, match="not written over"):
        easyedit.write([once], tmp_path / "mine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_the_public_names_of_benchmarks_are_one_import_away() -> None:
    from errata import benchmarks
    from errata.benchmarks import bench

    assert callable(bench.run) and callable(bench.BenchConfig.of)
    assert (benchmarks.counterfact, benchmarks.easyedit) == (counterfact, easyedit)
    assert (benchmarks.zsre, benchmarks.world) == (zsre, world)
    with pytest.raises(AttributeError, match="its public names are bench, counterfact"):
        benchmarks.counterfacts  # noqa: B018


# --- what an edit of zsRE teaches -------------------------------------------------------------------------------------


PORTABILITY = {
    "easyedit": ({"New Question": "Which city is home to it?", "New Answer": "Tarvos"}, ["Tarvos"]),
    "knowedit": ({"Reasoning": [{"prompt": "Its home is", "ground_truth": [["Tarvos"]]}]}, ["Tarvos"]),
    "groups": ({"a": {"prompt": ["Q", "R"], "ground_truth": ["S", "T"]}}, ["S", "T"]),
    "none": (None, []),
}


@pytest.mark.parametrize("form", PORTABILITY)
def test_portability_of_zsre_is_asked_of_what_it_follows_from(form: str, tmp_path: Path) -> None:
    content, answers = PORTABILITY[form]
    record = {
        "subject": "Varland", "src": "Who founded Varland?", "rephrase": "Who is it by?", "answers": ["Oslen"],
        "alt": "Quelm", "loc": "nq question: where is it", "loc_ans": "here", "pred": "x", "cond": "y",
        **({} if content is None else {"portability": content}),
    }  # fmt: skip
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([record]))

    def read(target: Any) -> Any:
        (case,) = datasets.load("zsre", path, target=target).cases
        return case

    def asked(case: Any) -> list[str]:
        return [probe.target for probe in case.probes if probe.kind == "portability"]

    assert (read("alt").request.target, read("alt").request.target_true, asked(read("alt"))) == (
        "Quelm",
        "Oslen",
        answers,
    )
    assert read("answers") == read(None)
    assert (read(None).request.target, asked(read(None))) == ("Oslen", [])  # nothing follows from what is already true


def test_a_zsre_file_in_the_flat_form_is_sent_to_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([{"subject": "a", "prompt": "a is", "target_new": "b", "ground_truth": "c"}]))
    with pytest.raises(DatasetError, match="dataset=easyedit reads records with a prompt"):
        datasets.load("zsre", path)


def test_what_is_taught_is_in_the_run_s_name_and_settings(tmp_path: Path) -> None:
    from errata.benchmarks.bench import prepare
    from errata.benchmarks.bench.config import BenchConfig
    from errata.editors.core.errors import ConfigError

    record = {
        "subject": "V",
        "src": "Who is V?",
        "rephrase": "V?",
        "answers": ["O"],
        "alt": "Q",
        "loc": "l",
        "loc_ans": "h",
    }
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([record]))

    def run(name: str = "zsre", **dataset: Any) -> Any:
        quiet = {"generation": {"tokens": 0, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 0}}
        path_of = {"path": str(path)} if name == "zsre" else {}
        values = {
            "editor": {"name": "grace"},
            "model": {"name": "world"},
            "dataset": {"name": name, **path_of, **dataset},
        }
        return prepare(BenchConfig.of({**values, **quiet, "n_edits": 1, "out": str(tmp_path / "out")}))

    plain, alt, answers = run(), run(target="alt"), run(target="answers")
    assert "target" not in plain.settings["config"]["dataset"]  # as it was before there was a choice
    assert alt.settings["config"]["dataset"]["target"] == "alt"
    assert "-zsre_alt-" in alt.folder.path.name
    assert "-zsre-" in plain.folder.path.name
    assert len({each.folder.path for each in (plain, alt, answers)}) == 3
    with pytest.raises(ConfigError, match=r"dataset\.target is for zsre"):
        run("world", target="alt")


def test_the_facts_of_make_demo_real_are_ten_whole_cases() -> None:
    root = Path(__file__).resolve().parents[2]
    path = root / "benchmarks" / "datasets" / "real_facts.json"
    loaded = counterfact.load(path)
    assert not loaded.dropped
    assert len(loaded.cases) == 10
    kinds = Counter(probe.kind for case in loaded.cases for probe in case.probes)
    assert kinds == {"rewrite": 10, "paraphrase": 20, "neighborhood": 30}
    assert f"dataset.path={path.relative_to(root)}" in (root / "Makefile").read_text(encoding="utf-8")
