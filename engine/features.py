"""The token store: every image passes the frozen tower once; its tokens are kept, on the GPU, in memory or in files.

In files, the tokens of an image and a layer are one: <cache_dir>/<what shaped them>/<layer>/<image>.tokens, raw numbers
and their CRC-32. A file appears under its name whole or not at all, and its name says its content, so any number of
processes may read and write at once, on a network file system too. Files are read straight into the batch and checked
at every use, so what changes is noticed; mapping them into memory was not faster (docs/speed.md).
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
GPU_SHARE = 0.6  # of the GPU's free memory that tokens may take: steps and evaluation need the rest
RAM_SHARE = 0.5
# How many images pass the tower, and are scored, together: always exactly so many (see `filled`). A CPU is busy with 8
# images; a GPU wants more at a time: 64 are 18,560 tokens at ViT-L-14, 240 px.
CPU_CHUNK, CUDA_CHUNK = 8, 64
CRC_BYTES = 4
DECODED = 32  # images that are held for their next view: 22 MB at 240 px


def chunk_size(device: torch.device) -> int:
    """How many images pass the tower, and are scored, together on a device."""
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


def plain_view(item: Sample) -> Sample:
    """The image itself, of which an item may be another view."""
    return replace(item, view=0, jitter=None)


def filled(x: Tensor, size: int) -> Tensor:
    """The tensor (B, ...) with its last row repeated until there are `size` rows.

    Matrix kernels are chosen by the number of rows, and so are the last bits of their products. Where every call has
    the same shape, no number depends on what else is computed in the same call (DESIGN: rules of the arithmetic).
    """
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]) if len(x) < size else x


class TokenStore:
    """Samples -> tokens. Call `plan`, then `fill` with the towers (without an image tower where nothing is missing).

    Args:
        settings: of a checkpoint; `img_size`, `fidelity`, `features_list` and `visionA` are read.
        weights: of `find_weights`.
        autocast: dtype of mixed precision, or None for float32.
        device: where the tower runs and the tokens are used.
        options: of the command line: `cache` (auto, gpu, ram, disk or off; `plan` decides what auto means, and prints
            it), `cache_dir`, `cache_dtype` (auto: the precision in which tokens are computed), `num_workers`
            (threads that decode images beside the pass).

    Attributes:
        layers: whose tokens are kept, counted from 1, ascending.
        class_token: whether adapters read it; else the patches' tokens alone are kept.
        shape: K, T, C of one image.
        folder: of the files.
        items: images, and views of shots.
        missing: rows that `fill` has to compute.
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
        # The 16 views of a shot pass after each other: it is decoded once for all of them.
        self._decode = lru_cache(maxsize=DECODED)(partial(load_image_with_hash, size=settings.img_size))
        # Rows in the chunks in which they pass the tower: those that every process needs, and this one's own.
        self._common: list[list[int]] = []
        self._own: list[list[int]] = []
        self._resident: Tensor | None = None  # (items, K, T, C), on the GPU or in memory
        self._clip: CLIP | None = None

    def _description(self) -> dict[str, object]:
        """What names the folder of files: all that shapes tokens beside the image and the layer.

        The layers are folders in it, so runs that read others share the rest.
        """
        config, size, fidelity = self.weights.config, self.settings.img_size, self.settings.fidelity
        return {
            "model": config.name,
            "architecture": config.architecture(),
            "weights_sha256": self.weights.sha256,
            "fidelity": fidelity,  # weights rounded to half or not, pixels normalised or not
            "quick_gelu": uses_quick_gelu(config, self.weights.pretrain, size, fidelity),
            "img_size": size,
            "precision": str(self.autocast or torch.float32),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "reader": READER,
        }

    def content_hash(self, sample: Sample) -> str:
        """What stands for an image's bytes: of those that were decoded, or else, reading the file, of the file now."""
        plain = plain_view(sample)
        if plain not in self._hashes:
            self._hashes[plain] = plain.content_hash()
        return self._hashes[plain]

    def plan(self, common: Sequence[Sample], own: Iterable[Sequence[Sample]] = ()) -> None:
        """Decide where the tokens are kept, print it, and read what files hold already.

        Args:
            common: images and views that every process needs.
            own: batches of those that this process alone needs: its share of evaluations.

        Raises:
            InputError: a file that cannot be read, a folder that cannot be used.
        """
        self._common = self._add(common)
        self._own = [rows for batch in own for rows in self._add(batch)]
        self.missing = list(range(len(self.items)))
        each = math.prod(self.shape) * self.dtype.itemsize
        total = len(self.items) * each
        self.cache = choose_cache(self.cache, total, self.folder, self.device)
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
        if has_files:
            loaded = prefetch(self._load, range(len(self.items)), self.workers)
            self.missing = [row for row, there in enumerate(loaded) if not there]
        places = {"gpu": f"kept on {self.device}", "ram": "kept in memory", "disk": f"kept in {self.folder}"}
        print(
            f"tokens: {len(self.items)} images x {readable_size(each)} = {readable_size(total)}, "
            f"{places.get(self.cache, 'computed on every use')}; {len(self.items) - len(self.missing)} computed before",
            flush=True,
        )
        distributed.all_gather(None)  # no process writes files before all have read what is there

    def load_clip(self) -> CLIP:
        """The frozen towers, after `plan`; without the image tower where all tokens are there."""
        settings, vision = self.settings, bool(self.missing) or self.cache == "off"
        return create_model(
            self.weights, img_size=settings.img_size, fidelity=settings.fidelity, device=self.device, vision=vision
        )

    def fill(self, clip: CLIP) -> None:
        """Pass through the tower what is missing, then free it; `off` keeps it and computes on every use instead.

        Several processes share out the common items. A chunk passes whole, even where only one of its images is
        missing: its tokens are the same bits after an interruption, and for any number of processes.

        Raises:
            InputError: an image that cannot be read or has changed meanwhile, tokens beyond the dtype's range.
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
        """Where planned images and views stand: (B,) int64, for `get`."""
        return torch.tensor([self._rows[item] for item in items], dtype=torch.long, device=self._index_device)

    def get(self, rows: Tensor) -> list[Tensor]:
        """Tokens of B items: K tensors (B, T, C) in ascending order of layer, on the tower's device.

        Float32, or the autocast type where mixed precision would make that of them anyway.
        """
        if self.cache == "off":
            layers = self._tokens(self._images(rows.tolist())).unbind(1)
        elif self._resident is not None:
            rows = rows.to(self._index_device)  # not there any more after `leave_gpu`
            layers = tuple(self._resident[rows, k] for k in range(len(self.layers)))
        else:
            n_layers, *shape = self.shape
            tokens = torch.empty(n_layers, len(rows), *shape, dtype=self.dtype)  # layer by layer, as they are given
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
        """What `action` gives; where the GPU has no room for it beside the tokens, they leave, and it is called again.

        Raises:
            torch.cuda.OutOfMemoryError: no room for it without them either.
        """
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return action()
        self.leave_gpu()  # outside of the handler, which holds the tensors of the call that failed
        return action()

    def leave_gpu(self) -> None:
        """Move tokens that are kept on the GPU to memory, and print that."""
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
        """Room for all items, on the GPU or in memory (pinned where a GPU reads it)."""
        pinned = self.cache == "ram" and self.device.type == "cuda"
        shape = (len(self.items), *self.shape)
        return torch.empty(shape, dtype=self.dtype, device=self._index_device, pin_memory=pinned)

    def _add(self, items: Sequence[Sample]) -> list[list[int]]:
        """Give new items a row; their rows, in chunks of those that pass the tower together."""
        new = [item for item in dict.fromkeys(items) if item not in self._rows]
        rows = list(range(len(self.items), len(self.items) + len(new)))
        self._rows |= dict(zip(new, rows, strict=True))
        self.items += new
        return [rows[start : start + self.chunk] for start in range(0, len(rows), self.chunk)]

    def _tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) on the CPU -> (B, K, T, C) on the tower's device, chunk by chunk."""
        tokens = [self._chunk_tokens(filled(part, self.chunk))[: len(part)] for part in images.split(self.chunk)]
        return torch.cat(tokens)

    def _chunk_tokens(self, images: Tensor) -> Tensor:
        """One pass of the tower: (chunk, 3, S, S) -> (chunk, K, T, C)."""
        if self.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
        assert self._clip is not None  # `fill` keeps it
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            tokens = self._clip.image_tokens(images, self.layers)
        return torch.stack(tokens, dim=1)[:, :, 0 if self.class_token else 1 :]

    def _pass(self, chunks: Sequence[list[int]], missing: set[int]) -> Iterator[tuple[list[int], Tensor]]:
        """The missing rows of each chunk, and their tokens (B, K, T, C) in the store's dtype."""
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
        """The images of a batch (B, 3, S, S), decoded from the very bytes whose hash names them everywhere."""
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
        """Put tokens (B, K, T, C) where they are kept."""
        if self._resident is not None:
            self._resident[torch.tensor(rows, device=self._index_device)] = tokens.to(self._index_device)
        if self.folder.is_dir():  # `plan` made it, or an earlier run
            for row, image in zip(rows, tokens.cpu(), strict=True):
                for layer, values in zip(self.layers, image, strict=True):
                    data = values.contiguous().view(torch.uint8).numpy().tobytes()
                    with atomic_path(self._path(row, layer), "--cache_dir") as temporary:
                        temporary.write_bytes(data + zlib.crc32(data).to_bytes(CRC_BYTES, "little"))

    def _path(self, row: int, layer: int) -> Path:
        kind, item = "" if self.class_token else "-patches", self.items[row]
        draws = item.jitter if item.view == JITTER_VIEW else None
        words = f"{self.content_hash(item)} {item.view} {draws}"  # what stands for the pixels
        key = hashlib.sha256(words.encode()).hexdigest()[:40]
        return self.folder / f"layer{layer}{kind}" / key[:2] / f"{key}.tokens"

    def _read(self, row: int, target: Tensor) -> bool:
        """Read an item's files into (K, T, C) on the CPU; False where one is not there, or damaged."""
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
        """Whether files hold all layers of an item, undamaged; they are read into memory where tokens live there."""
        tokens = torch.empty(self.shape, dtype=self.dtype)
        complete = self._read(row, tokens)
        if complete and self._resident is not None:
            self._resident[row] = tokens.to(self._index_device)
        return complete


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still use: the machine's, and its control groups' (version 2), such as Slurm's.

    `root` is where /proc and /sys are, for tests.
    """
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        rooms = [int(lines["MemAvailable"].split()[0]) * 1024]
        own = (root / "proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for group in (Path(own), *Path(own).parents):  # a limit of any of them holds
            folder = root / "sys/fs/cgroup" / group
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
                rooms.append(limit - used)
        return max(min(rooms), 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux


def choose_cache(cache: str, need: int, folder: Path, device: torch.device) -> str:
    """What `auto` means: the GPU up to 60% of its free memory, else memory up to half of what is free, else files.

    `gpu` without one is refused.
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
    """Bytes with a unit: 2.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
