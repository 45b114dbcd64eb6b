"""Which model edits were made on: its name and revision, and the untouched bytes of the weights that they touch."""

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
from errata.editors.core.model.tokens import Tokenizer

ATTRIBUTE = "_errata_source"
NAMED = 3  # weights that a refusal names before it counts


def remember_source(model: nn.Module, name: str, revision: str | None) -> None:
    """Note on a model by what name and revision it was asked for."""
    model.__dict__[ATTRIBUTE] = {"name": name, "revision": revision}


def source(model: nn.Module) -> dict[str, str | None]:
    """The name and the revision of a model: as it was asked for, of a model of the Hub the commit that came."""
    said = model.__dict__.get(ATTRIBUTE, {"name": model_name(model), "revision": None})
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return {"name": said["name"], "revision": commit or said["revision"]}


def marks(ledger: Ledger, entries: Iterable[Entry], known: Mapping[str, str]) -> dict[str, str]:
    """By name, `mark` of the untouched bytes of every weight that the entries touch, or act beside; of those in `known`
    what that says."""
    names: dict[str, None] = {}
    for entry in entries:
        names |= dict.fromkeys(entry.patch.updates)
        for module in entry.patch.adapters:
            own = ledger.model.get_submodule(module).named_parameters()
            names |= dict.fromkeys(f"{module}.{name}" for name, _ in own)
    return {name: known.get(name) or mark(ledger.base(name)) for name in names}


def mark(tensor: Tensor) -> str:
    """Precision, shape and SHA-256 of a weight, as in `float32 512x128 3f0a...`."""
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {tensor_digest(tensor)}"


def check(
    said: Mapping[str, Any],
    base: Mapping[str, str],
    ledger: Ledger,
    *,
    tokenizer: Tokenizer | None = None,
    tokenized: str | None = None,
) -> None:
    """Refuse a model that is not the one that edits were made on. Edits that it carries do not count.

    Args:
        said: Its name and revision, as `source` gives them.
        base: As `marks`.
        ledger: Of the model at hand.
        tokenizer: The one at hand, if it shall be looked at.
        tokenized: Digest of the one that the edits were made with, where it is known.

    Raises:
        OtherBaseError: says in what it differs.
    """
    found = [*_names(said, source(ledger.model))]
    weights = [other for name, stated in base.items() if (other := _weight(ledger, name, stated))]
    found += weights[:NAMED]
    if len(weights) > NAMED:
        found.append(f"and {len(weights) - NAMED} more weights")
    if tokenizer is not None and tokenized is not None and tokenizer_digest(tokenizer) != tokenized:
        found.append("another tokenizer")
    if found:
        same = "" if weights else "; the weights that they touch have the same bytes"
        raise OtherBaseError(
            f"these edits are of another model than the one given: {'; '.join(found)}{same}", differences=found
        )


def _names(said: Mapping[str, Any], here: Mapping[str, Any]) -> Iterable[str]:
    there, now = str(said.get("name") or ""), str(here["name"] or "")
    # A folder may be anywhere: it is told by its bytes.
    if not there or not now or is_folder(there) or is_folder(now):
        return
    if there != now:
        yield f"its id was {there} and is {now}"
    elif said.get("revision") and here["revision"] and said["revision"] != here["revision"]:
        yield f"its revision was {said['revision']} and is {here['revision']}"


def is_folder(name: str) -> bool:
    """Whether a model's name says where it is rather than which it is."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()


def without_place(value: Any) -> Any:
    """A path without the folders that it lies in, as in `./gpt2`; a bare name and anything else as it is."""
    if not isinstance(value, str) or not {"/", "\\"} & set(value):
        return value
    own = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return f"./{own}" if is_folder(value) or Path(value).is_file() else value


def _weight(ledger: Ledger, name: str, stated: str) -> str | None:
    """How a weight differs from what is stated of it; None: in nothing."""
    try:
        tensor = ledger.base(name)
    except LedgerError as error:
        return str(error)
    digest, now = stated.split()[-1], mark(tensor)
    if digest == now.split()[-1]:
        return None
    then, here = stated.split()[:-1], now.split()[:-1]
    if then and then != here:
        return f"another {name} ({' '.join(then)} there, {' '.join(here)} here)"
    return f"another {name} (other bytes)"


def model_name(model: nn.Module) -> str:
    """What transformers loaded it by: a folder or an id; "" where it was built by hand."""
    return str(getattr(model, "name_or_path", ""))
