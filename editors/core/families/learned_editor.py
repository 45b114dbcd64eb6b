"""Methods whose editor is trained before it edits: what they share, and what a training loop asks of them.

A method subclasses `TrainedEditor` and writes `build` (a new network), `loss` (of a batch of lessons), `solve`; which
cases to learn from, how long and when to stop is the loop's business. What was trained is kept in a folder of
safetensors and JSON, with the fingerprint of the model that it was trained for: on another one it is refused.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, check_positive
from errata.editors.core.editor import Editor
from errata.editors.core.errors import CheckpointError, StatisticsError
from errata.editors.core.files.digests import add_bytes
from errata.editors.core.files.tensor_cache import CachedTensors, DamagedEntryError, TensorCache, cache_folder
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.model.model_settings import LOADED_AS, read_model_settings
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.moments.fingerprint import fingerprint
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(EditorConfig):
    """Fields shared by methods that are trained, named as in MEND's files. Defaults are MEND's."""

    checkpoint: str | None = None
    """Folder of the trained editor, as `errata train` writes it; null: the one last trained for this model and these
    settings, from the cache."""

    lr: float = 1e-6
    """Learning rate of Adam in training."""

    accumulate_bs: int = 10
    """Edits that a training step averages over."""

    edit_bs: int = 1
    """Requests that are made as one edit in training."""

    grad_clip: float = 100.0
    """The gradient of a training step is scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("lr", "accumulate_bs", "edit_bs", "grad_clip"))


@dataclass(frozen=True)
class TrainingExample:
    """What there is to learn from one request: the rows that shall be answered after the edit, and those on which the
    model's predictions shall stay as they were."""

    request: EditRequest
    asked: tuple[AnsweredRow, ...]
    kept: tuple[KeptRow, ...]


