"""Several processes as one run, on torch.distributed: `torchrun --nproc_per_node=N train.py ...`.

Without torchrun there is one process, and nothing is exchanged. Otherwise the processes divide among themselves the
tower's pass and the scoring of images. A training step is small, so each process runs all of it, from the same state;
any number of processes thus gives the numbers of one. They exchange tokens and patch scores, as Python objects over
gloo, and, on CUDA, rank 0's parameters once per epoch. Only rank 0 prints and writes.
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
TIMEOUT = timedelta(minutes=30)  # to wait for the slowest process; one that dies is noticed at once


def start() -> None:
    """Join the process group if torchrun started this process. Ranks above 0 then print nothing on stdout."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL needs one each
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
    """The index of this process's GPU; processes share GPUs only if this machine has too few of them."""
    return int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every world-th item, starting from its rank."""
    return items[rank() :: world()]


def from_main(value: T) -> T:
    """Rank 0's `value`, in every process."""
    if world() == 1:
        return value
    box = [value]
    with _blame_peers():
        dist.broadcast_object_list(box)
    return box[0]


def all_gather(value: T) -> list[T]:
    """The values of all processes in order of rank."""
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    with _blame_peers():
        dist.all_gather_object(values, value)
    return values


def align(module: nn.Module) -> None:
    """Copy rank 0's parameters to every process. On a CPU nothing is done: they are identical to the bit already."""
    if world() > 1 and next(module.parameters()).is_cuda:
        with _blame_peers(), torch.no_grad():
            for parameter in module.parameters():
                dist.broadcast(parameter, 0)


@contextlib.contextmanager
def _blame_peers() -> Iterator[None]:
    """Turn torch's error about another process that died into a one-line `InputError`."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"rank {rank()}: another process of this run died or cannot be reached ({reason}); see its own message "
            f"above; to continue, give --resume with the run's folder"
        ) from error


def pick_device(name: str) -> torch.device:
    """The device named by --device; `auto` is CUDA if available. `InputError` if it is invalid or does not exist."""
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
