"""The feature store: every image passes the frozen tower once, its tokens are kept and shared by every later run.

python -m engine.features --info          what is stored, and how large
python -m engine.features --prune         free it
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from CLIP import CLIP
from dataset import Sample, load_image
from utils import JITTER_VIEW, InputError, Parser, augment_view, locked, prefetch, run_cli, write_json

from . import distributed

MODES = ("auto", "ram", "disk", "off")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
RECORD = struct.Struct("<32sQI")  # of the index: item key, row number, CRC-32 of the row; then the record's own CRC-32
RECORD_BYTES = RECORD.size + 4


@dataclass(frozen=True)
class Item:
    """One image as the tower sees it: a file, and one of its 16 views."""

    sample: Sample
    view: int = 0
    jitter: tuple[float, float] | None = None  # the draws of the colour-jitter view

    def image(self, size: int) -> Tensor:
        """(3, size, size) in [0, 1]."""
        return augment_view(load_image(self.sample.path, size)[None], self.view, self.jitter)[0]

    def key(self, content_hash: str) -> bytes:
        """32 bytes that stand for the pixels: the file's content, the view and, where it matters, the draws."""
        words = f"{content_hash} {self.view} {self.jitter if self.view == JITTER_VIEW else ''}"
        return hashlib.sha256(words.encode()).digest()


class Backbone:
    """The frozen image tower as a function: images -> the tokens that adapters read.

    Args:
        clip: the frozen towers.
        features_list: layers, counted from 1; tokens come in ascending order of layer.
        class_token: keep the class token (T = L), else only the patches (T = N).
        autocast: dtype of mixed precision, or None for float32.
    """

    def __init__(
        self, clip: CLIP, features_list: Sequence[int], class_token: bool, autocast: torch.dtype | None = None
    ) -> None:
        self.clip = clip
        self.layers = sorted(features_list)
        self.class_token = class_token
        self.autocast = autocast
        count = clip.config.grid(clip.img_size) ** 2 + class_token
        self.shape = (len(self.layers), count, clip.config.width)  # K, T, C of one image

    @property
    def description(self) -> dict[str, object]:
        """All that shapes the numbers, beside the image and the dtype they are kept in."""
        clip = self.clip
        return {
            "model": clip.config.name,
            "weights_sha256": clip.info.sha256 if clip.info else None,
            "half_rounded_weights": clip.half_rounded,
            "img_size": clip.img_size,
            "layers": self.layers,
            "quick_gelu": clip.quick_gelu,
            "normalize_pixels": clip.visual.normalize_pixels,
            "class_token": self.class_token,
            "precision": str(self.autocast or torch.float32),
        }

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) on the CPU -> K tensors (B, T, C) on the tower's device."""
        device = self.clip.device
        images = images.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            tokens = self.clip.image_tokens(images, self.layers)
        return tokens if self.class_token else [layer[:, 1:] for layer in tokens]


