"""The commands that README.md and the pages of docs/ show."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("python", "python3", "make", "pip", "git", "torchrun", "wandb", "cp")
# What a comment behind a command says where no test can run it as it stands.
MARK = re.compile(r"\b(needs (weights|data|internet)|slow)\b")


@dataclass(frozen=True)
class DocCommand:
    """A line of a code block that is typed into a shell."""

    page: str
    text: str  # without the comment, continued lines joined
    mark: str | None  # needs weights, needs data, needs internet, slow; None where a test must run it


def pages() -> list[Path]:
    """README.md, the pages of docs/, and the README of each folder."""
    others = ("CONTRIBUTING.md", "THIRD_PARTY_NOTICES.md", "ckpt/README.md", "data/README.md", "CLIP/ckpt/README.md")
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in others)]


def doc_commands() -> Iterator[DocCommand]:
    """Every command in a code block (indented by four blanks), page by page."""
    for path in pages():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if not line.startswith("    ") or line.split()[:1] == [] or line.split()[0] not in PROGRAMS:
                continue
            command, _, comment = line.partition(" #")
            mark = MARK.search(comment)
            yield DocCommand(path.relative_to(ROOT).as_posix(), " ".join(command.split()), mark and mark[1])
