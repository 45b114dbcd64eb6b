"""Laws of every registered method on every tiny architecture: a method is covered by being registered."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from everyday import marks, of_laws, pairs
from quick_editors import METHODS, REQUESTS, build, having
from second_device import ELSEWHERE, elsewhere, spread_out

from errata import editors
from errata.editors.core.config_docs import with_arguments
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, ExportError, LedgerError, NumericalError
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.tokens import prompt_ids
from errata.testing import laws
from errata.testing.laws import digest, flags

# Values in the forms that plain formats have for them: lists, whole numbers.
PLAIN: dict[str, Any] = {
    "layers": [2, 3],
    "v_lr": 1,
    "lr": 1,
    "context_template_length_params": [[4, 2]],
    "seed": 3,
}


@pytest.fixture(scope="module")
def make_editor(make_tiny: Any, tiny_tokenizer: Any) -> Callable[..., Editor]:
    def make(method: str, architecture: str = "gpt2", dtype: torch.dtype = torch.float32, **fields: Any) -> Editor:
        return build(method, make_tiny(architecture, dtype=dtype), tiny_tokenizer, **fields)

    return make


TRIALS = [
    pytest.param(trial, id=f"{method}-{trial}", marks=marks(is_everyday))
    for number, method in enumerate(METHODS)
    for trial, is_everyday in of_laws(number, partial(build, method))
]


@pytest.mark.parametrize("trial", TRIALS)
def test_every_method_keeps_the_law(trial: laws.Trial) -> None:
    trial()


@pytest.mark.parametrize("method", METHODS)
def test_the_signature_and_the_docstring_of_a_method_name_every_argument(method: str) -> None:
    kind = editors.get(method)
    names = list(inspect.signature(kind).parameters)
    assert names[:3] == ["model", "tokenizer", "config"]
    assert names[-1] == "progress"
    assert inspect.getdoc(kind) != inspect.getdoc(kind.__base__), "the method has no docstring of its own"
    summary, _, section = (inspect.getdoc(kind) or "").partition("\n\nArgs:\n")
    assert summary.splitlines()[0].endswith((".", ":"))
    assert re.findall(r"^    (\w+): \S", section, re.MULTILINE)[: len(names)] == names
    assert not {"args", "kwargs", "options"} & set(names)


def test_a_docstring_takes_the_arguments_of_its_bases_and_keeps_its_other_sections() -> None:
    class Parent:
        """Parent.

        Args:
            first: Said once,
                on two lines.
            second: Said by the parent.
        """

        def __init__(self, first: int, second: int) -> None: ...

    class Child(Parent):
        """Child.

        Args:
            second: Said by the child.
            third: New.

        Raises:
            ValueError: always.
        """

        def __init__(self, first: int, third: int, second: int) -> None: ...

    class Plain(Child):
        """Plain.

        Attributes:
            a: One.
        """

    class Silent(Child):
        pass

    section = "Args:\n    first: Said once,\n        on two lines.\n    third: New.\n    second: Said by the child."
    assert with_arguments(Child) == f"Child.\n\n{section}\n\nRaises:\n    ValueError: always.\n"
    assert with_arguments(Plain) == f"Plain.\n\n{section}\n\nAttributes:\n    a: One.\n"
    assert with_arguments(Silent) is None


@pytest.mark.parametrize(("method", "architecture"), pairs(METHODS, ("gpt2", "llama")))
def test_an_adapter_of_the_edit_gives_the_edited_model_or_the_method_says_why_it_has_none(
    make_editor: Any, tmp_path: Path, method: str, architecture: str
) -> None:
    peft = pytest.importorskip("peft")
    editor = make_editor(method, architecture)

    def asked() -> torch.Tensor:
        (read,) = read_on(editor.model, editor.tokenizer, [AskedPrompt(REQUESTS[0].text)])
        return torch.tensor([prompt_ids(editor.tokenizer, read.text)])

    edit = editor.apply(REQUESTS)
    wanted = editor.model(asked()).logits
    edit.undo()
    before = editor.model(ids := asked()).logits
    assert not torch.allclose(before[:, -1], wanted[:, -1], atol=1e-3)
    try:
        edit.export_lora(tmp_path / "adapter")
    except ExportError as error:
        assert method in ("grace", "ice", "ike", "scr", "wise", "coachhook", "memoir"), "these alone change no weights"
        assert edit.id in str(error)
        assert not (tmp_path / "adapter").exists()
    else:
        found = peft.PeftModel.from_pretrained(editor.model, str(tmp_path / "adapter")).eval()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(("method", "blocks"), pairs(METHODS, [ELSEWHERE, "cpu"]))
def test_a_model_spread_over_devices_gets_the_edits_that_it_gets_on_one(
    make_editor: Any, method: str, blocks: Any
) -> None:
    def solved(spread: bool) -> list[Patch]:
        editor = make_editor(method, "gpt2", torch.float64)
        if spread:
            spread_out(editor.model, blocks=blocks)
            assert {parameter.device for parameter in editor.model.parameters()} == {torch.device("cpu"), ELSEWHERE}
            editor = build(method, editor.model, editor.tokenizer)
        with editor._at_work():
            return [solution.patch for solution in editor.solve(REQUESTS)]

    on_one = solved(False)
    with elsewhere():
        for one, several in zip(on_one, solved(True), strict=True):
            assert [name for name, _ in several.tensors] == [name for name, _ in one.tensors]
            for (name, tensor), (_, wanted) in zip(several.tensors, one.tensors, strict=True):
                torch.testing.assert_close(tensor.cpu(), wanted, rtol=1e-7, atol=1e-9, msg=name)


# --- faults -------------------------------------------------------------------------------------------------------

PHASES = {
    "contexts": "errata.editors.core.families.context_templates._sample",
    "keys": "errata.editors.core.families.locate_then_edit.last_keys",
    "factorisation": "errata.editors.core.families.locate_then_edit.factorise",
    "directions": "errata.editors.rome.update_directions",
    "buckets": "errata.editors.core.families.value_search.make_buckets",
    "loss": "errata.editors.core.families.value_search._Search._evaluate",
    "step": "errata.editors.core.families.value_search._Search._adam_step",
    "values": "errata.editors.rome.rank_one_values",
    "walk": "errata.editors.core.forward.layerwise.LayerWalk.__init__",
    "layer": "errata.editors.core.forward.layerwise.LayerWalk.advance",
    "adjoint": "errata.editors.memit.memit_adjoint",
    "projector": "errata.editors.alphaedit.Projector.null_space",
    "past keys": "errata.editors.alphaedit.AlphaEdit._past_keys",
    "backward pass": "errata.editors.core.forward.gradient_factors._pass",
    "factors": "errata.editors.core.families.gradient_editor.gradient_factors",
    "network": "errata.editors.core.families.hypernetwork.Hypernetwork.forward",
    "lower pass": "errata.editors.core.forward.whole_rows.prepare_upper_blocks",
    "row ends": "errata.editors.core.forward.whole_rows.prepare_upper_ends",
    "row losses": "errata.editors.core.families.joint_training.Training._row_losses",
    "training step": "errata.editors.core.families.joint_training.Training._step",
    "clamp": "errata.editors.finetune.MasterWeights.project",
    "adapter": "errata.editors.lora._Adapters.output",
    "drafts": "errata.editors.grace.plan_jobs",
    "value": "errata.editors.grace.Value.output",
}


def _owner(path: str) -> tuple[Any, str]:
    """The module or class that the last part of `path` is an attribute of, and that part."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise AssertionError(path)


