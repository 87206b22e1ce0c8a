"""Weights & Biases: one run, that never asks and never stops a training.

Where it goes (wandb's own settings, such as WANDB_MODE, WANDB_BASE_URL, WANDB_ENTITY and WANDB_DIR, are honoured):

    WANDB_MODE=disabled               nothing is written, and wandb is not even imported
    WANDB_MODE=offline, or no key     files under the run folder, and one line that says how to upload them
    a key                             online; offline after all when the server does not take the run in time

The key is the one that wandb finds (WANDB_API_KEY, the netrc entry that `wandb login` writes), else that of key.json.

What a run shows, over the epoch: the published keys (epoch, sim_texts, loss, AUC, pAUC, AUC+pAUC and their ...best),
train/ (losses), test/ and valid/ (metrics), time/, `sheet` (test images with their heat maps) and, at the end,
`report`, the page. The summary is the selected epoch's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import InputError, blame, one_line, read_json, redact, warn

from .. import distributed
from ..evaluation import Evaluation, Masks
from ..files.config import Settings, shareable, shots_label
from ..files.run import RunFolder
from ..metrics import METRICS, Metrics
from .figures import sheet

PROJECT = "MadCLIP"
KEY_FILE = Path("key.json")
KEY_SHAPE = re.compile(r"([\w-]+-)?[0-9a-f]{40}|wandb_v1_\w+")  # not the place holder
# Of config.json: the rest names this machine and its folders.
SHOWN = ("shots", "shots_from", "started", "madclip", "python", "torch", "torchvision", "git_commit", "resumed")
OWN_SETTINGS: dict[str, Any] = {  # bounded in time, and without what names this machine or could carry secrets
    "silent": True, "console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True,
    "init_timeout": 15.0, "finish_timeout": 60.0,
}  # fmt: skip
Record = Mapping[str, Any]  # of an epoch, a line of metrics.jsonl; W&B counts epochs from 0, as the published code does


class Tracker:
    """One W&B run, or nothing at all: every method may be called either way. Make it with `start_tracker`."""

    def __init__(self, run: Any = None, pictures_every: int = 0, secret: str = "") -> None:  # noqa: ANN401 - a wandb.Run
        self._run, self._every, self._secret = run, pictures_every, secret
        self._pictured = -1  # the last epoch with pictures

    def log_epoch(
        self, history: Sequence[Record], test: Metrics | None, valid: Metrics | None, seconds: float, images: int
    ) -> None:
        """Log the newest epoch.

        Args:
            history: of all epochs so far.
            test: metrics of the test set, None where it was not evaluated.
            valid: of valid/, likewise.
            seconds: that the epoch took.
            images: that passed through in it: views, and the images that were evaluated.
        """
        values = scalars(history[-1]) | {"time/epoch": seconds, "time/images_per_second": images / max(seconds, 1e-9)}
        for split, metrics in (("test", test), ("valid", valid)):
            values |= measured(split, metrics) if metrics is not None else {}
        for record in history:
            values |= auc_keys(record, "best") if record["best"] else {}  # the last one's stay
        # At once, so that it outlives a killed process.
        self._or_stop(lambda run: run.log(values, step=values["epoch"], commit=True))

    def log_sheet(self, epoch: int, evaluation: Evaluation, masks: Masks | None, last: bool) -> None:
        """Log some test images of an evaluated epoch, from 0, where they are due; before `log_epoch`."""
        if self._run is None or not self._every or not (last or epoch - self._pictured >= self._every):
            return
        import wandb  # noqa: PLC0415 - takes seconds

        self._pictured = epoch
        self._or_stop(lambda run: run.log({"sheet": wandb.Image(sheet(evaluation, masks))}, step=epoch))

    def log_result(self, selected: Record, metrics: Metrics, page: Path, ckpt_path: Path | None) -> None:
        """Log the page, make the summary the selected epoch's, upload the checkpoint where asked for.

        Args:
            selected: the record of the selected epoch.
            metrics: of `measure(..., full=True)`: AUPRO is not measured in every epoch.
            page: the report.
            ckpt_path: the checkpoint with --log_model, else None.
        """

        def log(run: Any) -> None:  # noqa: ANN401 - a wandb.Run
            import wandb  # noqa: PLC0415

            if self._every:
                run.log({"epoch": selected["epoch"] - 1, "report": wandb.Html(str(page), inject=False)})
            run.summary.update({**scalars(selected), **measured("test", metrics), **auc_keys(selected, "best")})
            if ckpt_path is not None:
                metadata = {"epoch": selected["epoch"] - 1, "auc": metrics.auc, "pauc": metrics.pauc}
                artifact = wandb.Artifact(f"{run.config['obj']}-{run.id}", "model", metadata=metadata)
                artifact.add_file(str(ckpt_path))
                run.log_artifact(artifact)

        if ckpt_path is not None and not self._every:
            warn("--log_model uploads the checkpoint, which names its shots; --anonymous hides their names")
        self._or_stop(log)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._or_stop(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def _or_stop(self, action: Callable[[Any], object]) -> None:
        """Call `action(run)`; after an error of W&B, a warning: nothing is tracked any more, and training goes on."""
        if self._run is None:
            return
        import wandb  # noqa: PLC0415

        try:
            action(self._run)
        except (wandb.Error, OSError) as error:
            self._run = None
            warn(f"W&B: not tracked from here on ({one_line(error, self._secret)})")
            with contextlib.suppress(wandb.Error, OSError):  # else wandb tries again, and louder, when Python exits
                wandb.teardown()


def start_tracker(options: argparse.Namespace, settings: Settings, run: RunFolder, config: dict[str, Any]) -> Tracker:
    """The W&B run of a training, or its continuation; its id goes into config.json. It takes 30 s at most.

    Args:
        options: of train.py. With --log_images_every 0 no picture and no name of a file is given to W&B.
        settings: of the checkpoint.
        run: its folder.
        config: config.json; what of it names no path and no host is shown in W&B.
    """
    key = read_key(KEY_FILE)
    if not distributed.is_main() or os.environ.get("WANDB_MODE", "").lower() == "disabled":
        return Tracker()
    every, label = options.log_images_every, shots_label(options)
    shown = {**shareable(options), **settings.to_dict()}
    shown |= {name: value for name, value in config.items() if name in SHOWN and (every or name != "shots")}
    wandb_run = _open(
        key, project=PROJECT, name=run.path.name, group=f"{options.obj}-{label}", id=config.get("wandb_id") or None,
        tags=(options.obj, label, settings.model_name, options.fidelity), config=shown, resume="allow",
        dir=os.environ.get("WANDB_DIR") or str(run.path),
    )  # fmt: skip
    if wandb_run.disabled:  # `wandb disabled` was run in this folder
        return Tracker()
    if wandb_run.offline:
        print(f"W&B: offline; to upload: wandb sync {shlex.quote(str(Path(wandb_run.dir).parent))}", file=sys.stderr)
    else:
        print(f"W&B: online at {redact(wandb_run.url)}", file=sys.stderr)
        if every:
            warn("W&B: pictures of the data set and names of files are uploaded; --log_images_every 0 prevents both")
    wandb_run.define_metric("epoch")
    wandb_run.define_metric("*", step_metric="epoch")
    run.write_config({**config, "wandb_id": wandb_run.id})
    return Tracker(wandb_run, every, wandb_run.settings.api_key or key)


def _open(key: str, **options: Any) -> Any:  # noqa: ANN401 - wandb's options, and a wandb.Run
    """The run: online with wandb's own key or `key`, else offline."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's crash reports could carry more than expected
    import wandb  # noqa: PLC0415 - takes seconds, and is not needed when tracking is disabled

    own = wandb.Settings(**{k: value for k, value in OWN_SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ})
    with blame("W&B's settings", "correct WANDB_BASE_URL, or the variable that is named", (ValueError,)):
        setup = wandb.setup(wandb.Settings(silent=True))
    mode: Any = setup.settings.mode
    if mode == "online" and not wandb.login(verify=False, prompt=False):
        mode = "online" if key else "offline"
        own.api_key = key or None  # as a setting: wandb.login() would also write it to the user's netrc
    try:
        return wandb.init(**options, mode=mode, settings=own)
    except (wandb.Error, OSError) as error:
        warn(f"W&B: the server did not take the run ({one_line(error, setup.settings.api_key or key)})")
        return wandb.init(**options, mode="offline", settings=own)


