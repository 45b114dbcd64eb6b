"""Stepping stones: what a method trains on is rewritten, so that the new answer comes as less of a surprise.

    editor = FTM(model, tokenizer, rewriter=lambda text: f"Its court lives by the sea, in Brast. {text}")

A text that leads up to its last word makes that word likelier before training. Then training has less to change, and
leaks less into other contexts (evaluate/priming.py). Errata has no such writer: a person or another model writes.

Source: Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it" (arXiv 2504.09522), who call it
stepping-stone augmentation. Their texts and their code are not public.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from errata.editors.core.errors import RequestError
from errata.editors.core.model.joining import joined
from errata.editors.core.request import EditRequest

Rewriter = Callable[[str], str]
"""Takes prompt and answer as one text, and returns a text that ends with the same answer."""


def rewritten(request: EditRequest, rewriter: Rewriter | None) -> EditRequest:
    """Return the request whose prompt is the rewritten text up to the answer; the same without a rewriter.

    It has no subject: methods that train on text do not look at it.

    Raises:
        RequestError: The prompt is a message of a chat, or the rewriter returned something that is no text or does not
            end with the answer behind some text.
    """
    if rewriter is None:
        return request
    if request.chat:
        raise RequestError(
            "a rewriter takes prompt and answer as one text, and this request is a message of a chat; leave out either",
            field="chat",
        ).of(request.id)
    answer = request.target.strip()
    text = rewriter(joined(request.text, answer, request.join))
    prompt = text.rstrip().removesuffix(answer).rstrip() if isinstance(text, str) else ""
    if not prompt or not text.rstrip().endswith(answer):
        raise RequestError(
            f"expected the rewriter to return a text that ends with the answer {answer!r}, got {text!r}", field="prompt"
        ).of(request.id)
    return replace(request, prompt=prompt, subject=None)
