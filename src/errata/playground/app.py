"""`errata playground`: a page on this machine to make edits, look at what they did, and undo any of them.

    errata playground                                   the bundled testbed, at http://127.0.0.1:7860
    errata playground model=world,path/or/id port=7861 editor=memit

What it does is in session.py, what it shows in html.py; here are Gradio's components and their wiring. It binds
to the loopback address alone, makes no public link, and reports to nobody. All events wait for each other: there is one
model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, ErrataError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.playground.session import Session, Sessions

HOST, PORT = "127.0.0.1", "7860"
NAMES = ("model", "port", "editor", "precision", "device")
HELP = """\
errata playground [model=NAME,...] [port=7860] [editor=rome] [precision=...] [device=...]

A page on this machine alone: make an edit, see what changed and what held, undo any edit. model= takes the testbed
("world"), names of hparams/model, folders and Hugging Face ids; several are separated by commas. Ctrl-C ends it.
"""
STYLE = Path(__file__).parent / "page.css"
# Read by Gradio when it is imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Where the columns stand one below the other, the answers are out of sight when they come.
SCROLL = """() => {
  const refused = document.querySelector("#message [role=alert]");
  if (window.innerWidth < 700 && !refused) document.querySelector("#answers").scrollIntoView();
}"""
Shown = tuple[str, str, Any, Any, Any]


def playground(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: an unknown name, method or model, a port that is taken, or Gradio is not installed.
    """
    from errata.cli.overrides import words_and_options

    if set(arguments) & {"-h", "--help"}:
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    words, options = words_and_options(arguments, NAMES, f"there are {', '.join(NAMES)}")
    if words:
        raise ConfigError(f"expected name=value, got {words[0]!r}")
    port = _port(options.get("port", PORT))
    page = page_of(options)
    url = serve(page, port)
    console.print(f"playground at {url}; Ctrl-C ends it", highlight=False, soft_wrap=True)
    page.block_thread()
    return 0


def page_of(options: Mapping[str, str]) -> Any:
    """The page as Gradio's Blocks, its first model loaded.

    Args:
        options: `model`, `editor`, `precision`, `device`, as typed.

    Raises:
        ConfigError: as `playground`.
    """
    from errata import editors
    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.bench.config import ModelConfig
    from errata.cli import overrides
    from errata.editors.core.config import build
    from errata.playground.session import Sessions

    gradio = _gradio()
    method = options.get("editor", "rome")
    if method not in editors.METHODS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, editors.METHODS)}")
    names = [name.strip() for name in options.get("model", "world").split(",")]
    values = {name: compose("edit", overrides.translated([f"model={name}"], "edit"))["model"] for name in names}
    configs = {name: build(ModelConfig, value, "model.") for name, value in values.items()}
    desks = Sessions(configs, precision=options.get("precision"), device=options.get("device"))
    desks.choose(names[0])
    return _Page(gradio, desks, list(configs), method).build()


def serve(page: Any, port: int) -> str:
    """Serve a page on the loopback address, in a thread; its address.

    Raises:
        ConfigError: the port is taken.
    """
    gradio = _gradio()
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            strict_cors=True,
            theme=theme,
            css_paths=STYLE,
        )
    except OSError as error:
        raise ConfigError(f"port {port} of {HOST} cannot be had; choose another one with port=") from error
    return url


def _gradio() -> Any:
    for name, value in QUIET.items():
        os.environ[name] = value
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the playground needs Gradio ({error}): pip install -e '.[playground]'") from error
    return gradio


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"port: expected a number from 1 to {2**16 - 1}, got {text!r}")
    return int(text)


