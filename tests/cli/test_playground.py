"""The playground's page: its HTML, its command line, and the page itself in a real browser."""

from __future__ import annotations

import importlib.util
import io
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import chromium
import pytest
from rich.console import Console

from errata import editors
from errata.benchmarks.bench.config import ModelConfig
from errata.cli import main
from errata.editors.core.errors import ConfigError
from errata.playground import app, html, server
from errata.playground.session import AskedQuestion, Reply, SessionOptions

MODELS = {"world": ModelConfig("world")}
CPU = SessionOptions(device="cpu")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is absent: pip install -e '.[playground]'"
)
needs_browser = pytest.mark.skipif(chromium.installed() is None, reason="no Chromium is installed")


def run(*arguments: str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    assert main.run(["playground", *arguments], console, console) == 0
    return out.getvalue()


def test_texts_of_models_and_users_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    reply = Reply(((evil, 0.9),), evil, True)
    for kind in ("rewrite", "neighborhood"):
        asked = AskedQuestion(kind, evil, reply, reply)
        shown = html._card(asked, evil) + html._neighbors([asked])
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
    assert "<script" not in html.message(evil, is_error=True)
    assert 'role="alert"' in html.message(evil, is_error=True)


def test_help_needs_no_model() -> None:
    assert "port=7860" in run("--help")


@needs_gradio
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("port=much", "expected a number"),
        ("port=70000", "expected a number"),
        ("prot=7860", "did you mean 'port'"),
        ("editor=rme", "did you mean 'rome'"),
        ("editor=rome,rme", "did you mean 'rome'"),
        ("editor.v_ler=1", "did you mean 'v_lr'"),
        ("editor.v_lr=much", "editor.v_lr"),
        ("model=/nowhere/at/all", "no model at"),
        ("world", "expected name=value"),
        ("--share", "unknown option"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(argument)


def test_without_gradio_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[playground\]'"):
        run()


@needs_gradio
def test_fields_typed_at_the_command_line_reach_every_method_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(app, "page_of", lambda configs, **given: asked.update(given, configs=configs))
    served = SimpleNamespace(url="http://127.0.0.1:1/", wait=lambda: None)
    monkeypatch.setattr(server, "serve", lambda *_: served)
    text = str(tmp_path / "my texts.jsonl")
    out = run("editor=memit,rome,grace", f"editor.mom2_dataset={text}", "editor.n_iter=7", "out=kept", "device=cpu")
    assert served.url in out
    assert asked["methods"] == ["memit", "rome", "grace"]
    assert asked["options"] == SessionOptions(
        {"memit": {"mom2_dataset": text}, "rome": {"mom2_dataset": text}, "grace": {"n_iter": 7}},
        device="cpu",
        out=Path("kept"),
    )
    run("editor=grace")
    assert asked["methods"][0] == "grace"
    assert sorted(asked["methods"]) == sorted(editors.METHODS)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the served page saves edits."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def served(kept: Path) -> Iterator[tuple[Any, str]]:
    """Serve the page on a free port, and yield it with its address."""
    page = app.page_of(MODELS, options=SessionOptions(device="cpu", out=kept))
    running = server.serve(page, free_port())
    yield page, running.url
    running.close()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        return taken.getsockname()[1]


@needs_gradio
def test_the_page_is_served_to_this_machine_alone_and_without_telemetry() -> None:
    page = app.page_of(MODELS, options=CPU)
    running = server.serve(page, free_port())
    try:
        assert running.url.startswith("http://127.0.0.1:")
        assert running.address[0] == "127.0.0.1"
        assert (page.share, page.share_url, page.analytics_enabled, page.run_history) == (False, None, False, False)
        with urllib.request.urlopen(running.url, timeout=60) as answer:
            assert b"errata playground" in answer.read()
        with pytest.raises(ConfigError, match="choose another one with port="):
            server.serve(app.page_of(MODELS, options=CPU), running.address[1])
    finally:
        running.close()
    server.serve(page, running.address[1]).close()


@needs_gradio
@needs_browser
def test_an_edit_is_made_seen_and_undone_in_a_browser(served: tuple[Any, str]) -> None:
    with chromium.browser() as browser:
        page = browser.open(served[1])
        page.wait_for("document.querySelector('#answers')?.innerText.includes('No edit yet')")
        page.click("#edit")
        page.wait_for("document.querySelector('#answers .rewrite')")
        target = page.value("document.querySelector('#target input, #target textarea').value")
        was, now = (page.text(f"#answers .rewrite .{side} .word") for side in ("before", "now"))
        assert now == target != was
        assert page.value("document.querySelectorAll('#answers .paraphrase').length") >= 1
        assert page.value("document.querySelectorAll('#answers .neighbors tbody tr').length") >= 3

        page.type("#target input, #target textarea", "")
        page.click("#edit")
        page.wait_for("document.querySelector('#message [role=alert]')")
        assert "target" in page.text("#message")
        assert "Traceback" not in page.text("body")
        assert page.text("#answers .rewrite .now .word") == target

        page.click("#undo")
        page.wait_for("document.querySelector('#answers').innerText.includes('undone')")
        assert page.text("#answers .rewrite .now .word") == was
        assert page.text("#undo") == "Make it again"
        hosts = {urlsplit(url).netloc for url in page.requested if url.startswith(("http", "ws"))}
        assert hosts == {served[1].removeprefix("http://").rstrip("/")}


@needs_gradio
@needs_browser
def test_the_edits_of_the_page_can_be_kept_and_are_forgotten_after_undoing(served: tuple[Any, str], kept: Path) -> None:
    with chromium.browser() as browser:
        page = browser.open(served[1])
        page.wait_for("document.querySelector('#answers .prose')?.innerText")
        page.click("#edit")
        page.wait_for("document.querySelector('#keep button')")
        page.click("#keep button")
        for button, said in (("#python", "errata.EditRequest("), ("#facts", "- prompt:")):
            page.wait_for(f"document.querySelector('{button}')")
            page.click(button)
            page.wait_for(f"document.querySelector('#exported pre')?.innerText.includes('{said}')")
        page.click("#save")
        page.wait_for("document.querySelector('#kept p')?.innerText.includes('Written to')")
        page.click("#save")
        page.wait_for("document.querySelector('#kept [role=alert]')")
        page.click("#clear")
        page.wait_for("!document.querySelector('#python')?.offsetParent")
    assert (kept / "playground").is_dir()


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_a_phone_shows_what_was_answered_and_what_was_refused(served: tuple[Any, str], tmp_path: Path) -> None:
    inside = "(r => r.top > -9 && r.top < window.innerHeight)(document.querySelector('{}').getBoundingClientRect())"
    with chromium.browser() as browser:
        page = browser.open(served[1], width=390, dark=True)
        page.wait_for("document.querySelector('#answers .prose')?.innerText")
        page.type("#target input, #target textarea", "")
        page.click("#edit")
        page.wait_for("document.querySelector('#message [role=alert]')")
        assert page.value(inside.format("#message"))
        page.type("#target input, #target textarea", "Huvwick")
        page.click("#edit")
        page.wait_for("document.querySelector('#answers h3')?.innerText.includes('Huvwick')")
        page.wait_for(inside.format("#answers"))
        top = "document.querySelector('{}').getBoundingClientRect().top"
        assert page.value(f"{top.format('#edit')} < {top.format('#answers')}")
        assert page.value(f"{top.format('#answers')} < {top.format('#examples')}")
        assert page.value("document.documentElement.scrollWidth") <= 390
        page.screenshot(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").read_bytes().startswith(b"\x89PNG")
