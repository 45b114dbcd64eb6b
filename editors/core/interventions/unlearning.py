"""Unlearning: training that takes knowledge out of a model, given texts to forget and texts to retain.

What is trained is added to the outputs of linear maps while it is trained, and becomes one entry of the ledger in the
end. Padding is not read: the authors' code of gradient ascent counts it in its loss.

Source: hartvigsen-group/composable-interventions (wmdp/), which follows Li et al., arXiv 2403.03218.

Shapes: b rows of a batch, l their longest, d hidden size.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from errata.editors.core.config import check_least, check_positive
from errata.editors.core.errors import ConfigError, DatasetError, NumericalError
from errata.editors.core.forward.block_calls import hidden_of
from errata.editors.core.interventions.calibration import text_of
from errata.editors.core.interventions.intervention import (
    Intervention,
    InterventionConfig,
    Kind,
    Rows,
    Step,
    maps_of,
    working,
)
from errata.editors.core.ledger.adapter_hooks import check_trains_on_whole_texts
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import StopForward, run_base
from errata.editors.core.model.architecture import Architecture, LinearMap, max_positions
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.texts import read_texts
from errata.editors.core.model.tokens import Batch, Tokenizer, right_padded
from errata.editors.core.moments.collect import token_rows
from errata.editors.core.progress import Progress

FORGET, RETAIN = "forget", "retain"
PAD = 0  # no real token looks at it, and no loss counts it


@dataclass(frozen=True, kw_only=True)
class UnlearningConfig(InterventionConfig):
    """Fields of every unlearning."""

    TEXTS: ClassVar[tuple[str, ...]] = (FORGET, RETAIN)

    forget: str
    """Texts to unlearn: a file, or name:config:split of the hub."""
    retain: str | None = None
    """Texts that stay: as `forget`; null: the model folder's own, or the factbook that comes with errata."""
    n_texts: int = 50
    """Texts of each, at most, the first of the file."""
    tokens: int = 512
    """Tokens of a text, at most as many as the model takes."""
    batch_size: int = 4
    """Texts of one pass."""
    lr: float = 5e-5
    """Learning rate."""

    def __post_init__(self) -> None:
        check_least(self, {"n_texts": 1, "tokens": 2, "batch_size": 1})
        check_positive(self, ("lr",))


class Unlearning(Intervention):
    """Base class: it says which maps are trained, and the loss of a batch of each kind of text."""

    kind: ClassVar[Kind] = "unlearn"
    Config: ClassVar[type[InterventionConfig]] = UnlearningConfig
    accumulate: ClassVar[int] = 1  # batches whose gradients are summed for a step
    decay: ClassVar[float] = 0.0  # of the weights, decoupled from the gradient

    @abstractmethod
    def maps(self, architecture: Architecture) -> list[LinearMap]:
        """Return the maps that are trained.

        Raises:
            ConfigError: The model has not the layers.
        """

    @abstractmethod
    def loss(self, training: TrainedDeltas, forget: Batch, retain: Batch) -> Tensor:
        """Return the loss of a batch."""

    def read(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, Rows]:
        given: UnlearningConfig = self.config
        length = min(given.tokens, max_positions(model) or given.tokens)
        found: dict[str, Rows] = {}
        for role, source in ((FORGET, given.forget), (RETAIN, text_of(model, given.retain))):
            texts = read_texts(source, max_texts=given.n_texts)
            found[role] = [row for row in token_rows(tokenizer, texts, length) if len(row) > 1]
            if not found[role]:
                raise DatasetError(f"expected texts to {role} of at least two tokens in {source}, found none")
        return found

    def steps(self, architecture: Architecture, rows: Mapping[str, Rows], progress: Progress) -> Iterator[Step]:
        check_trains_on_whole_texts(architecture.model, self.name)
        training = TrainedDeltas(architecture, self.maps(architecture), self.config.seed)
        optimiser = torch.optim.Adam(training.deltas, lr=self.config.lr)
        batches = self._batches(rows, architecture)
        for count, (forget, retain) in enumerate(batches, 1):
            safe_point()
            with torch.enable_grad(), training.acting():
                loss = self.loss(training, forget, retain)
                (loss / self.accumulate).backward()
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"{self.name}: the loss is {float(loss)} in batch {count}; lower lr or n_texts")
            if count % self.accumulate == 0 or count == len(batches):
                training.decay(self.config.lr * self.decay)
                optimiser.step()
                optimiser.zero_grad()
            progress(count, len(batches), f"{self.name}, batches")
        yield Step(training.weights())

    def _batches(self, rows: Mapping[str, Rows], architecture: Architecture) -> list[tuple[Batch, Batch]]:
        """Return batches to forget, in the order of their texts, each with one to retain; these begin anew at need."""
        retain = itertools.cycle(self._cut(rows[RETAIN], architecture))
        return list(zip(self._cut(rows[FORGET], architecture), retain, strict=False))

    def _cut(self, rows: Rows, architecture: Architecture) -> list[Batch]:
        size = self.config.batch_size
        groups = (rows[start : start + size] for start in range(0, len(rows), size))
        return [right_padded(group, PAD).to(architecture.device) for group in groups]


