"""Fetch the paper's data sets, unpack and check them.

    python -m dataset.download Brain Liver --out data         from BMAD's archive of all six; resumes, checks SHA-256
    python -m dataset.download all --archive bmad.zip         from a local archive, also MVFA's .tar.gz

Each becomes <out>/<name>_AD. URL and SHA-256 are those in anomalib 2.6; the URL was unreachable during development.
"""

import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from tqdm import tqdm

from utils import EXPECTED, InputError, Parser, bar_seconds, blame, download, run_cli

from . import check
from .layout import BENCHMARKS
from .pairing import is_clutter
from .writer import new_folder

URL = "https://huggingface.co/datasets/code-dev05/BMAD/resolve/main/bmad.zip"
SHA256 = "df655def31f3f638a91c567550de54d6e45a74b2368f666c13a6a3052c063165"
LICENCE = (
    "BMAD, CC BY-NC-SA 4.0: not for commercial use; docs/data.md names its sources. Cite Bao et al., CVPRW (2024)."
)
DAMAGE = (*EXPECTED, zipfile.BadZipFile, tarfile.TarError, zlib.error, RuntimeError, NotImplementedError)
LARGEST_RATIO = 100  # unpacked to packed size: pictures are compressed already, so a higher ratio is no data set


def files_of(obj: str, archive: Path, members: Mapping[str, tuple[int, Any]]) -> dict[str, tuple[int, Any]]:
    """A data set's files in an archive: path below the data set's folder -> (unpacked bytes, entry of the archive).

    The folder has the data set's name, with or without _AD, or just holds the splits if no folder is named like one of
    the six. Raises `InputError` if a path leads out of it, there are no files, or the unpacked size is too large.
    """
    is_named = any(re.search(rf"(?i)(^|/)({'|'.join(BENCHMARKS)})(_AD)?/", name) for name in members)
    inside = rf"(?i)(?:^|/){obj}(?:_AD)?/(.+)" if is_named else "(?i)(?:^|/)((?:train|valid|val|test)/.+)"
    matches = ((re.search(inside, name), member) for name, member in members.items() if not is_clutter(name))
    result = {match[1]: member for match, member in matches if match}
    if unsafe := [path for path in map(PurePosixPath, result) if path.is_absolute() or ".." in path.parts]:
        raise InputError(f"{archive}: {unsafe[0]} leads out of its folder")
    if not result:
        raise InputError(f"{archive}: no files of {obj} in it")
    if sum(size for size, _ in result.values()) > LARGEST_RATIO * archive.stat().st_size:
        raise InputError(f"{archive}: unpacks to more than {LARGEST_RATIO} times its size: no archive of pictures")
    return result


def unpack(archive: Path, obj: str, root: Path) -> None:
    """Unpack only one data set's files from a .zip or .tar into `root`, which appears when all are unpacked."""
    is_zip = zipfile.is_zipfile(archive)
    opener: Any = zipfile.ZipFile if is_zip else tarfile.open
    with blame(archive, errors=DAMAGE), opener(archive) as packed, new_folder(root, "--out") as folder:
        if is_zip:
            members = {entry.filename: (entry.file_size, entry) for entry in packed.infolist() if not entry.is_dir()}
        else:
            members = {entry.name: (entry.size, entry) for entry in packed if entry.isfile()}
        files, read = files_of(obj, archive, members), packed.open if is_zip else packed.extractfile
        check_room(root.parent, sum(size for size, _ in files.values()), f"{obj}, unpacked")
        for path, (_, entry) in tqdm(files.items(), obj, unit="file", mininterval=bar_seconds(), disable=None):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with read(entry) as source:
                (folder / path).write_bytes(source.read())


def check_room(folder: Path, needed: int, what: str) -> None:
    """Print the required and the free disk space; raises `InputError` if there is too little."""
    free = shutil.disk_usage(folder).free
    print(f"{what}: {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free in {folder}", flush=True)
    if needed > free:
        raise InputError(f"--out {folder}: {what} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def fetch(out: Path) -> Path:
    """The path of BMAD's archive in `out`, downloaded, or resumed, if it is missing or incomplete."""
    archive = out / URL.rpartition("/")[2]
    if not archive.exists():
        with blame(f"--out {out}, from {URL}", "docs/data.md names other ways", (OSError,)):
            out.mkdir(parents=True, exist_ok=True)
            size = int(requests.head(URL, allow_redirects=True, timeout=30).headers.get("Content-Length", 0))
        have = sum(part.stat().st_size for part in out.glob(f"{archive.name}.part"))
        what = f"{archive.name} (unpacking all six needs the same again)"
        check_room(out, max(size - have, 0), what)
    download(URL, archive, SHA256)
    return archive


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of `dataset.check`."""
    parser = Parser(prog="python -m dataset.download", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("obj", nargs="+", choices=[*BENCHMARKS, "all"], metavar="OBJ", help=f"{', '.join(BENCHMARKS)}; all")
    add("--out", type=Path, default=Path("data"), help="folder for <obj>_AD (default: data)")
    add("--archive", type=Path, metavar="FILE", help="an archive that you have: BMAD's .zip, MVFA's .tar.gz")
    options = parser.parse_args(argv)
    names = list(BENCHMARKS if "all" in options.obj else dict.fromkeys(options.obj))
    if there := [name for name in names if (options.out / f"{name}_AD").exists()]:
        raise InputError(f"--out {options.out}: {there[0]}_AD is there already; move it away, or leave {there[0]} out")
    print(LICENCE, flush=True)
    archive = options.archive or fetch(options.out)
    for name in names:
        unpack(archive, name, options.out / f"{name}_AD")
    return max(check.main(["--obj", name, "--data_path", str(options.out)]) for name in names)


if __name__ == "__main__":
    run_cli(main)
