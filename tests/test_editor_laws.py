"""Laws of every registered method on every tiny architecture: a method is covered by being registered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from errata import editors
from errata.editors import ROME
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, ExportError, LedgerError, NumericalError, OutOfMemoryError
from errata.editors.core.hooks import tensors_of
from errata.editors.core.ledger import Ledger
from errata.editors.core.locate_then_edit import LocateThenEdit
from errata.editors.core.request import EditRequest
from errata.editors.core.trained import TrainedEditor

REQUESTS = [
    EditRequest("The capital of {} is", "Varland", "Brast"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("{} lies in", "São Verão", "Northern Tarvos"),
]
METHODS = editors.METHODS
# What every method is given that has such a field, to be quick on models this small.
QUICK: dict[str, Any] = {"v_num_grad_steps": 4, "layers": (1,), "context_template_length_params": ((3, 2),)}
# What a method needs beside that: two layers, and solves on the scale of their keys.
FIELDS: dict[str, dict[str, Any]] = {
    "memit": {"layers": (0, 1), "mom2_update_weight": 10.0},
    "emmet": {"layers": (0, 1)},
    "alphaedit": {"layers": (0, 1), "nullspace_energy": 0.3, "L2": 0.1},
    "ft_l": {"layers": (0, 1), "num_steps": 3},
    "ft_m": {"layers": (0, 1), "num_steps": 3},
    "lora": {"num_steps": 3},
    "mend": {"layers": (0, 1), "rank": 8, "edit_lr": 0.01},
}
# Values in the forms that plain formats have for them: lists, whole numbers.
PLAIN: dict[str, Any] = {
    "layers": [2, 3],
    "v_lr": 1,
    "lr": 1,
    "context_template_length_params": [[4, 2]],
    "seed": 3,
}
# Methods that solve requests together solve them otherwise than one after another.
ONE_BY_ONE = [name for name in METHODS if editors.get(name).solve_together is Editor.solve_together]
ARCHITECTURES = ("gpt2", "llama", "neox")
DTYPES = (torch.float32, torch.bfloat16)


def digest(model: Any) -> str:
    """SHA-256 of every parameter and buffer, and of all that hooks of edits read, by name."""
    total = hashlib.sha256()
    for name, tensor in (*model.state_dict().items(), *tensors_of(model)):
        total.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def having(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a Config has a field for."""
    return {name: value for name, value in values.items() if name in kind().to_dict()}


def parts(edit: Any) -> dict[str, torch.Tensor]:
    """What an edit adds, in forms that can be compared: multiplied out, and the tensors of its adapters."""
    updates = {name: u.matrix(torch.float64, torch.device("cpu")) for name, u in edit.patch.updates.items()}
    return updates | {f"{m}:{n}": t for m, adapter in edit.patch.adapters.items() for n, t in adapter.tensors.items()}


