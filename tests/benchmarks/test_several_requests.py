"""Cases of several requests on the testbed: together or in turn, the case is what is made, undone, kept and scored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import errata
from errata import editors
from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.execution import carry_out
from errata.benchmarks.bench.preparation import PreparedRun
from errata.benchmarks.bench.single_edits import _last_by_itself
from errata.benchmarks.datasets import world
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.datasets.selection import without_conflicts
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.editors import get
from errata.editors.core.errors import RequestError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

FAST = {"generation": {"tokens": 3, "fluency_tokens": 0}, "collapse": {"n_texts": 2, "known_facts": 5}}
FACTS = world.cases(split="dev")[:8:2]


def config(out: Path, protocol: str = "single", editor: str = "ft_m", **changes: Any) -> BenchConfig:
    fields = {"num_steps": 5} if editor == "ft_m" else {}
    values: dict[str, Any] = {
        "editor": {"name": editor, **fields},
        "model": {"name": "world"},
        "dataset": {"name": "world"},
        "protocol": {"name": protocol},
        "device": "cpu",
        "batch_size": 2,
        "out": str(out),
        **FAST,
    }
    return BenchConfig.of({**values, **changes})


def renamed(request: EditRequest, name: str, **changes: Any) -> EditRequest:
    return dataclasses.replace(request, id=name, **changes)


def asked(request: EditRequest, kind: str = "rewrite", **more: Any) -> Probe:
    return Probe(kind, request.text, request.target, **more)


def cases() -> list[Case]:
    """Two facts together; a fact that is then changed again; a fact that the first case makes, too."""
    a, b, c = (renamed(case.request, f"{i}.0") for i, case in enumerate(FACTS[:3]))
    later = renamed(c, "2.1", target=c.target_true, target_true=c.target)
    assert c.target_true is not None
    return [
        Case("together", a, (asked(a), asked(b)), (renamed(b, "0.1"),)),
        Case(
            "in turn",
            c,
            (
                asked(later, other=c.target),
                asked(c, "superseded", other=c.target_true, test="conflict"),
                asked(later, "prevailing", test="conflict"),
                asked(later, "later_edit", other=c.target, test="later"),
            ),
            (later,),
            in_turn=True,
        ),
        Case("shared", renamed(a, "3.0"), (asked(a),)),
    ]


def prepared(settings: BenchConfig, chosen: list[Case] | None = None) -> PreparedRun:
    loaded = Loaded(cases() if chosen is None else chosen, shares_edits=True)
    return dataclasses.replace(bench.prepare(settings), loaded=loaded)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return carry_out(prepared(config(tmp_path_factory.mktemp("single"))))


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return carry_out(prepared(config(tmp_path_factory.mktemp("sequence"), "sequential")))


def tiny() -> tuple[Any, Any]:
    from errata.testing.tiny_models import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    return tiny_model("gpt2", len(tokenizer)), tokenizer


def nll(record: dict[str, Any], index: int, moment: str = "after") -> float:
    return record["probes"][index][moment]["nll_target"]


def test_a_case_of_several_requests_is_one_edit_that_is_scored_and_undone(single: Path) -> None:
    """Against the same edit by hand."""
    from errata.evaluate.scoring import score

    together, turned, shared = records(single)
    assert [request["id"] for request in (together["request"], *together["further"])] == ["0.0", "0.1"]
    assert "further" not in shared
    assert len(together["diagnostics"]["each"]) == 2
    assert "each" not in shared["diagnostics"]
    model, tokenizer = errata.load("world", device="cpu")
    editor = get("ft_m")(model, tokenizer, {"num_steps": 5})
    case = cases()[0]
    with editor.applied(case.requests):
        after = score(model, tokenizer, case.probes)
    assert [nll(together, i) for i in range(2)] == pytest.approx([s.nll_target for s in after], abs=1e-4)
    before = score(model, tokenizer, case.probes)
    assert [nll(together, i, "before") for i in range(2)] == pytest.approx([s.nll_target for s in before], abs=1e-4)
    assert all("between" not in probe for probe in together["probes"])
    assert turned["in_turn"]


def test_edits_in_turn_are_asked_between_and_the_later_one_answers_a_prompt_that_both_edit(single: Path) -> None:
    turned = records(single)[1]
    assert nll(turned, 1, "between") < nll(turned, 1, "before")  # the first edit has taught its answer
    assert nll(turned, 1) > nll(turned, 1, "between")  # which the second took back
    found = json.loads((single / "results.json").read_text())["summary"]["probability"]
    assert found["conflict_score"]["n"] == found["conflict_magnitude"]["n"] == 1
    first = turned["probes"][1]["between"]
    assert found["first_success"]["n"] == 1
    assert found["first_success"]["mean"] == float(first["nll_target"] < first["nll_other"])


def test_the_second_edit_is_also_asked_where_it_is_made_by_itself(single: Path) -> None:
    """Against that edit by hand."""
    from errata.evaluate.scoring import score

    turned, later = records(single)[1], cases()[1]
    assert [i for i, probe in enumerate(turned["probes"]) if "by_itself" in probe] == [3]
    model, tokenizer = errata.load("world", device="cpu")
    with get("ft_m")(model, tokenizer, {"num_steps": 5}).applied(later.requests[1]):
        (alone,) = score(model, tokenizer, later.probes[3:])
    assert nll(turned, 3, "by_itself") == pytest.approx(alone.nll_target, abs=1e-4)
    assert nll(turned, 3, "by_itself") != pytest.approx(nll(turned, 3), abs=1e-4)
    found = json.loads((single / "results.json").read_text())["summary"]["probability"]
    assert alone.nll_target is not None
    assert alone.nll_other is not None
    assert found["second_success"]["mean"] == float(alone.nll_target < alone.nll_other)
    assert found["conflict_magnitude"]["mean"] > 0


def test_the_second_edit_by_itself_has_the_closing_step_that_every_single_edit_has() -> None:
    from quick_editors import REQUESTS, build

    from errata.evaluate.scoring import score

    model, tokenizer = tiny()
    editor = build("rome", model, tokenizer, prune="log", v_lr=5.0)
    later = REQUESTS[0]
    case = Case("in turn", REQUESTS[1], (asked(later, "later_edit"),), (later,), in_turn=True)
    phases: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    asking: Any = SimpleNamespace(
        editor=editor, model=model, tokenizer=tokenizer, batch_tokens=512, memory=SimpleNamespace(phase=phase)
    )
    found = _last_by_itself(asking, case)[0]["nll_target"]
    assert phases == ["evaluation"]
    edit = editor.compute_together([[later]])
    said = []
    for one in (editor.closed(edit), edit):
        with one.applied():
            said.append(score(model, tokenizer, case.probes)[0].nll_target)
    assert found == pytest.approx(said[0], abs=1e-4)
    assert found != pytest.approx(said[1], abs=1e-2)


def test_a_sequence_makes_a_shared_edit_once_and_takes_cases_as_its_units(sequence: Path) -> None:
    made = records(sequence)
    assert [record["status"] for record in made] == ["ok"] * 3
    assert len((sequence / "journal" / "edits.jsonl").read_text().splitlines()) == 2  # batches of two cases
    results = json.loads((sequence / "results.json").read_text())
    assert results["counts"]["edits"] == 3
    (entry, _) = [json.loads(line) for line in (sequence / "journal" / "edits.jsonl").read_text().splitlines()]
    assert "2.1" in json.dumps(entry)


@pytest.mark.parametrize("protocol", ["sequential", pytest.param("single", marks=pytest.mark.slow)])
def test_a_run_of_such_cases_that_is_stopped_ends_with_the_bytes_of_one_that_was_not(
    protocol: str, tmp_path: Path, single: Path, sequence: Path
) -> None:
    stop = Stop()

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if what == "edits" and done in (1, 2):
            stop.request("enough")

    with pytest.raises(Stopped):
        carry_out(prepared(config(tmp_path, protocol)), progress=progress, stop=stop)
    folder = carry_out(prepared(config(tmp_path, protocol)))
    finished = {"single": single, "sequential": sequence}[protocol]
    assert (folder / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()


def test_only_cases_whose_facts_are_all_known_are_edited_where_that_is_asked(tmp_path: Path) -> None:
    known = {"name": "world", "known": "contained"}
    settings = config(tmp_path, dataset=known, generation={"tokens": 8, "fluency_tokens": 0})
    folder = carry_out(prepared(settings))
    assert [record["case"] for record in records(folder)] == ["together", "shared"]
    counts = json.loads((folder / "results.json").read_text())["counts"]
    assert (counts["asked"], counts["known"], counts["unknown"]) == (3, 2, 1)
    (answers,) = (json.loads(line)["answers"] for line in (folder / "known.jsonl").read_text().splitlines())
    assert [answer["case"] for answer in answers] == ["together", "together", "in turn", "in turn", "shared"]


def test_the_state_of_edits_in_turn_is_that_of_both() -> None:
    from quick_editors import REQUESTS, build

    model, tokenizer = tiny()
    turned = [[request] for request in REQUESTS[:2]]
    editor = build("alphaedit", model, tokenizer)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    edit = editor.compute_together(turned)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    one = editor.compute(turned[0][0])[0]
    assert {name: state.shape[1] for name, state in edit.state.items()} == dict.fromkeys(one.state, 2)
    with editor.applied(turned[0][0]), editor.applied(turned[1][0]):
        apart = {name: weight.clone() for name, weight in model.named_parameters()}
    edit.apply()
    assert all(torch.allclose(weight, apart[name], atol=1e-5) for name, weight in model.named_parameters())
    edit.undo()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.ColdStatisticsWarning")
@pytest.mark.parametrize("method", editors.METHODS)
def test_every_method_makes_requests_together_and_in_turn_as_one_edit(method: str) -> None:
    from quick_editors import REQUESTS, build

    model, tokenizer = tiny()
    editor = build(method, model, tokenizer)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}

    def is_untouched() -> bool:
        return all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())

    for turned in ([REQUESTS[:2]], [[REQUESTS[0]], [REQUESTS[1]]]):
        carried: list[int] = []
        edit = editor.compute_together(turned, lambda carried=carried: carried.append(len(editor.ledger.entries)))
        assert carried == [1] * (len(turned) - 1)
        assert is_untouched()
        assert not editor.ledger.entries
        assert [report["request"] for report in edit.diagnostics] == [request.id for request in REQUESTS[:2]]
        edit.apply()
        assert edit.is_applied
        edit.undo()
        assert is_untouched()


def test_a_request_without_a_subject_names_the_record_and_methods_that_need_none() -> None:
    from quick_editors import build

    editor = build("memit", *tiny())
    with pytest.raises(RequestError, match=r"r7.*use one that does not \(grace, ft_m, ft_l, lora, mend"):
        editor.compute_together([[EditRequest("Two and two is", None, "five", id="r7")]])


def test_cases_that_share_an_edit_stay_and_those_that_contradict_one_go() -> None:
    found = cases()
    other = Case("contradicts", renamed(found[0].request, "9", target="something else"), ())
    assert [case.id for case in without_conflicts(Loaded([*found, other], shares_edits=True)).cases] == [
        case.id for case in found
    ]
    alone = without_conflicts(Loaded([*found, other]))
    assert [case.id for case in alone.cases] == ["together", "in turn"]
    assert [entry.reason for entry in alone.dropped] == ["edits the same prompt as record together"] * 2
