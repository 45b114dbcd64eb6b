"""Learn the directions of a behaviour from a contrast set.

    contrasts = read_contrasts("formal", chat=True)
    edit = errata.steer(model, tokenizer, contrasts, "caa", layer=15, strength=2.0)
    with edit.applied():
        ...

`learn_steering` gives the directions. Edits of any strength are made of them without reading the set again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.config import did_you_mean
from errata.editors.core.edit import Edit
from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.compiled import uncompiled
from errata.editors.core.model.tokens import Tokenizer, pad_id
from errata.editors.core.solve.concept_erasure import least_squares_eraser
from errata.editors.core.solve.linear_probes import fit_probes
from errata.editors.core.steering.contrast import Contrast, contrast_digest
from errata.editors.core.steering.heads import SHARE, HeadStates, best_heads, head_accuracy, head_shifts, split
from errata.editors.core.steering.kinds import KINDS
from errata.editors.core.steering.positions import EVERYWHERE, Where
from errata.editors.core.steering.readings import Text, read_states, row_states
from errata.editors.core.steering.steering import Steering
from errata.editors.core.steering.weight_changes import gate

# Rows of gates that Model Surgery moves, as a multiple of the hidden size: 16,384 of Llama-2-7B.
ROWS = 4
# The first token of a row takes up what attention leaves over, and its states are far longer than all others, along any
# direction. A projection would take that away, and break the model. So projections begin behind it.
BEHIND_THE_FIRST = Where("span", start=1)
_PROJECTIONS = ("ace", "leace", "ablate")
_ROUND = 6


def steer(
    model: Any,
    tokenizer: Tokenizer,
    contrasts: Sequence[Contrast],
    kind: str = "caa",
    *,
    strength: float | None = None,
    layer: int | None = None,
    where: Where | None = None,
    read: str = "mean",
    heads: int | None = None,
    rows: int | None = None,
) -> Edit:
    """Return the edit of a behaviour, which is not applied. Arguments and errors as of `learn_steering`.

    Args:
        strength: How strongly it acts, in units of the kind (see steering.py); None: the kind's own.
    """
    learnt = learn_steering(
        model, tokenizer, contrasts, kind, layer=layer, where=where, read=read, heads=heads, rows=rows
    )
    return learnt.edit(strength)


@torch.no_grad()
def learn_steering(
    model: Any,
    tokenizer: Tokenizer,
    contrasts: Sequence[Contrast],
    kind: str = "caa",
    *,
    layer: int | None = None,
    where: Where | None = None,
    read: str = "mean",
    heads: int | None = None,
    rows: int | None = None,
) -> Steering:
    """Learn the directions of a behaviour with the model as it stands. The model is not changed.

    Args:
        model: Any causal decoder of transformers.
        tokenizer: Its fast tokenizer.
        contrasts: What the behaviour is, and what it is not; for `actadd` one contrast without prompt.
        kind: caa, ace, leace, ablate, actadd, iti, surgery or ablate_weights (see steering.py).
        layer: The block whose output (of `actadd`: input) is read and changed; None: the middle one. `ablate` changes
            all blocks, `ablate_weights` all their weights, `iti` and `surgery` choose among all and take none.
        where: The positions; None: the kind's own (all; all but the first of `ace`, `leace` and `ablate`; the last of
            `iti`; the first ones of `actadd`).
        read: The "mean" over a continuation's tokens, or the "last" token. `iti` reads the last one.
        heads: Heads that `iti` changes; None: 4.7 % of all, as in the paper.
        rows: Rows of gates that `surgery` moves; None: four times the hidden size.

    Raises:
        ConfigError: There is no such kind or layer, or an argument does not go with the kind.
        NumericalError: Positives and negatives give the same states, or states are not finite.
        ArchitectureError: The model lacks a part that the kind needs.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: expected {', '.join(KINDS)}, got {kind!r}{did_you_mean(kind, KINDS)}")
    if not contrasts:
        raise ConfigError("expected at least one contrast to learn from, got none")
    lesson = _Lesson(uncompiled(model), tokenizer, contrasts, read)
    for name, value, allowed in (("heads", heads, ("iti",)), ("rows", rows, ("surgery",))):
        if value is not None and kind not in allowed:
            raise ConfigError(f"{name} goes with {allowed[0]}, got it with {kind}")
    if kind != "actadd" and where is not None and where.place == "prefix":
        raise ConfigError(f"positions of a prefix take a row per token, as actadd has them, and not {kind}")
    if kind in ("surgery", "ablate_weights") and where is not None:
        raise ConfigError(f"{kind} changes weights, which act at all positions")
    if kind in ("iti", "surgery"):
        if layer is not None:
            raise ConfigError(f"{kind} chooses among all layers, and takes no layer")
        return lesson.heads(where, heads) if kind == "iti" else lesson.surgery(rows)
    if kind == "actadd":
        return lesson.prompt(lesson.chosen(layer, least=1), where)
    return lesson.direction(kind, lesson.chosen(layer), where)


