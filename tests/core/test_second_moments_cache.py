"""The cache of second moments: a key computed once, files whole or absent, damage noticed, passes resumed.

The number of trials scales with the environment variable ERRATA_TRIALS.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from moment_texts import TEXTS

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files import matrix_file, tensor_cache
from errata.editors.core.files.tensor_cache import DamagedEntryError, TensorCache, cache_folder
from errata.editors.core.moments.second_moments import second_moments

# --- readers and writers ------------------------------------------------------------------------------------------


def test_a_reader_whose_entry_is_replaced_meanwhile_has_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, writer = TensorCache(tmp_path), TensorCache(tmp_path)
    cache.store("a", {"x": torch.zeros(3)}, {})
    check = cache._parse_manifest

    def slowly(name: str, content: bytes) -> Any:
        manifest = check(name, content)
        if manifest["meta"] == {}:
            writer.store("a", {"x": torch.ones(3)}, {"new": True})
        return manifest

    monkeypatch.setattr(cache, "_parse_manifest", slowly)
    entry = cache.load("a")
    assert entry is not None
    assert entry.meta == {"new": True}
    assert torch.equal(entry.tensors["x"], torch.ones(3))


# --- damage -------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _zero_page(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(0, len(data), 512)
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    return data


def _extend(data: bytearray, rng: random.Random) -> bytearray:
    return data + bytes([rng.choice((*b" \n{", rng.randrange(256)))])


MUTATIONS = (_flip, _truncate, _zero_page, _extend)


def test_every_damaged_file_is_noticed_and_set_aside(
    tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    cache, rng, ran, rounds = TensorCache(tmp_path), random.Random(0), 0, -(-trials(80, 1000) // 8)
    tensors = {"moment": torch.randn(24, 24, generator=torch.Generator().manual_seed(0))}
    for _ in range(rounds):
        for mutation in MUTATIONS:
            for suffix in ("safetensors", "json"):
                cache.store("ab", tensors, {"tokens": 7, "convergence": 0.125})
                (path,) = tmp_path.glob(f"ab*.{suffix}")
                before = path.read_bytes()
                path.write_bytes(mutation(bytearray(before), rng))
                assert path.read_bytes() != before
                with pytest.raises(DamagedEntryError):
                    cache.load("ab")
                assert cache.recover("ab") is None
                assert not path.exists()
                assert (tmp_path / f"{path.name}.damaged").exists()
                ran += 1
    tried(6, ran, mutations=[mutation.__name__ for mutation in MUTATIONS])
    assert ran == 8 * rounds
    cache.store("ab", tensors, {"tokens": 7})
    entry = cache.load("ab")
    assert entry is not None
    assert torch.equal(entry.tensors["moment"], tensors["moment"])
    assert entry.meta == {"tokens": 7}


def test_safetensors_alone_would_not_notice(tmp_path: Path) -> None:
    """The control: without our digest a flipped byte loads as a wrong number."""
    from safetensors.torch import load_file

    TensorCache(tmp_path).store("ab", {"moment": torch.ones(8)}, {})
    (path,) = tmp_path.glob("ab-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not torch.equal(load_file(path)["moment"], torch.ones(8))


def test_every_damaged_moment_is_computed_again_with_a_warning(
    make_tiny: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trials: Callable[..., int],
    tried: Callable[..., None],
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model, rng, landed, slipped = make_tiny("gpt2"), random.Random(0), Counter[str](), 0
    count, right = trials(16, 1000), second_moments(model, tiny_tokenizer, [0], TEXTS, cache_dir=tmp_path)
    for trial in range(count):
        mutation, suffix = MUTATIONS[trial % 4], ("safetensors", "json")[trial // 4 % 2]
        (path,) = tmp_path.glob(f"{right.meta['keys'][0]}*.{suffix}")
        path.write_bytes(mutation(bytearray(path.read_bytes()), rng))
        if suffix == "safetensors":
            with suppress(SafetensorError, KeyError):
                slipped += not torch.equal(load_file(path)["moment"], right.matrices[0])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = second_moments(model, tiny_tokenizer, [0], TEXTS, cache_dir=tmp_path)
        assert again.meta["computed"] == [0], (trial, mutation, suffix)
        assert "set aside" in caplog.text
        assert torch.equal(again.matrices[0], right.matrices[0])
        landed[f"{mutation.__name__} {suffix}"] += (tmp_path / f"{path.name}.damaged").exists()
        for aside in tmp_path.glob("*.damaged*"):
            aside.unlink()
    tried(6, count, landed=dict(landed), read_by_safetensors_alone=slipped)
    assert sum(landed.values()) == count
    assert slipped > 0, "safetensors alone would have noticed all of them: the digests prove nothing"


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damaged_moments_are_computed_again_with_a_warning(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    model = make_tiny("gpt2")
    first = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path)
    path = next(tmp_path.glob(f"{first.meta['keys'][1]}*.{suffix}"))
    path.write_bytes(_flip(bytearray(path.read_bytes()), random.Random(1)))
    with caplog.at_level(logging.WARNING):
        second = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path)
    assert second.meta["computed"] == [1]
    assert "set aside" in caplog.text
    assert torch.equal(first.matrices[1], second.matrices[1])
    assert second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path).meta["computed"] == []


def test_what_is_set_aside_keeps_what_was_set_aside_before(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    for content in (b"first", b"second"):
        cache.store("ab", {"x": torch.ones(3)}, {})
        (tmp_path / "ab.json").write_bytes(content)
        assert cache.recover("ab") is None
    assert {path.read_bytes() for path in tmp_path.glob("ab.json.damaged*")} == {b"first", b"second"}


@pytest.mark.parametrize("reads", ["digest_of_file", "_load_tensors"])
def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    model = make_tiny("gpt2")
    second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StatisticsError, match="cannot be read") as caught:
        patched.setattr(tensor_cache, reads, forbidden)
        second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert not isinstance(caught.value, DamagedEntryError)
    with monkeypatch.context() as patched, pytest.raises(StatisticsError, match="cannot be read"):
        patched.setattr(Path, "read_bytes", forbidden)
        second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.damaged"))
    assert second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path).meta["computed"] == []


def test_files_have_the_mode_that_the_user_s_mask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        TensorCache(tmp_path).store("ab", {"x": torch.ones(3)}, {})
        matrix_file.write(tmp_path / "m.safetensors", "moments", {1: torch.eye(3)})
    finally:
        os.umask(before)
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_manifest_without_its_data_is_damage_and_data_without_manifest_is_nothing(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.store("ab", {"x": torch.ones(3)}, {})
    (data,) = tmp_path.glob("ab-*.safetensors")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(DamagedEntryError, match="is missing"):
        cache.load("ab")
    (tmp_path / "ab.json").unlink()
    (tmp_path / "elsewhere").rename(data)
    assert cache.load("ab") is None


def test_replacing_and_removing_leave_no_file_behind(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    (tmp_path / "ab.123.tmp").write_text("left by a writer that died")
    for value in (1.0, 2.0):
        cache.store("ab", {"x": torch.full((3,), value)}, {})
    cache.store("abc", {"x": torch.ones(3)}, {})
    assert len(list(tmp_path.glob("ab-*"))) == 1
    assert not list(tmp_path.glob("*.tmp"))
    cache.remove("ab")
    assert cache.load("ab") is None
    assert cache.load("abc") is not None
    assert not list(tmp_path.glob("ab-*"))


def test_a_full_disk_leaves_the_old_entry_and_costs_no_result(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    cache = TensorCache(tmp_path)
    cache.store("ab", {"x": torch.ones(3)}, {})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.store("ab", {"x": torch.zeros(3)}, {})
    moments = second_moments(make_tiny("gpt2"), tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path, save_seconds=0)
    monkeypatch.undo()
    assert "No space left" in caplog.text
    assert torch.isfinite(moments.matrices[1]).all()
    entry = cache.load("ab")
    assert entry is not None
    assert entry.tensors["x"].tolist() == [1, 1, 1]
    assert not list(tmp_path.glob("*.tmp"))


def test_loaded_tensors_are_freshly_allocated(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.store("ab", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, 7)}, {})
    entry = cache.load("ab")
    assert entry is not None
    assert all(tensor.data_ptr() % 64 == 0 for tensor in entry.tensors.values())


def test_the_folder_comes_from_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    assert cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("ERRATA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "errata" / "moments"
    (tmp_path / "file").write_text("")
    with pytest.raises(StatisticsError, match="pass cache_dir"):
        TensorCache(tmp_path / "file" / "below")


# --- leaving off and going on -------------------------------------------------------------------------------------


class _Interrupted(Exception):
    pass


class _Steps:
    """A progress callback that counts its calls, and interrupts at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.steps, self.stop = 0, stop

    def __call__(self, done: int, total: int, what: str) -> None:
        assert 0 < done <= total
        assert what
        self.steps += 1
        if self.steps == self.stop:
            raise _Interrupted


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_pass_that_was_left_goes_on_bit_identically(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_tiny("gpt2", dtype=dtype)
    options: dict[str, Any] = {"batch_tokens": 64, "block_rows": 100, "save_seconds": 0}
    whole = second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=tmp_path / "whole", **options)
    count = _Steps()
    second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=tmp_path / "count", progress=count, **options)
    stops = range(1, count.steps, 2)
    resumed = 0
    for stop in stops:
        folder, again = tmp_path / f"stop{stop}", _Steps()
        with pytest.raises(_Interrupted):
            second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=folder, progress=_Steps(stop), **options)
        moments = second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=folder, progress=again, **options)
        resumed += again.steps < count.steps
        assert all(torch.equal(moments.matrices[layer], whole.matrices[layer]) for layer in (0, 2))
        assert (moments.convergence, moments.tokens) == (whole.convergence, whole.tokens)
        assert not list(folder.glob("partial-*.json"))
    # It did go on, and did not start over: a save follows every second batch or so.
    assert resumed >= len(stops) - 2 > 2


