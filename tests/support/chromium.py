"""A headless Chromium, driven through DevTools over a pair of pipes, so that no package and no port is needed.

with browser() as chromium:
    page = chromium.open("http://127.0.0.1:7860", width=390, dark=True)
    page.wait_for("document.querySelector('#edit')")
    page.click("#edit")
    page.screenshot(Path("page.png"))
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECONDS = 300.0  # for anything to happen, on a machine that is busy with other things
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)


def installed() -> str | None:
    """The program, where there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. `requested` holds the address of everything that it has asked for."""

    def __init__(self, chromium: Chromium, attached: str) -> None:
        self._chromium, self._attached = chromium, attached

    @property
    def requested(self) -> list[str]:
        events = [event for event in self._chromium.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events if event["sessionId"] == self._attached]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._chromium.call(method, parameters, self._attached)

    def value(self, expression: str) -> Any:
        """What some JavaScript gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until some JavaScript gives something, which may be an element."""
        end = time.monotonic() + SECONDS
        while not self.value(f"!!({expression})"):
            assert time.monotonic() < end, f"{expression} did not come true; the page says {self.text('body')!r}"
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        """The text of an element as it is shown."""
        return self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as if it had been typed over what was there."""
        self.value(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        if text:
            self.call("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Delete", code="Delete", windowsVirtualKeyCode=46)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


class Chromium:
    """A running browser: commands go in through one pipe, answers and events come out of the other."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest = commands, answers, b""
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, parameters: dict[str, Any], attached: str | None = None) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        command: dict[str, Any] = {"id": next(self._ids), "method": method, "params": parameters}
        if attached is not None:
            command["sessionId"] = attached
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == command["id"]:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """A tab of this size at this address."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, attached)
        page.call("Page.enable")
        page.call("Network.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete'")
        return page

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)


@contextmanager
def browser() -> Iterator[Chromium]:
    """A browser of its own folder, ended at the end."""
    program = installed()
    assert program is not None, "no Chromium is installed"
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        # It reads commands from 3 and writes answers to 4. High numbers first: 3 and 4 may be taken by the pipes.
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs_in, 103),
            (os.POSIX_SPAWN_DUP2, theirs_out, 104),
            (os.POSIX_SPAWN_DUP2, 103, 3),
            (os.POSIX_SPAWN_DUP2, 104, 4),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        pid = os.posix_spawn(program, words, dict(os.environ), file_actions=actions, setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Chromium(commands, answers)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(commands)
            os.close(answers)
