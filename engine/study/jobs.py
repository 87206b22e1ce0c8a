"""Jobs through submitit: processes on this machine, or Slurm."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils import blame

TIMEOUT = 240  # minutes; a job that needs longer is requeued and continues, as after a pre-emption
POLL_SECONDS = 1.0
Task = TypeVar("Task")


@dataclass
class Resumable:
    """A function that can resume from its own files: if its job is pre-empted, submitit requeues the same call."""

    function: Callable[[Any], str | None]
    gpu: str | None  # the GPU that the job sees; None leaves that to the executor

    def __call__(self, task: object) -> str | None:
        """Call the function."""
        if self.gpu is not None:  # CUDA reads it when it is first used
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        return self.function(task)

    def checkpoint(self, task: object) -> Any:  # noqa: ANN401 - submitit's
        """The call to requeue; submitit asks for it when the job is about to be stopped."""
        import submitit  # noqa: PLC0415 - an optional package

        return submitit.helpers.DelayedSubmission(self, task)


def run_jobs(
    function: Callable[[Task], str | None], tasks: Sequence[Task], executor: str, folder: Path, limit: int,
    parameters: Sequence[str] = (),
) -> Iterator[tuple[Task, str | None]]:  # fmt: skip
    """Run `function` on each task, at most `limit` jobs at once; closing the iterator cancels those that run.

    If `function` is called again, it resumes from its own files; it returns None, or an error message. `executor` is
    `local` or `slurm`; its files go to `folder`, its `parameters` are KEY=VALUE. Yields each task when its job ends,
    with None or an error message.

    Raises:
        InputError: submitit or Slurm is missing, or a parameter is unknown.
    """
    given = dict(text.partition("=")[::2] for text in parameters)
    values = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    with blame(f"--executor {executor}", "`pip install submitit`", (ImportError,)):
        import submitit  # noqa: PLC0415 - an optional package
    flags, refused = " ".join(["--job_options", *parameters] if parameters else []), (NameError, AssertionError)
    with blame(f"--executor {executor} {flags}".strip(), errors=(RuntimeError, TypeError, ValueError, *refused)):
        pool = submitit.AutoExecutor(folder, cluster=executor)
        pool.update_parameters(**{"timeout_min": TIMEOUT, **values})
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [name for name in named.split(",") if name] if executor == "local" else []
    waiting, running = list(tasks), dict[Task, tuple[Any, str | None]]()
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
                    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]  # submitit's is long
                    yield task, f"{last_line} (job {job.job_id})" if error else job.result()
            time.sleep(POLL_SECONDS)
    finally:
        for job, _ in running.values():
            job.cancel()
