"""The README's pictures are there, and small."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_pictures_of_the_readme():
    shown = re.findall(r"!\[[^]]+]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) >= 4
    assert {Path(name) for name in shown} == {path.relative_to(ROOT) for path in (ROOT / "docs").iterdir()}
    for name in shown:
        assert (ROOT / name).stat().st_size < 400_000
        with Image.open(ROOT / name) as picture:
            picture.load()
