"""The playground's answers as HTML, by pure functions. All texts of models and users are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from errata.playground.session import AppliedEdit, AskedQuestion, Reply, SessionView

SHARE_SHOWN = 0.001  # answers with a smaller probability get no line
EMPTY = '<p class="quiet">No edit yet. Choose an example or write your own fact, then press <b>Edit</b>.</p>'


def message(text: str, *, is_error: bool = False) -> str:
    """Return one line for the user, or an empty text where there is nothing to tell."""
    if not text:
        return ""
    role, kind = ("alert", "refused") if is_error else ("status", "said")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def exported(text: str) -> str:
    """Return a text to copy, or an empty text where there is none."""
    return f"<pre><code>{escape(text)}</code></pre>" if text else ""


def title(made: AppliedEdit) -> str:
    """Return an edit as one line of plain text."""
    state = "" if made.is_applied else ", undone"
    return f"{made.request.text} → {made.request.target} ({made.edit.method}{state})"


def answers(view: SessionView | None) -> str:
    """Return what the model says about an edit, untouched and as it is now, side by side."""
    if view is None:
        return EMPTY
    made, parts = view.made, [_heading(view)]
    parts += [_card(asked, made.request.target) for asked in (*view.of("rewrite"), *view.of("paraphrase"))]
    if beside := view.of("neighborhood"):
        parts.append(_neighbors(beside))
    return "".join(parts)


def _heading(view: SessionView) -> str:
    made = view.made
    request, state = made.request, "on the model" if made.is_applied else "undone"
    facts = [f"{made.edit.method}, {made.seconds:.1f} s", *(["in chat"] if request.chat else []), state]
    if reworded := view.of("paraphrase"):
        facts.append(f"in other words {_count([bool(asked.now.says_target) for asked in reworded])}")
    if beside := view.of("neighborhood"):
        facts.append(f"neighbours held {_count([asked.held for asked in beside])}")
    warned = _hint(view) + "".join(f'<p class="refused">{escape(text)}</p>' for text in made.warnings)
    heading = f"{escape(request.text)} → <b>{escape(request.target)}</b>"
    return f'<h3>{heading}</h3><p class="quiet">{escape(" · ".join(facts))}</p>{warned}'


def _hint(view: SessionView) -> str:
    """Return what to do where the edit could change nothing, else an empty text."""
    if not any(asked.untouched.says_target for asked in view.of("rewrite")):
        return ""
    target = escape(view.made.request.target)
    return (
        f'<p class="said hint">The untouched model says <b>{target}</b> here already, so the edit has nothing to '
        "change. Try an answer that it does not give.</p>"
    )


def _count(marks: Sequence[bool]) -> str:
    return f"{sum(marks)} of {len(marks)}"


def _card(asked: AskedQuestion, target: str) -> str:
    label = "the edit's prompt" if asked.kind == "rewrite" else "in other words"
    columns = (("before", "untouched", asked.untouched), ("now", "with its edits", asked.now))
    sides = "".join(
        f'<div class="{name}"><h5>{name} <span>{state}</span></h5>{_reply(reply, target)}</div>'
        for name, state, reply in columns
    )
    return (
        f'<section class="asked {asked.kind}"><h4>{escape(asked.prompt)} … <span>{label}</span></h4>'
        f'<div class="pair">{sides}</div></section>'
    )


def _reply(reply: Reply, target: str) -> str:
    lines = []
    for word, share in reply.top:
        if share >= SHARE_SHOWN or not lines:
            is_new = bool(word.strip()) and target.startswith(word.strip())
            lines.append(
                f'<li class="{"new" if is_new else ""}"><span class="word">{_visible(word)}</span>'
                f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span><span>{_share(share)}</span></li>'
            )
    return f'<ol>{"".join(lines)}</ol><p class="writes">…&nbsp;{_visible(reply.text)}&nbsp;…</p>'


def _neighbors(beside: Sequence[AskedQuestion]) -> str:
    rows = "".join(
        f'<tr class="{"held" if asked.held else "lost"}"><th scope="row">{escape(asked.prompt)} …</th>'
        f"<td>{_first(asked.untouched)}</td><td>{_first(asked.now)}</td>"
        f'<td class="mark">{"✓ held" if asked.held else "✗ changed"}</td></tr>'
        for asked in beside
    )
    head = "<thead><tr><th>other subjects, same question</th><th>before</th><th>now</th><th></th></tr></thead>"
    return f'<table class="neighbors">{head}<tbody>{rows}</tbody></table>'


def _first(reply: Reply) -> str:
    word, share = reply.top[0]
    return f"{_visible(word)} <small>{_share(share)}</small>"


def _visible(text: str) -> str:
    """Return a text as one escaped line; empty text and white space get a sign."""
    return escape(" ".join(text.split())) or '<span class="quiet">␣</span>'


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"
