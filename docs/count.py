"""Lines of code and words of docs beside their limits: python -m docs.count."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"product": 8800, "tests": 9500, "benchmarks": 800, "docs": 9000}  # lines; of docs and README words


def tracked(pattern: str) -> list[Path]:
    """The files of the project that match, also new ones that git is not told to ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(ROOT / name for name in set(names) if (ROOT / name).is_file())


def parts() -> dict[str, list[Path]]:
    """The files of each part of the house: product, tests, benchmarks, docs."""
    files: dict[str, list[Path]] = {"product": [], "tests": [], "benchmarks": []}
    for path in tracked("*.py"):
        top = path.relative_to(ROOT).parts[0]
        files[top if top in files else "product"].append(path)
    return {**files, "docs": [ROOT / "README.md", *tracked("docs/*.md")]}


def size(path: Path) -> int:
    """Lines of a file of code, words of a page."""
    text = path.read_text(encoding="utf-8")
    return len(text.splitlines()) if path.suffix == ".py" else len(text.split())


def told(path: Path) -> int:
    """Lines of docstrings and of comments that stand alone."""
    text = path.read_text(encoding="utf-8")
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, owners) and ast.get_docstring(node)]
    lines = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            lines.add(token.start[0])
    return len(lines)


if __name__ == "__main__":
    for part, files in parts().items():
        total, unit = sum(map(size, files)), "words" if part == "docs" else "lines"
        share = "" if part == "docs" else f", {sum(map(told, files)) / total:.0%} docstrings and comments"
        print(f"{part:11}{total:>7,} of {LIMITS[part]:,} {unit}{share}")
