"""Writes runs whose names and ids try to get out of their folder, and notes every file that is written:

    main(FOLDER, TRIALS, is_control=False)

It watches its whole process, so it needs one of its own (forked.py).
A trial takes one hostile text for everything that a user or a dataset can name. An audit hook sees whatever the process
opens to write, makes, renames or removes. With `is_control` names are taken as they are: writes outside must be found.

Prints one JSON line: {"trials", "written", "outside", "examples", "refused", "kinds": {kind of text: trials}}.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from errata.benchmarks.runs import run_folder, run_status
from errata.benchmarks.runs.run_folder import CURVE, RECORDS, RESULTS, RunFolder
from errata.benchmarks.runs.sweeps import Sweep
from errata.editors.core.errors import ConfigError, ErrataError
from errata.editors.core.files import atomic
from errata.editors.core.storage.journal import Journal

PIECES = (
    "..",
    "../",
    "/",
    "\\",
    "\x00",
    "~",
    ".",
    "a",
    "ü",
    "\u202e",
    "\u2215",
    "\uff0f",
    "：",
    "%2e%2e%2f",
    "\n",
    " ",
    "CON",
)
# What an audit hook is told of that changes the disk, and which of its arguments are paths.
EVENTS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1}


class Watch:
    """Every path that was written, while it is on."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._add(arguments[0])
        elif event in EVENTS:
            for path in arguments[: EVENTS[event]]:
                self._add(path)

    def _add(self, path: Any) -> None:
        with suppress(ValueError):  # of a NUL in it nothing is made
            self.on = False
            self.paths.append(os.path.realpath(os.fsdecode(path)))
        self.on = True


def texts(rng: random.Random, outside: Path) -> dict[str, Callable[[], str]]:
    """Hostile texts by kind."""
    return {
        "climbing": lambda: "../" * rng.randrange(1, 9) + "outside/x",
        "absolute": lambda: f"{outside}/{rng.randrange(99)}",
        "nul": lambda: f"a\x00{outside}/b",
        "long": lambda: rng.choice(("x", "ü", "../")) * 300,
        "unicode": lambda: "".join(
            chr(rng.choice((rng.randrange(1, 0xD7FF), 0x2044))) for _ in range(rng.randrange(1, 40))
        ),
        "pieces": lambda: "".join(rng.choice(PIECES) for _ in range(rng.randrange(12))),
        "link": lambda: f"link/{rng.randrange(99)}",
        "linked folder": lambda: f"plain {rng.random()}",
        "linked file": lambda: f"plain {rng.random()}",
    }


def carry_out(out: Path, text: str, place: int, prepare: Callable[[RunFolder], None]) -> None:
    """What a run, a sweep and a report write, with the text wherever one can be given."""
    folder = RunFolder.at(out, text, {"place": place, "text": text})
    prepare(folder)
    names: dict[str, str] = dict.fromkeys(("editor", "model", "dataset", "protocol"), text)
    with folder.opened(), run_status.marked(folder, command=text, names=names, edits=1):
        folder.append(RECORDS, {"case": text, "request": {"id": text, "prompt": text}})
        folder.keep("before.json", lambda: {text: text})
        folder.write_json(RESULTS, {"names": names, "schema_version": 1})
        folder.write_json(CURVE, [])
        with suppress(ValueError):
            folder.write_text(text, "x")
        Journal.open(folder.path / "journal", {"name": text})
        folder.finish()
    Sweep.begin(out, text, [[f"editor={text}", str(place)]]).fail(0, ConfigError(text))
    atomic.write_atomically(out / f"{run_folder.slug(text)}-scores.png", b"x")


def preparing(kind: str, outside: Path) -> Callable[[RunFolder], None]:
    """Lays the links of a trial."""

    def prepare(folder: RunFolder) -> None:
        if kind == "linked folder":
            folder.path.symlink_to(outside, target_is_directory=True)
        elif kind == "linked file":
            folder.path.mkdir()
            (folder.path / RECORDS).symlink_to(outside / "records")

    return prepare


def main(base: Path, trials: int, *, is_control: bool) -> None:
    base = base.resolve()
    out, outside, rng = base.joinpath(*"abcdefgh", "out"), base / "outside", random.Random(0)
    for folder in (out, outside):
        folder.mkdir(parents=True)
    (out / "link").symlink_to(outside, target_is_directory=True)
    if is_control:
        run_folder.slug = lambda text, *_: text  # type: ignore[assignment]
        RunFolder._refuse_links = lambda _: None  # type: ignore[method-assign]
        RunFolder.file = lambda self, name: self.path / name  # type: ignore[method-assign]
    os.fsync = lambda _: None  # nothing here depends on a disk that keeps its promises
    watch, kinds, refused = Watch(), Counter[str](), 0
    sources = list(texts(rng, outside).items())
    for trial in range(trials):
        kind, source = sources[trial % len(sources)]
        prepare = preparing(kind, outside)
        try:
            carry_out(out, source(), trial, watched(prepare, watch))
        except (ErrataError, OSError, ValueError):
            refused += 1
        watch.on = False
        kinds[kind] += 1
    escaped = [path for path in watch.paths if not path.startswith(f"{out}/") and path != str(out)]
    found = {"trials": trials, "written": len(watch.paths), "outside": len(escaped), "examples": escaped[:3]}
    sys.stdout.write(json.dumps({**found, "refused": refused, "kinds": kinds}) + "\n")


def watched(prepare: Callable[[RunFolder], None], watch: Watch) -> Callable[[RunFolder], None]:
    """The links are the trial's own doing; what comes after them is not."""

    def then_watch(folder: RunFolder) -> None:
        prepare(folder)
        watch.on = True

    return then_watch
