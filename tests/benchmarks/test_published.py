"""The published benchmarks: each reader on records of its schema, on its original file if it is here, and in a run."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# Those whose published records name no subject.
from published_files import WITHOUT_SUBJECTS, load, of_kind, only, written
from published_records import (
    AKEW,
    COVERAGE,
    FEVER,
    HALLU,
    MQUAKE,
    RECORDS,
    RIPPLEEDITS,
    WIKIBIGEDIT,
    WIKIBIO,
)

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.published import BENCHMARKS
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate.probes import Case, FreeAnswer, Probe


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found: Any = copy.deepcopy(record)
    *outer, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inside = found
    for part in outer:
        inside = inside[part]
    inside[last] = value
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_record_of_the_schema_is_read_and_no_field_is_unknown(name: str, tmp_path: Path) -> None:
    loaded = load(name, tmp_path)
    assert len(loaded.cases) == len(RECORDS[name])
    assert not loaded.dropped
    assert not loaded.unread
    assert all(of_kind(case, "rewrite") for case in loaded.cases)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_without_a_path_says_where_its_files_are_and_what_to_type(name: str) -> None:
    with pytest.raises(ConfigError, match=r"download one from https://\S+") as error:
        datasets.load(name)
    assert f"dataset.path={BENCHMARKS[name].example}" in str(error.value)
    config = compose("bench", ["editor=ft_m", f"dataset={name}"])
    assert config["dataset"]["name"] == name


@pytest.mark.parametrize("name", WITHOUT_SUBJECTS)
def test_records_without_a_subject_are_dropped_by_name_for_methods_that_need_one(name: str, tmp_path: Path) -> None:
    path = written(name, RECORDS[name], tmp_path)
    with pytest.raises(DatasetError, match="a method that needs no subject keeps the record"):
        datasets.load(name, path)
    (case,) = datasets.load(name, path, needs_subject=False).cases
    assert case.request.subject is None


@pytest.mark.parametrize(
    ("name", "path", "value", "field"),
    [
        ("knowedit", "target_new", 3, "target_new"),
        ("knowedit", "portability", [], "portability"),
        ("knowedit", "portability.Reasoning.0.ground_truth", [[1]], "portability.Reasoning[0].ground_truth"),
        ("mquake", "requested_rewrite", [], "requested_rewrite"),
        ("mquake", "requested_rewrite.1.target_new", "Brast", "requested_rewrite[1].target_new"),
        ("mquake", "questions", None, "questions"),
        ("mquake", "new_answer_alias", "USA", "new_answer_alias"),
        ("rippleedits", "edit.prompt", "Nothing that is a fact", "edit.prompt"),
        ("rippleedits", "edit.previous_fact.prompt", "The anthem is x.", "edit.previous_fact.prompt"),
        ("rippleedits", "Logical_Generalization.0.test_condition", "XOR", "Logical_Generalization[0].test_condition"),
        ("rippleedits", "Forgetfulness", [{"test_queries": [{"prompt": "p", "answers": []}]}],
         "Forgetfulness[0].test_queries[0].answers"),
        ("wikibigedit", "ans", None, "ans"),
        ("ultraeditbench", "loc_ans", None, "loc_ans"),
        ("qaedit", "locality.2.loc_ans", 5, "locality[2].loc_ans"),
        ("fever", "equiv_prompt", 5, "equiv_prompt"),
        ("unke", "sub_answer", ["one"], "sub_answer"),
        ("akew", "requested_rewrite.0.fact_new_uns", None, "requested_rewrite[0].fact_new_uns"),
        ("conflictedit", "edits", [], "edits"),
        ("conflictedit", "type", "other", "type"),
        ("conflictedit", "prerequisites", [9], "prerequisites"),
        ("conflictedit", "edits.0.subject", None, "edits[0].subject.label"),
        ("hallueditbench", "eval_tiny", "1.0", "eval_tiny"),
    ],
)  # fmt: skip
def test_a_bad_record_is_dropped_with_the_field_at_fault(
    name: str, path: str, value: Any, field: str, tmp_path: Path
) -> None:
    good = RECORDS[name][0]
    bad = changed(good, path, value)
    if "case_id" in bad:
        bad["case_id"] = 99
    if "id" in bad:
        bad["id"] = 99
    loaded = load(name, tmp_path, [bad, good])
    assert len(loaded.cases) == 1
    assert [entry.field for entry in loaded.dropped] == [field]


def test_options_of_a_benchmark_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.options.prompt: .*has no such option; did you mean 'prompts'"):
        load("mquake", tmp_path, prompt="few_shot")
    for name, option in (("mquake", "prompts"), ("rippleedits", "text"), ("fever", "paraphrases"), ("akew", "teaches")):
        with pytest.raises(ConfigError, match=rf"dataset.options.{option}"):
            load(name, tmp_path, None, **{option: "nothing"})


# --- what each asks -----------------------------------------------------------------------------------------------


def test_knowedit_keeps_its_groups_and_the_spellings_of_its_answers(tmp_path: Path) -> None:
    loaded = load("knowedit", tmp_path)
    case, biography = loaded.cases
    reasoning, aliasing = of_kind(case, "portability")
    assert (reasoning.group, reasoning.target, reasoning.aliases, reasoning.also) == (
        "Reasoning", "Moren", ("Moren river",), (("Ilda",),),
    )  # fmt: skip
    assert (aliasing.group, aliasing.target) == ("Subject_Aliasing", "Brast")
    assert [(probe.group, probe.other) for probe in of_kind(case, "neighborhood")] == [
        ("Relation_Specificity", None),
        ("Forgetfulness", "Brast"),  # the replaced answer competes with the new one
    ]
    assert [entry.field for entry in loaded.left_out] == ["portability.Logical_Generalization[0].ground_truth"]
    assert (biography.request.text, biography.request.target) == (WIKIBIO["text"], WIKIBIO["labels"])
    assert [probe.prompt for probe in of_kind(biography, "generation")] == [WIKIBIO["text"]]


def test_mquake_edits_together_and_asks_edits_hops_and_any_of_three_questions(tmp_path: Path) -> None:
    case = only("mquake", tmp_path)
    assert [(r.id, r.text, r.target) for r in case.requests] == [
        ("4.0", "The capital of Varland is", "Brast"),
        ("4.1", "Brast lies on the river", "Moren"),
    ]
    assert [(hop.target, hop.aliases, hop.test, hop.rule) for hop in of_kind(case, "hop")] == [
        ("Brast", ("City of Brast",), "hops", "all"),
        ("Moren", (), "hops", "all"),
    ]
    asked = of_kind(case, "portability")
    assert len(asked) == 3
    assert {(p.target, p.aliases, p.other, p.test, p.rule) for p in asked} == {
        ("Moren", ("Moren river",), "Quelm", "multi-hop", "any")
    }
    assert asked[0].prompt.endswith("\nQ: On which river is Varland's capital? A:")
    assert asked[0].prompt.count("\nQ: ") == 6
    bare = of_kind(only("mquake", tmp_path, prompts="bare"), "portability")
    assert (bare[0].prompt, bare[0].free) == ("On which river is Varland's capital?", FreeAnswer())


def test_mquakes_chains_of_thought_and_the_authors_own_examples(tmp_path: Path) -> None:
    asked = of_kind(only("mquake", tmp_path, prompts="chain_of_thought"), "portability")
    assert asked[0].prompt.endswith("\n\nQuestion: On which river is Varland's capital?\nThoughts:")
    assert asked[0].free == FreeAnswer(tokens=100, after="Answer:", until="\n")
    theirs = tmp_path / "multihop-prompts.txt"
    theirs.write_text("Q: Who? A: Ann", encoding="utf-8")
    asked = of_kind(only("mquake", tmp_path, examples=str(theirs)), "portability")
    assert asked[0].prompt == "Q: Who? A: Ann\nQ: On which river is Varland's capital? A:"


def test_mquake_drops_a_record_whose_edits_contradict_each_other(tmp_path: Path) -> None:
    bad = changed(MQUAKE, "requested_rewrite.1", {**MQUAKE["requested_rewrite"][0], "target_new": {"str": "Quelm"}})
    with pytest.raises(DatasetError, match="contradicts another edit of the record: 'Brast'"):
        load("mquake", tmp_path, [bad])


def test_rippleedits_has_axes_rules_and_conditions(tmp_path: Path) -> None:
    case = only("rippleedits", tmp_path)
    request = case.request
    assert (request.text, request.subject, request.target, request.target_true) == (
        "The name of the country of citizenship of Ilda Moren is", "Ilda Moren", "Varland", "Vary",
    )  # fmt: skip
    (condition,), (kept,) = of_kind(case, "condition"), of_kind(case, "neighborhood")
    assert condition.test == kept.test == "Relation_Specificity.0"
    assert (kept.rule, kept.group, kept.target, kept.aliases, kept.also) == (
        "any", "Relation_Specificity", "Ann", ("Anna",), (("Eve",),),
    )  # fmt: skip
    assert [probe.rule for probe in of_kind(case, "portability")] == ["all", "all"]
    assert kept.free == FreeAnswer(tokens=30)
    theirs = of_kind(only("rippleedits", tmp_path, text="as_published"), "neighborhood")[0]
    assert theirs.free == FreeAnswer(tokens=len(kept.prompt) + 30, with_prompt=True, matching="substring")


@pytest.mark.parametrize(
    ("sentence", "relation", "subject", "target"),
    [
        ("The name of the anthem of Free State of Moren is Odes.", "ANTHEM", "Free State of Moren", "Odes"),
        ("The gender of Ann is woman.", "SEX_OR_GENDER", "Ann", "woman"),
        ("The names of the siblings of Ann are Bob and Eve.", "SIBLING", "Ann", "Bob and Eve"),
        ("The name of the country which Brast is the capital of is Varland.", "CAPITAL_OF", "Brast", "Varland"),
        ("The name of the award Ann won is Moren Prize.", "AWARD_RECEIVED", "Ann", "Moren Prize"),
        ("The number of children Ann has is 3.", "NUMBER_OF_CHILDREN", "Ann", "3"),
        ("The name of the position held by Ann is mayor.", "POSITION_HELD", "Ann", "mayor"),
        ("The name of the currency in Varland is var.", "CURRENCY", "Varland", "var"),
        ("Odes is followed by Hymns.", "FOLLOWED_BY", "Odes", "Hymns"),
        ("Hymns follows Odes.", "FOLLOWS", "Hymns", "Odes"),
        ("The name of the ethnic group which Ann is associated with is Vars.", "ETHNIC_GROUP", "Ann", "Vars"),
    ],
)  # fmt: skip
def test_the_sentence_of_a_ripple_edit_tells_its_subject_and_object(
    sentence: str, relation: str, subject: str, target: str, tmp_path: Path
) -> None:
    record = {**RIPPLEEDITS, "edit": {"prompt": sentence, "relation": relation}}
    request = only("rippleedits", tmp_path, record).request
    assert (request.subject, request.target, request.target_true) == (subject, target, None)


def test_wikibigedit_names_personas_and_hops_and_reads_the_flat_form(tmp_path: Path) -> None:
    case = only("wikibigedit", tmp_path)
    assert [(p.kind, p.group, p.target) for p in case.probes] == [
        ("rewrite", None, "Brast"),
        ("paraphrase", "Rephrase", "Brast"),
        ("paraphrase", "Persona", "Brast"),
        ("neighborhood", None, "Tarvos"),
        ("portability", "Multi_hop", "Moren"),
    ]
    short = {**WIKIBIGEDIT, "mhop": None, "mhop_ans": None, "personas": None}
    assert len(only("wikibigedit", tmp_path, short).probes) == 3
    flat = {"prompt": "Where is Varland?", "target_new": "north", "subject": "Varland", "rephrase_prompt": "Varland?"}
    assert [p.kind for p in only("wikibigedit", tmp_path, flat).probes] == ["rewrite", "paraphrase"]


def test_fever_draws_one_wording_or_asks_all(tmp_path: Path) -> None:
    (one,) = of_kind(only("fever", tmp_path), "paraphrase")
    assert one.prompt in FEVER["equiv_prompt"]
    assert of_kind(only("fever", tmp_path), "paraphrase") == [one]
    assert [p.prompt for p in of_kind(only("fever", tmp_path, paraphrases="all"), "paraphrase")] == FEVER[
        "equiv_prompt"
    ]


def test_unke_asks_the_whole_answer_at_length_and_its_parts(tmp_path: Path) -> None:
    case = only("unke", tmp_path, tokens=200)
    assert [(p.kind, p.free.tokens) for p in case.probes] == [
        ("rewrite", 200), ("paraphrase", 200), ("portability", None), ("portability", None),
    ]  # fmt: skip
    assert {p.group for p in of_kind(case, "portability")} == {"Sub_questions"}


def test_akew_teaches_a_text_its_triplets_or_the_fact(tmp_path: Path) -> None:
    text = only("akew", tmp_path)
    assert (text.request.text, text.request.subject) == ("What is the capital of Varland?", "Varland")
    assert text.request.target.startswith("Brast, a city on the Moren")
    assert Counter(p.group for p in of_kind(text, "portability")) == {"Fact": 1, "Triplets": 2, "Multi_hop": 3}
    triplets = only("akew", tmp_path, teaches="triplets")
    assert [(r.text, r.target) for r in triplets.requests] == [
        ("Brast is on the", "Moren"), ("The capital of Varland is", "Brast"),
    ]  # fmt: skip
    fact = only("akew", tmp_path, teaches="fact")
    assert (fact.request.text, fact.request.target) == ("The capital of Varland is", "Brast")
    assert "Fact" not in {p.group for p in fact.probes}
    counterfact = {
        "case_id": 1,
        "requested_rewrite": {**AKEW["requested_rewrite"][0], "question": None},
        "paraphrase_prompts": ["Varland is governed from"],
        "neighborhood_prompts": ["The capital of Moria is"],
    }
    case = only("akew", tmp_path, counterfact)
    assert case.request.text == "The capital of Varland is"
    assert [(p.target, p.other) for p in of_kind(case, "neighborhood")] == [("Oslen", "Brast")]


def facts(case: Case, kind: str) -> list[tuple[str, str | None]]:
    return [(probe.prompt, probe.target) for probe in of_kind(case, kind)]


def test_conflicts_are_asked_where_the_two_edits_meet(tmp_path: Path) -> None:
    coverage, reverse, composite, _ = load("conflictedit", tmp_path).cases
    assert all(case.in_turn and len(case.requests) == 2 for case in (coverage, reverse, composite))
    assert facts(coverage, "superseded") == [("The capital of Varland is", "Brast")]
    assert facts(coverage, "prevailing") == [("The capital of Varland is", "Quelm")]
    assert of_kind(coverage, "superseded")[0].other == "Oslen"
    assert [(p.target, p.other) for p in of_kind(coverage, "later_edit")] == [("Quelm", "Brast")]
    assert facts(composite, "later_edit") == [("The home of Ilda is", "Quelm")]
    assert facts(reverse, "superseded") == [("The work of Ilda is", "Hymns")]
    assert facts(reverse, "prevailing") == [("The work of Eve is", "Hymns")]
    assert facts(composite, "superseded") == [("The seat of mayor is", "Oslen")]
    assert facts(composite, "prevailing") == [("The seat of mayor is", "Quelm")]
    assert facts(composite, "tied_fact") == [("The office of Ilda is", "mayor")]


def test_a_round_edit_goes_there_and_back_and_asks_all_true_answers(tmp_path: Path) -> None:
    case = load("conflictedit", tmp_path).cases[3]
    assert [request.target for request in case.requests] == ["opera", "poetry"]
    assert facts(case, "restored_object") == [("The genre of Odes is", "poetry")]
    assert facts(case, "left_object") == [("The genre of Odes is", "opera")]
    assert [target for _, target in facts(case, "true_object")] == ["epic", "hymn"]


def test_probabilities_of_a_conflict_are_means_over_the_authors_prompts(tmp_path: Path) -> None:
    templates = tmp_path / "conflict_prompts.json"
    templates.write_text(json.dumps({"capital": ["{} is governed from"]}), encoding="utf-8")
    case = only("conflictedit", tmp_path, COVERAGE, prompts=str(templates))
    assert [prompt for prompt, _ in facts(case, "superseded")] == [
        "The capital of Varland is", "Varland is governed from",
    ]  # fmt: skip
    templates.write_text("[]", encoding="utf-8")
    with pytest.raises(DatasetError, match="expected an object of lists of prompts"):
        only("conflictedit", tmp_path, COVERAGE, prompts=str(templates))


def test_hallueditbench_doubts_the_model_turn_after_turn(tmp_path: Path) -> None:
    wrong = of_kind(only("hallueditbench", tmp_path, robustness="wrong", turns=3), "doubted")
    said = 'Your answer to the original question is wrong. Is Brast the capital of Varland? Respond with "Yes" or "No."'
    assert [(p.group, p.prompt, p.target, p.follow_ups) for p in wrong] == [
        (f"Turn_{turn}", HALLU["question"], "Yes", (said,) * turn) for turn in (1, 2, 3)
    ]
    sure = of_kind(only("hallueditbench", tmp_path, robustness="sure"), "doubted")
    assert len(sure) == 10
    assert sure[9].follow_ups[9].startswith("Are you sure about your answer")
    assert Probe.of(sure[9].as_dict()) == sure[9]
    with pytest.raises(ConfigError, match=r"dataset\.options\.robustness: expected wrong or sure"):
        only("hallueditbench", tmp_path, robustness="twice")
    with pytest.raises(ConfigError, match=r"dataset\.options\.turns: expected a number from 1 on"):
        only("hallueditbench", tmp_path, robustness="sure", turns=0)


def test_wikibigedits_folder_is_read_in_the_order_of_its_intervals(tmp_path: Path) -> None:
    (tmp_path / "months").mkdir()
    files = {"wiki_20240220_20240301": [{"update": None}, WIKIBIGEDIT], "wiki_20240201_20240220": [WIKIBIGEDIT]}
    for name, records in files.items():
        (tmp_path / "months" / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    loaded = datasets.load("wikibigedit", tmp_path / "months")
    first, second = "2024-02-01 to 2024-02-20", "2024-02-20 to 2024-03-01"
    assert [(case.id, case.interval) for case in loaded.cases] == [(f"{first}/0", first), (f"{second}/1", second)]
    assert [entry.record for entry in loaded.dropped] == [f"{second}/#0"]
    assert loaded.cases[0].asked()["interval"] == first
    assert only("wikibigedit", tmp_path).interval is None
    with pytest.raises(DatasetError, match="named by its interval"):
        (tmp_path / "none").mkdir()
        datasets.load("wikibigedit", tmp_path / "none")


def test_hallueditbench_asks_five_forms_hops_and_something_else(tmp_path: Path) -> None:
    case = only("hallueditbench", tmp_path)
    assert [(p.group, p.target) for p in of_kind(case, "paraphrase")] == [
        ("Rephrased", "Brast"), ("Yes", "Yes"), ("No", "No"), ("Multiple_choice", "B"), ("Reversed", "Varland"),
    ]  # fmt: skip
    assert [p.group for p in of_kind(case, "portability")] == [f"{i}_hops" for i in range(2, 7)]
    assert [p.target for p in of_kind(case, "unrelated")] == [None]
    theirs = only("hallueditbench", tmp_path, instruction="authors")
    assert theirs.request == case.request  # the edit itself has no instruction
    assert theirs.probes[0].prompt.startswith("Always respond to the input question")
    assert "multiple-choice" in of_kind(theirs, "paraphrase")[3].prompt
    with pytest.raises(DatasetError, match="expected a CSV table"):
        (tmp_path / "no.csv").write_text("a,b\n1,2\n", encoding="utf-8")
        datasets.load("hallueditbench", tmp_path / "no.csv")
