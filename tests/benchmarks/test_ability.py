"""General ability by lm-eval: what it says is of the weights as they stand, and the model is as before afterwards."""

from __future__ import annotations

import builtins
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from typed_commands import run

from errata import EditRequest, models
from errata.benchmarks import bench
from errata.benchmarks.ability import ability
from errata.benchmarks.ability.ability import WORLD, AbilityConfig, Score
from errata.benchmarks.ability.scores import chance_of_mean, score_of, scores_of
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import world
from errata.benchmarks.reports import charts, panels, publish, tables
from errata.editors import ROME
from errata.editors.core.errors import ConfigError
from errata.testing.laws import digest, flags

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
CONFIG = AbilityConfig((WORLD,), limit=40)


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return models.load("world", device="cpu")


def test_questions_have_one_true_answer_among_four() -> None:
    true = {probe.prompt: probe.target for probes in world.known_facts_by_subject().values() for probe in probes}
    asked = world.questions()
    assert len(asked) == len(world.cases())
    for question, choices in asked:
        assert len(set(choices)) == world.CHOICES
        assert choices[0] == true[question]


def test_scores_are_of_the_weights_as_they_stand_and_nothing_stays_behind(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    model.train()
    before, mode, settings = digest(model), flags(model), model.generation_config
    states = random.getstate(), torch.random.get_rng_state()
    whole = ability.measure(model, tokenizer, CONFIG)
    assert whole[WORLD].value > 0.95
    assert (whole[WORLD].metric, whole[WORLD].n) == ("acc", 40)
    assert (digest(model), flags(model)) == (before, mode)
    assert model.generation_config is settings
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    weight = model.transformer.h[1].mlp.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    broken = ability.measure(model, tokenizer, CONFIG)
    with torch.no_grad():
        weight.copy_(kept)
    assert broken[WORLD].value < whole[WORLD].value - 0.2  # the first answers would have come from a cache
    assert ability.measure(model, tokenizer, CONFIG) == whole


def test_tasks_of_a_folder_are_asked_without_a_network(opened: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"q": question, "a": " " + choices[0]} for question, choices in world.questions()[:10]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = ability.measure(*opened, AbilityConfig(("mine",), path=str(tmp_path)))
    assert found["mine"] == Score("acc", 1.0, 0.0, 10)
    assert ability.mean({**found, "text": Score("word_perplexity", 30.0, None, 5)}) == 1.0
    assert ability.mean({"text": Score("word_perplexity", 30.0, None, 5)}) is None


def test_the_mean_is_of_shares_alone_and_only_a_mean_of_yes_and_no_has_an_error() -> None:
    shares = {"a": Score("acc", 0.5, 0.1, 9), "f": Score("f1", 0.7, None, 9)}
    others = {
        "b": Score("bleu", 25.3, None, 9),
        "c": Score("bits_per_byte", 0.9, None, 9),
        "p": Score("f1", 70, None, 9),
    }
    assert ability.mean({**shares, **others}) == pytest.approx(0.6)
    said = {"bits_per_byte,none": 0.8, "byte_perplexity,none": 1.7, "byte_perplexity_stderr,none": "N/A"}
    assert score_of(said, 9) == Score("byte_perplexity", 1.7, None, 9)
    assert score_of({"f1,none": 0.5}, 5) == Score("f1", 0.5, None, 5)
    assert score_of({"acc,first": 0.5, "acc,second": 0.1}, 5) == Score("acc", 0.5, 0.25, 5)
    assert score_of({"bleu,none": 25.3, "ter,none": 0.5}, 5).metric == "bleu"


def test_a_model_by_its_name_is_loaded_as_one_of_a_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        raise ConfigError("enough")

    monkeypatch.setattr(models, "load", load)
    for typed in ((), ("device=cuda", "trust_remote_code=true", "precision=bfloat16")):
        with pytest.raises(ConfigError, match="enough"):
            run("ability", "model=m", f"tasks={WORLD}", *typed)
    wanted = [("cpu", False, None), ("cuda", True, "bfloat16")]
    assert [(o["device"], o["trust_remote_code"], o["dtype"]) for _, o in asked] == wanted


def test_before_and_after_the_edits_of_a_folder(tmp_path: Path) -> None:
    model, tokenizer = models.load("world", device="cpu")
    config = ROME.Config(layers=(1,), mom2_adjustment=False, v_num_grad_steps=3, v_lr=20.0, clamp_norm_factor=100.0)
    edit = ROME(model, tokenizer, config).apply(EditRequest("The capital of {} is", "Gavaria", "Praminster"))
    edit.save(tmp_path / "edits")
    shown = run("ability", str(tmp_path / "edits"), f"tasks={WORLD}", "limit=40", "model=world")
    assert WORLD in shown
    assert "before" in shown
    assert "after" in shown
    said = json.loads(run("ability", str(tmp_path / "edits"), f"tasks={WORLD}", "limit=40", "model=world", "--json"))
    assert {moment: said[moment][WORLD]["n"] for moment in said} == {"before": 40, "after": 40}
    assert said["after"][WORLD]["value"] == ability.measure(model, tokenizer, CONFIG)[WORLD].value
    assert said["before"][WORLD]["value"] > said["after"][WORLD]["value"]


def test_a_group_counts_once_and_has_the_chance_of_its_tasks() -> None:
    two, four = [{"filtered_resps": [0, 0], "target": 0}], [{"filtered_resps": [0] * 4, "target": 1}]
    doubled = [{"filtered_resps": [0] * 10, "target": 0}]  # of five answers, with and without their question
    both_right = [{"filtered_resps": [0] * 4, "target": [0, 2]}]
    true_false = [{"doc": {"mc2_targets": {"labels": [1, 0, 0, 1, 0]}}, "filtered_resps": [0] * 5, "acc": 0.3},
                  {"doc": {"mc2_targets": {"labels": [1, 0]}}, "filtered_resps": [0] * 2, "acc": 0.5}]  # fmt: skip
    samples = {"law": two, "art": four, "info": doubled, "several": both_right, "truthfulqa_mc2": true_false}
    sizes = {"law": 30, "art": 10, "info": 1, "several": 1, "truthfulqa_mc2": 2, "written": 5}
    found = scores_of(
        {
            "results": {
                "mmlu": {"acc,none": 0.5},
                "law": {"acc,none": 0.6},
                "art": {"acc,none": 0.2},
                "info": {"acc,none": 1.0, "acc_mutual_info,none": 1.0},
                "several": {"acc,none": 1.0},
                "toxigen": {"acc,none": 0.4, "acc_norm,none": 0.7},
                "truthfulqa_mc2": {"acc,none": 0.4},
                "written": {"exact_match,none": 0.1},
                "tags": {"alias": "no score of its own"},
            },
            "group_subtasks": {"mmlu": ["law", "art"], "tags": ["info"]},
            "n-samples": {name: {"effective": size} for name, size in sizes.items()},
            "samples": samples,
            "configs": {"toxigen": {"metadata": {"chance": 0.5}}},
        }
    )
    assert "tags" not in found
    assert {name: score.part_of for name, score in found.items() if score.part_of} == {"law": "mmlu", "art": "mmlu"}
    chances = {name: score.chance for name, score in found.items()}
    assert chances["mmlu"] == pytest.approx((30 * 0.5 + 10 * 0.25) / 40)
    assert (chances["info"], chances["several"], chances["written"]) == (0.2, 0.5, None)
    assert chances["truthfulqa_mc2"] == pytest.approx((2 / 5 + 1 / 2) / 2)
    assert found["truthfulqa_mc2"].stderr == pytest.approx(0.1)  # of 0.3 and 0.5
    assert (found["mmlu"].n, found["toxigen"].value) == (40, 0.4)
    assert ability.mean(found) == pytest.approx((0.5 + 1 + 1 + 0.4 + 0.4 + 0.1) / 6)  # mmlu once, without law and art
    assert chance_of_mean(found) is None


def test_suites_state_their_examples_and_tasks_take_a_number_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ability._by_shots(AbilityConfig(("should_we_edit", "arc_easy"), num_fewshot=2)) == {
        5: ["mmlu"], 2: ["bbh_cot_fewshot", "arc_easy"], 8: ["gsm8k"], 7: ["commonsense_qa"],
        0: ["triviaqa", "truthfulqa_mc1", "toxigen"],
    }  # fmt: skip
    for wrong, message in (
        (("gsm8k:few",), "expected NAME or NAME:EXAMPLES"),
        (("quick:3",), "the suite 'quick' states its own examples"),
        (("world_facts:2",), "world_facts is asked without examples"),
        (("gsm8k:8", "gsm8k:5"), "gsm8k is asked with two numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            AbilityConfig(wrong)
    asked: list[tuple[Any, Any]] = []
    nothing: dict[str, Any] = {"results": {}}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **o: asked.append((o["tasks"], o["num_fewshot"])) or nothing)
    monkeypatch.setattr(ability, "_language_model", lambda *_: None)
    monkeypatch.setattr(ability, "_manager", lambda *_: None)
    monkeypatch.setattr(ability, "_as_it_was", lambda _: nullcontext())
    ability._by_lm_eval(None, None, AbilityConfig(("gsm8k:8", "mmlu:5")))
    assert asked == [(["gsm8k"], 8), (["mmlu"], 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((f"tasks={WORLD}",), "expected model=MODEL or one folder"),
        (("model=world",), "ability.tasks: expected at least one task"),
        (("model=world", f"tasks={WORLD}", "limit=few"), "limit: expected a number"),
        (("model=world", f"tasks={WORLD}", "limit=0"), "ability.limit: expected at least 1, got 0"),
        (("model=world", f"tasks={WORLD}", "path=nowhere"), "ability.path: expected a folder of task files"),
        (("model=world", f"task={WORLD}"), "unknown name 'task'; did you mean 'tasks'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("ability", *arguments)


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest(opened: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown task 'hellaswagg'; did you mean 'hellaswag'"):
        ability.measure(*opened, AbilityConfig(("hellaswagg",)))


def test_an_unknown_task_is_refused_by_the_names_that_were_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lm_eval.tasks

    made: list[bool] = []

    class Manager:
        """Of a folder with one task of the user's, and of two tasks of lm-eval's own."""

        def __init__(self, include_path: str | None, include_defaults: bool) -> None:  # noqa: ARG002
            made.append(include_defaults)
            self.all_tasks = ["mine", *(["arc_easy", "hellaswag"] if include_defaults else [])]

    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(tmp_path / "tasks" / "__init__.py"))
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    for read in (True, False):
        made.clear()
        with pytest.raises(ConfigError, match="unknown task 'hellaswagg'; did you mean 'hellaswag'"):
            ability.check(AbilityConfig(("mine", "hellaswagg")))
        assert (True in made) is read
    made.clear()
    ability.check(AbilityConfig(("hellaswag", "mine")))
    assert made == [False, True]
    made.clear()
    (tmp_path / "tasks" / "new.yaml").touch()  # lm-eval has changed, so its names are read again
    with pytest.raises(ConfigError, match="unknown task 'hellaswagg'"):
        ability.check(AbilityConfig(("hellaswagg",)))
    assert True in made


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(name=name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[lm-eval\]'"):
        ability.check(CONFIG)


# --- in a bench ---------------------------------------------------------------------------------------------------


def config(out: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "rome", "v_num_grad_steps": 12},
        "model": {"name": "world"},
        "dataset": {"name": "world_first", "split": "test"},
        "protocol": {"name": "sequential"},
        "generation": {"tokens": 0, "fluency_tokens": 0},
        "collapse": {"n_texts": 4, "known_facts": 10},
        "ability": {"tasks": [WORLD], "limit": 40},
        "device": "cpu",
        "n_edits": 6,
        "batch_size": 1,
        "eval_every": 3,
        "out": str(out),
    }
    return BenchConfig.of({**values, **changes})


# Eight seconds; test_before_and_after_the_edits_of_a_folder asks around edits every day.
@pytest.mark.slow
def test_a_sequence_asks_before_it_and_at_its_checkpoints_and_the_report_draws_it(tmp_path: Path) -> None:
    folder = bench.run(config(tmp_path))
    results = json.loads((folder / "results.json").read_text())
    points = json.loads((folder / "curve.json").read_text())
    values = [point["ability"][WORLD]["value"] for point in points]
    assert [point["edits"] for point in points] == [3, 6]
    assert results["ability"]["after"] == points[-1]["ability"]
    assert results["ability"]["before"][WORLD]["value"] > 0.95 > min(values)  # ROME breaks the model on these
    assert not (folder / "records.jsonl").read_text().count(WORLD)
    (run,) = publish.finished(tmp_path)
    panel = charts.able([run])
    assert panel is not None
    assert panel.title in [each.title for each in charts.costs([run], "probability")]
    assert panels.png([panel]).startswith(b"\x89PNG")
    assert tables.damage([run])["general ability, %"] == [f"100.0 → {100 * values[-1]:.1f} (chance 25.0)"]


def test_another_file_among_the_tasks_makes_another_run(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()

    def key() -> str:
        asked = {"tasks": [WORLD], "path": str(tasks)}
        return bench.prepare(config(tmp_path, ability=asked)).folder.key

    before = key()
    assert key() == before
    (tasks / "more.yaml").write_text("task: more\n")
    assert key() != before


def test_single_edits_are_not_asked_about_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading lm-eval's own names takes seconds; test_an_unknown_task_is_answered_with_the_nearest does.
    monkeypatch.setattr(ability, "_kept_names", lambda _: ["arc_easy"])
    with pytest.raises(ConfigError, match="protocol=sequential"):
        config(tmp_path, protocol={"name": "single"})
    with pytest.raises(ConfigError, match=r"unknown task 'world_fact'; did you mean 'world_facts'"):
        bench.prepare(config(tmp_path, ability={"tasks": ["world_fact"]}))
