"""Train MadCLIP.

    python train.py --obj Brain --shot 16                 the paper's setting, OpenAI weights under CLIP/ckpt
    python train.py --obj Chest --shot 4 --select last    report the last epoch, not the best on the test set
    python train.py --obj Brain --model_name ViT-tiny-14-56 --pretrain random --epoch 20      a dry run in a minute
    python train.py --resume runs/NAME                    continue a run that was stopped or killed
    torchrun --nproc_per_node=4 train.py --obj Brain      four processes, a GPU each; the same numbers

Flags -> data -> towers -> tokens -> detector -> epochs -> result. The frozen tower processes each image once.
"""

from engine.files.config import train_options as parse
from utils import run_script

if __name__ == "__main__":  # flags are parsed before torch is imported: --help and errors in flags answer at once
    run_script("train", parse)

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from CLIP.model import CLIP
from CLIP.weights import find_weights
from engine import distributed
from engine.calibration import describe_threshold
from engine.detector import Detector
from engine.distributed import pick_autocast, pick_device
from engine.evaluation import Evaluation, Masks, evaluate
from engine.features import TokenStore
from engine.files.checkpoint import Checkpoint, copy, print_weights_info
from engine.files.config import SELECTS, Settings, new_settings
from engine.files.run import RunFolder, check_outputs, open_run, published_lines, result_json
from engine.metrics import measure
from engine.report.figures import plots
from engine.report.page import write_page
from engine.report.tracking import Tracker, start_tracker
from engine.training import Splits, TrainingSet, TrainingState, calibrate_run, check_losses, epoch_line
from Prompt.promptChooser import text_similarity
from utils import set_seed, write_json


@dataclass
class Setup:
    """Everything that a run needs, built from the flags."""

    options: argparse.Namespace
    settings: Settings
    splits: Splits
    training: TrainingSet
    masks: dict[str, Masks | None]  # of the splits `test` and `valid`, decoded once
    store: TokenStore
    clip: CLIP  # the frozen towers
    detector: Detector
    state: TrainingState  # everything that changes during training
    run: RunFolder
    config: dict[str, Any]  # the content of config.json
    metadata: dict[str, Any]  # stored in every checkpoint: no path, no host name


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    distributed.start()
    train(options)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train with the given options; returns the content of result.json.

    Raises:
        InputError: any error that the user can correct.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the files of the last finished epoch are complete.
    """
    setup = build(options)
    run, state = setup.run, setup.state
    with run.writing():
        run.load_into(state, options.epoch)
        if options.resume is None:  # a resumed run: only after `check_contents`, so that a refused one stays unchanged
            run.write_config(setup.config)
        setup.store.fill(setup.clip)
        setup.splits.print_warnings(setup.training.masks, setup.store)
        run.check_contents(setup.config, setup.splits.digest(setup.store))
        if 0 < state.epoch == state.best_epoch:  # perhaps stopped between writing last.pth and best.pth
            save_best(setup)
        with start_tracker(options, setup.settings, run, setup.config) as tracker:
            return finish(setup, tracker, train_epochs(setup, tracker))


def build(options: argparse.Namespace) -> Setup:
    """Build data, towers, detector and run folder from the flags; the image tower is loaded only if it is needed."""
    set_seed(options.seed)
    check_outputs(options)
    splits = Splits.open(options)
    options.select = splits.select
    splits.describe()
    device = pick_device(options.device)
    weights = find_weights(options.model_name, options.pretrain, options.weights, options.seed, options.image_tower)
    print_weights_info(weights)
    settings = new_settings(options, splits.dataset, weights)
    training = TrainingSet.build(splits.shots, settings, options.seed)
    masks = {name: Masks.of(getattr(splits, name), settings, options.num_workers, device) for name in ("test", "valid")}
    store = TokenStore(settings, weights, pick_autocast(options.precision, device), device, options)
    store.plan(training.items, splits.own_batches(settings, device))
    clip = store.load_clip()
    detector = Detector(clip, settings, options.seed).to(device)
    state = TrainingState(detector, store.autocast, options.learning_rate, options.seed, splits.select)
    run, config, metadata = open_run(options, splits, settings, device)
    training = training.to(store)
    return Setup(options, settings, splits, training, masks, store, clip, detector, state, run, config, metadata)


def train_epochs(setup: Setup, tracker: Tracker) -> Evaluation | None:
    """Train the remaining epochs, saving the state after each one for --resume; returns the last evaluation, if any."""
    options, splits, state, store = setup.options, setup.splits, setup.state, setup.store
    text = evaluation = None
    for epoch in range(state.epoch + 1, options.epoch + 1):
        start = time.perf_counter()
        order = torch.randperm(len(setup.training), generator=state.shuffle)
        losses = []
        for rows, labels, view_masks in setup.training.batches(order, options.batch_size):
            losses.append(state.step(store, rows, labels, view_masks, text))  # (3,) on the device
            text = None
        loss = check_losses(torch.stack(losses), epoch)  # (3,); stops a diverged run before it scores any image
        distributed.align(setup.detector)

        last, due = epoch == options.epoch, epoch % options.eval_every == 0
        # One pass through the text tower serves this evaluation (in float32) and the next step, whose contexts are the
        # same. Under autocast, the next step computes its own text features.
        with torch.set_grad_enabled(not last and state.autocast is None):
            text = setup.detector.prompts()  # (D, 2)
        features, text = text.detach(), text if text.requires_grad else None
        test = valid = None
        if due or last:
            evaluation = evaluate(setup.detector, store, splits.test, features)
            test = measure(evaluation, setup.masks["test"])
            if splits.valid:
                valid = measure(evaluate(setup.detector, store, splits.valid, features), setup.masks["valid"])
        seconds = time.perf_counter() - start
        record = state.finish_epoch(loss, text_similarity(features), test, valid, due, seconds)
        setup.run.save(state.state_dict(), state.history)
        if record["best"]:
            save_best(setup)
        if test and evaluation:
            tracker.log_sheet(epoch - 1, evaluation, setup.masks["test"], last)
        images = len(order) + len(splits.test) * bool(test) + len(splits.valid) * bool(valid)
        tracker.log_epoch(state.history, test, valid, seconds, images)
        print(epoch_line(record, options.epoch, seconds), flush=True)
        state.warn_if_stuck(options.epoch)
    return evaluation


def save_best(setup: Setup) -> None:
    """Save the detector as the checkpoint of the selected epoch, in the run's folder and, by default, --save_path."""
    record = setup.state.history[setup.state.selected_epoch - 1]
    metadata = {**setup.metadata, "metrics": {name: record[name] for name in ("epoch", "auc", "pauc")}}
    if distributed.is_main():
        Checkpoint(setup.settings, setup.detector.parts(), metadata).save(setup.run.best)
        if setup.options.save_model:
            copy(setup.run.best, Path(setup.options.save_path) / f"{setup.options.obj}.pth", metadata)


