"""Edits that are whole matrices: what they will keep is said, and refused where there is no room for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata.benchmarks.bench.patch_room import check_room
from errata.benchmarks.runs import environment
from errata.editors import FTM, ROME
from errata.editors.core.errors import ConfigError, StorageWarning
from errata.editors.core.request import EditRequest

GIB = 2**30


def bench(protocol: str, *, edits: int = 100, batch_size: int = 10, each: int | None = GIB) -> Any:
    config = SimpleNamespace(protocol=SimpleNamespace(name=protocol), batch_size=batch_size)
    editor = SimpleNamespace(name="ft_m", patch_bytes=lambda: each)
    return SimpleNamespace(config=config, editor=editor, cases=[None] * edits, model=torch.nn.Linear(1, 1), log=None)


@pytest.mark.parametrize(("protocol", "kept"), [("sequential", 10), ("batch", 1), ("single", 10)])
def test_as_many_patches_are_counted_as_are_kept_at_a_time(
    protocol: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000 * GIB))
    monkeypatch.setattr(environment, "free_memory", lambda _: kept * GIB)
    with pytest.warns(StorageWarning, match=rf"1\.0 GiB per patch; {kept} at a time are {kept}\.0 GiB"):
        check_room(bench(protocol), tmp_path)
    monkeypatch.setattr(environment, "free_memory", lambda _: kept * GIB - 1)
    with pytest.raises(ConfigError, match=rf"are {kept}\.0 GiB, and the memory has .* left; give another batch_size"):
        check_room(bench(protocol), tmp_path)


def test_only_a_sequence_needs_the_disk_and_small_updates_need_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(environment, "free_memory", lambda _: 1000 * GIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_room(bench("sequential", each=None), tmp_path)
        check_room(bench("single", each=1), tmp_path)
    with pytest.raises(ConfigError, match="the disk has"):
        check_room(bench("sequential", each=1), tmp_path)


def test_the_bytes_that_are_foretold_are_those_of_the_patch(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    editor = FTM(model, tiny_tokenizer, {"layers": [0, 1], "num_steps": 1})
    (edit,) = editor.compute([EditRequest("The capital of {} is", subject="Varland", target="Oslen")])
    assert editor.patch_bytes() == sum(tensor.nbytes for _, tensor in edit.patch.tensors)
    assert ROME.patch_bytes(editor) is None  # type: ignore[arg-type]
    assert environment.free_memory(model) is None or environment.free_memory(model) > 0  # type: ignore[operator]
