"""Weights & Biases: one run, which never prompts the user and never stops a training.

Where data go (wandb's own settings, such as WANDB_MODE, WANDB_BASE_URL, WANDB_ENTITY and WANDB_DIR, are respected):

    WANDB_MODE=disabled               nowhere: wandb is not even imported
    WANDB_MODE=offline, or no key     to files in the run folder; one line is printed that says how to upload them
    a key                             online; or offline, if the server does not accept the run in time

The key is the one that wandb finds (WANDB_API_KEY, the netrc entry of `wandb login`), or else the one in key.json.

Logged per epoch: the published keys (epoch, sim_texts, loss, AUC, pAUC, AUC+pAUC and their ...best), train/ (losses),
test/ and valid/ (metrics), time/, and `sheet` (test images with their heat maps); at the end, `report` (the page). The
summary is that of the selected epoch.
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
KEY_SHAPE = re.compile(r"([\w-]+-)?[0-9a-f]{40}|wandb_v1_\w+")  # does not match the placeholder
# Entries of config.json that W&B shows; the others name this machine and its folders.
SHOWN = ("shots", "shots_from", "started", "madclip", "python", "torch", "torchvision", "git_commit", "resumed")
OWN_SETTINGS: dict[str, Any] = {  # limit the waiting time, and send nothing that names this machine or may hold secrets
    "silent": True, "console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True,
    "init_timeout": 15.0, "finish_timeout": 60.0,
}  # fmt: skip
Record = Mapping[str, Any]  # of an epoch, a line of metrics.jsonl; W&B counts epochs from 0, as the published code does


class Tracker:
    """A W&B run; without one, every method does nothing. Made by `start_tracker`."""

    def __init__(self, run: Any = None, pictures_every: int = 0, secret: str = "") -> None:  # noqa: ANN401 - a wandb.Run
        self._run, self._interval, self._secret = run, pictures_every, secret
        self._pictured = -1  # the last epoch with pictures

    def log_epoch(
        self, history: Sequence[Record], test: Metrics | None, valid: Metrics | None, seconds: float, images: int
    ) -> None:
        """Log the newest epoch.

        Args:
            history: records of all epochs so far.
            test: metrics of the test set; None if it was not evaluated.
            valid: metrics of valid/; None if it was not evaluated.
            seconds: duration of the epoch.
            images: number of images processed in it: views of shots, and evaluated images.
        """
        values = scalars(history[-1]) | {"time/epoch": seconds, "time/images_per_second": images / max(seconds, 1e-9)}
        for split, metrics in (("test", test), ("valid", valid)):
            values |= measured(split, metrics) if metrics is not None else {}
        for record in history:
            values |= auc_keys(record, "best") if record["best"] else {}  # those of the last best epoch stay
        # Committed at once, so that it is not lost if the process is killed.
        self._guarded(lambda run: run.log(values, step=values["epoch"], commit=True))

    def log_sheet(self, epoch: int, evaluation: Evaluation, masks: Masks | None, last: bool) -> None:
        """Log some test images of an evaluated epoch (counted from 0), if they are due; call it before `log_epoch`."""
        if self._run is None or not self._interval or not (last or epoch - self._pictured >= self._interval):
            return
        import wandb  # noqa: PLC0415 - takes seconds

        self._pictured = epoch
        self._guarded(lambda run: run.log({"sheet": wandb.Image(sheet(evaluation, masks))}, step=epoch))

    def log_result(self, selected: Record, metrics: Metrics, page: Path, ckpt_path: Path | None) -> None:
        """Log the page, set the summary to the selected epoch, and upload the checkpoint if requested.

        Args:
            selected: the record of the selected epoch.
            metrics: the result of `measure(..., full=True)`, as AUPRO is not measured in every epoch.
            page: the report page.
            ckpt_path: the checkpoint, with --log_model; else None.
        """

        def log(run: Any) -> None:  # noqa: ANN401 - a wandb.Run
            import wandb  # noqa: PLC0415

            if self._interval:
                run.log({"epoch": selected["epoch"] - 1, "report": wandb.Html(str(page), inject=False)})
            run.summary.update({**scalars(selected), **measured("test", metrics), **auc_keys(selected, "best")})
            if ckpt_path is not None:
                metadata = {"epoch": selected["epoch"] - 1, "auc": metrics.auc, "pauc": metrics.pauc}
                artifact = wandb.Artifact(f"{run.config['obj']}-{run.id}", "model", metadata=metadata)
                artifact.add_file(str(ckpt_path))
                run.log_artifact(artifact)

        if ckpt_path is not None and not self._interval:
            warn("--log_model uploads the checkpoint, which names its shots; --anonymous hides their names")
        self._guarded(log)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._guarded(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def _guarded(self, action: Callable[[Any], object]) -> None:
        """Call `action(run)`; after an error of W&B, print a warning and stop tracking. Training goes on."""
        if self._run is None:
            return
        import wandb  # noqa: PLC0415

        try:
            action(self._run)
        except (wandb.Error, OSError) as error:
            self._run = None
            warn(f"W&B: not tracked from here on ({one_line(error, self._secret)})")
            with contextlib.suppress(wandb.Error, OSError):  # else wandb tries again, with more output, at exit
                wandb.teardown()


def start_tracker(options: argparse.Namespace, settings: Settings, run: RunFolder, config: dict[str, Any]) -> Tracker:
    """Start or continue the W&B run of a training, and store its id in config.json. Takes at most 30 s.

    Args:
        options: those of train.py. With --log_images_every 0, no pictures and no file names are sent to W&B.
        settings: of the checkpoint.
        run: the folder of the training run.
        config: the content of config.json; entries without paths and host names are shown in W&B.
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
    """Open the run: online with wandb's own key or `key`, else offline."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's crash reports may contain more than expected
    import wandb  # noqa: PLC0415 - takes seconds, and is not needed when tracking is disabled

    own = wandb.Settings(**{k: value for k, value in OWN_SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ})
    with blame("W&B's settings", "correct WANDB_BASE_URL, or the variable that is named", (ValueError,)):
        setup = wandb.setup(wandb.Settings(silent=True))
    mode: Any = setup.settings.mode
    try:
        if mode == "online" and not wandb.login(verify=False, prompt=False):
            mode = "online" if key else "offline"
            own.api_key = key or None  # as a setting: wandb.login() would also write it to the user's netrc
        return wandb.init(**options, mode=mode, settings=own)
    except (wandb.Error, OSError) as error:
        warn(f"W&B: the server did not take the run ({one_line(error, setup.settings.api_key or key)})")
        return wandb.init(**options, mode="offline", settings=own)


# --- what a run shows ---


def scalars(record: Record) -> dict[str, Any]:
    """The published keys of an epoch, except the ...best ones, and its losses."""
    similarity, total = record["similarity"], record["total"]
    return {
        "epoch": record["epoch"] - 1, "sim_texts": similarity, "loss": total, **auc_keys(record),
        "train/det": record["det"], "train/seg": record["seg"], "train/total": total, "train/sim_texts": similarity,
    }  # fmt: skip


def auc_keys(record: Record, suffix: str = "") -> dict[str, float]:
    """AUCs of the test set under the published keys; on image-only data sets, the published pAUC equals the AUC."""
    auc, pauc = record["auc"], record["pauc"]
    if auc is None:  # not evaluated
        return {}
    pixel = auc if pauc is None else pauc
    return {f"AUC+pAUC{suffix}": auc + (pauc or 0.0), f"AUC{suffix}": auc, f"pAUC{suffix}": pixel}


def measured(split: str, metrics: Metrics) -> dict[str, Any]:
    """The metrics that are logged in W&B, with keys below `split`/."""
    named = {METRICS[key][1]: value for key, value in metrics.values.items() if key in METRICS and METRICS[key][1]}
    return {f"{split}/{name}": value for name, value in named.items() if value is not None}


# --- the key ---


def read_key(path: Path) -> str:
    """The key in key.json, {"api_key": "..."}; "" if there is no valid one. Prints a warning if git tracks the file."""
    if not path.is_file():
        return ""
    try:
        key = str(read_json(path)["api_key"]).strip()
    except (InputError, LookupError, TypeError):  # not shown, as it may quote the key
        warn(f'W&B: {path} is not {{"api_key": "..."}}, so it is ignored')
        return ""
    if not KEY_SHAPE.fullmatch(key):
        return ""
    listed = ["git", "-C", str(path.absolute().parent), "ls-files", "-v", "--", path.name]
    with contextlib.suppress(OSError):  # no git
        if subprocess.run(listed, capture_output=True, check=False).stdout.startswith(b"H"):  # "S": --skip-worktree
            warn(f"{path} holds an API key and git tracks it: run `git update-index --skip-worktree {path}`")
    return key
