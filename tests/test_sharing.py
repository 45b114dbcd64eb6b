"""Edits on the Hub, against a Hub of this machine that takes what the client's own functions take, and nothing else."""

from __future__ import annotations

import inspect
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console

import errata
from errata import cli
from errata.editors.core import hub
from errata.editors.core.architecture import describe
from errata.editors.core.edits import Edits
from errata.editors.core.errors import ConfigError, DamagedEditsError, ExportError, HubError
from errata.editors.core.ledger import Ledger
from errata.editors.core.patch import LowRank, Patch
from errata.editors.core.request import EditRequest

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


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    for name in REAL:
        own = getattr(fake, name)
        monkeypatch.setattr(HfApi, name, lambda api, *a, _own=own, **k: _own(api, *a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "answers", lambda: fake.is_up)
    monkeypatch.chdir(tmp_path)
    return fake


def put(ledger: Ledger, count: int) -> Ledger:
    d_out, d_in = describe(ledger.model).weight(0).shape
    for seed in range(len(ledger), count):
        drawn = torch.Generator().manual_seed(seed)
        update = LowRank(torch.randn(d_out, 1, generator=drawn), torch.randn(1, d_in, generator=drawn))
        meta = {"method": "made up", "requests": [vars(EditRequest("{} is", f"land {seed}", "old"))]}
        ledger.append(f"edit {seed}", Patch({describe(ledger.model).weight_name(0): update}), meta)
    return ledger


def test_what_is_pushed_is_loaded_with_the_same_bits(there: FakeHub, open_ledger: Any, digest: Any) -> None:
    ledger, other = put(open_ledger(torch.float32), 3), open_ledger(torch.float32)
    assert ledger.push_to_hub("me/edits", private=True) == "https://huggingface.co/me/edits/commit/1"
    assert there.private == {"me/edits": True}
    assert digest(errata.load_ledger("me/edits", other.model).model) == digest(ledger.model)
    card = (there.repos["me/edits"][-1] / "README.md").read_text()
    assert 'errata.load_ledger("me/edits", model, tokenizer)' in card

    ledger.edit("edit 1").push_to_hub("me/one")
    other.clear()
    assert errata.load_edit("me/one", other.model).id == "edit 1"


def test_a_push_takes_the_place_of_the_edits_before_which_are_had_by_revision(
    there: FakeHub, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.editors.core import edits as edits_module

    with monkeypatch.context() as small:
        small.setattr(edits_module, "FILE_BYTES", 1)
        put(ledger, 3).push_to_hub("me/edits")
    ledger.remove_many(["edit 0", "edit 1"])
    ledger.push_to_hub("me/edits")
    assert len(list(there.repos["me/edits"][1].glob("*.blocks"))) == 3
    assert sorted(path.name for path in there.repos["me/edits"][2].iterdir()) == [
        ".gitattributes",
        "README.md",
        "edits-00000.blocks",
        "edits.jsonl",
        "manifest.json",
    ]
    assert Edits.read("me/edits").ids == ("edit 2",)
    assert len(Edits.read("me/edits", revision="1")) == 3
    with pytest.raises(DamagedEditsError, match="expected a folder of edits"):
        Edits.read("me/edits", revision="0")


def test_a_repository_of_something_else_is_left_alone(there: FakeHub, ledger: Ledger) -> None:
    there.create_repo(HfApi(), "me/model")
    (there.repos["me/model"][0] / "model.safetensors").touch()
    with pytest.raises(ExportError, match=r"me/model holds model\.safetensors"):
        put(ledger, 1).push_to_hub("me/model")
    assert len(there.repos["me/model"]) == 1


def test_what_the_hub_has_not_or_cannot_give_is_said_in_one_line(there: FakeHub, ledger: Ledger) -> None:
    with pytest.raises(HubError, match=r"^there is no folder 'me/none', and the Hub's .*: 404 Client Error\.$"):
        Edits.read("me/none")
    there.is_up = False
    with pytest.raises(HubError, match="not in the cache"):
        Edits.read("me/none")
    with pytest.raises(HubError, match="me/edits could not be written: no route to host"):
        put(ledger, 1).push_to_hub("me/edits")


def test_a_folder_comes_before_a_repository_of_its_name_and_a_path_is_never_asked_for(
    there: FakeHub, ledger: Ledger, tmp_path: Path
) -> None:
    put(ledger, 2).push_to_hub("me/edits")
    put(ledger, 3).save(tmp_path / "me" / "edits")
    assert len(Edits.read("me/edits")) == 3
    there.is_up = False
    for name in ("./me/none", "a/b/c", "edits", str(tmp_path / "none"), "me/.."):
        with pytest.raises(DamagedEditsError, match=r"manifest\.json"):
            Edits.read(name)


def test_the_commands_take_repositories_for_folders(there: FakeHub, ledger: Ledger, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        out = io.StringIO()
        console = Console(file=out, width=160)
        assert cli.run(list(arguments), console, console) == 0
        return out.getvalue()

    put(ledger, 2).save(tmp_path / "edits")
    assert "2 edits: https://huggingface.co/me/edits/commit/1" in run("export", "edits", "hub=me/edits", "private=true")
    assert there.private == {"me/edits": True}
    assert "2 edits of" in run("list", "me/edits")
    assert "2 edits are the same" in run("diff", "edits", "me/edits")
    run("remove", "me/edits", "id=edit 0", "out=copy")
    assert Edits.read("copy").ids == ("edit 1",)
    with pytest.raises(ConfigError, match="give out=FOLDER"):
        run("remove", "me/edits", "id=edit 0")
