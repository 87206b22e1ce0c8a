"""What a W&B run shows: panels by prefix, pictures, curves, the table of scores, and the selected epoch in the summary.

    train/   losses and the cosine of the text features       time/      seconds an epoch, images a second
    test/    AUC, pAUC, AP, F1-max, their pixel versions      sys/       peak memory, and the GPU's on CUDA
    valid/   the same, with --select valid                    pictures/  curves/  scores/

The published keys (epoch, sim_texts, loss, AUC, pAUC, AUC+pAUC and their ...best) stand beside them.
"""

from __future__ import annotations

import heapq
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve, roc_curve
from torch import Tensor

from dataset import Sample, load_image, load_mask
from loss import LossParts

from .detector import Settings
from .evaluate import Evaluation
from .report import Sheet, colours
from .tracking import Tracker

if TYPE_CHECKING:
    import wandb

FIXED = 6  # test images that every set of pictures shows
WORST = 4  # of the false positives, and of the false negatives
POINTS = 200  # of a curve
BINS = 32  # of a histogram
ROWS = 500  # of the table
THUMBNAIL = 96  # pixels a side
NAMES = {
    "ap": "AP", "f1_max": "F1-max", "pixel_ap": "pixel_AP", "pixel_f1_max": "pixel_F1-max", "aupro": "AUPRO",
}  # fmt: skip

Collector = Callable[[Sequence[Sample], Tensor, "Tensor | None"], None]
Row = tuple[Sample, float, "np.ndarray | None"]  # image, its score, its map (S, S)


class Report(Protocol):
    """What an epoch gave; `test` and `valid` are None where they were not evaluated."""

    epoch: int  # from 0
    loss: LossParts
    similarity: float
    test: Evaluation | None
    valid: Evaluation | None
    seconds: float


class Dashboard:
    """Logs epochs, pictures and the result of a training run; like the tracker, it never stops one.

    Args:
        tracker: the W&B run. When it is off, nothing is computed.
        samples: the test images.
        settings: of the detector.
        views: training images an epoch, for the images a second.
        every: epochs between pictures, which the last epoch has in any case; 0 for none.
        best: the attribute `best` of an interrupted run's dashboard.
    """

    def __init__(
        self,
        tracker: Tracker,
        samples: Sequence[Sample],
        settings: Settings,
        views: int,
        every: int = 10,
        best: dict[str, float] | None = None,
    ) -> None:
        self.tracker, self.samples, self.settings, self.views, self.every = tracker, samples, settings, views, every
        self.best = dict(best or {})  # the published ...best keys
        self.keys: set[str] = set()  # every scalar logged so far
        self.pictured = -1  # the last epoch with pictures
        self.gallery: Gallery | None = None
        self.last, self.step = False, 0

    def collector(self, epoch: int, last: bool) -> Collector | None:
        """What `evaluate(on_batch=...)` is to call in this epoch, or None when no pictures are due."""
        self.last, self.gallery = last, None
        due = self.every and (last or epoch - self.pictured >= self.every)
        if not due or not self.tracker.takes_pictures:
            return None
        self.pictured = epoch
        self.gallery = gallery = Gallery(self.samples, self.settings.img_size)
        return lambda *batch: self.tracker.picture(lambda _: gallery(*batch))

    def epoch(self, report: Report, is_best: bool) -> None:
        """Log an epoch; a new best one goes to the summary too, with all of its values and no others."""
        values = scalars(report, self.views, self.best, is_best)
        if self.gallery and report.test:
            found, gallery = report.test, self.gallery
            self.tracker.picture(lambda run: run.log(gallery.pictures(found), step=report.epoch))
            self.tracker.picture(lambda run: run.log(curves(found), step=report.epoch))
        self.gallery = None
        self.tracker.define(sorted(values.keys() - self.keys))
        self.keys |= values.keys()
        # The last epoch's row stays open for the table of `finish`.
        self.tracker.log(values, step=report.epoch, commit=not self.last)
        self.step = report.epoch
        if is_best:
            self.tracker.summary({**dict.fromkeys(self.keys), **values})

    def finish(self, best: Evaluation, epoch: int, ckpt_path: Path | None = None) -> None:
        """Log the table of the selected epoch's scores and, where a path is given, the checkpoint as an artifact.

        The full evaluation also completes the summary: AUPRO is not measured in every epoch.
        """
        if self.tracker.id:
            self.tracker.summary(measured("test", best))
        if self.every:
            self.tracker.picture(lambda run: run.log({"scores/table": self._table(best)}, step=self.step))
        if ckpt_path:
            self.tracker.picture(lambda run: run.log_artifact(self._artifact(run.id, best, epoch, ckpt_path)))

    def _table(self, found: Evaluation) -> wandb.Table:
        """The images that are most wrong at the F1-max threshold, or least safely right, first."""
        import wandb  # noqa: PLC0415 - only where a run is tracked

        threshold = found.more["threshold"]
        margins = np.where(found.labels == 1, found.scores - threshold, threshold - found.scores)
        order = np.argsort(margins, kind="stable")[:ROWS]
        if len(order) < len(margins):
            print(f"W&B: scores/table holds the {ROWS} most wrong of {len(margins)} images", file=sys.stderr)
        paths = {sample.name: sample.path for sample in self.samples}
        table = wandb.Table(columns=["image", "file", "label", "score", "decision", "margin"])
        for i in order:
            thumbnail = wandb.Image(_pixels(paths[found.files[i]], THUMBNAIL), file_type="jpg")
            label, decision = _word(found.labels[i]), _word(found.scores[i] >= threshold)
            table.add_data(thumbnail, found.files[i], label, float(found.scores[i]), decision, float(margins[i]))
        return table

    def _artifact(self, run_id: str, best: Evaluation, epoch: int, path: Path) -> wandb.Artifact:
        import wandb  # noqa: PLC0415 - only where a run is tracked

        metadata = {**self.settings.to_dict(), "epoch": epoch, "auc": best.auc, "pauc": best.pauc}
        artifact = wandb.Artifact(f"{self.settings.obj}-{run_id}", "model", metadata=metadata)
        artifact.add_file(str(path))
        return artifact


