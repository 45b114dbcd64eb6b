"""MINT's parts by hand, its tries beside the edited model, and what it does where nothing helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick_editors import build
from torch import Tensor

from errata import EditRequest
from errata.editors.core.errors import ArchitectureError, ConfigError, DoubtfulEditWarning
from errata.editors.core.forward.changed_neurons import Changes
from errata.editors.core.model.tokens import prompt_ids
from errata.editors.mint import AnswerDirections, MINTConfig, apart_from, layers_of, patched, ranged

F64: Any = {"dtype": torch.float64}
PROMPT = "The capital of Varland is"


@pytest.fixture(scope="module")
def fresh(make_tiny: Any, tiny_tokenizer: Any) -> Any:
    def make(architecture: str = "gpt2", **fields: Any) -> Any:
        return build("mint", make_tiny(architecture, **F64), tiny_tokenizer, **fields)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Requests for one token by its id: many are no text of their own to a tokenizer of bytes."""

    def reads(_architecture: Any, tokenizer: Any, request: EditRequest) -> Any:
        return tuple(prompt_ids(tokenizer, request.text)), (int(request.target),)

    monkeypatch.setattr("errata.editors.mint.prompt_and_answer", reads)
    return lambda token: EditRequest(PROMPT, None, str(token))


def _token(editor: Any, rank: int) -> int:
    """The model's choice after PROMPT of this rank."""
    ids = torch.tensor([prompt_ids(editor.tokenizer, PROMPT)])
    return int(editor.model(ids).logits[0, -1].topk(rank + 1).indices[rank])


def test_a_direction_and_a_patch_by_hand() -> None:
    answers = AnswerDirections(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], **F64))
    B = torch.stack([answers[token] for token in range(3)])
    wanted = torch.tensor([[5.0, -1.0], [-2.0, 4.0], [4.0, 1.0]], **F64) / 9
    torch.testing.assert_close(B, wanted)
    direction = ranged(B[1] - B[0])
    torch.testing.assert_close(direction, torch.tensor([-7.0, 5.0], **F64) / 12)
    w = patched(torch.tensor([0.5, -0.5], **F64), direction, 0.01)
    torch.testing.assert_close(w, torch.tensor([0.489274, -0.490924], **F64), rtol=0, atol=5e-7)
    assert torch.equal(ranged(torch.ones(3)), torch.zeros(3))


def test_rows_are_those_of_the_pseudoinverse_also_where_the_head_lacks_directions() -> None:
    head = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), **F64)
    head[:, 5] = head[:, 4]
    answers, B = AnswerDirections(head), torch.linalg.pinv(head.T)
    assert answers.rank == 5
    torch.testing.assert_close(torch.stack([answers[token] for token in range(30)]), B)


def test_a_direction_apart_from_earlier_ones_keeps_its_norm() -> None:
    units = [torch.eye(3)[0], torch.eye(3)[2]]
    torch.testing.assert_close(apart_from(torch.tensor([3.0, 4.0, 0.0]), units), torch.tensor([0.0, 5.0, 0.0]))
    assert torch.equal(apart_from(units[0], units), torch.zeros(3))


def test_layers_by_depth() -> None:
    named = {depth: layers_of(depth, 12) for depth in ("half", "all", "fourth", "last3")}
    assert named == {"half": tuple(range(6, 12)), "all": tuple(range(12)), "fourth": (9, 10, 11), "last3": (9, 10, 11)}
    assert layers_of("half", 7) == (3, 4, 5, 6)
    assert layers_of("fourth", 3) == (2,)
    assert layers_of("last3", 2) == (0, 1)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_an_edit_is_a_few_columns_within_the_bound_and_makes_the_answer_the_choice(
    fresh: Any, asked: Any, architecture: str
) -> None:
    editor = fresh(architecture, factor=0.3, max_patches=20)
    wanted = _token(editor, 1)
    edit = editor.apply(asked(wanted))
    (report,) = edit.diagnostics
    assert _token(editor, 0) == wanted
    assert 1 <= len(report["neurons"]) == report["tries"][0] <= 20
    assert report["gaps"][0][0] > 0 > report["gaps"][0][1]
    assert report["wrong_tokens"] == []
    edit.undo()
    largest, factor = 0.0, editor.config.factor
    answers = editor.answers()
    length = float(ranged(answers[wanted] - answers[_token(editor, 0)]).norm())
    for layer in report["layers"]:
        D = edit.patch.updates[editor.architecture.weight_name(layer)].matrix(torch.float64, torch.device("cpu"))
        columns = D.norm(dim=0).nonzero().flatten().tolist()
        assert columns == sorted({n for at, n in report["neurons"] if at == layer})
        for column in columns:
            w, patches = editor.architecture.weight(layer)[:, column], report["neurons"].count([layer, column])
            bound = (1 - (1 + factor) ** -patches) * (float(w.norm()) + length)
            largest = max(largest, float(D[:, column].norm()) / bound)
    assert 0.1 < largest <= 1


