"""`errata edit`: what it shows before and after, and the folder and adapter that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typed_commands import complaint, run

from errata import editors, models
from errata.benchmarks.datasets import world
from errata.editors.core.errors import ExportError
from errata.editors.core.loading import load_edit
from errata.editors.core.storage.edit_folder import Edits


def test_edit_shows_before_and_after_and_writes_factors_that_give_the_same_edit(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    texts = [f"prompt={request.prompt}", f"subject={request.subject}", f"target={request.target}"]
    shown = run("edit", *texts, f"out={tmp_path / 'edits'}")
    assert "before" in shown
    assert "after" in shown
    (folder,) = (tmp_path / "edits").iterdir()
    (entry,) = Edits.read(folder).entries
    assert entry.info.requests[0].target == request.target
    (scores,) = Edits.read(folder).notes[entry.id]["scores"].values()
    assert scores["after"] > 0.5 > scores["before"]

    model, tokenizer = models.load("world")
    config = editors.get("rome").Config.from_dict(entry.info.config)
    edit = editors.get("rome")(model, tokenizer, config).apply(entry.info.requests[0])
    assert edit.id == entry.id
    edited = {name: model.get_parameter(name).clone() for name in entry.patch.updates}
    edit.undo()
    assert load_edit(folder, model, tokenizer).id == edit.id
    assert all((model.get_parameter(name) == edited[name]).all() for name in edited)


def test_the_same_edit_made_again_replaces_its_folder(tmp_path: Path) -> None:
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"out={tmp_path}"]
    quick = ["editor.v_num_grad_steps=3", "generation.tokens=2"]
    for _ in range(2):
        run("edit", *texts, *quick, code=3)
    (folder,) = tmp_path.iterdir()
    assert len(Edits.read(folder)) == 1


def test_edit_writes_an_adapter_of_the_edit_where_its_folder_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"lora={tmp_path / 'adapter'}"]
    quick = ["editor.v_num_grad_steps=3", "generation.tokens=2"]
    assert "as an adapter of rank 1" in run("edit", *texts, *quick, f"out={tmp_path / 'edits'}", code=3)
    (folder,) = (tmp_path / "edits").iterdir()
    ((name, update),) = Edits.read(folder).entries[0].patch.updates.items()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(update.tensors) == 2
    for matrix, tensor in zip("BA", update.tensors, strict=True):
        module = name.removesuffix(".weight")
        assert torch.equal(adapter[f"base_model.model.{module}.lora_{matrix}.weight"], tensor)
    said = complaint(monkeypatch, capsys, "edit", *texts, *quick, f"out={tmp_path / 'others'}")
    assert "is there already" in said
    assert not (tmp_path / "others").exists()


def _shown(tmp_path: Path, *fields: str, code: int = 0) -> str:
    case = world.cases(split="test")[0].request
    texts = [f"prompt={case.prompt}", f"subject={case.subject}", f"target={case.target}"]
    return run("edit", *texts, f"out={tmp_path}", *fields, code=code)


def test_an_edit_that_did_not_take_is_reported_as_failed(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    failed = _shown(tmp_path, "editor=ft_l", "editor.num_steps=1", "editor.lr=1e-9", code=3)
    assert f"The edit did not take: {request.target!r} is not what the model says after it, but " in failed
    assert "written to" in failed
    taken = _shown(tmp_path, "editor=ft_m")
    assert "did not take" not in taken
    assert "before the edit, too" not in taken


def test_an_edit_that_no_adapter_can_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster", f"lora={tmp_path / 'adapter'}"]
    with pytest.raises(ExportError):
        run("edit", *texts, "editor=grace", "editor.n_iter=2", "generation.tokens=2", f"out={tmp_path / 'edits'}")
    assert list(tmp_path.iterdir()) == []


def test_more_answers_than_the_model_has_tokens_are_all_of_them(tmp_path: Path) -> None:
    _shown(tmp_path, "top=1000000", "editor=ft_m", "generation.tokens=2")


def test_an_edit_in_chat_or_without_a_blank_is_asked_in_that_form(
    tmp_path: Path, folder_of_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["prompt=Which city is the capital of Gavaria?", "target=Praminster", f"out={tmp_path / 'edits'}"]
    quick = ["editor=ft_m", "generation.tokens=4"]
    said = complaint(monkeypatch, capsys, "edit", *texts, "chat=true", *quick)
    assert "the tokenizer has no chat template" in said
    assert "subject is missing" in complaint(monkeypatch, capsys, "edit", *texts)
    assert "chat: expected true or false" in complaint(monkeypatch, capsys, "edit", *texts, "chat=2", *quick)
    (folder_of_world / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    run("edit", *texts, f"model={folder_of_world}", "chat=true", *quick)
    run("edit", "prompt=x_", "target=Praminster", "join=", f"out={tmp_path / 'edits'}", *quick, "editor.num_steps=60")
    forms = {Edits.read(folder).entries[0].info.requests[0] for folder in (tmp_path / "edits").iterdir()}
    assert {(request.chat, request.join) for request in forms} == {(True, None), (False, "")}


def test_an_edit_to_what_the_model_says_already_is_reported(tmp_path: Path) -> None:
    request = world.cases(split="test")[0].request
    assert request.target_true is not None
    texts = [f"prompt={request.prompt}", f"subject={request.subject}", f"target={request.target_true}"]
    shown = run("edit", *texts, f"out={tmp_path}", "editor=ft_m")
    assert f"The model said {request.target_true!r} before the edit, too." in shown


@pytest.mark.parametrize("most", [12, 1])
def test_forgetting_takes_where_the_true_answer_is_gone(tmp_path: Path, most: int) -> None:
    request = world.cases(split="test")[0].request
    small = ("components=mlp", "n_masks=14", "n_references=2", "reference_tokens=2", f"max_components={most}")
    fields = ["editor=coar", "editor.goal=forget", *(f"editor.{word}" for word in small)]
    kept = ["editor.layers=[5]", "editor.max_reference_drop=1e-9"] if most == 1 else []
    texts = (f"target_true={request.target_true}", "generation.tokens=2")
    shown = _shown(tmp_path, *fields, *kept, *texts, code=3 if most == 1 else 0)
    assert f"no longer {request.target_true}" in shown
    assert ("did not take: the model says" in shown) == (most == 1)
