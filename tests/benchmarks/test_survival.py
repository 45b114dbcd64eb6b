"""`errata survive`: what it measures of merged and compressed edits, what it keeps, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from survival_runs import COMPRESS, WORDS, config_of_survival

from errata.benchmarks.bench import survival as survival_study
from errata.benchmarks.bench.survival import SurvivalPlan, SurvivalStudy
from errata.benchmarks.bench.update_on_grid import GridUpdate, update_on_grid
from errata.benchmarks.reports import survival
from errata.cli import main
from errata.editors.core.errors import ConfigError, ExportError, LedgerError, NumericalError
from errata.editors.core.interventions.intervention import Applied, maps_of
from errata.editors.core.interventions.kept import OnGrid
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.activations import captured_inputs
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.quantising import grid_of
from errata.evaluate.probes import Case


def test_a_merged_model_in_float32_has_the_weights_and_scores_of_the_edited_one(
    survived: tuple[Path, dict[str, Any]],
) -> None:
    _, found = survived
    assert found["same_weights"]
    steps = found["steps"]
    assert steps["float32"] == steps["edited"]
    assert steps["edited"]["values"] != steps["untouched"]["values"]
    assert set(steps) == {
        *("untouched", "untouched magnitude", "edited", "float32", "float32 magnitude"),
        *("bfloat16", "bfloat16 magnitude"),
    }
    assert all(len(own["values"]["probability"]["reliability"]) == 2 for own in steps.values())
    # A pruned weight has no grid.
    assert found["grid"]["magnitude"]["moved"] is None
    assert found["grid"]["magnitude"]["carried"] > 0


def test_numbers_that_are_there_are_read_again(survived: tuple[Path, dict[str, Any]]) -> None:
    out, _ = survived
    (path,) = out.glob("ft_m-*.json")
    as_measured = path.read_bytes()
    changed = {**json.loads(path.read_text()), "n": 77}
    path.write_text(json.dumps(changed))
    study = SurvivalStudy(SurvivalPlan([COMPRESS], ("float32", "bfloat16")), out=out)
    assert study.measure(config_of_survival())["n"] == 77
    path.write_bytes(as_measured)


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_command_shows_changes_with_their_intervals(survived: tuple[Path, dict[str, Any]]) -> None:
    out, found = survived

    def typed(*words: str) -> str:
        console = Console(file=io.StringIO(), width=250)
        assert main.run(["survive", "edit=ft_m", *WORDS, f"out={out}", *words], console, console) == 0
        return console.file.getvalue()  # type: ignore[attr-defined]

    shown = typed("generation.tokens=10")
    assert "float32, magnitude" in shown
    assert (out / "survival.png").is_file()
    (own,) = json.loads(typed("--json"))["methods"]
    assert own == json.loads(json.dumps(survival.summary(found)))
    assert own["steps"]["float32"]["probability"]["reliability"]["change"] == [0, 0, 0]
    assert "name: batch" in typed("--cfg")


@pytest.mark.filterwarnings("ignore:.*the search for the value ended")
def test_a_method_that_changes_no_weights_has_no_merged_model() -> None:
    study = SurvivalStudy(SurvivalPlan([COMPRESS], ("float32",)))
    with pytest.raises(ExportError, match="no change of weights alone"):
        study.measure(config_of_survival(editor={"name": "grace", "n_iter": 1}))


def test_an_update_is_counted_on_the_grid_of_the_merged_weight(make_tiny: Any, tiny_tokenizer: Any) -> None:
    untouched, merged = make_tiny("gpt2"), make_tiny("gpt2")
    ledger = Ledger.of(untouched)
    name = "transformer.h.1.mlp.c_proj.weight"
    (found,) = [one for one in maps_of(describe(merged)) if one.name == name]
    base = found.weight.clone()
    grid = grid_of(base, 4)
    update = torch.zeros_like(base)
    update[0] = 3 * grid.scale[0]  # three steps for one row, nothing for the others
    found.weight.copy_(base + update)
    edited = found.weight.clone()
    found.weight.copy_(grid.nearest(edited))
    applied = Applied("rtn", merged, (), {name: OnGrid(grid)}, (name,))
    got = update_on_grid(ledger, merged, tiny_tokenizer, {name: found}, {name: edited}, applied, [("Beats", False)])
    moved = (grid.nearest(edited) != grid.nearest(base)).double().mean()
    assert got.moved == pytest.approx(float(moved))
    assert 0 < float(moved) <= 1 / len(base)
    assert got.half_steps == 0  # most elements have no update
    # At one token: the change is that of the one row.
    with torch.no_grad(), captured_inputs([found.module], stop=False) as seen:
        merged(torch.tensor([tiny_tokenizer("Beats")["input_ids"]]))
    inputs = seen[0][0]
    change = (inputs @ (edited - base).T).norm(dim=1)
    token = int(change.argmax())
    error = (inputs[token] @ (found.weight - edited).T).norm()
    assert got.carried == (pytest.approx(float(change[token] / error), rel=1e-4),)
    # AWQ's grid is that of the weight with its columns scaled. Powers of two scale without rounding.
    columns = 2.0 ** (torch.arange(base.shape[1]) % 3)
    scaled = Applied("awq", merged, (), {name: OnGrid(grid, columns)}, (name,))
    found.weight.copy_(base / columns)
    base_before = ledger.base(name)
    base_before.copy_(base_before / columns[:, None])
    edited_before = {name: edited / columns}
    own = update_on_grid(ledger, merged, tiny_tokenizer, {name: found}, edited_before, scaled, [("Beats", False)])
    assert (own.moved, own.half_steps) == (got.moved, got.half_steps)
    together = GridUpdate.together([got, GridUpdate(None, None, ())])
    assert (together["moved"], together["n"]) == (got.moved, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress=rtnn"], "compress=rtnn: unknown compress; did you mean 'rtn'"),
        (["compress=rtn", "compress.sparsity=0.5"], "compress.sparsity: none of the compressions has this field"),
        (["merged=float16"], "merged: expected float32 or bfloat16, got float16"),
        (["merged=float32,float32"], "merged: expected each precision once, got float32,float32"),
        (["compress=rtn,rtn"], "compress: expected each compression once, got rtn twice"),
        (["compress.text=gone.txt"], "^compress.text: gone.txt does not exist"),
        (["compress.bits=9"], "compress.bits: expected 2 to 8, got 9"),
        (["compress.damp=-1e-2"], "compress.damp: expected .*, got -0.01"),
        (["protocol=single"], "give group=N"),
        (["edit=memit,rome", "edit.layers=3"], "is of one method, and there are 2"),
        (["precision=bfloat16"], "edits are made in float32 here"),
        (["dataset.known=probability"], "name the cases by dataset.ids"),
        (["group=-1"], "group"),
    ],
)
def test_the_command_refuses_mistakes(words: list[str], message: str) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=message):
        main.run(["survive", *words], console, console)


def test_a_refused_group_is_made_fact_by_fact_and_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Closing:
        """A method with a closing step, behind which it makes no edit."""

        ledger = SimpleNamespace(entries=())

        def apply(self, requests: list[EditRequest]) -> None:
            if len(requests) > 1:
                raise NumericalError("too many at once")
            if "closed" in said:
                raise LedgerError("the model carries the closing step")
            said.append(requests[0].subject or "")

        def finish(self) -> None:
            said.append("closed")

        def rollback(self) -> None:
            pass

    requests = [EditRequest("The capital of {} is", target="Rome", subject=name) for name in ("Peru", "Chad")]
    cases = [Case(id=one.subject or "", request=one, probes=()) for one in requests]
    run = survival_study._MethodRun(cast(Any, SimpleNamespace(editor=Closing(), model=None)), SurvivalPlan(), None)
    monkeypatch.setattr(run, "_ask", lambda *_: None)
    monkeypatch.setattr(run, "_merged", lambda *_: None)
    run.group(cases)
    assert said == ["Peru", "Chad", "closed"]
    assert not run._refused


def test_methods_without_a_merged_model_leave_nothing_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ExportError("no change of weights alone")

    monkeypatch.setattr(SurvivalStudy, "measure", refuse)
    said = Console(file=io.StringIO(), width=200)
    with pytest.raises(ExportError, match="no method is left"):
        main.run(["survive", "edit=grace,wise", "dataset=world_counterfact"], said, said)
    assert "grace is left out: no change of weights alone" in said.file.getvalue()  # type: ignore[attr-defined]


def test_what_the_grid_holds_stands_beside_the_step_that_it_was_measured_behind() -> None:
    entry = {"probability": {}, "perplexity": None}
    steps = dict.fromkeys(("untouched rtn", "edited", "bfloat16 rtn", "float32 rtn", "float32 awq"), entry)
    grid = {"rtn": {"moved": 0.5, "carried": 2.0}}
    own = {"method": "rome", "n": 2, "refused": 1, "steps": steps, "grid": grid}
    rows = survival.rows([own], "probability")
    assert {row[1] for row in rows} == {"2, 1 refused"}
    shown = {row[2]: row[-2:] for row in rows}
    assert shown.pop("bfloat16, round to nearest") == ["50 %", "2"]
    assert "float32, AWQ" in shown
    assert all(cells == ["-", "-"] for cells in shown.values())
