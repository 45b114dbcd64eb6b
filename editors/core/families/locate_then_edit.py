"""Base class of locate-then-edit methods (ROME, MEMIT and others): the fact's position, its keys and target values.

A method of the family says which layers it edits, how it uses the keys and which equation it solves. This file gives it
tokenised rows, contexts, keys, targets and second moments.

Shapes: n requests, d hidden size, d_in width of the keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from errata.editors.core.brakes.pruning import pruning
from errata.editors.core.brakes.sphere import Sphere
from errata.editors.core.config import check_layers
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, DatasetError, NumericalError, RequestError, StatisticsError
from errata.editors.core.families import context_templates as contexts
from errata.editors.core.families.anchored_values import anchor_of, anchored, read_facts, value_norms
from errata.editors.core.families.locate_config import LocateThenEditConfig
from errata.editors.core.families.search_rows import PromptRow, SearchProblem
from errata.editors.core.families.value_search import Target, find_targets
from errata.editors.core.files.matrix_file import MatrixFile, check_symmetric
from errata.editors.core.forward.residual_gain import residual_gains
from errata.editors.core.forward.suffix import Edited, Site
from errata.editors.core.ledger.entry import find_weight
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import last_keys
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.reading import as_read, read_ids
from errata.editors.core.model.texts import FACTBOOK, TextSource
from errata.editors.core.model.tokens import LocatedSubject, Tokenizer, locate_subject, pad_id
from errata.editors.core.moments import second_moments
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import Factor, Inverse, factorise

logger = logging.getLogger(__name__)

ESSENCE = " is a"  # "{subject} is a" is the prompt whose prediction should not change
# The text of the papers' second moments.
PAPERS_TEXT = "wikimedia/wikipedia:20231101.en:train"
OTHER_TEXT = "give text: editor.mom2_dataset=FILE at the command line, mom2_dataset in Python (.txt, .json, .jsonl)"


class LocateThenEdit(Editor):
    """Base class of the family.

    Args:
        moments: Second moments of the keys, {layer: (d_in, d_in)}, if they were computed elsewhere.
        text: The text to collect them from if not: a file, a data set of the Hub or a list of texts; overrides
            `mom2_dataset`.
    """

    Config: ClassVar[type[LocateThenEditConfig]] = LocateThenEditConfig
    needs_subject: ClassVar[bool] = True
    config: LocateThenEditConfig
    settings: LocateThenEditConfig  # `config` with its null fields filled in
    # Advice in errors, if there is no text for second moments, and if a second moment has no inverse.
    text_advice: ClassVar[str] = f"{OTHER_TEXT}, or mom2_adjustment=false to edit without second moments"
    singular_advice: ClassVar[str] = "give more text, or set mom2_adjustment=false, which edits along the bare key"
    # Words that written contexts begin with; if there are none, contexts begin with the token that begins a text.
    context_starts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: LocateThenEditConfig | Mapping[str, Any] | None = None,
        *,
        moments: Mapping[int, Tensor] | None = None,
        text: TextSource | None = None,
        progress: Progress = silent,
    ) -> None:
        self.text = text
        self._moments: dict[int, Tensor] = dict(moments or {})
        self._are_moments_given = bool(moments)
        super().__init__(model, tokenizer, config, progress=progress)

    def setup(self) -> None:
        self._gains: dict[int, float | None] = {}
        self.layers = self._resolve_layers()
        rules = {"layers": self.layers, **self.rules()}
        left_open = {name: value for name, value in rules.items() if getattr(self.config, name) is None}
        self.filled_in = {name: list(v) if isinstance(v, tuple) else v for name, v in left_open.items()}
        self.settings = replace(self.config, **left_open)
        maps = [self.architecture.map_at(layer) for layer in self.layers]
        self.architecture.check_writable(maps)
        self.architecture.check_trainable(maps)
        self.pad = pad_id(self.tokenizer)
        self._factors: dict[int, Factor | Inverse] = {}
        self._sphere = Sphere(self.config.sphere, self.config.sphere_energy)
        self._prefixes: tuple[str, ...] | None = None
        self._anchors: dict[int, float] = {}

    def rules(self) -> dict[str, Any]:
        """Return the values that null fields of the configuration take on this model, besides `layers`.

        The clamp is 4 ||v_0||, as in the authors' code for GPT-2 XL, GPT-J and Llama 3.
        """
        return {"clamp_norm_factor": 4.0}

    def default_layers(self) -> tuple[int, ...]:
        """Return the layers to edit if the configuration names none."""
        raise ConfigError(f"layers: {self.name} has no rule for them; give layers=[...]")

    # --- rows, keys and targets -------------------------------------------------------------------------------------

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The texts before the prompt in each context; the first is "", the bare prompt.

        The untouched model writes them, so that they do not depend on edits.
        """
        if self._prefixes is None:
            self._prefixes = contexts.editor_prefixes(
                self,
                self.config.context_templates,
                self.config.context_template_length_params,
                starts=self.context_starts,
            )
        return self._prefixes

    def locate(self, request: EditRequest, prefix: str) -> LocatedSubject:
        """Tokenise the request's prompt behind a context.

        Returns:
            The ids, with the index of the token to edit as `last`.

        Raises:
            RequestError: The subject cannot be located, or the row is too long for the model.
        """
        start, end = request.subject_span
        try:
            read = as_read(self.tokenizer, prefix + request.text, chat=request.chat)
            before = read.start + len(prefix)
            subject = locate_subject(self.tokenizer, read.text, (start + before, end + before))
        except RequestError as error:
            raise error.of(request.id) from error
        self._check_length(request, len(subject.ids))
        return LocatedSubject(subject.ids, subject.first, self._edit_index(subject))

    def _edit_index(self, subject: LocatedSubject) -> int:
        """Return the index of the token to edit, by `fact_token`."""
        return {
            "subject_last": subject.last,
            "subject_first": subject.first,
            "subject_first_after_last": min(subject.last + 1, len(subject.ids) - 1),
            "last": len(subject.ids) - 1,
        }[self.config.fact_token]

    def problem(self, request: EditRequest, prefixes: Sequence[str] | None = None) -> SearchProblem:
        """Return the rows of the search for the request's value, one per prefix."""
        try:
            _, answer = read_ids(self.tokenizer, request.text, request.target, chat=request.chat, join=request.join)
        except RequestError as error:
            raise error.of(request.id) from error
        rows = []
        for prefix in self.prefixes if prefixes is None else prefixes:
            subject = self.locate(request, prefix)
            # The last token of the answer is only predicted, never read.
            rows.append(PromptRow((*subject.ids, *answer[:-1]), subject.last, tuple(answer)))
        subject = request.given_subject
        essence = locate_subject(self.tokenizer, subject + ESSENCE, (0, len(subject)))
        index = self._edit_index(essence)
        self._check_length(request, max(len(row.ids) for row in rows))
        # As in the authors' code, the essence's prediction is read at the edited token, so that the row ends there.
        return SearchProblem(str(request.id), tuple(rows), PromptRow(tuple(essence.ids[: index + 1]), index))

    def keys(self, requests: Sequence[EditRequest], layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the keys at the edited token of each request in each context: {layer: (n, contexts, d_in)}."""
        rows = []
        for request in requests:
            for prefix in self.prefixes:
                subject = self.locate(request, prefix)
                rows.append(subject.ids[: subject.last + 1])  # the key does not depend on later tokens
        read = last_keys(self.architecture, rows, layers, pad=self.pad, batch_tokens=self.config.batch_tokens)
        return {layer: rearrange(keys, "(n c) d -> n c d", n=len(requests)) for layer, keys in read.items()}

    def targets(self, requests: Sequence[EditRequest], layer: Edited, site: Site) -> list[Target]:
        """Search for the values to write at `layer`, or jointly at several, for all requests together."""
        found = self._found([self.problem(request) for request in requests], layer, site)
        if self.config.nas is None and self.config.nas_facts is None:
            return found
        if not isinstance(layer, int):
            raise ConfigError("nas: expected null, because a norm stands behind the MLP and the value's length is free")
        anchor, (outputs, gain) = self.anchor(layer, site), self._mlp_outputs(requests, found, layer, site)
        return [
            anchored(target, v0, gain, anchor, self.config.nas_beyond, request.id)
            for request, target, v0 in zip(requests, found, outputs, strict=True)
        ]

    def anchor(self, layer: int, site: Site) -> float:
        """Return NAS's norm: the configured one, or that of the facts in `nas_facts` on the untouched model."""
        if self.config.nas is not None:
            return self.config.nas
        if layer not in self._anchors:
            assert self.config.nas_facts is not None
            facts = read_facts(self.config.nas_facts)
            with self.clock.one_off("anchor"), self.ledger.untouched():
                norms = self.anchor_norms(facts, layer, site)
            self._anchors[layer] = anchor_of(norms)
            logger.info("layer %d: the mean norm of the values of %d facts is %.4g", layer, len(facts), norms.mean())
        return self._anchors[layer]

    def anchor_norms(self, facts: Sequence[EditRequest], layer: int, site: Site) -> Tensor:
        """Return the norms (n,) of the values of facts on the model as it stands, found with the bare prompt alone."""
        found = self._found([self.problem(fact, [""]) for fact in facts], layer, site)
        return value_norms(found, *self._mlp_outputs(facts, found, layer, site))

    def _mlp_outputs(
        self, requests: Sequence[EditRequest], found: Sequence[Target], layer: int, site: Site
    ) -> tuple[Tensor, float]:
        """Return what the MLP gives (n, d) at the edited token of the bare prompts, and what its block makes of it."""
        if site == "mlp":
            return torch.stack([target.initial for target in found]), 1.0
        located = [self.locate(request, "") for request in requests]
        rows = [subject.ids[: subject.last + 1] for subject in located]
        keys = last_keys(self.architecture, rows, [layer], pad=self.pad, batch_tokens=self.config.batch_tokens)[layer]
        (gain,) = self.gains_at([layer])
        with torch.no_grad():
            return self.architecture.down(layer)(keys), 1.0 if gain is None else gain

    def _found(self, problems: Sequence[SearchProblem], layer: Edited, site: Site) -> list[Target]:
        last = self.architecture.n_layers - 1
        relative = self.config.v_relative
        if relative is None:
            relative = site != "block" and None in self.gains_at([layer] if isinstance(layer, int) else layer)
        with self.clock.phase("values"):
            return find_targets(
                self.architecture,
                problems,
                self.settings.objective,
                layer=layer,
                loss_layer=last if self.config.v_loss_layer is None else self.config.v_loss_layer,
                site=site,
                pad=self.pad,
                batch_tokens=self.config.batch_tokens,
                relative=relative,
                progress=self.progress,
            )

    def gains_at(self, layers: Sequence[int]) -> list[float | None]:
        """Return what the block of each layer multiplies its MLP's output by; None where a norm stands behind it."""
        untried = [layer for layer in layers if layer not in self._gains]
        if untried:
            with self.ledger.untouched():
                self._gains |= residual_gains(self.architecture, untried)
        return [self._gains[layer] for layer in layers]

    @property
    def closes(self) -> bool:
        """Whether PRUNE is asked for."""
        return self.config.prune is not None

    def closing(self, patches: Sequence[Patch]) -> Patch | None:
        """Return what PRUNE adds once these edits are made; None without it, or where there is nothing to add."""
        if self.config.prune is None:
            return None
        updates = {}
        for name in dict.fromkeys(name for patch in patches for name in patch.updates):
            weight = find_weight(self.model, name)
            if len(weight.shape) != 2:  # of a difference of two models; it has no singular values
                continue
            base = self.ledger.base(name)
            changes = [patch.updates[name] for patch in patches if name in patch.updates]
            update = pruning(changes, base.T if weight.transposed else base, self.config.prune)
            if update is not None:
                updates[weight.name] = update
        return Patch(updates) if updates else None

    def braked(self, patch: Patch) -> Patch:
        """Return a patch of factors after SPHERE, if it is asked for. RECT acts later, as `sparsify` does."""
        return Patch({name: self._sphere.act(self.model, name, update) for name, update in patch.updates.items()})

    # --- second moments ---------------------------------------------------------------------------------------------

    def factor(self, layer: int) -> Factor | Inverse | None:
        """Return the factor of the layer's second moment, or None if the configuration edits without second moments."""
        if not self.config.mom2_adjustment:
            return None
        if layer not in self._factors:
            dtype, moment = getattr(torch, self.config.mom2_dtype), self.moment(layer)
            with self.clock.one_off("factors"):
                self._factors[layer] = factorise(moment, dtype, f"of layer {layer}", self.singular_advice)
        return self._factors[layer]

    def moment(self, layer: int) -> Tensor:
        """Return E[k k^T] (d_in, d_in) over the untouched model's keys on a text.

        It is the matrix given by the caller, or comes from a file, from the cache, or from a pass over the text now,
        which collects all layers of the method.

        Raises:
            StatisticsError: There is no text; or what was given has another shape, is not symmetric or lacks this
                layer.
        """
        if layer not in self._moments:
            with self.clock.one_off("moments"):
                if self.config.mom2_file is not None:
                    self._moments[layer] = MatrixFile.open(self.config.mom2_file, "moments").matrix(layer)
                else:
                    self._moments.update(self._collect_moments(layer))
        moment, width = self._moments[layer], self.architecture.map_at(layer).shape[1]
        if tuple(moment.shape) != (width, width):
            raise StatisticsError(
                f"layer {layer}: expected a second moment ({width}, {width}), got {tuple(moment.shape)}; compute it on "
                "this model"
            )
        check_symmetric(moment, f"layer {layer}: the second moment")
        return moment.to(self.architecture.weight(layer).device)

    def has_moment(self, layer: int) -> bool:
        """Return whether `moment(layer)` is given or can be collected from a text that someone chose or the Hub has."""
        if not self.config.mom2_adjustment or layer in self._moments:
            return True
        if self.config.mom2_file is not None:
            return layer in MatrixFile.open(self.config.mom2_file, "moments").layers
        return self.text is not None or self.config.mom2_dataset is not None or not self._are_moments_given

    def _collect_moments(self, layer: int) -> dict[int, Tensor]:
        source = text_for_moments(self.config, self.model) if self.text is None else self.text
        if (name := source if isinstance(source, str) else "") == PAPERS_TEXT:  # == of an array is an array
            logger.warning("second moments are collected from %s, which takes hours; %s", PAPERS_TEXT, self.text_advice)
        with self.ledger.untouched(), self._explain_missing_text(name):
            moments = second_moments.second_moments(
                self.model,
                self.tokenizer,
                sorted({*self.layers, layer} - self._moments.keys()),
                source,
                max_texts=self.config.mom2_n_samples,
                progress=self.progress,
            )
        if name == FACTBOOK and self.config.mom2_dataset is None:
            self._name_bundled_text(moments.tokens)
        return moments.matrices

    def _name_bundled_text(self, tokens: int) -> None:
        """Say which text was read, since the user has chosen none."""
        width = self.architecture.d_mlp
        logger.warning(
            "second moments are of the text that comes with errata (factbook): %s tokens, %.0f for each of the %s "
            "dimensions of a key; for another, %s; the papers' is mom2_dataset=%s, which takes hours",
            f"{tokens:,}",
            tokens / width,
            f"{width:,}",
            OTHER_TEXT,
            PAPERS_TEXT,
        )

    @contextmanager
    def _explain_missing_text(self, name: str) -> Iterator[None]:
        """Add advice to an error about the papers' text, since the user has not chosen it."""
        try:
            yield
        except DatasetError as error:
            if name != PAPERS_TEXT:
                raise
            raise StatisticsError(f"second moments need text, and {error}; {self.text_advice}") from error

    # --- checks -----------------------------------------------------------------------------------------------------

    def _resolve_layers(self) -> tuple[int, ...]:
        count = self.architecture.n_layers
        layers = check_layers(self.config.layers if self.config.layers is not None else self.default_layers(), count)
        loss = self.config.v_loss_layer
        if loss is not None and not layers[-1] <= loss < count:
            raise ConfigError(f"v_loss_layer: expected a layer from {layers[-1]} to {count - 1}, got {loss}")
        return layers

    def _check_length(self, request: EditRequest, length: int) -> None:
        self.architecture.check_length(length, f"{length} tokens with its contexts", request.id)


@contextmanager
def name_request_in_errors(requests: Sequence[EditRequest]) -> Iterator[None]:
    """Context manager that adds the request's id to a solver's error, if the error knows which row is at fault."""
    try:
        yield
    except NumericalError as error:
        if error.row is None:
            raise
        raise error.of(requests[error.row].id) from error


def text_for_moments(config: LocateThenEditConfig, model: Any) -> str | Path:
    """Return the text that second moments are collected from if the caller hands none in.

    Args:
        config: The method's configuration.
        model: The model, or its folder.
    """
    named = config.mom2_dataset or read_model_settings(model).text
    return named or FACTBOOK
