"""Laws that every kind of steering keeps, on models like GPT-2 and like Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import errata
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, ArchitectureError, ConfigError, ExportError
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.steering.affine import Affine
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.kinds import KINDS
from errata.editors.core.steering.positions import Where
from errata.editors.core.steering.steering import Steering

PAIRS = [
    Contrast("The capital of Varland is", "Oslen.", "Brast."),
    Contrast("The mother tongue of Danielle Darrieux is", "French.", "the lyre."),
    Contrast("Beats Music is owned by", "Apple.", "the river Ost."),
]
SPACED = [Contrast("", "Oslen", "Brast")]
WEIGHTS = ("surgery", "ablate_weights")  # patches of weights; the others are adapters
REMOVING = ("ace", "leace", "ablate")  # adapters that take away what is along a direction
WITHOUT_STRENGTH = ("ablate", "ablate_weights")
EVERY = [(kind, name) for kind in KINDS for name in ("gpt2", "llama") if (kind, name) != ("surgery", "gpt2")]
IDS = list(range(40, 52))
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


class Steered:
    """A tiny model and what one kind has learnt, shared by the laws: each leaves the model as it was."""

    def __init__(self, model: Any, tokenizer: Any, kind: str) -> None:
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.steering = self.learn()
        self.edit = self.steering.edit()

    def learn(self, **ways: Any) -> Steering:
        given = SPACED if self.kind == "actadd" else PAIRS
        return errata.learn_steering(self.model, self.tokenizer, given, self.kind, **ways)

    def logits(self, rows: list[list[int]] | None = None, mask: list[list[int]] | None = None) -> Tensor:
        ids, given = torch.tensor(rows or [IDS]), None if mask is None else torch.tensor(mask)
        places = None if given is None else (given.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=given, position_ids=places).logits

    def fact(self) -> Edit:
        """An edit as of a fact, of a weight that the kinds of weights change, too."""
        drawn = torch.Generator().manual_seed(0)
        name = describe(self.model).weight_name(1)
        d_out, d_in = describe(self.model).map_at(1).shape
        U, V = (torch.randn(shape, generator=drawn) / 5 for shape in ((d_out, 1), (1, d_in)))
        return Edit("", (), Patch({name: LowRank(U, V)}), (), {}, self.model)


def added(edit: Edit) -> dict[str, Tensor]:
    """What an edit adds, by name: to weights, or to outputs."""
    found = {name: update.matrix(torch.float32, torch.device("cpu")) for name, update in edit.patch.updates.items()}
    for name, record in edit.patch.adapters.items():
        assert isinstance(record, Affine)
        found |= {f"{name}.{part}": tensor for part, tensor in record.tensors.items()}
    return found


def assert_proportional(edit: Edit, factor: float, base: Edit) -> None:
    mine, theirs = added(edit), added(base)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], factor * theirs[name], **CLOSE)


@pytest.fixture(scope="module")
def steered(request: pytest.FixtureRequest, make_tiny: Any, tiny_tokenizer: Any) -> Steered:
    kind, name = request.param
    return Steered(make_tiny(name), tiny_tokenizer, kind)


@pytest.fixture
def plain(steered: Steered, digest: Callable[[Any], str]) -> Iterator[Tensor]:
    """What the untouched model gives; behind each law it has the same bytes, gives the same bits, and has no hook."""
    before, logits = digest(steered.model), steered.logits()
    yield logits
    assert digest(steered.model) == before
    assert torch.equal(steered.logits(), logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in steered.model.modules())


every_kind = pytest.mark.parametrize("steered", EVERY, indirect=True, ids="-".join)


@every_kind
def test_it_acts_and_comes_back_from_a_folder(steered: Steered, plain: Tensor, tmp_path: Path) -> None:
    with steered.edit.applied():
        acting = steered.logits()
    steered.edit.save(tmp_path / "edit")
    assert not torch.allclose(acting, plain)
    again = errata.load_edit(tmp_path / "edit", steered.model)
    assert torch.equal(steered.logits(), acting)
    assert again.derived == steered.edit.derived
    again.undo()


@every_kind
@pytest.mark.usefixtures("plain")
def test_exports_hold_weights_and_refuse_adapters(steered: Steered, tmp_path: Path) -> None:
    steered.edit.apply()
    if steered.kind not in WEIGHTS:
        for export in (steered.edit.export_lora, steered.edit.export_merged):
            with pytest.raises(ExportError):
                export(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    else:
        rank_1 = all(isinstance(update, LowRank) for update in steered.edit.patch.updates.values())
        assert rank_1 is (steered.model.config.model_type == "llama")  # GPT-2's maps have biases, which are vectors
        if rank_1:
            steered.edit.export_lora(tmp_path / "lora")
        steered.edit.export_merged(tmp_path / "model")
        merged = type(steered.model).from_pretrained(tmp_path / "model")
        ids = torch.tensor([IDS])
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=ids).logits, steered.logits(), **CLOSE)
    steered.edit.undo()


@every_kind
def test_a_factor_scales_what_is_added(steered: Steered, plain: Tensor) -> None:
    if steered.kind in REMOVING:
        for scaled in (lambda: 0.0 * steered.edit, lambda: -steered.edit):
            with pytest.raises(AlgebraError, match="removes a direction"):
                scaled()
    else:
        with (0.0 * steered.edit).applied():
            assert torch.equal(steered.logits(), plain)
        assert_proportional(2.5 * steered.edit, 2.5, steered.edit)
    if steered.kind in WITHOUT_STRENGTH:
        with pytest.raises(ConfigError, match="no strength"):
            steered.steering.edit(1.0)
        return
    if steered.kind not in REMOVING:
        assert_proportional(steered.steering.edit(3.0), 3.0, steered.steering.edit(1.0))
        return
    zero, one, three = (added(steered.steering.edit(strength)) for strength in (0.0, 1.0, 3.0))
    for name in zero:  # what it removes does not depend on the strength, and what it adds is linear in it
        torch.testing.assert_close(three[name] - zero[name], 3 * (one[name] - zero[name]), **CLOSE)


@every_kind
@pytest.mark.usefixtures("plain")
def test_a_sum_is_both_one_after_the_other(steered: Steered) -> None:
    one, other = steered.edit, steered.steering.random(seed=1).edit()
    with one.applied(), other.applied():
        both = steered.logits()
    with (one + other).applied():
        torch.testing.assert_close(steered.logits(), both, **CLOSE)
    with (other + one).applied():
        turned = steered.logits()
    # Additions commute. Of two removals the second one is whole, and the first need not be.
    assert torch.allclose(turned, both, **CLOSE) is (steered.kind not in REMOVING)


@every_kind
def test_it_stands_beside_edits_of_facts(steered: Steered, plain: Tensor) -> None:
    with steered.edit.applied():
        alone = steered.logits()
    fact = steered.fact().apply()
    assert not torch.allclose(steered.logits(), plain)
    steered.edit.apply()
    assert not torch.allclose(steered.logits(), alone)
    fact.undo()
    assert torch.equal(steered.logits(), alone)
    fact.apply()
    steered.edit.undo()
    fact.undo()
    fact.apply()  # what is learnt from a model with edited facts acts there
    learnt = steered.learn().edit().apply()
    fact.undo()
    learnt.undo()


@every_kind
def test_a_random_direction_is_as_long(steered: Steered, plain: Tensor) -> None:
    drawn = steered.steering.random(seed=0)
    for name, direction in steered.steering.directions.items():
        rows = [each.reshape(-1, steered.steering.width).norm(dim=1) for each in (direction, drawn.directions[name])]
        torch.testing.assert_close(*rows, rtol=1e-5, atol=0)
        assert not torch.allclose(direction, drawn.directions[name])
    control = drawn.edit()
    assert control.derived["numbers"]["random"] == 0
    with control.applied():
        assert not torch.allclose(steered.logits(), plain)
    assert_proportional(steered.steering.random(seed=0).edit(), 1.0, control)  # the seed decides


@every_kind
@pytest.mark.usefixtures("plain")
@torch.no_grad()
def test_each_position_gets_what_it_is_to_get_in_a_batch_too(steered: Steered) -> None:
    if steered.kind in WEIGHTS:
        with pytest.raises(ConfigError, match="act at all positions"):
            steered.learn(where=Where("last"))
        wheres: list[Where] = []
    elif steered.kind == "actadd":
        wheres = [Where("prefix", align) for align in ("front", "middle", "back")]
    else:
        wheres = [Where(), Where("last"), Where("prompt"), Where("span", start=1, stop=3)]
    rows, parts = [IDS[:6], IDS[6:10]], describe(steered.model)
    steerings = [replace(steered.steering, where=where) for where in wheres] or [steered.steering]
    for steering in steerings:
        edit = steering.edit()
        if steered.kind not in WEIGHTS:
            n = len(next(iter(steering.directions.values()))) if steered.kind == "actadd" else 0
            for row in rows:
                assert moved_tokens(steered, edit, row) == expected(steering.where, len(row), n)
        with edit.applied():
            alone = [steered.logits([row])[0] for row in rows]
            right = steered.logits([rows[0], [*rows[1], 0, 0]], [[1] * 6, [1, 1, 1, 1, 0, 0]])
            left = steered.logits([rows[0], [0, 0, *rows[1]]], [[1] * 6, [0, 0, 1, 1, 1, 1]])
            padded = run_base(parts, right_padded(rows, 0))  # as methods read keys and states
            single = [run_base(parts, right_padded([row], 0))[0] for row in rows]
            for mine, wanted in zip(padded, single, strict=True):
                torch.testing.assert_close(mine[: len(wanted)], wanted, **CLOSE)
        if steering.where.place == "prompt":
            continue  # which passes are a prompt's does not depend on padding
        for found in ([right[0], right[1, :4]], [left[0], left[1, 2:]]):
            for mine, wanted in zip(found, alone, strict=True):
                torch.testing.assert_close(mine, wanted, **CLOSE)


def moved_tokens(steered: Steered, edit: Edit, row: list[int]) -> list[int]:
    """Which tokens of a row get other states from the first module that is changed."""
    seen: list[Tensor] = []
    module = steered.model.get_submodule(next(iter(edit.patch.adapters)))
    before = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with edit.applied():
        after = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
        steered.logits([row])
        after.remove()
    before.remove()
    return (seen[0] != seen[1])[0].any(-1).nonzero().flatten().tolist()


def expected(where: Where, length: int, n: int) -> list[int]:
    begin = {"front": 0, "middle": length // 2 - n // 2, "back": length - n}[where.align]
    places = {
        "last": range(length - 1, length),
        "span": range(where.start, min(length, where.stop or length)),
        # Both prompts begin with the same token, whose states do not differ.
        "prefix": range(begin + 1, begin + n),
    }
    return list(places.get(where.place, range(length)))


@every_kind
@pytest.mark.usefixtures("plain")
def test_blocks_that_give_tuples_keep_the_rest(steered: Steered) -> None:
    with steered.edit.applied():
        wanted = steered.logits()
    parts = describe(steered.model)
    seen: list[str] = []

    def pair(_module: Any, _args: Any, output: Tensor) -> tuple[Tensor, str]:
        return output, "weights"

    def first(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(args[0], tuple):
            seen.append(args[0][1])
            return (args[0][0], *args[1:])
        return args

    handles = [block.register_forward_hook(pair) for block in parts.blocks]
    handles += [module.register_forward_pre_hook(first) for module in (*parts.blocks, parts.tail[-1])]
    try:
        with steered.edit.applied():
            assert torch.equal(steered.logits(), wanted)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["weights"] * len(list(parts.blocks))


def test_a_gate_is_needed_for_surgery(make_tiny: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ArchitectureError, match="no gate"):
        errata.steer(make_tiny("gpt2"), tiny_tokenizer, PAIRS, "surgery")
