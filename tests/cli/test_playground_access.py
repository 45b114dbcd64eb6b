"""Who can reach the playground, asked with raw HTTP: pages of this machine's browser that are not the page itself."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from errata.benchmarks.bench.config import ModelConfig
from errata.playground import app, server
from errata.playground.local_only import LOCAL_NAMES
from errata.playground.session import SessionOptions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is absent: pip install -e '.[playground]'"
)
JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a served page."""
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        free = taken.getsockname()[1]
    running = server.serve(app.page_of({"world": ModelConfig("world")}, options=SessionOptions(device="cpu")), free)
    yield running.address[1]
    running.close()


def status_of(raw: bytes, port: int) -> int:
    """The status that some bytes are answered with."""
    with socket.create_connection((server.HOST, port), timeout=60) as connection:
        connection.sendall(raw)
        first = connection.makefile("rb").readline()
    return int(first.split()[1])


def request(method: str, path: str, headers: Mapping[str, str] | list[tuple[str, str]], body: bytes = b"") -> bytes:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in pairs)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body


def an_edit() -> bytes:
    """What the page sends for "Undo all"."""
    return json.dumps({"data": [None], "fn_index": 0, "session_hash": "strange", "event_data": None}).encode()


@pytest.mark.parametrize("name", LOCAL_NAMES)
def test_a_local_name_with_the_right_port_is_answered(name: str, port: int) -> None:
    assert status_of(request("GET", "/", {"Host": f"{name}:{port}"}), port) == 200
    assert status_of(request("GET", "/", {"Host": f"{name.upper()}:{port}"}), port) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:{port}",
        "127.0.0.1.evil.com:{port}",
        "evil.com@127.0.0.1:{port}",
        "localhost",
        "127.0.0.1:1",
        "0.0.0.0:{port}",
        "[::]:{port}",
        "127.0.0.1:{port}0",
        "",
    ],
)
def test_a_name_that_was_made_to_point_at_this_machine_is_refused(host: str, port: int) -> None:
    named = {"Host": host.format(port=port)}
    for method, path in (("GET", "/"), ("GET", "/config"), ("OPTIONS", JOIN), ("POST", JOIN)):
        assert status_of(request(method, path, {**named, "Content-Type": "application/json"}), port) == 421, path


def test_no_host_and_two_hosts_are_refused(port: int) -> None:
    assert status_of(b"GET / HTTP/1.0\r\n\r\n", port) in (400, 421)
    twice = [("Host", f"127.0.0.1:{port}"), ("Host", "evil.com")]
    assert status_of(request("GET", "/", twice), port) in (400, 421)


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}", "http://localhost:{port}"]
)
def test_what_another_origin_sends_is_refused(origin: str, port: int) -> None:
    headers = {"Host": f"127.0.0.1:{port}", "Origin": origin.format(port=port)}
    for kind in ("application/json", "text/plain"):  # a form of another site sends text/plain without asking first
        sent = request("POST", JOIN, {**headers, "Content-Type": kind}, an_edit())
        assert status_of(sent, port) == 403
    assert status_of(request("OPTIONS", JOIN, {**headers, "Access-Control-Request-Method": "POST"}), port) == 403
    assert status_of(request("GET", "/gradio_api/queue/data?session_hash=x", headers), port) == 403


def test_what_the_page_itself_sends_is_answered(port: int) -> None:
    own = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    assert status_of(request("POST", JOIN, own, an_edit()), port) == 200
    assert status_of(request("GET", "/config", own), port) == 200


def test_nothing_can_be_uploaded(port: int, tmp_path: Path) -> None:
    boundary = "x" * 12
    named = 'Content-Disposition: form-data; name="files"; filename="a.txt"'
    part = f"--{boundary}\r\n{named}\r\n\r\nhello\r\n--{boundary}--\r\n"
    headers = {"Host": f"127.0.0.1:{port}", "Content-Type": f"multipart/form-data; boundary={boundary}"}
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=x", "/gradio_api/upload/", "//gradio_api/upload"):
        assert status_of(request("POST", path, headers, part.encode()), port) == 404, path
    assert status_of(request("PUT", "/gradio_api/upload", headers, part.encode()), port) == 404
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://example.com",
        "/assets/../../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/static/%2fetc%2fpasswd",
        "/svelte/index.html",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/monitoring",
        "/docs",
        "/gradio_api/mcp/",
    ],
)
def test_no_file_and_no_other_service_of_gradio_is_reachable(path: str, port: int) -> None:
    assert status_of(request("GET", path, {"Host": f"127.0.0.1:{port}"}), port) in (403, 404)


@pytest.mark.parametrize("path", ["/gradio_api/run/predict", "/gradio_api/call/_shown", "/gradio_api/component_server"])
def test_no_other_call_of_gradio_is_answered(path: str, port: int) -> None:
    headers = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    assert status_of(request("POST", path, headers, b"{}"), port) == 404


def test_no_other_page_can_frame_the_page_and_it_loads_nothing_from_elsewhere(port: int) -> None:
    connection = http.client.HTTPConnection(server.HOST, port, timeout=60)
    connection.request("GET", "/")
    policy = connection.getresponse().headers["content-security-policy"]
    connection.close()
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
