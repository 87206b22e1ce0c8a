"""The parts of training, whose loop is in train.py: data splits, training set, one step, and the changing state."""

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
    """16 views of every shot, abnormal ones first; `rows` are the rows of their tokens in the store."""

    items: list[Sample]
    labels: Tensor  # (M,) float32, 1 = abnormal
    masks: Tensor | None  # (M, S, S) bool, None on image-only data sets
    rows: Tensor | None = None  # (M,) int64, set once the store has planned the items

    @classmethod
    def build(cls, shots: Shots, settings: Settings, seed: int) -> TrainingSet:
        """Build the views of the shots, on the CPU; `InputError` if a mask cannot be used.

        The published program augments a shot's grey mask and then thresholds it; `corrected` thresholds first.

        Args:
            shots: the labelled images.
            settings: img_size, pixel_metrics, fidelity and mask_above are used.
            seed: for the colour jitter: one pair of draws for the abnormal shots and one for the normal ones.
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
        """A copy with labels and masks on the store's device, and with the rows of its items in the store."""
        device = store.device
        masks = None if self.masks is None else self.masks.to(device)
        return TrainingSet(self.items, self.labels.to(device), masks, store.rows(self.items))

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yields rows, labels and masks of each batch, in the given order: (B,), (B,), (B, S, S) or None.

        The order is copied to the device once; each batch is gathered there.
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
        return augment(grey)[:, 0] > (above + 0.5) / 255  # exactly 0.5 for the default of 127
    binary = torch.stack([load_mask(sample, size, above) for sample in samples])[:, None].float()
    return augment(binary)[:, 0] > 0.5


