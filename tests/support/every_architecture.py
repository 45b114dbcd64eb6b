"""What errata can do with each type of model that AutoModelForCausalLM knows, tried on tiny random ones.

python tests/support/every_architecture.py          # write the table into docs/architectures.md
python tests/support/every_architecture.py llama    # print the line of some types
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import tiny_model

from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors import FTM, GRACE, MEMIT, ROME, LoRA
from errata.editors.core.errors import ArchitectureError
from errata.editors.core.families.value_search import Objective, find_targets
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.tokens import right_padded
from errata.editors.core.request import EditRequest
from errata.evaluate import scoring
from errata.evaluate.probes import Probe
from errata.testing import tiny_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
REQUEST = EditRequest("The capital of {} is", "Varland", "Oslen")
COLUMNS = ("scoring", "GRACE", "LoRA", "FT-M", "ROME", "MEMIT")


class WrongResultError(AssertionError):
    """A type ended in neither of the two states: it runs as the model does, or it is refused with a reason."""


@dataclass(frozen=True)
class Verdict:
    """What was found for one type of model.

    Attributes:
        works: For each of COLUMNS, "yes", "dense layers" (in some layers) or "no"; None where no tiny model of the
            type could be made.
        reasons: Why something is refused, or why there is no model; each reason once.
    """

    model_type: str
    works: tuple[str, ...] | None
    reasons: tuple[str, ...]

    @property
    def line(self) -> str:
        """The type's line in the table of the page."""
        marks = self.works or ["not tried"] * len(COLUMNS)
        return f"| {self.model_type} | {' | '.join(marks)} | {'; '.join(self.reasons).replace('|', '/')} |"


def model_types() -> list[str]:
    """Every type that AutoModelForCausalLM knows, in the order of the alphabet."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tried(model_type: str) -> Verdict:
    """Try everything on a tiny model of that type.

    Raises:
        WrongResultError: something gave another result than the model's own, without a word.
    """
    tokenizer: Any = tiny_tokenizer()
    try:
        model = tiny_model(model_type, len(tokenizer))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=False).logits
    except Exception as error:  # noqa: BLE001 - whatever keeps transformers from making or running it is the reason
        return Verdict(model_type, None, (f"no tiny model: {_short(error)}",))
    if not bool(logits.isfinite().all()):
        return Verdict(model_type, None, ("no tiny model: its logits are not finite",))
    works, reasons = [], []
    for trial in (_scores, _grace, _lora, _ft_m, _rome, _memit):
        try:
            works.append(trial(model, tokenizer))
        except ArchitectureError as error:
            works.append("no")
            reasons.append(str(error))
    return Verdict(model_type, tuple(works), tuple(dict.fromkeys(reasons)))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _scores(model: Any, tokenizer: Any) -> str:
    """Logits and scores equal the model's own."""
    architecture = describe(model)
    rows = [list(range(3, 23)), list(range(40, 47))]
    batch = right_padded(rows, 0)
    with torch.no_grad():
        ours = architecture.logits(run_base(architecture, batch))
        for i, row in enumerate(rows):
            own = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            _close(ours[i, : len(row)], own, "logits")
        probe = Probe("rewrite", REQUEST.text, REQUEST.target)
        (score,) = scoring.score(model, tokenizer, [probe])
        _close(torch.tensor(score.nll_target), _nll(model, tokenizer), "nll")
    return "yes"


def _close(ours: torch.Tensor, own: torch.Tensor, what: str) -> None:
    # Kernels of long rows round in another order than those of short ones: 1e-4 of the size of the logits.
    error, size = (ours.double() - own.double()).abs().max(), own.double().abs().max()
    if not error <= 1e-4 * size + 1e-6:
        raise WrongResultError(f"{what} differ by {float(error):.3g} of {float(size):.3g}")


def _ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt = tokenizer(REQUEST.text)["input_ids"]
    return prompt, tokenizer(f"{REQUEST.text} {REQUEST.target}")["input_ids"][len(prompt) :]


def _nll(model: Any, tokenizer: Any) -> torch.Tensor:
    """The nll of the answer, by the model's own forward."""
    prompt, answer = _ids(tokenizer)
    logits = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return -logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].mean()


