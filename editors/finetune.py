"""FT-L, FT-M and LocFT-BF: fine-tuning of one MLP's down projection, the baselines of most papers.

    minimise  L(W)  over the down projection W,  and for FT-L subject to  max |W - W_0| <= norm_constraint

by Adam, one step per pass. After each step W is clamped to the box around W_0. (The constraint is that of Zhu et al.
2020, "Modifying Memories in Transformer Models"; as a baseline Meng et al. 2022, "Locating and Editing Factual
Associations in GPT", section 3.2 and appendix, FT+L.) The methods differ in L, the mean over requests of:

    FT-L   -1/T sum_t log p(o_t | prompt)                  kmeng01/rome, baselines/ft; "prompt_last" in EasyEdit
    FT-M   -1/T sum_t log p(o_t | prompt, o_1 ... o_t-1)   "target_new" in EasyEdit: cross-entropy, the prompt masked
                                                           (Zhang et al. 2024, "A Comprehensive Study of Knowledge
                                                           Editing for Large Language Models")

    LocFT  as FT-M, with the end-of-text token as the last token of every answer; no bound. Every pass shuffles the
           requests and takes a step per `batch_size` of them ("breadth first", Yang et al. 2026, "Fine-tuning Done
           Right in Model Editing")

FT-L predicts every token of the answer at the prompt's last position. So it cannot learn an answer of several tokens,
and the loss of such an answer cannot reach 0.

Papers and code differ from each other and from this file:

- Meng et al. train FT+L at layer 0 within 5e-4 (GPT-2 XL) or 5e-5 (GPT-J). EasyEdit's files keep that for GPT-2 XL. For
  GPT-J and Llama they train layer 21 without a constraint, but still call it FT-L.
- Their rate and bound have the unit of a weight, 5e-4, and models differ in it. Here FT-L and FT-M follow the reach
  L / ||g||_1: if every element of W moved down its gradient that far, a linear loss L would be 0. It is Polyak's step
  for descent by signs, which is what Adam's first step is. FT-M's rate is an eighth of it. FT-L's bound is all of it.
  The median reach of FT-M, of 12 facts each, was 0.024 on the testbed's model, 0.023 on that of Gemma 3's shape and
  0.0043 on SmolLM2-135M-Instruct. An eighth is 3.0e-3, 2.8e-3 and 5.4e-4. On the first of them 3e-3 had been chosen
  by trials, and 5e-4 is published. For FT-L, whose layer is the first, it was 0.0082, 0.027 and 0.0013.
- They select parameters by a part of the name. For GPT-2 and GPT-J this includes the projection's bias; Llama has no
  bias. This file trains only the weight.
- LocFT's code also selects parameters by a part of the name: its "model.layers.2" is layers 2 and 20 to 29 together. It
  adds a token to pad with, whose random embedding then has a share in every probability. Its padding on the left
  shifts the positions of GPT-2. This file pads without a trace. For Mistral it trains a whole block, norms included;
  `module=block` trains all linear maps of the block.
- LocFT is meant for batches (`protocol=batch`, or a large `batch_size`). One request at a time it is FT-M, which its
  paper calls depth first and shows to fail.
- They train in the precision of the weights. This file trains 16-bit weights on a float32 master copy, which the
  forward pass rounds as the edited model will be rounded.

The update of a trained map is as large as the map: 235 MB in float32 for a matrix of 14336 x 4096. `patch_bytes` of the
report says how much it is.

Legend: o_t (T of them) tokens of the answer; W, W_0 (d, d_in) down projection, trained and untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.fine_tuning import Tuner
from errata.editors.core.families.joint_training import TuningConfig
from errata.editors.core.families.trainables import Trainable, TrainingRow
from errata.editors.core.ledger.patch import Dense, Patch
from errata.editors.core.model.architecture import LinearMap
from errata.editors.core.request import EditRequest

PUBLISHED_RATE, PUBLISHED_BOUND = 5e-4, 5e-4
# Adam's first step moves every element of W by the rate. This many steps would bring a linear loss to 0.
STEPS = 8
Bound = float | Literal["rule"] | None


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TuningConfig):
    """FT-M's fields. Defaults are EasyEdit's for Llama 2 7B and GPT-J, except `batch_size`, which is 1 there, and the
    rate, which follows from the first gradient."""

    ADDED = MappingProxyType({**TuningConfig.ADDED, "as_published": False})

    as_published: bool = False
    """Whether a rate of null and a bound of "rule" take the numbers of the authors' code, 5e-4 each."""

    lr: float | None = None
    """Learning rate of Adam. null: an eighth of L / ||g||_1, the loss over the sum of its gradient's absolute values at
    the first step, so that a loss as steep as there would be 0 after eight steps."""

    norm_constraint: Bound = None
    """Largest change of any element of a weight; "rule": L / ||g||_1, at which a loss as steep as at the first step
    would be 0; null (`false` in the authors' files): no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_constraint != "rule":
            check_positive(self, ("norm_constraint",))

    @property
    def rate(self) -> float | None:
        """The learning rate, or None if it follows from the first gradient."""
        return PUBLISHED_RATE if self.lr is None and self.as_published else self.lr

    @property
    def bound(self) -> Bound:
        """The bound, or "rule" if it follows from the first gradient."""
        return PUBLISHED_BOUND if self.norm_constraint == "rule" and self.as_published else self.norm_constraint


@dataclass(frozen=True, kw_only=True)
class ConstrainedConfig(FineTuneConfig):
    """FT-L's fields. Defaults are those of Meng et al. for GPT-2 XL, except the rate and the bound."""

    norm_constraint: Bound = "rule"
    """Largest change of any element of a weight (Meng et al.: 5e-4 for GPT-2 XL, 5e-5 for GPT-J); "rule": L / ||g||_1,
    at which a loss as steep as at the first step would be 0; null: no bound."""


