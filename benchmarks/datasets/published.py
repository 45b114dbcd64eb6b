"""The published benchmarks beside CounterFact, zsRE and EasyEdit's: what reads each, and where its files are to be had.

Each has a module of its own with a function `read(path, *, needs_subject, **options) -> Loaded`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks.datasets.added import check_options
from errata.benchmarks.datasets.json_records import Loaded


@dataclass(frozen=True)
class PublishedBenchmark:
    """One benchmark.

    Attributes:
        title: Its name in the papers.
        source: Where its files can be downloaded.
        files: How the authors name them, without an ending, for a folder that holds several.
        example: What to give as its path once they are there.
        reads_folders: Whether a folder of other files is one dataset, which the reader puts together.
    """

    title: str
    source: str
    files: tuple[str, ...]
    example: str = "FILE"
    reads_folders: bool = False


_GITHUB = "https://github.com/"
_HUB = "https://huggingface.co/datasets/"
BENCHMARKS: Mapping[str, PublishedBenchmark] = MappingProxyType(
    {
        "knowedit": PublishedBenchmark(
            "KnowEdit", f"{_HUB}zjunlp/KnowEdit", ("recent_test", "test_cf", "ZsRE-test-all", "wikibio-test-all")
        ),
        "mquake": PublishedBenchmark(
            "MQuAKE",
            f"{_GITHUB}princeton-nlp/MQuAKE/tree/main/datasets",
            ("MQuAKE-CF-3k-v2", "MQuAKE-CF-3k", "MQuAKE-CF", "MQuAKE-T"),
        ),
        "rippleedits": PublishedBenchmark(
            "RippleEdits",
            f"{_GITHUB}edenbiran/RippleEdits/tree/main/data/benchmark",
            ("popular", "random", "recent"),
        ),
        "wikibigedit": PublishedBenchmark(
            "WikiBigEdit",
            f"{_HUB}lukasthede/WikiBigEdit",
            ("wikibigedit", "wikibigedit_3k"),
            "FILE, a folder of the eight files, or dataset.path=lukasthede/WikiBigEdit",
            reads_folders=True,
        ),
        "ultraeditbench": PublishedBenchmark(
            "UltraEditBench",
            f"{_HUB}XiaojieGu/UltraEditBench",
            ("UltraEditBench_2M", "UltraEditBench_train_20k"),
            "FILE, or dataset.path=XiaojieGu/UltraEditBench",
        ),
        "qaedit": PublishedBenchmark("QAEdit", f"{_GITHUB}WanliYoung/Revisit-Editing-Evaluation", ("QAEdit",)),
        "fever": PublishedBenchmark(
            "FEVER", f"{_GITHUB}XiaojieGu/UltraEdit (Data Preparation)", ("fever_eval_20k", "fever_eval_100k")
        ),
        "unke": PublishedBenchmark(
            "UnKEBench", f"{_GITHUB}TrustedLLM/UnKE/tree/main/data", ("final_data_v3", "final_data_v2")
        ),
        "akew": PublishedBenchmark(
            "AKEW", f"{_GITHUB}bobxwu/AKEW/tree/master/datasets", ("CounterFact", "MQuAKE-CF", "WikiUpdate")
        ),
        "conflictedit": PublishedBenchmark(
            "ConflictEdit and RoundEdit",
            f"{_GITHUB}zjunlp/PitfallsKnowledgeEditing/tree/main/data",
            ("coverage_edit", "reverse_edit", "composite_edit", "easy", "hard"),
        ),
        "hallueditbench": PublishedBenchmark(
            "HalluEditBench",
            f"{_GITHUB}llm-editing/HalluEditBench/tree/main/data/questions/hallucination_final",
            (),
            "FILE.csv",
        ),
        "canonical": PublishedBenchmark(
            "canonical examples",
            f"{_GITHUB}john-hewitt/model-editing-canonical-examples/tree/main/data",
            (),
            "FOLDER dataset.options.behaviour=country_capital",
            reads_folders=True,
        ),
    }
)


def read(name: str, path: Path, options: Mapping[str, Any], *, needs_subject: bool) -> Loaded:
    """Return what a benchmark's reader reads.

    Raises:
        ConfigError: An option is unknown, missing or has a value that does not fit.
        DatasetError: As the reader.
    """
    reader: Callable[..., Loaded] = importlib.import_module(f"errata.benchmarks.datasets.{name}").read
    _, *others = inspect.signature(reader).parameters.values()
    check_options([each for each in others if each.name != "needs_subject"], options, f"the dataset {name!r}")
    return reader(path, needs_subject=needs_subject, **options)


def how_to_get(name: str) -> str:
    """Return where the files of a benchmark can be had and what to type then."""
    benchmark = BENCHMARKS[name]
    return (
        f"dataset.path is missing: {name!r} reads the files of {benchmark.title} as their authors published them; "
        f"download one from {benchmark.source} and give dataset.path={benchmark.example}"
    )
