"""Provenance of edits: the name and revision of their model, and digests of the base weights that they change.

With these, edits from a file are refused on any other model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from errata.editors.core.errors import LedgerError, OtherBaseError
from errata.editors.core.files.digests import tensor_digest
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.digests import tokenizer_digest
from errata.editors.core.model.model_settings import DEQUANTISED_FROM
from errata.editors.core.model.tokens import Tokenizer

ATTRIBUTE = "_errata_source"
MAX_NAMED = 3  # a refusal names this many weights, and counts the others


def remember_source(model: nn.Module, name: str, revision: str | None) -> None:
    """Store on a model the name and the revision that it was requested by."""
    model.__dict__[ATTRIBUTE] = {"name": name, "revision": revision}


def source(model: nn.Module) -> dict[str, str | None]:
    """Return the name that a model was requested by, and its revision: the commit if it came from the Hub.

    A model whose weights were dequantised has their types under `dequantised_from`, too.
    """
    requested = model.__dict__.get(ATTRIBUTE, {"name": model_name(model), "revision": None})
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    quantised = getattr(model, DEQUANTISED_FROM, None)
    return {
        "name": requested["name"],
        "revision": commit or requested["revision"],
        **({} if quantised is None else {"dequantised_from": quantised}),
    }


def weight_identities(ledger: Ledger, entries: Iterable[Entry], known: Mapping[str, str]) -> dict[str, str]:
    """Return the `weight_identity` of the base of every weight that the entries change, by name.

    The weights of a module with an adapter are included. Identities in `known` are not computed again.
    """
    names: dict[str, None] = {}  # a dict keeps the order, where a set would not
    for entry in entries:
        names |= dict.fromkeys(entry.patch.updates)
        for module in entry.patch.adapters:
            parameters = ledger.model.get_submodule(module).named_parameters()
            names |= dict.fromkeys(f"{module}.{name}" for name, _ in parameters)
    return {name: known.get(name) or weight_identity(ledger.base(name)) for name in names}


def weight_identity(tensor: Tensor) -> str:
    """Return precision, shape and SHA-256 of a weight, such as `float32 512x128 3f0a...`."""
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {tensor_digest(tensor)}"


def check(
    made_on: Mapping[str, Any],
    base: Mapping[str, str],
    ledger: Ledger,
    *,
    tokenizer: Tokenizer | None = None,
    made_with: str | None = None,
) -> None:
    """Refuse a model other than the one that edits were made on. Edits that the model carries now do not matter.

    Args:
        made_on: Name and revision of the model of the edits, as `source` returns them.
        base: Identities of its weights, as `weight_identities` returns them.
        ledger: Ledger of the model to check.
        tokenizer: Tokenizer to check, if any.
        made_with: Digest of the tokenizer that the edits were made with, if it is known.

    Raises:
        OtherBaseError: It lists the differences.
    """
    differences = [*_name_differences(made_on, source(ledger.model))]
    weights = [other for name, stated in base.items() if (other := _weight_difference(ledger, name, stated))]
    differences += weights[:MAX_NAMED]
    if len(weights) > MAX_NAMED:
        differences.append(f"and {len(weights) - MAX_NAMED} more weights")
    if tokenizer is not None and made_with is not None and tokenizer_digest(tokenizer) != made_with:
        differences.append("another tokenizer")
    if differences:
        same = "" if weights else "; the weights that they touch have the same bytes"
        raise OtherBaseError(
            f"these edits are of another model than the one given: {'; '.join(differences)}{same}",
            differences=differences,
        )


def _name_differences(made_on: Mapping[str, Any], here: Mapping[str, Any]) -> Iterable[str]:
    expected, given = str(made_on.get("name") or ""), str(here["name"] or "")
    # The path of a local folder says nothing about the model in it. The digests of its weights do.
    if not expected or not given or is_folder(expected) or is_folder(given):
        return
    if expected != given:
        yield f"its id was {expected} and is {given}"
    elif made_on.get("revision") and here["revision"] and made_on["revision"] != here["revision"]:
        yield f"its revision was {made_on['revision']} and is {here['revision']}"


def is_folder(name: str) -> bool:
    """Return whether a model's name is the path of a local folder or file rather than an id of the Hub."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return is_path or name.lower().endswith(".gguf") or Path(name).is_dir()


def without_folders(value: Any) -> Any:
    """Return a path without its parent folders, such as `./gpt2`; return anything else unchanged."""
    if not isinstance(value, str) or not {"/", "\\"} & set(value):
        return value
    last = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return f"./{last}" if is_folder(value) or Path(value).is_file() else value


def _weight_difference(ledger: Ledger, name: str, stated: str) -> str | None:
    """Return how a weight differs from its stated identity, or None if it is the same."""
    try:
        tensor = ledger.base(name)
    except LedgerError as error:
        return str(error)
    digest, now = stated.split()[-1], weight_identity(tensor)
    if digest == now.split()[-1]:
        return None
    # Where only a digest was stated, there is no precision or shape to compare.
    then, here = stated.split()[:-1], now.split()[:-1]
    if then and then != here:
        return f"another {name} ({' '.join(then)} there, {' '.join(here)} here)"
    return f"another {name} (other bytes)"


def model_name(model: nn.Module) -> str:
    """Return the folder or id that transformers loaded a model from; "" for a model built in Python."""
    return str(getattr(model, "name_or_path", ""))
