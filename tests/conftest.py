"""What the tests share: where the reference material lies, and one thread so that bits repeat."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_once
import pytest
import torch

from errata.testing import laws, tiny_models

ROOT = Path(__file__).resolve().parent.parent


def _beside(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set {variable} to the folder of {default}")
    return path


def pytest_configure() -> None:
    """The imports make half a million objects that stay; looking for garbage among them would take minutes in all."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Numbers from the original implementations."""
    return _beside("ERRATA_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real CounterFact, zsRE and text."""
    return _beside("ERRATA_DATA", "data")


@pytest.fixture(scope="session")
def models_root() -> Path:
    """Small models that know real CounterFact facts."""
    return _beside("ERRATA_MODELS", "models")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> None:
    """Shells start background jobs with SIGINT ignored, which the processes that tests start would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Second moments are kept apart from the user's, and shared by the workers of one run."""
    shared = hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    os.environ["ERRATA_CACHE"] = str((base.parent if shared else base) / "moments")


@pytest.fixture(autouse=True, scope="session")
def _made_once() -> Iterator[None]:
    """See made_once.py."""
    with pytest.MonkeyPatch.context() as patched:
        made_once.compose_once(patched)
        made_once.make_cases_once(patched)
        made_once.read_testbed_once(patched)
        made_once.write_contexts_once(patched)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_report_of_the_machine() -> Iterator[None]:
    """lm-eval notes the machine's compilers, libraries and processors after each of its measurements, for which it
    starts a dozen programs. Nothing of errata reads that."""
    from torch.utils import collect_env

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collect_env, "get_pretty_env_info", lambda: "")
        yield


# --- tiny models, random and made in the test ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Adds no special tokens, as GPT-2's."""
    return tiny_models.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_tokenizer_bos() -> Any:
    """Puts `<s>` before every text, as Llama's."""
    return tiny_models.tiny_tokenizer(bos=True)


MakeTiny = Callable[..., Any]


@pytest.fixture(scope="session")
def make_tiny(tiny_tokenizer: Any) -> MakeTiny:
    """`make_tiny(architecture, dtype=torch.float32, seed=0, n_layers=3)`: see `tiny_model`."""
    return lambda architecture, **options: tiny_models.tiny_model(architecture, len(tiny_tokenizer), **options)


# --- what the laws of the ledger compare --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digest() -> Callable[[Any], str]:
    """`digest(model)`: see laws.py."""
    return laws.digest


@pytest.fixture(scope="session")
def trials() -> Callable[..., int]:
    """`trials(few, full)`: how many trials a promise of docs/promises.md is tested with: `few`; `full` where
    ERRATA_TRIALS is "full"; else the number that it says."""
    said = os.environ.get("ERRATA_TRIALS")

    def count(few: int, full: int = 10_000) -> int:
        return few if said is None else full if said == "full" else int(said)

    return count


@pytest.fixture(scope="module")
def _cases_read_once() -> Iterator[None]:
    """For modules that bench often, and whose runs read no files of their own."""
    from errata.benchmarks.datasets import registry as datasets

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "load", functools.cache(datasets.load))
        yield


@pytest.fixture(scope="module")
def _nothing_drawn() -> Iterator[None]:
    """For modules that read the numbers of their runs and no picture or table."""
    from errata.benchmarks.reports import report

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "write", lambda *_: None)
        yield


@pytest.fixture
def _nothing_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, but not laid out and rendered, which takes most of the time of a report."""
    from errata.benchmarks.reports import panels

    monkeypatch.setattr(panels, "saved", lambda _: b"a picture")
    monkeypatch.setattr(panels, "svg", lambda *_: "<svg></svg>")


@pytest.fixture
def tried(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """`tried(promise, ran, landed={...})`: notes how many trials a test of a promise ran, and where its faults landed;
    shown at the end of the run where ERRATA_TRIALS is set."""
    return lambda promise, ran, **more: record_property("promise", {"promise": promise, "trials": ran, **more})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if "ERRATA_TRIALS" not in os.environ:
        return
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, noted in report.user_properties:
                if name == "promise":
                    test = report.nodeid.rpartition("::")[2]
                    terminalreporter.write_line(f"{outcome} {json.dumps(noted)} {report.duration:.0f} s, {test}")


@pytest.fixture
def open_ledger(make_tiny: MakeTiny) -> Iterator[Callable[[torch.dtype], Any]]:
    """`open_ledger(dtype)`: the ledger of a new two-layer GPT-2, which lives as long as the test."""
    from errata.editors.core.ledger.ledger import Ledger

    models: list[Any] = []

    def make(dtype: torch.dtype) -> Ledger:
        models.append(make_tiny("gpt2", dtype=dtype, n_layers=2))
        return Ledger.of(models[-1])

    yield make
    models.clear()


@pytest.fixture
def ledger(open_ledger: Callable[[torch.dtype], Any]) -> Any:
    """The ledger of a two-layer GPT-2 in float32."""
    return open_ledger(torch.float32)


@pytest.fixture(scope="session")
def state(digest: Callable[[Any], str]) -> Callable[[Any], tuple[Any, ...]]:
    """`state(ledger)`: everything that a refused or failed operation must leave alone, to compare with `==`."""
    return lambda book: (digest(book.model), book.entries, book._next_order, book._is_untouched, book._savepoints[:])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what was imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def folder_of_world(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    from errata import models

    return Path(shutil.copytree(models.locate("world"), tmp_path / "copy"))
