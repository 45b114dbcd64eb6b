"""The interface of every intervention: a model in, a changed model out, with a handle that undoes the change.

    pruned = Wanda({"sparsity": 0.5}).apply(model, tokenizer)
    edit = editor.apply(request)        # on the pruned model
    pruned.project()                    # what the edit wrote into pruned elements is 0 again
    ...
    pruned.undo()                       # bit for bit as before, when what came after it is undone first

An intervention writes to the ledger as edits do, as one entry per step, so that everything that asks for the untouched
model gets it. The entries hold a matrix of each weight's size, and the ledger keeps the weight's base bytes: a
compressed model takes three times its memory, until `ledger.rebase()` forgets how it came about.

An edit below a compression can be undone, too. But the compression was computed with it, so that what is left is
neither the compressed nor the untouched model: undo the compression first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from errata.editors.core.config import build
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError, LedgerError, NumericalError
from errata.editors.core.interventions.kept import PLAIN_BITS, Kept
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import EditInfo, find_weight
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, Patch
from errata.editors.core.model.activations import without_autocast
from errata.editors.core.model.architecture import Architecture, LinearMap, describe
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.model.texts import text_file
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent

Kind = Literal["compress", "unlearn"]
Rows = Sequence[Sequence[int]]
"""Token ids of texts."""


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Fields that every intervention has."""

    # Fields that name a text: a file or a dataset of the Hub.
    TEXTS: ClassVar[tuple[str, ...]] = ()

    seed: int = 0
    """Of every random choice."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str = "") -> Self:
        """Return the configuration of plain values.

        Args:
            values: By field.
            path: What stands before a field's name where an error names it, such as "compress.".

        Raises:
            ConfigError: A field is unknown, missing, of another type or out of range; names it.
        """
        try:
            return build(cls, values, path)
        except ConfigError as error:
            # The checks of a class know its fields, and not what was typed before them.
            if str(error).partition(":")[0] in {entry.name for entry in fields(cls)}:
                raise ConfigError(f"{path}{error}") from error
            raise

    def check_files(self, *, path: str = "") -> None:
        """Refuse a text whose file is missing, before anything is loaded.

        Args:
            path: As of `from_dict`.

        Raises:
            ConfigError: It names the field and the file.
        """
        for name in self.TEXTS:
            file = text_file(getattr(self, name))
            if file is not None and not file.is_file():
                raise ConfigError(f"{path}{name}: {file} does not exist")


@dataclass(frozen=True)
class Step:
    """New weights (d_out, d_in) by full parameter name, and what is fixed of them."""

    weights: Mapping[str, Tensor]
    kept: Mapping[str, Kept] = field(default_factory=dict)


class Intervention(ABC):
    """Base class of the interventions. One has a `name`, a `kind`, a `Config`, `read` and `steps`.

    Another package registers a subclass under the entry points of `errata.interventions`, with its own name.

    Args:
        config: The configuration, or plain values of its fields.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    Config: ClassVar[type[InterventionConfig]] = InterventionConfig

    def __init__(self, config: InterventionConfig | Mapping[str, Any] | None = None) -> None:
        if config is None or isinstance(config, Mapping):
            config = self.Config.from_dict(config or {})
        if not isinstance(config, self.Config):
            own = f"{type(self).__name__}.Config(...)"
            raise ConfigError(f"expected {own} or a mapping of its fields, got {type(config).__name__}")
        self.config: Any = config

    @abstractmethod
    def read(self, model: nn.Module, tokenizer: Tokenizer) -> Mapping[str, Rows]:
        """Return the texts that it needs as rows of token ids, by what they are for.

        Raises:
            ConfigError: A text is missing.
            DatasetError: A text cannot be read.
        """

    @abstractmethod
    def steps(self, architecture: Architecture, rows: Mapping[str, Rows], progress: Progress) -> Iterator[Step]:
        """Yield new weights. Each step is on the model before the next one is asked for.

        Called with the model in evaluation mode, no parameter asking for gradients, and gradients off.

        Args:
            architecture: The model as it stands.
            rows: What `read` gives.
            progress: Called after every step.
        """

    def apply(self, model: nn.Module, tokenizer: Tokenizer, *, progress: Progress = silent) -> Applied:
        """Change the model, which stays so until the change is undone. After an error the model is as before.

        Raises:
            ConfigError, DatasetError: As `read`.
            ArchitectureError: The model's blocks or weights are not what it needs.
            NumericalError: A weight has no finite result.
        """
        return self.apply_rows(model, self.read(model, tokenizer), progress=progress)

    def apply_rows(self, model: nn.Module, rows: Mapping[str, Rows], *, progress: Progress = silent) -> Applied:
        """Change the model with texts that are rows of token ids already; errors as `apply`."""
        ids: list[str] = []
        kept: dict[str, Kept] = {}
        names: list[str] = []
        architecture, ledger = describe(model), Ledger.of(model)
        with ledger.transaction(), ExitStack() as stack:
            for context in (evaluating(model), frozen(model), torch.inference_mode(False), torch.no_grad()):
                stack.enter_context(context)
            stack.enter_context(without_autocast())
            try:
                for step in self.steps(architecture, rows, progress):
                    safe_point()
                    ids.append(_append(ledger, self.name, step.weights))
                    kept |= step.kept
                    names += step.weights
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise NumericalError(f"{self.name}: {error}; give more damping or more text") from error
        return Applied(self.name, model, tuple(ids), kept, tuple(dict.fromkeys(names)))


