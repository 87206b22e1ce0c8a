"""Jobs: how many at once, on which GPU, and how one that broke is told; submitit's executor is replaced by a fake."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from engine.study import jobs
from engine.study.jobs import Resumable, run_jobs, visible_gpus
from utils import InputError


class FakePool:
    """Submitit's executor, which keeps count; a job is done at the second look."""

    def __init__(self):
        self.running, self.most, self.gpus, self.cancelled = [], 0, [], []

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, call, task):
        looks = iter((False, True))

        def done() -> bool:
            if ended := next(looks):
                self.running.remove(task)
            return ended

        self.running.append(task)
        self.most = max(self.most, len(self.running))
        self.gpus.append(call.gpu)
        error = RuntimeError("traceback\nRuntimeError: out of memory\n") if task == "broken" else None
        return SimpleNamespace(
            job_id="7", done=done, exception=lambda: error, result=lambda: call.function(task),
            cancel=lambda: self.cancelled.append(task),
        )  # fmt: skip


@pytest.fixture
def pool(monkeypatch):
    found = FakePool()
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=lambda *_, **__: found))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)
    return found


def no_fault(task: str) -> str | None:
    return "wrong" if task == "bad" else None


def test_at_most_so_many_at_once(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    tasks = ["a", "bad", "c", "broken", "e"]
    found = dict(run_jobs(no_fault, tasks, "local", tmp_path, 2, ["timeout_min=30", "mem=x"]))
    assert pool.parameters == {"timeout_min": 30, "mem": "x"}
    assert pool.most == 2
    assert pool.gpus[:2] == ["4", "6"]  # one each while two run
    assert set(pool.gpus) == {"4", "6"}
    assert found == {"a": None, "bad": "wrong", "c": None, "broken": "RuntimeError: out of memory (job 7)", "e": None}
    assert pool.cancelled == []


def test_leaving_cancels_what_runs(pool, tmp_path):
    loop = run_jobs(no_fault, ["a", "b", "c", "d"], "slurm", tmp_path, 3)
    next(loop)
    loop.close()
    assert pool.cancelled == ["b", "c"]
    assert pool.gpus == [None] * 3  # Slurm hands out GPUs by itself


def test_a_job_sees_its_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Resumable(lambda _: os.environ["CUDA_VISIBLE_DEVICES"], "1")("task") == "1"


def test_what_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=r"--job_options nonsense=1: .*nonsense"):
        next(run_jobs(str, ["a"], "local", tmp_path, 1, ["nonsense=1"]))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="pip install submitit"):
        next(run_jobs(str, ["a"], "local", tmp_path, 1))
