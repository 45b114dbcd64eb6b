"""Files that are meant to hurt: every reader gives its own error, soon, and with memory for the file alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save, save_file

from errata.benchmarks.bench.compose import read_mapping
from errata.benchmarks.convert import hparams, statistics
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.facts import fact_file
from errata.benchmarks.runs import results, run_status, sweeps
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.status import survey
from errata.editors.core.errors import DamagedEditsError, ErrataError, StatisticsError
from errata.editors.core.files import jsonl, matrix_file, plain_files
from errata.editors.core.files.matrix_file import MatrixFile
from errata.editors.core.files.tensor_cache import DamagedEntryError, TensorCache
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import read_texts
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.storage import record_format
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.journal import Journal

SECONDS = 5.0  # of the processor; what is right takes a tenth of one, and the first model of a test two
DEEP = "[" * 200_000
Reader = Callable[[Path], Any]

READERS: dict[str, tuple[str, Reader]] = {
    "counterfact": ("x.json", lambda path: datasets.load("counterfact", path)),
    "zsre": ("x.json", lambda path: datasets.load("zsre", path)),
    "easyedit": ("x.json", lambda path: datasets.load("easyedit", path)),
    "facts.yaml": ("x.yaml", fact_file.read),
    "facts.jsonl": ("x.jsonl", fact_file.read),
    "facts.csv": ("x.csv", fact_file.read),
    "hparams.yaml": ("x.yaml", hparams.read),
    "mapping.json": ("x.json", read_mapping),
    "edits": ("manifest.json", lambda path: Edits.read(path.parent)),
    "journal": ("manifest.json", lambda path: Journal.open(path.parent, {"name": None, "revision": None})),
    "matrices": ("x.safetensors", lambda path: MatrixFile.open(path, "moments")),
    "projectors": ("x.safetensors", lambda path: statistics._arrays(path)),
    "statistics": ("x.npz", lambda path: statistics._arrays(path)),
    "cache": ("ab.json", lambda path: TensorCache(path.parent).load("ab")),
    "results": ("results.json", results.read_results),
    "texts": ("x.jsonl", read_texts),
    "texts.gz": ("x.jsonl.gz", read_texts),
    "settings": ("errata.json", lambda path: read_model_settings(path.parent)),
}
# What is not a file of ours is none: these say None, since others may write into a folder of runs.
QUIET: dict[str, tuple[str, Reader]] = {
    "plan": ("plan.json", lambda path: sweeps.Sweep.read(path.parent)),
    "mark": ("run.json", run_status.read),
}


@pytest.fixture(autouse=True)
def soon() -> Any:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def refuses(reader: str, path: Path) -> None:
    if reader in QUIET:
        assert QUIET[reader][1](path) is None
        return
    with pytest.raises(ErrataError) as caught:
        READERS[reader][1](path)
    assert path.name in str(caught.value)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def nested(path: Path) -> None:
    content = DEEP.encode()
    if path.name == "manifest.json":  # with a digest that is right: anyone can compute it
        body = b'{"x": ' + content
        content = body + f', "digest": "{hashlib.sha256(body).hexdigest()[:16]}"}}\n'.encode()
    if path.suffix == ".safetensors":
        save_file({"0": torch.eye(2)}, path, {"errata": DEEP})
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_brackets_in_brackets_are_refused_before_yaml_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "compose", None)
    for text in (DEEP, "facts:\n  - target: " + "[{ " * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            plain_files.compose_yaml(text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
@pytest.mark.parametrize("make", [pipe, endless, folder, nested])
@pytest.mark.parametrize("reader", [*READERS, *QUIET])
def test_every_reader_refuses_what_never_ends(tmp_path: Path, reader: str, make: Callable[[Path], None]) -> None:
    name = (READERS | QUIET)[reader][0]
    if make is nested and reader == "projectors":
        pytest.skip("it does not read what is nested")
    if make is folder and reader == "settings":
        pytest.skip("a folder of this name is no settings")
    if make in (pipe, endless) and reader == "settings":
        pytest.skip("what is no file is no settings")
    make(tmp_path / name)
    refuses(reader, tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
@pytest.mark.parametrize("name", ["edits.jsonl", "edits-00000.blocks"])
@pytest.mark.parametrize("make", [pipe, endless])
def test_no_file_inside_a_folder_of_edits_is_a_pipe(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    edits(tmp_path, [line(b"content")], b"content")
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ErrataError, match=name):
        Edits.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
def test_a_folder_of_runs_with_pipes_is_surveyed(tmp_path: Path) -> None:
    for name in ("run.json", "seconds.jsonl", "failed.json", "DONE"):
        (tmp_path / "run").mkdir(exist_ok=True)
        pipe(tmp_path / "run" / name)
    (state,) = survey(tmp_path).runs
    assert state.state == "stopped"
    assert not RunFolder(tmp_path / "run", "key").done
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"edits": "many", "command": 3}')
    (tmp_path / "other" / "seconds.jsonl").write_bytes(jsonl.render({"case": [1], "edit": "long"}))
    assert len(survey(tmp_path).runs) == 2


# --- compressed, repeated -----------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(b"[" + b" " * 300_000_000, 1)
    for name, reader in {
        "x.json": READERS["counterfact"][1],
        "x.jsonl.gz": read_texts,
        "y.json.gz": read_texts,
    }.items():
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(ErrataError, match="100 times"):
            reader(tmp_path / name)


def test_real_compressed_files_are_read(tmp_path: Path) -> None:
    rows = [{"text": "the same words again and again"}] * 20_000
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert len(read_texts(tmp_path / "x.jsonl.gz")) == 20_000


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


BOMB_OF_MAPS = "a0: &a0 {k: x}\n" + "".join(f"a{n}: &a{n} {{k: *a{n - 1}, l: *a{n - 1}}}\n" for n in range(1, 40))


@pytest.mark.parametrize("reader", ["facts.yaml", "hparams.yaml", "mapping.json"])
@pytest.mark.parametrize("text", [BOMB, BOMB_OF_MAPS, "a: &a [*a]\n"])
def test_an_alias_bomb_is_refused(tmp_path: Path, reader: str, text: str) -> None:
    path = tmp_path / READERS[reader][0]
    path.write_text(text)
    refuses(reader, path)


def test_aliases_of_people_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &base {lr: 0.1, layers: [1, 2]}\nown: *base\n")
    assert read_mapping(path)["own"] == {"lr": 0.1, "layers": [1, 2]}


def test_names_that_repeat_in_one_object_take_no_long_time(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{" + ", ".join(['"prompt": "x"'] * 100_000) + "}\n")
    with pytest.raises(ErrataError, match="given twice"):
        fact_file.read(path)


# --- edits --------------------------------------------------------------------------------------------------------


def line(block: bytes, **changes: Any) -> dict[str, Any]:
    said = {"order": 0, "id": "x", "notes": {}, "meta": {}, "updates": {"w": "dense"}, "adapters": {}, "state": []}
    place = {"file": "edits-00000.blocks", "start": 0, "bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()}
    return {**said, **place, **changes}


def edits(folder: Path, lines: list[dict[str, Any]], block: bytes) -> None:
    (folder / "edits-00000.blocks").write_bytes(block)
    (folder / "edits.jsonl").write_bytes(b"".join(map(jsonl.render, lines)))
    record_format.write_manifest(folder, {"model": {"name": None, "revision": None}, "base": {}})


WRONG = {
    "bytes": {"bytes": 2**70},
    "start": {"start": 2**70},
    "both": {"start": 2**62, "bytes": 2**62},
    "negative": {"start": -1},
    "count": {"bytes": -1},
    "fraction": {"bytes": 0.5},
    "truth": {"start": True},
    "text": {"start": "0"},
    "file": {"file": 3},
    "another folder": {"file": "../../etc/passwd"},
    "updates": {"updates": ["w"]},
    "adapters": {"adapters": {"m": {"kind": "codebook", "numbers": {}, "tensors": []}}},
    "kind": {"adapters": {"m": {"kind": [], "numbers": {}, "tensors": []}}},
    "requests": {"meta": {"requests": [{"prompt": {}}]}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_that_points_anywhere_is_refused(tmp_path: Path, wrong: str) -> None:
    block = save({"0/update/w/delta": torch.ones(2, 2)})
    edits(tmp_path, [line(block, **WRONG[wrong])], block)
    with pytest.raises(ErrataError, match=r"record 0|unknown kind"):
        Edits.read(tmp_path)
    # A run goes on: what is no edit of ours is cut off.
    journal = Journal.open(tmp_path, {"name": None, "revision": None})
    assert wrong in ("adapters", "kind") or list(journal.recover()) == []


@pytest.mark.parametrize(
    ("kind", "delta"),
    [
        *((kind, torch.tensor(1.0)) for kind in ("dense", "low_rank")),
        *((kind, torch.ones(2, 2, dtype=torch.int64)) for kind in ("dense", "low_rank")),
        *((kind, torch.ones(2, 2) * 1j) for kind in ("dense", "low_rank")),
        ("low_rank", torch.ones(3)),  # a dense update may be a vector, or have more dimensions than two
        ("low_rank", torch.ones(2, 2, 2)),
    ],
)
def test_an_update_that_is_no_matrix_is_refused(tmp_path: Path, delta: torch.Tensor, kind: str) -> None:
    names = ["delta"] if kind == "dense" else ["U", "V"]
    block = save({f"0/update/w/{name}": delta.clone() for name in names})
    edits(tmp_path, [line(block, updates={"w": kind})], block)
    with pytest.raises(DamagedEditsError, match="expected a matrix"):
        Edits.read(tmp_path)


def test_many_lines_that_share_one_block_are_refused(tmp_path: Path) -> None:
    block = save({"0/update/w/delta": torch.ones(1000, 1000)})
    one = line(block)
    edits(tmp_path, [{**one, "order": order} for order in range(5000)], block)
    with pytest.raises(DamagedEditsError, match="overlaps"):
        Edits.read(tmp_path)


# --- caches and matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", [{"other": torch.eye(64)}, {"moment": torch.ones(3)}, {"moment": torch.ones(2, 3)}, {}]
)
def test_a_moment_of_another_name_or_shape_is_computed_again(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, entry: dict[str, torch.Tensor], caplog: Any
) -> None:
    model, texts = make_tiny("gpt2"), ["The capital of land is Oslen."] * 3
    found = second_moments(model, tiny_tokenizer, [1], texts, cache_dir=tmp_path)
    name = found.meta["keys"][1]
    cache = TensorCache(tmp_path)
    good = cache.load(name)
    assert good is not None
    cache.store(name, entry, good.meta)
    again = second_moments(model, tiny_tokenizer, [1], texts, cache_dir=tmp_path)
    assert again.meta["computed"] == [1]
    assert torch.equal(again.matrices[1], found.matrices[1])
    assert "set aside" in caplog.text


@pytest.mark.parametrize(
    "change", [{"meta": None}, {"sha256": "../../../etc/pas"}, {"sha256": 3}, {"file": "/etc/passwd"}]
)
def test_a_manifest_of_a_cache_points_to_its_own_file(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = TensorCache(tmp_path)
    cache.store("ab", {"x": torch.ones(3)}, {})
    manifest = {**json.loads((tmp_path / "ab.json").read_text()), **change}
    del manifest["digest"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (tmp_path / "ab.json").write_text(json.dumps({**manifest, "digest": digest}, indent=1))
    with pytest.raises(DamagedEntryError):
        cache.load("ab")
    assert cache.describe("ab") == {}


def test_a_matrix_file_without_its_matrices_or_with_others_is_refused(tmp_path: Path) -> None:
    path = matrix_file.write(tmp_path / "m.safetensors", "moments", {1: torch.eye(3)})
    notes = json.dumps({"kind": "moments", "layers": {"1": {}}})
    save_file({"2": torch.eye(3)}, path, {"errata": notes})
    with pytest.raises(StatisticsError, match=r"m\.safetensors: the matrix of layer 1 cannot be read"):
        MatrixFile.open(path, "moments").matrix(1)
    flat = torch.ones(4)
    stated = {"sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest()}
    save_file({"1": flat}, path, {"errata": json.dumps({"kind": "moments", "layers": {"1": stated}})})
    with pytest.raises(StatisticsError, match="expected"):
        MatrixFile.open(path, "moments").matrix(1)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [[["a=1"], ["a=1", "b=2"]], [3], "x", [[3]]])
def test_a_plan_that_is_none_of_ours_is_none(tmp_path: Path, jobs: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"command": "errata bench", "jobs": jobs, "began": 0.0}))
    assert sweeps.Sweep.read(tmp_path) is None