# EasyEdit's layer by the model's number of layers: GPT-J, Llama, GPT-2 XL.
EASYEDIT_LAYER: Mapping[int, int] = MappingProxyType({28: 21, 32: 21, 48: 0})


@dataclass(frozen=True, kw_only=True)
class LocFTConfig(FineTuneConfig):
    """LocFT's fields. Defaults are those of its authors for Llama 3 8B and Qwen2.5 7B."""

    lr: float | None = PUBLISHED_RATE
    """Learning rate of Adam; null: as FT-M's."""

    batch_size: int = 100
    """Requests of one edit that share a gradient step."""

    module: Literal["down", "block"] = "down"
    """What is trained in each layer: the down projection, or every linear map of the block."""

    shuffle: bool = True
    """Whether the requests of an edit are shuffled before each pass."""

    append_eos: bool = True
    """Whether the end-of-text token is the last token of every answer, so that the model learns to stop there."""


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
        return (EASYEDIT_LAYER.get(count, min(count - 1, round(count * 21 / 32))),)

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the down projections."""
        self.maps = self.choose_maps()
        self.architecture.check_writable(self.maps)
        self.architecture.check_trainable(self.maps)
        return {found.name.removesuffix(".weight"): found.module for found in self.maps}

    def patch_bytes(self) -> int:
        """Return the bytes of a patch: each trained map has an update of its own size."""
        weights = [found.weight for found in self.maps]
        return sum(W.numel() * working_dtype(W.dtype).itemsize for W in weights)

    def choose_maps(self) -> list[LinearMap]:
        """Return the maps to train: the down projections."""
        return [self.architecture.map_at(layer) for layer in self.layers]

    def trainable(self) -> Trainable:
        return MasterWeights(self.maps, self.config.rate, self.config.bound)


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


# LocFT's layer by the model's number of layers, counted from 0: Qwen2.5 7B, Llama 3 8B.
LOCFT_LAYER: Mapping[int, int] = MappingProxyType({28: 6, 32: 22})


class LocFT(FTM):
    """LocFT-BF: fine-tuning of one module, breadth first (Yang et al. 2026)."""

    name = "locft"
    Config = LocFTConfig
    config: LocFTConfig

    def setup(self) -> None:
        if self.config.append_eos and getattr(self.tokenizer, "eos_token_id", None) is None:
            raise ConfigError("append_eos: this tokenizer has no end-of-text token; set append_eos=false")
        super().setup()

    def default_layers(self) -> Sequence[int]:
        """Return the authors' layer for models of the same depth, else the one at the same height as in Qwen2.5 7B."""
        count = self.architecture.n_layers
        return (LOCFT_LAYER.get(count, max(0, round(count * 7 / 28) - 1)),)

    def choose_maps(self) -> list[LinearMap]:
        """Return the down projections, or all linear maps of the blocks."""
        if self.config.module == "down":
            return super().choose_maps()
        named = [item for layer in self.layers for item in self.architecture.linears(layer).items()]
        return [LinearMap(f"{name}.weight", module) for name, module in named]

    def tokens(self, request: EditRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of the prompt and of the answer, with the end-of-text token behind it."""
        ids, answer = super().tokens(request)
        if not self.config.append_eos:
            return ids, answer
        length = len(ids) + len(answer)
        self.architecture.check_length(length, f"{length} tokens with its answer", request.id)
        return ids, (*answer, int(self.tokenizer.eos_token_id))

    def shuffle_seed(self) -> int | None:
        return self.config.seed if self.config.shuffle else None


class MasterWeights(Trainable):
    """Master copies of linear maps, each limited to a box around its original value."""

    def __init__(self, maps: Sequence[LinearMap], rate: float | None, bound: Bound) -> None:
        self.rate = rate
        self.bound = None if bound == "rule" else bound
        self.fields = [*(["lr"] if rate is None else []), *(["norm_constraint"] if bound == "rule" else [])]
        self.relative = bool(self.fields)
        self.base = {found.name: found.weight for found in maps}
        self.bias = {found.name: found.module.bias for found in maps}
        self.master = {
            name: W.to(working_dtype(W.dtype), copy=True).contiguous().requires_grad_() for name, W in self.base.items()
        }
        self.parameters = list(self.master.values())

    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        W = self.master[f"{name}.weight"].to(x.dtype)
        bias = self.bias[f"{name}.weight"]
        assert bias is None or isinstance(bias, Tensor)
        return linear(x, W, bias)

    def follow(self, reach: float) -> None:
        if "lr" in self.fields:
            self.rate = reach / STEPS
        if "norm_constraint" in self.fields:
            self.bound = reach

    def report(self) -> dict[str, Any]:
        ruled = {"lr": self.rate, "norm_constraint": self.bound}
        return {name: ruled[name] for name in self.fields if ruled[name] is not None}

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
