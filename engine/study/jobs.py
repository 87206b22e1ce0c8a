"""Jobs through submitit: processes on this machine, or Slurm. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from utils import InputError, one_line

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job
    from submitit.helpers import DelayedSubmission

EXECUTORS = ("local", "slurm")
TIMEOUT = 240  # minutes; a job that needs longer is requeued and goes on, as after a pre-emption
POLL_SECONDS = 1.0
Task = TypeVar("Task")


class Resumable(Generic[Task]):
    """A function that goes on from its own files: when its job is pre-empted, submitit requeues the same call."""

    def __init__(self, function: Callable[[Task], str | None], gpu: str | None) -> None:
        self.function, self.gpu = function, gpu  # the GPU that the job sees; None leaves that to the executor

    def __call__(self, task: Task) -> str | None:
        """Call the function."""
        if self.gpu is not None:  # CUDA reads it when it is first used
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        return self.function(task)

    def checkpoint(self, task: Task) -> DelayedSubmission:
        """What submitit asks for when the job is to be stopped."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415 - an optional dependency

        return DelayedSubmission(self, task)


def open_executor(name: str, folder: Path, parameters: Sequence[str]) -> AutoExecutor:
    """Submitit's executor with KEY=VALUE parameters; `InputError` where it, Slurm or a key is unknown."""
    try:
        import submitit  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise InputError(f"--executor {name}: submitit is missing; `pip install submitit`") from error
    given = dict(text.partition("=")[::2] for text in parameters)
    values = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    try:
        executor = submitit.AutoExecutor(folder, cluster=name)
        executor.update_parameters(**{"timeout_min": TIMEOUT, **values})
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--job_options {' '.join(parameters)}: {one_line(error)}") from error
    except RuntimeError as error:
        raise InputError(f"--executor {name}: {one_line(error)}") from error
    return executor


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES calls them."""
    import torch  # noqa: PLC0415 - `--help` is to be quick

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [name for name in named.split(",") if name]
    return list(map(str, range(torch.cuda.device_count())))


def run_jobs(
    function: Callable[[Task], str | None], tasks: Sequence[Task], executor: str, folder: Path, limit: int,
    parameters: Sequence[str] = (), on_poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Task, str | None]]:  # fmt: skip
    """Run `function` on each task, at most `limit` jobs at once; leaving the loop cancels the jobs that still run.

    `function` goes on from its own files when it is called again, and returns None, or what went wrong. `executor` is
    one of `EXECUTORS`; its files go to `folder`, its `parameters` are KEY=VALUE. `on_poll` is called whenever the jobs
    have been looked at. Yields each task as its job ends, with None or what went wrong.
    """
    pool = open_executor(executor, folder, parameters)
    gpus = visible_gpus() if executor == "local" else []
    waiting = list(tasks)
    running: dict[Task, tuple[Job[str | None], str | None]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                gpu = min(gpus, key=[used for _, used in running.values()].count, default=None)
                task = waiting.pop(0)
                running[task] = pool.submit(Resumable(function, gpu), task), gpu
            for task, (job, _) in list(running.items()):
                if job.done():
                    del running[task]
                    error = job.exception()
                    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]  # submitit tells much
                    yield task, f"{last_line} (job {job.job_id})" if error else job.result()
            on_poll()
            time.sleep(POLL_SECONDS)
    finally:
        for job, _ in running.values():
            job.cancel()
