"""The commands shown in README.md and the pages of docs/."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("python", "python3", "make", "pip", "git", "torchrun", "wandb", "cp")
# Words in the comment after a command that no test can run unchanged.
MARK = re.compile(r"\b(needs (weights|data|internet)|slow)\b")


@dataclass(frozen=True)
class DocCommand:
    """A shell command in a code block."""

    page: str
    text: str  # without its comment; continued lines are joined
    mark: str | None  # needs weights, needs data, needs internet or slow; None if a test must run it


def pages() -> list[Path]:
    """README.md, the pages of docs/, and other Markdown files with commands or links."""
    others = ("CONTRIBUTING.md", "THIRD_PARTY_NOTICES.md", "ckpt/README.md", "data/README.md", "CLIP/ckpt/README.md")
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in others)]


def doc_commands() -> Iterator[DocCommand]:
    """Every command in a code block (indented by four spaces), page by page."""
    for path in pages():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if not line.startswith("    ") or line.split()[:1] == [] or line.split()[0] not in PROGRAMS:
                continue
            command, _, comment = line.partition(" #")
            mark = MARK.search(comment)
            yield DocCommand(path.relative_to(ROOT).as_posix(), " ".join(command.split()), mark and mark[1])