class TrainedDeltas:
    """Maps whose outputs have something added that is trained.

    Attributes:
        architecture: The model.
        deltas: What is added to each weight (d_out, d_in), leaf tensors that are 0 at first.
        direction: (d,) a unit vector that the seed draws, of positive numbers.
    """

    def __init__(self, architecture: Architecture, maps: Sequence[LinearMap], seed: int) -> None:
        self.architecture, self._maps, self._is_on = architecture, maps, True
        self.deltas = [torch.zeros_like(working(found.weight)).contiguous().requires_grad_() for found in maps]
        drawn = torch.rand(architecture.d_model, generator=torch.Generator().manual_seed(seed))
        self.direction = (drawn / drawn.norm()).to(self.deltas[0])

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the maps compute with what is added, inside the `with`."""

        def hook(delta: Tensor) -> Any:
            def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return (output + args[0].to(delta) @ delta.T).to(output.dtype) if self._is_on else output

            return add

        pairs = zip(self._maps, self.deltas, strict=True)
        with hooked(*(found.module.register_forward_hook(hook(delta), prepend=True) for found, delta in pairs)):
            yield

    @contextmanager
    def before(self) -> Iterator[None]:
        """Let the maps compute as before the training, without gradients, inside the `with`."""
        self._is_on = False
        try:
            with torch.no_grad():
                yield
        finally:
            self._is_on = True

    def states(self, batch: Batch, layer: int) -> Tensor:
        """Return the outputs (b x l without padding, d) of a block."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(hidden_of(output))
            raise StopForward

        with hooked(self.architecture.block(layer).register_forward_hook(keep)):
            try:
                run_base(self.architecture, batch)
            except StopForward:
                return working(found[0][batch.mask.bool().to(found[0].device)])
        raise AssertionError("the forward ended before the block had run")

    def text_loss(self, batch: Batch) -> Tensor:
        """Return the mean negative log-probability of the texts' next tokens, in nats."""
        hidden = run_base(self.architecture, batch)[:, :-1]
        is_real = batch.mask[:, 1:].bool()
        logits = working(self.architecture.logits(hidden[is_real.to(hidden.device)]))
        return cross_entropy(logits, batch.ids[:, 1:][is_real].to(logits.device))

    @torch.no_grad()
    def decay(self, share: float) -> None:
        """Shrink the weights, with what is added, by a share."""
        if share:
            for found, delta in zip(self._maps, self.deltas, strict=True):
                delta -= share * (working(found.weight) + delta)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Return the weights with what is added, by full parameter name."""
        pairs = zip(self._maps, self.deltas, strict=True)
        return {found.name: working(found.weight) + delta.detach() for found, delta in pairs}


class RMU(Unlearning):
    """Turns a block's states on texts to forget into a fixed random direction, and keeps those on other texts
    (representation misdirection, Li et al., arXiv 2403.03218)."""

    name = "rmu"
    decay = 0.01  # AdamW's own

    @dataclass(frozen=True, kw_only=True)
    class Config(UnlearningConfig):
        n_texts: int = 1000
        """Texts of each, at most, the first of the file."""
        layer: int = 3
        """The block whose states are steered; it is trained with the two below it."""
        strength: float = 20.0
        """Length of the states that texts to forget are to have."""
        alpha: float = 1000.0
        """Weight of the states that are to stay."""
        trains: Literal["down", "attention_out"] = "down"
        """Map that is trained. down: as in the code of RMU; attention_out: as in that of composable interventions,
        whose index of a parameter means another one."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_least(self, {"layer": 0, "alpha": 0})

    def maps(self, architecture: Architecture) -> list[LinearMap]:
        layer = self.config.layer
        if layer >= architecture.n_layers:
            raise ConfigError(f"layer: expected a layer from 0 to {architecture.n_layers - 1}, got {layer}")
        found = []
        for own in range(max(0, layer - 2), layer + 1):
            module = architecture.down(own) if self.config.trains == "down" else architecture.attention_out(own)
            found += [one for one in maps_of(architecture, own) if one.module is module]
        return found

    def loss(self, training: TrainedDeltas, forget: Batch, retain: Batch) -> Tensor:
        layer, target = self.config.layer, self.config.strength * training.direction
        steered = (training.states(forget, layer) - target).square().mean()
        with training.before():
            kept = training.states(retain, layer)
        return steered + self.config.alpha * (training.states(retain, layer) - kept).square().mean()


class GradientAscent(Unlearning):
    """Raises the loss on texts to forget, and looks at nothing else. Blocks of the lower half stay."""

    name = "ga"
    accumulate = 2

    def maps(self, architecture: Architecture) -> list[LinearMap]:
        layers = range(architecture.n_layers // 2, architecture.n_layers)
        return [found for layer in layers for found in maps_of(architecture, layer)]

    def loss(self, training: TrainedDeltas, forget: Batch, retain: Batch) -> Tensor:  # noqa: ARG002
        return -training.text_loss(forget)


class GradientDifference(GradientAscent):
    """Raises the loss on texts to forget, and lowers it on texts to retain."""

    name = "gd"
    accumulate = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(UnlearningConfig):
        n_texts: int = 2000
        """Texts of each, at most, the first of the file."""
        batch_size: int = 2
        """Texts of one pass."""
        alpha: float = 40.0
        """Weight of the loss on texts to retain."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_least(self, {"alpha": 0})

    def loss(self, training: TrainedDeltas, forget: Batch, retain: Batch) -> Tensor:
        return -training.text_loss(forget) + self.config.alpha * training.text_loss(retain)
