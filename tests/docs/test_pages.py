"""Pages of docs/ are run: their Python and their commands, in the order in which they stand there."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from fake_hub import FakeHub
from rich.console import Console

import errata
from errata import editors
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.train_config import RowsConfig
from errata.benchmarks.convert import hparams
from errata.benchmarks.datasets import world
from errata.benchmarks.facts.fact_file import read as read_facts
from errata.benchmarks.testbed.bundle import EDITORS
from errata.benchmarks.testbed.files import BUNDLED
from errata.cli import main, overrides
from errata.cli.exit_codes import DIFFERENT
from errata.editors.core.algebra.mask_rules import RULES
from errata.editors.core.algebra.merge_rules import MERGES
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.steering.kinds import KINDS, PLACES
from errata.editors.core.storage.edit_folder import Edits

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

ROOT = Path(__file__).resolve().parents[2]
# In place of a model that no one has at hand, and of a hundred edits.
QUICK = {
    "model=gpt2-xl": "model=world",
    "n_edits=100": "n_edits=2",
    "batch_size=10": "batch_size=1",
    "n_facts=50": "n_facts=2",
}
QUIET = ["generation.tokens=2", "generation.fluency_tokens=0", "collapse.known_facts=5", "editor.v_num_grad_steps=3"]
LAYER, WIDTH = 1, 512
FACTS = "facts.yaml"  # what a block of YAML is


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def expanded(word: str, folder: Path) -> Iterator[str]:
    """As a shell does it."""
    if "*" in word:
        yield from (str(path.relative_to(folder)) for path in sorted(folder.glob(word)))
    else:
        yield QUICK.get(word, word)


def run(page: str, folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Run a page in a folder: the names that its Python has bound, and each command with what it has shown."""
    names: dict[str, Any] = {}
    shown: list[tuple[str, str]] = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text_of(page), flags=re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), names)
            continue
        if language == "yaml":
            (folder / FACTS).write_text(block, encoding="utf-8")
            continue
        for line in block.splitlines():
            words = [part for word in shlex.split(line)[1:] for part in expanded(word, folder)]
            out = io.StringIO()
            console = Console(file=out, width=160)
            code = main.run([*words, *(QUIET if words[0] == "bench" else [])], console, console)
            assert code == (DIFFERENT if words[0] == "diff" else 0), line
            shown.append((line, out.getvalue()))
            made = [word.partition("=")[2] for word in words if word.startswith(("out=", "lora=", "merged="))]
            assert all((folder / name).exists() for name in made), line
    return names, shown


def put_their_files(folder: Path) -> None:
    """The files that the page for EasyEdit's users names, as the other repositories write them, of the size of the
    bundled model."""
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
    requests = [case.request for case in world.cases(split="test")[:2]]
    records = [
        {"case_id": i, "prompt": request.text, "subject": request.subject, "target_new": request.target}
        for i, request in enumerate(requests)
    ]
    (folder / "counterfact-edit.json").write_text(json.dumps(records))


Page = Callable[[str], tuple[dict[str, Any], list[tuple[str, str]]]]


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.chdir(tmp_path)
    return lambda page: run(page, tmp_path)


# --- locating facts ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_page_on_locating_facts_runs(run_page: Page) -> None:
    names, shown = run_page("locating-facts.md")
    assert all("fact" in out or "Gavaria*" in out for _, out in shown)
    found, noisy = names["found"], names["noisy"]
    assert found.effects("state", "logit_difference", normalised=True)[-1, -1] == pytest.approx(1, abs=1e-4)
    assert noisy.grids.keys() == {"mlp, window 3"}


# --- information flow -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_page_on_information_flow_runs(run_page: Page) -> None:
    names, shown = run_page("information-flow.md")
    assert all("Brulminster" in out for _, out in shown)
    flow, found = names["flow"], names["found"]
    assert max(flow.layers[3].attention[-1, 8].tolist()) > 0.1  # the subject, at the last token
    assert {edge.target.kind for edge in found} == {"A", "M", "I"}


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_page_on_heads_runs(run_page: Page) -> None:
    names, shown = run_page("heads.md")
    assert "8 facts that the model knows" in shown[0][1]
    assert "head 4.0 times 0" in shown[1][1]
    assert float(names["found"].mean[tuple(names["head"])]) < 0
    assert names["silent"][0].difference != pytest.approx(float(names["found"].differences[0]), abs=1e-3)


# --- coming from EasyEdit ---------------------------------------------------------------------------------------------

EASYEDIT = "coming-from-easyedit.md"


def test_the_page_for_easyedits_users_runs_on_their_files(run_page: Page, tmp_path: Path) -> None:
    put_their_files(tmp_path)
    _, shown = run_page(EASYEDIT)
    assert [line.split()[1] for line, _ in shown] == ["convert", "convert", "bench", "convert", "convert"]
    (results,) = tmp_path.glob("runs/*/results.json")
    config = json.loads(results.read_text())["config"]["editor"]
    assert (config["name"], config["layers"], config["mom2_file"]) == ("rome", [LAYER], "moments.safetensors")


def test_every_method_of_theirs_that_errata_has_stands_on_the_page() -> None:
    table = text_of(EASYEDIT).split("`alg_name`")[1].split("Its files")[0]
    known = {ours for ours in hparams.METHODS.values() if ours in editors.METHODS}
    named = set(re.findall(r"`(\w+)`", table)) & set(editors.METHODS)
    assert known <= named
    assert named >= {"ft_m", "c_rome"}
    assert all(f"`{name}`" in table for name, ours in hparams.METHODS.items() if ours in known)


