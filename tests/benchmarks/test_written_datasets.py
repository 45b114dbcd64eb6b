"""Cases that are written for EasyEdit, portability and what an edit of zsRE teaches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dataset_records import EASYEDIT, written

from errata.benchmarks.datasets import counterfact, easyedit, world, zsre
from errata.benchmarks.datasets import registry as datasets
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

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
