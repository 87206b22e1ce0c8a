"""Train MadCLIP.

    python train.py --obj Brain --shot 16                 the paper's setting, OpenAI weights under CLIP/ckpt
    python train.py --obj Chest --shot 4 --select last    report the last epoch, not the best on the test set
    python train.py --obj Brain --model_name ViT-tiny-14-56 --pretrain random --epoch 20      a dry run in a minute

Arguments -> data, backbone, features, model -> epochs -> checkpoint. The frozen tower runs once for each image; what
is trained every epoch are the adapters and the prompts' contexts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from CLIP import create_model
from dataset import MedicalDataset, Sample, Shots, leaks, load_mask
from engine.checkpoint import Checkpoint, versions
from engine.dashboard import Collector, Dashboard
from engine.detector import Detector, Settings, make_optimizers
from engine.evaluate import Evaluation, evaluate, published_lines, result_json
from engine.features import FeatureStore, Item
from engine.options import (
    Formatter,
    add_data_flags,
    add_model_flags,
    count,
    make_settings,
    make_store,
    pick_device,
    positive,
    positive_float,
    say_weights,
    words,
    writable,
)
from engine.tracking import Tracker
from loss import LossParts, training_loss
from Prompt import read_prompts, text_similarity
from utils import VIEWS, InputError, atomic_path, augment, run_cli, set_seed

SELECTS = {
    "test": "best epoch on the test set, the published protocol",
    "valid": "best epoch on what is left of valid/ after the shots",
    "last": "last epoch",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The published flags with the published defaults, and ours beside them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    add_data_flags(parser, obj="Liver")
    add_model_flags(parser, from_checkpoint=False)
    group = parser.add_argument_group("training")
    group.add_argument("--exp_name", help="name of the run in W&B and under runs/ (default: made from the settings)")
    group.add_argument("--epoch", type=positive, default=60, help="number of epochs")
    group.add_argument("--learning_rate", type=positive_float, default=0.001, help="of Adam")
    group.add_argument("--shot", type=positive, default=16, help="labelled images of each class")
    group.add_argument("--shot_normal", type=count, help="normal ones (default: --shot)")
    group.add_argument("--shot_abnormal", type=count, help="abnormal ones, 0 for none (default: --shot)")
    group.add_argument("--prompt_name", type=words, help="what the prompts call the object (default: the data set's)")
    group.add_argument("--prompts", type=read_prompts, metavar="FILE", help="JSON with other state phrases (README)")
    group.add_argument(
        "--iterate", type=int, default=0, help="line of the few-shot list; negative: sample with the seed"
    )
    group.add_argument("--select", default="test", choices=tuple(SELECTS), help="which epoch is reported and saved")
    group.add_argument("--eval_every", type=positive, default=1, help="epochs between evaluations")
    group.add_argument(
        "--log_images_every", type=int, default=10, help="epochs between W&B pictures, and the last; 0: none"
    )
    group.add_argument("--log_model", action="store_true", help="upload the checkpoint to W&B as an artifact")
    group.add_argument("--save_model", action=argparse.BooleanOptionalAction, default=True, help="write the checkpoint")
    options = parser.parse_args(arguments)
    for flag in ("shot_normal", "shot_abnormal"):
        if getattr(options, flag) is None:
            setattr(options, flag, options.shot)
    if not options.shot_normal:
        raise InputError("--shot_normal 0: training needs normal shots; only --shot_abnormal may be 0")
    return options


def shots_words(options: argparse.Namespace) -> str:
    """16shot, or 16n4a-shot where the classes differ."""
    normal, abnormal = options.shot_normal, options.shot_abnormal
    return f"{normal}shot" if normal == abnormal else f"{normal}n{abnormal}a-shot"


def losses_note(normal: int, abnormal: int) -> str | None:
    """What the paper's losses mean with unequal shots, in a line; None for equal ones."""
    if not abnormal:
        return (
            "losses: no abnormal shots, so they only draw normal images and pixels towards the normal prompt and away "
            "from the abnormal one; nothing shows what abnormal looks like, the frozen CLIP alone has to tell"
        )
    if normal != abnormal:
        return (
            f"losses: means over all images, as published, without weights: the {normal} normal shots together count "
            f"{normal / abnormal:.3g} times as much as the {abnormal} abnormal ones"
        )
    return None


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

    `text_features` (D, 2), with their graph, save the first step's pass through the text tower.
    """
    settings, device, autocast = detector.settings, store.backbone.clip.device, store.backbone.autocast
    heads = ("det", "seg") if data.masks is not None else ("det",)
    sums = torch.zeros(3, dtype=torch.float64)
    batches = order.split(batch_size)
    for step, batch in enumerate(batches):
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
        if not math.isfinite(parts.total.item()):
            raise InputError(f"the loss became {parts.total.item()} at step {step + 1}; lower --learning_rate")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (scaler.scale(parts.total) if scaler else parts.total).backward()
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        sums += torch.stack([part.detach() for part in parts]).double().cpu()
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


def fit(
    detector: Detector,
    store: FeatureStore,
    data: TrainingSet,
    test: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    select: str = "test",
    valid: Sequence[Sample] = (),
    eval_every: int = 1,
    on_epoch: Callable[[EpochReport, bool], None] = lambda report, best: None,
    collector: Callable[[int, bool], Collector | None] = lambda epoch, last: None,
) -> tuple[EpochReport, EpochReport]:
    """Train; call `on_epoch(report, is_new_best)` after each epoch.

    Returns:
        The selected epoch and the last one. A new best must be strictly better, starting from 0, as published.
    """
    optimizers = make_optimizers(detector.adapters, detector.prompts, learning_rate)
    # bfloat16 has float32's range; float16 gradients need scaling, which the published code left out.
    scaler = torch.amp.GradScaler(store.backbone.clip.device.type) if store.backbone.autocast is torch.float16 else None
    shuffle = torch.Generator().manual_seed(seed)
    best_score, best = 0.0, None
    text = None
    for epoch in range(epochs):
        start = time.perf_counter()
        order = torch.randperm(len(data.items), generator=shuffle)
        try:
            loss = fit_epoch(detector, store, data, optimizers, order, batch_size, text, scaler)
        except InputError as error:
            raise InputError(f"epoch {epoch + 1}: {error}") from error
        last = epoch == epochs - 1
        due = last or (epoch + 1) % eval_every == 0
        # One pass through the text tower serves this evaluation (in float32) and the next step, which has the same
        # contexts; under autocast that step makes its own.
        with torch.set_grad_enabled(not last and store.backbone.autocast is None):
            text = detector.prompts()
        frozen_text = text.detach()
        text = None if store.backbone.autocast else text
        shown = collector(epoch, last) if due else None
        report = EpochReport(
            epoch, loss, text_similarity(frozen_text),
            evaluate(detector, store, test, text_features=frozen_text, aupro=shown is not None, on_batch=shown)
            if due else None,
            evaluate(detector, store, valid, text_features=frozen_text) if due and select == "valid" else None,
            time.perf_counter() - start,
        )  # fmt: skip
        judged = report.valid if select == "valid" else report.test
        better = last if select == "last" else due and judged.selection_score > best_score
        if better or (last and best is None):
            best, best_score, better = report, judged.selection_score if judged else 0.0, True
        on_epoch(report, better)
    return best, report


@dataclass
class Setup:
    """What the arguments stand for."""

    shots: Shots
    settings: Settings
    detector: Detector
    store: FeatureStore
    data: TrainingSet
    test: list[Sample]
    valid: list[Sample]  # what is left of valid/ after the shots, with --select valid


def prepare(options: argparse.Namespace) -> Setup:
    """Arguments -> data, backbone, model, and the store that will keep the features."""
    set_seed(options.seed)
    device = pick_device(options.device)
    dataset = MedicalDataset.open(options.obj, options.data_path, options.data_root)
    shots = dataset.shots(options.shot_normal, options.shot_abnormal, options.iterate, options.seed)
    test, valid = dataset.samples("test"), []
    if options.select == "valid":
        used = {sample.path for sample in (*shots.abnormal, *shots.normal)}
        valid = [sample for sample in dataset.samples("valid") if sample.path not in used]
    print(f"{options.obj}: {len(test)} test images ({sum(s.label for s in test)} abnormal); shots from {shots.source}")
    for kind, names in shots.names().items():
        print(f"  {kind} shots: {' '.join(names) or 'none'}")
    for note in (dataset.split_note(), losses_note(len(shots.normal), len(shots.abnormal))):
        if note:
            print(note)

    clip = create_model(
        options.model_name, options.pretrain, options.img_size, weights=options.weights, fidelity=options.fidelity,
        seed=options.seed, device=device,
    )  # fmt: skip
    say_weights(clip)
    settings = make_settings(options, dataset, clip)
    detector = Detector(clip, settings).to(device)
    store = make_store(options, clip, detector)
    data = TrainingSet.build(shots, settings.img_size, settings.pixel_metrics, torch.rand(2, 2))
    return Setup(shots, settings, detector, store, data, test, valid)


def warn_of_leaks(setup: Setup) -> None:
    """A line on stderr where a shot is also in the test set; the store has hashed every file by now."""
    hashes = setup.store.hashes
    shots = (*setup.shots.normal, *setup.shots.abnormal)
    found = leaks(shots, setup.test, lambda sample: hashes[sample.path])
    if found:
        shot, twin = found[0]
        print(
            f"warning: {len(found)} test images equal a shot, which flatters every number: {twin.name} is {shot.name}; "
            f"`python -m dataset.check` shows them all",
            file=sys.stderr,
        )


def main() -> None:
    """Arguments -> data, backbone, features, model -> epochs -> checkpoint."""
    options = parse()
    name = (
        options.exp_name or f"{options.obj}-{shots_words(options)}-{options.fidelity}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    if options.out_json:
        writable(options.out_json, "--out_json")
    ckpt_path = writable(Path(options.save_path) / f"{options.obj}.pth", "--save_path") if options.save_model else None
    setup = prepare(options)
    settings, shots, detector = setup.settings, setup.shots, setup.detector
    clip = setup.store.backbone.clip
    setup.store.prepare([*setup.data.items, *(Item(sample) for sample in (*setup.test, *setup.valid))])
    setup.store.release_tower()
    warn_of_leaks(setup)

    config = {**vars(options), **settings.to_dict(), "shots": shots.names(), "shots_from": shots.source, **versions()}
    group = f"{options.obj}-{shots_words(options)}"
    tags = (options.obj, shots_words(options), options.model_name, options.fidelity)
    with Tracker.start(name, config, run_dir=Path("runs") / name, tags=tags, group=group) as tracker:
        about = {
            "shots": shots.names(), "shots_from": shots.source, "select": options.select, "options": vars(options),
            "pretrain": clip.info.pretrain, "weights": clip.info.source, **versions(),
        }  # fmt: skip
        dashboard = Dashboard(tracker, setup.test, settings, len(setup.data.items), options.log_images_every)

        def on_epoch(report: EpochReport, is_best: bool) -> None:
            print(report.line(options.epoch), flush=True)
            if is_best and ckpt_path:
                figures = {"epoch": report.epoch + 1, "auc": report.test.auc, "pauc": report.test.pauc}
                Checkpoint(settings, detector.parts(), {**about, "metrics": figures}).save(ckpt_path)
            dashboard.epoch(report, is_best)

        best, last = fit(
            detector, setup.store, setup.data, setup.test, epochs=options.epoch, batch_size=options.batch_size,
            learning_rate=options.learning_rate, seed=options.seed, select=options.select, valid=setup.valid,
            eval_every=options.eval_every, on_epoch=on_epoch, collector=dashboard.collector,
        )  # fmt: skip
        dashboard.finish(best, ckpt_path if options.log_model else None)

    protocol = f"epoch {best.epoch + 1} of {options.epoch}, {SELECTS[options.select]} (--select {options.select})"
    print(f"last epoch: {last.test.line()}   [epoch {last.epoch + 1} of {options.epoch}]")
    print(f"selected:   {best.test.line()}   [{protocol}]")
    if ckpt_path:
        print(f"checkpoint: {ckpt_path}")
    if options.out_json:
        result = result_json(settings, best.test, options.select)
        result["selected"] = protocol
        result["last"] = {"auc": last.test.auc, "pauc": last.test.pauc}
        with atomic_path(options.out_json) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    print(published_lines(settings.obj, best.test))


if __name__ == "__main__":
    run_cli(main)