class TrainingState:
    """Everything that changes during training: stored in `last.pth`, restored by `--resume`.

    Args:
        detector: the detector before the first step.
        autocast: dtype of mixed precision, or None for float32.
        learning_rate: for `make_optimizers`.
        seed: for the shuffling.
        select: the metrics that choose the epoch: `test` or `valid`; with `last`, none is chosen.
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
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl, one per epoch
        self.seconds = 0.0  # spent on the finished epochs

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    def step(
        self, store: TokenStore, rows: Tensor, labels: Tensor, masks: Tensor | None, text: Tensor | None
    ) -> Tensor:
        """One step of Adam on a batch. It does not wait for the device.

        If a GPU has no memory for the gradients beside the tokens, the tokens leave it first (`TokenStore.with_room`).

        Args:
            store: holds the tokens.
            rows: (B,) int64, the rows of the batch in the store.
            labels: (B,) float32, 1 = abnormal.
            masks: (B, S, S) bool, or None on image-only data sets.
            text: (D, 2) text features with their graph, if the caller has computed them for the current contexts.

        Returns:
            (3,) float32 on the device: detection, segmentation and total loss.
        """
        shared = [text]  # for the first attempt only: if it fails, it may have freed the graph
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
        """Compute the losses of `step` and the gradients of all parameters; `tokens` are K tensors (B, T, C)."""
        settings, device = self.detector.settings, labels.device.type
        heads = ("det", "seg") if masks is not None else ("det",)
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            features = self.detector.prompts() if text is None else text
            det, *seg = self.detector.adapters(tokens, features, heads)
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
        """The last epoch that was better than all before it, counted from 1; 0 if there is none."""
        return max((record["epoch"] for record in self.history if record["best"]), default=0)

    @property
    def best_score(self) -> float:
        """AUC + pAUC of the best epoch, as published; a new best must be strictly better, starting from 0."""
        if not self.best_epoch:
            return 0.0
        record, prefix = self.history[self.best_epoch - 1], "valid_" if self.select == "valid" else ""
        return float(record[f"{prefix}auc"] + (record[f"{prefix}pauc"] or 0.0))

    @property
    def selected_epoch(self) -> int:
        """The epoch to report, counted from 1: the best one, or the last one if there is no best one."""
        return self.best_epoch or self.epoch

    def finish_epoch(
        self, loss: Tensor, similarity: float, test: Metrics | None, valid: Metrics | None, due: bool, seconds: float
    ) -> dict[str, Any]:
        """Finish an epoch: decide whether it is the best so far, and add its line to the history.

        Args:
            loss: (3,), see `check_losses`.
            similarity: cosine of the two text features.
            test: metrics of the test set; None if it was not measured.
            valid: metrics of valid/; None if it was not measured.
            due: whether the epoch is a multiple of --eval_every. If not, it may be measured (as the last one), but is
                never chosen, so that an extended run chooses the same epoch as one that was longer from the start.
            seconds: duration of the epoch.

        Returns:
            The line of metrics.jsonl, with None for what was not measured, and no times: equal numbers, equal bytes.
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
        """Print a warning after a quarter of the epochs, at least 5, if the detection loss is still at its start.

        Scores of 0 give a loss of 2 ln 2 per layer (sigmoid loss, mean decision).
        """
        settings, det = self.detector.settings, self.history[-1]["det"]
        start = len(settings.features_list) * 2 * math.log(2)
        plain = settings.loss_type == "sigmoid" and settings.dec_type == "mean"
        if plain and self.epoch == max(-(-epochs // 4), 5) and det > 0.99 * start and distributed.is_main():
            reason = "the tower may see too little difference between the classes, or the learning rate is too low"
            if settings.fidelity == "released":
                reason = "the tower may need normalised pixels, which --fidelity corrected gives it"
            warn(
                f"the detection loss ({det:.4f}) has not moved from its initial value (K 2 ln 2 = {start:.4f}) after "
                f"{self.epoch} epochs: {reason} (docs/results.md)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values only."""
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

    This is the only point at which an epoch's training waits for the device.

    Raises:
        InputError: a loss is not finite; the message names the epoch and the first such step.
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
    """One line that reports an epoch."""
    words = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}", f"det {record['det']:.4f}"]
    words += [f"seg {record['seg']:.4f}"] * bool(record["seg"]) + [f"total {record['total']:.4f}"]
    for name, key in (("AUC", "auc"), ("pAUC", "pauc"), ("valid AUC", "valid_auc"), ("valid pAUC", "valid_pauc")):
        if record[key] is not None:
            words.append(f"{name} {record[key]:.4f}")
    return "  ".join([*words, f"cos(text) {record['similarity']:.4f}", f"{seconds:.1f} s"])


def calibrate_run(
    detector: Detector, store: TokenStore, splits: Splits, training: TrainingSet, rule: str
) -> dict[str, Any] | None:
    """Calibrate on images of valid/ that are not shots, if they show both classes, or else on the shots' views."""
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
    """The images of a run: for training, for choosing the epoch, for calibration, and for the test."""

    dataset: MedicalDataset
    shots: Shots
    test: list[Sample]
    valid: list[Sample]  # images of valid/ that are not shots; empty without --select valid
    calibration: list[Sample]  # some images of valid/ that are not shots, for the decision threshold
    unused: list[Sample]  # all images of valid/ that are not shots
    select: str  # the rule by which the epoch is chosen

    @classmethod
    def open(cls, options: argparse.Namespace) -> Splits:
        """List the images. Masks, scans and pictures beyond 8 bits may be read, to decide which are used and how.

        Raises:
            InputError: a data set or a part of it is missing, has too few images, or lacks a class for --select valid.
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
        """The images of all lists that this process scores, in the batches of `evaluate`."""
        groups = (self.test, self.valid, self.calibration)
        return [batch for group in groups for batch in own_batches(group, settings, device)]

    def shot_patients(self) -> set[str]:
        """The patients of the shots, if they are known."""
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
        """Print which images are used for training and for the test."""
        abnormal = sum(sample.label for sample in self.test)
        source = self.shots.source if self.shots.source.startswith("sampled") else f"from {self.shots.source}"
        print(f"{self.dataset.obj}: {len(self.test)} test images ({abnormal} abnormal); shots {printable(source)}")
        for kind, names in self.shots.names.items():
            print(f"  {kind} shots: {printable(quoted(names)) or 'none'}")
        for note in notes.describe(self.dataset):
            print(printable(note))

    def print_warnings(self, masks: Tensor | None, store: TokenStore) -> None:
        """After `fill`: print warnings about images that are in both valid/ and test/, and shots with empty masks."""
        if not distributed.is_main():
            return
        shots = (*self.shots.normal, *self.shots.abnormal)
        for samples, what in ((shots, "a shot, which inflates the results"), (self.unused, "another image of valid/")):
            if pairs := equal_images(samples, self.test, store.content_hash):
                sample, twin = pairs[0]
                warn(
                    f"{len(pairs)} test images equal {what}: {twin.name} is {sample.name}; "
                    f"`python -m dataset.check` shows them all"
                )
        if masks is not None:  # sorted by view: the first masks are of the abnormal shots without augmentation
            pairs_of = zip(self.shots.abnormal, masks, strict=False)
            if empty := [sample.name for sample, mask in pairs_of if not mask.any()]:
                warn(
                    f"{len(empty)} abnormal shots have an empty mask at this size, so all their pixels count as "
                    f"normal: {preview(empty)}"
                )
