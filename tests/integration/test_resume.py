"""Run folders: a run that was killed or stopped is resumed with exactly the same results."""

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.commands import Call, Change, Commands, fine, refused
from tests.helpers.data import SMALL

EPOCHS = 5
EVAL_EVERY = 2  # with this seed the fourth epoch is by far the best; at the end only best.pth holds it
KILLS = 3 if "MKL_CBWR" in os.environ else 8  # `make other-kernels` is slow
KILLS_OF_THE_PASS = KILLS // 3
# An epoch has two steps: 2 shots in 16 views, in batches of 16.
STEP, STEPS = "engine.training.TrainingState.step", 2


def flags(folder: Path, phantoms: Path, *more: object) -> list[object]:
    """Flags of a run called `one`, with its tokens on disk, so that computing them can be resumed, too."""
    paths = ["--data_path", phantoms, "--save_path", folder / "ckpt", "--run_dir", folder / "runs"]
    store = ["--cache", "disk", "--cache_dir", folder / "store"]
    run = ["--obj", "Brain", "--shot", 1, "--epoch", EPOCHS, "--eval_every", EVAL_EVERY, "--exp_name", "one"]
    run += ["--seed", 14]
    return [*run, *SMALL, *paths, *store, *more]


@pytest.fixture(scope="module")
def undisturbed(command, phantoms, once) -> Path:
    """Folder of an uninterrupted run."""

    def make(folder: Path) -> None:
        fine(train(command, folder, *flags(folder, phantoms)))

    return once("undisturbed", make) / "runs" / "one"


def same(run: Path, other: Path) -> None:
    """Assert bit for bit equal metrics, parameters, optimizers, random states, best epochs and results."""
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    first, second = (torch.load(path / "last.pth", weights_only=True) for path in (run, other))
    first["state"].pop("seconds"), second["state"].pop("seconds")
    assert flat(first).keys() == flat(second).keys()
    assert all(torch.equal(value, flat(second)[name]) for name, value in flat(first).items())
    best, other_best = (torch.load(path / "best.pth", weights_only=True) for path in (run, other))
    assert all(torch.equal(value, flat(other_best)[name]) for name, value in flat(best).items() if "about" not in name)
    results = [json.loads((path / "result.json").read_text()) for path in (run, other)]
    for result in results:
        del result["seconds"], result["run"]
    assert results[0] == results[1]


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number in nested dicts and lists, as tensors, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in pairs for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: torch.tensor(value, dtype=torch.float64)} if isinstance(value, int | float) else {}


