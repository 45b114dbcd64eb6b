"""The command that measures speed: that it compares equal results and writes all it says. How fast is not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from errata.benchmarks.speed import report, run, solves_reference, synthetic, tracing
from errata.benchmarks.speed.__main__ import main
from errata.benchmarks.speed.settings import PHASES, SpeedConfig
from errata.benchmarks.speed.stage import check_room, declared
from errata.editors.core.errors import ConfigError
from errata.editors.core.solve.null_space import GrowingFactor

SMALL = (
    "shape=tiny", "growth_shape=tiny", "requests=3", "steps=3", "batch=4", "earlier=10", "records=2", "texts=6",
    "keys=1500", "growth_to=12", "plain_records=1", "plain_cells=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a small run of the command, its results and what it printed."""
    folder = tmp_path_factory.mktemp("speed")
    console = Console(width=160, record=True, quiet=False, file=(folder / "terminal").open("w"))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert main([*SMALL, f"out={folder}"], console) == 0
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)
    return folder, json.loads((folder / run.JSON).read_text()), console.export_text()


def test_every_phase_agrees_with_its_plain_way(measured: tuple[Path, dict[str, Any], str]) -> None:
    results = measured[1]
    assert {one["phase"] for one in results["comparisons"]} | {"growth"} == set(PHASES)
    assert [one for one in results["comparisons"] if not one["agreement"] <= 1e-5] == []
    points = [point for curve in results["curves"] for point in curve["points"]]
    compared = [point["agreement"] for point in points if point["agreement"] is not None]
    assert len(compared) >= 8
    assert max(compared) <= 1e-5


def test_results_hold_every_field(measured: tuple[Path, dict[str, Any], str]) -> None:
    results = measured[1]
    whole = {"schema_version", "command", "config", "device", "precision", "threads", "clock", "versions", "phases",
             "comparisons", "curves", "peak_memory_bytes", "load_before"}  # fmt: skip
    assert whole <= results.keys()
    assert results["precision"] == "fp32"
    assert results["versions"]["torch"] == torch.__version__
    assert results["phases"].keys() == set(PHASES)
    for one in results["comparisons"]:
        assert {"phase", "name", "ours", "reference", "ratio", "ratio_cpu", "ratio_wall", "target", "settings"} <= set(
            one
        )
        assert one["ratio_cpu"] == one["reference"]["cpu_seconds"] / one["ours"]["cpu_seconds"]
        assert one["ratio_wall"] == one["reference"]["seconds"] / one["ours"]["seconds"]
    assert {(curve["name"], curve["x"]) for curve in results["curves"]} == {
        (name, x) for name in ("MEMIT", "AlphaEdit") for x in ("batch size", "edits so far")
    }


def test_the_table_is_printed_and_written_and_the_picture_is_one(measured: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, printed = measured
    markdown = (folder / run.MARKDOWN).read_text()
    for row in report.rows(results):
        assert f"| {' | '.join(row)} |" in markdown
        assert row[1] in printed
    assert (folder / run.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_command_in_the_results_repeats_the_run(measured: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = measured
    again = SpeedConfig.parsed(results["command"].split()[3:])
    assert again == SpeedConfig.parsed([*SMALL, f"out={folder}"])


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("shap=tiny", "did you mean 'shape'"),
        ("shape=gpt3", "gpt2"),
        ("phases=targets,key", "phases"),
        ("phases=", "phases"),
        ("protocols=league", "protocols"),
        ("protocols=", "protocols"),
        ("requests=many", "requests"),
        ("requests=0", "requests"),
        ("precision=fp16", "precision"),
        ("precision=tf32", "tf32"),
        ("shape", "name=value"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(argument: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        main([argument, f"out={tmp_path / 'out'}"], Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_model_without_room_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.benchmarks.speed.stage._available", lambda: 8 * 2**30)
    check_room(SpeedConfig(phases=("keys",), shape="gpt2"))
    with pytest.raises(ConfigError, match="llama-3-8b takes about"):
        check_room(SpeedConfig(phases=("keys",), shape="llama-3-8b"))


def test_a_declared_precision_is_taken_back() -> None:
    before = torch.get_float32_matmul_precision()
    with declared(SpeedConfig(device="cuda", precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_a_made_up_second_moment_has_the_eigenvalues_and_keys_it_says() -> None:
    spectrum = synthetic.Spectrum.power_law(24, condition=1e3)
    values = torch.linalg.eigvalsh(spectrum.moment()).flip(0)
    torch.testing.assert_close(values, spectrum.values)
    assert float(values[0] / values[-1]) == pytest.approx(1e3)
    keys = spectrum.keys(200_000, 0)
    assert float((keys @ keys.T / 200_000 - spectrum.moment()).norm() / spectrum.moment().norm()) < 0.02
    P = spectrum.null_space(1.0).matrix()
    torch.testing.assert_close(P @ P, P)
    assert int(P.trace().round()) == int((spectrum.values < 1).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_factor_grown_in_any_batches_solves_as_the_whole_system_does(dtype: torch.dtype) -> None:
    spectrum, ridge = synthetic.Spectrum.power_law(40, largest=1.0), 0.5
    P = spectrum.null_space(0.1).matrix()
    sizes = (5, 1, 1, 30, 2, 60, 3)
    factor, past = GrowingFactor.empty(ridge), []
    for seed, size in enumerate(sizes):
        K = spectrum.keys(size, seed)
        adjoint, factor = factor.append((P @ K).to(dtype))
        M = torch.cat([*past, K], dim=1)
        whole = torch.linalg.solve(P @ M @ M.T + ridge * torch.eye(40, dtype=torch.float64), P @ K)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert float((adjoint - whole).norm() / whole.norm()) < tolerance
        past.append(K)
    assert sum(block.shape[1] for block in factor.blocks) == sum(sizes)
    widths = [block.shape[1] for block in factor.blocks]
    assert widths == sorted(widths, reverse=True)


def test_a_factor_goes_over_to_double_precision_where_single_would_not_do() -> None:
    spectrum, ridge = synthetic.Spectrum.power_law(40, largest=1.0), 1e-5
    factor = GrowingFactor.empty(ridge)
    for seed in range(4):
        factor = factor.append(spectrum.keys(8, seed).float())[1]
    assert {block.dtype for block in factor.blocks} == {torch.float64}


def test_the_plain_solves_are_the_formulae() -> None:
    spectrum = synthetic.Spectrum.power_law(20, condition=100)
    C, K = spectrum.moment(), spectrum.keys(6, 0)
    A = solves_reference.emmet(K, C, 2.0, 0.0)
    torch.testing.assert_close(A.T @ K, torch.eye(6, dtype=torch.float64))
    B = solves_reference.memit(K, C, 2.0)
    torch.testing.assert_close((2.0 * C + K @ K.T) @ B, K)


def test_plain_cells_are_spread_over_the_heat_map() -> None:
    assert tracing._spread(3, 4, 5) == [(0, 1), (0, 3), (1, 2), (2, 0), (2, 2)]
    assert len(tracing._spread(3, 4, 0)) == 12
    assert tracing._spread(2, 2, 9) == [(0, 0), (0, 1), (1, 0), (1, 1)]
