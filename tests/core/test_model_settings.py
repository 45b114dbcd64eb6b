"""What a model's folder says about editing it is used, checked and confined to the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import errata
from errata.editors import FTM, MEMOIR, ROME, WISE, CrispEdit, UltraEdit
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.model_settings import ModelSettings, read_model_settings
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.request import EditRequest

# More tokens, and more various ones, than the 128 dimensions of a key, so that its second moment has an inverse.
TEXTS = [f"{a} {b} {i} of {c}." for i, a in enumerate(["Varland", "Quelm", "Brast"]) for b in ["lies", "is", "plays"]
         for c in ["Oslen", "Tarvos", "nobody", "French", "Seattle"]]  # fmt: skip


@pytest.fixture
def folder(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tiny("gpt2").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(TEXTS))
    editors = {"rome": {"layers": [2], "v_num_grad_steps": 2, "context_template_length_params": [[2, 1]]}}
    (folder / "errata.json").write_text(json.dumps({"text": "text.txt", "editors": editors}))
    return folder


def test_an_editor_takes_settings_and_text_from_the_model_s_folder(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    editor = ROME(model, tiny_tokenizer)
    assert editor.layers == (2,)
    assert editor.config.v_lr == ROME.Config().v_lr
    editor.compute(EditRequest("{} lies in", "Quelm", "Varland"))
    wanted = second_moments(model, tiny_tokenizer, [2], TEXTS, cache_dir=tmp_path / "other").matrices[2]
    assert editor.moment(2).equal(wanted)


def test_a_mapping_is_laid_over_the_folder_s_settings(folder: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = ROME(model, tiny_tokenizer, {"seed": 3, "v_num_grad_steps": 5}).config
    assert (config.layers, config.seed, config.v_num_grad_steps) == ((2,), 3, 5)
    assert config.context_template_length_params == ((2, 1),)
    assert ROME(model, tiny_tokenizer, {}).config == ROME(model, tiny_tokenizer).config
    assert ROME(model, tiny_tokenizer, {"layers": None}).layers != (2,)  # null asks for the method's own rule
    with pytest.raises(ConfigError, match="unknown field v_nm_grad_steps; did you mean"):
        ROME(model, tiny_tokenizer, {"v_nm_grad_steps": 3})


@pytest.mark.parametrize("name", ["memit", "alphaedit", "ft_m", "grace"])
def test_a_field_in_python_and_at_the_command_line_leave_the_same_settings(name: str, testbed: Any) -> None:
    from errata import editors
    from errata.benchmarks.bench.config import ModelConfig, editor_config

    at_the_command_line = editor_config({"name": name, "seed": 5}, ModelConfig("world"))
    model, tokenizer = testbed
    assert editors.get(name)(model, tokenizer, {"seed": 5}).config == at_the_command_line
    assert at_the_command_line != type(at_the_command_line)(seed=5)  # the folder has settings of its own


@pytest.fixture(scope="module")
def testbed() -> Any:
    return errata.load("world", device="cpu")


def test_a_configuration_that_is_given_is_not_mixed_with_the_folder_s(folder: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert ROME(model, tiny_tokenizer, ROME.Config(layers=(0,))).config == ROME.Config(layers=(0,))


def test_a_model_without_notes_has_empty_ones(make_tiny: Any, tmp_path: Path) -> None:
    assert read_model_settings(make_tiny("gpt2")) == read_model_settings(tmp_path) == ModelSettings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object, got list"),
        ('{"texts": "a.txt"}', "unknown entry 'texts'; did you mean 'text'"),
        ('{"text": "../secret.txt"}', "expected a file inside the folder"),
        ('{"text": "/etc/passwd"}', "expected a file inside the folder"),
        ('{"perplexity_text": "gone.txt"}', "perplexity_text names 'gone.txt'"),
        ('{"editors": {"rome": 3}}', 'expected "editors" to be an object of objects'),
    ],
)
def test_wrong_notes_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "secret.txt").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "errata.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_model_settings(folder)
    assert message in str(caught.value)
    assert "errata.json" in str(caught.value)


def test_without_any_text_the_error_says_what_to_give(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from errata.editors.core.errors import DatasetError, StatisticsError
    from errata.editors.core.families import locate_then_edit

    def unreachable(*args: Any, **_: Any) -> Any:
        raise DatasetError(f"{args[3]} cannot be loaded")

    monkeypatch.setattr(locate_then_edit.second_moments, "second_moments", unreachable)
    fields = {"layers": [1], "context_templates": ["{}"], "mom2_dataset": locate_then_edit.PAPERS_TEXT}
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, fields)
    advice = r"give text: editor\.mom2_dataset=FILE at the command line, mom2_dataset in Python .* or mom2_adj"
    with pytest.raises(StatisticsError, match=rf"wikipedia.*cannot be loaded; {advice}"):
        editor.compute(EditRequest("{} lies in", "Quelm", "Varland"))
    assert "takes hours; give text: editor.mom2_dataset=FILE" in caplog.text
    own = ROME(editor.model, tiny_tokenizer, {"layers": [1], "context_templates": ["{}"]}, text=["too short"])
    with pytest.raises(DatasetError, match="cannot be loaded"):
        own.compute(EditRequest("{} lies in", "Quelm", "Varland"))


def test_the_text_that_comes_along_is_used_where_none_is_named_and_the_user_is_told(
    make_tiny: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    fields = {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2, "mom2_n_samples": 60}
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, fields)
    (edit,) = editor.compute(EditRequest("{} lies in", "Quelm", "Varland"))
    assert re.search(r"\(factbook\): [\d,]+ tokens, \d+ for each of the 128 dimensions", caplog.text)
    assert "editor.mom2_dataset=FILE" in caplog.text
    caplog.clear()
    named = ROME(editor.model, tiny_tokenizer, {**fields, "mom2_dataset": "factbook"})
    (same,) = named.compute(EditRequest("{} lies in", "Quelm", "Varland"))
    assert not caplog.text
    for name, update in edit.patch.updates.items():
        assert all(a.equal(b) for a, b in zip(update.tensors, same.patch.updates[name].tensors, strict=True))


def test_the_text_that_comes_along_is_part_of_what_names_a_run(folder: Path) -> None:
    from errata.benchmarks.bench.config import BenchConfig
    from errata.benchmarks.bench.input_digests import digests
    from errata.editors.core.families.locate_then_edit import PAPERS_TEXT

    def digest(method: Any = ROME, **fields: Any) -> Any:
        config = BenchConfig.of(
            {"editor": {"name": method.name}, "model": {"name": str(folder)}, "dataset": {"name": "world"}}
        )
        return digests(config, method.Config(**fields))["moments_text"]

    own = digest()
    assert own is not None
    (folder / "errata.json").unlink()
    bundled = digest()
    assert bundled not in (None, own)
    assert digest(mom2_dataset=PAPERS_TEXT) is None
    assert digest(mom2_adjustment=False) is None
    assert digest(mom2_dataset="factbook") == bundled
    assert digest(CrispEdit) == digest(CrispEdit, mom2_dataset="factbook") == bundled
    assert digest(MEMOIR) == digest(WISE) == digest(UltraEdit, warm_up=5) == bundled
    assert digest(MEMOIR, background_text="world") is None  # a text that is named has a digest of its own
    assert digest(UltraEdit) is digest(FTM) is None
    assert digest(mom2_dataset="world") not in (None, own, bundled)


def test_a_configuration_may_be_a_mapping_and_an_edit_is_shown_in_a_line(make_tiny: Any, tiny_tokenizer: Any) -> None:
    fields = {"layers": [1], "mom2_adjustment": False, "v_num_grad_steps": 2, "context_templates": ["{}"]}
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, fields)
    assert editor.config == ROME.Config.from_dict(fields)
    edit = editor.apply(EditRequest("{} lies in", "Quelm", "Varland"))
    assert repr(edit).startswith("Edit(rome-") and "'Quelm lies in' -> 'Varland'" in repr(edit)
    assert repr(edit).endswith(", applied)") and len(repr(edit)) < 200
    edit.undo()
    assert repr(edit).endswith(", not applied)")
