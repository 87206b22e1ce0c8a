"""Fetch the paper's data sets, unpack and check them.

    python -m dataset.download Brain Liver --out data         from BMAD's archive of all six: resumes, checks its sum
    python -m dataset.download all --archive bmad.zip         from an archive fetched otherwise, MVFA's .tar.gz too

Each becomes <out>/<name>_AD. The address could not be reached in development: address and sum are those that anomalib
2.6 has, and an archive of the same form was tested.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from utils import EXPECTED, InputError, Parser, bar_seconds, blame, download, printable, run_cli

from . import check
from .layout import BENCHMARKS
from .pairing import is_clutter
from .writer import new_folder

URL = "https://huggingface.co/datasets/code-dev05/BMAD/resolve/main/bmad.zip"
SHA256 = "df655def31f3f638a91c567550de54d6e45a74b2368f666c13a6a3052c063165"
LICENCE = (
    "BMAD: CC BY-NC-SA 4.0, not for commercial use; its sources have terms of their own (docs/data.md). Please cite "
    "Bao et al. BMAD: Benchmarks for Medical Anomaly Detection. CVPR Workshops (2024)."
)
DAMAGE = (*EXPECTED, zipfile.BadZipFile, tarfile.TarError, zlib.error, RuntimeError, NotImplementedError)
LARGEST_RATIO = 100  # unpacked to packed: pictures are compressed already, and what grows more is no data set
Member = tuple[int, Callable[[], IO[bytes] | None]]  # bytes of a file, unpacked, and how to open it


@contextmanager
def opened(archive: Path) -> Iterator[dict[str, Member]]:
    """The files in a .zip or .tar archive by their names; `InputError` where it is none, or damaged."""
    with blame(archive, errors=DAMAGE):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                yield {i.filename: (i.file_size, partial(packed.open, i)) for i in packed.infolist() if not i.is_dir()}
        else:
            with tarfile.open(archive) as tar:
                yield {i.name: (i.size, partial(tar.extractfile, i)) for i in tar if i.isfile()}


def files_of(obj: str, archive: Path, members: Mapping[str, Member]) -> dict[PurePosixPath, Member]:
    """A data set's files, by their paths below its folder.

    Its folder is called as it is, with or without _AD; where none of the six is named, it is the one that holds the
    splits. `InputError` for a path that leads out of the folder, where there is no such file, or more than pictures.
    """
    names = {f"{name}{end}".lower() for name in BENCHMARKS for end in ("", "_ad")}
    paths = {PurePosixPath(name.replace("\\", "/")): member for name, member in members.items()}
    if unsafe := [path for path in paths if path.is_absolute() or ".." in path.parts]:
        raise InputError(f"{archive}: {unsafe[0]} leads out of its folder")
    is_named = any(part.lower() in names for path in paths for part in path.parts)
    tops = {obj.lower(), f"{obj}_ad".lower()} if is_named else {"train", "valid", "val", "test"}
    result = {}
    for path, member in paths.items():
        at = [i for i, part in enumerate(path.parts[:-1]) if part.lower() in tops]
        if at and not is_clutter(path.as_posix()):
            result[PurePosixPath(*path.parts[at[0] + is_named :])] = member
    if not result:
        raise InputError(f"{archive}: no files of {obj} in it")
    if sum(size for size, _ in result.values()) > LARGEST_RATIO * archive.stat().st_size:
        raise InputError(f"{archive}: unpacks to more than {LARGEST_RATIO} times its size: no archive of pictures")
    return result


def unpack(archive: Path, obj: str, root: Path) -> None:
    """Unpack a data set's files alone into `root`, which appears when all of them are there."""
    with opened(archive) as members, new_folder(root, "--out") as folder:
        files = files_of(obj, archive, members)
        check_room(root.parent, sum(size for size, _ in files.values()), f"{obj}, unpacked")
        for path, (_, member) in tqdm(files.items(), obj, unit="file", mininterval=bar_seconds(), disable=None):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if source := member():
                with source, (folder / path).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
    print(printable(f"{root}: unpacked from {archive}"), flush=True)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Say how much room is needed and left; `InputError` where that is too little."""
    free = shutil.disk_usage(folder).free
    print(f"{what}: {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free in {folder}", flush=True)
    if needed > free:
        raise InputError(f"--out {folder}: {what} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def fetch(out: Path) -> Path:
    """BMAD's archive in `out`, downloaded as far as it is not there."""
    import requests  # noqa: PLC0415 - for the few commands that download

    archive = out / URL.rpartition("/")[2]
    if not archive.exists():
        with blame(f"--out {out}", errors=(OSError,)):
            out.mkdir(parents=True, exist_ok=True)
        with blame(URL, "see docs/data.md for other ways", (requests.RequestException,)):
            size = int(requests.head(URL, allow_redirects=True, timeout=30).headers.get("Content-Length", 0))
        part = archive.with_name(f"{archive.name}.part")
        left = max(size - (part.stat().st_size if part.exists() else 0), 0)
        check_room(out, left, f"{archive.name}, which is unpacked beside itself, so all six need that twice")
    download(URL, archive, SHA256)
    return archive


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is the check's."""
    parser = Parser(prog="python -m dataset.download", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("obj", nargs="+", choices=[*BENCHMARKS, "all"], metavar="OBJ", help=f"{', '.join(BENCHMARKS)}; all")
    add("--out", type=Path, default=Path("data"), help="folder for <obj>_AD (default: data)")
    add("--archive", type=Path, metavar="FILE", help="an archive that you have: BMAD's .zip, MVFA's .tar.gz")
    options = parser.parse_args(argv)
    names = list(BENCHMARKS if "all" in options.obj else dict.fromkeys(options.obj))
    for name in names:
        if (options.out / f"{name}_AD").exists():
            raise InputError(f"--out {options.out}: {name}_AD is there already; move it away, or leave {name} out")
    print(LICENCE, flush=True)
    archive = options.archive or fetch(options.out)
    for name in names:
        unpack(archive, name, options.out / f"{name}_AD")
    return max(check.main(["--obj", name, "--data_path", str(options.out)]) for name in names)


if __name__ == "__main__":
    run_cli(main)
