"""`errata derive`: calculates edits from edits, or from two models: strength, sign, and what a mask leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders
from errata.cli.arguments import Arguments, parse
from errata.cli.command import FILES, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.algebra.mask_rules import MaskRule
    from errata.editors.core.ledger.entry import Entry
    from errata.editors.core.storage.edit_folder import Edits

RULES = (
    "ignore_top",
    "magnitude",
    "ties",
    "breadcrumbs",
    "breadcrumbs_mergekit",
    "rect",
    "rect_alphaedit",
    "dare",
    "dare_magnitude",
    "dare_mergekit",
    "della",
)


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Write a folder with edits that are calculated from others."""
    given = parse(arguments, COMMAND)
    values = given.values
    scale = _number("scale", values)
    _check(given)

    from errata.editors.core.algebra.derivation import scaled_entry
    from errata.editors.core.algebra.rule_texts import rule_of_text
    from errata.editors.core.storage.merged_export import check_free

    check_free(Path(values["out"]))
    rule = rule_of_text(values["mask"]) if "mask" in values else None
    edits, model = _edits(given, console)
    entries = list(edits.entries) if rule is None else _masked(edits, rule, values, model)
    if scale is not None:
        entries = [scaled_entry(entry, scale) for entry in entries]
    made = replace(edits, entries=tuple(entries), notes={})
    written = made.write(values["out"])
    for entry in made.entries:
        say(console, f"{entry.id} = {_formula(entry)}, norm {_norm(entry):.3g}")
    say(console, f"{count_of(len(made), 'edit')}: {written}")
    return DONE


def _edits(given: Arguments, console: Console) -> tuple[Edits, object | None]:
    """Return the edits to calculate with, and the model where it had to be loaded."""
    values = given.values
    if given.words:
        edits = edit_folders.edits_in(given.words[0])
        if "id" in values:
            edits = edits.only({edits.find(values["id"]).id})
        return edits, None

    from errata.editors.core.difference import difference
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.storage.edit_folder import Edits

    (model, tokenizer), (tuned, _) = (edit_folders.load_model(values[name], values) for name in ("base", "tuned"))
    edit = difference(model, tuned)
    numbers = edit.derived["numbers"]
    kept = f"{count_of(numbers['low_rank'], 'weight')} as factors and {numbers['dense']} whole"
    say(console, f"{kept}: {numbers['bytes'] / 1e6:,.1f} MB; {numbers['off']:,} elements are off by rounding")
    return Edits.of(Ledger.of(model), [edit.entry()], tokenizer=tokenizer), model


def _masked(edits: Edits, rule: MaskRule, values: Mapping[str, str], model: object | None) -> list[Entry]:
    """Return what a rule leaves of each edit, which sees the weights with the edits before it."""
    from errata.editors.core.algebra.derivation import masked_entry
    from errata.editors.core.algebra.masking import weights_below
    from errata.editors.core.ledger.ledger import Ledger

    if not rule.needs_weight:
        return [masked_entry(entry, rule, {}) for entry in edits.entries]
    loaded = model if model is not None else edit_folders.load_model_of(edits, values)[0]
    ledger = Ledger.of(loaded)  # type: ignore[arg-type]
    masked = []
    for entry in edits.entries:
        masked.append(masked_entry(entry, rule, weights_below(ledger, entry.patch.updates)))
        ledger.extend([entry])
    return masked


def _check(given: Arguments) -> None:
    """Refuse arguments that do not say what to calculate, or from what.

    Raises:
        ConfigError: It says what was expected.
    """
    values, from_models = given.values, {"base", "tuned"} & given.values.keys()
    if from_models and (len(from_models) < 2 or given.words):
        raise ConfigError("expected a folder of edits, or base=MODEL and tuned=MODEL in its place")
    if len(given.words) != (0 if from_models else 1) or "out" not in values:
        raise ConfigError(
            f"expected one folder of edits, and out=FOLDER, a new one; got {len(given.words)} folders"
            f"{'' if 'out' in values else ' and no out='} (errata merge makes one of two)"
        )
    if not from_models and not {"scale", "mask"} & values.keys():
        raise ConfigError("expected scale=NUMBER or mask=RULE; without them there is nothing to calculate")
    if from_models and {"id", "model"} & values.keys():
        raise ConfigError("id= and model= are for a folder of edits; base= and tuned= name the models")


def _number(name: str, values: Mapping[str, str]) -> float | None:
    """Return a value as a number, or None where it is not given.

    Raises:
        ConfigError: It is no number.
    """
    if name not in values:
        return None
    try:
        return float(values[name])
    except ValueError:
        raise ConfigError(f"{name}: expected a number, got {values[name]!r}") from None


def _formula(entry: Entry) -> str:
    from errata.editors.core.algebra.derivation import described

    return described(entry.info.derived) or "as it was"


def _norm(entry: Entry) -> float:
    return sum(value**2 for value in entry.patch.norms().values()) ** 0.5


COMMAND = Command(
    name="derive",
    usage=(
        "EDITS out=FOLDER [scale=NUMBER] [mask=RULE]",
        "base=MODEL tuned=MODEL out=FOLDER [scale=NUMBER] [mask=RULE]",
    ),
    summary="Calculate edits from edits, or from the difference of two models.",
    group=FILES,
    run=run,
    options=(
        Option("out=FOLDER", "the new folder"),
        Option("scale=NUMBER", "how strong the edits are to be: 0.5 for half of each, -1 for its opposite"),
        Option("mask=RULE", "which elements stay, such as ignore_top:0.08 or rect:0.8", RULES),
        Option("id=ID", "only this edit, by its own id or by that of its fact"),
        Option("base=MODEL", "a model, whose difference from tuned= becomes an edit of it"),
        Option("tuned=MODEL", "the model that base= is to become"),
        *edit_folders.MODEL_OPTIONS,
    ),
    notes=(
        "A mask comes before the scale. Rules that compare with the weights load the model: rect, and rules per row.",
        "Edits are taken back from a merged model, which has no ledger, by their opposite:\n"
        "`errata derive EDITS scale=-1 out=BACK`, and then `errata export BACK model=MERGED force=true merged=FOLDER`.",
        edit_folders.WHAT_HOLDS_EDITS,
    ),
    examples=(
        "errata derive facts.edits scale=0.5 mask=rect:0.8 out=half.edits",
        "errata derive base=gpt2 tuned=./my-gpt2 scale=-1 out=forget.edits",
    ),
    needs_arguments=True,
)
