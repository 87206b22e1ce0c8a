"""The list of mutants follows the code; killing them is `make mutants`' work."""

from __future__ import annotations

from pathlib import Path

from benchmarks import mutants
from benchmarks.mutants import MUTANTS, ROOT, Mutant, try_mutant


def test_every_mutant_fits_and_names_tests():
    assert len(MUTANTS) >= 25
    assert [str(mutant) for mutant in MUTANTS if not mutant.fits(ROOT)] == []
    assert {test for mutant in MUTANTS for test in mutant.tests if not (ROOT / test).is_file()} == set()
    assert all(mutant.old != mutant.new for mutant in MUTANTS)


def test_what_becomes_of_a_mutant(tmp_path: Path, monkeypatch):
    """Killed where a test fails, survived where none does; the file is as before, and doubtful cases are no kills."""
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sums.py").write_text("from sums import add\n\ndef test_add():\n    assert add(2, 2) == 4\n")
    monkeypatch.setattr(mutants, "SECONDS", 120)

    def outcome(old: str, new: str, test: str = "test_sums.py") -> str:
        result = try_mutant(Mutant("sums.py", old, new, (test,)), tmp_path)
        assert (tmp_path / "sums.py").read_text() == "def add(a, b):\n    return a + b\n"
        return result

    assert outcome("a + b", "a - b") == "killed"
    assert outcome("a + b", "a * b") == "SURVIVED"
    assert outcome("a + b", "a +").startswith("NO TEST RAN")  # a syntax error shows nothing
    assert outcome("a % b", "a - b") == "NO LONGER FITS"
    assert outcome("a + b", "a - b", "test_elsewhere.py").startswith("NO TEST RAN")