def test_tries_beside_each_other_say_what_each_says_alone_and_what_the_edited_model_says(
    fresh: Any, asked: Any
) -> None:
    batched, alone = (fresh(factor=0.3, max_patches=20, **fields) for fields in ({}, {"batch_tokens": 1}))
    wanted = _token(batched, 1)
    edit, other = batched.compute(asked(wanted))[0], alone.compute(asked(wanted))[0]
    assert edit.diagnostics[0]["neurons"] == other.diagnostics[0]["neurons"] != []
    torch.testing.assert_close(edit.diagnostics[0]["gaps"], other.diagnostics[0]["gaps"], rtol=1e-9, atol=1e-12)
    ids = prompt_ids(batched.tokenizer, PROMPT)
    row, d = batched._row(ids), batched.architecture.d_model
    steps = [((1, 3), torch.ones(d, **F64)), ((2, 5), torch.full((d,), 2.0, **F64)), ((1, 3), torch.zeros(d, **F64))]
    before = Changes().with_added((2, 5), torch.ones(d, **F64)).with_added((2, 5), torch.ones(d, **F64))
    predicted = row.logits(before, steps)
    weights = {layer: batched.architecture.weight(layer) for layer in (1, 2)}
    with torch.no_grad():
        weights[2][:, 5] += 2.0
        said = []
        for (layer, column), change in steps:
            weights[layer][:, column] += change
            said.append(batched.model(torch.tensor([ids])).logits[0, -1])
            weights[layer][:, column] -= change
    torch.testing.assert_close(predicted, torch.stack(said))


def test_scores_are_gradient_times_activation_of_the_whole_model(fresh: Any) -> None:
    editor = fresh()
    ids, seen = prompt_ids(editor.tokenizer, PROMPT), {}
    found = editor.locate(editor._row(ids), 7, Changes(), torch.Generator())

    def keep(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            seen[layer] = args[0]

        return hook

    handles = [editor.architecture.down(layer).register_forward_pre_hook(keep(layer)) for layer in (1, 2)]
    editor.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[7].backward()
    for handle in handles:
        handle.remove()
    for layer in (1, 2):
        torch.testing.assert_close(found.scores[layer], (seen[layer].grad * seen[layer])[0].norm(dim=0))
    assert len(found.neurons) == 10
    every = torch.cat([found.scores[1], found.scores[2], torch.zeros_like(found.scores[1])])
    assert found.threshold == pytest.approx(float(every.quantile(1 - 10 / len(every))))


def test_where_the_model_agrees_nothing_changes(fresh: Any, asked: Any, digest: Any) -> None:
    editor = fresh()
    before = digest(editor.model)
    edit = editor.apply(asked(_token(editor, 0)))
    assert digest(editor.model) == before
    assert edit.diagnostics[0]["neurons"] == []
    assert edit.diagnostics[0]["update_norm"] == 0.0


def test_a_token_that_is_given_up_leaves_no_patch_and_is_warned_of(fresh: Any, asked: Any, digest: Any) -> None:
    editor = fresh(factor=1e-6, max_patches=2)
    before = digest(editor.model)
    with pytest.warns(DoubtfulEditWarning, match=r"every token of the answer \(wrong are 1 of its 1\); give"):
        edit = editor.apply(asked(_token(editor, 5)))
    assert digest(editor.model) == before
    (report,) = edit.diagnostics
    assert report["skipped_tokens"] == report["wrong_tokens"] == [0]
    assert report["tries"] == [2]


@pytest.mark.parametrize(
    "fields", [{"locate": "activation"}, {"locate": "random"}, {"direction": "basis", "orthogonal": True}], ids=str
)
@pytest.mark.filterwarnings("ignore::errata.editors.core.errors.DoubtfulEditWarning")
def test_other_choices_make_other_edits_and_the_same_twice(fresh: Any, asked: Any, fields: dict[str, Any]) -> None:
    request = asked(_token(fresh(), 1))
    usual, first, second = (editor.compute(request)[0] for editor in (fresh(), fresh(**fields), fresh(**fields)))
    assert first.id == second.id != usual.id


def test_what_cannot_be_is_refused(fresh: Any) -> None:
    for fields in ({"factor": 0.0}, {"max_patches": 0}, {"layers": (9,)}, {"candidates": 0}):
        with pytest.raises(ConfigError):
            fresh(**fields)
    with pytest.raises(ConfigError, match="'fourth'"):
        MINTConfig.from_dict({"depth": "forth"})
    editor = fresh()
    editor.architecture.head.weight = torch.nn.Parameter(torch.zeros(3, 5), requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"one plain matrix, got \(3, 5\)"):
        editor.setup()