class _Lesson:
    """A model and a contrast set, to learn from."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, contrasts: Sequence[Contrast], read: str) -> None:
        self.architecture: Architecture = describe(model)
        self.model, self.tokenizer, self.contrasts, self.read = model, tokenizer, contrasts, read
        self.pad = pad_id(tokenizer)
        self.texts: list[tuple[Text, Text]] = [each.rows(tokenizer) for each in contrasts]
        for sides in self.texts:
            for ids, _ in sides:
                self.architecture.check_length(len(ids), f"{len(ids)} positions for a contrast", None)

    def chosen(self, layer: int | None, *, least: int = 0) -> int:
        """Return the layer, the middle one where none is given."""
        count = self.architecture.n_layers
        found = max(least, (count - 1) // 2) if layer is None else layer
        if not least <= found < count:
            more = " (what goes into the first block is the embedding)" if least else ""
            raise ConfigError(f"layer: expected {least} to {count - 1}{more}, got {found}")
        return found

    def block(self, layer: int) -> str:
        return f"{self.architecture.blocks_path}.{layer}"

    def states(self, modules: Sequence[nn.Module], **ways: Any) -> tuple[Tensor, Tensor]:
        """Return what modules give for the positives and for the negatives, (m, n, d) each."""
        flat = [text for sides in self.texts for text in sides]
        given = {"pad": self.pad, "read": self.read, **ways}
        found = read_states(self.architecture, flat, modules, **given)
        if not bool(found.isfinite().all()):
            raise NumericalError("the states of a contrast are NaN or inf; load the model in float32")
        return found[:, 0::2], found[:, 1::2]

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what an edit records."""
        found = {"contrasts": len(self.contrasts), "digest": contrast_digest(self.contrasts)[:16], **more}
        return {name: value for name, value in found.items() if value is not None}

    def direction(self, kind: str, layer: int, where: Where | None) -> Steering:
        name = self.block(layer)
        positives, negatives = (each[0] for each in self.states([self.architecture.block(layer)]))
        r = positives.mean(0) - negatives.mean(0)
        if not float(r.norm()) > 0:
            raise NumericalError("the positives and the negatives have the same mean, so that there is no direction")
        fixed: dict[str, Tensor] = {}
        if kind == "ace":
            fixed = {"centre": negatives.mean(0)}
        elif kind == "leace":
            try:
                eraser = least_squares_eraser(positives, negatives)
            except ValueError as error:
                raise NumericalError(f"{error}; give more contrasts, or another layer") from error
            fixed = {"left": eraser.left, "right": eraser.right, "centre": eraser.mean}
        own = BEHIND_THE_FIRST if kind in _PROJECTIONS else EVERYWHERE
        found = own if where is None else where
        settings = self.settings(layer=layer, read=self.read, **_written(found))
        if kind == "ablate_weights":
            return Steering(self.model, kind, {"": r}, {}, EVERYWHERE, len(r), settings)
        at = [name] if kind != "ablate" else [self.block(each) for each in range(self.architecture.n_layers)]
        return Steering(self.model, kind, dict.fromkeys(at, r), fixed, found, len(r), settings)

    def prompt(self, layer: int, where: Where | None) -> Steering:
        """Activation addition: the difference of two prompts at the input of a block, token by token."""
        (one, *others), d = self.contrasts, self.architecture.d_model
        if others or one.prompt:
            raise ConfigError(
                f"actadd adds the activations of one prompt and subtracts those of another: expected one contrast "
                f"without prompt, got {len(self.contrasts)}"
            )
        plus, minus = self._spaced([ids for ids, _ in self.texts[0]])
        before = self.architecture.block(layer - 1)
        rows = row_states(self.architecture, plus, before) - row_states(self.architecture, minus, before)
        found = Where("prefix") if where is None else where
        if found.place != "prefix":
            raise ConfigError(f"actadd acts at the tokens of a prefix, got positions {found.place!r}")
        settings = self.settings(layer=layer, plus=one.positive, minus=one.negative, **_written(found))
        return Steering(self.model, "actadd", {self.block(layer - 1): rows}, {}, found, d, settings)

    def _spaced(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Return two rows of one length: begin-of-text in front, spaces behind the shorter one."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        space = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
        if begin is None or len(space) != 1:
            raise ConfigError("actadd needs a tokenizer with a begin-of-text token and a token for one space")
        begun = [row if row[:1] == [begin] else [begin, *row] for row in rows]
        longest = max(map(len, begun))
        return [row + space * (longest - len(row)) for row in begun]

    def heads(self, where: Where | None, count: int | None) -> Steering:
        """Inference-time intervention: the heads that tell the behaviour best."""
        outs = [self.architecture.attention_out(layer) for layer in range(self.architecture.n_layers)]
        found = self.states(outs, side="input", read="last")
        number = getattr(self.model.config.get_text_config(decoder=True), "num_attention_heads", 1)  # type: ignore[operator, union-attr]
        split_heads = [each.permute(1, 0, 2).unflatten(-1, (number, -1)) for each in found]
        states = HeadStates(split_heads[0], split_heads[1])
        layers, per_layer, width = states.shape
        total = layers * per_layer
        kept = max(1, round(total * SHARE)) if count is None else count
        if not 1 <= kept <= total or len(self.contrasts) < 2:
            raise ConfigError(
                f"expected 1 to {total} heads and two contrasts or more, got {kept} and {len(self.texts)}"
            )
        accuracy = head_accuracy(states, *split(len(self.contrasts)))
        chosen = best_heads(accuracy, kept)
        shifts = head_shifts(states, chosen)
        names = {layer: _name_of(self.model, outs[layer]) for layer in shifts}
        directions = {names[layer]: shift for layer, shift in shifts.items()}
        least = round(min(float(accuracy[head]) for head in chosen), _ROUND)
        positions = Where("last") if where is None else where
        settings = self.settings(heads=[list(head) for head in chosen], accuracy=least, **_written(positions))
        return Steering(self.model, "iti", directions, {}, positions, width, settings)

    def surgery(self, rows: int | None) -> Steering:
        """Model Surgery: the weights of a probe for the negatives, on the states after the final norm."""
        tail = self.architecture.tail[-1]
        positives, negatives = (each[0] for each in self.states([tail]))
        both = torch.cat([negatives, positives])[None]
        weights, _ = fit_probes(both, torch.arange(both.shape[1]) < len(negatives))
        v = weights[0]
        if not float(v.norm()) > 0:
            raise NumericalError("a probe finds no difference between positives and negatives")
        # The authors add the probe as it was trained, whose length depends on the training. Here it is as long as a row
        # of a gate, so that a strength means the same in every model.
        gates = (gate(self.architecture, layer).weight for layer in range(self.architecture.n_layers))
        length = torch.stack([each.float().norm(dim=1).mean().cpu() for each in gates]).mean()
        v = v / v.norm() * float(length)
        settings = self.settings(rows=rows or ROWS * self.architecture.d_model, read=self.read)
        return Steering(self.model, "surgery", {"": v}, {}, EVERYWHERE, len(v), settings)


def _written(where: Where) -> dict[str, Any]:
    """Return positions that are not all, for the record."""
    return {} if where == EVERYWHERE else {"positions": where.plain}


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)
