"""The edits of a session as something to keep: a program that makes them again, and a file of facts.

`Session.save` writes the third form, a folder with the edits themselves, which gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.editors.core.request import EditRequest
from errata.editors.core.storage.merging import fact_key

if TYPE_CHECKING:
    from errata.editors.core.edit import Edit


def as_facts(requests: Sequence[EditRequest]) -> str:
    """Return requests as a file of facts in YAML, as `errata apply` reads it. The last answer for a fact counts."""
    from yaml import safe_dump

    last = {(fact_key(request), request.chat): request for request in requests}
    facts = [_given(request) for request in last.values()]
    return safe_dump({"facts": facts}, sort_keys=False, allow_unicode=True, width=10**6)


def as_python(edits: Sequence[Edit], load: Mapping[str, Any]) -> str:
    """Return a program that loads the model and makes the edits again, in their order.

    Args:
        edits: The edits of one model, in the order in which it carries them.
        load: The arguments of `errata.load`, the model's name first.
    """
    from errata import editors

    name, *rest = [repr(value) if key == "name" else f"{key}={value!r}" for key, value in load.items()]
    by_method = {edit.method: edit for edit in edits}
    lines = ["import errata"]
    for method in by_method:
        kind = editors.get(method)
        home = "errata.editors" if kind.__name__ in editors.__all__ else kind.__module__
        lines.append(f"from {home} import {kind.__name__}")
    lines += ["", f"model, tokenizer = errata.load({', '.join([name, *rest])})"]
    for method, edit in by_method.items():
        given = ", ".join(["model", "tokenizer", *_fields(edit)])
        lines.append(f"{_variable(method)} = {editors.get(method).__name__}({given})")
    lines.append("")
    lines += [f"{_variable(edit.method)}.apply({_call(request)})" for edit in edits for request in edit.requests]
    return "\n".join(lines) + "\n"


def _given(request: EditRequest) -> dict[str, Any]:
    """Return the fields of a request, without those that hold what they have by default."""
    default = EditRequest(**{**request.as_dict(), "id": None}).id
    found = {name: value for name, value in request.as_dict().items() if value is not None}
    return {name: value for name, value in found.items() if name != "id" or value != default}


def _call(request: EditRequest) -> str:
    fields = _given(request)
    named = [f"{name}={value!r}" for name, value in fields.items() if name != "prompt"]
    return f"errata.EditRequest({', '.join([repr(fields['prompt']), *named])})"


def _fields(edit: Edit) -> list[str]:
    """Return the fields that differ from what the method has for this model by itself, as one argument or none."""
    from errata import editors
    from errata.editors.core.model.model_settings import read_model_settings

    kind = editors.get(edit.method)
    own = kind.Config.from_dict(read_model_settings(edit.model).editors.get(edit.method, {})).to_dict()
    found = {name: value for name, value in edit.config.items() if own.get(name) != value}
    return [repr(found)] if found else []


def _variable(method: str) -> str:
    return re.sub(r"\W", "_", method)
