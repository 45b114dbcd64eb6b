"""The fields that the locate-then-edit methods share, and the brakes that combine with each of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

from errata.editors.core.brakes.pruning import Singular
from errata.editors.core.config import EditorConfig, check_least, check_positive
from errata.editors.core.errors import ConfigError
from errata.editors.core.families import context_templates as contexts
from errata.editors.core.families.anchored_values import Beyond
from errata.editors.core.families.value_search import Objective

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


@dataclass(frozen=True, kw_only=True)
class LocateThenEditConfig(EditorConfig):
    """Fields shared by the family, named as in the authors' files. Defaults are ROME's for GPT-2 XL.

    A field that is null is filled in for the model by a rule of the method. The editor's `settings` have the values,
    and so have its reports, as `filled_in`.
    """

    ADDED = MappingProxyType(
        {
            "as_published": False,
            "stop_when_top": None,
            "stop_rule": "all",
            "rect": None,
            "sphere": None,
            "sphere_energy": 0.5,
            "prune": None,
            "nas": None,
            "nas_facts": None,
            "nas_beyond": "refuse",
            "v_relative": None,
        }
    )
    FILES = ("mom2_file", "nas_facts")

    as_published: bool = False
    """Whether null fields take the numbers of the authors' code in place of the rules that scale with the model."""

    layers: tuple[int, ...] | None = None
    """Layers to edit, counted from 0; null: the method's rule."""

    fact_token: FactToken = "subject_last"
    """The token whose key and value are edited."""

    v_num_grad_steps: int = 20
    """Iterations of the search for a value. The last one only computes the loss, so that there is one step fewer."""

    v_lr: float = 0.5
    """Learning rate of Adam in that search; behind a norm in units of the value's root mean square."""

    v_relative: bool | None = None
    """Whether the search counts in units of the untouched value's root mean square, `v_lr` and weight decay included;
    null: behind a norm only. A number in absolute units does not carry over to models with other hidden states. Where
    the value is that of one sublayer (ROME), its length may be far from the hidden state's. PMET counts in the hidden
    state's root mean square, clamp included, where no norm stands between."""

    v_loss_layer: int | None = None
    """Layer whose output the head reads for the loss; null: the last."""

    v_weight_decay: float = 0.5
    """Weight of ||delta|| / ||v_0||^2."""

    clamp_norm_factor: float | None = None
    """The norm of delta is limited to this many times ||v_0||; null: the method's rule."""

    kl_factor: float = 0.0625
    """Weight of the KL divergence on the prompt "{subject} is a"."""

    stop_loss: float = 0.05
    """The search for a value ends once its loss is below this."""

    stop_when_top: int | None = None
    """The search for a value also ends once the answer has been the likeliest, token by token in every written context,
    this many times (ENCORE: 2 for Llama, 4 for GPT-2 XL); null: it has no such end."""

    stop_rule: Literal["all", "published"] = "all"
    """What counts for `stop_when_top`: all, that every token of the answer is the likeliest; published, that exactly
    five are, as in ENCORE's code, which is right for answers of one token behind five contexts."""

    context_templates: tuple[str, ...] | None = None
    """Contexts to put before the prompt. Each ends in `{}`, where the prompt goes, and the first is the bare `{}`.
    null: the model writes them itself, by `context_template_length_params`."""

    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    """(length in tokens, how many) of the contexts that the model writes."""

    mom2_adjustment: bool = True
    """Whether keys are whitened by the second moment of all keys, as in the papers."""

    mom2_dataset: str | None = None
    """Text for the second moments: a file, "name:config:split" of the Hub, or "factbook", the text that comes with
    errata; null: the text in the model's folder, else "factbook"."""

    mom2_file: str | None = None
    """File of second moments computed before, as `errata convert moments` writes it. No text is read then."""

    mom2_n_samples: int = 100_000
    """Largest number of texts to read for the second moments."""

    mom2_dtype: Literal["float64", "float32"] = "float64"
    """Precision in which the second moment is inverted. float32 repeats the authors' code, including its errors."""

    rect: float | None = None
    """RECT: share of a weight's elements to change, those that change most relative to the weight (0.4 in the
    papers' tables); null: all. The same as sparsify=rect_alphaedit:0.4."""

    sphere: float | None = None
    """SPHERE's alpha: how much of the update along the weight's leading directions is left out (0.5 in EasyEdit's
    file); null: nothing."""

    sphere_energy: float = 0.5
    """SPHERE's eta: which share of the energy of the weight's rows the leading directions hold."""

    prune: Singular | None = None
    """PRUNE: how singular values of all changes together are made smaller, those above the weight's own largest, once
    a sequence is done (log in the paper); null: not at all."""

    nas: float | None = None
    """NAS: the norm that every value at the MLP's output is given; null: as it is found, or as `nas_facts` say."""

    nas_facts: str | None = None
    """File of facts, a JSON list of {"prompt", "subject", "target"}, whose values' mean norm is `nas`; null: none."""

    nas_beyond: Beyond = "refuse"
    """What to do with a value that is longer than twice `nas`: refuse the edit; scale it, as in the paper; or drop it,
    which writes nothing and says so in the report, as the authors' code does without a word."""

    batch_tokens: int = 16384
    """Largest number of tokens in one forward pass; lower it if memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("rect", self.rect), ("sphere", self.sphere), ("sphere_energy", self.sphere_energy)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}: expected a share above 0, at most 1, got {value}")
        check_positive(self, ("v_num_grad_steps", "v_lr", "clamp_norm_factor", "mom2_n_samples", "batch_tokens"))
        check_positive(self, ("stop_when_top", "nas"))
        if self.rect is not None and self.sparsify is not None:
            raise ConfigError(f"rect: expected null where sparsify is given; it means rect_alphaedit:{self.rect}")
        if self.nas is not None and self.nas_facts is not None:
            raise ConfigError("nas_facts: expected null where nas is given; it is the norm that they would be read for")
        check_least(self, dict.fromkeys(("v_weight_decay", "kl_factor", "stop_loss"), 0))
        if self.context_templates is not None:
            contexts.check_templates(self.context_templates)

    @property
    def sparse_rule(self) -> str | None:
        return self.sparsify if self.rect is None else f"rect_alphaedit:{self.rect}"

    @property
    def objective(self) -> Objective:
        assert self.clamp_norm_factor is not None  # the editor has filled it in
        return Objective(**{one.name: getattr(self, one.name) for one in fields(Objective) if hasattr(self, one.name)})
