"""Base class of methods with a network that is trained before it edits, and the interface of their training loop.

A method subclasses `TrainedEditor` and writes `build` (a new network), `loss` (of a batch of examples) and `solve`. The
training loop decides on cases, length and stopping (benchmarks/training). A trained network is saved as a folder of
safetensors and JSON with the fingerprint of its model, and is refused on any other model.
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
    """Folder of the trained network, as `errata train` writes it; null: the one in the cache that was last trained for
    this model and these settings."""

    lr: float = 1e-6
    """Learning rate of Adam in training."""

    accumulate_bs: int = 10
    """Number of edits that a training step averages over."""

    edit_bs: int = 1
    """Number of requests per edit in training."""

    grad_clip: float = 100.0
    """Largest norm of a training step's gradient, which is scaled down to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("lr", "accumulate_bs", "edit_bs", "grad_clip"))


@dataclass(frozen=True)
class TrainingExample:
    """One request to learn from.

    Attributes:
        request: The request.
        answer_rows: Rows whose answers the edited model should give.
        locality_rows: Rows on which the edited model should predict as before.
    """

    request: EditRequest
    answer_rows: tuple[AnsweredRow, ...]
    locality_rows: tuple[KeptRow, ...]


class TrainedEditor(Editor):
    """Base class of methods with a trained network.

    Args:
        trained: Whether to load a trained network. False: make a new one by `config.seed`, for training to begin with.

    Attributes:
        network: The network.
        checkpoint: Digest of the trained network; None for a new one.

    Raises:
        CheckpointError: No network was trained for this model and these settings, or it is damaged. The error names the
            command that trains one.
    """

    Config: ClassVar[type[TrainedConfig]] = TrainedConfig
    config: TrainedConfig
    # The fields of the configuration that determine the network's shape.
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
        entry = self._load_named() if self._load_trained and self.config.checkpoint is not None else None
        self.prepare()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.network = self.build(generator).to(self.architecture.device).eval()
        if self._load_trained:
            self.load(entry or self._load_cached())

    @abstractmethod
    def prepare(self) -> None:
        """Find the parts of the model that are edited, and check the configuration against them."""

    @abstractmethod
    def build(self, generator: torch.Generator) -> nn.Module:
        """Return a new network."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """Return the values of the `structural` fields, with values of this model in place of null."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters to train, as groups for torch.optim."""

    @abstractmethod
    def loss(self, edits: Sequence[Sequence[TrainingExample]]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean training loss of some edits, each of one or several requests, and its parts by name."""

    def backward(self, edits: Sequence[Sequence[TrainingExample]], at_once: int) -> dict[str, float]:
        """Add the gradient of the mean training loss of some edits to that of the parameters.

        Args:
            edits: The edits of one training step.
            at_once: Edits whose passes are in memory together.

        Returns:
            The parts of the loss by name.
        """
        losses: dict[str, float] = {}
        for start in range(0, len(edits), at_once):
            part = edits[start : start + at_once]
            share = len(part) / len(edits)
            loss, parts = self.loss(part)
            (loss * share).backward()
            for name, value in parts.items():
                losses[name] = losses.get(name, 0.0) + share * value
        return losses

    # --- saving and loading the network -----------------------------------------------------------------------------

    def save(self, folder: str | Path | None = None, about: Mapping[str, Any] | None = None) -> str:
        """Write the network, completely or not at all.

        Args:
            folder: The folder; None: the cache, where this method is searched for on this model.
            about: Additional metadata that JSON can hold.

        Returns:
            The digest of the network.
        """
        name = self.name if folder is not None else _key(self.name, self.structure(), self._base())
        cache = TensorCache(_folder(folder))
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.network.state_dict().items()}
        self.checkpoint = _digest(self.structure(), tensors)
        meta = {"method": self.name, "structure": self.structure(), "base": self._base(), **(about or {})}
        with cache.lock([name]):
            cache.store(name, tensors, {**meta, "checkpoint": self.checkpoint})
        return self.checkpoint

    def load(self, entry: CachedTensors) -> Self:
        """Load a saved network.

        Raises:
            CheckpointError: It has another structure, or was trained for another model; it says what differs.
        """
        self._check_base(entry)
        if entry.meta["structure"] != json.loads(json.dumps(self.structure())):  # tuples are lists in JSON
            raise CheckpointError(
                f"this {self.name} was trained as {entry.meta['structure']}, not {self.structure()}; change these "
                f"fields, or {self._advice()}"
            )
        try:
            self.network.load_state_dict(entry.tensors)
        except RuntimeError as error:
            raise CheckpointError(f"the trained {self.name} does not fit: {error}; {self._advice()}") from error
        self.checkpoint = _digest(self.structure(), entry.tensors)
        return self

    def _load_named(self) -> CachedTensors:
        """Read the network in the folder that the configuration names, and copy its structure to the configuration."""
        folder = Path(str(self.config.checkpoint))
        entry = self._read(folder, self.name) if folder.is_dir() else None
        if entry is None:
            raise CheckpointError(f"checkpoint: no trained {self.name} in {str(folder)!r}; {self._advice()}")
        self._check_base(entry)
        default = self.Config()
        merged = self.Config.from_dict({**self.config.to_dict(), **entry.meta["structure"]})
        # A field that the user has left at its default is filled in; one that contradicts the network is refused.
        for name in self.structural:
            given, stored = getattr(self.config, name), getattr(merged, name)
            if given not in (stored, getattr(default, name)):
                raise CheckpointError(f"{name}: the {self.name} in {folder} was trained with {stored!r}, not {given!r}")
        self.config = merged
        return entry

    def _load_cached(self) -> CachedTensors:
        """Read the network in the cache for this model and these settings."""
        entry = self._read(_folder(None), _key(self.name, self.structure(), self._base()))
        if entry is None:
            raise CheckpointError(
                f"{self.name} has to be trained before it edits, and no training for this model and these settings is "
                f"in {_folder(None)}; {self._advice()}, or name a folder by editor.checkpoint=FOLDER"
            )
        return entry

    def _read(self, folder: Path, name: str) -> CachedTensors | None:
        try:
            return TensorCache(folder).load(name, _fault)
        except DamagedEntryError as error:
            raise CheckpointError(f"the trained {self.name} is damaged: {error}; {self._advice()}") from error
        except StatisticsError as error:
            raise CheckpointError(f"the trained {self.name} cannot be read: {error}") from error

    def _check_base(self, entry: CachedTensors) -> None:
        base = self._base()
        if differing := [name for name, value in base.items() if entry.meta["base"].get(name) != value]:
            raise CheckpointError(
                f"this {self.name} was trained for another model: {', '.join(differing)} "
                f"differ{'s' if differing[1:] == [] else ''}; {self._advice()}"
            )

    def _base(self) -> dict[str, str]:
        """Return the model's fingerprint. It is computed once, since edits do not change it."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model, self.tokenizer)
        return self._fingerprint

    def _advice(self) -> str:
        """Return the command that trains the missing network."""
        name = getattr(self.model, LOADED_AS, None) or getattr(self.model, "name_or_path", "") or "FOLDER_OR_ID"
        return f"train one: {training_command(type(self), self.config, name, self.model)}"


def training_command(method: type[TrainedEditor], config: TrainedConfig, model: str, source: Any) -> str:
    """Return the command that trains a network.

    Args:
        method: The method.
        config: Its configuration.
        model: The model's name at the command line.
        source: The model, or its folder, as `read_model_settings` takes it.
    """
    settings = read_model_settings(source).editors
    folder = Path(source if isinstance(source, str | Path) else getattr(source, "name_or_path", ""))
    # A testbed has its facts beside the model, and training uses its cases by default.
    cases = [] if (folder / "facts.json").is_file() else ["dataset=counterfact", "dataset.path=FILE"]
    defaults = method.Config.from_dict(settings.get(method.name, {}))
    fields = [
        f"editor.{field}={json.dumps(getattr(config, field))}"
        for field in method.structural
        if getattr(config, field) != getattr(defaults, field)
    ]
    return shlex.join(["errata", "train", f"editor={method.name}", f"model={model}", *cases, *fields])


def install(folder: Path, method: str) -> str:
    """Copy the network from a training's folder to the cache, unless it is there.

    Returns:
        The digest of the network.

    Raises:
        CheckpointError: There is none in the folder, or it is damaged.
    """
    try:
        entry = TensorCache(folder).load(method, _fault)
        if entry is None:
            raise CheckpointError(f"no trained {method} in {folder}; remove the folder, and train again")
        cache, name = TensorCache(_folder(None)), _key(method, entry.meta["structure"], entry.meta["base"])
        if _has(cache, name, entry):  # without the lock, which in another user's cache cannot be taken
            return str(entry.meta["checkpoint"])
        with cache.lock([name]):
            cached = cache.recover(name)
            if cached is None or cached.meta != entry.meta:
                cache.store(name, entry.tensors, entry.meta)
    except DamagedEntryError as error:
        raise CheckpointError(
            f"the trained {method} is damaged: {error}; remove the folder, and train again"
        ) from error
    except StatisticsError as error:
        raise CheckpointError(f"the trained {method} cannot be read: {error}") from error
    return str(entry.meta["checkpoint"])


def available_checkpoints(config: TrainedConfig, method: str, about: Mapping[str, Any]) -> list[str]:
    """Return the digests of the networks that a configuration may refer to.

    These are the one in the folder that it names, or those in the cache whose metadata contain `about`.
    """
    if config.checkpoint is None:
        metas = TensorCache(_folder(None)).describe(f"{method}-").values()
        return sorted(meta["checkpoint"] for meta in metas if about.items() <= meta.items())
    named = Path(config.checkpoint)
    if not named.is_dir():  # a TensorCache would make the folder
        return []
    return sorted(meta["checkpoint"] for meta in TensorCache(named).describe(method).values())


def _has(cache: TensorCache, name: str, entry: CachedTensors) -> bool:
    """Return whether a cache holds this network already, undamaged."""
    try:
        cached = cache.load(name, _fault)
    except StatisticsError:
        return False
    return cached is not None and cached.meta == entry.meta


def _fault(entry: CachedTensors) -> str | None:
    """Return why an entry is no trained network, or None."""
    kinds = {"structure": dict, "base": dict, "checkpoint": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(entry.meta.get(name), kind)]
    return f"does not say its {wrong[0]}" if wrong else None


def _key(method: str, structure: Mapping[str, Any], base: Mapping[str, str]) -> str:
    """Return the name in the cache: the method, and a digest of its structure and of the model."""
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
