"""Structure of the project: which packages may import which, and how long scripts and functions may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(
    path for path in ROOT.rglob("*.py")
    if not set(path.relative_to(ROOT).parts) & {"tests", "benchmarks", ".venv", "demo", "runs", "build"}
)  # fmt: skip
# The layers that a layer may import besides itself. Of these only `engine.report` may import `engine`.
ALLOWED = {
    "utils": set(),
    "loss": set(),
    "dataset": {"utils"},
    "CLIP": {"utils"},
    "Prompt": {"CLIP", "utils"},
    "engine": {"CLIP", "Prompt", "dataset", "loss", "utils"},
    "engine.report": {"engine", "CLIP", "Prompt", "dataset", "loss", "utils"},
}


def layer(parts: tuple[str, ...]) -> str:
    return "engine.report" if parts[:2] == ("engine", "report") else parts[0]


def modules(path: Path) -> set[Path]:
    """The files of this project that a file imports, at any level; names from a package count as its __init__.py."""
    package, result = path.relative_to(ROOT).with_suffix("").parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            module = (*base, *node.module.split(".")) if node.module else base
            names = [(*module, alias.name) for alias in node.names]
        for name in names:
            for end in (name, name[:-1]):  # a module, or a name in a module
                places = (ROOT.joinpath(*end).with_suffix(".py"), ROOT.joinpath(*end, "__init__.py"))
                if end and (found := next((place for place in places if place.is_file()), None)):
                    result.add(found)
                    break
    return result - {path}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_of_imports_and_length_of_functions(path):
    own = layer(path.relative_to(ROOT).with_suffix("").parts)
    layers = {layer(other.relative_to(ROOT).with_suffix("").parts) for other in modules(path)}
    assert own not in ALLOWED or layers <= ALLOWED[own] | {own}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"


def test_no_import_cycles():
    """Imports inside functions and for type checking count, too."""
    graph = {path: modules(path) & set(PRODUCT) for path in PRODUCT}
    while True:
        imported_by_some = set().union(*graph.values())
        kept = {path: others & graph.keys() for path, others in graph.items() if path in imported_by_some}
        kept = {path: others for path, others in kept.items() if others}
        if kept == graph:
            break
        graph = kept
    assert [str(path.relative_to(ROOT)) for path in graph] == []


@pytest.mark.parametrize(("name", "most"), [("train.py", 200), ("test.py", 120)])
def test_scripts_are_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


@pytest.mark.parametrize(
    "words", [["train.py"], ["test.py"], ["predict.py"], ["reproduce.py"], ["-m", "dataset.check"]]
)
def test_help_imports_no_slow_modules(words):
    """--help is fast: slow modules are only imported after the flags are parsed."""
    command = [sys.executable, "-X", "importtime", *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"torch", "sklearn", "wandb", "matplotlib", "scipy"} & imported
    assert "usage" in done.stdout
