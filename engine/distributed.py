"""Several processes as one run, on torch.distributed: `torchrun --nproc_per_node=N train.py ...`.

Without torchrun there is one process, and every function here returns its argument. The processes share out the tower's
pass and the scoring of images; a training step, small as it is, runs whole in each of them from the same start, so any
number of processes gives the numbers of one. What is exchanged are tokens and patch scores, as Python objects over
gloo, and once an epoch, on CUDA, rank 0's parameters. One process, rank 0, prints and writes.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from utils import InputError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for the slowest process; one that dies is noticed at once


def start() -> None:
    """Join the processes that torchrun started; nothing where it did not. Ranks above 0 print nothing but errors."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL wants a GPU each
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and enough else "gloo", timeout=TIMEOUT)
    if not is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_gpu() -> int:
    """The number of the GPU that this process uses: its own one, where there are as many as processes here."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Every world-th item, from this process's rank on."""
    return items[rank() :: world()]


def from_main(value: T) -> T:
    """Rank 0's `value`, in every process."""
    if world() == 1:
        return value
    box = [value]
    with _peers():
        dist.broadcast_object_list(box)
    return box[0]


def all_gather(value: T) -> list[T]:
    """The values of all processes in order of rank."""
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    with _peers():
        dist.all_gather_object(values, value)
    return values


def align(module: nn.Module) -> None:
    """Give every process rank 0's parameters. On a CPU they are the same bits already, as every step runs whole."""
    if world() > 1 and next(module.parameters()).is_cuda:
        with _peers(), torch.no_grad():
            for parameter in module.parameters():
                dist.broadcast(parameter, 0)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turn what torch says when another process has gone into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"rank {rank()}: another process of this run died or cannot be reached ({reason}); its own message comes "
            f"before; to continue, give --resume with the run's folder"
        ) from error


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; `InputError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", own_gpu()) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name, re.ASCII):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that --precision means on `device`; None is float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
