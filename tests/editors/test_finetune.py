"""Fine-tuning gives what a plain loop over a copy of the model gives, and keeps within its bounds on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuners import REQUESTS, Make, maker

from errata.editors import FTL, FTM, LoRA
from errata.editors.core.errors import ConfigError, NumericalError, OutOfMemoryError, RequestError
from errata.editors.core.families import fine_tuning
from errata.editors.core.ledger.entry import Weight
from errata.editors.core.ledger.patch import Dense, LowRank
from errata.editors.core.model.architecture import describe, is_transposed
from errata.editors.core.request import EditRequest

# Where a model computes its norms or attention in float32 whatever its dtype, padding changes the last digits of that.
AMONG_OTHERS = {"gpt2": 1e-10, "llama": 2e-4, "neox": 1e-6}
ARCHITECTURES = tuple(AMONG_OTHERS)


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Make:
    return maker(make_tiny, tiny_tokenizer)


# --- the reference: plain torch, one request a forward, no hooks, the whole model ----------------------------------


def reference_loss(model: Any, tokenizer: Any, request: EditRequest, *, at_prompt: bool) -> Tensor:
    """Mean of -log p over the answer's tokens, all of them asked for at the prompt's end or each behind the others."""
    prompt = tokenizer(request.text)["input_ids"]
    answer = tokenizer(" " + request.target)["input_ids"]
    ids = prompt if at_prompt else prompt + answer[:-1]
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for t, token in enumerate(answer):
        row = logits[len(prompt) - 1 + (0 if at_prompt else t)]
        total = total - (row[token] - torch.logsumexp(row, 0))
    return total / len(answer)


def reference_training(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], parameters: list[Tensor], config: Any, at_prompt: bool
) -> list[float]:
    """Adam on `parameters` of `model` itself; returns the mean loss of each pass."""
    optimizer = torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    before = [parameter.detach().clone() for parameter in parameters]
    bound, means = getattr(config, "norm_constraint", None), []
    for _ in range(config.num_steps):
        losses = []
        for start in range(0, len(requests), config.batch_size):
            part = requests[start : start + config.batch_size]
            batch = [reference_loss(model, tokenizer, request, at_prompt=at_prompt) for request in part]
            loss = torch.stack(batch).mean()
            losses += [value.item() for value in batch]
            if loss >= config.stop_loss:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if bound is not None:
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.data = torch.minimum(torch.maximum(parameter.data, old - bound), old + bound)
        means.append(sum(losses) / len(losses))
        if means[-1] < config.stop_loss:
            break
    return means


def reference_deltas(editor: Any, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
    """What fine-tuning the whole of a copy gives, (d_out, d_in) by name."""
    model = copy.deepcopy(editor.model).requires_grad_(False)
    architecture = describe(model)
    names = [architecture.weight_name(layer) for layer in editor.layers]
    weights: list[Tensor] = [model.get_parameter(name).requires_grad_() for name in names]
    before = [weight.detach().clone() for weight in weights]
    reference_training(model, editor.tokenizer, requests, weights, editor.config, at_prompt=isinstance(editor, FTL))
    deltas = [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
    transposed = [is_transposed(architecture.down(layer)) for layer in editor.layers]
    return {n: d.T if turn else d for n, d, turn in zip(names, deltas, transposed, strict=True)}


def close(ours: Any, theirs: dict[str, Tensor], *, tolerance: float = 1e-10) -> None:
    assert set(ours.updates) == set(theirs)
    for name, update in ours.updates.items():
        mine = update.matrix(torch.float64, torch.device("cpu"))
        assert float(theirs[name].abs().max()) > 1e-4
        torch.testing.assert_close(mine, theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [FTL, FTM])
def test_a_delta_is_that_of_a_plain_loop_over_a_copy_of_the_model(make: Make, kind: Any, architecture: str) -> None:
    editor = make(kind, architecture, layers=(0, 2), norm_constraint=0.015)
    for request, among_others in zip(REQUESTS, editor.compute(REQUESTS), strict=True):
        wanted = reference_deltas(editor, [request])
        (alone,) = editor.compute(request)
        assert all(isinstance(update, Dense) for update in alone.patch.updates.values())
        # Llama's final norm is in float32, where a sum over the tokens read depends on how it is grouped.
        close(alone.patch, wanted, tolerance=1e-5 if architecture == "llama" else 1e-10)
        close(among_others.patch, wanted, tolerance=AMONG_OTHERS[architecture])


@pytest.mark.parametrize("batch_size", [1, 2, 128])
@pytest.mark.parametrize("kind", [FTL, FTM])
def test_a_joint_edit_is_that_of_a_plain_loop_in_batches(make: Make, kind: Any, batch_size: int) -> None:
    editor = make(kind, batch_size=batch_size, weight_decay=0.1, batch_tokens=20)
    edit = editor.apply(REQUESTS)
    close(edit.patch, reference_deltas_of(editor, edit))


def reference_deltas_of(editor: Any, edit: Any) -> dict[str, Tensor]:
    edit.undo()
    return reference_deltas(editor, edit.requests)


@pytest.mark.parametrize(("kind", "at_prompt"), [(FTL, True), (FTM, False), (LoRA, False)])
def test_the_loss_before_the_first_step_is_the_one_computed_by_hand(make: Make, kind: Any, at_prompt: bool) -> None:
    editor = make(kind)
    with torch.no_grad():
        wanted = [float(reference_loss(editor.model, editor.tokenizer, r, at_prompt=at_prompt)) for r in REQUESTS]
    for edits in ([*editor.compute(REQUESTS)], [editor.compute(request)[0] for request in REQUESTS]):
        found = [edit.diagnostics[0]["losses"][0] for edit in edits]
        assert found == pytest.approx(wanted, abs=1e-12)
    assert len(set(wanted)) == len(REQUESTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_element_is_outside_the_bound_after_any_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from errata.editors import finetune

    editor = make(FTL, dtype=dtype, norm_constraint=3e-3, num_steps=6)
    largest, clamp = [], finetune.MasterWeights.project

    def watched(weights: Any) -> None:
        outside = [float((w - weights.base[n]).abs().max()) for n, w in weights.master.items()]
        clamp(weights)
        largest.append((max(outside), *(float((w - weights.base[n]).abs().max()) for n, w in weights.master.items())))

    monkeypatch.setattr(finetune.MasterWeights, "project", watched)
    (edit,) = editor.compute(REQUESTS[0])
    assert len(largest) == 6
    assert all(before > 3e-3 * 1.1 for before, _ in largest), "the bound was never touched"
    assert all(after <= 3e-3 * (1 + 1e-4) for _, after in largest)
    (update,) = edit.patch.updates.values()
    assert update.tensors[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(update.tensors[0].abs().max()) <= torch.tensor(3e-3, dtype=update.tensors[0].dtype)


def test_steps_too_small_for_bfloat16_are_not_lost(make: Make) -> None:
    """Each step moves a weight by less than half a unit of bfloat16; the sum of them is kept in float32."""
    editor = make(FTM, dtype=torch.bfloat16, lr=1e-6, num_steps=3)
    (update,) = editor.compute(REQUESTS[0])[0].patch.updates.values()
    moved = update.tensors[0].abs()
    assert float(moved.median()) == pytest.approx(3e-6, rel=0.1)
    weight = editor.architecture.weight(1)
    assert float(((weight.float() + update.tensors[0]).bfloat16() != weight).float().mean()) < 0.1


# --- when training ends ---------------------------------------------------------------------------------------------


def test_training_ends_with_the_first_pass_below_the_stop_loss_and_takes_no_step_on_it(make: Make) -> None:
    long = make(FTM, num_steps=80, lr=0.05, stop_loss=0.3)
    (edit,) = long.compute(REQUESTS[0])
    losses = edit.diagnostics[0]["losses"]
    assert 2 < len(losses) < 80
    assert losses[-1] < 0.3 <= min(losses[:-1])
    short = make(FTM, num_steps=len(losses) - 1, lr=0.05)
    close(edit.patch, {n: u.delta for n, u in short.compute(REQUESTS[0])[0].patch.updates.items()})


def test_one_that_is_done_leaves_the_batch_and_the_others_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(FTM, num_steps=80, lr=0.05, stop_loss=0.3)
    sizes, run = [], fine_tuning.Training._row_losses

    def counted(training: Any, piece: Any) -> Tensor:
        sizes.append(len(piece.members))
        return run(training, piece)

    monkeypatch.setattr(fine_tuning.Training, "_row_losses", counted)
    edits = editor.compute(REQUESTS)
    steps = [edit.diagnostics[0]["steps"] for edit in edits]
    assert len(set(steps)) > 1
    assert sum(sizes) == sum(steps)


def test_a_request_that_the_model_answers_already_is_left_as_it_is(make: Make) -> None:
    editor = make(FTM, num_steps=80, lr=0.05, stop_loss=0.3)
    with editor.applied(REQUESTS[0]):
        (again,) = editor.compute(REQUESTS[0])
    assert again.diagnostics[0]["steps"] == 1
    assert all(norm == 0 for norm in again.patch.norms().values())


def test_layers_below_the_edited_one_run_once(make: Make) -> None:
    editor = make(FTM, layers=(2,), num_steps=5)
    calls: list[int] = []
    for layer in range(3):
        editor.architecture.block(layer).register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    editor.compute(REQUESTS)
    assert [calls.count(layer) for layer in range(3)] == [1, 1, 6]


# --- LoRA -----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear map with a hand-written adapter beside it."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.A, self.B, self.scale, self.drop = base, A, B, scale, drop

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.drop(x) @ self.A.T) @ self.B.T * self.scale


def adapted_copy(editor: Any) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """A copy of the model whose target modules have adapters, drawn as LoRA's are, and those."""
    model, config = copy.deepcopy(editor.model).requires_grad_(False), editor.config
    drawn, dropped = (torch.Generator().manual_seed(config.seed) for _ in range(2))
    factors = {}

    def drop(x: Tensor) -> Tensor:
        kept = torch.rand(*x.shape[1:], generator=dropped) >= config.lora_dropout
        return x * kept / (1 - config.lora_dropout)

    for name in editor.modules:
        base = model.get_submodule(name)
        width = editor.architecture.d_model
        A = ((torch.rand(config.rank, width, generator=drawn) * 2 - 1) / width**0.5).double().requires_grad_()
        height = base(torch.zeros(1, width, dtype=torch.float64)).shape[-1]
        B = torch.zeros(height, config.rank, dtype=torch.float64, requires_grad=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(base, A, B, config.lora_alpha / config.rank, drop))
        factors[f"{name}.weight"] = A, B
    return model, factors


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_gives_the_factors_of_a_hand_written_adapter(make: Make, architecture: str, dropout: float) -> None:
    editor = make(LoRA, architecture, layers=None, rank=3, lora_alpha=6.0, lora_dropout=dropout, seed=5)
    for request, among_others in zip(REQUESTS, editor.compute(REQUESTS), strict=True):
        (edit,) = editor.compute(request)
        model, factors = adapted_copy(editor)
        parameters = [A for A, _ in factors.values()] + [B for _, B in factors.values()]
        losses = reference_training(model, editor.tokenizer, [request], parameters, editor.config, at_prompt=False)
        assert edit.diagnostics[0]["losses"] == pytest.approx(losses, rel=1e-9)
        wanted = {name: 2.0 * (B @ A).detach() for name, (A, B) in factors.items()}
        close(edit.patch, wanted)
        close(among_others.patch, wanted, tolerance=AMONG_OTHERS[architecture])
        for name, update in edit.patch.updates.items():
            assert isinstance(update, LowRank)
            assert update.U.shape[1] == 3
            torch.testing.assert_close(update.V, factors[name][0].detach(), rtol=0, atol=1e-10)