_SHARED = ("contexts", "buckets", "loss", "step")
_TRAINING = ("lower pass", "row losses", "training step")
_PHASES_OF = {
    "rome": (*_SHARED, "keys", "factorisation", "directions", "values"),
    "memit": (*_SHARED, "walk", "layer", "factorisation", "adjoint"),
    "alphaedit": (*_SHARED, "walk", "layer", "projector", "past keys"),
    "ft_l": (*_TRAINING, "clamp"),
    "lora": (*_TRAINING, "adapter"),
    "mend": ("factors", "backward pass", "network"),
    "grace": ("drafts", "row ends", "row losses", "training step", "value"),
}


def _forget(editor: Any) -> None:
    """Let the editor compute everything again that it keeps between edits."""
    editor._prefixes, editor._factors = None, {}
    if hasattr(editor, "_projectors"):
        editor._projectors.clear()


_STRUCK = [
    pytest.param(method, phase, fault, id=f"{method}-{phase}-{fault}", marks=marks((number + place) % 3 == turn))
    for number, (method, found) in enumerate(_PHASES_OF.items())
    for place, phase in enumerate(found)
    for turn, fault in enumerate(laws.FAULTS)
]


@pytest.mark.parametrize(("method", "phase", "fault"), _STRUCK)
def test_a_fault_in_any_phase_of_a_method_leaves_the_model_as_before(
    make_editor: Any, method: str, phase: str, fault: str
) -> None:
    """Beside the law, which strikes between the method and the ledger, and within the ledger."""
    editor = make_editor(method, context_template_length_params=((2, 1),))
    kept = editor.compute(REQUESTS[0])[0].apply()
    _forget(editor)
    before, untouched = digest(editor.model), flags(editor.model)
    action, expected = laws.FAULTS[fault]
    for after in (False, True):
        with laws.faulty(*_owner(PHASES[phase]), action, after=after) as landed, pytest.raises(expected):
            editor.apply(REQUESTS[1])
        assert landed, f"the fault in {phase} was never reached"
        _forget(editor)
        assert [entry.id for entry in editor.ledger.entries] == [kept.id]
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
        value_search = found(*args)
        value_search[0].delta[3] = value
        return value_search

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
    from errata.editors.core.families import value_search

    editor = make_editor("rome", dtype=torch.float64)
    wanted = editor.compute(REQUESTS)
    original, sizes = value_search.make_buckets, []

    def small(architecture: Any, problems: Any, **options: Any) -> Any:
        sizes.append(len(problems))
        if len(problems) > 1:
            raise torch.OutOfMemoryError("injected")
        return original(architecture, problems, **options)

    monkeypatch.setattr(value_search, "make_buckets", small)
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
