"""The playground's server: Gradio's page behind `LocalOnly`, on the loopback address, in a thread of its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError
from errata.playground.local_only import LocalOnly
from errata.playground.theme import colours, theme

if TYPE_CHECKING:
    from uvicorn import Server

HOST = "127.0.0.1"
STYLE = Path(__file__).parent / "page.css"
STARTS_WITHIN = 60.0  # seconds
# Gradio reads these from the environment when it is imported.
QUIET = MappingProxyType(
    {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
)


def load_gradio() -> Any:
    """Import Gradio, with its telemetry off.

    Raises:
        ConfigError: It is not installed; the message says how to install it.
    """
    for name, value in QUIET.items():
        os.environ[name] = value
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the playground needs Gradio ({error}): pip install -e '.[playground]'") from error
    return gradio


class PageServer:
    """A page that is being served.

    Attributes:
        url: Its address.
        address: What the server listens on, as (host, port).
    """

    def __init__(self, server: Server, listening: socket.socket) -> None:
        self._server, self._listening = server, listening
        self.address: tuple[str, int] = listening.getsockname()
        self.url = f"http://{self.address[0]}:{self.address[1]}/"
        self._thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)

    def start(self) -> None:
        """Serve in a thread, and return once requests are answered.

        Raises:
            ConfigError: The server ended, or did not start in time.
        """
        self._thread.start()
        end = time.monotonic() + STARTS_WITHIN
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ConfigError(f"the page did not start at {self.url}; choose another port with port=")
            time.sleep(0.01)

    def wait(self) -> None:
        """Wait until the server ends. Ctrl-C ends it."""
        try:
            while self._thread.is_alive():
                self._thread.join(timeout=0.5)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """End the server."""
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._listening.close()


def serve(page: Any, port: int) -> PageServer:
    """Serve a page on the loopback address, in a thread.

    Args:
        page: Gradio's Blocks.
        port: A port of this machine.

    Raises:
        ConfigError: The port is taken.
    """
    load_gradio()
    from uvicorn import Config, Server

    listening = _listen(port)
    app = LocalOnly(_application(page, port), port)
    config = Config(app, log_level="warning", timeout_graceful_shutdown=1, ws="none", server_header=False)
    served = PageServer(Server(config), listening)
    served.start()
    return served


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a server that has just ended
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(f"port {port} of {HOST} is not free; choose another one with port=") from error
    return listening


def _application(page: Any, port: int) -> Any:
    """Return the page as an ASGI application without links, telemetry and history of runs."""
    gradio = load_gradio()
    from fastapi import FastAPI

    return gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=theme(gradio),
        head=f"<style>{colours()}</style>",
        css_paths=STYLE,
    )
