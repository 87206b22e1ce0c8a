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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

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


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int  # bytes, unpacked
    open: Callable[[], IO[bytes] | None]


@contextmanager
def opened(archive: Path) -> Iterator[list[Member]]:
    """The files in a .zip or .tar archive; `InputError` where it is none, or damaged."""
    with blame(archive, errors=DAMAGE):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                infos = [info for info in packed.infolist() if not info.is_dir()]
                yield [Member(i.filename, i.file_size, lambda i=i: packed.open(i)) for i in infos]  # type: ignore[misc]
        else:
            with tarfile.open(archive) as tar:
                files = [info for info in tar if info.isfile()]
                yield [Member(i.name, i.size, lambda i=i: tar.extractfile(i)) for i in files]  # type: ignore[misc]


def members_of(obj: str, members: Sequence[Member]) -> dict[PurePosixPath, Member]:
    """A data set's files, by their paths below its folder.

    Its folder is called as it is, with or without _AD; where none of the six is named, it is the one that holds the
    splits. `InputError` for a path that leads out of the archive's folders, and where there is no such file.
    """
    names = {f"{name}{end}".lower() for name in BENCHMARKS for end in ("", "_ad")}
    paths = {PurePosixPath(member.name.replace("\\", "/")): member for member in members}
    if unsafe := [path for path in paths if path.is_absolute() or ".." in path.parts]:
        raise InputError(f"{unsafe[0]}: leads out of the archive's folder")
    is_named = any(part.lower() in names for path in paths for part in path.parts)
    wanted = {obj.lower(), f"{obj}_ad".lower()} if is_named else {"train", "valid", "val", "test"}
    result = {}
    for path, member in paths.items():
        at = next((i for i, part in enumerate(path.parts[:-1]) if part.lower() in wanted), None)
        is_hidden = is_clutter(path.as_posix()) or any(part.startswith(".") for part in path.parts)
        if at is not None and not is_hidden:
            result[PurePosixPath(*path.parts[at + is_named :])] = member
    if not result:
        raise InputError(f"no files of {obj} in it")
    return result


def unpack(archive: Path, obj: str, root: Path) -> None:
    """Unpack a data set's files alone into `root`, which appears when all of them are there."""
    with opened(archive) as members:
        files = members_of(obj, members)
        needed = sum(member.size for member in files.values())
        with new_folder(root, "--out") as folder:
            check_room(root.parent, needed, f"{obj}, unpacked")
            bar = tqdm(files.items(), obj, unit="file", mininterval=bar_seconds(), disable=None)
            for path, member in bar:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                if source is not None:
                    with source, (folder / path).open("wb") as target:
                        shutil.copyfileobj(source, target, 2**20)


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
        out.mkdir(parents=True, exist_ok=True)
        with blame(URL, "see docs/data.md for other ways", (requests.RequestException,)):
            size = requests.head(URL, allow_redirects=True, timeout=30).headers.get("Content-Length", "0")
        part = archive.with_name(f"{archive.name}.part")
        left = int(size) - (part.stat().st_size if part.exists() else 0)
        check_room(out, max(left, 0), f"{archive.name}, which is unpacked beside itself, so all six need that twice")
    download(URL, archive, SHA256)
    return archive


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is the check's."""
    parser = Parser(prog="python -m dataset.download", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "obj", nargs="+", choices=[*BENCHMARKS, "all"], metavar="OBJ", help=f"{', '.join(BENCHMARKS)}; all"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for <obj>_AD (default: data)")
    parser.add_argument(
        "--archive", type=Path, metavar="FILE", help="an archive that you have: BMAD's .zip, MVFA's .tar.gz"
    )
    options = parser.parse_args(argv)
    names = list(BENCHMARKS if "all" in options.obj else dict.fromkeys(options.obj))
    for name in names:
        if (options.out / f"{name}_AD").exists():
            raise InputError(f"--out {options.out}: {name}_AD is there already; move it away, or leave {name} out")
    print(LICENCE, flush=True)
    archive = options.archive or fetch(options.out)
    for name in names:
        unpack(archive, name, options.out / f"{name}_AD")
        print(printable(f"{options.out / f'{name}_AD'}: unpacked from {archive}"), flush=True)
    return max(check.main(["--obj", name, "--data_path", str(options.out)]) for name in names)


if __name__ == "__main__":
    run_cli(main)
