"""The training loop: views of the shots -> steps -> epochs -> evaluation, and all the state that changes meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset import Sample, Shots, check_mask, load_mask
from loss import LossParts, training_loss
from Prompt import text_similarity
from utils import VIEWS, InputError, augment

from . import distributed
from .dashboard import Collector
from .detector import Detector, make_optimizers
from .evaluate import Evaluation, evaluate
from .features import FeatureStore, Item


@dataclass
class TrainingSet:
    """16 views of every shot, abnormal first; features come from the store."""

    items: list[Item]
    labels: Tensor  # (M,), 1 = abnormal
    masks: Tensor | None  # (M, S, S) bool, None on image-only data sets

    @classmethod
    def build(cls, shots: Shots, img_size: int, pixel_metrics: bool, jitter: Tensor) -> TrainingSet:
        """`jitter` (2, 2): the draws for the abnormal call (row 0) and the normal call (row 1)."""
        items, labels, masks = [], [], []
        for samples, label, draws in zip((shots.abnormal, shots.normal), (1, 0), jitter.tolist(), strict=True):
            items += [Item(sample, view, tuple(draws)) for view in range(VIEWS) for sample in samples]
            labels += [label] * VIEWS * len(samples)
            if pixel_metrics and samples:
                for sample in samples:
                    check_mask(sample)
                soft = torch.stack([load_mask(sample, img_size) for sample in samples])[:, None].float()
                masks.append(augment(soft)[:, 0] > 0.5)
        return cls(items, torch.tensor(labels), torch.cat(masks) if masks else None)


def fit_epoch(
    detector: Detector,
    store: FeatureStore,
    data: TrainingSet,
    optimizers: Sequence[torch.optim.Optimizer],
    order: Tensor,
    batch_size: int,
    text_features: Tensor | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> LossParts:
    """One pass over the views in the given order; the mean of each loss over the batches, as published.

    Several processes share each batch out and add their gradients up.

    `text_features` (D, 2), with their graph, save the first step's pass through the text tower.
    """
    settings, device, autocast = detector.settings, store.backbone.clip.device, store.backbone.autocast
    whole = detector.adapters.mixes_images  # then no process can work on a part of a batch
    heads = ("det", "seg") if data.masks is not None else ("det",)
    sums = torch.zeros(3, dtype=torch.float64)
    batches = order.split(batch_size)
    for step, whole_batch in enumerate(batches):
        batch = whole_batch if whole else distributed.share(whole_batch)
        # Of the loss, a mean over the whole batch; a process without images takes one that does not count.
        weight = len(batch) / len(whole_batch) / (distributed.world() if whole else 1)
        batch = batch if len(batch) else whole_batch[:1]
        tokens = store.get([data.items[i] for i in batch])
        masks = None if data.masks is None else data.masks[batch].to(device, torch.float32)
        with torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
            text = detector.prompts() if text_features is None else text_features
            det, *seg = detector(tokens, text, heads)
        text_features = None
        parts = training_loss(
            det.float(), seg[0].float() if seg else None, data.labels[batch].to(device), masks,
            settings.loss_type, settings.dec_type,
        )  # fmt: skip
        found = distributed.sum_tensor(torch.stack([part.detach() * weight for part in parts]))
        if not math.isfinite(found[-1].item()):
            raise InputError(f"the loss became {found[-1].item()} at step {step + 1}; lower --learning_rate")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = parts.total * weight
        (scaler.scale(loss) if scaler else loss).backward()
        distributed.sum_gradients(detector)
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        sums += found.double().cpu()
    return LossParts(*(sums / len(batches)))


@dataclass(frozen=True)
class EpochReport:
    """What an epoch gave."""

    epoch: int  # from 0
    loss: LossParts
    similarity: float  # cosine of the two text features
    test: Evaluation | None  # None where --eval_every skips it
    valid: Evaluation | None
    seconds: float

    def line(self, epochs: int) -> str:
        """The epoch in one line."""
        det, seg, total = (float(part) for part in self.loss)
        words = [f"epoch {self.epoch + 1:>{len(str(epochs))}}/{epochs}", f"det {det:.4f}", f"seg {seg:.4f}",
                 f"total {total:.4f}"]  # fmt: skip
        for name, found in (("", self.test), ("valid ", self.valid)):
            if found:
                words.append(f"{name}AUC {found.auc:.4f}")
                if found.pauc is not None:
                    words.append(f"{name}pAUC {found.pauc:.4f}")
        return "  ".join([*words, f"cos(text) {self.similarity:.4f}", f"{self.seconds:.1f} s"])

    def record(self, best: bool) -> dict[str, float | int | bool | None]:
        """The line of metrics.jsonl: epochs count from 1; null for what was not measured."""
        det, seg, total = (float(part) for part in self.loss)
        values = {"epoch": self.epoch + 1, "det": det, "seg": seg, "total": total, "similarity": self.similarity}
        for name, found in (("", self.test), ("valid_", self.valid)):
            values |= {f"{name}auc": found and found.auc, f"{name}pauc": found and found.pauc}
        return {**values, "best": best}


@dataclass
class TrainingState:
    """All that changes while training: `last.pth` holds it, `--resume` puts it back."""

    detector: Detector
    optimizers: list[torch.optim.Adam]
    scaler: torch.amp.GradScaler | None
    shuffle: torch.Generator
    epoch: int = 0  # finished ones
    best_epoch: int = -1  # from 0; -1 before the first best
    best_score: float = 0.0  # a new best must be strictly better, starting from 0, as published
    seconds: float = 0.0  # spent on the finished epochs

    @classmethod
    def start(cls, detector: Detector, autocast: torch.dtype | None, learning_rate: float, seed: int) -> TrainingState:
        """Before the first step."""
        device = next(detector.adapters.parameters()).device.type
        # bfloat16 has float32's range; float16 gradients need scaling, which the published code left out.
        scaler = torch.amp.GradScaler(device) if autocast is torch.float16 else None
        optimizers = make_optimizers(detector.adapters, detector.prompts, learning_rate)
        return cls(detector, optimizers, scaler, torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "parts": self.detector.parts(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "shuffle": self.shuffle.get_state(),
            "torch_random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in ("epoch", "best_epoch", "best_score", "seconds")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; `InputError` where it does not fit."""
        try:
            self.detector.load_parts(state["parts"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            if self.scaler and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.shuffle.set_state(state["shuffle"])
            torch.set_rng_state(state["torch_random"])
            for name in ("epoch", "best_epoch", "best_score", "seconds"):
                setattr(self, name, state[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--resume: last.pth does not fit this run ({error})") from error


def fit(
    state: TrainingState,
    store: FeatureStore,
    data: TrainingSet,
    test: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    select: str = "test",
    valid: Sequence[Sample] = (),
    eval_every: int = 1,
    on_epoch: Callable[[EpochReport, bool], None] = lambda report, best: None,
    collector: Callable[[int, bool], Collector | None] = lambda epoch, last: None,
) -> None:
    """Train from `state.epoch` on; call `on_epoch(report, is_new_best)` after each epoch, when `state` includes it."""
    detector, autocast = state.detector, store.backbone.autocast
    text = None
    for epoch in range(state.epoch, epochs):
        start = time.perf_counter()
        order = torch.randperm(len(data.items), generator=state.shuffle)
        last = epoch == epochs - 1
        due = last or (epoch + 1) % eval_every == 0
        try:
            loss = fit_epoch(detector, store, data, state.optimizers, order, batch_size, text, state.scaler)
            # One pass through the text tower serves this evaluation (in float32) and the next step, which has the
            # same contexts; under autocast that step makes its own.
            with torch.set_grad_enabled(not last and autocast is None):
                text = detector.prompts()
            frozen_text = text.detach()
            text = None if autocast else text
            shown = collector(epoch, last) if due else None
            found, found_valid = None, None
            if due:
                found = evaluate(
                    detector, store, test, text_features=frozen_text, aupro=shown is not None, on_batch=shown
                )
            if due and select == "valid":
                found_valid = evaluate(detector, store, valid, text_features=frozen_text)
        except InputError as error:
            raise InputError(f"epoch {epoch + 1}: {error}") from error
        seconds = time.perf_counter() - start
        report = EpochReport(epoch, loss, text_similarity(frozen_text), found, found_valid, seconds)

        judged = found_valid if select == "valid" else found
        better = last if select == "last" else due and judged.selection_score > state.best_score
        if better or (last and state.best_epoch < 0):
            state.best_epoch, state.best_score, better = epoch, judged.selection_score, True
        state.epoch, state.seconds = epoch + 1, state.seconds + seconds
        on_epoch(report, better)
