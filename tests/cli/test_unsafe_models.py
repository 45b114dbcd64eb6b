"""Models that could run code, are damaged or are not there are refused before anything of them is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed_commands import complaint

from errata import models
from errata.editors.core.errors import ConfigError


class _Bomb:
    """Pickles to a call that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb is a dud: the test would prove nothing"
    marker.unlink()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ConfigError, match="safetensors"):
        models.load(folder)
    assert not marker.exists()


def test_code_that_comes_with_a_model_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        models.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["", "./nothing", "../x", "/x/y", "a/b/c", "a\x00b", "file:///x", Path("gone")])
def test_a_name_that_can_only_be_a_folder_is_not_asked_for_on_the_network(name: str | Path) -> None:
    with pytest.raises(ConfigError, match="no model at"):
        models.load(name)


def test_one_changed_byte_in_the_middle_of_the_weights_changes_the_fingerprint(folder_of_world: Path) -> None:
    weights = folder_of_world / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(20 * 2**20)
    before = models.fingerprint(folder_of_world)
    with weights.open("r+b") as file:
        file.seek(10 * 2**20)
        file.write(b"\x01")
    assert models.fingerprint(folder_of_world) != before


@pytest.mark.parametrize(("damage", "said"), [("cut", "damaged"), ("shape", "shapes")])
def test_damaged_or_foreign_weights_are_reported_in_one_line(
    damage: str, said: str, folder_of_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "cut":
        with (folder_of_world / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
    else:
        path = folder_of_world / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_inner": 96}))
    texts = ["prompt={} is", "subject=Gavaria", "target=Praminster"]
    assert said in complaint(monkeypatch, capsys, "edit", f"model={folder_of_world}", *texts)