def contents(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter, and of all that hooks of edits read."""
    named = (*model.named_parameters(), *tensors_of(model))
    return {name: tensor.detach().clone() for name, tensor in named}


def hooked(model: Any) -> set[str]:
    """Names of the modules that have a forward hook."""
    return {name for name, module in model.named_modules() if module._forward_hooks}


def flags(model: Any) -> tuple[Any, ...]:
    """What an edit must not leave a trace in, besides the bytes."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    )


@pytest.fixture(scope="module")
def make_editor(make_tiny: Any, tiny_tokenizer: Any) -> Callable[..., Editor]:
    def make(method: str, architecture: str = "gpt2", dtype: torch.dtype = torch.float32, **fields: Any) -> Editor:
        model = make_tiny(architecture, dtype=dtype)
        kind: Any = editors.get(method)
        config: Any = kind.Config(**having(kind.Config, {**QUICK, **FIELDS.get(method, {}), **fields}))
        if issubclass(kind, TrainedEditor):
            return kind(model, tiny_tokenizer, config, trained=False)
        if not issubclass(kind, LocateThenEdit):
            return kind(model, tiny_tokenizer, config)
        width = model.config.intermediate_size if architecture != "gpt2" else 4 * model.config.n_embd
        factor = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        moment = factor @ factor.T / width + 0.1 * torch.eye(width)
        moments: Any = dict.fromkeys(config.layers, moment)
        return kind(model, tiny_tokenizer, config, moments=moments)

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_apply_leaves_the_model_edited_and_undo_in_any_order_restores_every_bit(
    make_editor: Any, method: str, architecture: str, dtype: torch.dtype
) -> None:
    editor = make_editor(method, architecture, dtype)
    model = editor.model.train()
    model.requires_grad_(True)
    before, untouched = digest(model), flags(model)
    first = editor.apply(REQUESTS[0])
    only_first = digest(model)
    assert only_first != before
    second = editor.apply(REQUESTS[1:])
    first.undo()
    assert digest(model) not in (before, only_first)
    second.undo()
    assert digest(model) == before
    first.apply()
    assert digest(model) == only_first
    with editor.applied(REQUESTS[2]) as third:
        assert third.is_applied
        first.undo()
    assert digest(model) == before
    assert flags(model) == untouched


@pytest.mark.parametrize("architecture", ("gpt2", "llama"))
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_the_edit_gives_the_edited_model_or_the_method_says_why_it_has_none(
    make_editor: Any, tmp_path: Path, method: str, architecture: str
) -> None:
    peft = pytest.importorskip("peft")
    editor = make_editor(method, architecture)
    ids = torch.tensor([[5, 17, 230, 41, 8, 99]])
    edit = editor.apply(REQUESTS)
    wanted = editor.model(ids).logits
    edit.undo()
    before = editor.model(ids).logits
    assert not torch.allclose(before, wanted, atol=1e-3)
    try:
        edit.export_lora(tmp_path / "adapter")
    except ExportError as error:
        assert edit.id in str(error)
        assert not (tmp_path / "adapter").exists()
    else:
        found = peft.PeftModel.from_pretrained(editor.model, str(tmp_path / "adapter")).eval()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_compute_touches_nothing_and_gives_each_request_the_edit_it_would_get_alone(
    make_editor: Any, method: str
) -> None:
    editor = make_editor(method, dtype=torch.float64)
    before = digest(editor.model)
    together = editor.compute(REQUESTS)
    assert digest(editor.model) == before
    assert [edit.requests for edit in together] == [(request,) for request in REQUESTS]
    for request, edit in zip(REQUESTS, together, strict=True):
        (alone,) = editor.compute(request)
        assert parts(edit)
        torch.testing.assert_close(parts(edit), parts(alone), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ONE_BY_ONE)
def test_requests_applied_together_are_what_they_are_one_after_another(make_editor: Any, method: str) -> None:
    editor = make_editor(method, dtype=torch.float64)
    edit = editor.apply(REQUESTS)
    together = contents(editor.model)
    assert len(editor.ledger) == 1
    assert len(edit.diagnostics) == len(REQUESTS)
    edit.undo()
    for request in REQUESTS:
        editor.apply(request)
    torch.testing.assert_close(contents(editor.model), together, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_patch_s_parameters_and_modules_change(make_editor: Any, method: str) -> None:
    editor = make_editor(method)
    before, hooks = contents(editor.model), hooked(editor.model)
    edit = editor.apply(REQUESTS[0])
    changed = {name for name, p in editor.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(edit.patch.updates)
    assert hooked(editor.model) - hooks == set(edit.patch.adapters)
    assert changed or edit.patch.adapters


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_bits(make_editor: Any, method: str) -> None:
    digests = set()
    for _ in range(2):
        torch.manual_seed(torch.seed())
        editor = make_editor(method)
        editor.apply(REQUESTS)
        digests.add(digest(editor.model))
    assert len(digests) == 1


@pytest.mark.parametrize("method", METHODS)
def test_two_editors_on_one_model_share_its_ledger_and_undo_in_any_order(make_editor: Any, method: str) -> None:
    editor = make_editor(method)
    other = ROME(editor.model, editor.tokenizer, ROME.Config(layers=(0,), mom2_adjustment=False))
    before = digest(editor.model)
    mine, theirs = editor.apply(REQUESTS[0]), other.apply(REQUESTS[1])
    assert len(Ledger.of(editor.model)) == 2
    mine.undo()
    theirs.undo()
    assert digest(editor.model) == before
    mine.apply()
    theirs.apply()
    editor.rollback()
    assert digest(editor.model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_survives_plain_values(method: str) -> None:
    kind = editors.get(method).Config
    config = kind.from_dict(having(kind, PLAIN))
    assert config != kind()
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert kind.from_dict(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))) == config


def test_an_edit_says_what_it_is(make_editor: Any) -> None:
    editor = make_editor("rome")
    edit = editor.apply(REQUESTS[1])
    (report,) = edit.diagnostics
    assert report["request"] == REQUESTS[1].id
    assert len(report["losses"]) == report["steps"] <= 4
    assert -1 <= report["key_cosine"] <= 1
    assert report["update_norm"] == pytest.approx(next(iter(edit.patch.norms().values())))
    assert report["precision"] == "float32"
    with pytest.raises(LedgerError, match="applied already"):
        edit.apply()
    edit.undo()
    with pytest.raises(LedgerError, match="nothing to undo"):
        edit.undo()


# --- faults -------------------------------------------------------------------------------------------------------

PHASES = {
    "contexts": "errata.editors.core.contexts._sample",
    "keys": "errata.editors.core.locate_then_edit.last_keys",
    "factorisation": "errata.editors.core.locate_then_edit.factorise",
    "directions": "errata.editors.rome.directions",
    "buckets": "errata.editors.core.targets._buckets",
    "loss": "errata.editors.core.targets._Search._evaluate",
    "step": "errata.editors.core.targets._Search._adam_step",
    "values": "errata.editors.rome.rank_one_values",
    "walk": "errata.editors.core.walk.Walk.__init__",
    "layer": "errata.editors.core.walk.Walk.advance",
    "adjoint": "errata.editors.memit.memit_adjoint",
    "projector": "errata.editors.alphaedit.Projector.null_space",
    "past keys": "errata.editors.alphaedit.AlphaEdit._past_keys",
    "backward pass": "errata.editors.core.factors._pass",
    "factors": "errata.editors.mend.gradient_factors",
    "network": "errata.editors.core.hypernetwork.Hypernetwork.forward",
    "plan": "errata.editors.core.ledger.extended",
    "install": "errata.editors.core.ledger.Ledger._install",
    "write": "errata.editors.core.ledger._write",
    "lower pass": "errata.editors.core.upper.prepare",
    "row losses": "errata.editors.core.tuning.Training._row_losses",
    "training step": "errata.editors.core.tuning.Training._step",
    "clamp": "errata.editors.finetune._Weights.project",
    "adapter": "errata.editors.lora._Adapters.output",
}


def _calls(monkeypatch: pytest.MonkeyPatch, path: str, fault: Callable[[], None], after: bool) -> list[int]:
    """Make the function at `path` call `fault` before or after its own work; returns a list that grows as it does."""
    import importlib

    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:-1]:
            owner = getattr(owner, part)
        break
    original, landed = getattr(owner, parts[-1]), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if after:
            result = original(*args, **kwargs)
        if not landed:
            landed.append(1)
            fault()
        return result if after else original(*args, **kwargs)

    monkeypatch.setattr(owner, parts[-1], faulty)
    return landed


def _raise(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def _interrupt() -> None:
    import signal

    signal.raise_signal(signal.SIGINT)


FAULTS = {
    "exception": (_raise(RuntimeError("injected")), RuntimeError),
    "memory": (_raise(torch.OutOfMemoryError("injected")), (torch.OutOfMemoryError, OutOfMemoryError)),
    "ctrl-c": (_interrupt, KeyboardInterrupt),
}


_SHARED = ("contexts", "buckets", "loss", "step", "plan", "install", "write")
_TRAINING = ("lower pass", "row losses", "training step", "plan", "install", "write")
_PHASES_OF = {
    "rome": (*_SHARED, "keys", "factorisation", "directions", "values"),
    "memit": (*_SHARED, "walk", "layer", "factorisation", "adjoint"),
    "alphaedit": (*_SHARED, "walk", "layer", "projector", "past keys"),
    "ft_l": (*_TRAINING, "clamp"),
    "lora": (*_TRAINING, "adapter"),
    "mend": ("factors", "backward pass", "network", "plan", "install", "write"),
}


def _forget(editor: Any) -> None:
    """Let the editor compute everything again that it keeps between edits."""
    editor._prefixes, editor._factors = None, {}
    if hasattr(editor, "_projectors"):
        editor._projectors.clear()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("method", "phase"), [(name, phase) for name, found in _PHASES_OF.items() for phase in found])
def test_a_fault_in_any_phase_leaves_the_model_as_before(
    make_editor: Any, monkeypatch: pytest.MonkeyPatch, method: str, phase: str, fault: str
) -> None:
    editor = make_editor(method, context_template_length_params=((2, 1),))
    kept = editor.compute(REQUESTS[0])[0].apply()
    _forget(editor)
    before, untouched = digest(editor.model), flags(editor.model)
    action, expected = FAULTS[fault]
    for after in (False, True):
        with monkeypatch.context() as patched:
            landed = _calls(patched, PHASES[phase], action, after)
            with pytest.raises(expected):
                editor.apply(REQUESTS[1])
            assert landed, f"the fault in {phase} was never reached"
        _forget(editor)
        # Ctrl-C may also be honoured after the write: then the edit is complete, and the only one that is new.
        added = [entry.id for entry in editor.ledger.entries if entry.id != kept.id]
        if added:
            assert fault == "ctrl-c" and phase in ("plan", "install", "write") and len(added) == 1
            editor.ledger.remove_many(added)
        assert digest(editor.model) == before, (phase, fault, after)
        assert flags(editor.model) == untouched


def test_the_fault_test_notices_a_model_that_is_left_half_edited(make_editor: Any) -> None:
    """The control: the digest that the law compares sees one flipped bit."""
    editor = make_editor("rome")
    before = digest(editor.model)
    weight = editor.architecture.weight(1)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert digest(editor.model) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_reach_the_weights(
    make_editor: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    editor = make_editor("rome")
    before = digest(editor.model)
    found = editor.targets

    def poisoned(*args: Any) -> Any:
        targets = found(*args)
        targets[0].delta[3] = value
        return targets

    monkeypatch.setattr(editor, "targets", poisoned)
    with pytest.raises(NumericalError, match="NaN or inf"):
        editor.apply(REQUESTS[0])
    assert digest(editor.model) == before
    assert len(editor.ledger) == 0


def test_an_exploded_update_is_refused(make_editor: Any) -> None:
    editor = make_editor("rome", max_norm_ratio=1e-6)
    before = digest(editor.model)
    with pytest.raises(NumericalError, match="times the weight's"):
        editor.apply(REQUESTS[0])
    assert digest(editor.model) == before


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    make_editor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from errata.editors.core import targets

    editor = make_editor("rome", dtype=torch.float64)
    wanted = editor.compute(REQUESTS)
    original, sizes = targets._buckets, []

    def small(architecture: Any, problems: Any, **options: Any) -> Any:
        sizes.append(len(problems))
        if len(problems) > 1:
            raise torch.OutOfMemoryError("injected")
        return original(architecture, problems, **options)

    monkeypatch.setattr(targets, "_buckets", small)
    got = editor.compute(REQUESTS)
    assert sizes == [3, 1, 2, 1, 1]
    assert "halving" in caplog.text
    for mine, theirs in zip(got, wanted, strict=True):
        for a, b in zip(mine.patch.updates.values(), theirs.patch.updates.values(), strict=True):
            torch.testing.assert_close(a.tensors, b.tensors, rtol=1e-8, atol=1e-10)


def test_an_unknown_method_or_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rome'"):
        editors.get("rom")
    with pytest.raises(ConfigError, match="unknown field v_lrr; did you mean 'v_lr'"):
        editors.get("rome").Config.from_dict({"v_lrr": 1.0})


@pytest.fixture(autouse=True)
def _no_stray_handlers() -> Iterator[None]:
    import signal

    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before, "a SIGINT handler was left behind"
