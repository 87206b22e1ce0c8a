"""What prediction shows of an image: files beside its row (overlay, heat map, contours) and its card of the page."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dataset.readers import stem
from utils import atomic_path, printable

from ..heat_volumes import DicomHeat, NiftiHeat
from ..scans import MARK, Entry, OpenImage
from .images import contours, overlay, raw, shrink
from .page import MAX_CARDS, Card, make_card, write

if TYPE_CHECKING:
    from ..predictor import Prediction, Predictor

NAME_BYTES = 150  # of a picture's name, without what is added; a file system takes 255, and many a cloud fewer
LETTERS = 256  # pixels of an overlay's longer side from which letters can be read


class Drawer:
    """Writes the pictures of an image; `files` and `card` are called by threads."""

    def __init__(self, options: argparse.Namespace, model: Predictor) -> None:
        self.out, self.model, self.options = Path(options.out), model, options
        self.names: set[str] = set()
        self.volumes: dict[str, NiftiHeat | DicomHeat] = {}
        self.volume_names: dict[str, str] = {}  # by series: that of its first image
        self._lock = Lock()

    def files(self, opened: OpenImage, prediction: Prediction, name: str) -> dict[str, Any]:
        """Write an image's pictures, called by `name`: the columns that name them."""
        entry, options = opened.entry, self.options
        if not options.pictures or opened.preview is None:
            return {}
        columns = self.draw(name, opened.preview, prediction, entry.slice.edges)
        if options.volumes:
            columns["heat_volume"] = self.add_to_volume(entry, prediction.heat)
        return columns

    def card(self, entry: Entry, preview: Image.Image | None, prediction: Prediction) -> Card | None:
        """The image's part of the page."""
        if not self.options.report:
            return None
        index = "" if entry.frame.index is None else f"#{entry.frame.index}"
        name = (entry.file if entry.hidden else printable(entry.place)) + index
        group = entry.word(entry.title) if entry.count > 1 else None
        return make_card(name, prediction.score, preview, prediction.heat, self.model.heat_range, group=group)

    def draw(self, name: str, preview: Image.Image, prediction: Prediction, edges: str) -> dict[str, Any]:
        """Overlay, raw heat map and contours as files."""
        model, heat, size = self.model, prediction.heat, prediction.size
        regions = [] if model.pixel_threshold is None else contours(heat, model.pixel_threshold, size)
        if (edges or model.weak) and max(preview.size) < LETTERS:
            preview = shrink(preview, LETTERS, enlarge=True)
        scale = [after / before for after, before in zip(preview.size, size, strict=True)]
        outlines = [{**r, "points": [[x * scale[0], y * scale[1]] for x, y in r["points"]]} for r in regions]
        pictures = {
            "overlay.png": label(overlay(preview, heat, model.heat_range, outlines), edges, model.weak),
            "raw.png": raw(heat, model.layers),
        }
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        for kind, picture in pictures.items():
            with atomic_path(self.out / f"{name}_{kind}", "--out") as path:
                picture.save(path, "PNG", pnginfo=mark, compress_level=1)  # a third of the time, 10% more bytes
        shape = {"pixel_threshold": model.pixel_threshold, "width": size[0], "height": size[1], "regions": regions}
        with atomic_path(self.out / f"{name}_contours.json", "--out") as path:
            path.write_text(json.dumps(shape), encoding="utf-8")
        kinds = (*pictures, "contours.json")
        return {"regions": sum(r["area"] > 0 for r in regions), **{k.split(".")[0]: f"{name}_{k}" for k in kinds}}

    def add_to_volume(self, entry: Entry, heat: np.ndarray) -> str | None:
        """Put the heat map into that of its volume or series, where it is a slice of one; the file's name."""
        if entry.kind == "pillow" or (entry.kind == "dicom" and entry.count == 1):
            return None
        with self._lock:
            volume = self.volumes.get(entry.series)
            if volume is None:
                volume = self.volumes[entry.series] = self.volume(entry)
        if isinstance(volume, NiftiHeat):
            volume.add(entry.frame.index or 0, heat)
            return volume.path.name
        volume.add(entry.frame, entry.number, heat)
        return f"{volume.folder.name}/{entry.number:05d}.dcm"

    def volume(self, entry: Entry) -> NiftiHeat | DicomHeat:
        """Begin the heat map of a volume or series, named after its first image."""
        model, name = self.model, self.volume_names[entry.series]
        if entry.kind == "nifti":
            path, plane = self.out / f"{name}_heat.nii.gz", entry.frame.options.plane
            return NiftiHeat(path, entry.frame.path, plane, model.layers, model.heat_range)
        return DicomHeat(self.out / f"{name}_heat", model.layers, model.heat_range, self.options.anonymous)

    def finish(self, series: str, keep: bool = True) -> None:
        """Write the file of a volume that is complete."""
        volume = self.volumes.pop(series, None)
        if keep and isinstance(volume, NiftiHeat):
            volume.close()

    def drop(self) -> None:
        """Leave nothing of volumes that are not complete."""
        for series in list(self.volumes):
            self.finish(series, keep=False)

    def name(self, entry: Entry) -> str:
        """The name of an image's pictures, which no two images share and every file system takes."""
        path = Path(entry.place)
        place = path.with_name(stem(path)).as_posix() if entry.kind == "nifti" else entry.place
        clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".")
        if entry.hidden:
            clean = Path(entry.file).stem
        if len(os.fsencode(clean)) > NAME_BYTES:
            end = os.fsencode(clean)[-NAME_BYTES:].decode("utf-8", "ignore")
            clean = f"{hashlib.sha256(clean.encode()).hexdigest()[:8]}_{end}"
        frame = "" if entry.frame.index is None else f"_{entry.frame.index:04d}"
        tried = (f"{clean}{f'-{number}' * (number > 1)}" for number in count(1))
        name = next(name for name in tried if name + frame not in self.names)
        self.names.add(name + frame)
        self.volume_names.setdefault(entry.series, name)
        return name + frame