def test_a_joint_edit_with_lora_takes_a_step_a_request_by_default(make: Make) -> None:
    editor = make(LoRA, lora_dropout=0.0)
    edit = editor.apply(REQUESTS)
    edit.undo()
    model, factors = adapted_copy(editor)
    parameters = [A for A, _ in factors.values()] + [B for _, B in factors.values()]
    assert editor.config.batch_size == 1
    reference_training(model, editor.tokenizer, REQUESTS, parameters, editor.config, at_prompt=False)
    close(edit.patch, {name: 4.0 * (B @ A).detach() for name, (A, B) in factors.items()})


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    from errata.editors.lora import LoRAConfig, _Adapters

    config = LoRAConfig(lora_dropout=0.25)
    weight = Weight("x.weight", torch.nn.Parameter(torch.zeros(2, 400)), transposed=False)
    adapters = _Adapters({"x": weight}, config, torch.float64)
    out = adapters._dropped(torch.ones(3, 20, 400, dtype=torch.float64), [20, 7, 20])
    real = torch.cat([out[0], out[1, :7], out[2]])
    assert float((real == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(real.mean()) == pytest.approx(1, abs=0.02)
    assert not bool(out[1, 7:].any())


@pytest.mark.parametrize(
    ("architecture", "asked", "found"),
    [
        ("gpt2", None, ["attn.c_attn"]),
        ("llama", None, ["self_attn.q_proj", "self_attn.v_proj"]),
        ("neox", None, ["attention.query_key_value"]),
        ("gpt2", ("mlp.c_fc", "attn.c_proj"), ["attn.c_proj", "mlp.c_fc"]),
        ("gpt2", ("c_proj",), ["attn.c_proj", "mlp.c_proj"]),
    ],
)
def test_adapters_go_to_the_modules_named_or_to_queries_and_values(
    make: Make, architecture: str, asked: Any, found: list[str]
) -> None:
    editor = make(LoRA, architecture, target_modules=asked, layers=(0, 2))
    prefix = editor.architecture.blocks_path
    assert list(editor.modules) == [f"{prefix}.{layer}.{name}" for layer in (0, 2) for name in found]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FTL, FTM, LoRA])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_request(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: Any, value: float
) -> None:
    editor = make(kind)
    run = fine_tuning.Training._row_losses

    def spoilt(training: Any, piece: Any) -> Tensor:
        return run(training, piece) * torch.tensor([value if row.name == "two" else 1.0 for _, _, row in piece.members])

    monkeypatch.setattr(fine_tuning.Training, "_row_losses", spoilt)
    for make_edit in (editor.compute, editor.apply):
        with pytest.raises(NumericalError, match=f"request two: the loss is {value} at pass 1"):
            make_edit(REQUESTS)
    assert len(editor.ledger) == 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    editor = make(FTM)
    wanted = editor.compute(REQUESTS)
    run, sizes = fine_tuning.Training.run, []

    def small(training: Any, *args: Any) -> None:
        sizes.append(len(training.problems))
        if len(training.problems) > 1:
            raise torch.OutOfMemoryError("injected")
        run(training, *args)

    monkeypatch.setattr(fine_tuning.Training, "run", small)
    found = editor.compute(REQUESTS)
    assert sizes == [3, 1, 2, 1, 1]
    assert "halving" in caplog.text
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine.patch, {name: update.delta for name, update in theirs.patch.updates.items()})
    with pytest.raises(OutOfMemoryError, match="no memory to train on request one"):
        monkeypatch.setattr(fine_tuning.Training, "run", lambda *_: _out_of_memory())
        editor.apply(REQUESTS[0])


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("injected")


