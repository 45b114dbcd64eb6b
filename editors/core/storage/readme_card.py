"""The README.md card of a folder of edits or of an export, as the Hub shows it. Only people read it, no program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.editors.core.request import EditRequest
from errata.editors.core.storage.provenance import is_folder

ROWS = 100
Report = tuple[str | None, Sequence[EditRequest], Mapping[str, Any] | None]  # method, requests, notes of an edit


def folder_card(
    model: Mapping[str, Any], base: Mapping[str, str], reports: Sequence[Report], load_from: str = "FOLDER"
) -> str:
    """Return the card of a folder of edits.

    Args:
        model: Name and revision of the model.
        base: Identity of every weight that the edits change, by name.
        reports: Method, requests and notes of each edit.
        load_from: Folder or id of the Hub that the edits can be loaded from.
    """
    given, revision = str(model.get("name") or "a model without a name"), model.get("revision")
    name = Path(given).name if is_folder(given) else given  # a local path is private, and useless elsewhere
    facts = [(method, request, notes) for method, requests, notes in reports for request in requests]
    methods = ", ".join(f"{method} ({count})" for method, count in Counter(m for m, _, _ in reports if m).items())
    parts = [
        _front(given),
        f"# {_counted(len(reports), 'edit')} of {name}\n",
        f"Corrections of single facts in `{name}`{f' at revision `{revision}`' if revision else ''}, "
        f"to be put on it and taken off again with errata{f', made by {methods}' if methods else ''}.\n",
        _quantised(model),
        _usage(name, revision, len(reports), load_from),
        _table(facts),
        "## What they touch\n\n" + "".join(f"- `{weight}` ({_shape(mark)})\n" for weight, mark in base.items()),
        "`edits.jsonl` says of each edit what was asked, how it was made and what its method reported; `manifest.json` "
        "has the SHA-256 of the untouched bytes of these weights, and other models are refused.\n",
    ]
    return "\n".join(part for part in parts if part)


def export_card(kind: str, model: Mapping[str, Any], reports: Sequence[Report], *, is_id: bool) -> str:
    """Return the card of an export for other programs.

    Args:
        kind: "lora" or "merged model".
        model: Name and revision of the base model.
        reports: Method, requests and notes of each edit.
        is_id: Whether transformers finds the base model by that name.
    """
    given = str(model.get("name") or "a model without a name")
    name = Path(given).name if is_folder(given) else given
    facts = [(method, request, notes) for method, requests, notes in reports for request in requests]
    is_lora = kind == "lora"
    base = f"AutoModelForCausalLM.from_pretrained({name!r})" if is_id else f"errata.load({name!r})[0]"
    usage = (
        f"base = {base}\n"
        'check_base("FOLDER", base)  # raises if a file is damaged, or was made on other weights\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")\n'
        if is_lora
        else 'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
    )
    imports = [
        *(["import errata"] if is_lora and not is_id else []),
        *(["from errata.editors.core.storage.merged_export import check_base"] if is_lora else []),
        *(["from peft import PeftModel"] if is_lora else []),
        *(["from transformers import AutoModelForCausalLM"] if is_id or not is_lora else []),
    ]
    parts = [
        _front(given, "peft" if is_lora else "transformers"),
        f"# {'LoRA adapter' if is_lora else 'Model'} with {_counted(len(reports), 'edit')} of {name}\n",
        f"Corrections of single facts in `{name}`, made with errata.\n",
        _quantised(model),
        "```python\n" + "\n".join(imports) + f"\n\n{usage}```\n",
        _table(facts),
        "`errata-export.json` has the SHA-256 of the untouched bytes of the weights that were changed."
        + (" PEFT opens an adapter on any weights of the right shape; `check_base` compares them." if is_lora else "")
        + "\n",
    ]
    return "\n".join(part for part in parts if part)


def scores_in(notes: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Return the probabilities of each request's answer before and after the edit, by request id.

    Notes may hold anything, since other programs may write them. What does not have the form of scores is ignored.
    """
    scores = (notes or {}).get("scores")
    numbers = ("before", "after")
    return {
        id_: score
        for id_, score in (scores.items() if isinstance(scores, Mapping) else ())
        if isinstance(score, Mapping) and all(isinstance(score.get(name), int | float) for name in numbers)
    }


def _front(name: str, library: str = "errata") -> str:
    """Return the metadata that the Hub reads. It would take the path of a local folder for a model's id."""
    base_model = f"base_model: {name}\n" if "/" in name and not is_folder(name) else ""
    tags = "tags:\n- errata\n- knowledge-editing\n- model-editing\n"
    return f"---\nlibrary_name: {library}\n{base_model}{tags}---\n"


def _quantised(model: Mapping[str, Any]) -> str:
    """Return a sentence about weights that came from a quantised file; "" where they did not."""
    if not (kinds := model.get("dequantised_from")):
        return ""
    return f"The weights of this model were dequantised from a file that has them as {kinds}.\n"


def _usage(name: str, revision: Any, count: int, load_from: str) -> str:
    at = f", revision={revision!r}" if revision else ""
    load, undo = ("load_edit", "edit.undo()") if count == 1 else ("load_ledger", 'errata.edit_of(model, "ID").undo()')
    kept = "edit" if count == 1 else "ledger"
    return (
        "```python\nimport errata\n\n"
        f"model, tokenizer = errata.load({name!r}{at})\n"
        f'{kept} = errata.{load}("{load_from}", model, tokenizer)\n'
        f"{undo}\n```\n"
    )


def _table(facts: Sequence[tuple[str | None, EditRequest, Mapping[str, Any] | None]]) -> str:
    if not facts:
        return ""
    scored = any(_probability(request, notes) for _, request, notes in facts)  # else the last column is left out
    heads = ["fact", "answer", "instead of", "method", *(["p(answer)"] if scored else [])]
    rows = [heads, ["---"] * len(heads)]
    for method, request, notes in facts[:ROWS]:
        row = [request.text, request.target, request.target_true or "", method or ""]
        rows.append([*map(_cell, row), *([_probability(request, notes)] if scored else [])])
    more = f"\nand {len(facts) - ROWS} more\n" if len(facts) > ROWS else ""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n" + more


def _probability(request: EditRequest, notes: Mapping[str, Any] | None) -> str:
    """Return the probability before and after the edit as text; "" if it was not measured."""
    scores = scores_in(notes).get(str(request.id))
    return f"{scores['before']:.3f} → {scores['after']:.3f}" if scores else ""


def _cell(value: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    plain = " ".join(value.split())
    return "".join(f"\\{char}" if char in r"\|`*_<[" else char for char in plain)


def _shape(mark: str) -> str:
    return " ".join(mark.split()[:-1]) or "unknown"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