@dataclass(eq=False)
class Applied:
    """An intervention on a model.

    Attributes:
        name: Of the intervention.
        model: The model.
        ids: Its entries in the model's ledger, in their order.
        kept: What is fixed of each weight, by full parameter name; empty of an intervention that fixes nothing.
        names: The weights that it has written.
    """

    name: str
    model: nn.Module = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)
    kept: Mapping[str, Kept] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    @property
    def is_applied(self) -> bool:
        """Whether the model carries it now."""
        return bool(self.ids) and all(id_ in Ledger.of(self.model) for id_ in self.ids)

    def undo(self) -> None:
        """Undo the change.

        Raises:
            LedgerError: The model does not carry it.
        """
        if not self.is_applied:
            raise LedgerError(f"{self.name} is not applied, so there is nothing to undo")
        Ledger.of(self.model).remove_many(self.ids)

    def project(self) -> Applied:
        """Put the weights back where the compression allows them: pruned elements become 0, others lie on its grid.

        Returns:
            The projection, as an intervention of its own. Weights that are where they must be are left alone.

        Raises:
            LedgerError: The intervention fixes nothing.
        """
        if not self.kept:
            raise LedgerError(f"{self.name} fixes no weights, so there is nothing to put back")
        ledger, ids, names = Ledger.of(self.model), [], []
        with ledger.transaction():
            for name, kept in self.kept.items():
                weight = present(ledger, name)
                if not kept.holds(weight):
                    ids.append(_append(ledger, f"{self.name}-kept", {name: kept.project(weight)}))
                    names.append(name)
        return Applied(f"{self.name}-kept", self.model, tuple(ids), self.kept, tuple(names))

    def average_bits(self) -> float:
        """Return the average bits of an element of the blocks' linear maps, as the model stands.

        A weight that is where the compression allows it counts what the compression makes of it, any other 16 bits.
        """
        ledger, architecture, total, count = Ledger.of(self.model), describe(self.model), 0.0, 0
        for found in maps_of(architecture):
            kept = self.kept.get(found.name)
            is_kept = kept is not None and kept.holds(present(ledger, found.name))
            total += found.weight.numel() * (kept.bits() if kept is not None and is_kept else PLAIN_BITS)
            count += found.weight.numel()
        return total / count


def maps_of(architecture: Architecture, layer: int | None = None) -> list[LinearMap]:
    """Return the linear maps of a block; None: of all blocks, the lowest first.

    Raises:
        ArchitectureError: One is quantised or sharded.
    """
    layers = range(architecture.n_layers) if layer is None else (layer,)
    maps = [LinearMap(f"{name}.weight", m) for i in layers for name, m in architecture.linears(i).items()]
    architecture.check_writable(maps)
    return maps


def present(ledger: Ledger, name: str) -> Tensor:
    """Return a weight (d_out, d_in) as it stands, in the precision that the ledger sums in. It may be no copy."""
    weight = find_weight(ledger.model, name)
    parameter = weight.parameter.detach()
    if arithmetic.FOLD_DTYPES[parameter.dtype] != parameter.dtype:
        # The sum of a 16-bit weight has more digits than the weight: an element can only be set to 0 by all of them.
        parameter = arithmetic.start_sum(ledger.base(name))
        for entry in ledger.entries:
            if (update := entry.patch.updates.get(name)) is not None:
                arithmetic.add_update(parameter, update, transposed=weight.transposed)
    return parameter.T if weight.transposed else parameter


def _append(ledger: Ledger, name: str, weights: Mapping[str, Tensor]) -> str:
    """Make the weights what they are to be, as one entry, and return its id."""
    count = len(ledger)
    while (id_ := f"{name}-{count}") in ledger:
        count += 1
    updates = {}
    for weight, new in weights.items():
        now = present(ledger, weight)
        updates[weight] = Dense(new.to(now.dtype) - now)
    ledger.append(id_, Patch(updates), EditInfo(name))
    return id_


def working(weight: Tensor) -> Tensor:
    """Return a weight in the precision that compressions compute in."""
    return weight.to(working_dtype(weight.dtype))