def _edited(model: Any, tokenizer: Any, make: Callable[[], Any]) -> None:
    """The constructor refuses, or an edit runs, changes what the model says, and is undone bit for bit."""
    editor = make()
    before, wanted = _own_logits(model, tokenizer), float(_nll(model, tokenizer).detach())
    try:
        edit = editor.apply(REQUEST)
        if torch.equal(_own_logits(model, tokenizer), before):
            raise WrongResultError(f"{editor.name} has changed nothing")
        if editor.name == "ft_m":
            after = float(_nll(model, tokenizer).detach())
            _close(torch.tensor(edit.diagnostics[0]["losses"][0]), torch.tensor(wanted), "the first loss of FT-M")
            if not after < wanted:
                raise WrongResultError(f"{editor.name}: the nll of the answer went from {wanted:.4g} to {after:.4g}")
        edit.undo()
    except ArchitectureError as error:
        raise WrongResultError(f"{editor.name} was refused after its constructor: {error}") from error
    if not torch.equal(_own_logits(model, tokenizer), before):
        raise WrongResultError(f"{editor.name}: the model is not as before")


def _own_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([_ids(tokenizer)[0]]), use_cache=False).logits


def _dense(model: Any) -> list[int]:
    return [layer for layer, path in enumerate(describe(model).down_paths) if path is not None]


def _somewhere(model: Any, try_at: Callable[[dict[str, Any]], None]) -> str:
    """Try the layers of the method's own choice, or else the last that can be edited."""
    try:
        try_at({})
    except ArchitectureError:
        dense = _dense(model)
        if not dense:
            raise
        try_at({"layers": dense[-1:]})
        return "dense layers"
    return "yes"


def _grace(model: Any, tokenizer: Any) -> str:
    settings = {"n_iter": 3, "edit_lr": 0.1}
    return _somewhere(model, lambda at: _edited(model, tokenizer, lambda: GRACE(model, tokenizer, {**settings, **at})))


def _lora(model: Any, tokenizer: Any) -> str:
    _edited(model, tokenizer, lambda: LoRA(model, tokenizer, {"num_steps": 3, "rank": 2}))
    return "yes"


def _ft_m(model: Any, tokenizer: Any) -> str:
    settings = {"num_steps": 3, "lr": 1e-3}
    return _somewhere(model, lambda at: _edited(model, tokenizer, lambda: FTM(model, tokenizer, {**settings, **at})))


def _rome(model: Any, tokenizer: Any) -> str:
    settings = {"context_templates": ["{}"], "mom2_adjustment": False, "v_num_grad_steps": 3, "v_lr": 0.1}

    def at_layers(at: dict[str, Any]) -> None:
        _edited(model, tokenizer, lambda: ROME(model, tokenizer, {**settings, **at}))
        _values_agree(ROME(model, tokenizer, {**settings, **at}), "mlp")

    return _somewhere(model, at_layers)


def _memit(model: Any, tokenizer: Any) -> str:
    settings = {"context_templates": ["{}"], "v_num_grad_steps": 3}
    architecture = describe(model)
    moments = {layer: torch.eye(architecture.map_at(layer).shape[1]) for layer in _dense(model)}

    def at_layers(at: dict[str, Any]) -> None:
        _edited(model, tokenizer, lambda: MEMIT(model, tokenizer, {**settings, **at}, moments=moments))
        _values_agree(MEMIT(model, tokenizer, {**settings, **at}, moments=moments), "block")

    return _somewhere(model, at_layers)


def _values_agree(editor: Any, site: Any) -> None:
    """The search for a value takes the steps of a plain loop over the model's own forward, gradients included."""
    problems, layer = [editor.problem(REQUEST)], editor.layers[-1]
    objective = Objective(3, 0.1, 0.1, 3.0, 0.0625)
    last = editor.architecture.n_layers - 1
    (ours,) = find_targets(
        editor.architecture, problems, objective, layer=layer, loss_layer=last, site=site, pad=editor.pad
    )
    (own,) = find_targets_reference(editor.architecture, problems, objective, layer=layer, site=site, pad=editor.pad)
    for mine, wanted in zip(ours.losses, own.losses, strict=True):
        # The divergence has no gradient before the first step, so that Adam takes its rounding for a direction.
        if not abs(mine["nll"] - wanted["nll"]) <= 1e-3 * abs(wanted["nll"]):
            raise WrongResultError(f"{editor.name}: losses {ours.losses}, by the model itself {own.losses}")


def table() -> str:
    """The table of the page."""
    head = f"| Type | {' | '.join(COLUMNS)} | Reason |\n|---|{'---|' * len(COLUMNS)}---|"
    return "\n".join([head, *(tried(model_type).line for model_type in model_types())])


def filled_in(page: str, table: str) -> str:
    """The page with this table between the marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        sys.stdout.writelines(f"{tried(name).line}\n" for name in sys.argv[1:])
    else:
        PAGE.write_text(filled_in(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
