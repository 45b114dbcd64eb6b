"""Edits on the Hub, against a Hub of this machine that takes what the client's own functions take, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import HfApi
from typed_commands import run

import errata
from errata.editors.core.errors import ConfigError, DamagedEditsError, ExportError, HubError
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest
from errata.editors.core.storage import provenance
from errata.editors.core.storage.edit_folder import Edits


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub.put_in_place(tmp_path / "hub", monkeypatch)


def put(ledger: Ledger, count: int) -> Ledger:
    d_out, d_in = describe(ledger.model).weight(0).shape
    for seed in range(len(ledger), count):
        drawn = torch.Generator().manual_seed(seed)
        update = LowRank(torch.randn(d_out, 1, generator=drawn), torch.randn(1, d_in, generator=drawn))
        info = EditInfo("made up", (EditRequest("{} is", f"land {seed}", "old"),))
        ledger.append(f"edit {seed}", Patch({describe(ledger.model).weight_name(0): update}), info)
    return ledger


def test_what_is_pushed_is_loaded_with_the_same_bits(there: FakeHub, open_ledger: Any, digest: Any) -> None:
    ledger, other = put(open_ledger(torch.float32), 3), open_ledger(torch.float32)
    assert errata.push_to_hub(ledger.model, "me/edits", private=True) == "https://huggingface.co/me/edits/commit/1"
    assert there.private == {"me/edits": True}
    assert digest(errata.load_ledger("me/edits", other.model).model) == digest(ledger.model)
    card = (there.repos["me/edits"][-1] / "README.md").read_text()
    assert 'errata.load_ledger("me/edits", model, tokenizer)' in card

    errata.edit_of(ledger.model, "edit 1").push_to_hub("me/one")
    other.clear()
    assert errata.load_edit("me/one", other.model).id == "edit 1"


def test_what_is_pushed_does_not_say_where_anything_lies_on_this_machine(
    there: FakeHub, ledger: Ledger, tmp_path: Path
) -> None:
    provenance.remember_source(ledger.model, str(tmp_path / "models" / "gpt2"), None)
    put(ledger, 1)
    (entry,) = ledger.entries
    (tmp_path / "moments.npz").touch()
    config = {"mom2_file": str(tmp_path / "moments.npz"), "mom2_dataset": "org/texts", "seed": 0}
    ledger.clear()
    ledger.append("e", entry.patch, replace(entry.info, config=config))
    errata.push_to_hub(ledger.model, "me/edits")
    pushed = [path.read_bytes() for path in there.repos["me/edits"][-1].iterdir()]
    assert len(pushed) == 5
    assert not any(str(tmp_path).encode() in content for content in pushed)
    edits = Edits.read("me/edits")
    assert edits.model["name"] == "./gpt2"
    assert edits.entries[0].info.config == {**config, "mom2_file": "./moments.npz"}
    provenance.remember_source(ledger.model, "org/gpt2", None)
    edits.check(ledger.model)


def test_a_push_takes_the_place_of_the_edits_before_which_are_had_by_revision(
    there: FakeHub, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.editors.core.storage import edit_folder as edits_module

    with monkeypatch.context() as small:
        small.setattr(edits_module, "FILE_BYTES", 1)
        errata.push_to_hub(put(ledger, 3).model, "me/edits")
    ledger.remove_many(["edit 0", "edit 1"])
    errata.push_to_hub(ledger.model, "me/edits")
    assert len(list(there.repos["me/edits"][1].glob("*.blocks"))) == 3
    assert sorted(path.name for path in there.repos["me/edits"][2].iterdir()) == [
        ".gitattributes",
        "README.md",
        "edits-00000.blocks",
        "edits.jsonl",
        "manifest.json",
    ]
    assert Edits.read("me/edits").ids == ("edit 2",)
    assert len(Edits.read("me/edits", revision="1")) == 3
    with pytest.raises(DamagedEditsError, match="expected a folder of edits"):
        Edits.read("me/edits", revision="0")


def test_a_repository_of_something_else_is_left_alone(there: FakeHub, ledger: Ledger) -> None:
    there.create_repo(HfApi(), "me/model")
    (there.repos["me/model"][0] / "model.safetensors").touch()
    with pytest.raises(ExportError, match=r"me/model holds model\.safetensors"):
        errata.push_to_hub(put(ledger, 1).model, "me/model")
    assert len(there.repos["me/model"]) == 1


def test_what_the_hub_has_not_or_cannot_give_is_said_in_one_line(there: FakeHub, ledger: Ledger) -> None:
    with pytest.raises(HubError, match=r"^there is no folder 'me/none', and the Hub's .*: 404 Client Error\.$"):
        Edits.read("me/none")
    there.is_up = False
    with pytest.raises(HubError, match="not in the cache"):
        Edits.read("me/none")
    with pytest.raises(HubError, match="me/edits could not be written: no route to host"):
        errata.push_to_hub(put(ledger, 1).model, "me/edits")


def test_a_folder_comes_before_a_repository_of_its_name_and_a_path_is_never_asked_for(
    there: FakeHub, ledger: Ledger, tmp_path: Path
) -> None:
    errata.push_to_hub(put(ledger, 2).model, "me/edits")
    errata.save_edits(put(ledger, 3).model, tmp_path / "me" / "edits")
    assert len(Edits.read("me/edits")) == 3
    there.is_up = False
    for name in ("./me/none", "a/b/c", "edits", str(tmp_path / "none"), "me/.."):
        with pytest.raises(DamagedEditsError, match=r"manifest\.json"):
            Edits.read(name)


def test_the_commands_take_repositories_for_folders(there: FakeHub, ledger: Ledger, tmp_path: Path) -> None:
    errata.save_edits(put(ledger, 2).model, tmp_path / "edits")
    assert "2 edits: https://huggingface.co/me/edits/commit/1" in run("export", "edits", "hub=me/edits", "private=true")
    assert there.private == {"me/edits": True}
    assert "2 edits of" in run("list", "me/edits")
    assert "2 edits are the same" in run("diff", "edits", "me/edits")
    run("remove", "me/edits", "id=edit 0", "out=copy")
    assert Edits.read("copy").ids == ("edit 1",)
    with pytest.raises(ConfigError, match="give out=FOLDER"):
        run("remove", "me/edits", "id=edit 0")
