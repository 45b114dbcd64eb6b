"""Ids of models that are not on this machine: said at once where the Hub cannot be reached."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from errata import models
from errata.editors.core.errors import ConfigError
from errata.editors.core.storage import hub


@pytest.mark.parametrize("load", [models.load, models.resolved_dtype])
def test_where_the_hub_cannot_be_reached_an_unknown_id_is_refused_after_one_try(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def refused(place: Any, timeout: float = 60, *_: Any) -> Any:
        assert timeout <= 5
        asked.append(place)
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8443")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", refused)
    monkeypatch.setattr(hub.socket, "getaddrinfo", refused)
    with pytest.raises(
        ConfigError, match=r"'rmoe' could not be loaded: .*; expected a folder, an id ORG/NAME of the Hub"
    ):
        load("rmoe")
    with pytest.raises(ConfigError, match=r"'org/rmoe' could not be loaded") as caught:
        load("org/rmoe")
    assert "expected a folder" not in str(caught.value)
    assert asked == [("hub.example", 8443)] * 2


@pytest.mark.parametrize(
    ("offline", "proxies", "answers", "found", "asked"),
    [
        (True, {}, True, False, 0),
        (False, {}, True, True, 1),
        (False, {}, False, False, 1),
        (False, {"https": "http://proxy:3128"}, False, True, 0),
    ],
)
def test_whether_the_hub_answers_is_asked_once_and_never_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, offline: bool, proxies: dict[str, str], answers: bool, found: bool, asked: int
) -> None:
    calls: list[Any] = []

    def connect(place: Any, _timeout: float) -> Any:
        calls.append(place)
        if not answers:
            raise OSError("no route")
        return io.BytesIO()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    assert hub.is_reachable() is found
    assert len(calls) == asked


def test_a_folder_is_opened_without_asking_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: pytest.fail("the Hub was asked for"))
    models.load("world")
