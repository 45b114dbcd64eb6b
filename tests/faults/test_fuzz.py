"""Whatever is fed in, what comes out is a result or a typed error: no bare traceback, and never a changed model.

ERRATA_TRIALS sets how many inputs each of these is tried with, drawn anew every time; without it they are few, and the
same ones on every machine. Each says how they ended, and fails where all of them ended alike: inputs that are all
refused at the door try nothing.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from errata import EditRequest, editors
from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets import world
from errata.benchmarks.training import train
from errata.cli import edit, main
from errata.editors import ROME
from errata.editors.core.errors import ConfigError, DatasetError, ErrataError, LedgerError
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.storage.journal import Journal

TRIALS = os.environ.get("ERRATA_TRIALS")
FULL = 2_000  # what ERRATA_TRIALS=full stands for


def tried(few: int, attempt: Callable[[st.DataObject], str], *, least: float = 0.02) -> Counter[str]:
    """Call `attempt`, which says how it ended, with `few` inputs or as many as are asked for.

    At least two ends must be the end of a share of `least` of them each.
    """
    ends: Counter[str] = Counter()

    @settings(
        max_examples=FULL if TRIALS == "full" else int(TRIALS or few),
        derandomize=TRIALS is None,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def once(data: st.DataObject) -> None:
        ends[attempt(data)] += 1

    once()
    assert sum(count >= least * ends.total() for count in ends.values()) >= 2, ends
    return ends


# Several scripts, marks that combine, signs that turn the direction, emoji, controls, half a pair, braces.
LETTERS = "aB 7.,'\"{}\\\n\t\x00\x07é\u0301שع\u202e\u200d👩\U0001f680漢\ufeff\ud800"
WELL_FORMED = "".join(letter for letter in LETTERS if letter not in "\x00\ud800{}")
LONG = ["x" * 3_000, "Varland " * 40]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(LETTERS[:-1], max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}", max_size=3), inner, max_size=3),
    max_leaves=8,
)


# --- requests -----------------------------------------------------------------------------------------------------

ANYTHING = st.one_of(
    st.text(LETTERS, max_size=12), st.sampled_from(LONG), st.none(), st.integers(), st.binary(max_size=3)
)
NAMES = st.one_of(st.text(WELL_FORMED, min_size=1, max_size=8).map(str.strip), st.sampled_from(["Varland", "Oslen"]))
SENTENCES = st.builds("{}{{}}{}".format, st.text(WELL_FORMED, max_size=8), st.text(WELL_FORMED, max_size=8))


@pytest.fixture(scope="module")
def editor(make_tiny: Callable[..., Any], tiny_tokenizer: Any) -> ROME:
    config = ROME.Config(layers=(1,), v_num_grad_steps=2, mom2_adjustment=False, context_templates=("{}",))
    return ROME(make_tiny("gpt2"), tiny_tokenizer, config)


def test_a_request_is_applied_and_undone_to_the_bit_or_refused_with_the_model_as_it_was(
    editor: ROME, digest: Callable[[Any], str]
) -> None:
    before = digest(editor.model)

    def attempt(data: st.DataObject) -> str:
        fields: list[Any] = [data.draw(kind) for kind in (SENTENCES, NAMES, NAMES, NAMES | st.none())]
        if data.draw(st.booleans()):
            fields[data.draw(st.integers(0, 3))] = data.draw(ANYTHING)
        end = "applied"
        try:
            edit = editor.apply(EditRequest(*fields))
        except ErrataError as error:
            assert str(error)
            end = "refused"
        else:
            assert digest(editor.model) != before
            assert all(torch.isfinite(parameter).all() for parameter in editor.model.parameters())
            edit.undo()
        assert digest(editor.model) == before
        assert len(editor.ledger) == 0
        return end

    tried(60, attempt)


# --- files of datasets --------------------------------------------------------------------------------------------


def easyedit() -> list[dict[str, Any]]:
    return [
        {
            "prompt": case.request.text,
            "subject": case.request.subject,
            "target_new": case.request.target,
            "ground_truth": case.request.target_true,
            "rephrase_prompt": f"Yes. {case.request.text}",
        }
        for case in world.cases()[:3]
    ]


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    """Some of every format."""
    forms: tuple[world.Form, ...] = ("counterfact", "counterfact_plus", "zsre")
    return {form: world.records(form)[:3] for form in forms} | {"easyedit": easyedit()}


FORMATS = ("counterfact", "counterfact_plus", "zsre", "easyedit")


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


def spoilt(value: Any, data: st.DataObject) -> Any:
    """A JSON value with something else somewhere, or something gone, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            break
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        if data.draw(st.booleans()):
            container[key] = data.draw(JSON)
        elif isinstance(container, dict):
            del container[key]
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return value


