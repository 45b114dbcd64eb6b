"""Laws of the ledger over random sequences: whatever was done, the weights are those of a model that only ever saw the
patches that remain. ERRATA_TRIALS sets how many sequences each law is tried with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata.editors.core.ledger.ledger import ATTRIBUTE, Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch, Update
from errata.editors.core.ledger.weight_sums import Spacing

# Square, wide, narrow and tied weights; for GPT-2 in both orientations, since its Conv1D stores (d_in, d_out).
WEIGHTS = {
    "gpt2": (
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.mlp.c_fc.weight",
        "lm_head.weight",
    ),
    "llama": ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight"),
    "neox": (
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
        "gpt_neox.layers.1.attention.dense.weight",
        "lm_head.weight",
    ),
}
KINDS = [(arch, dtype) for arch in WEIGHTS for dtype in (torch.float32, torch.bfloat16)] + [("gpt2", torch.float16)]


class Lab:
    """One model under test, and one beside it that is made new for every comparison."""

    def __init__(self, model: Any, weights: tuple[str, ...], digest: Callable[[Any], str]) -> None:
        self.model, self.names, self.digest = model, weights, digest
        self.fresh = copy.deepcopy(model)
        self.bytes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.base = digest(model)

    def renewed(self, model: Any) -> Any:
        """The model as it was made: base bytes and no ledger."""
        model.__dict__.pop(ATTRIBUTE, None)
        model.load_state_dict(self.bytes)
        return model

    def patch(self, draw: random.Random) -> Patch:
        names = draw.sample(self.names, draw.randint(1, len(self.names)))
        return Patch({name: self.update(name, draw) for name in names})

    def update(self, name: str, draw: random.Random) -> Update:
        d_out, d_in = self.model.get_parameter(name).shape
        if name.endswith(("c_proj.weight", "c_fc.weight")):
            d_out, d_in = d_in, d_out
        noise = torch.Generator().manual_seed(draw.getrandbits(32))
        scale = 10 ** draw.uniform(-4, 0)
        if draw.random() < 0.25:
            return Dense(scale * torch.randn(d_out, d_in, generator=noise))
        rank = draw.choice((1, 1, 2, 5))
        return LowRank(
            scale * torch.randn(d_out, rank, generator=noise),
            torch.randn(rank, d_in, generator=noise, dtype=torch.float64),
        )

    def bystanders(self) -> tuple[object, ...]:
        """What no edit may change besides bytes: ties, hooks, gradients asked for, modes and the objects themselves."""
        parameters = list(self.model.named_parameters(remove_duplicate=False))
        return (
            [(name, id(p), p.data_ptr(), p.requires_grad, p.grad is None) for name, p in parameters],
            [(name, id(b)) for name, b in self.model.named_buffers()],
            [
                (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in self.model.modules()
            ],
            list(self.model.state_dict()),
        )


@pytest.fixture(scope="module")
def lab(make_tiny: Any, digest: Any) -> Callable[[str, torch.dtype], Lab]:
    made: dict[tuple[str, torch.dtype], Lab] = {}

    def get(arch: str, dtype: torch.dtype) -> Lab:
        if (arch, dtype) not in made:
            model = make_tiny(arch, dtype=dtype, n_layers=2).train()
            model.get_submodule(WEIGHTS[arch][0].rpartition(".")[0]).register_forward_hook(lambda *_: None)
            model.get_parameter(WEIGHTS[arch][1]).requires_grad_(False)
            list(model.modules())[3].eval()
            made[arch, dtype] = Lab(model, WEIGHTS[arch], digest)
        return made[arch, dtype]

    return get


class Sequence:
    """A random sequence of operations on the ledger, with a plain list of what should remain beside it."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.draw = lab, random.Random(seed)
        self.ledger = Ledger.of(lab.renewed(lab.model))
        self.ledger.spacing = Spacing(every=self.draw.choice((1, 2, 3, 32)), kept=self.draw.choice((1, 2)))
        self.remaining: dict[str, Patch] = {}
        self.undone: dict[str, Patch] = {}
        self.made = self.compared = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(depth=0)
        self.compare()

    def step(self, depth: int) -> None:
        # Adding is drawn as often as all ways of removing, so that the list grows and shrinks.
        chosen = self.draw.choice(
            [self.apply] * 4 + [self.undo_last, self.undo_any, self.undo_many, self.redo]
            + [self.applied, self.failing, self.untouched] * (depth < 3)
        )  # fmt: skip
        chosen(depth)
        if self.draw.random() < 0.3:
            self.compare()

    def apply(self, _: int) -> None:
        self.made += 1
        self.put(f"e{self.made}", self.lab.patch(self.draw))

    def put(self, name: str, patch: Patch) -> None:
        self.ledger.append(name, patch)
        self.remaining[name] = patch

    def take(self, *names: str) -> None:
        self.ledger.remove_many(names)
        for name in names:
            self.undone[name] = self.remaining.pop(name)

    def undo_last(self, _: int) -> None:
        if self.remaining:
            self.take(list(self.remaining)[-1])

    def undo_any(self, _: int) -> None:
        if self.remaining:
            self.take(self.draw.choice(list(self.remaining)))

    def undo_many(self, _: int) -> None:
        self.take(*self.draw.sample(list(self.remaining), self.draw.randint(0, len(self.remaining))))

    def redo(self, _: int) -> None:
        if self.undone:
            name = self.draw.choice(list(self.undone))
            self.put(name, self.undone.pop(name))

    def applied(self, depth: int) -> None:
        """As `with edit.applied()`: on for the block, off after it, with other things going on in between."""
        self.apply(depth)
        name = list(self.remaining)[-1]
        for _ in range(self.draw.randint(0, 2)):
            self.step(depth + 1)
        if name in self.remaining:
            self.take(name)

    def failing(self, depth: int) -> None:
        """A transaction that an exception ends: as if none of it had happened."""
        before = dict(self.remaining), dict(self.undone)
        with pytest.raises(ZeroDivisionError), self.ledger.transaction():
            for _ in range(self.draw.randint(0, 3)):
                self.step(depth + 1)
            raise ZeroDivisionError
        self.remaining, self.undone = before
        self.compare()

    def untouched(self, _: int) -> None:
        with self.ledger.untouched():
            assert self.lab.digest(self.lab.model) == self.lab.base
        self.compare()

    def compare(self) -> None:
        self.compared += 1
        assert [entry.id for entry in self.ledger.entries] == list(self.remaining)
        assert self.lab.digest(self.lab.model) == self.expected()

    def expected(self) -> str:
        fresh = Ledger.of(self.lab.renewed(self.lab.fresh))
        for name, patch in self.remaining.items():
            fresh.append(name, patch)
        return self.lab.digest(self.lab.fresh)