# --- what a run shows ---


def scalars(record: Record) -> dict[str, Any]:
    """The published keys of an epoch, but for the ...best, and its losses."""
    similarity, total = record["similarity"], record["total"]
    return {
        "epoch": record["epoch"] - 1, "sim_texts": similarity, "loss": total, **auc_keys(record),
        "train/det": record["det"], "train/seg": record["seg"], "train/total": total, "train/sim_texts": similarity,
    }  # fmt: skip


def auc_keys(record: Record, suffix: str = "") -> dict[str, float]:
    """AUCs of the test set under the published keys; on image-only data sets the published pAUC is the AUC again."""
    auc, pauc = record["auc"], record["pauc"]
    if auc is None:  # not evaluated
        return {}
    pixel = auc if pauc is None else pauc
    return {f"AUC+pAUC{suffix}": auc + (pauc or 0.0), f"AUC{suffix}": auc, f"pAUC{suffix}": pixel}


def measured(split: str, metrics: Metrics) -> dict[str, Any]:
    """The metrics that have a name in W&B, below `split`/."""
    named = {METRICS[key][1]: value for key, value in metrics.values.items() if key in METRICS and METRICS[key][1]}
    return {f"{split}/{name}": value for name, value in named.items() if value is not None}


# --- the key ---


def read_key(path: Path) -> str:
    """The key in key.json, {"api_key": "..."}; "" where there is none. A warning where git tracks it."""
    if not path.is_file():
        return ""
    try:
        key = str(read_json(path)["api_key"]).strip()
    except (InputError, LookupError, TypeError):  # may quote it: not shown
        warn(f'W&B: {path} is not {{"api_key": "..."}}, so it is ignored')
        return ""
    if not KEY_SHAPE.fullmatch(key):
        return ""
    listed = ["git", "-C", str(path.absolute().parent), "ls-files", "-v", "--", path.name]
    with contextlib.suppress(OSError):  # no git
        if subprocess.run(listed, capture_output=True, check=False).stdout.startswith(b"H"):  # "S": --skip-worktree
            warn(f"{path} holds an API key and git tracks it: run `git update-index --skip-worktree {path}`")
    return key