def test_a_pass_that_is_left_behind_every_batch_is_saved_each_time_and_gets_done(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Also within a block of rows, and long before a save is due."""
    model, count = make_tiny("gpt2"), _Steps()
    options: dict[str, Any] = {"batch_tokens": 64, "block_rows": 100}
    whole = second_moments(
        model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=tmp_path / "whole", progress=count, **options
    )
    for _ in range(count.steps):
        with pytest.raises(_Interrupted):
            second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=tmp_path, progress=_Steps(1), **options)
    last = _Steps(1)
    moments = second_moments(model, tiny_tokenizer, [0, 2], TEXTS, cache_dir=tmp_path, progress=last, **options)
    assert last.steps == 0
    assert count.steps > 5
    assert all(torch.equal(moments.matrices[layer], whole.matrices[layer]) for layer in (0, 2))
    assert (moments.convergence, moments.tokens) == (whole.convergence, whole.tokens)


def test_damaged_totals_start_the_pass_over(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    model = make_tiny("gpt2")
    options: dict[str, Any] = {"batch_tokens": 64, "block_rows": 100, "save_seconds": 0}
    whole = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path / "whole", **options)
    with pytest.raises(_Interrupted):
        second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path, progress=_Steps(7), **options)
    (path,) = tmp_path.glob("partial-*.safetensors")
    path.write_bytes(_flip(bytearray(path.read_bytes()), random.Random(0)))
    moments = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path, **options)
    assert "set aside" in caplog.text
    assert torch.equal(moments.matrices[1], whole.matrices[1])
