"""Lets through to the page only what a browser on this machine asks for itself.

The loopback address keeps other machines out, but not the web pages that a browser on this machine has open. Three
rules keep those out:

- The Host has to be a local name with the page's port. A site whose name was made to point at 127.0.0.1 (DNS
  rebinding) still sends that name, and gets 421.
- An Origin has to be the page's own. A form or script of another site, or of another port, gets 403.
- Only the addresses that the page uses are answered. All others get 404: uploads, files, proxies, Gradio's other calls.

Responses forbid frames and anything that is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
READS = frozenset(
    {
        "/",
        "/config",
        "/theme.css",
        "/manifest.json",
        "/favicon.ico",
        "/gradio_api/app_id",
        "/gradio_api/info",
        "/gradio_api/queue/data",
        "/gradio_api/startup-events",
    }
)
READ_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")  # Gradio's own scripts, styles and signs of life
WRITES = frozenset({"/gradio_api/queue/join", "/gradio_api/cancel"})
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
)


class LocalOnly:
    """An ASGI application in front of another one, which it protects as the top of this file says.

    Args:
        app: The application behind it.
        port: The port that it is served on.
    """

    def __init__(self, app: Asgi, port: int) -> None:
        self._app = app
        self._hosts = frozenset(f"{name}:{port}" for name in LOCAL_NAMES)
        if port == 80:
            self._hosts |= frozenset(LOCAL_NAMES)  # browsers leave out the default port
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refused := self._refusal(scope):
            await _answer(send, *refused)
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason for which a request is refused; None where it is answered."""
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 421, f"the playground is served as http://127.0.0.1:{self._port} alone"
        if origins and origins != [f"http://{hosts[0]}"]:
            return 403, "another site or port has no access to the playground"
        return None if _is_used(scope["method"], scope["path"]) else (404, "the playground has nothing at this address")


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key.lower() == name]


def _is_used(method: str, path: str) -> bool:
    """Return whether the page itself sends such requests."""
    if method == "POST":
        return path in WRITES
    if method not in ("GET", "HEAD"):
        return False
    is_below = path.startswith(READ_BELOW) and "\\" not in path and ".." not in path.split("/")
    return path in READS or is_below


async def _answer(send: Send, status: int, reason: str) -> None:
    body = f"{reason}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds `HEADERS` to the response."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return sent
