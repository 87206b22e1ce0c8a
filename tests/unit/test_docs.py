"""README and docs: links, flags and commands are valid; each command is run by a test or marked with its needs."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from docs.generate import parser_of
from engine.files.config import VERSION
from tests.helpers.docs import ROOT, doc_commands, pages

# Commands other than `python ...` (run in order by test_docs_commands.py) and `make ...`.
OTHER_COMMANDS = {"cp -r data/sample/BreastBUSI_AD my_breast"}
# Flags of other programs, and of commands that are not in flags.md (test_documented_commands_parse checks these).
OTHER_FLAGS = {
    *("--debug", "--help", "--nproc_per_node", "--skip-worktree", "--version"),
    *("--archive", "--card", "--check", "--npz", "--size", "--write_list"),
}
PARSED = re.compile(r"python (?!-m docs\.)")  # commands with a parser


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """Text of a page without its comments."""
    return re.sub(r"<!--.*?-->", "", text_of(path), flags=re.DOTALL)


def slug(heading: str) -> str:
    """Anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_flags_and_files_in_docs_exist(page):
    """Linked files and headings, flags and code files that a page names exist."""
    for target in re.findall(r"(?<!!)\[[^]]+]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(file), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose(page)))
    assert page.name == "flags.md" or flags - known_flags() - OTHER_FLAGS == set()
    code = r"\b(?:CLIP|Prompt|dataset|engine|tests|benchmarks|docs)/[\w/]+\.(?:py|json|txt)\b(?!\.\w)"
    assert {name for name in re.findall(code, prose(page)) if not (ROOT / name).is_file()} == set()


def known_flags() -> set[str]:
    """The flags that flags.md lists."""
    rows = re.findall(r"^- ((?:`--[\w-]+`(?:, )?)+)", text_of(ROOT / "docs" / "flags.md"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"--[\w-]+", row)}


def test_flags_md_is_up_to_date():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "from docs.generate import flags; print(flags(), end='')"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert made == text_of(ROOT / "docs" / "flags.md"), "run `make docs`"


def test_documented_commands_are_run_or_marked():
    unmarked = {shown.text for shown in doc_commands() if not shown.mark}
    assert {text for text in unmarked if not text.startswith(("python ", "make "))} == OTHER_COMMANDS


@pytest.mark.parametrize("text", sorted({shown.text for shown in doc_commands() if PARSED.match(shown.text)}))
def test_documented_commands_parse(text: str):
    """Every documented command has valid arguments, including those that no test can run."""
    words = shlex.split(text)[1:]
    name = words.pop(0) if words[0] != "-m" else words.pop(1)
    words = words[1:] if words[:1] == ["-m"] else words
    parser = parser_of(name)
    known, others = parser.parse_known_args(words)
    if name == "reproduce.py":
        parser_of("train.py").parse_args(others)
    else:
        assert others == [], known


def test_version_is_the_same_everywhere():
    versions = {
        "pyproject.toml": re.search(r'^version = "([^"]+)"', text_of(ROOT / "pyproject.toml"), re.MULTILINE)[1],
        "CITATION.cff": re.search(r"^version: (\S+)", text_of(ROOT / "CITATION.cff"), re.MULTILINE)[1],
        "CHANGELOG.md": re.search(r"^## (\d\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[1],
    }
    versions["engine/files/config.py"] = VERSION
    assert len(set(versions.values())) == 1, versions
