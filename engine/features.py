"""The token store: the frozen tower processes each image once; tokens are kept on the GPU, in memory or in files.

There is one file per image and layer, <cache_dir>/<settings>/<layer>/<2 digits>/<image>.tokens: raw numbers, CRC-32;
<settings> and <image> are hashes. Files are written atomically and named after their content, so any number of
processes may read and write at once, also on a network file system. Reads go directly into the batch and are checked.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from CLIP.adapter_shared import reads_class_token
from CLIP.clip import create_model, uses_quick_gelu
from CLIP.model import CLIP
from CLIP.weights import Weights
from dataset.readers.images import READER, Sample, load_image_with_hash
from dataset.views import JITTER_VIEW, augment_view
from utils import InputError, atomic_path, bar_seconds, blame, prefetch

from . import distributed
from .files.config import Settings

Out = TypeVar("Out")
GPU_SHARE = 0.6  # fraction of the GPU's free memory for tokens: training steps and evaluation need the rest
RAM_SHARE = 0.5  # fraction of the free memory for tokens
# The number of images that pass through the tower, or are scored, together: always exactly that many (see `filled`).
# 8 images keep a CPU busy; a GPU needs more: 64 images are 18,560 tokens for ViT-L-14 at 240 px.
CPU_CHUNK, CUDA_CHUNK = 8, 64
CRC_BYTES = 4
DECODED = 32  # decoded images that are kept for their next view: 22 MB at 240 px


def chunk_size(device: torch.device) -> int:
    """The number of images that pass through the tower, or are scored, together on a device."""
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


def plain_view(item: Sample) -> Sample:
    """The image without augmentation, if the item is one of its views."""
    return replace(item, view=0, jitter=None)


def filled(x: Tensor, size: int) -> Tensor:
    """Pad a tensor (B, ...) to `size` rows by repeating its last row.

    The number of rows decides which matrix kernel runs, and so the last bits of its products. If every call has the
    same shape, no result depends on what else is computed in the same call.
    """
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]) if len(x) < size else x


class TokenStore:
    """Tokens of samples. Call `plan`, then `fill` with the towers of `load_clip`; then `get` returns the tokens.

    Args:
        settings: of a checkpoint; `img_size`, `fidelity`, `features_list` and `visionA` are used.
        weights: the result of `find_weights`.
        autocast: dtype of mixed precision, or None for float32.
        device: where the tower runs and the tokens are used.
        options: command-line options: `cache` (auto, gpu, ram, disk or off; `plan` decides what auto means, and prints
            it), `cache_dir`, `cache_dtype` (auto: the precision in which tokens are computed), `num_workers`
            (threads that decode images while the tower runs).

    Attributes:
        layers: the layers whose tokens are kept, counted from 1, in ascending order.
        class_token: whether adapters read the class token; if not, only the tokens of patches are kept.
        shape: (K, T, C) of one image's tokens.
        folder: the folder of the token files.
        items: the planned images and views of shots; their index is their row.
        missing: the rows that `fill` has to compute.
    """

    def __init__(
        self, settings: Settings, weights: Weights, autocast: torch.dtype | None, device: torch.device,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.settings, self.weights, self.autocast, self.device = settings, weights, autocast, device
        self.cache, self.workers, self.chunk = options.cache, options.num_workers, chunk_size(device)
        named = None if options.cache_dtype == "auto" else getattr(torch, options.cache_dtype)
        self.dtype: torch.dtype = named or autocast or torch.float32
        self.layers = tuple(sorted(settings.features_list))
        self.class_token = reads_class_token(settings.visionA, settings.fidelity == "corrected")
        tokens = int(weights.config.grid(settings.img_size) ** 2) + self.class_token
        self.shape = len(self.layers), tokens, weights.config.width
        description = json.dumps(self._description(), sort_keys=True)
        self.folder = Path(options.cache_dir) / hashlib.sha256(description.encode()).hexdigest()[:16]
        self.items: list[Sample] = []
        self.missing: list[int] = []
        self._rows: dict[Sample, int] = {}
        self._hashes: dict[Sample, str] = {}
        # Decoded images are kept for a while, so that a shot is decoded once for its 16 views.
        self._decode = lru_cache(maxsize=DECODED)(partial(load_image_with_hash, size=settings.img_size))
        # Rows in chunks, which pass through the tower together: of all processes in common, and of this one alone.
        self._common: list[list[int]] = []
        self._own: list[list[int]] = []
        self._resident: Tensor | None = None  # (items, K, T, C), on the GPU or in memory
        self._clip: CLIP | None = None

    def _description(self) -> dict[str, object]:
        """The values that name the folder of files: everything that shapes tokens, except the image and the layer.

        Each layer is a subfolder, so runs that read different layers share the files of those in common.
        """
        config, size, fidelity = self.weights.config, self.settings.img_size, self.settings.fidelity
        return {
            "model": config.name,
            "architecture": config.architecture(),
            "weights_sha256": self.weights.sha256,
            "fidelity": fidelity,  # whether weights are rounded to half, and pixels normalised
            "quick_gelu": uses_quick_gelu(config, self.weights.pretrain, size, fidelity),
            "img_size": size,
            "precision": str(self.autocast or torch.float32),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "reader": READER,
        }

    def content_hash(self, sample: Sample) -> str:
        """Hash of an image's bytes: of those that were decoded or, if none were yet, of the file as it is now."""
        plain = plain_view(sample)
        if plain not in self._hashes:
            self._hashes[plain] = plain.content_hash()
        return self._hashes[plain]

    def plan(self, common: Sequence[Sample], own: Iterable[Sequence[Sample]] = ()) -> None:
        """Decide where the tokens are kept, print that, and read the tokens that files already hold.

        Args:
            common: images and views that every process needs.
            own: batches of images that only this process needs: its share of the evaluations.

        Raises:
            InputError: an image cannot be read, the folder cannot be used, or `cache` is `gpu` without a GPU.
        """
        self._common = self._add(common)
        self._own = [rows for batch in own for rows in self._add(batch)]
        each = math.prod(self.shape) * self.dtype.itemsize
        total = len(self.items) * each
        self.cache = distributed.from_main(choose_cache(self.cache, total, self.folder, self.device))
        if self.cache == "gpu":
            try:
                self._resident = self._allocate()
            except torch.cuda.OutOfMemoryError:
                print(f"tokens: no room for {readable_size(total)} on {self.device}, so in memory", flush=True)
                self.cache = "ram"
        if self.cache == "ram":
            self._resident = self._allocate()
        has_files = self.cache != "off" and self.folder.is_dir()
        if self.cache == "disk":
            with blame(f"--cache_dir {self.folder.parent}", "use --cache ram, or another folder", (OSError,)):
                self.folder.mkdir(parents=True, exist_ok=True)
        loaded = prefetch(self._load, range(len(self.items)), self.workers) if has_files else [False] * len(self.items)
        missing = {row for row, there in enumerate(loaded) if not there}
        # Another run may be writing these files: a common item that one process has not found is missing for all, and
        # none of them writes before all have read.
        shared = {row for rows in self._common for row in rows}
        self.missing = sorted(missing.union(*distributed.all_gather(missing & shared)))
        places = {"gpu": f"kept on {self.device}", "ram": "kept in memory", "disk": f"kept in {self.folder}"}
        print(
            f"tokens: {len(self.items)} images x {readable_size(each)} = {readable_size(total)}, "
            f"{places.get(self.cache, 'computed on every use')}; {len(self.items) - len(self.missing)} computed before",
            flush=True,
        )

    def load_clip(self) -> CLIP:
        """Load the frozen towers, after `plan`; the image tower only if tokens are missing, or with `off`."""
        settings, vision = self.settings, bool(self.missing) or self.cache == "off"
        return create_model(
            self.weights, img_size=settings.img_size, fidelity=settings.fidelity, device=self.device, vision=vision
        )

    def fill(self, clip: CLIP) -> None:
        """Compute the missing tokens, then free the tower; with `off`, the tower is kept and runs on every use instead.

        Several processes divide the common items among themselves. A chunk passes as a whole, even if only one of its
        images is missing, so that tokens are the same bits after an interruption, and for any number of processes.

        Raises:
            InputError: an image cannot be read or has changed meanwhile, or tokens exceed the dtype's range.
        """
        self._clip = clip
        if self.cache == "off":
            return
        missing = set(self.missing)
        common, own = ([rows for rows in chunks if missing & set(rows)] for chunks in (self._common, self._own))
        total = len(missing)
        quiet = not (total and distributed.is_main())
        with tqdm(total=total, desc="tokens", unit="image", mininterval=bar_seconds(), disable=quiet) as bar:
            mine = self._pass(distributed.share(common), missing)
            for _ in range(0, len(common), distributed.world()):
                for rows, tokens in filter(None, distributed.all_gather(next(mine, None))):
                    self._keep(rows, tokens)
                    bar.update(len(rows))
            for rows, tokens in self._pass(own, missing):
                self._keep(rows, tokens)
                bar.update(len(rows))
        self.missing = []
        self._decode.cache_clear()
        clip.visual = None

    def rows(self, items: Sequence[Sample]) -> Tensor:
        """The rows of planned images and views, for `get`: (B,) int64."""
        return torch.tensor([self._rows[item] for item in items], dtype=torch.long, device=self._index_device)

    def get(self, rows: Tensor) -> list[Tensor]:
        """Tokens of B items: K tensors (B, T, C) in ascending order of layer, on the tower's device.

        They are float32, or of the autocast type if they are kept in it: mixed precision would cast them to it anyway.
        Raises an `InputError` if token files are gone or damaged.
        """
        if self.cache == "off":
            layers = self._tokens(self._images(rows.tolist())).unbind(1)
        elif self._resident is not None:
            rows = rows.to(self._index_device)  # `leave_gpu` may have moved the tokens since
            layers = tuple(self._resident[rows, k] for k in range(len(self.layers)))
        else:
            n_layers, *shape = self.shape
            tokens = torch.empty(n_layers, len(rows), *shape, dtype=self.dtype)  # by layer, as returned
            for row, target in zip(rows.tolist(), tokens.unbind(1), strict=True):
                if not self._read(row, target):
                    raise InputError(
                        f"{self.folder}: tokens of {self.items[row].name} are gone or damaged, though they were "
                        f"there at the start (removed by another command?); start again"
                    )
            layers = tokens.unbind()
        layers = tuple(layer.to(self.device, non_blocking=True) for layer in layers)
        return [(x if x.dtype == self.autocast else x.float()).contiguous() for x in layers]

    def with_room(self, action: Callable[[], Out]) -> Out:
        """Call `action` and return its result; if the GPU is out of memory, move the tokens to the host and try again.

        Raises:
            torch.cuda.OutOfMemoryError: the GPU is out of memory without the tokens, too.
        """
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return action()
        self.leave_gpu()  # outside the handler, which keeps the tensors of the failed call alive
        return action()

    def leave_gpu(self) -> None:
        """If the tokens are kept on the GPU, move them to memory and print a note."""
        if self.cache != "gpu" or self._resident is None:
            return
        print("tokens: moved from the GPU to memory, as it has no room for the work beside them", flush=True)
        self._resident, self.cache = self._resident.cpu(), "ram"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self._resident = self._resident.pin_memory()

    @property
    def _index_device(self) -> torch.device:
        return self.device if self.cache == "gpu" else torch.device("cpu")

    def _allocate(self) -> Tensor:
        """An empty tensor for all items, on the GPU or in memory (pinned if a GPU reads it)."""
        pinned = self.cache == "ram" and self.device.type == "cuda"
        shape = (len(self.items), *self.shape)
        return torch.empty(shape, dtype=self.dtype, device=self._index_device, pin_memory=pinned)

    def _add(self, items: Sequence[Sample]) -> list[list[int]]:
        """Give each new item a row; returns these rows, in chunks that pass through the tower together."""
        new = [item for item in dict.fromkeys(items) if item not in self._rows]
        rows = list(range(len(self.items), len(self.items) + len(new)))
        self._rows |= dict(zip(new, rows, strict=True))
        self.items += new
        return [rows[start : start + self.chunk] for start in range(0, len(rows), self.chunk)]

    def _tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) on the CPU -> tokens (B, K, T, C) on the tower's device, chunk by chunk."""
        tokens = [self._chunk_tokens(filled(part, self.chunk))[: len(part)] for part in images.split(self.chunk)]
        return torch.cat(tokens)

    def _chunk_tokens(self, images: Tensor) -> Tensor:
        """One pass of the tower: (chunk, 3, S, S) -> (chunk, K, T, C)."""
        if self.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
        assert self._clip is not None  # `fill` sets it
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            tokens = self._clip.image_tokens(images, self.layers)
        return torch.stack(tokens, dim=1)[:, :, 0 if self.class_token else 1 :]

    def _pass(self, chunks: Sequence[list[int]], missing: set[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yields the missing rows of each chunk, and their tokens (B, K, T, C) in the store's dtype."""
        for chunk, images in zip(chunks, prefetch(self._images, chunks, self.workers), strict=True):
            rows = [row for row in chunk if row in missing]
            tokens = self.with_room(partial(self._tokens, images)).to(self.dtype)
            tokens = tokens[[row in missing for row in chunk]]
            if not bool(tokens.isfinite().all()):
                bad = rows[int(tokens.flatten(1).isfinite().all(dim=1).to(torch.uint8).argmin())]
                raise InputError(
                    f"{self.items[bad].path}: its tokens are not finite in {self.dtype}".replace("torch.", "")
                    + ("; use --cache_dtype float32" if self.dtype != torch.float32 else ", a damaged tower?")
                )
            is_kept_here = self.cache == "gpu" and distributed.world() == 1  # processes exchange them in host memory
            yield rows, tokens if is_kept_here else tokens.cpu()

    def _images(self, rows: Sequence[int]) -> Tensor:
        """The images of a batch (B, 3, S, S); the hash that names each one is of the very bytes that were decoded."""
        images = []
        for row in rows:
            item = self.items[row]
            plain = plain_view(item)
            content, image = self._decode(plain)
            if self._hashes.setdefault(plain, content) != content:
                raise InputError(f"{item.path}: changed while it was read; start again")
            images.append(augment_view(image[None], item.view, item.jitter)[0])
        return torch.stack(images)

    def _keep(self, rows: list[int], tokens: Tensor) -> None:
        """Store the tokens (B, K, T, C) of some rows, on the GPU, in memory or in files."""
        if self._resident is not None:
            self._resident[torch.tensor(rows, device=self._index_device)] = tokens.to(self._index_device)
        if self.cache == "disk":
            for row, image in zip(rows, tokens.cpu(), strict=True):
                for layer, values in zip(self.layers, image, strict=True):
                    data = values.contiguous().view(torch.uint8).numpy().tobytes()
                    with atomic_path(self._path(row, layer), "--cache_dir") as temporary:
                        temporary.write_bytes(data + zlib.crc32(data).to_bytes(CRC_BYTES, "little"))

    def _path(self, row: int, layer: int) -> Path:
        kind, item = "" if self.class_token else "-patches", self.items[row]
        draws = item.jitter if item.view == JITTER_VIEW else None
        words = f"{self.content_hash(item)} {item.view} {draws}"  # identifies the pixels
        key = hashlib.sha256(words.encode()).hexdigest()[:40]
        return self.folder / f"layer{layer}{kind}" / key[:2] / f"{key}.tokens"

    def _read(self, row: int, target: Tensor) -> bool:
        """Read an item's files into (K, T, C) on the CPU; returns False if one is missing or damaged."""
        for layer, values in zip(self.layers, target, strict=True):
            memory = values.flatten().view(torch.uint8).numpy()
            try:
                with self._path(row, layer).open("rb") as file:
                    size, crc = file.readinto(memory.data), file.read(CRC_BYTES + 1)
            except OSError:
                return False
            if size != len(memory) or crc != zlib.crc32(memory.data).to_bytes(CRC_BYTES, "little"):
                return False
        return True

    def _load(self, row: int) -> bool:
        """Whether intact files hold all layers of an item; if the store is resident, they are loaded into it."""
        tokens = torch.empty(self.shape, dtype=self.dtype)
        complete = self._read(row, tokens)
        if complete and self._resident is not None:
            self._resident[row] = tokens.to(self._index_device)
        return complete


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still use, as the machine and its control groups (version 2, e.g. Slurm's) allow.

    Half of all memory if this is not Linux. `root` is the folder of /proc and /sys, which tests replace.
    """
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        rooms = [int(lines["MemAvailable"].split()[0]) * 1024]
        own = (root / "proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for group in (Path(own), *Path(own).parents):  # the limit of each applies
            folder = root / "sys/fs/cgroup" / group
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
                rooms.append(limit - used)
        return max(min(rooms), 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux


def choose_cache(cache: str, need: int, folder: Path, device: torch.device) -> str:
    """Where to keep `need` bytes of tokens: `auto` means the GPU, memory, files or `off`, the first that has room.

    Limits: 60% of the GPU's free memory, half of the machine's, the free disk. `InputError` for `gpu` if none is used.
    """
    if cache == "gpu" and device.type != "cuda":
        raise InputError("--cache gpu: no CUDA device is used; choose ram, disk or auto")
    if cache != "auto":
        return cache
    if device.type == "cuda" and need <= torch.cuda.mem_get_info(device)[0] * GPU_SHARE:
        return "gpu"
    if need * distributed.world() <= free_memory() * RAM_SHARE:  # the processes of a machine share its memory
        return "ram"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return "disk" if need < shutil.disk_usage(there).free else "off"


def readable_size(size: float) -> str:
    """A number of bytes with a unit, such as 2.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
