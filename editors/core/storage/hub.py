"""Folders of edits on the Hugging Face Hub, by its own client; who is logged in (`hf auth login`) is its affair."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from errata.editors.core.errors import ExportError, HubError

ATTRIBUTES = ".gitattributes"  # made by the Hub


def is_id(name: str | Path) -> bool:
    """Whether a name can be ORG/NAME of the Hub; a `Path` is none."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def fetched(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a repository's edits in the Hub's cache. Where the Hub cannot be reached only that is looked at.

    Args:
        repo_id: ORG/NAME.
        revision: Branch, tag or commit.

    Raises:
        HubError: there is no such repository or revision, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    from errata.editors.core.storage.record_format import OURS

    with _said(f"there is no folder {repo_id!r}, and the Hub's repository of that name could not be fetched"):
        path = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(OURS), local_files_only=not answers(), library_name="errata"
        )
    return Path(str(path))


def push(folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Make a repository hold a folder of edits, and no older ones, in one commit.

    Args:
        folder: As it was written.
        repo_id: ORG/NAME; made if it is missing.
        private: Whether a new repository is; None: as the account has it.
        revision: Branch, which must be there; None: main.

    Returns:
        Where the commit is shown.

    Raises:
        ExportError: the repository holds something else, which would be mixed up with the edits.
        HubError: it cannot be reached or written.
    """
    from huggingface_hub import HfApi

    from errata.editors.core.storage.record_format import OURS, is_ours

    api = HfApi(library_name="errata")
    with _said(f"{repo_id} could not be written"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        for name in api.list_repo_files(repo_id, revision=revision):
            if name != ATTRIBUTES and not is_ours(name):
                raise ExportError(f"{repo_id} holds {name}, which is not of edits; name another repository")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Edits of errata",
            delete_patterns=list(OURS),
        )
    return commit.commit_url


def answers() -> bool:
    """Whether the Hub, or the mirror that HF_ENDPOINT names, takes a connection; behind a proxy it is taken to."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or place.hostname is None:
        return False
    if place.scheme in getproxies():
        return True
    try:
        socket.create_connection((place.hostname, place.port or (443 if place.scheme == "https" else 80)), 5).close()
    except OSError:
        return False
    return True


@contextmanager
def _said(what: str) -> Iterator[None]:
    """What the Hub's client complains of, in one line."""
    from httpx import HTTPError
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except ExportError:
        raise
    except (OSError, ValueError, HTTPError, EntryNotFoundError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HubError(f"{what}: {reason}") from error
