"""Mistakes put into the numerics, one at a time: do the tests notice each?

    python tests/support/mutants.py                 # all of them: a table, and exit code 1 where one survives
    python tests/support/mutants.py clamp fluency   # some

Each mutant is one change of one line, made in a copy of the project. Its tests are those that one would run after
touching the file. They must pass on the untouched copy, and fail on the mutant by an assertion of a test: a mutant that
cannot be imported proves nothing. Reference numbers are left out, unless ERRATA_GOLDEN names them: the tests that need
them then skip, and the others have to notice.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs", "editors", "evaluate", "hparams", "src", "tests")
PYTEST = ("-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file` the text `right`, which stands there once, becomes `wrong`; `tests` must notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "value",
        "editors/core/solve/solvers.py",
        "scale = (keys.double() * U).sum(dim=1, keepdim=True)",
        "scale = (keys.double() * keys.double()).sum(dim=1, keepdim=True).sqrt()",
        ("core/test_solvers.py", "editors/test_editor_laws.py"),
    ),
    Mutant(
        "direction",
        "editors/core/solve/solvers.py",
        "U = K.double() if factor is None else factor.solve(K.T).T.double()",
        "U = K.double()",
        ("core/test_solvers.py", "editors/test_editor_laws.py"),
    ),
    Mutant(
        "weight",
        "editors/core/solve/solvers.py",
        "Y = factor.solve(K).double() / weight",
        "Y = factor.solve(K).double() * weight",
        ("core/test_solvers.py", "editors/test_mass_editing.py"),
    ),
    Mutant(
        "layers",
        "editors/core/families/write_goals.py",
        "left / (len(self.gains) - step) / self.gains[step]",
        "left / len(self.gains) / self.gains[step]",
        ("editors/test_mass_editing.py",),
    ),
    Mutant(
        "null space",
        "editors/core/solve/null_space.py",
        'return inside if self.form == "span" else K - inside',
        'return inside if self.form != "span" else K - inside',
        ("core/test_solvers.py", "editors/test_mass_editing.py"),
    ),
    Mutant(
        "past keys",
        "editors/core/solve/null_space.py",
        "left = left - block @ (block.T @ columns.to(block))",
        "left = left - block @ (block.T @ columns.to(block)) / 2",
        ("core/test_solvers.py", "editors/test_mass_editing.py"),
    ),
    Mutant(
        "clamp",
        "editors/core/families/value_search.py",
        "moved = torch.where(norm > bound, moved * bound / norm, moved)",
        "moved = torch.where(norm > bound, moved * bound / (norm + 1e-3), moved)",
        ("core/test_architectures.py",),
    ),
    Mutant(
        "divergence",
        "editors/core/families/value_search.py",
        "(log_p.exp() * (log_p - reference)).sum(1)",
        "(reference.exp() * (reference - log_p)).sum(1)",
        ("core/test_architectures.py",),
    ),
    Mutant(
        "Adam",
        "editors/core/families/value_search.py",
        "(self.second_moment.sqrt() / (1 - beta2**step) ** 0.5)",
        "(self.second_moment.sqrt() / (1 - beta2**step))",
        ("core/test_architectures.py",),
    ),
    Mutant(
        "sum of patches",
        "editors/core/ledger/arithmetic.py",
        "working = state.dtype if rank == 1 else torch.float64",
        "working = state.dtype",
        ("core/test_ledger.py", "core/test_rollback_laws.py"),
    ),
    Mutant(
        "moments",
        "editors/core/solve/gram.py",
        "square.copy_(square.triu() + square.triu(1).T)",
        "square.copy_(square.triu() + square.triu().T)",
        ("core/test_second_moments.py",),
    ),
    Mutant(
        "padding",
        "editors/core/moments/collect.py",
        "total.add(keys.flatten(0, 1)[real.to(keys.device)])",
        "total.add(keys.flatten(0, 1))",
        ("core/test_second_moments.py",),
    ),
    Mutant(
        "split",
        "editors/core/codebook/codebook.py",
        "radii[near], radii[-1] = d / 2 - min(GAP, d / 4), d / 2",
        "radii[near], radii[-1] = d / 2, d / 2",
        ("core/test_codebook.py", "editors/test_grace.py"),
    ),
    Mutant(
        "deferral",
        "editors/core/codebook/codebook.py",
        "inside = distance <= (self.radii + self.slack)[keys]",
        "inside = distance <= 2 * (self.radii + self.slack)[keys]",
        ("core/test_codebook.py", "editors/test_grace.py"),
    ),
    Mutant(
        "running norm",
        "editors/core/families/hypernetwork.py",
        "deviation = (self.squares / (self.count - 1)).sqrt().to(z.dtype)",
        "deviation = (self.squares / self.count).sqrt().to(z.dtype)",
        ("editors/test_mend.py",),
    ),
    Mutant(
        "nll",
        "evaluate/scoring.py",
        "return sum(nll[want] for want in wants) / len(wants) if wants else None",
        "return sum(nll[want] for want in wants) if wants else None",
        ("evaluate/test_scoring.py", "evaluate/test_metrics.py"),
    ),
    Mutant(
        "fluency",
        "evaluate/collapse.py",
        "return (2 / 3 * _entropy(units, 2) + 4 / 3 * _entropy(units, 3)) / 2",
        "return (4 / 3 * _entropy(units, 2) + 2 / 3 * _entropy(units, 3)) / 2",
        ("evaluate/test_collapse.py",),
    ),
    Mutant(
        "perplexity",
        "evaluate/collapse.py",
        "wanted = batch.ids[:, 1:][read].to(hidden.device)",
        "wanted = batch.ids[:, :-1][read].to(hidden.device)",
        ("evaluate/test_collapse.py",),
    ),
    Mutant(
        "harmonic mean",
        "evaluate/metrics.py",
        "return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)",
        "return 0.0 if min(values) == 0 else sum(values) / len(values)",
        ("evaluate/test_metrics.py",),
    ),
    Mutant(
        "interval",
        "evaluate/intervals.py",
        "low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])",
        "low, high = np.percentile(means, [100 * (1 - confidence), 100 * confidence])",
        ("evaluate/test_metrics.py", "evaluate/test_paired.py"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Of one run of tests: pytest's exit code, the first test that failed, seconds."""

    code: int
    failed: str | None
    seconds: float

    @property
    def is_noticed(self) -> bool:
        """By a test that ran: exit code 1, and no error of collection, which is 2."""
        return self.code == 1 and self.failed is not None


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mistake.

    Raises:
        ValueError: the right text does not stand there exactly once, or is the wrong one.
    """
    if text.count(mutant.right) != 1 or mutant.right == mutant.wrong:
        raise ValueError(
            f"{mutant.name}: expected {mutant.right!r} once in {mutant.file}, found it {text.count(mutant.right)} "
            "times; mend the list of mutants"
        )
    return text.replace(mutant.right, mutant.wrong)


def run(root: Path, tests: tuple[str, ...]) -> Outcome:
    """Run tests of the copy in `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *PYTEST, *(f"tests/{name}" for name in tests)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.search(r"^FAILED \S+?::(\S+)", done.stdout, re.MULTILINE)
    return Outcome(done.returncode, failed[1] if failed else None, time.perf_counter() - started)


def copied(into: Path) -> Path:
    """A copy of the project, links and all, without what was built."""
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", ".venv")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, into / name, symlinks=True, ignore=left)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"):
        shutil.copy2(ROOT / name, into / name)
    return into


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Do the tests notice mistakes in the numerics?")
    parser.add_argument("names", nargs="*", choices=[[], *(mutant.name for mutant in MUTANTS)], help="mutants; all")
    chosen = [mutant for mutant in MUTANTS if not (names := parser.parse_args().names) or mutant.name in names]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder))
        say("| mutant | where | what is wrong | noticed by | seconds |\n|---|---|---|---|---:|")
        untouched: dict[tuple[str, ...], Outcome] = {}
        for mutant in chosen:
            if mutant.tests not in untouched:
                untouched[mutant.tests] = run(root, mutant.tests)
                if untouched[mutant.tests].code != 0:
                    say(f"{', '.join(mutant.tests)} do not pass without a mistake")
                    return 2
            path = root / mutant.file
            right = path.read_text(encoding="utf-8")
            path.write_text(mutated(mutant, right), encoding="utf-8")
            found = run(root, mutant.tests)
            path.write_text(right, encoding="utf-8")
            survived += not found.is_noticed
            by = found.failed if found.is_noticed else f"NO TEST (pytest ended with {found.code})"
            wrong = f"`{mutant.right}` -> `{mutant.wrong}`".replace("|", "\\|")
            say(f"| {mutant.name} | {mutant.file} | {wrong} | {by} | {found.seconds:.0f} |")
    say(f"{len(chosen) - survived} of {len(chosen)} noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
