"""Which tasks measure general ability: names, suites of several by one name, and solved examples per task.

    asked(("should_we_edit", "arc_easy:25"))     # mmlu with 5 examples, gsm8k with 8, ..., arc_easy with 25

A suite states the examples of its tasks where the paper does. Tasks without a number take `ability.num_fewshot`, or
what lm-eval's own file says.

References: Li et al. 2024 (Should We Really Edit Language Models?), section 4; Gu et al. 2024 (Model Editing Harms
General Abilities of Large Language Models), section 4, whose tasks are in gu_tasks/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from errata.benchmarks.ability import glue
from errata.editors.core.errors import ConfigError

WORLD = "world_facts"
GU_PREFIX = "gu8_"
GU_TASKS = tuple(
    f"{GU_PREFIX}{name}"
    for name in (
        "reasoning",
        "inference",
        "open_qa",
        "closed_qa",
        "dialogue",
        "summarization",
        "entities",
        "sentiment",
    )
)
# bbh_cot_fewshot has its three examples in its prompts.
SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "capability": ("arc_challenge", "gsm8k", "ifeval", "mmlu", "truthfulqa_mc2"),
        "glue": tuple(glue.TASKS),
        "gu8": GU_TASKS,
        "quick": ("arc_easy", "hellaswag", "lambada_openai"),
        "should_we_edit": (
            "mmlu:5",
            "bbh_cot_fewshot",
            "gsm8k:8",
            "commonsense_qa:7",
            "triviaqa:0",
            "truthfulqa_mc1:0",
            "toxigen:0",
        ),
    }
)


@dataclass(frozen=True)
class AskedTask:
    """A task with the number of solved examples before each question; None: as the task says."""

    name: str
    shots: int | None = None


def asked(entries: Sequence[str]) -> tuple[AskedTask, ...]:
    """Return every task once, in the order of its first entry; those of suites by their own names.

    Args:
        entries: NAME, NAME:SHOTS, or the name of a suite.

    Raises:
        ConfigError: The examples are no number, a suite or a task without examples is given some, or one task is asked
            with two numbers of examples.
    """
    found: dict[str, AskedTask] = {}
    for entry in entries:
        for task in map(_parsed, SUITES.get(entry, (entry,))):
            known = found.setdefault(task.name, task)
            if known != task:
                raise ConfigError(f"ability.tasks: {task.name} is asked with two numbers of examples")
    return tuple(found.values())


def _parsed(entry: str) -> AskedTask:
    name, colon, shots = entry.partition(":")
    if not colon:
        return AskedTask(name)
    if not shots.isdecimal():
        raise ConfigError(f"ability.tasks: expected NAME or NAME:EXAMPLES, as in gsm8k:8, got {entry!r}")
    if name in SUITES:
        raise ConfigError(f"ability.tasks: the suite {name!r} states its own examples; leave out ':{shots}'")
    if name == WORLD or name in glue.TASKS or name in GU_TASKS:
        raise ConfigError(f"ability.tasks: {name} is asked without examples; leave out ':{shots}'")
    return AskedTask(name, int(shots))
