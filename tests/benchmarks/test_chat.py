"""`dataset.chat=true`: everything that is edited and asked is read inside the model's own chat template."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench import execution
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.reports import report
from errata.editors.core.errors import DatasetError
from errata.editors.core.model.reading import in_chat
from errata.evaluate.generation import generate
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def config(model: Path, data: Path, out: Path, **dataset: Any) -> BenchConfig:
    return BenchConfig.of(
        {
            "editor": {"name": "ft_m", "num_steps": 2},
            "model": {"name": str(model)},
            "dataset": {"name": "counterfact", "path": str(data), **dataset},
            "device": "cpu",
            "n_edits": 2,
            "out": str(out),
            "generation": {"tokens": 4, "fluency_tokens": 6},
            "collapse": {"n_texts": 0, "known_facts": 0},
        }
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model with a chat template, and records of its facts."""
    folder = tmp_path_factory.mktemp("chat")
    model = Path(shutil.copytree(str(models.locate("world")), folder / "model"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "facts.json").write_text(json.dumps(world.records("counterfact")[:2]))
    return model, folder / "facts.json"


def test_a_bench_in_chat_asks_every_prompt_in_chat_and_names_its_run_so(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write", lambda *_: None)
    folder = bench.run(config(*files, tmp_path, chat=True))
    assert folder.name.startswith("ft_m-model-counterfact-chat-single-2-")
    assert json.loads((folder / "results.json").read_text())["config"]["dataset"]["chat"] is True
    plain = bench.run(config(*files, tmp_path))
    assert "chat" not in plain.name
    assert "chat" not in json.loads((plain / "results.json").read_text())["config"]["dataset"]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert all(record["request"]["chat"] for record in records)
    model, tokenizer = models.load(str(files[0]), device="cpu")
    for entry in records[0]["probes"]:
        assert entry["chat"] is True
        text = in_chat(tokenizer, entry["prompt"]).text
        length = 6 if entry["kind"] == "generation" else 4
        assert entry["before"]["text"] == generate(model, tokenizer, [text], length)[0]
        if entry["target"] is not None:
            (scored,) = score(model, tokenizer, [Probe("rewrite", text, entry["target"], None, " ")])
            assert scored.nll_target is not None
            assert math.isclose(entry["before"]["nll_target"], scored.nll_target, rel_tol=1e-4)


def test_a_model_without_a_chat_template_says_so(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the tokenizer has no chat template"):
        bench.run(config(Path("world"), files[1], tmp_path, chat=True))


def test_the_facts_that_a_testbed_knows_are_asked_in_chat_too() -> None:
    for chat in (True, False):
        config = BenchConfig.of(compose("bench", [f"dataset.chat={str(chat).lower()}", "collapse.known_facts=3"]))
        assert [probe.chat for probe in execution._known(config, [])] == [chat] * 3