def test_a_request_that_is_too_long_is_named(make: Make) -> None:
    long = EditRequest("{}" + " is near the river" * 100, "Varland", "Brast", id="long")
    with pytest.raises(RequestError, match=r"request long, field 'prompt': needs \d+ tokens with its answer"):
        make(FTM).compute([REQUESTS[0], long])


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (FTL, {"kl_factor": 0.1}, "kl_factor: expected 0, got 0.1"),
        (FTL, {"norm_constraint": 0.0}, "norm_constraint: expected a number above 0"),
        (FTM, {"layers": (7,)}, "layers: expected ascending layers from 0 to 2"),
        (FTM, {"num_steps": 0}, "num_steps: expected a number above 0"),
        (LoRA, {"target_modules": ("c_atn",)}, "target_modules: layer 1 has no 'c_atn'; did you mean 'c_attn'"),
        (LoRA, {"target_modules": ()}, "target_modules: expected at least one name"),
        (LoRA, {"lora_dropout": 1.0}, "lora_dropout: expected a share"),
        (LoRA, {"rank": 0}, "rank: expected a number above 0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(make: Make, kind: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(kind, **fields)


def test_the_rule_moves_weights_by_shares_of_what_a_linear_loss_would_need(make: Make) -> None:
    """reach = L / ||g||_1, by hand; the rate is an eighth of it and the bound the whole, also far from any unit."""
    editor = make(FTL, lr=None, norm_constraint="rule", num_steps=1)
    model, W = editor.model, editor.maps[0].module.weight
    reaches = []
    for request in REQUESTS:
        loss = reference_loss(model, editor.tokenizer, request, at_prompt=True)
        (gradient,) = torch.autograd.grad(loss, W.requires_grad_())
        reaches.append(float(loss.detach() / gradient.abs().sum()))
    edits = editor.compute(REQUESTS)
    for edit, reach in zip(edits, reaches, strict=True):
        (update,) = edit.patch.updates.values()
        assert float(update.matrix(torch.float64, "cpu").abs().max()) == pytest.approx(reach / 8, rel=1e-6)
        assert edit.diagnostics[0]["filled_in"] == pytest.approx({"lr": reach / 8, "norm_constraint": reach}, rel=1e-6)
    together = make(FTL, lr=None, norm_constraint="rule", num_steps=30, stop_loss=0.0).apply(REQUESTS)
    assert together.diagnostics[0]["filled_in"]["norm_constraint"] == pytest.approx(sorted(reaches)[1], rel=1e-6)
    assert float(next(iter(together.patch.updates.values())).matrix(torch.float64, "cpu").abs().max()) == pytest.approx(
        sorted(reaches)[1]
    )
    published = make(FTL, lr=None, norm_constraint="rule", as_published=True).apply(REQUESTS[0])
    assert "filled_in" not in published.diagnostics[0]
    assert float(
        next(iter(published.patch.updates.values())).matrix(torch.float64, "cpu").abs().max()
    ) == pytest.approx(5e-4)
