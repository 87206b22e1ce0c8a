"""Train MadCLIP.

    python train.py --obj Brain --shot 16                 the paper's setting, OpenAI weights under CLIP/ckpt
    python train.py --obj Chest --shot 4 --select last    report the last epoch, not the best on the test set
    python train.py --obj Brain --model_name ViT-tiny-14-56 --pretrain random --epoch 20      a dry run in a minute
    python train.py --resume runs/NAME                    go on with a run that was stopped or killed
    torchrun --nproc_per_node=4 train.py --obj Brain      four processes, a GPU each; the same numbers

Arguments -> data, backbone, features, model -> epochs -> checkpoint. The frozen tower runs once for each image; what
is trained every epoch are the adapters and the prompts' contexts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from CLIP import create_model
from dataset import MedicalDataset, Sample, Shots, leaks, some
from engine import distributed
from engine.calibrate import Rule, calibrate, describe_threshold, leftover, rule
from engine.checkpoint import Checkpoint, copy, versions
from engine.dashboard import Dashboard
from engine.detector import Detector, Settings
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
    run_name,
    say_weights,
    words,
    writable,
)
from engine.page import Report
from engine.run import RunFolder, StopSignals, surroundings
from engine.towers import Towers
from engine.tracking import Tracker, warn_of_tracked_key
from engine.training import EpochReport, TrainingSet, TrainingState, fit
from Prompt import read_prompts
from utils import InputError, Parser, run_cli, set_seed, write_json

SELECTS = {
    "test": "best epoch on the test set, the published protocol",
    "valid": "best epoch on what is left of valid/ after the shots",
    "last": "last epoch",
}
# What --resume may change: the length, the machine, and what is written where; nothing that shapes the numbers.
RESUMABLE = {
    "resume", "epoch", "data_path", "data_root", "weights", "device", "num_workers", "cache", "cache_dir", "save_path",
    "save_model", "out_json", "run_dir", "exp_name", "log_images_every", "log_model",
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The published flags with the published defaults, and ours beside them."""
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    add_data_flags(parser, obj="Liver")
    add_model_flags(parser, from_checkpoint=False)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--exp_name", type=run_name, help="name of the run in W&B and under runs/ (default: made from the settings)"
    )
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
    group.add_argument(
        "--threshold_at", type=rule, default="f1", metavar="RULE", help="threshold of the decision: f1 (max.), fpr=0.05"
    )
    group.add_argument("--eval_every", type=positive, default=1, help="epochs between evaluations")
    group.add_argument(
        "--log_images_every", type=count, default=10, help="epochs between W&B pictures, and the last; 0: none"
    )
    group.add_argument("--log_model", action="store_true", help="upload the checkpoint to W&B as an artifact")
    group.add_argument("--save_model", action=argparse.BooleanOptionalAction, default=True, help="write the checkpoint")
    group.add_argument("--run_dir", default="runs", help="folder of the runs; each has a folder of its own there")
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; its settings hold")
    options = parser.parse_args(arguments)
    if options.resume is not None:
        stored = RunFolder.open(options.resume).read_config()["options"]
        parser.set_defaults(**{name: value for name, value in stored.items() if name in options and name != "resume"})
        options = parser.parse_args(arguments)
        for name, value in stored.items():
            if name in options and name not in RESUMABLE and getattr(options, name) != value:
                raise InputError(
                    f"--{name} {getattr(options, name)} contradicts the run, started with {value}: leave it out"
                )
        return options
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
class Setup:
    """What the arguments stand for."""

    shots: Shots
    settings: Settings
    detector: Detector
    store: FeatureStore
    data: TrainingSet
    test: list[Sample]
    valid: list[Sample]  # what is left of valid/ after the shots, with --select valid
    unused: list[Sample]  # all that is left of valid/ after the shots
    left: list[Sample]  # some of that, for the decision threshold

    @property
    def items(self) -> list[Item]:
        """Everything that passes through the tower."""
        return [*self.data.items, *(Item(sample) for sample in (*self.test, *self.valid, *self.left))]


