"""Wrong second moments are never reused: everything that they depend on is in their key."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.core.errors import StatisticsError
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.digests import tokenizer_digest
from errata.editors.core.moments.cache_key import (
    MomentsKey,
    architecture_digest,
    foreign_hooks,
    weights_digests,
)
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.request import EditRequest
from errata.editors.grace import GRACE

TEXTS = [f"{'The capital ' * (1 + n % 5)}of land {n} is Oslen, where lyre number {n * n} is played." for n in range(24)]
KEY = MomentsKey(
    layer=1, weights="a", architecture="b", tokenizer="c", texts="d", n_texts=3, max_length=4, dtype="float32",
    precision="highest",
)  # fmt: skip


def test_changing_any_one_field_gives_another_key() -> None:
    others: dict[str, Any] = {"int": 99, "str": "z"}
    keys = [replace(KEY, **{field.name: others[str(field.type)]}) for field in fields(KEY)]
    assert len({key.digest for key in (KEY, *keys)}) == len(fields(KEY)) + 1 == 11
    assert replace(KEY).digest == KEY.digest


def test_every_weight_up_to_the_layer_is_in_its_digest_and_none_above(make_tiny: Any) -> None:
    model = make_tiny("gpt2")
    before, changed = weights_digests(describe(model), [0, 1, 2]), 0
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            old = flat[-1].clone()
            flat[-1] += 1
            after = weights_digests(describe(model), [0, 1, 2])
            flat[-1] = old
        first = int(name.split(".")[2]) if ".h." in name else 0
        assert [before[layer] == after[layer] for layer in (0, 1, 2)] == [layer < first for layer in (0, 1, 2)], name
        changed += 1
    assert changed > 30
    assert weights_digests(describe(model), [0, 1, 2]) == before
    assert weights_digests(describe(model), [1]) == {1: before[1]}


def test_buffers_dtype_and_shape_are_in_the_digest(make_tiny: Any) -> None:
    model = make_tiny("llama")
    before = weights_digests(describe(model), [0])
    model.model.rotary_emb.inv_freq[0] += 1
    assert weights_digests(describe(model), [0]) != before
    half = make_tiny("gpt2", dtype=torch.bfloat16)
    assert weights_digests(describe(half), [0]) != weights_digests(describe(half.float()), [0])


def test_settings_that_no_weight_shows_are_in_the_key(make_tiny: Any) -> None:
    model = make_tiny("gpt2")
    before = architecture_digest(describe(model))
    model.config._name_or_path = "elsewhere"
    assert architecture_digest(describe(model)) == before
    model.config.activation_function = "relu"
    assert architecture_digest(describe(model)) != before


def test_the_tokenizer_digest_knows_its_content_and_not_its_last_call(
    tiny_tokenizer: Any, tiny_tokenizer_bos: Any
) -> None:
    before = tokenizer_digest(tiny_tokenizer)
    tiny_tokenizer("a b c d", truncation=True, max_length=2)
    assert tokenizer_digest(tiny_tokenizer) == before != tokenizer_digest(tiny_tokenizer_bos)


def test_nothing_is_reused_after_any_one_change(
    make_tiny: Any, tiny_tokenizer: Any, tiny_tokenizer_bos: Any, tmp_path: Path
) -> None:
    """The same end to end: each call differs from the first in one thing, and must compute."""
    edited = make_tiny("gpt2")
    with torch.no_grad():
        describe(edited).down(0).weight[0, 0] += 1e-3  # type: ignore[index, operator]
    first = (make_tiny("gpt2"), tiny_tokenizer, [1], TEXTS, {})
    changes: dict[str, tuple[Any, Any, list[int], list[str], dict[str, Any]]] = {
        "weights": (edited, *first[1:]),
        "dtype": (make_tiny("gpt2", dtype=torch.bfloat16), *first[1:]),
        "architecture": (make_tiny("neox"), *first[1:]),
        "tokenizer": (first[0], tiny_tokenizer_bos, *first[2:]),
        "layer": (*first[:2], [2], *first[3:]),
        "texts": (*first[:3], [*TEXTS[:-1], TEXTS[-1] + "."], {}),
        "n_texts": (*first[:4], {"max_texts": 23}),
        "max_length": (*first[:4], {"max_length": 12}),
    }

    def computed(model: Any, tokenizer: Any, layers: list[int], texts: list[str], options: dict[str, Any]) -> list[int]:
        return second_moments(model, tokenizer, layers, texts, cache_dir=tmp_path, **options).meta["computed"]

    assert computed(*first) == [1]
    for name, change in changes.items():
        assert computed(*change) == change[2], name
        assert computed(*change) == [], name  # and is found itself, so the cache was on
    assert computed(*first) == []


Call = tuple[Any, Any, list[int], list[str], dict[str, Any]]


def _changed(call: Call, what: str, rng: random.Random, other_tokenizer: Any) -> Call:
    """The call with one thing changed; the model is its own, and changed where it stands."""
    model, tokenizer, layers, texts, options = call
    if what == "weights":
        names = [n for n, _ in model.named_parameters() if ".h.2." not in n]
        with torch.no_grad():
            flat = model.get_parameter(rng.choice(names)).view(-1)
            flat[rng.randrange(len(flat))] += rng.choice((1e-3, -1.0, 1.0))
    elif what == "architecture":
        model.config.update(rng.choice(({"activation_function": "relu"}, {"layer_norm_epsilon": 0.1 + rng.random()})))
    elif what == "dtype":
        model = model.to(rng.choice((torch.bfloat16, torch.float64)))
    elif what == "tokenizer":
        tokenizer = other_tokenizer
    elif what == "layer":
        layers = [rng.choice((0, 2))]
    elif what == "texts":
        texts, place = list(texts), rng.randrange(len(texts))
        at = rng.randrange(len(texts[place]))
        texts[place] = texts[place][:at] + rng.choice("abcxyz") * 2 + texts[place][at:]
    elif what == "n_texts":
        options = {"max_texts": rng.randrange(1, len(texts))}
    else:
        options = {"max_length": rng.randrange(2, 20)}
    return model, tokenizer, layers, texts, options


CHANGES = ("weights", "architecture", "dtype", "tokenizer", "layer", "texts", "n_texts", "max_length")


def _hits(make_tiny: Any, tokenizers: tuple[Any, Any], base: Path, count: int) -> dict[str, list[int]]:
    """Make `count` random single changes; return by kind how many there were and how many found the old moments."""
    rng, found = random.Random(0), {what: [0, 0] for what in CHANGES}
    first: Call = (make_tiny("gpt2", n_layers=3), tokenizers[0], [1], TEXTS, {})
    second_moments(*first[:4], cache_dir=base / "first")
    for trial in range(count):
        what, folder = CHANGES[trial % len(CHANGES)], base / str(trial)
        shutil.copytree(base / "first", folder)
        fresh = (copy.deepcopy(first[0]), *first[1:])
        model, tokenizer, layers, texts, options = _changed(fresh, what, rng, tokenizers[1])
        moments = second_moments(model, tokenizer, layers, texts, cache_dir=folder, **options)
        found[what][0] += 1
        found[what][1] += moments.meta["computed"] != layers
        shutil.rmtree(folder)
    # Where nothing is changed they are found, so that the cache was on.
    assert second_moments(*first[:4], cache_dir=base / "first").meta["computed"] == []
    return found


def test_no_single_change_of_any_size_finds_the_moments_of_before(
    make_tiny: Any,
    tiny_tokenizer: Any,
    tiny_tokenizer_bos: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trials: Callable[..., int],
    tried: Callable[..., None],
) -> None:
    count, tokenizers = trials(16, 1000), (tiny_tokenizer, tiny_tokenizer_bos)
    found = _hits(make_tiny, tokenizers, tmp_path / "found", count)
    # The control: a key that does not hold the texts and the weights.
    plain = MomentsKey.digest.fget
    assert plain is not None
    monkeypatch.setattr(MomentsKey, "digest", property(lambda key: plain(replace(key, texts="", weights=""))))
    control = _hits(make_tiny, tokenizers, tmp_path / "control", 2 * len(CHANGES))
    tried(7, count, changes_and_hits=found, control=control)
    assert sum(ran for ran, _ in found.values()) == count
    assert all(ran and not hits for ran, hits in found.values()), found
    assert all((hits == ran) is (what in ("texts", "weights")) for what, (ran, hits) in control.items()), control


def test_a_hook_of_somebody_else_turns_the_cache_off(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny("gpt2")
    clean = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path).matrices[1]
    handle = describe(model).block(0).mlp.register_forward_hook(lambda _m, _a, out: out * 2)  # type: ignore[union-attr]
    assert foreign_hooks(describe(model), [1]) == ["transformer.h.0.mlp"]
    hooked = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    handle.remove()
    assert hooked.meta["computed"] == [1]
    assert "no digest covers" in caplog.text
    assert not torch.equal(hooked.matrices[1], clean)
    again = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert again.meta["computed"] == []
    assert torch.equal(again.matrices[1], clean)


def test_a_codebook_that_sleeps_leaves_the_cache_in_use(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2")
    clean = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path).matrices[1]
    editor = GRACE(model, tiny_tokenizer, {"layers": [1], "n_iter": 1})
    editor.apply(EditRequest("The capital of {} is", "Varland", "of"))
    assert foreign_hooks(describe(model), [1]) == [editor.module_name]
    with editor.ledger.untouched():
        assert foreign_hooks(describe(model), [1]) == []
        again = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert again.meta["computed"] == []
    assert torch.equal(again.matrices[1], clean)


def test_a_weight_that_is_not_loaded_is_refused(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="meta device"):
        second_moments(make_tiny("gpt2").to("meta"), tiny_tokenizer, [0], TEXTS, cache_dir=tmp_path)
