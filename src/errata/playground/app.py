"""The playground's page: Gradio's components and their wiring.

What the page does is in session.py, what it shows in html.py, and how it is served in server.py. Events wait for each
other, since there is one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, ErrataError
from errata.playground.server import load_gradio

if TYPE_CHECKING:
    from errata.benchmarks.bench.config import ModelConfig
    from errata.playground.session import Session, SessionOptions, Sessions

# On a narrow screen the answers stand below the form. New ones would then appear out of sight.
SCROLL = """() => {
  const refused = document.querySelector("#message [role=alert]");
  if (window.innerWidth < 700 && !refused) document.querySelector("#answers").scrollIntoView();
}"""
# Without the right to use the clipboard, the text is still there to be selected.
COPY = """() => {
  const text = document.querySelector("#exported pre")?.innerText;
  if (text) navigator.clipboard?.writeText(text).catch(() => {});
}"""
# What the page calls the texts that can stand between prompt and answer, as `EditRequest.join` takes them.
JOINS: Mapping[str, str | None] = MappingProxyType(
    {"as the language is written": None, "nothing": "", "a blank": " ", "a new line": "\n"}
)
# The values for the outputs of an event, in the order of `_Page.shown`.
Shown = tuple[Any, ...]


def page_of(
    configs: Mapping[str, ModelConfig],
    *,
    methods: Sequence[str] = (),
    options: SessionOptions | None = None,
) -> Any:
    """Build the page as Gradio's Blocks, and load its first model.

    Args:
        configs: The models to choose from, by the name that the page shows.
        methods: The methods to choose from; the first is chosen. By default all of them, ROME first.
        options: How sessions are started.

    Raises:
        ConfigError: A method is unknown, the model cannot be loaded, or Gradio is not installed.
    """
    from errata import editors
    from errata.playground.session import Sessions

    gradio = load_gradio()
    offered = list(methods) or ["rome", *sorted(set(editors.METHODS) - {"rome"})]
    for method in offered:
        if method not in editors.METHODS:
            raise ConfigError(f"unknown method {method!r}{did_you_mean(method, editors.METHODS)}")
    sessions = Sessions(configs, options)
    sessions.choose(next(iter(configs)))
    return _Page(gradio, sessions, list(configs), offered).build()


class _Page:
    """The components and what they do. Event handlers return the values of `shown`."""

    def __init__(self, gradio: Any, sessions: Sessions, names: list[str], methods: list[str]) -> None:
        self.gr, self.sessions, self.names, self.methods = gradio, sessions, names, methods

    @property
    def session(self) -> Session:
        return self.sessions.choose(self.sessions.name)

    def build(self) -> Any:
        """Lay out the page. page.css gives the three columns their places."""
        gr = self.gr
        with gr.Blocks(title="errata playground", analytics_enabled=False) as page:
            gr.HTML(
                "<h1>errata</h1><p>Correct a fact, see what else changed, undo it.</p>", elem_id="title", padding=False
            )
            with gr.Row(equal_height=False, elem_id="layout"):
                with gr.Column(elem_id="form", min_width=0):
                    self._form()
                with gr.Column(elem_id="results", min_width=0):
                    self._results()
                with gr.Column(elem_id="more", min_width=0):
                    self.examples = gr.Dataset(
                        components=["textbox"],
                        samples=self._labels(),
                        type="index",
                        label="Examples",
                        samples_per_page=20,
                        elem_id="examples",
                    )
            self._wire(page)
        return page

    def _form(self) -> None:
        gr, first = self.gr, self._examples()[0]
        with gr.Row():
            self.model = gr.Dropdown(
                self.names, value=self.names[0], label="Model", interactive=len(self.names) > 1, min_width=120
            )
            self.editor = gr.Dropdown(self.methods, value=self.methods[0], label="Method", min_width=120)
        self.prompt = gr.Textbox(first.prompt, label="Prompt, {} for the subject", elem_id="prompt", max_lines=3)
        self.subject = gr.Textbox(first.subject, label="Subject", elem_id="subject", max_lines=1)
        self.target = gr.Textbox(first.target, label="New answer", elem_id="target", max_lines=1)
        self.chat = gr.Checkbox(
            first.chat,
            label="As a message in the model's chat template",
            elem_id="chat",
            visible=self.session.has_chat,
        )
        with gr.Accordion("How it is written", open=first.join is not None):
            self.join = gr.Dropdown(
                list(JOINS), value=_join_name(first.join), label="Between prompt and answer", elem_id="join"
            )
        with gr.Accordion("Ask as well", open=False):
            hint = "Empty: for the testbed, questions from its own world."
            self.wordings = gr.Textbox("", label="Other wordings, one per line", info=hint, lines=2)
            self.others = gr.Textbox("", label="Other subjects, one per line", info=hint, lines=2)
        self.go = gr.Button("Edit", variant="primary", elem_id="edit")
        self.message = gr.HTML(elem_id="message", padding=False)

    def _results(self) -> None:
        gr = self.gr
        self.answers = gr.HTML(elem_id="answers", padding=False)
        self.history = gr.Radio(label="Edits made here", elem_id="history", visible=False)
        with gr.Row():
            self.toggle = gr.Button("Undo this edit", elem_id="undo", visible=False, min_width=120, size="md")
            self.clear = gr.Button("Undo all", elem_id="clear", visible=False, min_width=120, size="md")
        with gr.Accordion("Keep these edits", open=False, visible=False, elem_id="keep") as self.keep:
            self.name = gr.Textbox("playground", label=f"Folder in {self.sessions.options.out}", elem_id="name")
            with gr.Row():
                self.save = gr.Button("Save", elem_id="save", min_width=120, size="md")
                self.program = gr.Button("Copy as Python", elem_id="python", min_width=120, size="md")
                self.facts = gr.Button("Copy as facts.yaml", elem_id="facts", min_width=120, size="md")
            self.kept = gr.HTML(elem_id="kept", padding=False)
            self.exported = gr.HTML(elem_id="exported", padding=False)

    def _wire(self, page: Any) -> None:
        fields = [self.prompt, self.subject, self.target, self.wordings, self.others, self.chat, self.join]
        shown = [self.message, self.answers, self.history, self.toggle, self.clear, self.keep, self.kept, self.exported]
        alone: dict[str, Any] = {
            "concurrency_id": "session",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress_on": self.answers,
        }
        made = {"fn": self._edit_handler(), "inputs": [self.editor, *fields], "outputs": shown, **alone}
        page.load(lambda: self._shown(None), outputs=shown, **alone)
        for asked in (self.go.click(**made), self.target.submit(**made)):
            asked.then(fn=None, js=SCROLL)
        self.examples.click(self.fill, self.examples, fields, **alone)
        self.model.input(self.choose, self.model, [self.examples, self.model, *fields, *shown], **alone)
        self.history.input(self._shown, self.history, shown, **alone)
        self.toggle.click(self.toggle_edit, self.history, shown, **alone)
        self.clear.click(self.undo_all, self.history, shown, **alone)
        quick = {**alone, "outputs": [self.kept, self.exported], "show_progress": "hidden"}
        self.save.click(self.save_edits, self.name, **quick)
        for button, kind in ((self.program, "python"), (self.facts, "facts")):
            button.click(partial(self.export, kind), **quick).then(fn=None, js=COPY)

    # --- what the components do -------------------------------------------------------------------------------------

    def _edit_handler(self) -> Callable[..., Shown]:
        """Return the handler that makes an edit. Gradio passes its progress bar as the default of an argument."""
        from errata.playground.examples import ExampleFact

        bar = self.gr.Progress()

        def edit(
            method: str,
            prompt: str,
            subject: str,
            target: str,
            wordings: str,
            others: str,
            chat: bool,
            join: str,
            progress: Any = bar,
        ) -> Shown:
            asked = tuple(wordings.splitlines()), tuple(others.splitlines())
            fact = ExampleFact(prompt, subject, target, *asked, chat, JOINS[join])

            def act() -> str:
                made = self.session.make(
                    method, fact, progress=lambda done, total, what: progress((done, total), desc=what)
                )
                return made.id

            return self._try(act, None)

        return edit

    def fill(self, index: int) -> tuple[Any, ...]:
        """Return the values of the fields for an example."""
        fact = self._examples()[index]
        chat = self.gr.update(value=fact.chat, visible=self.session.has_chat)
        asked = "\n".join(fact.wordings), "\n".join(fact.others)
        return fact.prompt, fact.subject, fact.target, *asked, chat, _join_name(fact.join)

    def choose(self, name: str) -> tuple[Any, ...]:
        """Choose another model. Where it cannot be loaded, the one before stays chosen."""

        def act() -> None:
            self.sessions.choose(name)

        shown = self._try(act, None)
        return self.gr.Dataset(samples=self._labels()), self.sessions.name, *self.fill(0), *shown

    def toggle_edit(self, chosen: str | None) -> Shown:
        """Undo the chosen edit, or make it again."""

        def act() -> None:
            is_applied = next((made.is_applied for made in self.session.history if made.id == chosen), False)
            (self.session.undo if is_applied else self.session.redo)(chosen or "")

        return self._try(act, chosen)

    def undo_all(self, chosen: str | None) -> Shown:
        """Undo all edits."""
        return self._try(lambda: self.session.clear(), chosen)

    def save_edits(self, name: str) -> tuple[str, str]:
        """Write the edits that the model carries into a folder, and return what to show below the buttons."""
        from errata.playground.html import message

        try:
            folder = self.session.save(name)
        except ErrataError as error:
            return message(str(error), is_error=True), ""
        return message(f'Written to {folder}. errata.load_ledger("{folder}", model) makes the same edits again.'), ""

    def export(self, kind: str) -> tuple[str, str]:
        """Return what to show below the buttons: the edits that the model carries as text."""
        from errata.playground import export
        from errata.playground.html import exported, message

        made = self.session.applied
        if kind == "python":
            text = export.as_python([entry.edit for entry in made], self.session.load_arguments)
        else:
            text = export.as_facts([entry.request for entry in made])
        return message("Copied. It is here, too:"), exported(text)

    def _try(self, act: Callable[[], str | None], chosen: str | None) -> Shown:
        """Act, then show the edit whose id `act` returns, or the chosen one; where the act is refused, show why."""
        from errata.playground.html import message

        try:
            return self._shown(act() or chosen)
        except ErrataError as error:
            return (message(str(error), is_error=True), *self._shown(chosen)[1:])

    def _shown(self, chosen: str | None) -> Shown:
        """Return the values of the outputs. The last edit is shown where none is chosen."""
        from errata.playground import html

        history = self.session.history
        there = {made.id: made for made in history}
        made = there.get(chosen or "", history[-1] if history else None)
        view = self.session.view(made.id) if made else None
        label = "Undo this edit" if made is None or made.is_applied else "Make it again"
        update, is_any = self.gr.update, bool(history)
        return (
            "",
            html.answers(view),
            update(
                choices=[(html.title(entry), entry.id) for entry in history],
                value=made.id if made else None,
                visible=is_any,
            ),
            update(value=label, visible=is_any),
            update(visible=bool(self.session.applied)),
            update(visible=bool(self.session.applied)),
            "",
            "",
        )

    def _examples(self) -> list[Any]:
        from errata.playground.examples import examples

        return examples(self.session.testbed, chat=self.session.has_chat)

    def _labels(self) -> list[list[str]]:
        return [[f"{fact.request().text} → {fact.target}"] for fact in self._examples()]


def _join_name(join: str | None) -> str:
    """Return what the page calls a text between prompt and answer."""
    return next(name for name, text in JOINS.items() if text == join)
