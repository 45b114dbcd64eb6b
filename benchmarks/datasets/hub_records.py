"""Records of a dataset of the Hub, named as `owner/name`, `owner/name:config` or `owner/name:config:split`.

The second part may also be a file of the repository, as `owner/name:data/test.json`. The split is "train" where none is
named. The `datasets` package fetches the files and keeps them in its cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from errata.editors.core.errors import DatasetError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,2}")
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz")


def is_named(path: str | Path) -> bool:
    """Return whether a path names a dataset of the Hub: it has that form, and there is no such file."""
    text = str(path)
    is_file_name = ":" not in text and text.endswith(_FILES)
    return _NAME.fullmatch(text) is not None and not is_file_name and not Path(text).exists()


def read(name: str) -> list[dict[str, Any]]:
    """Return the records of a dataset of the Hub.

    Raises:
        DatasetError: it cannot be had, with the reason.
    """
    import datasets

    repository, config, split = [*name.split(":"), "", ""][:3]
    what: dict[str, Any] = {"data_files": config} if config.endswith(_FILES) else {"name": config or None}
    try:
        found = datasets.load_dataset(repository, split=split or "train", **what)
    except Exception as error:  # whatever the Hub, the network or the reader of its files raises
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(
            f"is no file here and cannot be had from the Hub ({reason}); give the path of a file, or "
            "owner/name:config:split",
            path=name,
        ) from error
    return [dict(record) for record in found]