class TrainedEditor(Editor):
    """Base class of methods that are trained.

    Args:
        trained: Whether to load what was trained. False: draw a new network by `config.seed`, to be trained.

    Attributes:
        network: What is trained.
        checkpoint: Digest of the trained network; None of a new one.

    Raises:
        CheckpointError: nothing was trained for this model and these settings, or it is damaged; says the command.
    """

    Config: ClassVar[type[TrainedConfig]] = TrainedConfig
    config: TrainedConfig
    # fields that decide the network's shape
    structural: ClassVar[tuple[str, ...]]
    network: nn.Module

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: TrainedConfig | Mapping[str, Any] | None = None,
        *,
        trained: bool = True,
        progress: Progress = silent,
    ) -> None:
        self._load_trained = trained
        super().__init__(model, tokenizer, config, progress=progress)

    def setup(self) -> None:
        self.checkpoint: str | None = None
        self._fingerprint: dict[str, str] | None = None
        entry = self._named() if self._load_trained and self.config.checkpoint is not None else None
        self.prepare()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.network = self.build(generator).to(self.architecture.device).eval()
        if self._load_trained:
            self.load(entry or self._kept())

    @abstractmethod
    def prepare(self) -> None:
        """Find the parts of the model that are edited, and check the configuration against them."""

    @abstractmethod
    def build(self, generator: torch.Generator) -> nn.Module:
        """A new network."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """The values of the `structural` fields, what they leave open filled in."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, as torch.optim takes it."""

    @abstractmethod
    def loss(self, edits: Sequence[Sequence[TrainingExample]]) -> tuple[Tensor, dict[str, float]]:
        """The mean training loss of some edits, each of one or several requests; and its parts, by name."""

    # --- what was trained -------------------------------------------------------------------------------------------

    def save(self, folder: str | Path | None = None, about: Mapping[str, Any] | None = None) -> str:
        """Write the network, whole or not at all; returns its digest.

        Args:
            folder: Where to; None: to the cache, where this method is looked for on this model.
            about: Anything that JSON can hold, to go with it.
        """
        name = self.name if folder is not None else _key(self.name, self.structure(), self._base())
        cache = TensorCache(_folder(folder))
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.network.state_dict().items()}
        self.checkpoint = _digest(self.structure(), tensors)
        meta = {"method": self.name, "structure": self.structure(), "base": self._base(), **(about or {})}
        with cache.locked([name]):
            cache.store(name, tensors, {**meta, "checkpoint": self.checkpoint})
        return self.checkpoint

    def load(self, entry: CachedTensors) -> Self:
        """Take over a network that was saved.

        Raises:
            CheckpointError: it is of another structure, or was trained for another model; says what differs.
        """
        self._check_base(entry)
        if entry.meta["structure"] != json.loads(json.dumps(self.structure())):
            raise CheckpointError(f"this {self.name} was trained as {entry.meta['structure']}, not {self.structure()}")
        self.network.load_state_dict(entry.tensors)
        self.checkpoint = _digest(self.structure(), entry.tensors)
        return self

    def _named(self) -> CachedTensors:
        """What is in the folder that the configuration names, whose structure the configuration then takes over."""
        folder = Path(str(self.config.checkpoint))
        entry = self._read(folder, self.name) if folder.is_dir() else None
        if entry is None:
            raise CheckpointError(f"checkpoint: no trained {self.name} in {str(folder)!r}; {self._advice()}")
        self._check_base(entry)
        default = self.Config()
        merged = self.Config.from_dict({**self.config.to_dict(), **entry.meta["structure"]})
        for name in self.structural:
            mine, stored = getattr(self.config, name), getattr(merged, name)
            if mine not in (stored, getattr(default, name)):
                raise CheckpointError(f"{name}: the {self.name} in {folder} was trained with {stored!r}, not {mine!r}")
        self.config = merged
        return entry

    def _kept(self) -> CachedTensors:
        """What is in the cache for this model and these settings."""
        entry = self._read(_folder(None), _key(self.name, self.structure(), self._base()))
        if entry is None:
            raise CheckpointError(
                f"{self.name} has to be trained before it edits, and no training for this model and these settings is "
                f"in {_folder(None)}; {self._advice()}, or name a folder by editor.checkpoint="
            )
        return entry

    def _read(self, folder: Path, name: str) -> CachedTensors | None:
        try:
            return TensorCache(folder).load(name)
        except DamagedEntryError as error:
            raise CheckpointError(f"the trained {self.name} is damaged: {error}; {self._advice()}") from error
        except StatisticsError as error:
            raise CheckpointError(f"the trained {self.name} cannot be had: {error}") from error

    def _check_base(self, entry: CachedTensors) -> None:
        base = self._base()
        if differing := [name for name, value in base.items() if entry.meta["base"].get(name) != value]:
            raise CheckpointError(
                f"this {self.name} was trained for another model: {', '.join(differing)} "
                f"differ{'s' if differing[1:] == [] else ''}; {self._advice()}"
            )

    def _base(self) -> dict[str, str]:
        """The model's fingerprint, read once: edits do not change it."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model, self.tokenizer)
        return self._fingerprint

    def _advice(self) -> str:
        """The command that trains what is missing."""
        settings = read_model_settings(self.model).editors
        name = getattr(self.model, LOADED_AS, None) or getattr(self.model, "name_or_path", "") or "FOLDER_OR_ID"
        # A model whose folder brings settings is a testbed, on whose own cases training is by default.
        cases = [] if self.name in settings else ["dataset=counterfact", "dataset.path=FILE"]
        brought = self.Config.from_dict(settings.get(self.name, {}))
        fields = [
            f"editor.{field}={json.dumps(getattr(self.config, field))}"
            for field in self.structural
            if getattr(self.config, field) != getattr(brought, field)
        ]
        words = ["errata", "train", f"editor={self.name}", f"model={name}", *cases, *fields]
        return f"train one: {shlex.join(words)}"


def install(folder: Path, method: str) -> str:
    """Put the network that a training has left in its folder into the cache, unless it is there; returns its digest.

    Raises:
        CheckpointError: there is none in the folder, or it is damaged.
    """
    try:
        entry = TensorCache(folder).load(method)
        if entry is None:
            raise CheckpointError(f"no trained {method} in {folder}; remove the folder, and train again")
        cache, name = TensorCache(_folder(None)), _key(method, entry.meta["structure"], entry.meta["base"])
        with cache.locked([name]):
            there = cache.recovered(name)
            if there is None or there.meta != entry.meta:
                cache.store(name, entry.tensors, entry.meta)
    except DamagedEntryError as error:
        raise CheckpointError(
            f"the trained {method} is damaged: {error}; remove the folder, and train again"
        ) from error
    except StatisticsError as error:
        raise CheckpointError(f"the trained {method} cannot be had: {error}") from error
    return str(entry.meta["checkpoint"])


def available(config: TrainedConfig, method: str, about: Mapping[str, Any]) -> list[str]:
    """Digests of the networks that this configuration could mean: the one in the folder that it names, or those in
    the cache that were saved with these entries of `about`."""
    if config.checkpoint is None:
        found = TensorCache(_folder(None)).described(f"{method}-").values()
        return sorted(meta["checkpoint"] for meta in found if about.items() <= meta.items())
    named = Path(config.checkpoint)
    return (
        sorted(meta["checkpoint"] for meta in TensorCache(named).described(method).values()) if named.is_dir() else []
    )


def _key(method: str, structure: Mapping[str, Any], base: Mapping[str, str]) -> str:
    """Name in the cache: the method, and a digest of its structure and of the model."""
    content = json.dumps([method, structure, base], sort_keys=True)
    return f"{method}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _folder(folder: str | Path | None) -> Path:
    return cache_folder(folder, what="trained")


def _digest(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        add_bytes(total, tensor)
    return total.hexdigest()[:16]
