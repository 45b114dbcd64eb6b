"""Laws of the attribution of heads and of scaling them, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import torch
from torch import nn

import errata
from errata.editors.core.errors import ArchitectureError, ConfigError, RequestError
from errata.editors.core.head_scaling import scale_heads
from errata.editors.core.locating.block_sums import block_sums
from errata.editors.core.locating.frozen_norms import freeze_tail
from errata.editors.core.locating.heads import (
    FalseContext,
    Head,
    _direction,
    answers,
    attribute_heads,
    n_heads,
    read_conflict,
)
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import hooked
from errata.testing import tiny_model, tiny_tokenizer

CONFLICT = FalseContext("The capital of Varland is", memory="Oslen", context="Paris")
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def small(kind: str, tokenizer: Any) -> Any:
    """A tiny model; llama has two query heads per key, GPT-2 stores weights transposed."""
    if kind in ("llama", "gpt2", "neox"):
        return tiny_model(kind, len(tokenizer))
    return tiny_architectures.tiny_model(kind, len(tokenizer))


def test_a_conflict_is_the_false_sentence_and_the_question(tokenizer: Any) -> None:
    assert CONFLICT.text == "The capital of Varland is Paris. The capital of Varland is"
    read = read_conflict(tokenizer, CONFLICT)
    assert read.ids[-len(read.question) + 1 :] == read.question[1:]
    with pytest.raises(RequestError, match="begin with the same token"):
        read_conflict(tokenizer, FalseContext("The capital of Varland is", "Paris", "Paris"))


@pytest.mark.parametrize("kind", ["llama", "olmo2", "neox"])
def test_heads_mlps_and_the_embedding_add_up_to_the_logit_difference(kind: str, tokenizer: Any) -> None:
    model = small(kind, tokenizer).double()
    architecture, read = describe(model), read_conflict(tokenizer, CONFLICT)
    ran = block_sums(architecture, read.ids, patterns=False)
    direction, difference = _direction(architecture, ran.normed[-1], read)
    tail = freeze_tail(architecture.tail, ran.last[-1])
    found = attribute_heads(model, tokenizer, [CONFLICT])
    assert float(found.differences[0]) == pytest.approx(difference)
    for layer, block in enumerate(ran.blocks):
        bias = architecture.attention_out(layer)._parameters.get("bias")
        added = (block.middle - block.entry)[-1] - (0 if bias is None else bias.detach())
        for norm in block.behind.norms:
            added = added - norm.at(-1).bias
        assert float(found.values[0, layer].sum()) == pytest.approx(float(tail(added) @ direction), abs=1e-5)
    whole = tail(ran.blocks[0].entry[-1] + sum((b.exit - b.entry)[-1] for b in ran.blocks))
    final_bias = getattr(architecture.tail[0], "bias", None)
    whole = whole if final_bias is None else whole + final_bias.detach()
    assert float(whole @ direction) == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scaling_is_what_multiplying_a_head_s_values_does(kind: str, tokenizer: Any) -> None:
    model = small(kind, tokenizer)
    architecture = describe(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    width = architecture.attention_map(1).shape[1] // 4

    def scaled(_module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        values = args[0].clone()
        values[..., 2 * width : 3 * width] *= factor
        return (values,)

    for factor in (0.0, -2.0, 1.0):
        with torch.no_grad():
            with hooked(architecture.attention_out(1).register_forward_pre_hook(scaled)):
                expected = model(IDS).logits
            edit = scale_heads(model, {Head(1, 2): factor})
            with edit.applied():
                torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-5)
                if factor == 0:
                    assert not architecture.attention_map(1).weight[:, 2 * width : 3 * width].any()
                changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
            assert changed == ([] if factor == 1 else [architecture.attention_map(1).name])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scalings_are_calculated_with_saved_and_listed_like_other_edits(tokenizer: Any, tmp_path: Path) -> None:
    model = small("llama", tokenizer)
    edit = scale_heads(model, {Head(0, 1): 0.0, Head(0, 3): 3.0, Head(2, 0): 0.5})
    assert edit.derived["numbers"] == {"0.1": 0.0, "0.3": 3.0, "2.0": 0.5}
    assert "scale_heads(0.1=0.0, 0.3=3.0, 2.0=0.5)" in repr(edit)
    half = scale_heads(model, {Head(0, 1): 0.5, Head(0, 3): 2.0, Head(2, 0): 0.75})
    with edit.applied():
        full = model(IDS).logits
    with (0.5 * edit).applied():
        found = model(IDS).logits
    with half.applied():
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-5)
    edit.save(tmp_path / "heads.edits", tokenizer=tokenizer)
    loaded = errata.load_edit(tmp_path / "heads.edits", model)
    assert loaded.derived == edit.derived
    torch.testing.assert_close(model(IDS).logits, full)
    loaded.undo()


def test_answers_are_of_one_side_the_other_or_neither(tokenizer: Any) -> None:
    model = small("llama", tokenizer)
    read = read_conflict(tokenizer, CONFLICT)
    said = tokenizer.decode([int(model(torch.tensor([read.ids])).logits[0, -1].argmax())]).strip()
    conflicts = [CONFLICT, FalseContext("Varland is", "Oslen", "Paris")]
    told = answers(model, tokenizer, conflicts)
    assert [answer.says for answer in told] == [_side(said), told[1].says]
    logits = model(torch.tensor([read.ids])).logits[0, -1]
    assert told[0].difference == pytest.approx(float(logits[read.context] - logits[read.memory]), abs=1e-4)
    alone = answers(model, tokenizer, [CONFLICT], with_context=False)[0]
    logits = model(torch.tensor([read.question])).logits[0, -1]
    assert alone.difference == pytest.approx(float(logits[read.context] - logits[read.memory]), abs=1e-4)


def _side(said: str) -> str:
    return {"Oslen": "memory", "Paris": "context"}.get(said, "other")


def test_strongest_heads_are_those_of_each_side(tokenizer: Any) -> None:
    found = attribute_heads(small("llama", tokenizer), tokenizer, [CONFLICT])
    flat = found.mean.flatten()
    assert found.mean[tuple(found.strongest("context")[0])] == flat.max()
    assert found.mean[tuple(found.strongest("memory")[0])] == flat.min()
    assert len(found.strongest("memory", 5)) == 5


def test_blocks_without_an_attention_have_no_attributions(tokenizer: Any) -> None:
    found = attribute_heads(small("lfm2", tokenizer), tokenizer, [CONFLICT])
    there = ~found.values[0].isnan()
    assert there.any()
    for side in ("memory", "context"):
        assert {tuple(head) for head in found.strongest(side, 99)} == {tuple(at) for at in there.nonzero().tolist()}
    with pytest.raises(ArchitectureError, match="no block with an attention"):
        attribute_heads(small("mamba", tokenizer), tokenizer, [CONFLICT])
    with pytest.raises(ArchitectureError, match="norm behind its sums"):
        attribute_heads(small("bert", tokenizer), tokenizer, [CONFLICT])


def test_what_is_no_head_or_no_factor_is_refused(tokenizer: Any) -> None:
    model = small("llama", tokenizer)
    for factors, told in (
        ({}, "at least one head"),
        ({Head(0, 4): 0.0}, "layer 0 has heads 0 to 3"),
        ({Head(0, 0): float("nan")}, "finite factor"),
    ):
        with pytest.raises(ConfigError, match=told):
            scale_heads(model, factors)
    with pytest.raises(ArchitectureError, match="layer"):
        scale_heads(model, {Head(9, 0): 0.0})
    for text in ("3", "a.1", "1.-2", ""):
        with pytest.raises(ConfigError, match=r"LAYER\.HEAD"):
            Head.of(text)
    assert str(Head.of("3.12")) == "3.12"
    assert n_heads(describe(model), 0) == 4