def test_names_that_the_page_promises_exist() -> None:
    for name in ("undo", "export_lora", "export_merged"):
        assert f"edit.{name}" in text_of(EASYEDIT)
        assert hasattr(errata.Edit, name)


# --- exporting --------------------------------------------------------------------------------------------------------


def test_the_page_on_exporting_runs_and_its_adapter_gives_the_edited_model(run_page: Page, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    names, shown = run_page("exporting.md")
    ids = names["tokenizer"]("The capital of Gavaria is", return_tensors="pt").input_ids
    wanted, _ = errata.load(tmp_path / "edited", device="cpu")
    base, _ = errata.load("world", device="cpu")
    with torch.no_grad():
        found = names["edited"].cpu()(ids).logits
        torch.testing.assert_close(found, wanted(ids).logits, rtol=1e-5, atol=1e-5)
        assert (found - base(ids).logits).abs().max() > 1
    assert [line.split()[1] for line, _ in shown] == ["edit", "bench", "export"]
    assert "2 edits, rank 2" in shown[-1][1]


def test_the_page_and_the_code_speak_of_the_same_limit() -> None:
    from errata.editors.core.storage.lora_export import MAX_RANK

    assert f"at most {MAX_RANK}" in text_of("exporting.md")


# --- edits of behaviour -----------------------------------------------------------------------------------------------


def test_the_page_on_behaviour_edits_runs_and_names_every_kind(run_page: Page) -> None:
    names, _ = run_page("behaviour-edits.md")
    assert names["stronger"].derived["parents"] == [{"id": names["edit"].id, "derived": names["edit"].derived}]
    assert names["control"].derived["numbers"]["random"] == 0
    page = text_of("behaviour-edits.md")
    assert [kind for kind in (*KINDS, *PLACES) if f"| `{kind}` |" not in page] == []
    assert f"{len(errata.read_contrasts('formal'))} everyday requests" in page


# --- calculating with edits -------------------------------------------------------------------------------------------


def test_the_page_on_calculating_runs_and_what_it_takes_back_is_gone(run_page: Page) -> None:
    names, shown = run_page("calculating-with-edits.md")
    said = dict(shown)
    assert "= 0.5 (rect(rome-" in said["errata list half"]
    assert names["tuning"].derived["numbers"]["low_rank"] == 1
    left = errata.difference(names["model"], names["shipped"])
    size = sum(value**2 for value in names["edit"].patch.norms().values()) ** 0.5
    assert sum(value**2 for value in left.patch.norms().values()) ** 0.5 < 1e-6 * size
    page = text_of("calculating-with-edits.md")
    assert [kind.name for kind in RULES if f"`{kind.name}:" not in page] == []
    assert [kind.name for kind in MERGES if f"`{kind.name}`" not in page] == []


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_the_page_on_sharing_runs_and_its_folders_hold_what_it_says(
    run_page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = FakeHub.put_in_place(tmp_path / "hub", monkeypatch)
    names, shown = run_page("sharing.md")
    said = dict(shown)
    assert "2 of 2 facts hold" in said["errata check facts.yaml"]
    first, code = read_facts(tmp_path / FACTS)  # the page's last YAML
    assert (len(first.paraphrases), len(first.unchanged), code.request.join) == (2, 2, "")
    assert "`ledger.clear()`" in text_of("sharing.md")
    assert "nothing was done" in said["errata apply facts.yaml"]
    assert "3 edits, from 2 and 1: three" in said["errata merge facts.edits mesmar out=three"]
    assert "3 of 3 facts hold" in said["errata check three"]
    assert "1 edit added, 3 in all: three" in said["errata apply facts.edits out=three"]
    assert [edit.info.requests[0].subject for edit in names["edits"].entries] == ["Drailmune"]
    assert len(there.repos["me/corrections"]) == 3
    subjects = {request.subject for entry in Edits.read("three").entries for request in entry.info.requests}
    assert subjects == {"Gavaria", "Sovaria", "Mesmar"}


def test_names_and_codes_that_the_page_on_sharing_promises_exist() -> None:
    from errata.editors.core import errors

    text = text_of("sharing.md")
    assert f"exit code {DIFFERENT}" in text
    for name in ("DamagedEditsError", "OtherBaseError"):
        assert f"`{name}`" in text
        assert issubclass(getattr(errors, name), errata.ErrataError)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_page_on_training_names_every_kind_of_row_and_its_commands_are_understood() -> None:
    page = text_of("training.md")
    commands = re.search(r"```\n(.*?)```", page, flags=re.DOTALL)
    assert commands is not None
    for line in commands[1].splitlines():
        words = shlex.split(line)[1:]
        yaml = {"train": "train", "bench": "bench"}[words[0]]
        assert compose(yaml, overrides.translated(words[1:], yaml))["editor"]["name"] == "mend"
    assert all(f"rows.{field.name}" in page for field in fields(RowsConfig) if field.name != "text_tokens")


def test_the_page_on_training_has_the_recipe_that_is_shipped() -> None:
    page, recipe = text_of("training.md"), EDITORS["mend"]
    assert read_model_settings(BUNDLED).editors["mend"]["cedit"] == recipe["cedit"]
    assert f"`cedit` {recipe['cedit']}" in page
    assert f"{compose('train', [])['steps']:,} steps" in page


# --- pages whose Python stands by itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        *("adding-a-dataset.md", "attribution.md", "chat-models.md", "composing-interventions.md", "equal-damage.md"),
        *("testbed.md", "your-own-model.md"),
    ],
)
def test_the_python_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_every_page_with_python_is_run_by_a_test() -> None:
    written = {page.name for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text(encoding="utf-8")}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [page for page in written if f'"{page}"' not in tests] == []
