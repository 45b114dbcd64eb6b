"""python -m errata.benchmarks.speed [name=value ...]: every fast path against a plain one, in one run.

Writes speed.json after every phase, and speed.md and speed.png at the end, into the folder `out`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.editors.core.errors import ErrataError

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: Sequence[str], console: Console) -> int:
    """Measure; returns the exit code.

    Raises:
        ErrataError: what the user can put right.
    """
    from errata.benchmarks.speed import report, run
    from errata.benchmarks.speed.settings import SpeedConfig
    from errata.editors.core.files.atomic import write_atomically

    if set(arguments) & {"-h", "--help"}:
        console.print((__doc__ or "").strip() + "\n", markup=False, highlight=False)
        for name, value in SpeedConfig().to_dict().items():
            shown = ",".join(value) if isinstance(value, tuple) else value
            console.print(f"  {name}={shown}", markup=False, highlight=False, soft_wrap=True)
        return 0
    config = SpeedConfig.parsed(arguments)
    with console.status("measuring") as status:

        def done(phase: str, results: run.Results) -> None:
            status.update(f"{phase} is measured; {len(config.phases) - len(results['phases'])} phases to go")

        results = run.measure(config, done)
    folder = Path(config.out)
    write_atomically(folder / run.MARKDOWN, report.markdown(results).encode())
    write_atomically(folder / run.PICTURE, report.picture(results))
    console.print(report.table(results))
    console.print(f"{folder / run.JSON}, {run.MARKDOWN}, {run.PICTURE}", markup=False, highlight=False)
    return 0


def command_line() -> int:
    """Entry point; an error that the user can put right is one line."""
    from rich.console import Console
    from rich.text import Text

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return main(sys.argv[1:], Console(width=None if sys.stdout.isatty() else 160))
    except ErrataError as error:
        Console(stderr=True).print(Text(f"error: {error}"), style="red", soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(command_line())
