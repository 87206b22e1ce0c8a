"""The file of test.py --save_scores: patch scores and all that is needed to measure them, but no image and no path."""

from __future__ import annotations

import argparse
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.medical_few import MedicalDataset
from dataset.readers.images import Sample, parse_window
from utils import EXPECTED, InputError, atomic_path, blame, preview

from ..evaluation import Evaluation, Masks
from .config import Settings, check_against, contradiction

FORMAT = "madclip-scores-2"
READ = ("patient", "mask_above", "mask_labels", "unmarked", "window", "plane")  # how images were read and labelled


@dataclass(frozen=True)
class Scored:
    """An evaluation and where it came from.

    `source` holds plain values: a description (`words`), the data set (`obj`), whether it was `anonymous`, how images
    were `read` (the layout's fields `READ`), and the shots' `patients`, named as in the samples (None: see `unknown`).
    """

    evaluation: Evaluation
    masks: Masks | None
    settings: Settings
    metadata: dict[str, Any] = field(repr=False)  # of the checkpoint
    source: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the file for `load`, atomically; `InputError` if it cannot be written."""
        evaluation, masks = self.evaluation, self.masks
        description = {
            "format": FORMAT, "head": evaluation.head, "img_size": evaluation.img_size, "dec_type": evaluation.dec_type,
            "settings": self.settings.to_dict(), "metadata": self.metadata, "source": self.source,
        }  # fmt: skip
        arrays = {
            "patch_scores": evaluation.patch_scores.cpu().numpy(),
            "labels": evaluation.labels,
            "names": np.array(evaluation.names),
            "patients": np.array([sample.patient or "" for sample in evaluation.samples]),
            "kinds": np.array([sample.kind for sample in evaluation.samples]),
            "description": np.array(json.dumps(description)),
        }
        if masks is not None:
            arrays |= {"mask_rows": masks.rows.cpu().numpy(), "mask_bits": masks.bits.cpu().numpy()}
        with atomic_path(path, "--save_scores") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Scored:
        """Read a file of `save`; nothing in it can run code. The samples' paths are only their names.

        Raises:
            InputError: the file is damaged, or of another kind or version.
        """
        errors = (*EXPECTED, zipfile.BadZipFile, zlib.error)
        with blame(f"--scores {path}: no file of this version's --save_scores", errors=errors):
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            description = json.loads(str(arrays["description"]))
            if description["format"] != FORMAT:
                raise ValueError(f"format {description['format']!r:.40}")
        rows = zip(*(arrays[name].tolist() for name in ("names", "labels", "patients", "kinds")), strict=True)
        samples = [Sample(Path(name), label, (), name, who or None, kind=kind) for name, label, who, kind in rows]
        shape = description["head"], description["img_size"], description["dec_type"]
        evaluation, masks = Evaluation(samples, torch.from_numpy(arrays["patch_scores"]), *shape), None
        if "mask_bits" in arrays:
            rows_of, bits = (torch.from_numpy(arrays[name]) for name in ("mask_rows", "mask_bits"))
            masks = Masks(rows_of, bits, evaluation.img_size)
        settings, source = Settings.from_dict(description["settings"]), description["source"]
        source["words"] += f"\nscores kept in {path}"
        return cls(evaluation, masks, settings, description["metadata"], source)

    def with_pictures(self, options: argparse.Namespace) -> Scored:
        """A copy whose samples have their image files, found by name in the data set's test images.

        If some are missing, prints a note and returns the evaluation as it is. Labels and patients stay as stored. Sets
        `options.obj` and `options.anonymous` to those of the stored test.

        Raises:
            InputError: a flag contradicts the stored test.
        """
        self._check_against(options)
        options.obj, options.anonymous = self.source["obj"], self.source["anonymous"]
        try:
            dataset = MedicalDataset.from_options(options)
            by_name = {sample.name: sample for sample in dataset.samples("test")}
            if missing := [name for name in self.evaluation.names if name not in by_name]:
                raise InputError(f"{len(missing)} of the scored images are missing: {preview(missing)}")
        except InputError as error:
            print(f"no pictures: {error}")
            return self
        kept = self.evaluation.samples
        samples = [replace(by_name[own.name], label=own.label, patient=own.patient) for own in kept]
        return replace(self, evaluation=replace(self.evaluation, samples=samples))

    def _check_against(self, options: argparse.Namespace) -> None:
        check_against(self.settings, self.metadata, options)
        for name in ("ckpt", "weights", "image_tower"):
            if getattr(options, name):
                raise InputError(f"--{name} {getattr(options, name)}: nothing is computed with --scores; leave it out")
        read = {**{name: getattr(options, name) for name in READ}, "window": parse_window(options.window or ())}
        own = {"prompt_name": self.settings.prompt_name, **{name: self.source[name] for name in ("obj", "anonymous")}}
        given = {**read, **{name: getattr(options, name) or None for name in own}}
        for name, stored in {**self.source["read"], **own}.items():
            if given[name] is not None and plain(given[name]) != stored:
                raise contradiction(name, given[name], stored, "kept scores, which were made")


def plain(value: Any) -> Any:  # noqa: ANN401 - a setting
    """A setting as it would come back from JSON (a tuple becomes a list)."""
    return list(value) if isinstance(value, tuple) else value
