"""The first run on a GPU: whether everything works there, whether it gives the CPU's numbers, and how fast it is.

    python -m benchmarks.gpu                            at most 6 minutes on one card: a table and a JSON file
    python -m benchmarks.gpu --device cpu --small       a dry run of this script: the small model, on the CPU

Each part runs in its own process, so that the others go on if it fails, hangs or leaves the GPU in a broken state.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import predict
import test
import train
from benchmarks.common import learner, machine, print_table, write_json
from benchmarks.epoch import Epoch, time_epoch
from CLIP.weights import find_weights
from engine.distributed import pick_autocast
from engine.features import TokenStore
from loss import anomaly_map
from utils import Parser, one_line, run_cli

ROOT = Path(__file__).parents[1]
SECONDS = 350  # time limit for all parts together
# Largest accepted differences, relative to the largest value: float32 from the CPU's, the others from float32.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
Figures = dict[str, Any]


def require(condition: bool, reason: str) -> None:
    """Fail the part unless `condition` is true."""
    if not condition:
        raise SystemExit(reason)


def training(options: argparse.Namespace, folder: Path, *more: object) -> list[str]:
    """Flags of train.py: real images, a model with random weights."""
    data = ["--obj", "BreastBUSI", "--data_path", ROOT / "data/sample", "--shot", 1, "--select", "last"]
    model = ["--model_name", options.model, "--pretrain", "random", "--img_size", options.img_size, "--no-save_model"]
    places = ["--cache_dir", folder / "cache", "--run_dir", folder / "runs"]
    return [str(word) for word in (*data, *model, *places, "--fidelity", "corrected", *more)]


def history(folder: Path, name: str) -> Tensor:
    """The losses and AUCs of a run's epochs: (epochs, 5)."""
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([[row[key] for key in ("det", "seg", "total", "auc", "pauc")] for row in rows])


def commands(options: argparse.Namespace, folder: Path) -> Figures:
    """Train, resume, test and predict."""
    device, sample = ["--device", options.device], str(ROOT / "data/sample")
    whole = train.train(train.parse(training(options, folder, *device, "--epoch", 2, "--exp_name", "whole")))
    train.train(train.parse(training(options, folder, *device, "--epoch", 1, "--exp_name", "resumed")))
    train.train(train.parse(["--resume", str(folder / "runs/resumed"), "--epoch", "2"]))
    ckpt = ["--ckpt", str(folder / "runs/whole/best.pth"), *device]
    tested = test.test(
        test.parse(["--obj", "BreastBUSI", "--data_path", sample, *ckpt, "--cache_dir", f"{folder}/cache"])
    )
    images = f"{sample}/BreastBUSI_AD/test/Ungood/img"
    predict.main(predict.parse([*ckpt, images, "--out", str(folder / "predicted")]))
    found = len((folder / "predicted/predictions.csv").read_text().splitlines()) - 1
    require(found == len(list(Path(images).iterdir())), f"predict.py: {found} images")
    resumed = float((history(folder, "whole") - history(folder, "resumed")).abs().max())
    result = {"resumed": resumed, "test.py": abs(tested["auc"] - whole["auc"]), "AUC": whole["auc"]}
    require(resumed < 1e-3 and result["test.py"] < 1e-4, f"differences: {result}")
    return result


