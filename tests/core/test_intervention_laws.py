"""What holds for every intervention by name, those of errata and one that another package registers.

Undone to the bit; wrong fields refused before anything changes; a step that fails leaves the model as it was; put back
once is put back; saved and loaded the same model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.editors.core.errors import ConfigError, LedgerError
from errata.editors.core.interventions import registry
from errata.editors.core.interventions.compressions import TEXT, WeightCompression
from errata.editors.core.interventions.intervention import Intervention, InterventionConfig, Step
from errata.editors.core.interventions.kept import Kept
from errata.editors.core.interventions.unlearning import FORGET, RETAIN
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import describe
from errata.testing import digest, tiny_models

FOREIGN = "tenths"
NAMES = (*(name for own in registry.OWN.values() for name in own), FOREIGN)
ROWS = {
    TEXT: [[(7 * i + j * j) % 60 for j in range(12)] for i in range(4)],
    FORGET: [[1, 2, 3, 4, 5], [6, 7, 8]],
    RETAIN: [[20, 21, 22, 23], [30, 31, 32]],
}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"forget": "-", "layer": 1, "lr": 1e-2},
    "ga": {"forget": "-", "lr": 1e-2},
    "gd": {"forget": "-", "lr": 1e-2},
    "torchao": {"group": None},
}


@dataclass(frozen=True)
class Tenths(Kept):
    """Elements that are whole tenths."""

    def project(self, weight: torch.Tensor) -> torch.Tensor:
        return (10 * weight).round() / 10

    def bits(self) -> float:
        return 6.0


class RoundedToTenths(WeightCompression):
    """What another package may register."""

    name = FOREIGN

    @dataclass(frozen=True, kw_only=True)
    class Config(InterventionConfig):
        share: float = 0.5
        """A number."""

    def compressed(self, weight: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        return Tenths().project(weight), Tenths()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(FOREIGN, f"{__name__}:RoundedToTenths", registry.ADDED.group)
    monkeypatch.setattr(type(registry.ADDED), "_points", lambda _self: [point])
    monkeypatch.setattr(type(registry.ADDED), "_import", lambda _self, _point: RoundedToTenths)


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> type[Intervention]:
    if request.param == "torchao" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    return registry.get(request.param)


def made(kind: type[Intervention]) -> Intervention:
    return kind(dict(FIELDS.get(kind.name, {})))


def tiny() -> Any:
    return tiny_models.tiny_model("gpt2", 60, n_layers=2)


def test_undone_to_the_bit_saved_and_loaded_the_same(kind: type[Intervention], tmp_path: Path) -> None:
    model = tiny()
    before = digest(model)
    applied = made(kind).apply_rows(model, ROWS)
    changed = digest(model)
    assert changed != before
    assert applied.is_applied
    errata.save_edits(model, tmp_path / "saved")
    assert digest(errata.load_ledger(tmp_path / "saved", tiny()).model) == changed
    applied.undo()
    assert digest(model) == before
    assert not applied.is_applied
    assert digest(made(kind).apply_rows(model, ROWS).model) == changed  # the same text gives the same bits


def test_wrong_fields_are_refused_by_the_name_that_was_typed(kind: type[Intervention]) -> None:
    with pytest.raises(ConfigError, match=r"^unknown field compress.no_such_field"):
        kind.Config.from_dict({**FIELDS.get(kind.name, {}), "no_such_field": 1}, path="compress.")
    for entry in fields(kind.Config):
        with pytest.raises(ConfigError, match=rf"^compress\.{entry.name}: expected"):
            kind.Config.from_dict({**FIELDS.get(kind.name, {}), entry.name: object()}, path="compress.")


def test_a_step_that_fails_leaves_the_model_as_it_was(kind: type[Intervention]) -> None:
    class Failing(kind):
        def steps(self, *given: Any) -> Iterator[Step]:
            for step in super().steps(*given):
                yield step
                raise RuntimeError("behind the first step")

    model = tiny()
    edit = Patch({describe(model).weight_name(1): LowRank(0.1 * torch.ones(32, 1), torch.ones(1, 128))})
    Ledger.of(model).append("edit", edit)  # below the intervention
    before = digest(model)
    with pytest.raises(RuntimeError, match="behind the first step"):
        made(Failing).apply_rows(model, ROWS)
    assert digest(model) == before
    assert [entry.id for entry in Ledger.of(model).entries] == ["edit"]
    Ledger.of(model).clear()
    assert digest(model) == digest(tiny())


def test_what_is_put_back_once_is_put_back(kind: type[Intervention]) -> None:
    model = tiny()
    before = digest(model)
    applied = made(kind).apply_rows(model, ROWS)
    if not applied.kept:
        with pytest.raises(LedgerError, match="fixes no weights"):
            applied.project()
        return
    assert not applied.project().ids  # it is where it must be
    compressed, name = digest(model), describe(model).weight_name(1)
    drawn = torch.randn(160, generator=torch.Generator().manual_seed(0))
    Ledger.of(model).append("edit", Patch({name: LowRank(drawn[:32, None], drawn[None, 32:])}))
    once = applied.project()
    assert once.names == (name,)
    after = digest(model)
    assert not applied.project().ids
    assert digest(model) == after
    once.undo()
    Ledger.of(model).remove("edit")
    assert digest(model) == compressed
    applied.undo()
    assert digest(model) == before
