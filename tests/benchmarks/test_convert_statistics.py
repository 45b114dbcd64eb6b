"""Second moments and projectors of other repositories: read without unpickling, and used as if handed in."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typed_commands import run

from errata import editors
from errata.benchmarks.bench import prepare
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.input_digests import digests
from errata.benchmarks.convert.statistics import read_moment, read_projectors
from errata.cli import convert
from errata.editors import IKE, ROME, WISE, AlphaEdit
from errata.editors.core.config_docs import documented
from errata.editors.core.errors import ConfigError, StatisticsError
from errata.editors.core.files import matrix_file
from errata.editors.core.files.matrix_file import MatrixFile
from errata.editors.core.moments import second_moments
from errata.editors.core.request import EditRequest

NAME = "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
REQUEST = EditRequest("The capital of {} is", "Varland", "Brast")
QUICK = {"v_num_grad_steps": 3, "context_template_length_params": ((3, 2),)}


def samples(width: int, n: int = 500, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def save(path: Path, keys: torch.Tensor, **other: Any) -> Path:
    """As `tally` of util/runningstats.py leaves it."""
    arrays: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": len(keys),
        "mom2.mom2": (keys.T @ keys).numpy(),
        "sample_size": 100000,
    }
    numpy.savez(path, **{**arrays, **{name.replace("__", "."): value for name, value in other.items()}})
    return path


def run_raising(*arguments: str) -> None:
    console = Console(file=io.StringIO())
    convert.run(arguments[1:], console, console)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_moment_is_their_sum_over_their_number_of_tokens(tmp_path: Path) -> None:
    keys = samples(12)
    found = read_moment(save(tmp_path / NAME, keys))
    assert (found.layer, found.tokens) == (1, 500)
    torch.testing.assert_close(found.matrix, keys.T @ keys / 500)
    assert torch.equal(found.matrix, found.matrix.T)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.17.mlp.c_proj_float32_mom2_100000.npz", 17),
        ("model.layers.4.mlp.down_proj_float32_mom2_100000.npz", 4),
        ("gpt_neox.layers.15.mlp.dense_4h_to_h_float32_mom2_t2048_100000.npz", 15),
        ("moments.npz", None),
        ("a.3.b.4.c.npz", None),
    ],
)
def test_the_layer_is_the_one_number_among_the_parts_of_the_name(name: str, layer: int | None, tmp_path: Path) -> None:
    assert read_moment(save(tmp_path / name, samples(3))).layer == layer


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_file_of_theirs_can_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    objects = numpy.array([Evil(mark)], dtype=object)
    save(tmp_path / NAME, samples(3), mom2__mom2=objects)
    torch.save(Evil(mark), tmp_path / "null_space_project.pt")
    for read, name in ((read_moment, NAME), (read_projectors, NAME), (read_projectors, "null_space_project.pt")):
        with pytest.raises(StatisticsError, match=r"plain arrays|can run code"):
            read(tmp_path / name)
    torch.save({"P": Evil(mark)}, tmp_path / "renamed.npz")
    for read in (read_moment, read_projectors):
        with pytest.raises(StatisticsError, match="can run code"):
            read(tmp_path / "renamed.npz")
    assert not mark.exists()
    numpy.load(tmp_path / NAME, allow_pickle=True)["mom2.mom2"]  # the control: this is what it would have done
    assert mark.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mom2__count": 0}, "number of tokens"),
        ({"mom2__mom2": numpy.full((3, 3), numpy.nan)}, "NaN"),
        ({"mom2__mom2": numpy.ones((3, 4))}, r"\(3, 4\)"),
        ({"mom2__mom2": numpy.triu(numpy.ones((3, 3)))}, "no second moment"),
        ({"mom2__mom2": -numpy.eye(3)}, "no second moment"),
        ({"mom2__mom2": numpy.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]], "f4")}, r"eigenvalue -0\.002"),
        ({"mom2__mom2": numpy.array("text")}, "no mom2.mom2"),
    ],
)
def test_what_is_no_second_moment_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=said) as caught:
        read_moment(save(tmp_path / NAME, samples(3), **change))
    assert NAME in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "array"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path / NAME, samples(8))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "array":
        path.unlink()
        numpy.save(path.with_suffix(".npy"), numpy.ones(3))
        path.with_suffix(".npy").rename(path)
    else:
        path.unlink()
    with pytest.raises(StatisticsError, match=re.escape(NAME)):
        read_moment(path)


def test_projectors_are_read_from_one_array_or_from_one_a_layer(tmp_path: Path) -> None:
    P = torch.stack([torch.diag((torch.arange(4) < k).float()) for k in (1, 2)])
    save_file({"P": P}, tmp_path / "P.safetensors")
    save_file({"5": P[1].clone(), "4": P[0].clone()}, tmp_path / "named.safetensors")
    numpy.savez(tmp_path / "P.npz", P=P.numpy())
    for name, layers in (("P.safetensors", [4, 5]), ("P.npz", [4, 5]), ("named.safetensors", None)):
        found = read_projectors(tmp_path / name, layers)
        assert list(found) == [4, 5]
        assert all(torch.equal(found[layer], P[i]) for i, layer in enumerate((4, 5)))
    for name, layers in (
        ("P.safetensors", None),
        ("P.safetensors", [4]),
        ("P.npz", [4, 4]),
        ("named.safetensors", [4, 5]),
    ):
        with pytest.raises(StatisticsError, match=name):
            read_projectors(tmp_path / name, layers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda P: P + 0.5 * torch.eye(len(P)), r"layer 5 .* fails by 0\.\d+ of its norm"),
        (lambda P: P - torch.triu(P, 1), "layer 5 is no projector"),
        (lambda P: -P, r"layer 5 .* fails by 2 of its norm"),
        (lambda P: 1.001 * P, "layer 5"),
        (lambda P: P.bfloat16().float(), "layer 5"),
        (lambda P: P.half().float(), "layer 5"),
        (lambda P: samples(len(P), len(P)), "layer 5"),
    ],
)
def test_what_is_no_projector_is_refused_with_its_layer(
    change: Callable[[torch.Tensor], torch.Tensor], said: str, tmp_path: Path
) -> None:
    Q, _ = torch.linalg.qr(samples(64, 40).T)  # in single precision, as the authors compute it
    P = Q @ Q.T
    good, bad, out = tmp_path / "good.safetensors", tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    save_file({"4": P.clone(), "5": P.clone()}, good)
    assert torch.equal(read_projectors(good)[5], P)
    save_file({"4": P.clone(), "5": change(P).contiguous()}, bad)
    with pytest.raises(StatisticsError, match=said):
        run_raising("convert", "projectors", str(bad), f"out={out}")
    assert not out.exists()


def test_the_advice_given_for_a_pickle_turns_it_into_what_is_read(tmp_path: Path) -> None:
    P = torch.stack([torch.eye(3), torch.zeros(3, 3)])
    path = tmp_path / "null_space_project.pt"
    torch.save(P, path)
    with pytest.raises(StatisticsError) as caught:
        read_projectors(path, [4, 5])
    code = re.search(r'python -c "(.*)"', str(caught.value))
    assert code is not None
    code_here = code[1].replace("FILE", str(path.with_suffix("")))
    subprocess.run([sys.executable, "-c", code_here], check=True, timeout=120)
    assert torch.equal(read_projectors(path.with_suffix(".safetensors"), [4, 5])[4], P[0])


# --- the file that methods read ---------------------------------------------------------------------------------------


def test_matrices_come_back_bit_for_bit_and_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    C = samples(6)[:6]
    path = matrix_file.write(tmp_path / "m.safetensors", "moments", {3: C, 1: C.T}, {3: {"tokens": 7}})
    found = MatrixFile.open(path, "moments")
    assert list(found.layers) == [1, 3]
    assert found.layers[3]["tokens"] == 7
    assert torch.equal(found.matrix(3), C)
    assert torch.equal(found.matrix(1), C.T)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StatisticsError, match="not as it was written"):
        MatrixFile.open(path, "moments").matrix(3)


def test_a_file_of_another_kind_or_without_the_layer_is_refused(tmp_path: Path) -> None:
    path = matrix_file.write(tmp_path / "m.safetensors", "moments", {3: torch.eye(4)})
    save_file({"3": torch.eye(4)}, tmp_path / "plain.safetensors")
    with pytest.raises(StatisticsError, match="errata convert projectors"):
        MatrixFile.open(path, "projectors")
    with pytest.raises(StatisticsError, match=r"layer 2, only for \[3\]"):
        MatrixFile.open(path, "moments").matrix(2)
    for other in ("plain.safetensors", "missing.safetensors"):
        with pytest.raises(StatisticsError, match="errata convert moments"):
            MatrixFile.open(tmp_path / other, "moments")
    with pytest.raises(StatisticsError, match="not written over"):
        matrix_file.write(path, "moments", {3: torch.eye(4)})
    with pytest.raises(StatisticsError, match="NaN"):
        matrix_file.write(tmp_path / "nan.safetensors", "moments", {3: torch.full((2, 2), torch.nan)})
    assert not list(tmp_path.glob("nan*"))


# --- as a method uses them --------------------------------------------------------------------------------------------


def factors(editor: Any) -> tuple[torch.Tensor, ...]:
    (edit,) = editor.compute(REQUEST)
    return tuple(tensor for update in edit.patch.updates.values() for tensor in update.tensors)


def same(mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("moments were collected")

    monkeypatch.setattr(second_moments, "second_moments", refuse)


@pytest.mark.usefixtures("no_text")
def test_rome_with_a_converted_file_edits_as_with_the_moment_handed_in(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    keys = samples(128)
    save(tmp_path / NAME, keys)
    shown = run("convert", "moments", str(tmp_path / NAME), f"out={tmp_path / 'm.safetensors'}")
    assert "layer 1: 128 x 128 over 500 tokens" in shown
    config = {**QUICK, "layers": (1,)}
    handed = ROME(make_tiny("gpt2"), tiny_tokenizer, config, moments={1: read_moment(tmp_path / NAME).matrix})
    read = ROME(make_tiny("gpt2"), tiny_tokenizer, {**config, "mom2_file": str(tmp_path / "m.safetensors")})
    assert same(factors(handed), factors(read))
    bare = ROME(make_tiny("gpt2"), tiny_tokenizer, {**config, "mom2_adjustment": False})
    assert not same(factors(handed), factors(bare))


@pytest.mark.usefixtures("no_text")
def test_alphaedit_with_a_converted_file_edits_as_with_the_projectors_handed_in(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    P = torch.stack([torch.diag((torch.arange(128) % 3 > k).float()) for k in (0, 1)])
    save_file({"P": P}, tmp_path / "P.safetensors")
    shown = run(
        "convert", "projectors", str(tmp_path / "P.safetensors"), "layers=[0,1]", f"out={tmp_path / 'p.safetensors'}"
    )
    assert "layer 0: 128 x 128, 85 dimensions kept" in shown
    config = {**QUICK, "layers": (0, 1), "L2": 0.1}
    handed = AlphaEdit(make_tiny("gpt2"), tiny_tokenizer, config, projectors={0: P[0], 1: P[1]})
    read = AlphaEdit(make_tiny("gpt2"), tiny_tokenizer, {**config, "projector_file": str(tmp_path / "p.safetensors")})
    assert same(factors(handed), factors(read))


@pytest.mark.usefixtures("no_text")
def test_moments_of_another_width_or_layer_are_refused_and_the_model_is_as_before(
    make_tiny: Any, tiny_tokenizer: Any, digest: Callable[[Any], str], tmp_path: Path
) -> None:
    path = str(matrix_file.write(tmp_path / "m.safetensors", "moments", {1: torch.eye(64)}))
    model = make_tiny("gpt2")
    before = digest(model)
    for layer, said in ((1, r"\(128, 128\)"), (0, r"no matrix for layer 0, only for \[1\]")):
        with pytest.raises(StatisticsError, match=said):
            ROME(model, tiny_tokenizer, {**QUICK, "layers": (layer,), "mom2_file": path}).apply(REQUEST)
    assert digest(model) == before


def test_runs_with_other_moments_under_the_same_name_are_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    def settings() -> dict[str, Any]:
        return prepare(BenchConfig.of(compose("bench", ["n_edits=1", f"++editor.mom2_file='{path}'"]))).settings

    with pytest.raises(ConfigError, match="does not exist"):
        settings()
    matrix_file.write(path, "moments", {0: torch.eye(4)})
    first = settings()
    path.unlink()
    matrix_file.write(path, "moments", {0: 2 * torch.eye(4)})
    assert settings()["handed_in"].keys() == {"mom2_file"}
    assert settings() != first
    assert {**settings(), "handed_in": None} == {**first, "handed_in": None}


def test_runs_with_other_demonstrations_under_the_same_name_are_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.json"
    config = BenchConfig.of({"editor": {"name": "ike"}, "model": {"name": "world"}, "dataset": {"name": "world"}})
    found = []
    for text in ("[1]", "[2]"):
        path.write_text(text)
        found.append(digests(config, IKE.Config.from_dict({"demonstrations": str(path)}))["handed_in"])
    assert found[0] != found[1]
    assert digests(config, IKE.Config())["handed_in"] == {}
    assert digests(config, WISE.Config.from_dict({"unrelated_text": str(path)}))["handed_in"] == {"unrelated_text": ANY}
    assert digests(config, WISE.Config.from_dict({"unrelated_text": "owner/name::train"}))["handed_in"] == {}


@pytest.mark.parametrize("method", editors.METHODS)
def test_every_field_that_names_a_file_has_a_digest(method: str) -> None:
    config = editors.get(method).Config
    texts = [field for field in documented(config) if "str" in field.kind.split(" | ")]
    named = {field.name for field in texts if re.search(r"\bfile\b", field.meaning.lower())}
    # `digests` keeps those of checkpoints and of the text of second moments by themselves.
    assert named - {"checkpoint", "mom2_dataset"} == {*config.FILES, *config.TEXTS}


def test_several_layers_of_theirs_become_one_file_and_one_layer_is_not_taken_twice(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / NAME.replace(".1.", f".{layer}."), samples(5, seed=layer))) for layer in (4, 5)]
    run("convert", "moments", *paths, f"out={tmp_path / 'both.safetensors'}")
    found = MatrixFile.open(tmp_path / "both.safetensors", "moments")
    assert [(layer, notes["tokens"], notes["source"]) for layer, notes in found.layers.items()] == [
        (layer, 500, Path(path).name) for layer, path in zip((4, 5), paths, strict=True)
    ]
    unnamed = save(tmp_path / "moments.npz", samples(5))
    for arguments in ([paths[0], paths[0]], [str(unnamed)]):
        with pytest.raises(ConfigError, match="layer=N"):
            run("convert", "moments", *arguments, f"out={tmp_path / 'x.safetensors'}")
    run("convert", "moments", str(unnamed), "layer=9", f"out={tmp_path / 'x.safetensors'}")
    assert list(MatrixFile.open(tmp_path / "x.safetensors", "moments").layers) == [9]


@pytest.mark.usefixtures("no_text")
def test_a_file_of_projectors_that_are_none_is_not_used(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = matrix_file.write(tmp_path / "p.safetensors", "projectors", {1: 1.5 * torch.eye(128)})
    editor = AlphaEdit(make_tiny("gpt2"), tiny_tokenizer, {**QUICK, "layers": (1,), "projector_file": str(path)})
    with pytest.raises(StatisticsError, match=r"layer 1: .* no projector .* fails by 0\.5 of its norm"):
        editor.apply(REQUEST)


@pytest.mark.usefixtures("no_text")
def test_a_moment_handed_in_that_is_not_symmetric_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    moment = torch.eye(128)
    moment[0, 1] = 0.5
    editor = ROME(make_tiny("gpt2"), tiny_tokenizer, {**QUICK, "layers": (1,)}, moments={1: moment})
    with pytest.raises(StatisticsError, match=r"layer 1: the second moment is not symmetric: .* differ by 0\.5"):
        editor.apply(REQUEST)
