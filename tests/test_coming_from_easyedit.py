"""The page for those who come from EasyEdit is run: its Python, then its commands in order, on files like theirs."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from rich.console import Console

import errata
from errata import cli, editors
from errata.benchmarks import theirs, world

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "coming-from-easyedit.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if not language for line in code.splitlines() if line]
# In place of a model that nobody has at hand, and of a hundred edits.
QUICK = {"model=gpt2-xl": "model=world", "n_edits=100": "n_edits=1"}
LAYER, WIDTH = 1, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page names, as the other repositories write them, of the size of the bundled model."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "hparams" / "ROME").mkdir(parents=True)
    fields = {"alg_name": "ROME", "model_name": "./cache/gpt2-xl", "layers": [LAYER], "v_num_grad_steps": 3}
    fields |= {"mom2_dataset": "wikipedia", "mom2_adjustment": True, "device": 0}
    (folder / "hparams" / "ROME" / "gpt2-xl.yaml").write_text(json.dumps(fields))
    stats = folder / "stats" / "gpt2-xl" / "wikipedia_stats"
    stats.mkdir(parents=True)
    keys = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(0))
    arrays = {"mom2.count": len(keys), "mom2.mom2": (keys.T @ keys).numpy()}
    numpy.savez(stats / f"transformer.h.{LAYER}.mlp.c_proj_float32_mom2_100000.npz", **arrays)  # type: ignore[arg-type]
    torch.save(torch.eye(8).repeat(5, 1, 1), folder / "null_space_project.pt")
    (folder / "counterfact.json").write_text(json.dumps(world.records("counterfact")[:3]))
    request = world.cases(split="test")[0].request
    record = {"prompt": request.text, "subject": request.subject, "target_new": request.target}
    (folder / "counterfact-edit.json").write_text(json.dumps([{**record, "case_id": 0}]))
    return folder


def expanded(word: str, folder: Path) -> Iterator[str]:
    """As a shell does it."""
    if "*" in word:
        yield from (str(path.relative_to(folder)) for path in sorted(folder.glob(word)))
    else:
        yield QUICK.get(word, word)


def test_the_page_has_what_these_tests_run() -> None:
    assert len(PYTHON) == 1
    assert len(COMMANDS) == 5
    assert PAGE.count("\n") < 80


def test_the_pages_python_and_then_its_commands_run_on_their_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(PYTHON[0], "coming-from-easyedit.md", "exec"), {})
    for line in COMMANDS:
        words = [part for word in shlex.split(line)[1:] for part in expanded(word, folder)]
        out = io.StringIO()
        console = Console(file=out, width=160)
        assert cli.run(words, console, console) == 0, line
        made = [word.removeprefix("out=") for word in words if word.startswith("out=")]
        assert all((folder / name).is_file() for name in made), line
        assert made or "Reliability" in out.getvalue(), line
    (results,) = folder.glob("runs/*/results.json")
    config = json.loads(results.read_text())["config"]["editor"]
    assert (config["name"], config["layers"], config["mom2_file"]) == ("rome", [LAYER], "moments.safetensors")


def test_every_method_of_theirs_that_errata_has_stands_on_the_page() -> None:
    table = PAGE.split("`alg_name`")[1].split("Its files")[0]
    known = {ours for ours in theirs.METHODS.values() if ours in editors.METHODS}
    named = set(re.findall(r"`(\w+)`", table)) & set(editors.METHODS)
    assert known <= named
    assert named >= {"ft_m", "c_rome"}
    assert all(f"`{name}`" in table for name, ours in theirs.METHODS.items() if ours in known)


def test_names_that_the_page_promises_exist() -> None:
    for name in ("undo", "export_lora", "export_merged"):
        assert f"edit.{name}" in PAGE
        assert hasattr(errata.Edit, name)
    for name in ("protocol=batch", "protocol=sequential", "eval_every=100"):
        assert name in PAGE
