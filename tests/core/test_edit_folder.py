"""Edits as folders: what is loaded has the bits of what was saved, damage is noticed, other models are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filled_ledgers import filled, noise

import errata
from errata.editors import ROME
from errata.editors.core.errors import DamagedEditsError, LedgerError, OtherBaseError
from errata.editors.core.files import jsonl
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.storage import edit_folder as edits_module
from errata.editors.core.storage import provenance
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.journal import Journal

REQUESTS = [
    EditRequest("The capital of {} is", "Varland", "Brast"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("{} lies in", "São Verão", "Northern Tarvos"),
]
DTYPES = (torch.float32, torch.bfloat16)


def rome(model: Any, tokenizer: Any) -> ROME:
    fields = {"layers": [1], "mom2_adjustment": False, "v_num_grad_steps": 3}
    return ROME(model, tokenizer, {**fields, "context_template_length_params": [[3, 2]]})


@pytest.fixture
def saved(open_ledger: Any, tmp_path: Path) -> Path:
    """A folder of six edits."""
    return errata.save_edits(filled(open_ledger(torch.float32), 6).model, tmp_path / "edits")


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_what_is_loaded_has_the_bits_that_were_saved_and_is_undone_to_the_untouched_bytes(
    make_tiny: Any, tiny_tokenizer: Any, digest: Any, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    saver, untouched = make_tiny(architecture, dtype=dtype), digest(make_tiny(architecture, dtype=dtype))
    editor = rome(saver, tiny_tokenizer)
    first, second = editor.apply(REQUESTS[0]), editor.apply(REQUESTS[1:])
    errata.save_edits(saver, tmp_path / "all", tokenizer=tiny_tokenizer)
    other = make_tiny(architecture, dtype=dtype)
    ledger = errata.load_ledger(tmp_path / "all", other, tiny_tokenizer)
    assert digest(other) == digest(saver) != untouched
    ids = torch.tensor([[5, 17, 30, 41]])
    assert torch.equal(other(ids).logits, saver(ids).logits)

    errata.edit_of(ledger.model, first.id).undo()
    first.undo()
    assert digest(other) == digest(saver) != untouched
    second.save(tmp_path / "second")
    errata.edit_of(ledger.model, second.id).undo()
    assert digest(other) == untouched
    loaded = errata.load_edit(tmp_path / "second", other)
    assert digest(other) == digest(saver)
    assert (loaded.id, loaded.requests, loaded.config, loaded.diagnostics) == (
        second.id,
        second.requests,
        json.loads(json.dumps(second.config)),
        second.diagnostics,
    )
    loaded.undo()
    assert digest(other) == untouched


def test_an_edit_out_of_a_thousand_is_saved_by_itself(open_ledger: Any, digest: Any, tmp_path: Path) -> None:
    ledger, other = filled(open_ledger(torch.float32), 1000), open_ledger(torch.float32)
    untouched, edited = digest(other.model), digest(ledger.model)
    errata.save_edits(ledger.model, tmp_path / "all")
    errata.edit_of(ledger.model, "edit 500").save(tmp_path / "one")
    errata.load_edit(tmp_path / "one", other.model)
    assert digest(other.model) != untouched
    assert [entry.id for entry in other.entries] == ["edit 500"]
    other.clear()
    loaded = errata.load_edit(tmp_path / "all", other.model, id="edit 500")
    loaded.undo()
    assert digest(other.model) == untouched
    assert digest(errata.load_ledger(tmp_path / "all", other.model).model) == edited
    errata.edit_of(ledger.model, "edit 500").undo()
    errata.edit_of(other.model, "edit 500").undo()
    assert digest(other.model) == digest(ledger.model) != edited
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "README.md",
        "manifest.json",
        "edits.jsonl",
        "edits-00000.blocks",
    }


def test_a_loaded_edit_lies_on_top_of_those_that_the_model_carries(open_ledger: Any, digest: Any, saved: Path) -> None:
    ledger, other = open_ledger(torch.float32), open_ledger(torch.float32)
    for each in (ledger, other):
        filled(each, 6)
        each.remove("edit 2")
    with pytest.raises(LedgerError, match="edit 0"):
        errata.load_ledger(saved, other.model)
    errata.load_edit(saved, other.model, id="edit 2")
    assert [entry.id for entry in other.entries][-1] == "edit 2"
    other.remove("edit 2")
    assert digest(other.model) == digest(ledger.model)


def test_the_journal_of_a_run_is_such_a_folder(open_ledger: Any, digest: Any, tmp_path: Path) -> None:
    live, other = open_ledger(torch.float32), open_ledger(torch.float32)
    journal = Journal.open(tmp_path / "journal", {"name": "tiny", "revision": None})
    for entry in filled(live, 3).entries:
        journal.append(entry, {}, live)
    journal.append(None, {"reason": "refused"}, live)
    errata.load_ledger(tmp_path / "journal", other.model)
    assert digest(other.model) == digest(live.model)
    written = Edits.read(tmp_path / "journal").write(tmp_path / "whole")
    other.clear()
    assert digest(errata.load_ledger(written, other.model).model) == digest(live.model)
    with pytest.raises(LedgerError, match="nothing can be appended"):
        Journal.open(written, {"name": "tiny", "revision": None})


def test_tensors_lie_in_fresh_aligned_memory(saved: Path) -> None:
    tensors = [tensor for entry in Edits.read(saved).entries for _, tensor in entry.patch.tensors]
    assert len(tensors) == 12
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in tensors)


def test_many_blocks_go_into_several_files(
    open_ledger: Any, digest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edits_module, "FILE_BYTES", 2000)
    ledger, other = filled(open_ledger(torch.float32), 9), open_ledger(torch.float32)
    errata.save_edits(ledger.model, tmp_path / "edits")
    assert 2 < len(list((tmp_path / "edits").glob("*.blocks"))) < 9
    assert digest(errata.load_ledger(tmp_path / "edits", other.model).model) == digest(ledger.model)


def test_the_same_edits_give_the_same_files(open_ledger: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        errata.save_edits(filled(open_ledger(torch.float32), 3).model, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_cut_is_noticed_by_file(saved: Path, trials: Any) -> None:
    rng, count = random.Random(0), trials(120)
    whole = {path.name: path.read_bytes() for path in saved.iterdir() if path.name != "README.md"}
    noticed = 0
    for trial in range(count):
        name = rng.choice(sorted(whole))
        content = bytearray(whole[name])
        if trial % 3:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        (saved / name).write_bytes(bytes(content))
        with pytest.raises(DamagedEditsError) as caught:
            Edits.read(saved)
        assert caught.value.path == saved / name
        assert str(caught.value.path) in str(caught.value)
        noticed += 1
        (saved / name).write_bytes(whole[name])
    assert noticed == count
    assert len(Edits.read(saved)) == 6


def test_damage_to_a_tensor_names_its_edit(saved: Path) -> None:
    path = saved / "edits-00000.blocks"
    line = jsonl.read(saved / "edits.jsonl").records[3]
    content = bytearray(path.read_bytes())
    content[line["start"] + line["bytes"] - 1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedEditsError, match=r"edits-00000\.blocks, record 3 \(edit 3\)") as caught:
        Edits.read(saved)
    assert (caught.value.record, caught.value.id) == (3, "edit 3")


@pytest.mark.parametrize("name", ["manifest.json", "edits.jsonl", "edits-00000.blocks"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DamagedEditsError, match=name):
        Edits.read(saved)


def _swapped(rows: list[bytes]) -> list[bytes]:
    return [rows[1], rows[0], *rows[2:]]


ARRANGED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "swapped": (_swapped, 0),
    "repeated in place of another": (lambda rows: [*rows[:2], rows[1], *rows[3:]], 2),
    "repeated at the end": (lambda rows: [*rows, rows[-1]], 6),
    "dropped in the middle": (lambda rows: [*rows[:2], *rows[3:]], 2),
    "dropped at the end": (lambda rows: rows[:-1], 5),
    "all dropped": (lambda _: [], 0),
}


@pytest.mark.parametrize("kind", ARRANGED)
def test_records_that_are_whole_but_not_where_they_were_are_noticed(saved: Path, kind: str) -> None:
    arrange, record = ARRANGED[kind]
    path = saved / "edits.jsonl"
    path.write_bytes(b"".join(arrange(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(DamagedEditsError, match=r"edits\.jsonl") as caught:
        Edits.read(saved)
    assert caught.value.record == record


def test_a_record_of_another_folder_is_noticed(saved: Path, open_ledger: Any, tmp_path: Path) -> None:
    ledger = filled(open_ledger(torch.float32), 6)
    entry = errata.edit_of(ledger.model, "edit 3")
    entry.diagnostics[0]["note"] = "changed"
    errata.save_edits(ledger.model, tmp_path / "other")
    rows, others = ((folder / "edits.jsonl").read_bytes().splitlines(True) for folder in (saved, tmp_path / "other"))
    assert rows[3] != others[3]
    rows[3] = others[3]
    (saved / "edits.jsonl").write_bytes(b"".join(rows))
    with pytest.raises(DamagedEditsError, match="holds other records than its manifest states"):
        Edits.read(saved)


def test_a_damaged_folder_leaves_the_model_alone(saved: Path, ledger: Ledger, state: Any) -> None:
    path = saved / "edits-00000.blocks"
    path.write_bytes(path.read_bytes()[:-1])
    before = state(ledger)
    with pytest.raises(DamagedEditsError):
        errata.load_ledger(saved, ledger.model)
    assert state(ledger) == before


# --- other models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(make_tiny: Any) -> Iterator[Callable[..., Any]]:
    """`hub(name, commit)`: a model as it comes from the Hub."""
    models = []

    def make(name: str, commit: str | None = None, **options: Any) -> Any:
        models.append(make_tiny("gpt2", n_layers=2, **options))
        models[-1].config._commit_hash = commit
        provenance.remember_source(models[-1], name, None)
        return models[-1]

    yield make
    models.clear()


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"name": "org/b"}, "its id was org/a and is org/b"),
    "revision": ({"commit": "2222"}, "its revision was 1111 and is 2222"),
    "bytes": ({"seed": 1}, "another transformer.h.0.mlp.c_proj.weight (other bytes)"),
    "precision": (
        {"dtype": torch.bfloat16},
        "another transformer.h.0.mlp.c_proj.weight (float32 128x32 there, bfloat16 128x32 here)",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_base_is_refused_with_what_differs_and_force_overrides(
    hub: Any, state: Any, tmp_path: Path, kind: str
) -> None:
    changes, said = OTHERS[kind]
    model = hub("org/a", "1111")
    errata.save_edits(filled(Ledger.of(model), 3).model, tmp_path / "edits")
    other = Ledger.of(hub(**{"name": "org/a", "commit": "1111", **changes}))
    before = state(other)
    with pytest.raises(OtherBaseError) as caught:
        errata.load_ledger(tmp_path / "edits", other.model)
    assert said in caught.value.differences
    assert said in str(caught.value)
    assert ("have the same bytes" in str(caught.value)) == (kind in ("id", "revision"))
    assert state(other) == before
    assert len(errata.load_ledger(tmp_path / "edits", other.model, force=True)) == 3
    again = filled(Ledger.of(hub("org/a", "1111")), 0)
    assert len(errata.load_ledger(tmp_path / "edits", again.model)) == 3


def test_one_changed_bit_of_a_touched_weight_is_another_base_and_of_an_untouched_one_is_not(
    hub: Any, tmp_path: Path
) -> None:
    errata.save_edits(filled(Ledger.of(hub("org/a")), 1).model, tmp_path / "edits")
    model = hub("org/a")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_proj.weight")[3, 4] *= 2
    Edits.read(tmp_path / "edits").check(model)
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_proj.weight")[3, 4].nextafter_(torch.tensor(9.0))
    with pytest.raises(OtherBaseError, match=r"h\.0\.mlp"):
        Edits.read(tmp_path / "edits").check(model)


def test_a_model_of_other_shapes_is_refused_even_by_force(hub: Any, make_tiny: Any, state: Any, tmp_path: Path) -> None:
    errata.save_edits(filled(Ledger.of(hub("org/a")), 1).model, tmp_path / "edits")
    llama = Ledger.of(model := make_tiny("llama"))
    before = state(llama)
    for force in (False, True):
        with pytest.raises(LedgerError, match=r"transformer\.h"):
            errata.load_ledger(tmp_path / "edits", model, force=force)
        assert state(llama) == before


def test_a_folder_of_the_model_elsewhere_is_told_by_its_bytes(hub: Any, tmp_path: Path) -> None:
    errata.save_edits(filled(Ledger.of(hub("org/a", "1111")), 2).model, tmp_path / "edits")
    assert len(errata.load_ledger(tmp_path / "edits", model := hub("/models/a"))) == 2
    assert errata.save_edits(model, tmp_path / "again")
    assert Edits.read(tmp_path / "again").model["name"] == "/models/a"


def test_another_tokenizer_is_noticed_where_it_is_known(
    hub: Any, tiny_tokenizer: Any, tiny_tokenizer_bos: Any, tmp_path: Path
) -> None:
    ledger = filled(Ledger.of(model := hub("org/a")), 1)
    errata.save_edits(ledger.model, tmp_path / "edits", tokenizer=tiny_tokenizer)
    ledger.clear()
    with pytest.raises(OtherBaseError, match="another tokenizer"):
        errata.load_edit(tmp_path / "edits", model, tiny_tokenizer_bos)
    assert errata.load_edit(tmp_path / "edits", model, tiny_tokenizer).is_applied


def test_the_bundled_model_is_known_by_its_name_and_not_by_a_folder_of_this_machine(tmp_path: Path) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    (edit,) = rome(model, tokenizer).compute(EditRequest("The capital of {} is", "Gavaria", "Praminster"))
    edit.save(tmp_path / "edit")
    assert not edit.is_applied
    assert Edits.read(tmp_path / "edit").model == {"name": "world", "revision": None}
    written = b"".join(path.read_bytes() for path in (tmp_path / "edit").iterdir())
    assert str(Path(errata.__file__).parent).encode() not in written


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_card_names_the_model_the_facts_and_the_weights_and_markup_in_a_fact_is_text(
    hub: Any, tmp_path: Path
) -> None:
    ledger = Ledger.of(hub("org/a", "1111"))
    request = EditRequest("a | b\n<b> {} is", "x_y", "*z*", id="1")
    patch = Patch({"transformer.h.0.mlp.c_proj.weight": LowRank(noise(32, 1, seed=0), noise(1, 128, seed=1))})
    ledger.append("e", patch, EditInfo("rome", (request,), diagnostics=({},)))
    edit = errata.edit_of(ledger.model, "e")
    edit.save(tmp_path / "edit", notes={"scores": {"1": {"before": 0.01, "after": 0.98}}})
    card = (tmp_path / "edit" / "README.md").read_text(encoding="utf-8")
    assert "base_model: org/a\n" in card.split("---")[1]
    for said in (
        "# 1 edit of org/a\n",
        "revision `1111`",
        "| a \\| b \\<b> x\\_y is | \\*z\\* |  | rome | 0.010 → 0.980 |",
        "`transformer.h.0.mlp.c_proj.weight` (float32 128x32)",
        "errata.load('org/a', revision='1111')",
    ):
        assert said in card, said


@pytest.mark.parametrize("name", ["/home/me/models/a", "./models/a", "models/b/a"])
def test_a_card_does_not_say_where_a_model_lies(hub: Any, tmp_path: Path, name: str) -> None:
    errata.save_edits(filled(Ledger.of(hub(name)), 1).model, tmp_path / "edits")
    card = (tmp_path / "edits" / "README.md").read_text(encoding="utf-8")
    assert "# 1 edit of a\n" in card
    assert "models" not in card.replace("other models", "")
    assert "base_model" not in card


def test_the_python_of_a_card_runs(tmp_path: Path) -> None:
    model, tokenizer = errata.load("world", device="cpu")
    (edit,) = rome(model, tokenizer).compute(EditRequest("The capital of {} is", "Gavaria", "Praminster"))
    edit.apply().save(tmp_path / "edit")
    card = (tmp_path / "edit" / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "edit")), names)
    assert names["edit"].id == edit.id
    assert not names["edit"].is_applied