class RamRows:
    """Rows kept in memory for this run."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows

    def __getitem__(self, key: bytes) -> Tensor:
        return self.rows[key]

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep rows (B, K, T, C)."""
        self.rows.update(zip(keys, rows.unbind(), strict=True))

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Nothing to guard."""
        yield

    def refresh(self) -> None:
        """Nothing to read."""


class DiskRows:
    """Rows of fixed size in one file, and an append-only index of them.

    A row is written and flushed before its index record, and both carry a CRC-32: a process killed at any moment
    leaves rows without a record (they are overwritten) or a torn record (it is cut off), never a record that lies.
    One process fills at a time (a lock on the folder), any number read.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype, description: dict[str, object]) -> None:
        self.folder = folder
        self.shape, self.dtype = tuple(shape), np.dtype(str(dtype).removeprefix("torch."))
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "meta.json").exists():
            write_json(folder / "meta.json", {**description, "row_bytes": self.row_bytes}, "--cache_dir")
        (folder / "rows.bin").touch()
        (folder / "index.bin").touch()
        self.records: dict[bytes, tuple[int, int]] = {}  # key -> row number, CRC-32
        self.checked: set[bytes] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the records that other processes have added since."""
        self.records, self.good_bytes = read_index(self.folder / "index.bin", self.rows_on_disk)
        self.__dict__.pop("data", None)

    @property
    def rows_on_disk(self) -> int:
        """Whole rows that the file holds."""
        return (self.folder / "rows.bin").stat().st_size // self.row_bytes

    @cached_property
    def data(self) -> np.ndarray:
        """All rows, memory-mapped (copy-on-write, so that torch may wrap them)."""
        return np.memmap(self.folder / "rows.bin", self.dtype, "c", shape=(self.rows_on_disk, *self.shape))

    def __contains__(self, key: bytes) -> bool:
        return key in self.records

    def __getitem__(self, key: bytes) -> Tensor:
        """A row (K, T, C); its bytes are compared with their CRC-32 the first time in a run."""
        row, crc = self.records[key]
        if key not in self.checked:
            if zlib.crc32(self.data[row]) != crc:
                raise InputError(f"{self.folder}: row {row} is damaged; `rm -r {self.folder}` and start again")
            self.checked.add(key)
        return torch.from_numpy(self.data[row])

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Append rows (B, K, T, C) and make them durable, then their records; only inside `filling`."""
        first = 1 + max((row for row, _ in self.records.values()), default=-1)
        blocks = [row.numpy().tobytes() for row in rows]
        records = {key: (first + i, zlib.crc32(block)) for i, (key, block) in enumerate(zip(keys, blocks, strict=True))}
        try:
            with (self.folder / "rows.bin").open("r+b") as file:
                file.seek(first * self.row_bytes)
                file.write(b"".join(blocks))
                file.flush()
                os.fsync(file.fileno())
            with (self.folder / "index.bin").open("r+b") as file:
                file.truncate(self.good_bytes)
                file.seek(self.good_bytes)
                file.write(b"".join(pack_record(key, *record) for key, record in records.items()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"--cache_dir {self.folder.parent}: cannot write ({error.strerror}); what is stored stays usable, "
                f"free some room or use --cache ram"
            ) from error
        self.good_bytes += RECORD_BYTES * len(records)
        self.records.update(records)
        self.checked.update(records)
        self.__dict__.pop("data", None)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Hold the store's lock: wait for another process that fills it, and see what it has added."""
        with locked(self.folder / "lock", f"features: another process is filling {self.folder}; waiting for it"):
            self.refresh()
            yield


def pack_record(key: bytes, row: int, crc: int) -> bytes:
    """One index record, with its own CRC-32."""
    record = RECORD.pack(key, row, crc)
    return record + zlib.crc32(record).to_bytes(4, "little")


def read_index(path: Path, rows: int) -> tuple[dict[bytes, tuple[int, int]], int]:
    """Records up to the first torn one, and how many bytes of the file they fill; rows beyond the data are left out."""
    data = path.read_bytes()
    records, good = {}, 0
    for start in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        record = data[start : start + RECORD.size]
        if zlib.crc32(record).to_bytes(4, "little") != data[start + RECORD.size : start + RECORD_BYTES]:
            break
        key, row, crc = RECORD.unpack(record)
        good = start + RECORD_BYTES
        if row < rows:
            records[key] = (row, crc)
    return records, good


class FeatureStore:
    """Items -> tokens, from the store where they are kept and from the tower where they are not.

    Args:
        backbone: makes the tokens.
        mode: `ram`, `disk`, `off`, or `auto` (see `choose_mode`).
        cache_dir: where `disk` keeps its folders, one for each `Backbone.description` and dtype.
        dtype: of the kept tokens.
        batch_size: images a pass.
        workers: threads that decode images beside the pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        mode: str = "ram",
        cache_dir: str | Path = ".cache/features",
        dtype: str = "float16",
        batch_size: int = 16,
        workers: int = 1,
    ) -> None:
        self.backbone, self.mode, self.dtype = backbone, mode, dtype
        self.batch_size, self.workers = batch_size, workers
        self.description = {**backbone.description, "dtype": dtype}
        name = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]
        self.cache_dir, self.folder = Path(cache_dir), Path(cache_dir) / name
        self.rows: RamRows | DiskRows | None = None
        self.hashes: dict[Path, str] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes that one image takes."""
        return int(np.prod(self.backbone.shape)) * DTYPES[self.dtype].itemsize

    def key(self, item: Item) -> bytes:
        """The item's key; each file is read once a run, so that a changed one is noticed."""
        path = item.sample.path
        if path not in self.hashes:
            self.hashes[path] = item.sample.content_hash()
        return item.key(self.hashes[path])

    def open(self, count: int) -> None:
        """Decide where `count` images are kept, and say so."""
        if self.mode == "auto":  # in memory, every process keeps all of it
            room = choose_mode(count * self.row_bytes * distributed.world(), self.folder)
            self.mode = distributed.from_main(room)
        print(f"features: {count} images x {readable(self.row_bytes)} = {readable(count * self.row_bytes)}, "
              f"kept {describe_mode(self.mode, self.folder)}", flush=True)  # fmt: skip
        if self.mode == "ram":
            self.rows = RamRows()
        elif self.mode == "disk":
            try:
                self.rows = DiskRows(self.folder, self.backbone.shape, DTYPES[self.dtype], self.description)
            except OSError as error:
                raise InputError(f"--cache_dir {self.cache_dir}: cannot be used ({error.strerror})") from error

    def prepare(self, items: Iterable[Item]) -> int:
        """Pass through the tower what is not kept yet.

        Returns:
            How many images passed; 0 with `off`, which computes on every use instead.
        """
        items = {self.key(item): item for item in items}
        if self.rows is None:
            self.open(len(items))
        if self.rows is None or distributed.from_main(all(key in self.rows for key in items)):
            return 0
        with self.rows.filling() if distributed.is_main() else nullcontext():
            missing = distributed.from_main([key for key in items if key not in self.rows])
            batches = [missing[i : i + self.batch_size] for i in range(0, len(missing), self.batch_size)]
            mine = distributed.share(batches)
            images = prefetch(lambda keys: self._images([items[key] for key in keys]), mine, self.workers)
            loaded = zip(mine, images, strict=True)
            quiet = not distributed.is_main()
            with tqdm(total=len(missing), desc="features", unit="image", mininterval=1.0, disable=quiet) as bar:
                for _ in range(0, len(batches), distributed.world()):
                    for keys, rows in self._exchange(list(itertools.islice(loaded, 1))):
                        self.rows.add(keys, rows)
                        bar.update(len(keys))
        distributed.barrier()
        if distributed.world() > 1:
            self.rows.refresh()
        return len(missing)

    def _exchange(self, loaded: list[tuple[list[bytes], Tensor]]) -> Iterator[tuple[list[bytes], Tensor]]:
        """Keys and rows (B, K, T, C) of one batch, and with several processes of the others' as far as they are kept.

        In memory every process keeps all rows; on disk rank 0 writes them.
        """
        found = []
        for keys, images in loaded:  # one, or none in the last round of several processes
            tokens = torch.stack(self.backbone.tokens(images), dim=1)  # (B, K, T, C)
            found.append((keys, tokens.to("cpu", DTYPES[self.dtype])))
        exchange = distributed.all_gather if self.mode == "ram" else distributed.gather
        return itertools.chain(*exchange(found))

    def release_tower(self) -> None:
        """Free the image tower once everything is prepared; with `off` it is still needed and stays."""
        if self.rows is not None:
            self.backbone.clip.visual = None

    def get(self, items: Sequence[Item], places: Sequence[int] | None = None) -> list[Tensor]:
        """Tokens of B prepared items: K tensors (B, T, C), float32, on the tower's device, in ascending layer order.

        `places` picks some of the K layers.
        """
        places = range(self.backbone.shape[0]) if places is None else places
        if self.rows is None:
            layers = self.backbone.tokens(self._images(items))
            return [layers[k].float() for k in places]
        rows = [self.rows[self.key(item)] for item in items]
        device = self.backbone.clip.device
        layers = []
        for k in places:
            layer = torch.stack([row[k] for row in rows])
            if device.type == "cuda":
                layer = layer.pin_memory()
            layers.append(layer.to(device, non_blocking=True).float())
        return layers

    def _images(self, items: Sequence[Item]) -> Tensor:
        images = torch.stack([item.image(self.backbone.clip.img_size) for item in items])
        return images.pin_memory() if self.backbone.clip.device.type == "cuda" else images


def free_memory() -> int:
    """Bytes of memory that can still be used without swapping."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def choose_mode(need: int, folder: Path) -> str:
    """`auto`: disk where this store is there already, else ram up to half of the free memory, else disk, else off."""
    if (folder / "meta.json").exists() and need < free_disk(folder):
        return "disk"
    if need <= free_memory() / 2:
        return "ram"
    return "disk" if need < free_disk(folder) else "off"


def describe_mode(mode: str, folder: Path) -> str:
    """The mode in words, with the room that there is."""
    return {
        "ram": f"in memory ({readable(free_memory())} free)",
        "disk": f"in {folder} ({readable(free_disk(folder))} free)",
        "off": "nowhere: computed on every use (--cache off)",
    }[mode]


def readable(size: float) -> str:
    """Bytes in words: 2.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def stores(cache_dir: Path) -> list[Path]:
    """Folders of `cache_dir` that are stores, by their names too: `prune` deletes them."""
    folders = (path.parent for path in cache_dir.glob("*/meta.json"))
    return sorted(folder for folder in folders if re.fullmatch("[0-9a-f]{16}", folder.name))


def describe(folder: Path) -> str:
    """What a store holds, in words."""
    size = (folder / "rows.bin").stat().st_size
    meta = json.loads((folder / "meta.json").read_text())
    records, _ = read_index(folder / "index.bin", size // meta["row_bytes"])
    return (
        f"{len(records)} images  {readable(size)}  {meta['model']} {meta['img_size']} px  layers {meta['layers']}  "
        f"{meta['dtype']}  weights {str(meta['weights_sha256'])[:12]}"
    )


def info(cache_dir: Path) -> None:
    """Print a line for every store."""
    for folder in stores(cache_dir):
        try:
            words = describe(folder)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            words = "damaged; --prune removes it"
        print(f"{folder}  {words}")
    if not stores(cache_dir):
        print(f"{cache_dir}: no stores")


def prune(cache_dir: Path) -> None:
    """Delete every store that no process is filling."""
    for folder in stores(cache_dir):
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}  in use, kept")
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder)
            print(f"{folder}  {readable(size)} freed")


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m engine.features", description="List or free stored features.")
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache/features"))
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", action="store_true", help="list the stores")
    action.add_argument("--prune", action="store_true", help="delete them")
    options = parser.parse_args()
    (info if options.info else prune)(options.cache_dir)


if __name__ == "__main__":
    run_cli(main)