def train(command: Commands, folder: Path, *arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    """Run train.py in `folder`, below which a resumed run may write."""
    return command("train.py", *arguments, cwd=folder, **how)


def go_on(command: Commands, folder: Path, phantoms: Path, **how: object) -> subprocess.CompletedProcess[str]:
    """Resume the run `one` if it exists, else start it."""
    run = folder / "runs" / "one"
    arguments = ["--resume", run] if (run / "config.json").is_file() else flags(folder, phantoms)
    return train(command, folder, *arguments, **how)


def epochs(run: Path) -> int:
    """Number of epochs in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.equality
def test_resume_after_random_kills(command, phantoms, tmp_path, undisturbed):
    """A run killed at random changes of the token store or of its own files, or at random steps, is resumed exactly."""
    run, draw = tmp_path / "runs" / "one", random.Random(5)
    kills = 0
    while kills < KILLS:
        store = Change(str(tmp_path / "store"), draw.randint(1, 300))
        files, step = Change(str(tmp_path / "runs"), draw.randint(1, 30)), Call(STEP, draw.randint(1, 5 * STEPS))
        event = store if kills < KILLS_OF_THE_PASS else draw.choice([files, step])
        result = go_on(command, tmp_path, phantoms, on=(event, signal.SIGKILL))
        if result.returncode == 0:  # the run ended before the event: start again
            same(run, undisturbed)
            shutil.rmtree(run)
            continue
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        lines = (run / "metrics.jsonl").read_text() if epochs(run) else ""
        assert (undisturbed / "metrics.jsonl").read_text().startswith(lines)
    fine(go_on(command, tmp_path, phantoms))
    same(run, undisturbed)
    assert not list(run.rglob(".*.tmp"))


MOMENTS = {
    "in the pass": (signal.SIGINT, Call("engine.features.TokenStore._keep", 2), 0),
    "in an evaluation": (signal.SIGINT, Call("train.evaluate", 2), 3),
    "while files are written": (signal.SIGTERM, Call("engine.files.checkpoint.write_file", 4), 2),
    "at the end": (signal.SIGINT, Call("train.calibrate_run"), EPOCHS),
}


@pytest.mark.parametrize("when", MOMENTS)
def test_resume_after_a_signal(command, phantoms, tmp_path, undisturbed, when):
    """The printed command resumes the run exactly, even if the folder's name has shell characters."""
    number, event, done = MOMENTS[when]
    folder = tmp_path / "my runs; echo $HOME"
    result = train(command, tmp_path, *flags(tmp_path, phantoms), "--run_dir", folder, on=(event, number))
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert epochs(folder / "one") == done
    words = shlex.split(result.stderr[result.stderr.index("python train.py") :].splitlines()[0])
    assert words == ["python", "train.py", "--resume", str(folder / "one")]
    fine(train(command, tmp_path, *words[2:]))
    same(folder / "one", undisturbed)


def test_a_run_has_one_writer(command, phantoms, tmp_path, undisturbed):
    """While a run is active, --resume is refused and changes nothing."""
    run, third_epoch = tmp_path / "runs" / "one", Call("engine.files.run.RunFolder.save", 3)
    running = command.start("train.py", *flags(tmp_path, phantoms), on=(third_epoch, signal.SIGSTOP), cwd=tmp_path)
    running.stopped()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused(command("train.py", "--resume", run, cwd=tmp_path), f"process {running.pid} on {socket.gethostname()}")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    running.go()
    fine(running.wait())
    same(run, undisturbed)


def test_resume_after_a_kill_before_the_best_epoch_is_written(command, phantoms, tmp_path, undisturbed):
    """last.pth names the fourth epoch as the best one, but best.pth still holds the second: resuming is exact."""
    result = train(command, tmp_path, *flags(tmp_path, phantoms), on=(Call("train.save_best", 2), signal.SIGKILL))
    assert result.returncode == -signal.SIGKILL
    assert epochs(tmp_path / "runs" / "one") == 4
    assert json.loads((undisturbed / "result.json").read_text())["selected_epoch"] == 4, "else this test shows nothing"
    fine(go_on(command, tmp_path, phantoms))
    same(tmp_path / "runs" / "one", undisturbed)


def test_run_killed_before_it_started_is_started_again(command, phantoms, tmp_path):
    """A folder that holds only the lock of a killed run is reused; a folder with other files is not touched."""
    start = flags(tmp_path, phantoms, "--epoch", 1)
    event = Call("engine.files.run.RunFolder.write_config"), signal.SIGKILL
    assert command("train.py", *start, on=event).returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["lock"]
    for names in (["one"], ["one", "one-2"]):
        fine(command("train.py", *start))
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_resume_with_changed_images_is_refused(command, phantoms, tmp_path):
    """A changed image, mask or name is refused and leaves the run as it is; with the old files it is resumed."""
    shutil.copytree(phantoms / "Brain_AD", tmp_path / "data/Brain_AD")
    fine(train(command, tmp_path, *flags(tmp_path, tmp_path / "data", "--epoch", 1)))
    run = tmp_path / "runs/one"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    resume = ["--resume", run, "--epoch", 2]
    image = tmp_path / "data/Brain_AD/test/good/img/test_good_00001.png"
    mask = tmp_path / "data/Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"
    for path in (image, mask):
        kept = path.read_bytes()
        Image.eval(Image.open(path), lambda value: 255 - value).save(path)
        refused(train(command, tmp_path, *resume), str(run))
        path.write_bytes(kept)
    image.rename(image.with_name("renamed.png"))
    refused(train(command, tmp_path, *resume), str(run))
    image.with_name("renamed.png").rename(image)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    fine(train(command, tmp_path, *resume))


def test_damaged_state_keeps_the_finished_epochs(command, tmp_path, undisturbed):
    """A last.pth that does not fit is refused, and metrics.jsonl keeps all its lines."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "one"))
    before = (run / "metrics.jsonl").read_bytes()
    payload = torch.load(run / "last.pth", weights_only=True)
    payload["state"] |= {"history": payload["state"]["history"][:2], "optimizers": []}
    torch.save(payload, run / "last.pth")
    refused(command("train.py", "--resume", run), "last.pth")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_reports_another_number_of_threads(command, tmp_path, undisturbed):
    """A note is printed, as the number of threads changes bits."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "one"))
    places = ["--resume", run, "--save_path", tmp_path, "--cache_dir", tmp_path]
    assert "so far" not in train(command, tmp_path, *places).stdout
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "threads": 3}))
    assert "1 threads, 3 so far" in train(command, tmp_path, *places).stdout


def test_invalid_resumes_are_refused(command, tmp_path, undisturbed):
    refused(command("train.py", "--resume", tmp_path), "config.json")
    for flag, value in (("--learning_rate", 0.5), ("--shot", 2)):
        refused(command("train.py", "--resume", undisturbed, flag, value), f"{flag} {value} contradicts")
    run = Path(shutil.copytree(undisturbed, tmp_path / "one"))
    resume = ["train.py", "--resume", run, "--save_path", tmp_path, "--cache_dir", tmp_path]
    config, whole = (run / "config.json").read_bytes(), (run / "last.pth").read_bytes()
    refused(command(*resume, "--epoch", EPOCHS - 1), str(EPOCHS))
    assert (run / "config.json").read_bytes() == config  # else every later --resume would be refused
    best = (run / "best.pth").rename(tmp_path / "best.pth")
    refused(command(*resume), "best.pth")
    best.rename(run / "best.pth")
    for content in (whole[:-5000], None):
        (run / "last.pth").unlink() if content is None else (run / "last.pth").write_bytes(content)
        refused(command(*resume), "last.pth")
