"""Write a data set as PNG files in the standard layout, <split>/{good,Ungood}/{img,anomaly_mask}/NAME."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from PIL import Image

from utils import InputError, blame

from .layout import SPLITS

FOLDERS = ("good", "Ungood")  # of the labels 0 and 1
SHOTS = (1, 2, 4, 8, 16)


@contextmanager
def new_folder(root: Path, flag: str) -> Iterator[Path]:
    """A temporary folder that becomes `root` when the block succeeds, so that `root` is never incomplete.

    Raises:
        InputError: `root` exists and is not empty, or cannot be written; the message names `flag` and `root`.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{flag} {root}: it is there already and not empty; remove it or name another folder")
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    try:
        with blame(f"{flag} {root}", errors=(OSError,)):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(root)  # also if `root` is an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Writer:
    """Writes images below `root`; `names` lists the files of each (split, label) in the order written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[tuple[str, int], list[str]] = {key: [] for key in product(SPLITS, (0, 1))}
        for split, label in self.names:
            (root / split / FOLDERS[label] / "img").mkdir(parents=True, exist_ok=True)

    def add(self, split: str, label: int, name: str, image: Image.Image, mask: Image.Image | None = None) -> None:
        """Write an image and its mask as `name`.png; raises `OSError` if that fails."""
        folder, file = self.root / split / FOLDERS[label], f"{name}.png"
        image.save(folder / "img" / file)
        if mask is not None:
            (folder / "anomaly_mask").mkdir(exist_ok=True)
            mask.save(folder / "anomaly_mask" / file)
        self.names[split, label].append(file)

    def write_lists(self, normal: Sequence[str], abnormal: Sequence[str]) -> None:
        """Write a few-shot list for each number in `SHOTS` that both classes reach, each extending the previous one."""
        lists = self.root / "fewshot_seed"
        lists.mkdir(exist_ok=True)
        for shot in (shot for shot in SHOTS if shot <= min(len(normal), len(abnormal))):
            lines = f"a-0: {' '.join(abnormal[:shot])}\nn-0: {' '.join(normal[:shot])}\n"
            (lists / f"my{shot}-shot.txt").write_text(lines, encoding="utf-8")

    def counts(self) -> str:
        """The numbers of images, in words."""
        return "; ".join(
            f"{split} {len(self.names[split, 0])} normal, {len(self.names[split, 1])} abnormal" for split in SPLITS
        )
