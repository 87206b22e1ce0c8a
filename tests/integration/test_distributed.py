"""Two gloo processes on the CPU against one process: exactly the same numbers."""

import json

import pytest
from torch.distributed import TCPStore

from tests.helpers.commands import Commands, fine
from tests.helpers.data import SMALL


def two(command: Commands, script: str, *arguments: object) -> str:
    """Run a command in two processes as torchrun does, but without its slow imports; return the stdout of rank 0."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as in torchrun's agent
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    ranks = [command.start(script, *arguments, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    first, second = [rank.wait() for rank in ranks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""  # only rank 0 prints
    return first.stdout


CASES = {
    # 32 views in batches of 31: the second step has a single view.
    "ram": ["--obj", "Brain", "--cache", "ram", "--batch_size", 31],
    "disk": ["--obj", "Brain", "--cache", "disk", "--batch_size", 12, "--visionA", "MViTFC"],
    "corrected": ["--obj", "Brain", "--cache", "disk", "--fidelity", "corrected", "--select", "valid"],
}


# Other kernels skip MViTFC ("disk"): it scores in the published batches and is the slowest case there.
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.equality] * (c != "disk")) for c in CASES])
def test_two_processes_equal_one(command, phantoms, tmp_path, case):
    """Losses, metrics, thresholds, selected epoch and image scores are equal, in training and in test.py."""
    runs, tested = [], []
    for name in ("one", "two"):
        start = two if name == "two" else lambda command, *words: fine(command(*words))
        paths = ["--data_path", phantoms, "--save_path", tmp_path / name, "--cache_dir", tmp_path / name / "store"]
        run = ["--run_dir", tmp_path / "runs", "--exp_name", name, "--shot", 1, "--epoch", 2]
        output = start(command, "train.py", *SMALL, *CASES[case], *paths, *run)
        assert output.count("epoch 1/2") == 1
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        runs.append(((tmp_path / "runs" / name / "metrics.jsonl").read_bytes(), {**result, "seconds": 0, "run": ""}))
        # Both test the same checkpoint, so that only the tokens and the scoring can differ here.
        ckpt = tmp_path / "one" / f"{result['obj']}.pth"
        other = ["--ckpt", ckpt, "--cache_dir", tmp_path / name / "store of the test", "--batch_size", 4]
        out = tmp_path / f"{name}.json"
        start(command, "test.py", *CASES[case][:4], *paths, *other, "--device", "cpu", "--out_json", out)
        tested.append(json.loads(out.read_text()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == runs[1][1]
    assert tested[0] == tested[1]
    assert len(tested[0]["per_image"]) == 14
