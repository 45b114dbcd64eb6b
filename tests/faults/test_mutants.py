"""The list of mistakes that mutants.py puts into the numerics fits the code as it stands."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_changes_one_place_of_code_that_still_compiles(mutant: mutants.Mutant) -> None:
    changed = mutants.mutated(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
    compile(changed, mutant.file, "exec")
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests)


def test_a_mutant_that_no_longer_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="mend the list"):
        mutants.mutated(mutants.MUTANTS[0], "x = 1\n")


@pytest.mark.slow
def test_a_mistake_that_changes_nothing_is_not_noticed_and_one_that_does_is(tmp_path: Path) -> None:
    root = mutants.copied(tmp_path)
    assert mutants.run(root, ("evaluate/test_paired.py",)).code == 0
    path = root / "evaluate" / "paired.py"
    right = path.read_text(encoding="utf-8")
    path.write_text(right + "\n# nothing\n", encoding="utf-8")
    assert not mutants.run(root, ("evaluate/test_paired.py",)).is_noticed
    path.write_text(right.replace("second[finite] - first[finite]", "first[finite] - second[finite]"), encoding="utf-8")
    assert mutants.run(root, ("evaluate/test_paired.py",)).is_noticed
    path.write_text("import nothing_that_exists\n" + right, encoding="utf-8")
    assert not mutants.run(root, ("evaluate/test_paired.py",)).is_noticed
