"""What training needs beside its loop, which stands in train.py: the training set, one step, and all that changes."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dataset import notes
from dataset.fewshot import quoted
from dataset.medical_few import MedicalDataset, Shots, equal_images
from dataset.readers.images import Sample
from dataset.readers.masks import check_mask, load_grey_mask, load_mask
from dataset.views import JITTER_VIEW, VIEWS, augment
from loss import training_loss
from utils import InputError, preview, printable, sha256_file, warn

from . import distributed
from .calibration import CHOSEN_SOURCE, VALID_SOURCE, VIEWS_SOURCE, calibrate, calibration_samples
from .detector import Detector, make_optimizers, seeded
from .evaluation import Masks, evaluate, own_batches
from .features import TokenStore
from .files.config import Settings
from .metrics import Metrics


@dataclass
class TrainingSet:
    """16 views of every shot, abnormal first; `rows` say where their tokens stand in the store."""

    items: list[Sample]
    labels: Tensor  # (M,) float32, 1 = abnormal
    masks: Tensor | None  # (M, S, S) bool, None on image-only data sets
    rows: Tensor | None = None  # (M,) int64, once the store has planned the items

    @classmethod
    def build(cls, shots: Shots, settings: Settings, seed: int) -> TrainingSet:
        """The views of the shots, on the CPU.

        The published program augments a shot's grey mask and thresholds afterwards; `corrected` thresholds first.

        Args:
            shots: the labelled images.
            settings: img_size, pixel_metrics, fidelity and mask_above are read.
            seed: of the colour jitter's draws, one pair for the abnormal shots and one for the normal ones.
        """
        jitter = torch.rand(2, 2, generator=seeded(seed, "jitter")).tolist()
        items: list[Sample] = []
        labels, masks = [], []
        for samples, label, draws in zip((shots.abnormal, shots.normal), (1, 0), jitter, strict=True):
            jitters = [(draws[0], draws[1]) if view == JITTER_VIEW else None for view in range(VIEWS)]
            items += [replace(s, view=view, jitter=jitters[view]) for view in range(VIEWS) for s in samples]
            labels += [float(label)] * VIEWS * len(samples)
            if settings.pixel_metrics and samples:
                masks.append(view_masks(samples, settings))
        return cls(items, torch.tensor(labels), torch.cat(masks) if masks else None)

    def __len__(self) -> int:
        return len(self.items)

    def to(self, store: TokenStore) -> TrainingSet:
        """The same with labels and masks on the device, and its rows in the store."""
        device = store.device
        masks = None if self.masks is None else self.masks.to(device)
        return TrainingSet(self.items, self.labels.to(device), masks, store.rows(self.items))

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, labels and masks of each batch, in the given order: (B,), (B,), (B, S, S) or None.

        The order goes to the device once; each batch is gathered there.
        """
        assert self.rows is not None
        rows = self.rows[order.to(self.rows.device)].split(size)
        for part, index in zip(rows, order.to(self.labels.device).split(size), strict=True):
            yield part, self.labels[index], None if self.masks is None else self.masks[index]


def view_masks(samples: Sequence[Sample], settings: Settings) -> Tensor:
    """The masks of all views of some shots: (16 B, S, S) bool, view by view."""
    for note in dict.fromkeys(note for sample in samples for note in check_mask(sample, settings.mask_above)):
        if distributed.is_main():
            warn(note)
    size, above = settings.img_size, settings.mask_above
    if settings.fidelity == "released":
        grey = torch.stack([load_grey_mask(sample, size) for sample in samples])  # (B, 1, S, S) in [0, 1]
        return augment(grey)[:, 0] > (above + 0.5) / 255  # exactly 0.5 where abnormal is above 127
    binary = torch.stack([load_mask(sample, size, above) for sample in samples])[:, None].float()
    return augment(binary)[:, 0] > 0.5


