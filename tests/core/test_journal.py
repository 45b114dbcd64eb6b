"""Edits on disk: what is read back gives the same bits, damage to any byte is noticed, and appending costs an edit."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.core.errors import DamagedEditsError, LedgerError
from errata.editors.core.files import jsonl
from errata.editors.core.ledger.entry import EditInfo, Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.editors.core.storage import journal as journal_module
from errata.editors.core.storage.journal import Journal

DOWN, SQUARE = "transformer.h.0.mlp.c_proj.weight", "transformer.h.1.attn.c_proj.weight"
MODEL = {"name": "tiny", "revision": None}
EMPTY = {"order": 0, "id": "x", "notes": {}, "meta": {}, "updates": {}, "adapters": {}, "state": []}
INFO = EditInfo("made up", diagnostics=({"loss": 0.1 + 0.2},))


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def patch(seed: int) -> Patch:
    """Factors of ranks 1 to 3; every third touches a second weight, densely."""
    rank = 1 + seed % 3
    factors = LowRank(noise(32, rank, seed=seed), noise(rank, 128, seed=seed + 1))
    return Patch({DOWN: factors} | ({SQUARE: Dense(noise(32, 32, seed=seed))} if seed % 3 == 0 else {}))


def state(seed: int) -> dict[str, torch.Tensor]:
    """Transposed, as a method may hand it in, and of an odd number of bytes before it."""
    return {"a": noise(3, seed=seed, dtype=torch.bfloat16), "keys.0": noise(5, 32, seed=seed).T}


def written(folder: Path, ledger: Ledger, count: int) -> Journal:
    """A journal of `count` edits, which the ledger carries."""
    journal = Journal.open(folder, MODEL)
    for seed in range(count):
        entry = ledger.append(f"edit {seed}", patch(seed), INFO, state=state(seed))
        journal.append(entry, {"seed": seed}, ledger)
    return journal


def entries(journal: Journal) -> list[Entry]:
    return [record.entry for record in journal.records() if record.entry is not None]


def same(left: Entry, right: Entry) -> bool:
    pairs = [(left.state[name], right.state[name]) for name in left.state]
    for name, update in left.patch.updates.items():
        pairs += zip(update.tensors, right.patch.updates[name].tensors, strict=True)
    return (left.id, left.info) == (right.id, right.info) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in pairs
    )


# --- bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_journal_gives_the_weights_bit_for_bit_and_entries_that_can_be_undone(
    dtype: torch.dtype, open_ledger: Any, digest: Callable[[Any], str], tmp_path: Path
) -> None:
    live, replayed = open_ledger(dtype), open_ledger(dtype)
    written(tmp_path, live, 70)
    journal = Journal(tmp_path)
    journal.check(replayed)
    replayed.extend(entries(journal)[:40])
    replayed.extend(entries(journal)[40:])
    assert digest(replayed.model) == digest(live.model)
    assert all(same(a, b) for a, b in zip(live.entries, replayed.entries, strict=True))
    for ledger in (live, replayed):
        ledger.remove_many(["edit 3", "edit 66"])
        ledger.append("another", patch(100))
    assert digest(replayed.model) == digest(live.model)
    replayed.clear()
    assert digest(replayed.model) == digest(open_ledger(dtype).model)


def test_what_is_read_back_lies_in_fresh_aligned_memory(ledger: Ledger, tmp_path: Path) -> None:
    written(tmp_path, ledger, 4)
    read = [
        t for entry in entries(Journal(tmp_path)) for t in (*entry.state.values(), *entry.patch.updates[DOWN].tensors)
    ]
    assert len(read) == 16
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in read)


def test_many_edits_are_put_on_as_one_or_not_at_all(
    open_ledger: Any, digest: Callable[[Any], str], tmp_path: Path
) -> None:
    ledger, other = open_ledger(torch.float32), open_ledger(torch.float32)
    written(tmp_path, ledger, 5)
    found = entries(Journal(tmp_path))
    other.append("edit 4", patch(4))
    before = digest(other.model)
    with pytest.raises(LedgerError, match="edit 4"):
        other.extend(found)
    assert (digest(other.model), len(other)) == (before, 1)
    with pytest.raises(LedgerError, match="edit 0"):
        other.extend([found[0], found[0]])


def test_refused_edits_keep_their_place_and_carry_no_tensors(ledger: Ledger, tmp_path: Path) -> None:
    journal = written(tmp_path, ledger, 2)
    journal.append(None, {"reason": "NumericalError: injected"}, ledger)
    journal.append(ledger.append("last", patch(9)), {}, ledger)
    found = list(Journal(tmp_path).records())
    assert [record.entry is None for record in found] == [False, False, True, False]
    assert found[2].notes == {"reason": "NumericalError: injected"}
    assert [record.order for record in found] == [0, 1, 2, 3]


def test_the_same_edits_give_the_same_files(open_ledger: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, open_ledger(torch.float32), 5)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# --- disk ---------------------------------------------------------------------------------------------------------


def test_appending_writes_the_edit_and_nothing_else(ledger: Ledger, tmp_path: Path) -> None:
    journal, sizes = written(tmp_path, ledger, 1), []
    update = Patch({DOWN: LowRank(noise(32, 1, seed=0), noise(1, 128, seed=1))})
    for place in range(100):
        before = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
        journal.append(ledger.append(f"e{place:03}", update), {}, ledger)
        after = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
        assert after.keys() == before.keys() == {"manifest.json", "edits.jsonl", "edits-00000.blocks"}
        assert after["manifest.json"] == before["manifest.json"]
        sizes.append(sum(size for size, _ in after.values()) - sum(size for size, _ in before.values()))
    factors = 4 * (32 + 128)
    assert factors < max(sizes) < factors + 1000, "an edit costs its factors and less than a kilobyte"
    assert max(sizes) - min(sizes) < 20


def test_files_of_blocks_are_few_and_begin_anew_when_they_have_grown(
    open_ledger: Any, digest: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "FILE_BYTES", 20_000)
    live, replayed = open_ledger(torch.float32), open_ledger(torch.float32)
    written(tmp_path, live, 20)
    assert 2 < len(list(tmp_path.glob("*.blocks"))) < 10
    replayed.extend(entries(Journal.open(tmp_path, MODEL)))
    assert digest(replayed.model) == digest(live.model)


@pytest.mark.parametrize("survived", [0, 1, 4])
def test_what_a_kill_leaves_of_an_edit_is_cut_off_at_every_length(
    survived: int, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "FILE_BYTES", 10_000)
    written(tmp_path, ledger, survived)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    journal = Journal.open(tmp_path, MODEL)
    journal.append(ledger.append("the last", patch(7), INFO), {}, ledger)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = len(after["edits.jsonl"]) - len(before.get("edits.jsonl", b""))
    blocks = max(name for name in after if name.endswith(".blocks"))
    for length in (*range(0, line, 37), line - 1):
        (tmp_path / "edits.jsonl").write_bytes(before.get("edits.jsonl", b"") + after["edits.jsonl"][-line:][:length])
        (tmp_path / blocks).write_bytes(after[blocks][: -1 - length] if length % 2 else after[blocks])
        again = Journal.open(tmp_path, MODEL)
        assert len(list(again.records())) == survived
        again.append(ledger.entries[-1], {}, ledger)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == after


# --- damage -------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def shorten(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def zero_page(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(0, len(data), 512)
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    return data


MUTATIONS = (flip, shorten, zero_page)


def test_every_damaged_journal_is_noticed_and_gives_up_no_more_than_what_follows(
    ledger: Ledger,
    tmp_path: Path,
    trials: Callable[..., int],
    tried: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    written(tmp_path, ledger, 6)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rng, count, noticed = random.Random(0), trials(60, 1000), 0
    for trial in range(count):
        name, mutation = rng.choice(sorted(whole)), MUTATIONS[trial % len(MUTATIONS)]
        for path in tmp_path.iterdir():
            path.unlink()
        for each, content in whole.items():
            (tmp_path / each).write_bytes(content)
        damaged = bytes(mutation(bytearray(whole[name]), rng))
        assert damaged != whole[name]
        (tmp_path / name).write_bytes(damaged)
        caplog.clear()
        try:
            kept = [record.entry for record in Journal.open(tmp_path, MODEL).recover()]
        except DamagedEditsError:
            assert name == "manifest.json"
            noticed += 1
            continue
        # What is left are whole edits, bit for bit, and they can be read and added to.
        assert len(kept) < 6, (name, mutation)
        assert all(entry is not None and same(entry, was) for entry, was in zip(kept, ledger.entries, strict=False))
        assert len(entries(Journal(tmp_path))) == len(kept)
        aside = tmp_path / "edits.jsonl.damaged"
        # A file that ends early between two lines, or within its last, is what a kill leaves as well.
        assert aside.exists() is ("set aside" in caplog.text)
        assert aside.exists() or (name == "edits.jsonl" and whole[name].startswith((tmp_path / name).read_bytes()))
        noticed += 1
    tried(6, count, noticed=noticed)
    assert noticed == count


def test_safetensors_alone_would_not_notice(ledger: Ledger, tmp_path: Path) -> None:
    """The control: without our digests a flipped byte of a block is read as another number."""
    from safetensors.torch import load

    written(tmp_path, ledger, 1)
    content = bytearray((tmp_path / "edits-00000.blocks").read_bytes())
    before = load(bytes(content))
    content[-1] ^= 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in load(bytes(content)).items())


def test_a_block_is_a_safetensors_file_with_readable_names(ledger: Ledger, tmp_path: Path) -> None:
    from safetensors.torch import load

    written(tmp_path, ledger, 2)
    line = jsonl.parse((tmp_path / "edits.jsonl").read_bytes().splitlines()[1])
    content = (tmp_path / line["file"]).read_bytes()[line["start"] : line["start"] + line["bytes"]]
    assert set(load(content)) == {f"1/update/{DOWN}/U", f"1/update/{DOWN}/V", "1/state/a", "1/state/keys.0"}


# --- what is refused ----------------------------------------------------------------------------------------------


def test_edits_of_another_model_are_refused_by_the_name_of_the_weight(
    ledger: Ledger, make_tiny: Any, tmp_path: Path
) -> None:
    written(tmp_path, ledger, 1)
    stranger = make_tiny("gpt2", n_layers=2, seed=1)
    with pytest.raises(LedgerError, match=DOWN.replace(".", r"\.")):
        Journal(tmp_path).check(Ledger.of(stranger))
    Journal(tmp_path).check(ledger)  # edited as it is, the ledger knows its base
    with pytest.raises(LedgerError, match="another"):
        Journal.open(tmp_path, {**MODEL, "name": "another"})


def test_a_later_format_and_a_folder_without_manifest_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    written(tmp_path, ledger, 1)
    path = tmp_path / "manifest.json"
    manifest = jsonl.parse(path.read_bytes())
    path.write_bytes(jsonl.render({**manifest, "version": 99}))
    with pytest.raises(LedgerError, match="99"):
        Journal(tmp_path)
    path.unlink()
    for reader in (Journal, lambda folder: Journal.open(folder, MODEL)):
        with pytest.raises(DamagedEditsError, match="manifest"):
            reader(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        {"order": 0},
        {"order": 0, "id": "x", "notes": {}},
        {**EMPTY, "file": 3},
        {**EMPTY, "file": "../../../etc/passwd", "start": 0, "bytes": 10, "sha256": "0"},
    ],
)
def test_a_line_that_is_no_edit_is_damage_and_no_traceback(tmp_path: Path, line: dict[str, Any]) -> None:
    Journal.open(tmp_path, MODEL)
    jsonl.append(tmp_path / "edits.jsonl", line)
    with pytest.raises(DamagedEditsError):
        list(Journal(tmp_path).records())


def test_a_full_disk_leaves_the_journal_as_it_was(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path, ledger, 2)
    entry = ledger.append("more", patch(5))
    for failing in (1, 2):
        calls = []

        def full(_handle: int, failing: int = failing, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                journal.append(entry, {}, ledger)
        assert len(entries(Journal(tmp_path))) == 2
        assert len(entries(Journal.open(tmp_path, MODEL))) == 2
    journal.append(entry, {}, ledger)
    assert len(entries(Journal(tmp_path))) == 3


# --- lines --------------------------------------------------------------------------------------------------------


def test_a_line_is_json_with_its_digest_and_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"a": "é\n\u2028", "b": [0.1 + 0.2, None]}, {"digest of": 3}]
    for row in rows:
        jsonl.append(path, row)
    assert jsonl.read(path).records == rows
    assert [json.loads(line).keys() for line in path.read_text().splitlines()] == [
        {"a", "b", "digest"},
        {"digest of", "digest"},
    ]
    for refused in ({}, {"digest": 1}):
        with pytest.raises(ValueError, match="digest"):
            jsonl.append(path, refused)
