"""A Hub on this machine. It binds every call to the signature of the client's own function and answers in its types."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from errata.editors.core.storage import hub

REAL = {name: getattr(HfApi, name) for name in ("create_repo", "list_repo_files", "upload_folder")}
SNAPSHOT = huggingface_hub.snapshot_download


def bound(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The arguments by name, with the real function's defaults; TypeError where it does not take them."""
    found = inspect.signature(function).bind(*arguments, **options)
    found.apply_defaults()
    return found.arguments


class FakeHub:
    """Repositories as folders, one a commit: `repos[id]` are its commits, oldest first."""

    def __init__(self, root: Path) -> None:
        self.root, self.repos, self.private = root, {}, {}
        self.is_up = True

    @classmethod
    def put_in_place(cls, root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        """One that the client's functions lead to."""
        fake = cls(root)
        for name in REAL:
            own = getattr(fake, name)
            monkeypatch.setattr(HfApi, name, lambda api, *a, _own=own, **k: _own(api, *a, **k))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(hub, "is_reachable", lambda: fake.is_up)
        return fake

    def create_repo(self, *arguments: Any, **options: Any) -> RepoUrl:
        said = bound(REAL["create_repo"], *arguments, **options)
        self._check_up()
        repo_id = said["repo_id"]
        if repo_id in self.repos:
            assert said["exist_ok"], "409 Conflict"
        else:
            self.private[repo_id] = said["private"]
            (first := self.root / repo_id / "0").mkdir(parents=True)
            (first / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            self.repos[repo_id] = [first]
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def list_repo_files(self, *arguments: Any, **options: Any) -> list[str]:
        said = bound(REAL["list_repo_files"], *arguments, **options)
        return self._names(self._commit(said["repo_id"], said["revision"]))

    def upload_folder(self, *arguments: Any, **options: Any) -> CommitInfo:
        said = bound(REAL["upload_folder"], *arguments, **options)
        self._check_up()
        last = self._commit(said["repo_id"], None)
        commit = last.with_name(str(len(self.repos[said["repo_id"]])))
        shutil.copytree(last, commit)
        names = self._names(Path(said["folder_path"]))
        added = set(_chosen(names, said))
        for name in filter_repo_objects(self._names(last), allow_patterns=said["delete_patterns"]):
            if said["delete_patterns"] is not None and name not in added and name != ".gitattributes":
                (commit / name).unlink()
        for name in added:
            shutil.copy(Path(said["folder_path"]) / name, commit / name)
        self.repos[said["repo_id"]].append(commit)
        url = f"https://huggingface.co/{said['repo_id']}/commit/{commit.name}"
        return CommitInfo(url, commit_message=said["commit_message"], commit_description="", oid=commit.name)

    def snapshot_download(self, *arguments: Any, **options: Any) -> str:
        said = bound(SNAPSHOT, *arguments, **options)
        if said["local_files_only"]:
            raise LocalEntryNotFoundError("not in the cache, and outgoing traffic is disabled")
        commit = self._commit(said["repo_id"], said["revision"])
        cached = self.root / "cache" / said["repo_id"] / commit.name
        shutil.rmtree(cached, ignore_errors=True)
        cached.mkdir(parents=True)
        for name in _chosen(self._names(commit), said):
            (cached / name).symlink_to(commit / name)  # as in the client's cache
        return str(cached)

    def _commit(self, repo_id: str, revision: str | None) -> Path:
        self._check_up()
        if repo_id not in self.repos:
            raise RepositoryNotFoundError(
                f"404 Client Error.\n\nRepository Not Found for {repo_id}", response=_response()
            )
        return self.repos[repo_id][-1 if revision in (None, "main") else int(revision)]

    def _names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    def _check_up(self) -> None:
        if not self.is_up:
            import httpx

            raise httpx.ConnectError("no route to host")


def _chosen(names: list[str], said: dict[str, Any]) -> list[str]:
    patterns = {name: said[name] for name in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(names, **patterns))


def _response() -> Any:
    import httpx

    return httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