def prepare(options: argparse.Namespace, towers: Towers | None = None) -> Setup:
    """Arguments -> data, backbone, model, and the store that will keep the features."""
    set_seed(options.seed)
    device = pick_device(options.device)
    dataset = MedicalDataset.open(options.obj, options.data_path, options.data_root)
    shots = dataset.shots(options.shot_normal, options.shot_abnormal, options.iterate, options.seed)
    used = {sample.path for sample in (*shots.abnormal, *shots.normal)}
    test, rest = dataset.samples("test"), [sample for sample in dataset.samples("valid") if sample.path not in used]
    valid, left = rest if options.select == "valid" else [], leftover(rest)
    if options.select == "valid":
        abnormal = sum(sample.label for sample in valid)
        if not 0 < abnormal < len(valid):
            raise InputError(
                f"--select valid: beside the shots valid/ holds {len(valid) - abnormal} normal and {abnormal} abnormal "
                f"images, and needs some of both; take fewer shots, or --select last"
            )
    print(f"{options.obj}: {len(test)} test images ({sum(s.label for s in test)} abnormal); shots from {shots.source}")
    for kind, names in shots.names().items():
        print(f"  {kind} shots: {' '.join(names) or 'none'}")
    for note in (dataset.split_note(), losses_note(len(shots.normal), len(shots.abnormal))):
        if note:
            print(note)

    clip = (towers.clip if towers else create_model)(
        options.model_name, options.pretrain, options.img_size, weights=options.weights, fidelity=options.fidelity,
        seed=options.seed, device=device,
    )  # fmt: skip
    say_weights(clip)
    settings = make_settings(options, dataset, clip)
    detector = Detector(clip, settings).to(device)
    store = (towers.store if towers else make_store)(options, clip, detector)
    data = TrainingSet.build(shots, settings.img_size, settings.pixel_metrics, torch.rand(2, 2))
    return Setup(shots, settings, detector, store, data, test, valid, rest, left)


def warn_of_data(setup: Setup) -> None:
    """Lines on stderr for images in valid and in test, and for shots with an empty mask."""
    if not distributed.is_main():
        return
    hashes = setup.store.hashes  # of all that was prepared
    shots = (*setup.shots.normal, *setup.shots.abnormal)
    for samples, what in ((shots, "a shot, which flatters every number"), (setup.unused, "another image of valid/")):
        if found := leaks(samples, setup.test, lambda sample: hashes.get(sample.path) or sample.content_hash()):
            sample, twin = found[0]
            print(
                f"warning: {len(found)} test images equal {what}: {twin.name} is {sample.name}; "
                f"`python -m dataset.check` shows them all",
                file=sys.stderr,
            )
    if setup.data.masks is not None:  # view by view, so the plain view of the abnormal shots comes first
        pairs = zip(setup.shots.abnormal, setup.data.masks, strict=False)
        if empty := [sample.name for sample, mask in pairs if not mask.any()]:
            print(
                f"warning: {len(empty)} abnormal shots have an empty mask at this size, so all their pixels count as "
                f"normal: {some(empty)}",
                file=sys.stderr,
            )