def finish(setup: Setup, tracker: Tracker, evaluation: Evaluation | None) -> dict[str, Any]:
    """Measure the last and the selected epoch in full, set the threshold, write and print the result."""
    options, settings, splits, state, run = setup.options, setup.settings, setup.splits, setup.state, setup.run
    masks, patients, last = setup.masks["test"], splits.shot_patients(), None
    evaluation = evaluation or evaluate(setup.detector, setup.store, splits.test)
    if state.selected_epoch < state.epoch:
        last = measure(evaluation, masks, full=True, without=patients)
        Checkpoint.load(run.best).restore(setup.detector, setup.clip, run.best)
        evaluation = evaluate(setup.detector, setup.store, splits.test)
    threshold = calibrate_run(setup.detector, setup.store, splits, setup.training, options.threshold_at)
    best = measure(evaluation, masks, full=True, pixel_threshold=(threshold or {}).get("pixel_value"), without=patients)
    last = last or best
    counts = {"n_normal": int((evaluation.labels == 0).sum()), "n_abnormal": int(evaluation.labels.sum())}
    select = options.select if state.best_epoch else "last"  # also if no epoch was due (--eval_every)
    setup.metadata |= {"threshold": threshold, "figures": {**best.values, **counts}, "select": select}
    save_best(setup)
    selected = f"epoch {state.selected_epoch} of {state.epoch}, {SELECTS[select]} (--select {options.select})"
    result = result_json(settings, evaluation, best, select) | {
        "selected": selected, "selected_epoch": state.selected_epoch, "last": {"epoch": state.epoch, **last.values},
        "decision": threshold, "seed": options.seed, "shots": splits.shots.names, "seconds": state.seconds,
        "run": str(run.path),
    }  # fmt: skip
    if distributed.is_main():
        write_json(run.result, result)
        metadata = {**setup.metadata, "metrics": {"epoch": state.selected_epoch}}
        figures = plots(evaluation, best, metadata, state.history)
        page = write_page(run.path, evaluation, masks, best, settings, metadata, figures)
        if options.out_json:
            write_json(options.out_json, result, "--out_json")
        tracker.log_result(state.history[state.selected_epoch - 1], best, page, run.best if options.log_model else None)
    print(f"last epoch: {last.line()}   [epoch {state.epoch} of {state.epoch}]")
    print(f"selected:   {best.line()}   [{selected}]")
    checkpoint = f"{Path(options.save_path) / options.obj}.pth" if options.save_model else run.best
    print(f"{describe_threshold(threshold)}\ncheckpoint: {checkpoint}\nrun:        {run.path}")
    print(f"report:     {run.path / 'index.html'}\n{published_lines(settings.obj, best)}")
    return result
