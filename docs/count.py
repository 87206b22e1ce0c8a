"""Lines of code and words of docs beside their limits: python -m docs.count."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"product": 8800, "tests": 9500, "benchmarks": 800, "docs": 9000}  # lines; for docs and README, words


def tracked(pattern: str) -> list[Path]:
    """The files of the project that match `pattern`, including new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(ROOT / name for name in set(names) if (ROOT / name).is_file())


def parts() -> dict[str, list[Path]]:
    """The files of each part of the project: product, tests, benchmarks, docs."""
    files: dict[str, list[Path]] = {"product": [], "tests": [], "benchmarks": []}
    for path in tracked("*.py"):
        top = path.relative_to(ROOT).parts[0]
        files[top if top in files else "product"].append(path)
    return {**files, "docs": [ROOT / "README.md", *tracked("docs/*.md")]}


def size(path: Path) -> int:
    """The number of lines of a code file, or of words of a page."""
    text = path.read_text(encoding="utf-8")
    return len(text.splitlines()) if path.suffix == ".py" else len(text.split())


if __name__ == "__main__":
    for part, files in parts().items():
        unit = "words" if part == "docs" else "lines"
        print(f"{part:11}{sum(map(size, files)):>7,} of {LIMITS[part]:,} {unit}")