def describe(options: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What config.json, W&B and the checkpoint say about a run."""
    clip = setup.store.backbone.clip
    return {
        "options": {name: value for name, value in vars(options).items() if name != "resume"},
        "settings": setup.settings.to_dict(),
        "shots": setup.shots.names(),
        "shots_from": setup.shots.source,
        "weights": clip.info.source,
        "pretrain": clip.info.pretrain,
        **versions(),
        **surroundings(clip.device),
    }


def open_run(options: argparse.Namespace, setup: Setup) -> tuple[RunFolder, dict[str, Any]]:
    """The run's folder and its config, not written yet: a new one, or one to resume with the same shots and weights."""
    config = describe(options, setup)
    if options.resume is None:
        made_up = f"{options.obj}-{shots_words(options)}-{options.fidelity}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(options.run_dir, options.exp_name or made_up)
    else:
        run = RunFolder.open(options.resume)
        stored = run.read_config()
        for name in ("settings", "shots"):
            if stored.get(name) != config[name]:
                now, then = config[name], stored.get(name) or {}
                key = next((key for key in now if now[key] != then.get(key)), name)
                raise InputError(f"--resume {run.path}: {key} was {then.get(key)}, but is now {now.get(key)}")
        config |= {"wandb_id": stored.get("wandb_id", ""), "resumed": stored.get("resumed", 0) + 1}
    return run, config


def train(options: argparse.Namespace, towers: Towers | None = None) -> dict[str, Any]:
    """Arguments -> data, backbone, features, model -> epochs -> checkpoint and result.

    `towers` are shared with other runs of this process.

    Returns:
        What result.json in the run's folder holds.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the files of the last finished epoch are complete.
    """
    with StopSignals() as signals:
        if distributed.is_main():
            warn_of_tracked_key()
        if options.out_json:
            writable(options.out_json, "--out_json")
        if options.save_model:
            writable(Path(options.save_path) / f"{options.obj}.pth", "--save_path")
        return Training(options, prepare(options, towers), signals).run()


class Training:
    """One run: its folder, the state that --resume puts back, and who is told of an epoch."""

    def __init__(self, options: argparse.Namespace, setup: Setup, signals: StopSignals) -> None:
        self.options, self.setup, self.signals = options, setup, signals
        self.folder, self.config = open_run(options, setup)
        autocast = setup.store.backbone.autocast
        self.state = TrainingState.start(setup.detector, autocast, options.learning_rate, options.seed)
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.logged_best = None  # see `Dashboard.best`
        if found := self.folder.load():
            stored, self.history = found
            self.state.load_state_dict(stored)
            self.logged_best = stored["dashboard"]
            if self.state.epoch > options.epoch:
                done = f"{self.folder.path} has finished {self.state.epoch} already"
                raise InputError(f"--epoch {options.epoch}: {done}")
        self.folder.write_config(self.config)  # not before, or a refused --resume would spoil it
        private = ("settings", "host", "device", "device_name", "threads", "command", "wandb_id")
        self.about = {name: value for name, value in self.config.items() if name not in private}
        self.about |= {"select": options.select, "run": str(self.folder.path)}

    def run(self) -> dict[str, Any]:
        """Train what is left to train, and measure."""
        options, setup, state = self.options, self.setup, self.state
        try:
            setup.store.prepare(setup.items)
            setup.store.release_tower()
            warn_of_data(setup)
            if 0 < state.epoch == state.best_epoch + 1:  # killed between last.pth and best.pth, perhaps
                self.save_best()
            with self.start_tracker() as tracker:
                views = len(setup.data.items)
                board = Dashboard(
                    tracker, setup.test, setup.settings, views, options.log_images_every, self.logged_best
                )
                fit(
                    state, setup.store, setup.data, setup.test, epochs=options.epoch, batch_size=options.batch_size,
                    select=options.select, valid=setup.valid, eval_every=options.eval_every,
                    on_epoch=partial(self.on_epoch, board), collector=board.collector,
                )  # fmt: skip
                best, result = self.finish()
                board.finish(best, state.best_epoch, self.folder.best if options.log_model else None)
        except KeyboardInterrupt:
            if distributed.is_main():
                print(
                    f"stopped after epoch {len(self.history)} of {options.epoch}; "
                    f"to go on: python train.py --resume {self.folder.path}",
                    file=sys.stderr,
                )
            raise
        return result

    def on_epoch(self, board: Dashboard, report: EpochReport, is_best: bool) -> None:
        """Write the epoch's files, then say so; an interrupt waits."""
        with self.signals.held():
            self.history.append(report.record(is_best))
            board.epoch(report, is_best)
            self.folder.save({**self.state.state_dict(), "dashboard": board.best}, self.history)
            if is_best:
                self.save_best()
            print(report.line(self.options.epoch), flush=True)

    def save_best(self) -> None:
        """Write the detector as the checkpoint of the selected epoch."""
        if not distributed.is_main():
            return
        line = self.history[self.state.best_epoch]
        metrics = {name: line[name] for name in ("epoch", "auc", "pauc")}
        about = {**self.about, "metrics": metrics}
        Checkpoint(self.setup.settings, self.setup.detector.parts(), about).save(self.folder.best)
        if self.options.save_model:
            copy(self.folder.best, Path(self.options.save_path) / f"{self.options.obj}.pth")

    def start_tracker(self) -> Tracker:
        """The W&B run, or its continuation; its id goes into config.json."""
        if not distributed.is_main():
            return Tracker()
        options, config = self.options, self.config
        nested = ("options", "settings", "wandb_id")
        shown = {name: value for name, value in config.items() if name not in nested}
        tracker = Tracker.start(
            self.folder.path.name, {**config["options"], **config["settings"], **shown}, run_dir=self.folder.path,
            tags=(options.obj, shots_words(options), options.model_name, options.fidelity),
            group=f"{options.obj}-{shots_words(options)}", run_id=config.get("wandb_id"),
        )  # fmt: skip
        self.folder.write_config({**config, "wandb_id": tracker.id or config.get("wandb_id", "")})
        return tracker

    def finish(self) -> tuple[Evaluation, dict[str, Any]]:
        """Evaluate the last and the selected epoch in full, set the threshold, print and write the result.

        Returns:
            The selected epoch's evaluation and result.json. The detector holds that epoch's tensors from here on.
        """
        options, setup, state = self.options, self.setup, self.state
        report = Report(setup.settings)
        is_last = state.best_epoch + 1 == state.epoch
        last = best = evaluate(setup.detector, setup.store, setup.test, full=True, on_batch=report if is_last else None)
        if not is_last:
            Checkpoint.load(self.folder.best).restore(setup.detector, self.folder.best)
            best = evaluate(setup.detector, setup.store, setup.test, full=True, on_batch=report)
        chosen = SELECTS[options.select]
        protocol = f"epoch {state.best_epoch + 1} of {state.epoch}, {chosen} (--select {options.select})"
        threshold = calibrate(
            setup.detector, setup.store, setup.left, setup.data, Rule.parse(options.threshold_at), options.select
        )
        self.about["threshold"] = threshold
        self.save_best()
        result = {
            **result_json(setup.settings, best, options.select),
            "selected": protocol,
            "selected_epoch": state.best_epoch + 1,
            "last": {"epoch": state.epoch, "auc": last.auc, "pauc": last.pauc, **last.more},
            "decision": threshold,
            "seed": options.seed,
            "shots": setup.shots.names(),
            "seconds": state.seconds,
            "run": str(self.folder.path),
        }
        self.folder.write_result(result)
        if distributed.is_main():
            about = {**self.about, "metrics": {"epoch": state.best_epoch + 1}}
            report.save(self.folder.path, best, about, self.history)
            if options.out_json:
                write_json(options.out_json, result, "--out_json")
        print(f"last epoch: {last.line()}   [epoch {state.epoch} of {state.epoch}]")
        print(f"selected:   {best.line()}   [{protocol}]")
        print(describe_threshold(threshold))
        if options.save_model:
            print(f"checkpoint: {Path(options.save_path) / options.obj}.pth")
        print(f"run:        {self.folder.path}")
        print(f"report:     {self.folder.path / 'index.html'}")
        print(published_lines(setup.settings.obj, best))
        return best, result


def main() -> None:
    """Command line."""
    distributed.start()
    train(parse())


if __name__ == "__main__":
    run_cli(main)