# Two seconds each: every architecture in bfloat16, which rounds most, and one also in float32 and float16.
EVERYDAY = [
    pytest.param(*kind, marks=[pytest.mark.slow] * (kind[0] != "gpt2" and kind[1] is torch.float32)) for kind in KINDS
]


@pytest.mark.parametrize(("arch", "dtype"), EVERYDAY, ids=lambda value: str(value).removeprefix("torch."))
def test_any_sequence_of_edits_leaves_the_bits_of_a_model_that_saw_only_the_remaining_ones(
    arch: str, dtype: torch.dtype, lab: Any, trials: Any, tried: Any
) -> None:
    bench, ran, compared = lab(arch, dtype), 0, 0
    expected_runs = -(-trials(210, 10_000) // len(KINDS))
    before = bench.bystanders()
    for seed in range(expected_runs):
        sequence = Sequence(bench, seed)
        sequence.run(steps=8)
        assert bench.bystanders() == before, f"sequence {seed}"
        sequence.ledger.clear()
        assert bench.digest(bench.model) == bench.base, f"sequence {seed}"
        assert sequence.ledger.nbytes() == 0
        ran, compared = ran + 1, compared + sequence.compared
    tried(1, ran, compared=compared)
    assert ran == expected_runs
    assert compared >= 2 * ran


class Subtracting(Sequence):
    """The control: undoes by subtracting what it added, as if that were the same."""

    def put(self, name: str, patch: Patch) -> None:
        self.add(patch, +1)
        self.remaining[name] = patch

    def take(self, *names: str) -> None:
        for name in names:
            self.undone[name] = self.remaining.pop(name)
            self.add(self.undone[name], -1)

    def add(self, patch: Patch, sign: int) -> None:
        for name, update in patch.updates.items():
            parameter = self.lab.model.get_parameter(name)
            delta = update.matrix(parameter.dtype, parameter.device)
            turned = name.endswith(("c_proj.weight", "c_fc.weight"))
            with torch.no_grad():
                parameter.add_(sign * (delta.T if turned else delta))

    def compare(self) -> None:
        self.compared += 1

    def failing(self, depth: int) -> None:
        del depth

    def untouched(self, _: int) -> None:
        pass


@pytest.mark.parametrize(("arch", "dtype"), KINDS, ids=lambda value: str(value).removeprefix("torch."))
def test_the_control_that_undoes_by_subtraction_is_caught(arch: str, dtype: torch.dtype, lab: Any) -> None:
    bench = lab(arch, dtype)
    caught = 0
    for seed in range(10):
        sequence = Subtracting(bench, seed)
        sequence.run(steps=8)
        sequence.take(*sequence.remaining)
        assert sequence.compared
        caught += bench.digest(bench.model) != bench.base
    assert caught >= 8


def test_tied_weights_stay_tied_and_go_by_either_name(lab: Any) -> None:
    bench = lab("gpt2", torch.float32)
    model = bench.renewed(bench.model)
    shape = model.lm_head.weight.shape
    patch = Dense(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    ledger = Ledger.of(model)
    ledger.append("head", Patch({"lm_head.weight": patch}))
    ledger.append("embedding", Patch({"transformer.wte.weight": patch}))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [list(entry.patch.updates) for entry in ledger.entries] == [["transformer.wte.weight"]] * 2
    ledger.remove("head")
    expected = bench.bytes["lm_head.weight"] + patch.delta
    assert torch.equal(model.lm_head.weight, expected)


def test_a_late_entry_among_many_is_undone_from_a_snapshot(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.editors.core.ledger import arithmetic

    bench = lab("llama", torch.bfloat16)
    ledger = Ledger.of(bench.renewed(bench.model))
    draw = random.Random(0)
    patches = [Patch({bench.names[0]: bench.update(bench.names[0], draw)}) for _ in range(200)]
    for i, patch in enumerate(patches):
        ledger.append(f"e{i}", patch)
    added: list[Update] = []
    real = arithmetic.add_update

    def counting(state: torch.Tensor, update: Update, *, transposed: bool) -> None:
        added.append(update)
        real(state, update, transposed=transposed)

    monkeypatch.setattr(arithmetic, "add_update", counting)
    ledger.remove("e190")
    assert 0 < len(added) <= 2 * ledger.spacing.every
    assert all(len(held.snapshots) <= ledger.spacing.kept for held in ledger._sums.values())
    edited = bench.digest(bench.model)
    fresh = Ledger.of(bench.renewed(bench.fresh))
    for i, patch in enumerate(patches):
        if i != 190:
            fresh.append(f"e{i}", patch)
    assert bench.digest(bench.fresh) == edited


def test_updates_too_small_for_16_bits_one_by_one_are_not_lost_in_their_sum(lab: Any) -> None:
    bench = lab("llama", torch.bfloat16)
    name = bench.names[0]
    ledger = Ledger.of(bench.renewed(bench.model))
    base = bench.bytes[name].float()
    tiny = Patch({name: Dense(base * 2**-10)})  # a quarter of bfloat16's half unit
    for i in range(64):
        ledger.append(f"e{i}", tiny)
    gained = bench.model.get_parameter(name).float() / base - 1
    assert gained[base != 0].mean().item() == pytest.approx(64 * 2**-10, rel=0.1)