class Gallery:
    """Keeps a fixed handful of images and the most misleading of each class while an evaluation runs."""

    def __init__(self, samples: Sequence[Sample], img_size: int) -> None:
        self.img_size = img_size
        self.fixed = Sheet(samples, img_size, FIXED)
        self.worst: dict[int, list[tuple[float, int, Row]]] = {0: [], 1: []}  # by label: heaps, the mildest on top
        self.seen = 0

    def __call__(self, batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        """Take in samples, image scores (B,) and maps (B, S, S) or None."""
        self.fixed(batch, scores, maps)
        for i, (sample, score) in enumerate(zip(batch, scores.tolist(), strict=True)):
            heap, badness = self.worst[sample.label], -score if sample.label else score
            self.seen += 1
            if len(heap) == WORST and badness <= heap[0][0]:
                continue
            heat = None if maps is None else maps[i].float().cpu().numpy().copy()
            keep = heapq.heappush if len(heap) < WORST else heapq.heappushpop
            keep(heap, (badness, self.seen, (sample, score, heat)))

    def pictures(self, found: Evaluation) -> dict[str, Any]:
        """Images beside heat maps, on one colour scale, with the true and the predicted mask as W&B's overlays.

        False positives and negatives are those at the threshold of the largest F1; there may be none.
        """
        threshold = found.more["threshold"]
        rows = {"pictures/test": [row for row in self.fixed.rows.values() if row]}
        for label, name in ((0, "false_positives"), (1, "false_negatives")):
            worst = [row for _, _, row in sorted(self.worst[label], reverse=True)]
            rows[f"pictures/{name}"] = [row for row in worst if (row[1] >= threshold) != label]
        maps = [heat for group in rows.values() for _, _, heat in group if heat is not None]
        scale = (min(heat.min() for heat in maps), max(heat.max() for heat in maps)) if maps else (0.0, 1.0)
        return {
            key: [self._picture(row, scale, threshold, found.more.get("pixel_threshold")) for row in group]
            for key, group in rows.items()
            if group
        }

    def _picture(
        self, row: Row, scale: tuple[float, float], threshold: float, pixel_threshold: float | None
    ) -> wandb.Image:
        import wandb  # noqa: PLC0415 - only where a run is tracked

        sample, score, heat = row
        image = _pixels(sample.path, self.img_size)
        caption = f"{Path(sample.name).name}: {_word(sample.label)}, score {score:.4f} (threshold {threshold:.4f})"
        if heat is None:
            return wandb.Image(image, caption=caption)
        low, high = scale
        glow = 0.45 * image + 0.55 * colours((heat - low) / max(high - low, 1e-12))
        masks = {
            name: {"mask_data": np.tile(mask, 2).astype(np.uint8) * value, "class_labels": {value: words}}
            for name, mask, value, words in (
                ("truth", load_mask(sample, self.img_size).numpy(), 1, "lesion"),
                ("prediction", heat >= pixel_threshold, 2, "found at the pixel F1-max threshold"),
            )
        }
        caption += f", colours {low:.3f} to {high:.3f}"
        return wandb.Image(np.concatenate([image, glow.astype(np.uint8)], axis=1), caption=caption, masks=masks)


def scalars(report: Report, views: int, best: dict[str, float], is_best: bool) -> dict[str, float]:
    """The published keys and ours, with the best so far, which is updated.

    On an image-only data set the published pAUC is the AUC again; its keys keep that here.
    """
    evaluated = {name: found for name in ("test", "valid") if (found := getattr(report, name))}
    images = views + sum(len(found.files) for found in evaluated.values())
    det, seg, total = (float(part) for part in report.loss)
    logged = {
        "epoch": report.epoch, "sim_texts": report.similarity, "loss": total,
        "train/det": det, "train/seg": seg, "train/total": total, "train/sim_texts": report.similarity,
        "time/epoch": report.seconds, "time/images_per_second": images / report.seconds, **memory(),
    }  # fmt: skip
    for name, found in evaluated.items():
        logged |= measured(name, found)
    if report.test:
        auc, pauc = report.test.auc, report.test.auc if report.test.pauc is None else report.test.pauc
        published = {"AUC+pAUC": report.test.selection_score, "AUC": auc, "pAUC": pauc}
        if is_best:
            best.update({f"{key}best": value for key, value in published.items()})
        logged |= published
    return {**logged, **best}


def measured(split: str, found: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation below `split`/."""
    values = {"AUC": found.auc, "pAUC": found.pauc}
    values |= {NAMES[key]: value for key, value in found.more.items() if key in NAMES}
    return {f"{split}/{name}": value for name, value in values.items() if value is not None}


def memory() -> dict[str, float]:
    """Peak memory so far, in GiB: resident, and allocated on the GPU where CUDA is used."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    found = {"sys/memory_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_initialized():
        found["sys/gpu_memory_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def curves(found: Evaluation) -> dict[str, Any]:
    """ROC and precision-recall curve of the images, and a histogram of the scores for each class."""
    import wandb  # noqa: PLC0415 - only where a run is tracked

    fpr, tpr, _ = roc_curve(found.labels, found.scores)
    precision, recall, _ = precision_recall_curve(found.labels, found.scores)
    edges = np.histogram_bin_edges(found.scores, BINS)
    return {
        "curves/ROC": _chart("ROC curve", "false positive rate", fpr, "true positive rate", tpr),
        "curves/PR": _chart("Precision-recall curve", "recall", recall[::-1], "precision", precision[::-1]),
        **{
            f"scores/{_word(label)}": wandb.Histogram(
                np_histogram=np.histogram(found.scores[found.labels == label], edges)
            )
            for label in (0, 1)
        },
    }


def _chart(title: str, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> wandb.plot.CustomChart:
    """The chart of wandb.plot.roc_curve, which itself needs pandas."""
    import wandb  # noqa: PLC0415 - only where a run is tracked

    kept = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    rows = [["abnormal", float(x[i]), float(y[i])] for i in kept]
    return wandb.plot_table(
        "wandb/area-under-curve/v0",
        wandb.Table(columns=["class", x_name, y_name], data=rows),
        {"x": x_name, "y": y_name, "class": "class"},
        {"title": title, "x-axis-title": x_name, "y-axis-title": y_name},
    )


def _pixels(path: Path, size: int) -> np.ndarray:
    """The image as (size, size, 3) uint8."""
    return (load_image(path, size).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _word(abnormal: bool | int) -> str:
    return "abnormal" if abnormal else "normal"
