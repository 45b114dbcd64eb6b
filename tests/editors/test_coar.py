"""COAR-Edit: which components it ablates and how many, its two goals, its references and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build

from errata.editors.coar import COAR
from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.locating.ablated_margins import ablated_margins

F64: Any = {"dtype": torch.float64}


def margins(editor: COAR) -> torch.Tensor:
    keep = torch.ones(1, len(editor.components), dtype=torch.bool)
    rows = [editor._row(request) for request in REQUESTS[1:2]]
    return ablated_margins(editor.architecture, editor.components, rows, keep, pad=editor.pad).mean[0]


@pytest.mark.parametrize("goal", ["say", "forget"])
def test_the_edit_moves_the_margin_as_its_report_says(goal: str, make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("coar", make_tiny("llama", **F64), tiny_tokenizer, goal=goal, layers=None)
    before = margins(editor)
    with editor.applied(REQUESTS[1]) as edit:
        (report,) = edit.diagnostics
        torch.testing.assert_close(margins(editor).tolist(), [report["margin_after"]])
        names = {component.name: component for component in editor.components.each}
        for name in report["components"]:
            component = names[name]
            assert not editor.components.maps[component.map].weight[:, component.first : component.end].any()
    torch.testing.assert_close(before.tolist(), [report["margin_before"]])
    moved = report["margin_after"] - report["margin_before"]
    assert moved > 0 if goal == "say" else moved < 0
    ordered = report["scores"] if goal == "say" else [-score for score in report["scores"]]
    assert ordered == sorted(ordered)
    assert edit.diagnostics[0]["filled_in"]["max_components"] == len(editor.components) // 10


def test_what_was_ablated_before_is_not_chosen_again(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("coar", make_tiny("gpt2"), tiny_tokenizer, max_components=2, layers=None)
    first, second = editor.apply(REQUESTS[0]), editor.apply(REQUESTS[0])
    chosen = [set(edit.diagnostics[0]["components"]) for edit in (first, second)]
    assert chosen[0]
    assert not chosen[0] & chosen[1]


def test_the_references_bound_the_search(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    free: Any = build("coar", model, tiny_tokenizer, max_components=6)
    bound: Any = build("coar", model, tiny_tokenizer, max_components=6, max_reference_drop=1e-9)
    (wide,), (narrow,) = (editor.compute(REQUESTS[:1]) for editor in (free, bound))
    assert len(narrow.diagnostics[0]["components"]) <= len(wide.diagnostics[0]["components"])
    assert narrow.diagnostics[0]["reference_drop"] <= 1e-9
    together = free.apply(REQUESTS)
    assert len({tuple(report["components"]) for report in together.diagnostics}) == 1


def test_nothing_is_ablated_where_the_first_component_breaks_the_bound(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("coar", make_tiny("gpt2"), tiny_tokenizer, max_reference_drop=0.5)
    editor._drops = lambda _order, counts: torch.ones(len(counts), dtype=torch.float64)
    before = margins(editor)
    with editor.applied(REQUESTS[1]) as edit:
        (report,) = edit.diagnostics
        assert (report["components"], report["reached"], report["reference_drop"]) == ([], False, 0.0)
        assert torch.equal(margins(editor), before)


def test_what_is_refused(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    model = make_tiny("gpt2")
    forgetful: Any = build("coar", model, tiny_tokenizer, goal="forget")
    with pytest.raises(RequestError, match="target_true"):
        forgetful.apply(REQUESTS[0])
    for fields in ({"keep": 1.0}, {"fit": "lasso"}, {"n_references": 1}, {"goal": "learn"}, {"components": "layers"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            COAR(model, tiny_tokenizer, fields)
    (tmp_path / "texts.txt").write_text("the the the\n")
    lonely: Any = build("coar", model, tiny_tokenizer, reference_texts=str(tmp_path / "texts.txt"))
    with pytest.raises(ConfigError, match="two texts"):
        lonely.apply(REQUESTS[0])