def read(name: str, path: Path, least: int = 0) -> str:
    """How reading a file ends."""
    try:
        found = datasets.load(name, path)
    except (DatasetError, ConfigError) as error:
        assert str(error)
        return "refused"
    assert all(isinstance(case.request, EditRequest) and case.id for case in found.cases)
    assert all(dropped.reason for dropped in found.dropped)
    assert len(found.cases) + len(found.dropped) >= least
    return "some dropped" if found.dropped else "read"


@pytest.mark.parametrize("name", FORMATS)
def test_records_with_anything_in_them_are_read_or_named_among_the_dropped(
    name: str, records: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "data.json"

    def attempt(data: st.DataObject) -> str:
        whole = spoilt(records[name], data)
        path.write_text(json.dumps(whole), encoding="utf-8")
        return read(name, path, least=len(whole) if isinstance(whole, list) else 0)

    tried(60, attempt)


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Cut off somewhere, or with a bit turned, or with a piece of zeros."""
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    match data.draw(st.sampled_from(["cut", "flip", "zero"])):
        case "cut":
            return content[:place]
        case "flip":
            turned = content[place] ^ (1 << data.draw(st.integers(0, 7)))
            return content[:place] + bytes([turned]) + content[place + 1 :]
        case _:
            gone = content[place : place + 64]
            return content[:place] + bytes(len(gone)) + content[place + len(gone) :]


def written_otherwise(content: bytes, data: st.DataObject) -> bytes:
    """Damaged, or in another encoding, or with more than was asked for."""
    place = data.draw(st.integers(0, len(content)))
    match data.draw(st.sampled_from(["damaged", "insert", "twice", "utf-16", "bom", "gzip", "deep", "latin"])):
        case "damaged":
            return damaged(content, data)
        case "insert":
            return content[:place] + data.draw(st.binary(min_size=1, max_size=8)) + content[place:]
        case "twice":
            return content + content
        case "utf-16":
            return content.decode().encode("utf-16")
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "gzip":
            return gzip.compress(content)[: data.draw(st.integers(0, 2_000))]
        case "deep":
            return b"[" * 100_000 + content
        case _:
            return content.replace(b"a", b"\xe9")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_any_bytes_is_read_or_refused(name: str, records: dict[str, Any], tmp_path: Path) -> None:
    whole = json.dumps(records[name]).encode()

    def attempt(data: st.DataObject) -> str:
        path = tmp_path / data.draw(st.sampled_from(["data.json", "data.json.gz", "data.jsonl", "data"]))
        path.write_bytes(written_otherwise(whole, data))
        return read(name, path)

    tried(60, attempt)


# --- ledgers on the disk ------------------------------------------------------------------------------------------

WEIGHT = "transformer.h.0.mlp.c_proj.weight"
EDITS = 6


def low_rank(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(32, 1, generator=generator), torch.randn(1, 128, generator=generator))


@pytest.fixture(scope="module")
def journal(make_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "journal"
    model = make_tiny("gpt2", n_layers=2)
    ledger, written = Ledger.of(model), Journal.open(folder, {"name": "tiny"})
    for seed in range(EDITS):
        written.append(ledger.append(f"edit {seed}", Patch({WEIGHT: low_rank(seed)})), {"seed": seed}, ledger)
    return folder


def is_the_written(entry: Entry | None, seed: int) -> bool:
    if entry is None or entry.id != f"edit {seed}":
        return False
    pairs = zip(entry.patch.updates[WEIGHT].tensors, low_rank(seed).tensors, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rearranged(content: bytes, data: st.DataObject) -> bytes:
    """Lines that are gone, there twice, in another order, or cut."""
    found = content.splitlines(keepends=True)
    assume(found)
    i, j = (data.draw(st.integers(0, len(found) - 1)) for _ in range(2))
    match data.draw(st.sampled_from(["drop", "repeat", "swap", "cut"])):
        case "drop":
            del found[i]
        case "repeat":
            found.insert(j, found[i])
        case "swap":
            found[i], found[j] = found[j], found[i]
        case _:
            found[i] = found[i][: data.draw(st.integers(0, len(found[i]) - 1))]
    return b"".join(found)


def test_a_damaged_journal_gives_what_was_written_up_to_the_damage_or_is_refused(journal: Path, tmp_path: Path) -> None:
    whole = {path.name: path.read_bytes() for path in journal.iterdir()}

    def attempt(data: st.DataObject) -> str:
        name = data.draw(st.sampled_from(sorted(whole)))
        spoil = rearranged if name == "edits.jsonl" and data.draw(st.booleans()) else damaged
        for other, content in (whole | {name: spoil(whole[name], data)}).items():
            (tmp_path / other).write_bytes(content)
        found, end = [], "read"
        try:
            found += (record.entry for record in Journal(tmp_path).records())
        except LedgerError as error:
            assert str(error)
            end = "refused"
        assert all(is_the_written(entry, seed) for seed, entry in enumerate(found))
        # Lines that are gone from the end are what a kill leaves: fewer edits, and no damage.
        assert end == "refused" or len(found) == EDITS or name == "edits.jsonl"
        return end

    tried(150, attempt)


# --- configurations -----------------------------------------------------------------------------------------------


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type as one, and others."""
    if isinstance(value, bool):
        return st.booleans() | JSON
    if isinstance(value, int | float):
        return st.integers(-2, 100) | st.floats(-2, 100) | JSON
    if isinstance(value, list | tuple):
        return st.lists(st.integers(-1, 12), max_size=3).map(sorted) | JSON
    return st.just(value) | JSON


@pytest.mark.parametrize("name", editors.METHODS)
def test_any_values_give_a_configuration_that_survives_being_written_or_a_typed_error(name: str) -> None:
    kind = editors.get(name).Config
    usual = kind().to_dict()

    def attempt(data: st.DataObject) -> str:
        fields = data.draw(st.lists(st.sampled_from([*usual, "layer"]), min_size=1, max_size=2, unique=True))
        try:
            config = kind.from_dict({field: data.draw(near(usual.get(field))) for field in fields})
        except ConfigError as error:
            assert str(error)
            return "refused"
        assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return "taken"

    tried(60, attempt)


def test_a_bench_of_any_values_is_a_configuration_or_a_typed_error() -> None:
    values = {"editor": {"name": "rome"}, "model": {"name": "world"}, "dataset": {"name": "world"}, "n_edits": 3}
    values |= {"collapse": {"n_texts": 1}, "generation": {"tokens": 0}, "guard": {"name": "none"}, "seed": 1}

    def attempt(data: st.DataObject) -> str:
        try:
            BenchConfig.of(spoilt(values, data))
        except ConfigError as error:
            assert str(error)
            return "refused"
        return "taken"

    tried(150, attempt)


# --- command lines ------------------------------------------------------------------------------------------------

COMMANDS = ("edit", "bench", "train", "compare", "status", "report", "methods", "convert", "export", "help", "nothing")
WORDS = (
    *(
        "editor=rome",
        "editor=rome,memit",
        "editor.v_lr=0.1",
        "editor.v_lr=",
        "model=world",
        "model=",
        "model=a/b",
        "-m",
    ),
    *("dataset=world", "dataset.path=/nowhere", "n_edits=3", "n_edits=-1", "n_edits=x", "n_edits=1e400", "seed=[1"),
    *("prompt={}", "subject=Varland", "target=Oslen", "target=", "out=runs", "hydra.run.dir=x", "+a=b", "~seed", "="),
    *(
        "experiment=butterfly",
        "launcher=basic",
        "guard=disabling",
        "guard.ratio=nan",
        "out",
        "rome",
        "a\x01b",
        "--help",
    ),
)


def test_a_command_line_of_any_words_ends_with_0_or_with_2_and_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise ErrataError("it would run now")

    for module, name in ((bench, "carry_out"), (train, "run"), (edit, "make_edit")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.chdir(tmp_path)
    word = st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), st.text(WELL_FORMED, max_size=6))

    def attempt(data: st.DataObject) -> str:
        return ended([data.draw(st.sampled_from(COMMANDS)), *data.draw(st.lists(word, max_size=4))])

    def ended(words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["errata", *words])
        code = main.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert code == 0 or (code == 2 and "errata: " in captured.err), (words, code)
        return "would run" if "it would run now" in captured.err else f"code {code}"

    # No command may get past `reached`: what it would run takes minutes.
    for words in (["edit"], ["bench"], ["train", "editor=mend"], ["bench", "-m", "seed=0,1"]):
        assert ended(words) == "would run", words
    tried(150, attempt)
