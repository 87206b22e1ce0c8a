"""Jobs: how many run at once, on which GPU, and how failures are reported; submitit's executor is a fake."""

import sys
from types import SimpleNamespace

import pytest

from engine.study import jobs
from engine.study.jobs import run_jobs


class FakePool:
    """Fake of submitit's executor that counts running jobs; a job is done when it is polled for the second time."""

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


def test_limit_of_running_jobs_gpus_and_failures(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    tasks = ["a", "bad", "c", "broken", "e"]
    found = dict(run_jobs(no_fault, tasks, "local", tmp_path, 2, ["timeout_min=30", "mem=x"]))
    assert pool.parameters == {"timeout_min": 30, "mem": "x"}
    assert pool.most == 2
    assert pool.gpus[:2] == ["4", "6"]  # one GPU for each of the two running jobs
    assert set(pool.gpus) == {"4", "6"}
    assert found == {"a": None, "bad": "wrong", "c": None, "broken": "RuntimeError: out of memory (job 7)", "e": None}
    assert pool.cancelled == []
