"""FT-L and FT-M: fine-tuning of one MLP's down projection, the baselines of most papers.

    minimise  L(W)  over the down projection W,  and for FT-L subject to  max |W - W_0| <= norm_constraint

by Adam, one step per pass. After each step W is clamped to the box around W_0. (The constraint is that of Zhu et al.
2020, "Modifying Memories in Transformer Models"; as a baseline Meng et al. 2022, "Locating and Editing Factual
Associations in GPT", section 3.2 and appendix, FT+L.) The methods differ in L, the mean over requests of:

    FT-L   -1/T sum_t log p(o_t | prompt)                  kmeng01/rome, baselines/ft; "prompt_last" in EasyEdit
    FT-M   -1/T sum_t log p(o_t | prompt, o_1 ... o_t-1)   "target_new" in EasyEdit: cross-entropy, the prompt masked
                                                           (Zhang et al. 2024, "A Comprehensive Study of Knowledge
                                                           Editing for Large Language Models")

FT-L predicts every token of the answer at the prompt's last position. So it cannot learn an answer of several tokens,
and the loss of such an answer cannot reach 0.

Papers and code differ from each other and from this file:

- Meng et al. train FT+L at layer 0 within 5e-4 (GPT-2 XL) or 5e-5 (GPT-J). EasyEdit's files keep that for GPT-2 XL. For
  GPT-J and Llama they train layer 21 without a constraint, but still call it FT-L.
- They select parameters by a part of the name. For GPT-2 and GPT-J this includes the projection's bias; Llama has no
  bias. This file trains only the weight.
- They train in the precision of the weights. This file trains 16-bit weights on a float32 master copy, which the
  forward pass rounds as the edited model will be rounded.

Legend: o_t (T of them) tokens of the answer; W, W_0 (d, d_in) down projection, trained and untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.families.fine_tuning import Trainable, TrainingRow, Tuner, TuningConfig
from errata.editors.core.ledger.patch import Dense, Patch
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TuningConfig):
    """FT-M's fields. Defaults are EasyEdit's for Llama 2 7B and GPT-J, except `batch_size`, which is 1 there."""

    norm_constraint: float | None = None
    """Largest change of any element of a weight; null (`false` in the authors' files): no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("norm_constraint",))


@dataclass(frozen=True, kw_only=True)
class ConstrainedConfig(FineTuneConfig):
    """FT-L's fields. Defaults are those of Meng et al. for GPT-2 XL."""

    norm_constraint: float | None = 5e-4
    """Largest change of any element of a weight (5e-5 for GPT-J); null: no bound."""


# EasyEdit's layer by the model's number of layers: GPT-J, Llama, GPT-2 XL.
EASYEDIT_LAYER: Mapping[int, int] = MappingProxyType({28: 21, 32: 21, 48: 0})


class FTM(Tuner):
    """FT-M: cross-entropy of the answer, on one MLP (Zhang et al. 2024)."""

    name = "ft_m"
    Config = FineTuneConfig
    config: FineTuneConfig

    def default_layers(self) -> Sequence[int]:
        """Return EasyEdit's layer for models of the same depth, else the one at the same height as in Llama.

        EasyEdit's is 21 of 28 (GPT-J), 21 of 32 (Llama) and 0 of 48 (GPT-2 XL).
        """
        count = self.architecture.n_layers
        return (EASYEDIT_LAYER.get(count, round(count * 21 / 32)),)

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the down projections."""
        maps = [self.architecture.map_at(layer) for layer in self.layers]
        self.architecture.check_writable(maps)
        self.architecture.check_trainable(maps)
        return {found.name.removesuffix(".weight"): found.module for found in maps}

    def trainable(self) -> Trainable:
        return _Weights(self.architecture, self.layers, self.config.norm_constraint)


class FTL(FTM):
    """FT-L: the answer predicted at the prompt's end, each change of a weight bounded (Zhu et al. 2020)."""

    name = "ft_l"
    Config = ConstrainedConfig
    config: ConstrainedConfig

    def default_layers(self) -> Sequence[int]:
        """Return the first layer, which Meng et al. found best for GPT-2 XL and GPT-J."""
        return (0,)

    def row(self, request: EditRequest) -> TrainingRow:
        """Return the request as a row: every token of the answer is predicted at the prompt's last position."""
        ids, answer = self.tokens(request)
        return TrainingRow(str(request.id), ids, (len(ids) - 1,) * len(answer), answer)


class _Weights(Trainable):
    """Master copies of down projections, each limited to a box around its original value."""

    def __init__(self, architecture: Architecture, layers: Sequence[int], bound: float | None) -> None:
        names = [architecture.weight_name(layer) for layer in layers]
        self.bound = bound
        self.base = {name: architecture.weight(layer) for name, layer in zip(names, layers, strict=True)}
        self.bias = {name: architecture.down(layer).bias for name, layer in zip(names, layers, strict=True)}
        self.master = {
            name: W.to(working_dtype(W.dtype), copy=True).contiguous().requires_grad_() for name, W in self.base.items()
        }
        self.parameters = list(self.master.values())

    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        W = self.master[f"{name}.weight"].to(x.dtype)
        bias = self.bias[f"{name}.weight"]
        assert bias is None or isinstance(bias, Tensor)
        return linear(x, W, bias)

    def project(self) -> None:
        if self.bound is not None:
            for name, W in self.master.items():
                base = self.base[name].to(W)
                W.clamp_(base - self.bound, base + self.bound)

    def patch(self) -> Patch:
        updates = {}
        for name, W in self.master.items():
            delta = W.detach() - self.base[name].to(W)
            # W_0 + bound was rounded, so that the difference may exceed the bound by a rounding.
            updates[name] = Dense(delta if self.bound is None else delta.clamp_(-self.bound, self.bound))
        return Patch(updates)
