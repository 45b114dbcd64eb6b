"""An update far larger than its weight is refused on every way into a model, and accepted where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import METHODS, REQUESTS, build

from errata import editors
from errata.editors.core.config import NORM_LIMITS, EditorConfig, norm_limit
from errata.editors.core.edit import Edit
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.loading import load_edit, load_ledger, save_edits
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.journal import Journal
from errata.testing.laws import digest

DOWN = "transformer.h.1.mlp.c_proj.weight"


def scaled(editor: Editor, ratio: float, seed: int = 0, **config: Any) -> Edit:
    """An edit whose update has `ratio` times the norm of the untouched weight."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(32, 1, generator=generator), torch.randn(1, 128, generator=generator)
    u *= ratio * float(editor.ledger.base(DOWN).norm()) / float(u.norm() * v.norm())
    settings = editor.config.to_dict() | config
    return Edit(editor.name, REQUESTS[:1], Patch({DOWN: LowRank(u, v)}), ({},), settings, editor.model)


def from_a_folder(edit: Edit, folder: Path) -> Path:
    return edit.save(folder / "edit")  # saving an edit does not apply it


def from_a_journal(edit: Edit, folder: Path, _: float | None) -> None:
    journal = Journal.open(folder / "journal", {"name": "tiny"})
    ledger = Ledger.of(edit.model)
    journal.append(edit.entry(), {}, ledger)
    ledger.extend(record.entry for record in Journal(folder / "journal").recover() if record.entry)


# (edit, folder, limit or None) -> None. The limit is that of the edit's own configuration where there is no argument.
WAYS: dict[str, Callable[[Edit, Path, float | None], object]] = {
    "apply": lambda edit, _folder, _limit: edit.apply(),
    "load_edit": lambda edit, folder, limit: load_edit(from_a_folder(edit, folder), edit.model, max_norm_ratio=limit),
    "load_ledger": lambda edit, folder, limit: load_ledger(
        from_a_folder(edit, folder), edit.model, max_norm_ratio=limit
    ),
    "Edits.apply_to": lambda edit, folder, limit: Edits.read(from_a_folder(edit, folder)).apply_to(
        edit.model, max_norm_ratio=limit
    ),
    "a journal": from_a_journal,
}


@pytest.fixture
def editor(make_tiny: Any, tiny_tokenizer: Any) -> Editor:
    return build("rome", make_tiny("gpt2"), tiny_tokenizer)


@pytest.mark.parametrize("ratio", [30_000.0, 1e31])
@pytest.mark.parametrize("way", WAYS)
def test_an_exploded_update_is_refused_on_every_way_in(editor: Editor, tmp_path: Path, way: str, ratio: float) -> None:
    before = digest(editor.model)
    edit = scaled(editor, ratio)
    with pytest.raises(NumericalError, match=r"more than 1e\+03 times the weight's .* raise max_norm_ratio"):
        WAYS[way](edit, tmp_path, None)
    assert digest(editor.model) == before
    assert len(editor.ledger) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_field_or_an_argument_raises_the_limit(editor: Editor, tmp_path: Path, way: str) -> None:
    by_field = scaled(editor, 30_000.0, max_norm_ratio=1e5)
    WAYS[way](by_field, tmp_path, None)
    assert by_field.is_applied
    by_field.undo()
    if way.startswith(("load", "Edits")):
        by_argument = scaled(editor, 30_000.0, seed=1)
        WAYS[way](by_argument, tmp_path / "argument", 1e5)
        assert by_argument.is_applied


def test_what_a_method_computes_is_refused_with_apply_and_with_compute(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = editor.targets  # type: ignore[attr-defined]

    def exploded(*args: Any) -> Any:
        found = search(*args)
        for target in found:
            target.delta *= 1e6
        return found

    monkeypatch.setattr(editor, "targets", exploded)
    before = digest(editor.model)
    with pytest.raises(NumericalError, match="raise max_norm_ratio"):
        editor.apply(REQUESTS[0])
    with pytest.raises(NumericalError, match="raise max_norm_ratio"):
        editor.apply(REQUESTS)  # one after another inside a transaction
    (edit,) = editor.compute(REQUESTS[0])
    with pytest.raises(NumericalError, match="raise max_norm_ratio"):
        edit.apply()
    assert digest(editor.model) == before


def test_edits_that_grow_one_after_another_are_loaded_as_they_were_made(editor: Editor, tmp_path: Path) -> None:
    """Each is compared with the weight that it was added to, and not with the weight before all of them."""
    for step in range(1, 4):
        scaled(editor, 500.0**step, seed=step).apply()
    edited = digest(editor.model)
    folder = save_edits(editor.model, tmp_path / "edits")
    editor.rollback()
    load_ledger(folder, editor.model)
    assert digest(editor.model) == edited


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_limit_that_its_default_means(method: str) -> None:
    config = editors.get(method).Config().to_dict()
    assert norm_limit(method, config) == NORM_LIMITS.get(method, 1000.0)
    assert norm_limit(method, config | {"max_norm_ratio": 2e6}) == 2e6
    assert norm_limit("", {}) == EditorConfig.max_norm_ratio


@pytest.mark.parametrize("value", ["1e9", True, 0, -1.0, float("nan"), float("inf")])
def test_a_limit_in_a_file_that_is_no_number_above_zero_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_norm_ratio: expected a number above 0"):
        norm_limit("rome", {"max_norm_ratio": value})
