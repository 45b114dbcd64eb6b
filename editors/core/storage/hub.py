"""Folders of edits on the Hugging Face Hub: fetching and pushing them with the Hub's client.

The client finds the user's login itself (`hf auth login`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from errata.editors.core.errors import ExportError, HubError

ATTRIBUTES = ".gitattributes"  # the Hub itself makes this file


def is_id(name: str | Path) -> bool:
    """Return whether a name can be an id of the Hub, ORG/NAME. A `Path` is never one."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download a repository's edits into the Hub's cache, and return the folder there.

    If the Hub cannot be reached, only the cache is searched.

    Args:
        repo_id: ORG/NAME.
        revision: Branch, tag or commit.

    Raises:
        HubError: There is no such repository or revision, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    from errata.editors.core.storage.record_format import OURS

    with _raise_hub_error(
        f"there is no folder {repo_id!r}, and the Hub's repository of that name could not be fetched"
    ):
        path = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(OURS),
            local_files_only=not is_reachable(),
            library_name="errata",
        )
    return Path(str(path))


def push(folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a folder of edits to a repository in one commit, in place of older edits there.

    Args:
        folder: The folder of edits.
        repo_id: ORG/NAME; the repository is created if it is missing.
        private: Whether a new repository is private; None: the default of the account.
        revision: An existing branch; None: main.

    Returns:
        The URL of the commit.

    Raises:
        ExportError: The repository holds other files, which would get mixed with the edits.
        HubError: The repository cannot be reached or written.
    """
    from huggingface_hub import HfApi

    from errata.editors.core.storage.record_format import OURS, is_ours

    api = HfApi(library_name="errata")
    with _raise_hub_error(f"{repo_id} could not be written"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        for name in api.list_repo_files(repo_id, revision=revision):
            if name != ATTRIBUTES and not is_ours(name):
                raise ExportError(f"{repo_id} holds {name}, which is no file of edits; name another repository")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Edits of errata",
            delete_patterns=list(OURS),  # files of older edits that the new ones do not replace
        )
    return commit.commit_url


def is_reachable() -> bool:
    """Return whether the Hub, or the mirror that HF_ENDPOINT names, accepts a connection; assume so behind a proxy."""
    from urllib.request import getproxies  # takes long to import

    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or url.hostname is None:
        return False
    if url.scheme in getproxies():
        return True  # no direct connection to test
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), 5).close()
    except OSError:
        return False
    return True


@contextmanager
def _raise_hub_error(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a HubError with `what` and the first line of the reason."""
    from httpx import HTTPError
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except ExportError:
        raise
    except (OSError, ValueError, HTTPError, EntryNotFoundError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HubError(f"{what}: {reason}") from error