class TrainingState:
    """All that changes while training: `last.pth` holds it, `--resume` puts it back.

    Args:
        detector: before the first step.
        autocast: dtype of mixed precision, or None for float32.
        learning_rate: of `make_optimizers`.
        seed: of the shuffling.
        select: the metrics that choose: `test`, `valid`; `last` chooses nothing.
    """

    def __init__(
        self, detector: Detector, autocast: torch.dtype | None, learning_rate: float, seed: int, select: str = "test"
    ) -> None:
        self.detector, self.autocast, self.select = detector, autocast, select
        self.optimizers = make_optimizers(detector.adapters, detector.prompts, learning_rate)
        # bfloat16 has float32's range; float16 gradients need scaling, which the published code left out.
        device = next(detector.adapters.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device) if autocast is torch.float16 else None
        self.shuffle = seeded(seed, "shuffle")
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl, one an epoch
        self.seconds = 0.0  # spent on the finished epochs

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.history)

    def step(
        self, store: TokenStore, rows: Tensor, labels: Tensor, masks: Tensor | None, text: Tensor | None
    ) -> Tensor:
        """One step of Adam on a batch. It does not wait for the device.

        Where a GPU has no room for the gradients beside the tokens, these leave it first (`TokenStore.with_room`).

        Args:
            store: has the tokens.
            rows: (B,) int64, where they stand in it.
            labels: (B,) float32, 1 = abnormal.
            masks: (B, S, S) bool, or None on image-only data sets.
            text: (D, 2) text features with their graph, where the caller has them for these very contexts.

        Returns:
            (3,) float32 on the device: detection, segmentation and total loss.
        """
        shared = [text]  # for the first attempt alone: one that fails may have used up the graph
        losses = store.with_room(
            lambda: self.backward(store.get(rows), labels, masks, shared.pop() if shared else None)
        )
        for optimizer in self.optimizers:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()
        return losses

    def backward(self, tokens: Sequence[Tensor], labels: Tensor, masks: Tensor | None, text: Tensor | None) -> Tensor:
        """The losses of `step`, and the gradients of all that learns: `tokens` are K tensors (B, T, C)."""
        settings, device = self.detector.settings, labels.device.type
        heads = ("det", "seg") if masks is not None else ("det",)
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            features = self.detector.prompts() if text is None else text
            det, *seg = self.detector(tokens, features, heads)
        parts = training_loss(
            det.float(), seg[0].float() if seg else None, labels, None if masks is None else masks.float(),
            settings.loss_type, settings.dec_type,
        )  # fmt: skip
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (self.scaler.scale(parts.total) if self.scaler else parts.total).backward()
        return torch.stack([part.detach() for part in parts])

    @property
    def best_epoch(self) -> int:
        """The last epoch that was better than all before it, counted from 1; 0 before the first."""
        return max((record["epoch"] for record in self.history if record["best"]), default=0)

    @property
    def best_score(self) -> float:
        """Its AUC + pAUC, as published; a new best must be strictly better, starting from 0."""
        if not self.best_epoch:
            return 0.0
        record, prefix = self.history[self.best_epoch - 1], "valid_" if self.select == "valid" else ""
        return float(record[f"{prefix}auc"] + (record[f"{prefix}pauc"] or 0.0))

    @property
    def selected_epoch(self) -> int:
        """The epoch that is reported, counted from 1: the last where none was better than another."""
        return self.best_epoch or self.epoch

    def finish_epoch(
        self, loss: Tensor, similarity: float, test: Metrics | None, valid: Metrics | None, due: bool, seconds: float
    ) -> dict[str, Any]:
        """Close an epoch: choose, and add its line to the history.

        Args:
            loss: (3,), see `check_losses`.
            similarity: cosine of the two text features.
            test: of the test set; None where it was not measured.
            valid: of valid/, likewise.
            due: --eval_every names the epoch; others, such as an uneven last one, are measured but never chosen, so
                that a run which is extended chooses what a longer one would.
            seconds: that it took.

        Returns:
            The line of metrics.jsonl: None for what was not measured. No times, so that equal numbers are equal bytes.
        """
        det, seg, total = loss.tolist()
        record: dict[str, Any] = {
            "epoch": self.epoch + 1, "det": det, "seg": seg, "total": total, "similarity": similarity,
        }  # fmt: skip
        for prefix, metrics in (("", test), ("valid_", valid)):
            record |= {f"{prefix}{name}": getattr(metrics, name) if metrics else None for name in ("auc", "pauc")}
        judged = {"test": test, "valid": valid}.get(self.select)
        record["best"] = due and judged is not None and judged.selection_score > self.best_score
        self.history.append(record)
        self.seconds += seconds
        return record

    def warn_if_stuck(self, epochs: int) -> None:
        """Print a warning after a quarter of the epochs, at least 5, if the detection loss is still where it starts.

        Scores of 0 give 2 ln 2 a layer (sigmoid loss, mean decision).
        """
        settings, det = self.detector.settings, self.history[-1]["det"]
        start = len(settings.features_list) * 2 * math.log(2)
        plain = settings.loss_type == "sigmoid" and settings.dec_type == "mean"
        if plain and self.epoch == max(-(-epochs // 4), 5) and det > 0.99 * start and distributed.is_main():
            reason = "the tower may see too little difference between the classes, or the learning rate is too low"
            if settings.fidelity == "released":
                reason = "the tower may need normalised pixels, which --fidelity corrected gives it"
            warn(
                f"the detection loss ({det:.4f}) has not left its start (K 2 ln 2 = {start:.4f}) after {self.epoch} "
                f"epochs: {reason} (docs/results.md)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "parts": self.detector.parts(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "shuffle": self.shuffle.get_state(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.detector.load_parts(state["parts"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.shuffle.set_state(state["shuffle"])
        self.history, self.seconds = state["history"], state["seconds"]


def check_losses(losses: Tensor, epoch: int) -> Tensor:
    """The mean of each loss over an epoch's steps: (steps, 3) -> (3,) float64 on the CPU.

    Here an epoch's training waits for the device, once.

    Raises:
        InputError: naming the epoch and its first step with a loss that is not finite.
    """
    values = losses.double().cpu()
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise InputError(
            f"epoch {epoch}: the loss became {float(values[step, -1])} at step {step + 1}; lower --learning_rate"
        )
    return values.mean(dim=0)


def epoch_line(record: dict[str, Any], epochs: int, seconds: float) -> str:
    """The epoch in one line."""
    words = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}", f"det {record['det']:.4f}"]
    words += [f"seg {record['seg']:.4f}"] * bool(record["seg"]) + [f"total {record['total']:.4f}"]
    for name, key in (("AUC", "auc"), ("pAUC", "pauc"), ("valid AUC", "valid_auc"), ("valid pAUC", "valid_pauc")):
        if record[key] is not None:
            words.append(f"{name} {record[key]:.4f}")
    return "  ".join([*words, f"cos(text) {record['similarity']:.4f}", f"{seconds:.1f} s"])


def calibrate_run(
    detector: Detector, store: TokenStore, splits: Splits, training: TrainingSet, rule: str
) -> dict[str, Any] | None:
    """The decision's threshold: set on images of valid/ that are not shots, or else on the shots' augmented views."""
    settings = detector.settings
    if splits.calibration:
        evaluation = evaluate(detector, store, splits.calibration)
        masks = Masks.of(splits.calibration, settings, store.workers)
        source = CHOSEN_SOURCE if splits.select == "valid" else VALID_SOURCE
    else:
        evaluation = evaluate(detector, store, training.items)
        masks = None if training.masks is None else Masks.pack(training.masks)
        source = VIEWS_SOURCE
    return calibrate(evaluation, masks, rule, source)


@dataclass
class Splits:
    """What a run trains on, chooses by, and is measured on."""

    dataset: MedicalDataset
    shots: Shots
    test: list[Sample]
    valid: list[Sample]  # what is left of valid/ after the shots, with --select valid
    calibration: list[Sample]  # some of what is left, for the decision threshold
    unused: list[Sample]  # all that is left of valid/ after the shots
    select: str  # the rule by which the epoch is chosen

    @classmethod
    def open(cls, options: argparse.Namespace) -> Splits:
        """Read the lists; no picture is opened.

        Raises:
            InputError: a data set or a part of it is missing, too few images, --select valid without both classes.
        """
        dataset = MedicalDataset.from_options(options)
        shots = dataset.shots(options.shot_normal, options.shot_abnormal, options.iterate, options.seed)
        used = {(sample.path, sample.index) for sample in (*shots.abnormal, *shots.normal)}
        unused = [sample for sample in dataset.samples("valid") if (sample.path, sample.index) not in used]
        test = dataset.samples("test")
        scored = [sample for sample in unused if sample.masks or not (sample.label and dataset.pixel_metrics)]
        abnormal = sum(sample.label for sample in scored)
        counts = (len(scored) - abnormal, abnormal)
        select = options.select or ("test" if dataset.is_benchmark else "valid" if min(counts) else "last")
        if select == "valid" and not min(counts):
            raise InputError(
                f"--select valid: beside the shots valid/ holds {counts[0]} normal and {counts[1]} abnormal images, "
                f"and needs some of both; take fewer shots, or --select last"
            )
        if len(scored) < len(unused):
            print(
                f"{len(unused) - len(scored)} abnormal images of valid/ have no mask and are not shots: "
                f"the threshold is set without them"
            )
        valid = scored if select == "valid" else []
        return cls(dataset, shots, test, valid, calibration_samples(scored), unused, select)

    def own_batches(self, settings: Settings, device: torch.device) -> list[Sequence[Sample]]:
        """What this process scores of all lists, in the batches of `evaluate`."""
        groups = (self.test, self.valid, self.calibration)
        return [batch for group in groups for batch in own_batches(group, settings, device)]

    def shot_patients(self) -> set[str]:
        """The patients of the shots, as far as names tell."""
        return {s.patient for s in (*self.shots.abnormal, *self.shots.normal) if s.patient is not None}

    def digest(self, store: TokenStore) -> str:
        """A hash of all images and masks that shape the numbers, and of their names."""
        contents = {}
        for sample in (*self.shots.abnormal, *self.shots.normal, *self.test, *self.valid, *self.calibration):
            contents[sample.name] = store.content_hash(sample)[:16]
            for mask in sample.masks:
                contents[f"{sample.name} ({mask.name}, mask)"] = sha256_file(mask)[:16]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def describe(self) -> None:
        """Print what is trained on and what is measured."""
        abnormal = sum(sample.label for sample in self.test)
        source = self.shots.source if self.shots.source.startswith("sampled") else f"from {self.shots.source}"
        print(f"{self.dataset.obj}: {len(self.test)} test images ({abnormal} abnormal); shots {printable(source)}")
        for kind, names in self.shots.names.items():
            print(f"  {kind} shots: {printable(quoted(names)) or 'none'}")
        for note in notes.describe(self.dataset):
            print(printable(note))

    def print_warnings(self, masks: Tensor | None, store: TokenStore) -> None:
        """After the pass, print warnings for images in valid and in test, and for shots whose mask is empty."""
        if not distributed.is_main():
            return
        shots = (*self.shots.normal, *self.shots.abnormal)
        for samples, what in ((shots, "a shot, which flatters every number"), (self.unused, "another image of valid/")):
            if pairs := equal_images(samples, self.test, store.content_hash):
                sample, twin = pairs[0]
                warn(
                    f"{len(pairs)} test images equal {what}: {twin.name} is {sample.name}; "
                    f"`python -m dataset.check` shows them all"
                )
        if masks is not None:  # view by view, so the plain view of the abnormal shots comes first
            pairs_of = zip(self.shots.abnormal, masks, strict=False)
            if empty := [sample.name for sample, mask in pairs_of if not mask.any()]:
                warn(
                    f"{len(empty)} abnormal shots have an empty mask at this size, so all their pixels count as "
                    f"normal: {preview(empty)}"
                )