def two_processes(options: argparse.Namespace, folder: Path) -> Figures:
    """Compare two processes on one GPU (over gloo, as NCCL does not allow that) with a single process."""
    device = ["--device", "cpu"] if options.device == "cpu" else []  # else both processes take the one GPU
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        words = training(options, folder, *device, "--epoch", 1, "--cache", "ram", "--exp_name", name)
        environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}  # as torchrun sets it
        command = [sys.executable, *launcher, "train.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        require(done.returncode == 0, f"{name}: {done.stderr.strip()[-300:]}")
    difference = float((history(folder, "one") - history(folder, "two")).abs().max())
    require(difference < 1e-3, f"losses or AUCs differ by {difference:.2g}")
    return {"difference": difference}


# --- the same arithmetic on both devices, and in each precision ---


def batch(options: argparse.Namespace, device: torch.device, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and masks: every second image is abnormal, and brighter inside its mask."""
    images = torch.rand(size, 3, options.img_size, options.img_size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(size, options.img_size, options.img_size, dtype=torch.bool)
    masks[1::2, : options.img_size // 3, : options.img_size // 3] = True
    images = (images / 2 + masks[:, None] / 2).to(device)
    return images, (torch.arange(size) % 2).float().to(device), masks.to(device)


def outcome(options: argparse.Namespace, device: torch.device, precision: str) -> dict[str, Tensor]:
    """Tokens, the losses of three training steps on them, and the patch and image scores after these steps."""
    clip, state = learner(options, device, pick_autocast(precision, device))
    images, labels, masks = batch(options, device)
    autocast = {"device_type": device.type, "dtype": state.autocast, "enabled": state.autocast is not None}
    with torch.autocast(**autocast), torch.no_grad():
        layers = clip.image_tokens(images, state.detector.settings.features_list)
    tokens = [layer[:, 1:].contiguous() for layer in layers]  # without the class token
    store = SimpleNamespace(get=lambda _: tokens, with_room=lambda action: action())
    losses = torch.stack([state.step(store, labels, labels, masks, None) for _ in range(3)])
    with torch.autocast(**autocast), torch.no_grad():
        scores = state.detector.patch_scores(tokens, state.detector.prompts())
    of_images = anomaly_map(scores, options.img_size).flatten(1).amax(dim=1)
    found = {"tokens": torch.stack(tokens), "losses": losses, "scores": scores, "image scores": of_images}
    return {name: values.double().cpu() for name, values in found.items()}


def numbers(options: argparse.Namespace, precision: str) -> Figures:
    """Compare a precision on the device with float32 on the device; float32 itself, with the CPU."""
    device = torch.device(options.device)
    reference = outcome(options, torch.device("cpu") if precision == "fp32" else device, "fp32")
    here = outcome(options, device, precision)
    result = {name: float((here[name] - want).abs().max() / want.abs().max()) for name, want in reference.items()}
    aucs = [roc_auc_score(torch.arange(16) % 2, part["image scores"]) for part in (reference, here)]
    result["AUC"] = float(abs(aucs[0] - aucs[1]))
    wrong = [name for name, value in result.items() if not value <= TOLERANCE[precision]]
    require(not wrong, f"{', '.join(wrong)} differ by more than {TOLERANCE[precision]}: {result}")
    return result


# --- speed, and a full GPU ---


def speed(options: argparse.Namespace, _folder: Path) -> Figures:
    """Time an epoch of Brain's size: seconds beside their floors, and memory."""
    options.shot = 16
    rows, figures = time_epoch(Epoch(options, torch.device(options.device)))
    late = options.device != "cpu" and figures["beside scoring s"] > 1
    require(not late, f"masks, maps and metrics take {figures['beside scoring s']:.2f} s, more than 1 s")
    return {**{row["part"].strip(): f"{row['s']:.3g} s (floor {row['floor s']:.2g})" for row in rows}, **figures}


def full_card(options: argparse.Namespace, folder: Path) -> Figures:
    """Check that tokens that leave no memory for a step move to the host, and that the losses are equal to the bit."""
    device, weights = torch.device(options.device), find_weights(options.model, "random")
    _, labels, masks = batch(options, device)
    kept = argparse.Namespace(cache="gpu", cache_dir=str(folder), cache_dtype="float32", num_workers=1)
    settings = learner(options, device, None)[1].detector.settings
    store = TokenStore(settings, weights, None, device, kept)
    tokens = torch.randn(16, *store.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step(room: int | None = None) -> tuple[Tensor, int]:
        """Run a step; returns the losses and the bytes it takes. `room` limits the bytes beyond those in use."""
        state = learner(options, device, None)[1]
        if device.type == "cpu":
            return state.step(store, torch.arange(16), labels, masks, None), 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if room is None else min((before + room) / total, 1.0))
        losses = state.step(store, torch.arange(16, device=device), labels, masks, None).cpu()
        return losses, torch.cuda.max_memory_allocated() - before

    store._resident = tokens
    expected, needed = step()
    store._resident = tokens.repeat(2 + 2 * needed // tokens.nbytes, 1, 1, 1)
    if device.type == "cpu":
        store.leave_gpu()  # what a full GPU leads to
    losses, _ = step(needed // 2)
    require(store.cache == "ram", "the tokens stayed on the card")
    require(torch.equal(expected, losses), f"losses differ by {float((expected - losses).abs().max()):.2g}")
    return {"a step takes GB": needed / 1e9, "moved": f"{store._resident.nbytes / 1e9:.2f} GB"}


PARTS: dict[str, Callable[[argparse.Namespace, Path], Figures]] = {
    "commands": commands,
    **{name: lambda options, _, name=name: numbers(options, name) for name in TOLERANCE},  # type: ignore[misc]
    "speed": speed,
    "full card": full_card,
    "two processes": two_processes,
}


def work(name: str, options: argparse.Namespace, answers: Connection) -> None:
    """Run a part, in its own process; sends its figures, or the reason why it failed."""
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        try:
            answers.send({"result": "passed", "figures": PARTS[name](options, Path(folder))})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answers.send({"result": "failed", "reason": one_line(error)})


def attempt(name: str, options: argparse.Namespace, seconds: float | None) -> dict[str, Any]:
    """Run a part, for at most `seconds` (None: no limit); returns its row of the table."""
    start, context = time.perf_counter(), multiprocessing.get_context("fork")  # this process never uses the GPU
    answers, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, options, sender))
    process.start()
    sender.close()
    found = {"result": "failed", "reason": f"not done after {seconds} s"}
    if answers.poll(seconds):
        try:
            found = answers.recv()
        except EOFError:
            found["reason"] = "its process died"
    else:
        process.kill()
    process.join()
    return {"part": name, "seconds": time.perf_counter() - start, **found}


def main() -> int:
    """Run the command line; returns exit code 1 if a part failed."""
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="the small model at 28 px")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--json", default="benchmarks/results/gpu.json")
    options = parser.parse_args()
    options.fidelity, options.obj = "released", "Brain"
    options.model, options.img_size = ("ViT-tiny-14-56", 28) if options.small else ("ViT-L-14-336", 240)
    end, rows = time.perf_counter() + SECONDS, []
    for name in options.parts:
        rows.append(attempt(name, options, max(end - time.perf_counter(), 1) if options.device == "cuda" else None))
        print(f"{name}: {rows[-1]['result']}", flush=True)
        figures = rows[-1].get("figures", {})
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in figures.items()}
        rows[-1]["what"] = rows[-1].get("reason") or "  ".join(f"{key} {text}" for key, text in shown.items())
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print_table(rows, ["part", "result", "seconds", "what"])
    write_json(options.json, rows)
    return int(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    run_cli(main)