def label(picture: Image.Image, edges: str, weak: bool) -> Image.Image:
    """Write the patient's sides at the picture's edges, and where it is so that the heat map is weak."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, min(width, height) // 16))
    places = (((3, height / 2), "lm"), ((width - 3, height / 2), "rm"), ((width / 2, 3), "ma"),
              ((width / 2, height - 3), "md"))  # fmt: skip
    words = [(side, *place) for side, place in zip(edges, places, strict=False)]
    if weak:
        words.append(("weak localisation", (3, 3), "la"))
    for text, place, anchor in words:
        draw.text(place, text, "white", font, anchor, stroke_width=2, stroke_fill="black")
    return picture


class Gallery:
    """The cards of the page, with pictures of the highest scores alone, so that any number of images fits."""

    def __init__(self) -> None:
        self.cards: list[Card] = []

    def add(self, card: Card | None) -> None:
        """One image."""
        if card is None:
            return
        self.cards.append(card)
        if len(self.cards) % MAX_CARDS == 0:
            highest = {id(kept) for kept in sorted(self.cards, key=lambda card: -card.score)[:MAX_CARDS]}
            self.cards = [c if id(c) in highest else replace(c, picture=None, heat=None) for c in self.cards]

    def write(self, model: Predictor, options: argparse.Namespace) -> Path:
        """Write the page; beyond MAX_CARDS images it shows those with the highest scores."""
        source = model.calibration.get("from")
        origin = "given with --threshold" if options.threshold is not None else str(source or "none")
        scores = np.array([card.score for card in self.cards])
        kept = [self.cards[i] for i in sorted(np.argsort(-scores, kind="stable")[:MAX_CARDS])]
        note = f"The gallery holds the {MAX_CARDS:,} highest scores of {len(scores):,} images."
        return write(
            options.report, "predictions.html", kept, scores=[scores], threshold=model.threshold,
            heat_range=model.heat_range, kind="MadCLIP predictions", title=model.settings.obj, origin=origin,
            lead=[f"{len(scores):,} images."], notes=[note] if len(kept) < len(scores) else [], weak=model.weak,
            above=int((scores >= (np.inf if model.threshold is None else model.threshold)).sum()),
            made=model.settings.to_dict(),
        )  # fmt: skip
