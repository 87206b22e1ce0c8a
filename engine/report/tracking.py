"""Weights & Biases: one small class that never asks, never waits long and never stops a training run; what a run shows.

Where a run goes (wandb's own settings, such as WANDB_MODE, WANDB_BASE_URL, WANDB_ENTITY and WANDB_DIR, are honoured):

    WANDB_MODE=disabled               nothing is written, and wandb is not even imported
    WANDB_MODE=offline, or no key     files under the run folder, and one line that says how to look at and sync them
    a key                             online; offline after all when the server does not take the run in time

The key is the one that wandb finds (WANDB_API_KEY, its settings, the netrc entry that `wandb login` writes), else that
of key.json.

What a run shows: panels by prefix, and the published keys (epoch, sim_texts, loss, AUC, pAUC, AUC+pAUC and their
...best) beside them. The summary is the selected epoch's.

    train/   losses and the cosine of the text features       time/      seconds an epoch, images a second
    test/    AUC, pAUC, AP, F1-max, their pixel versions      pictures/  curves/  scores/
    valid/   the same, with --select valid                    System     wandb's own: memory, CPU, GPU
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from utils import one_line, printable, redact

from .. import distributed
from ..files.config import Settings, shareable, shots_label

if TYPE_CHECKING:
    import argparse

    import wandb

    from ..evaluation import Evaluation, Masks
    from ..files.run import RunFolder
    from ..metrics import Metrics

PROJECT = "MadCLIP"
KEY_FILE = Path("key.json")
KEY_SHAPE = re.compile(r"([\w-]+-)?[0-9a-f]{40}|wandb_v1_\w+")
# Of config.json: the rest names this machine and its folders.
SHOWN = ("shots", "shots_from", "started", "madclip", "python", "torch", "torchvision", "git_commit", "resumed")
PLACE_HOLDERS = ("...", "paste-your-key-here")  # of key.json as it is published
QUIET: dict[str, Any] = {  # bounded in time, and without what could carry secrets: console, source code, git
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,  # host, user, program and folder
    "init_timeout": 15.0,  # wandb may add 10 s of grace
    "finish_timeout": 60.0,  # for the last upload; what is left stays on disk for `wandb sync`
    "finish_timeout_raises": True,
}
FIXED = 6  # test images that every set of pictures shows
WORST = 4  # of the false positives, and of the false negatives
# Plotted over the epoch; in the summary only as `log_epoch` puts them there.
SCALARS = ("sim_texts", "loss", "AUC*", "pAUC*", "train/*", "test/*", "valid/*", "time/*")
MEDIA = ("pictures/*", "curves/*", "scores/*")
MEASURED_ONCE = ("test/AUPRO", "test/Dice")  # at a run's end, of the selected epoch; a run that goes on has old ones
POINTS = 200  # of a curve
BINS = 32  # of a histogram
ROWS = 500  # of the table
THUMBNAIL = 96  # pixels of its pictures' longer side
WORDS = ("normal", "abnormal")


class Tracker:
    """One W&B run, or nothing at all: every method may be called either way. Make it with `Tracker.start`."""

    def __init__(self) -> None:
        self._run: Any = None  # a wandb.Run while all is well
        self._folder = ""  # its files, quoted for a shell
        self._secret = ""  # the key, to keep it out of messages
        self._pictures = True  # False where none are wanted, and after a failure in one of them
        self._pictured = -1  # the last epoch with pictures
        self.step = 0  # the last one that was logged
        self.best: dict[str, float] = {}  # the published ...best values

    @classmethod
    def start(
        cls,
        exp_name: str,
        config: Mapping[str, Any],
        *,
        run_dir: Path,
        tags: Sequence[str] = (),
        group: str | None = None,
        run_id: str | None = None,
        pictures: bool = True,
    ) -> Tracker:
        """Start the run `exp_name`; its files go to `run_dir`/wandb. Whatever fails costs the tracking, not the run.

        It returns within about 30 s, network or not.

        Args:
            exp_name: the run's name.
            config: shown with the run: JSON-like values, no secrets and no paths.
            run_dir: the run's folder.
            tags: of the run.
            group: of runs.
            run_id: another tracker's `id`: continues that run, online at once; offline in a second folder of the same
                id, which `wandb sync` appends once the first is uploaded.
            pictures: False (--log_images_every 0): no picture and no name of a file is given to W&B, the names of the
                shots in `config` included.
        """
        tracker = cls()
        tracker._pictures = pictures
        if os.environ.get("WANDB_MODE", "").lower() == "disabled":
            return tracker
        shown = {name: value for name, value in config.items() if pictures or name != "shots"}
        options = {"project": PROJECT, "name": exp_name, "config": shown, "tags": tags, "group": group}
        if run_id:
            options |= {"id": run_id, "resume": "allow"}
        options["dir"] = os.environ.get("WANDB_DIR") or str(run_dir)
        tracker._call_or_stop("could not start", lambda _: tracker._open(options))
        return tracker

    def _open(self, options: dict[str, Any]) -> None:
        # wandb reads this when it is imported. Its crash reports could carry more than the user expects.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Where tables and artifacts wait for their upload; by default below the user's home, apart from the run.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(options["dir"], "wandb", "data").absolute()))
        _skip_netrc_that_is_no_file()
        import wandb  # noqa: PLC0415 - it takes seconds, and is not needed when tracking is disabled

        resolved = wandb.setup(wandb.Settings(silent=True)).settings
        if resolved.mode == "disabled":  # `wandb disabled` was run in this folder
            return
        file_key = _read_key_file(KEY_FILE)  # read in any case, for its warning
        self._secret = resolved.api_key or file_key
        reason = "as asked for" if resolved.mode in ("offline", "dryrun") else self._online(options, file_key)
        if self._run is None:
            self._run = wandb.init(**options, mode="offline", settings=wandb.Settings(**QUIET))
        self._folder = shlex.quote(str(Path(self._run.dir).parent))
        look = f"look: `wandb leet {self._folder}`; upload: `wandb sync {self._folder}`"
        _print(f"offline ({reason}); {look}" if reason else f"online at {redact(self._run.url or '')}")
        if not reason and self._pictures:
            _print(
                "warning: pictures of the data set and the names of their files are uploaded; "
                "--log_images_every 0 prevents both"
            )
        self._run.define_metric("epoch", summary="none")
        for name in SCALARS:
            self._run.define_metric(name, step_metric="epoch", summary="none")
        for name in MEDIA:
            self._run.define_metric(name, step_metric="epoch")

    def _online(self, options: dict[str, Any], file_key: str) -> str:
        """Start the run online; why that did not work, "" where it did."""
        import wandb  # noqa: PLC0415

        setup = wandb.setup()
        try:
            if wandb.login(verify=False, prompt=False):  # a key from wandb's own places; asks nobody, and no server
                key = None
                self._secret = setup.settings.api_key or self._secret
            elif file_key:
                key = self._secret = file_key  # as a setting: wandb.login() would also write it to the user's netrc
            else:
                return "no API key"
            settings = wandb.Settings(**QUIET, api_key=key)
            self._run = wandb.init(**options, mode="online", settings=settings)
        except Exception as error:
            return f"{redact(setup.settings.base_url)} did not take the run: {one_line(error, self._secret)}"
        return ""

    @property
    def id(self) -> str:
        """What continues this run later (`start(run_id=...)`); "" where nothing is tracked."""
        return str(self._run.id) if self._run is not None else ""

    @property
    def takes_pictures(self) -> bool:
        """Whether `picture` would do anything."""
        return self._run is not None and self._pictures

    def remember_best(self, record: Mapping[str, Any]) -> None:
        """Keep an epoch's AUCs as the published ...best values, where it was the best so far."""
        if record["best"] and record["auc"] is not None:
            self.best = {f"{key}best": value for key, value in published(record["auc"], record["pauc"]).items()}

    def pictures_due(self, epoch: int, every: int, last: bool) -> bool:
        """Whether an evaluated epoch, from 0, is to be pictured: each `every` epochs (0: never), and the last one."""
        due = self.takes_pictures and every > 0 and (last or epoch - self._pictured >= every)
        if due:
            self._pictured = epoch
        return due

    def log(self, metrics: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Record scalars. Calls with the same `step` are merged; `step` must not decrease, or W&B drops the values.

        `commit` closes the step at once, so that it outlives a killed process.
        """
        self.step = self.step if step is None else step
        self._call("could not log", lambda run: run.log(dict(metrics), step=step, commit=commit))

    def picture(self, action: Callable[[Any], object]) -> None:
        """Call `action(run)`, which prepares or logs pictures; a failure ends the pictures and keeps the numbers."""
        if self.takes_pictures:
            self._pictures = self._succeeds("no pictures from here on", action)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary, which the table of runs shows."""
        self._call("could not write the summary", lambda run: run.summary.update(dict(values)))

    def upload(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Give a checkpoint to W&B as an artifact; a failure costs the artifact."""

        def log_artifact(run: Any) -> None:  # noqa: ANN401 - a wandb.Run
            import wandb  # noqa: PLC0415

            config = dict(run.config)
            shaped_by = {field.name: config[field.name] for field in fields(Settings) if field.name in config}
            name = f"{config.get('obj', 'checkpoint')}-{self.id}"
            artifact = wandb.Artifact(name, "model", metadata={**shaped_by, **metadata})
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        if self._run is not None:
            self._succeeds("the checkpoint was not uploaded", log_artifact)

    def finish(self, exit_code: int = 0) -> None:
        """Write and upload what is left, for about a minute at most; a second call does nothing."""
        self._call("could not finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _call(self, what: str, action: Callable[[Any], object]) -> None:
        if self._run is not None:
            self._call_or_stop(what, action)

    def _call_or_stop(self, what: str, action: Callable[[Any], object]) -> None:
        """Call `action(run)`; after a failure the tracker does nothing any more, and what was logged is kept."""
        files = f"; its files: {self._folder}" if self._folder else ""
        if not self._succeeds(f"{what}, tracking is off from here on{files}", action):
            self._run = None
            with contextlib.suppress(Exception, SystemExit):  # else wandb tries again, and louder, when Python exits
                sys.modules["wandb"].teardown()

    def _succeeds(self, consequence: str, action: Callable[[Any], object]) -> bool:
        """Call `action(run)`; a failure is a warning: tracking is a convenience, and may not end a training run."""
        try:
            action(self._run)
        except Exception as error:
            _print(f"warning: {consequence} ({one_line(error, self._secret)})")
            return False
        return True


# --- what a run shows ---


def start_tracker(
    options: argparse.Namespace,
    settings: Settings,
    run: RunFolder,
    config: dict[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> Tracker:
    """The W&B run of a training, or its continuation; its id goes into config.json.

    Args:
        options: of train.py.
        settings: of the checkpoint.
        run: its folder.
        config: config.json; what of it names no path and no host is shown in W&B.
        history: of the epochs that are finished already.
    """
    if not distributed.is_main():
        return Tracker()
    shown = {**shareable(options), **settings.to_dict()}
    shown |= {name: value for name, value in config.items() if name in SHOWN}
    label = shots_label(options)
    tracker = Tracker.start(
        run.path.name, shown, run_dir=run.path, tags=(options.obj, label, settings.model_name, options.fidelity),
        group=f"{options.obj}-{label}", run_id=config.get("wandb_id"), pictures=bool(options.log_images_every),
    )  # fmt: skip
    tracker.step = max(len(history) - 1, 0)
    for record in history:
        tracker.remember_best(record)
    run.write_config({**config, "wandb_id": tracker.id or config.get("wandb_id", "")})
    return tracker


def log_epoch(
    tracker: Tracker,
    record: Mapping[str, Any],
    test: Metrics | None,
    valid: Metrics | None,
    seconds: float,
    images: int,
    last: bool,
) -> None:
    """Log an epoch; that of a new best one is the summary, with all of its values and no others.

    Args:
        tracker: the run.
        record: the epoch's line of metrics.jsonl; W&B counts epochs from 0, as the published code does.
        test: metrics of the test set, None where it was not evaluated.
        valid: of valid/, likewise.
        seconds: that the epoch took.
        images: that passed through in it: views, and the images that were evaluated.
        last: the row stays open for what `log_result` adds.
    """
    if not tracker.id:
        return
    # With --select last no epoch is the best one before the last.
    selected = record["best"] or (last and not tracker.best)
    tracker.remember_best({**record, "best": selected})
    values = scalars(record, seconds, images, test, valid) | tracker.best
    tracker.log(values, step=record["epoch"] - 1, commit=not last)
    if selected:
        tracker.summary({**dict.fromkeys(MEASURED_ONCE), **values})


def log_pictures(tracker: Tracker, epoch: int, evaluation: Evaluation, masks: Masks | None, metrics: Metrics) -> None:
    """Log pictures, curves and histograms of an epoch's test set; before `log_epoch`, which closes the epoch's row."""
    tracker.picture(lambda run: run.log({**pictures(evaluation, masks, metrics), **curves(evaluation)}, step=epoch))


def log_result(
    tracker: Tracker,
    evaluation: Evaluation,
    metrics: Metrics,
    epoch: int,
    ckpt_path: Path | None,
) -> None:
    """Log the table of the selected epoch's scores, complete the summary, upload the checkpoint where asked for.

    Args:
        tracker: the run.
        evaluation: of the selected epoch.
        metrics: of `measure(..., full=True)`: AUPRO is not measured in every epoch.
        epoch: the selected one, from 0.
        ckpt_path: the checkpoint with --log_model, else None.
    """
    if not tracker.id:
        return
    tracker.summary(measured("test", metrics))
    tracker.picture(lambda run: run.log({"scores/table": _table(evaluation, metrics)}, step=tracker.step))
    if ckpt_path is not None:
        if not tracker.takes_pictures:
            _print("warning: --log_model uploads the checkpoint, which names its shots; --anonymous hides their names")
        tracker.upload(ckpt_path, {"epoch": epoch, "auc": metrics.auc, "pauc": metrics.pauc})


def scalars(
    record: Mapping[str, Any], seconds: float, images: int, test: Metrics | None, valid: Metrics | None
) -> dict[str, float]:
    """The published keys and ours, but for the ...best; see `log_epoch`."""
    similarity, total = record["similarity"], record["total"]
    values = {
        "epoch": record["epoch"] - 1, "sim_texts": similarity, "loss": total,
        "train/det": record["det"], "train/seg": record["seg"], "train/total": total, "train/sim_texts": similarity,
        "time/epoch": seconds, "time/images_per_second": images / max(seconds, 1e-9),
    }  # fmt: skip
    for split, metrics in (("test", test), ("valid", valid)):
        if metrics is not None:
            values |= measured(split, metrics)
    return values | published(test.auc, test.pauc) if test is not None else values


def published(auc: float, pauc: float | None) -> dict[str, float]:
    """AUCs of the test set under the published keys; on image-only data sets the published pAUC is the AUC again."""
    return {"AUC+pAUC": auc + (pauc or 0.0), "AUC": auc, "pAUC": auc if pauc is None else pauc}


def measured(split: str, metrics: Metrics) -> dict[str, float]:
    """The metrics that have a name in W&B, below `split`/."""
    from ..metrics import METRICS  # noqa: PLC0415 - imports scikit-learn

    values: dict[str, Any] = {"auc": metrics.auc, "pauc": metrics.pauc, **metrics.values}
    named = {METRICS[key][1]: value for key, value in values.items() if key in METRICS and METRICS[key][1]}
    return {f"{split}/{name}": value for name, value in named.items() if isinstance(value, int | float)}


def pictures(evaluation: Evaluation, masks: Masks | None, metrics: Metrics) -> dict[str, Any]:
    """A fixed handful of test images, and the most misleading of each class, beside their heat maps on one scale.

    False positives and negatives are those at the F1-max threshold on the test set; there may be none.
    """
    from .figures import examples  # noqa: PLC0415

    scores, labels, threshold = evaluation.image_scores, evaluation.labels, _threshold(metrics)
    order = np.argsort(-scores, kind="stable")
    false_positives = [int(i) for i in order if not labels[i] and scores[i] >= threshold][:WORST]
    false_negatives = [int(i) for i in order[::-1] if labels[i] and scores[i] < threshold][:WORST]
    groups = {
        "pictures/test": examples(evaluation, FIXED),
        "pictures/false_positives": false_positives,
        "pictures/false_negatives": false_negatives,
    }
    shown = sorted({i for group in groups.values() for i in group})
    maps = dict(zip(shown, evaluation.maps(shown).float().cpu().numpy(), strict=True))
    heat_range = (min(float(heat.min()) for heat in maps.values()), max(float(heat.max()) for heat in maps.values()))
    return {
        key: [_picture(evaluation, masks, metrics, i, maps[i], heat_range) for i in group]
        for key, group in groups.items()
        if group
    }


def _picture(
    evaluation: Evaluation,
    masks: Masks | None,
    metrics: Metrics,
    i: int,
    heat: np.ndarray,
    heat_range: tuple[float, float],
) -> wandb.Image:
    """An image beside its heat map; with masks, the true and the predicted one as W&B's overlays."""
    import wandb  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    from .images import alpha_blend, fit_mask, read_picture  # noqa: PLC0415

    size = evaluation.img_size
    picture = read_picture(evaluation.samples[i], size) or Image.new("RGB", (size, size), "grey")
    both = Image.new("RGB", (2 * picture.width, picture.height))
    both.paste(picture)
    both.paste(alpha_blend(picture, heat, heat_range), (picture.width, 0))
    caption = (
        f"{Path(evaluation.names[i]).name}: {WORDS[evaluation.labels[i]]}, score {evaluation.image_scores[i]:.4f} "
        f"(F1-max threshold on the test set {_threshold(metrics):.4f}), "
        f"colours {heat_range[0]:.3f} to {heat_range[1]:.3f}"
    )
    if masks is None:
        return wandb.Image(both, caption=f"{caption}; heat map: weak localisation, not measured")
    at = metrics.values["pixel_f1_max_threshold_on_test"]
    overlays = {
        name: {
            "mask_data": np.tile(fit_mask(mask, picture.size), 2).astype(np.uint8) * value,
            "class_labels": {value: words},
        }
        for name, mask, value, words in (
            ("truth", masks.get([i])[0].cpu().numpy(), 1, "lesion"),
            ("prediction", heat >= at, 2, "at least the pixel F1-max threshold on the test set"),
        )
    }
    return wandb.Image(both, caption=caption, masks=overlays)


def curves(evaluation: Evaluation) -> dict[str, Any]:
    """ROC and precision-recall curve of the images, and a histogram of the scores for each class."""
    import wandb  # noqa: PLC0415
    from sklearn.metrics import precision_recall_curve, roc_curve  # noqa: PLC0415

    labels, scores = evaluation.labels, evaluation.image_scores
    fpr, tpr, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    edges = np.histogram_bin_edges(scores, BINS)
    counts = [np.histogram(scores[labels == label], edges) for label in (0, 1)]
    return {
        "curves/ROC": _chart("ROC curve", "false positive rate", fpr, "true positive rate", tpr),
        "curves/PR": _chart("Precision-recall curve", "recall", recall[::-1], "precision", precision[::-1]),
        **{f"scores/{word}": wandb.Histogram(np_histogram=count) for word, count in zip(WORDS, counts, strict=True)},
    }


def _chart(title: str, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> Any:  # noqa: ANN401 - a wandb.plot.CustomChart
    """The chart of wandb.plot.roc_curve, which itself needs pandas."""
    import wandb  # noqa: PLC0415

    kept = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    rows = [["abnormal", float(x[i]), float(y[i])] for i in kept]
    return wandb.plot_table(
        "wandb/area-under-curve/v0",
        wandb.Table(columns=["class", x_name, y_name], data=rows),
        {"x": x_name, "y": y_name, "class": "class"},
        {"title": title, "x-axis-title": x_name, "y-axis-title": y_name},
    )


def _table(evaluation: Evaluation, metrics: Metrics) -> wandb.Table:
    """The images that are most wrong at the F1-max threshold on the test set, or least safely right, first."""
    import wandb  # noqa: PLC0415

    from .images import read_picture  # noqa: PLC0415

    labels, scores, threshold = evaluation.labels, evaluation.image_scores, _threshold(metrics)
    margins = np.where(labels == 1, scores - threshold, threshold - scores)
    order = np.argsort(margins, kind="stable")[:ROWS]
    if len(order) < len(margins):
        _print(f"scores/table holds the {ROWS} most wrong of {len(margins)} images")
    table = wandb.Table(columns=["image", "file", "label", "score", "decision", "margin"])
    for i in order:
        picture = read_picture(evaluation.samples[i], THUMBNAIL)
        thumbnail = None if picture is None else wandb.Image(picture, file_type="jpg")
        label, decision = WORDS[labels[i]], WORDS[int(scores[i] >= threshold)]
        table.add_data(thumbnail, evaluation.names[i], label, float(scores[i]), decision, float(margins[i]))
    return table


def _threshold(metrics: Metrics) -> float:
    return cast("float", metrics.values["f1_max_threshold_on_test"])


# --- keys and messages ---


def warn_of_tracked_key(path: Path = KEY_FILE) -> None:
    """Warn where key.json holds a key that looks real and git tracks it, whether or not W&B is used."""
    if not path.is_file():  # reading a pipe may never end
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if KEY_SHAPE.search(text) and _tracked(path):
        advice = f"run `wandb login` and restore the file, or run `git update-index --skip-worktree {path}`"
        _print(f"warning: {path} holds an API key and git tracks it: {advice}")


def _read_key_file(path: Path) -> str:
    """The key in key.json, in the published form or under `wandb_api_key`; "" for none or the place holder."""
    if not path.exists():
        return ""
    try:
        if not path.is_file():  # reading a pipe may never end
            raise OSError("no file")
        values = json.loads(path.read_text(encoding="utf-8"))
        key = values["api_key" if "api_key" in values else "wandb_api_key"].strip()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # may quote it: not shown
        _print(f'warning: {path} is not {{"api_key": "..."}}, so it is ignored')
        return ""
    return "" if key in PLACE_HOLDERS else str(key)


def _skip_netrc_that_is_no_file() -> None:
    """Let wandb read no netrc where that is a pipe or the like, which it would wait for."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if path.exists() and not path.is_file() and str(path) != os.devnull:
        _print(f"warning: {path} is no file, so it is ignored")
        os.environ["NETRC"] = os.devnull


def _tracked(path: Path) -> bool:
    command = ["git", "-C", str(path.absolute().parent), "ls-files", "-v", "--", path.name]
    try:
        result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):  # no git
        return False
    return result.startswith(b"H")  # "S": --skip-worktree was set, so no commit can pick the key up


def _print(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, or on a full disk
        print(f"W&B: {printable(message)}", file=sys.stderr, flush=True)