class _Page:
    """The components and what they do. Handlers return what `_shown` returns: for `outputs`, in their order."""

    def __init__(self, gradio: Any, desks: Sessions, names: list[str], method: str) -> None:
        self.gr, self.desks, self.names, self.method = gradio, desks, names, method

    @property
    def desk(self) -> Session:
        return self.desks.choose(self.desks.name)

    def build(self) -> Any:
        """Lay out the page."""
        gr = self.gr
        with gr.Blocks(title="errata playground", analytics_enabled=False) as page:
            gr.HTML("<h1>errata</h1><p>Correct a fact, see what else moved, take it back.</p>", elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    self._form()
                with gr.Column(scale=3, min_width=300):
                    self.answers = gr.HTML(elem_id="answers")
                    self.history = gr.Radio(label="Edits made here", elem_id="history", visible=False)
                    with gr.Row():
                        self.toggle = gr.Button("Undo this edit", elem_id="undo", visible=False)
                        self.clear = gr.Button("Undo all", elem_id="clear", visible=False)
            self._wire(page)
        return page

    def _form(self) -> None:
        from errata import editors

        gr, first = self.gr, self._examples()[0]
        with gr.Row():
            self.model = gr.Dropdown(
                self.names, value=self.names[0], label="Model", interactive=len(self.names) > 1, min_width=120
            )
            self.editor = gr.Dropdown(sorted(editors.METHODS), value=self.method, label="Method", min_width=120)
        self.prompt = gr.Textbox(first.prompt, label="Prompt, {} for the subject", elem_id="prompt", max_lines=3)
        self.subject = gr.Textbox(first.subject, label="Subject", elem_id="subject", max_lines=1)
        self.target = gr.Textbox(first.target, label="New answer", elem_id="target", max_lines=1)
        with gr.Accordion("Ask as well", open=False):
            hint = "On the testbed, empty means what its world knows."
            self.wordings = gr.Textbox("", label="Other wordings, one a line", info=hint, lines=2)
            self.others = gr.Textbox("", label="Other subjects, one a line", info=hint, lines=2)
        self.go = gr.Button("Edit", variant="primary", elem_id="edit")
        self.message = gr.HTML(elem_id="message")
        self.examples = gr.Dataset(
            components=["textbox"],
            samples=self._labels(),
            type="index",
            label="Examples",
            samples_per_page=20,
            elem_id="examples",
        )

    def _wire(self, page: Any) -> None:
        fields = [self.prompt, self.subject, self.target, self.wordings, self.others]
        shown = [self.message, self.answers, self.history, self.toggle, self.clear]
        alone: dict[str, Any] = {
            "concurrency_id": "desk",
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
        self.toggle.click(self.toggled, self.history, shown, **alone)
        self.clear.click(self.cleared, self.history, shown, **alone)

    # --- what the components do -------------------------------------------------------------------------------------

    def _edit_handler(self) -> Callable[..., Shown]:
        """Make an edit; its progress is Gradio's, which is handed in by a default of this type."""
        from errata.playground.examples import ExampleFact

        bar = self.gr.Progress()

        def edit(
            method: str,
            prompt: str,
            subject: str,
            target: str,
            wordings: str,
            others: str,
            progress: Any = bar,
        ) -> Shown:
            fact = ExampleFact(prompt, subject, target, tuple(wordings.splitlines()), tuple(others.splitlines()))

            def act() -> str:
                made = self.desk.make(
                    method, fact, progress=lambda done, total, what: progress((done, total), desc=what)
                )
                return made.id

            return self._tried(act, None)

        return edit

    def fill(self, place: int) -> tuple[str, ...]:
        """An example into the fields."""
        fact = self._examples()[place]
        return fact.prompt, fact.subject, fact.target, "\n".join(fact.wordings), "\n".join(fact.others)

    def choose(self, name: str) -> tuple[Any, ...]:
        """Another model; where it cannot be loaded, the one before stays chosen."""

        def act() -> None:
            self.desks.choose(name)

        shown = self._tried(act, None)
        return self.gr.Dataset(samples=self._labels()), self.desks.name, *self.fill(0), *shown

    def toggled(self, chosen: str | None) -> Shown:
        """Undo the chosen edit, or put it on again."""

        def act() -> None:
            is_applied = next((made.is_applied for made in self.desk.history if made.id == chosen), False)
            (self.desk.undo if is_applied else self.desk.redo)(chosen or "")

        return self._tried(act, chosen)

    def cleared(self, chosen: str | None) -> Shown:
        """Undo all edits."""
        return self._tried(lambda: self.desk.clear(), chosen)

    def _tried(self, act: Callable[[], str | None], chosen: str | None) -> Shown:
        """Do something and show the edit that it gives, or the chosen one; where it is refused, say why."""
        from errata.playground.html import message

        try:
            return self._shown(act() or chosen)
        except ErrataError as error:
            return (message(str(error), is_error=True), *self._shown(chosen)[1:])

    def _shown(self, chosen: str | None) -> Shown:
        """Message, answers, history and its buttons. The last edit is shown where none is chosen."""
        from errata.playground import html

        history = self.desk.history
        there = {made.id: made for made in history}
        made = there.get(chosen or "", history[-1] if history else None)
        view = self.desk.view(made.id) if made else None
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
            update(visible=any(entry.is_applied for entry in history)),
        )

    def _examples(self) -> list[Any]:
        from errata.playground.examples import examples

        return examples(self.desk.testbed)

    def _labels(self) -> list[list[str]]:
        return [[f"{fact.request().text} → {fact.target}"] for fact in self._examples()]
