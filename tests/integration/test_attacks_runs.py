"""Damaged and hostile run folders, kept tokens that vanish, memory limits, results that would be lost."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from CLIP.clip import random_state
from CLIP.model import ModelConfig
from tests.helpers.attacks import driver, fine, read_json, refused
from tests.helpers.data import SMALL


@pytest.fixture
def run(home, tmp_path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return home.copy_run(tmp_path)


def change(path: Path, **entries: object) -> None:
    """Change entries of a JSON object; `options.NAME` those of its options."""
    values = read_json(path)
    for name, value in entries.items():
        values[name] = value
    path.write_text(json.dumps(values))


def options(path: Path, **entries: object) -> None:
    change(path, options={**read_json(path)["options"], **entries})


# --- kept tokens ---

FORGET = """
import subprocess, shutil, engine.training as t
finish = t.TrainingState.finish_epoch
def forgetting(state, *a):
    from pathlib import Path
    if not state.history:
        {action}
    return finish(state, *a)
t.TrainingState.finish_epoch = forgetting
"""


def test_a_store_that_is_pruned_under_a_run_stops_it_with_a_word(command, home, tmp_path):
    """Never other rows, never a traceback; the run goes on from its last epoch with --resume."""
    action = f"shutil.rmtree({str(tmp_path / 'store')!r})"
    script = driver(tmp_path, FORGET.format(action=action))
    result = command(script, "train.py", *home.train(tmp_path), "--cache", "disk")
    refused(result, "pruned by another command", "start again")
    run = tmp_path / "runs/one"
    fine(command("train.py", "--resume", run, "--save_path", tmp_path / "ckpt", "--cache_dir", tmp_path / "store"))
    assert (run / "metrics.jsonl").read_bytes() == (home.run / "metrics.jsonl").read_bytes()


def test_a_store_that_is_pruned_and_filled_by_others_gives_the_right_rows(command, home, tmp_path):
    """A file's name says its content: whoever wrote it, in whatever order, it holds the tokens of that very image."""
    store, other = tmp_path / "store", tmp_path / "other"
    for shots in (["--iterate", -1], []):  # other shots first
        flags = [*home.train(tmp_path / "a"), "--cache", "disk", "--cache_dir", other, "--epoch", 1, *shots]
        fine(command("train.py", *flags, "--batch_size", 3))
    action = f"shutil.rmtree({str(store)!r}); shutil.copytree({str(other)!r}, {str(store)!r})"
    script = driver(tmp_path, FORGET.format(action=action))
    fine(command(script, "train.py", *home.train(tmp_path), "--cache", "disk"))
    before, after = (path / "metrics.jsonl" for path in (home.run, tmp_path / "runs/one"))
    for one, two in zip(*(map(json.loads, path.read_text().splitlines()) for path in (before, after)), strict=True):
        for name in ("det", "seg", "total", "auc"):  # passes of 3 and of 16 images differ in the last bits
            assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_a_complete_store_that_is_read_only_is_read(command, home, tmp_path):
    """Reading needs no write, of no file and no folder of it."""
    flags = [*home.test(), "--cache", "disk", "--cache_dir", tmp_path / "store", "--out_json", tmp_path / "out.json"]
    fine(command("test.py", *flags))
    before = read_json(tmp_path / "out.json")
    code = f"""
import errno
store = {str(tmp_path / "store")!r}
def closed(event, args):
    writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
        event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(store):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(args[0]))
sys.addaudithook(closed)
"""
    script = driver(tmp_path, code)
    assert "14 of them computed before" in fine(command(script, "test.py", *flags))
    assert read_json(tmp_path / "out.json") == before
    refused(command(script, "train.py", *home.train(tmp_path), "--cache", "disk"), "--cache_dir", "cannot write")


def test_prune_deletes_stores_and_nothing_that_they_link_to(command, home, tmp_path):
    """Neither a store that is a link, nor folders that lie beside, nor what links inside lead to."""
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    fine(command("test.py", *home.test(), "--cache", "disk", "--cache_dir", store))
    (inside,) = store.iterdir()
    elsewhere.mkdir()
    (elsewhere / "meta.json").write_text("{}")
    (elsewhere / "mine.txt").write_text("mine")
    (store / "0123456789abcdef").symlink_to(elsewhere)
    (inside / "link").symlink_to(elsewhere)
    (store / "mine").mkdir()
    (store / "mine/meta.json").write_text("{}")
    fine(command("engine.features", "--prune", "--cache_dir", store))
    assert not inside.exists()
    assert (elsewhere / "mine.txt").read_text() == "mine"
    assert (store / "mine/meta.json").is_file()


LIMITS = {
    "control group, version 2": {
        "sys/fs/cgroup/job/memory.max": 40_000_000, "sys/fs/cgroup/job/memory.current": 39_900_000,
    },
    "control group above, version 2": {"sys/fs/cgroup/memory.max": 100_000, "sys/fs/cgroup/memory.current": 0},
    "control group, version 1": {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 40_000_000,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 39_900_000,
    },
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
def test_kept_tokens_respect_the_memory_limit_of_a_container(command, home, tmp_path, limit):
    """`--cache auto` sees the limits of control groups and takes files where memory would not do."""
    root = tmp_path / "root"
    version_1 = limit.endswith("1")
    texts = {
        "proc/meminfo": "MemAvailable: 90000000 kB\n",
        "proc/self/cgroup": "4:memory:/job\n" if version_1 else "0::/job\n",
    }
    for name, value in {**texts, **LIMITS[limit]}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(value))
    code = f"import engine.features as f\nfrom pathlib import Path\nf.free_memory.__defaults__ = (Path({str(root)!r}),)"
    output = fine(command(driver(tmp_path, code), "test.py", *home.test(), "--cache_dir", tmp_path / "store"))
    assert ("kept in memory" in output) == (limit == "none")
    assert (f"kept in {tmp_path}" in output) == (limit != "none")


@pytest.mark.parametrize("variables", [
    {"SLURM_MEM_PER_NODE": "0"}, {"SLURM_MEM_PER_NODE": "1"}, {"SLURM_MEM_PER_CPU": "1", "SLURM_CPUS_ON_NODE": "1"},
])  # fmt: skip
def test_kept_tokens_respect_the_memory_limit_of_slurm(command, home, tmp_path, variables):
    """Megabytes of a node, or of a CPU; 0 means all of it."""
    output = fine(command("train.py", *home.train(tmp_path), "--epoch", 1, env=variables))
    assert ("kept in memory" in output) == (variables == {"SLURM_MEM_PER_NODE": "0"})


def test_tokens_beyond_float16_are_noticed_in_the_pass(command, home, tmp_path):
    """Named by the image, with the flag that helps; not a loss that became nan, blamed on the learning rate."""
    state = random_state(ModelConfig.load("ViT-tiny-14-56"), seed=0)
    for name in ("weight", "bias"):
        state[f"visual.ln_pre.{name}"] = torch.full_like(state[f"visual.ln_pre.{name}"], 60_000.0)
    torch.save(state, tmp_path / "large.pt")
    flags = [*home.train(tmp_path), "--epoch", 1, "--pretrain", "openai", "--weights", tmp_path / "large.pt"]
    refused(command("train.py", *flags, "--cache_dtype", "float16"), ".png", "not finite", "--cache_dtype float32")
    assert "not finite" not in command("train.py", *flags).stderr


# --- a run that goes on ---


def test_changed_images_and_masks_stop_a_run_that_goes_on(command, home, tmp_path):
    """With their names; the same files go on, and nothing of the run is touched by the refusal."""
    data = home.copy_data(tmp_path)
    fine(command("train.py", *home.train(tmp_path, data)))
    run = tmp_path / "runs/one"
    resume = [*home.resume(run), "--epoch", 3, "--cache_dir", tmp_path / "store"]
    image = data / "Brain_AD/test/good/img/test_good_00001.png"
    mask = data / "Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"
    shot = data / "Brain_AD/valid/good/img/valid_good_00000.png"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for path in (image, mask, shot):
        kept = path.read_bytes()
        Image.eval(Image.open(path), lambda value: 255 - value).save(path)
        refused(command("train.py", *resume), path.name, "not those that the run began with")
        path.write_bytes(kept)
    image.rename(image.with_name("renamed.png"))
    refused(command("train.py", *resume), "renamed.png")
    image.with_name("renamed.png").rename(image)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    fine(command("train.py", *resume))


def test_epochs_without_their_state_are_not_thrown_away(command, home, run):
    """A missing last.pth is said, and metrics.jsonl stays as it is."""
    (run / "last.pth").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    refused(command("train.py", *home.resume(run), "--epoch", 3), "last.pth is missing")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_missing_best_checkpoint_is_said(command, home, run):
    """Where it is the only copy of the selected epoch."""
    state = torch.load(run / "last.pth", weights_only=True)
    state["state"]["best_epoch"] = 1
    torch.save(state, run / "last.pth")
    (run / "best.pth").unlink()
    refused(command("train.py", *home.resume(run), "--epoch", 3), "best.pth is missing", "epoch 1")


def test_an_extended_run_selects_what_a_longer_one_would(command, home, tmp_path):
    """`--eval_every 2`, three epochs extended to six, against six at once."""
    flags = [*home.train(tmp_path), "--eval_every", 2, "--learning_rate", 0.01]
    fine(command("train.py", *flags, "--epoch", 6, "--exp_name", "direct"))
    fine(command("train.py", *flags, "--epoch", 3))
    run = tmp_path / "runs/one"
    fine(command("train.py", *home.resume(run), "--epoch", 6, "--cache_dir", tmp_path / "store"))
    results = [read_json(tmp_path / "runs" / name / "result.json") for name in ("direct", "one")]
    assert results[0]["selected_epoch"] == results[1]["selected_epoch"]
    assert results[0]["per_image"] == results[1]["per_image"]


def test_the_line_that_says_how_to_go_on_can_be_typed(command, home, tmp_path):
    """Quoted for the shell, whatever the folder is called."""
    place = tmp_path / "my runs; echo $HOME"
    script = driver(tmp_path, FORGET.format(action="os.kill(os.getpid(), signal.SIGINT)"))
    result = command(script, "train.py", *home.train(tmp_path), "--run_dir", place)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    (hint,) = re.findall(r"to go on: (.*)", result.stderr)
    words = shlex.split(hint)
    assert words == ["python", "train.py", "--resume", str(place / "one")]
    fine(command(*words[1:], "--save_path", tmp_path / "ckpt", "--cache_dir", tmp_path / "store"))


def test_a_killed_run_leaves_no_temporary_file_for_ever(command, home, tmp_path):
    """What `kill -9` leaves in the run's folder goes with the next start, beside other files in a day."""
    code = """
import torch
save = torch.save
def dying(value, path, *a):
    save(value, path, *a)
    if "last.pth" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
"""
    flags = [*home.train(tmp_path), "--cache", "disk"]
    assert command(driver(tmp_path, code), "train.py", *flags).returncode == -signal.SIGKILL
    run = tmp_path / "runs/one"
    assert list(run.glob(".*.tmp"))
    (folder,) = (tmp_path / "store").iterdir()
    layer = next(folder.glob("layer*/*"))
    old = [layer / ".x.tokens.1.tmp", tmp_path / "ckpt/.Brain.pth.1.tmp"]
    (tmp_path / "ckpt").mkdir(exist_ok=True)
    for path in old:
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    fine(command("train.py", "--resume", run, "--save_path", tmp_path / "ckpt", "--cache_dir", tmp_path / "store"))
    assert not [path for path in (*run.rglob(".*.tmp"), *old) if path.exists()]


# --- damaged and hostile folders ---

DEEP = "[" * 100_000
DAMAGED: dict[str, Callable[[Path], None]] = {
    "obj a number": lambda run: options(run / "config.json", obj=5),
    "save_path a number": lambda run: options(run / "config.json", save_path=5),
    "prompts a list": lambda run: options(run / "config.json", prompts=[1, 2]),
    "resumed a word": lambda run: change(run / "config.json", resumed="x"),
    "settings a list": lambda run: change(run / "config.json", settings=[1]),
    "options a list": lambda run: change(run / "config.json", options=[1]),
    "learning_rate null": lambda run: options(run / "config.json", learning_rate=None),
    "seed a fraction": lambda run: options(run / "config.json", seed=1.5),
    "epoch a word": lambda run: options(run / "config.json", epoch="many"),
    "shot true": lambda run: options(run / "config.json", shot=True),
    "features_list nested": lambda run: options(run / "config.json", features_list=[[1], {}]),
    "deep nesting": lambda run: (run / "config.json").write_text(DEEP),
    "no JSON": lambda run: (run / "config.json").write_bytes(b"\xff\x00"),
    "config.json a pipe": lambda run: ((run / "config.json").unlink(), os.mkfifo(run / "config.json")),
    "contents.json a list": lambda run: (run / "contents.json").write_text("[1]"),
    "contents.json deep": lambda run: (run / "contents.json").write_text(DEEP),
    "last.pth is text": lambda run: (run / "last.pth").write_text("text"),
    "last.pth is a folder": lambda run: ((run / "last.pth").unlink(), (run / "last.pth").mkdir()),
    "history too short": lambda run: state(run, history=[]),
    "history of words": lambda run: state(run, history=["one", "two"]),
    "history without losses": lambda run: state(run, history=[{"epoch": 1}, {"epoch": 2}]),
    "best epoch a word": lambda run: state(run, best_epoch="one"),
    "best epoch beyond": lambda run: state(run, best_epoch=9),
    "parts a word": lambda run: state(run, parts="x"),
    "optimizers missing": lambda run: state(run, optimizers=[]),
    "shuffle a word": lambda run: state(run, shuffle="x"),
}


def state(run: Path, **entries: object) -> None:
    payload = torch.load(run / "last.pth", weights_only=True)
    payload["state"] |= entries
    torch.save(payload, run / "last.pth")


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_run_folder_is_refused_in_one_line(command, home, run, what):
    """Which names the file; nothing in the folder is changed."""
    DAMAGED[what](run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    flags = ["--resume", run, "--epoch", 3] if what == "save_path a number" else [*home.resume(run), "--epoch", 3]
    line = refused(command("train.py", *flags))
    if what == "history too short":
        assert "its history" in line or "last.pth" in line
    assert str(run) in line or "config.json" in line or "last.pth" in line
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert {k: v for k, v in after.items() if k not in ("lock", "metrics.jsonl")} == {
        k: v for k, v in before.items() if k not in ("lock", "metrics.jsonl")
    }
    assert not Path("5").exists()


@pytest.mark.parametrize("flag", ["save_path", "out_json", "cache_dir"])
def test_a_run_folder_from_elsewhere_does_not_decide_where_it_is_written(command, home, run, tmp_path, flag):
    """Paths outside of the working folder and the run's own are asked for again."""
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "Brain.pth").write_text("mine")
    value = planted / "Brain.pth" if flag == "out_json" else planted
    inside = {"save_path": str(run / "ckpt"), "out_json": None, "cache_dir": str(run / "store")}
    options(run / "config.json", **{**inside, flag: str(value)})
    refused(command("train.py", "--resume", run, "--epoch", 3), f"--{flag}", "outside", "give")
    assert (planted / "Brain.pth").read_text() == "mine"
    assert [path.name for path in planted.iterdir()] == ["Brain.pth"]
    options(run / "config.json", **inside)
    fine(command("train.py", "--resume", run, "--epoch", 3))


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "best.pth", "result.json", "contents.json", "index.html"])
def test_links_in_a_run_folder_from_elsewhere_are_not_written_through(command, home, run, tmp_path, name):
    """What they lead to stays as it is."""
    planted = tmp_path / "planted"
    content = (run / name).read_bytes() if name in ("best.pth", "contents.json") else b"mine"
    planted.write_bytes(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(planted)
    result = command("train.py", *home.resume(run), "--epoch", 3)
    assert "Traceback" not in result.stderr
    assert planted.read_bytes() == content


# --- results that would be lost ---


def test_files_of_another_kind_are_not_replaced_by_results(command, home, tmp_path):
    """A checkpoint under --out_json or --save_scores, a picture under --save_ckpt or an export, stay."""
    kept = tmp_path / "kept.pth"
    shutil.copy(home.ckpt, kept)
    image = tmp_path / "scan.png"
    shutil.copy(home.data / "Brain_AD/test/good/img/test_good_00000.png", image)
    before = {path: path.read_bytes() for path in (kept, image)}
    refused(command("test.py", *home.test(), "--out_json", kept), "--out_json", "no JSON", "another name")
    refused(command("train.py", *home.train(tmp_path), "--out_json", kept), "--out_json", "no JSON")
    refused(command("test.py", *home.test(), "--save_scores", kept), "--save_scores", "another name")
    refused(command("engine.checkpoint", "export", home.ckpt, image), "scan.png", "another name")
    flags = ["--calibrate", home.data / "Brain_AD", "--save_ckpt", image]
    refused(command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", *flags), "--save_ckpt", "another name")
    assert {path: path.read_bytes() for path in before} == before
    scores = tmp_path / "scores.npz"
    for _ in range(2):  # its own kind is replaced
        fine(command("test.py", *home.test(), "--save_scores", scores, "--out_json", tmp_path / "out.json"))


RESULTS: dict[str, Callable[[dict[str, object]], object]] = {
    "no JSON": lambda result: None,
    "a list": lambda result: [1],
    "a word for a number": lambda result: {**result, "auc": "high"},
    "infinite": lambda result: {**result, "auc": float("inf")},
    "half an interval": lambda result: {**result, "auc_ci95": [0.5]},
    "last a word": lambda result: {**result, "last": "x"},
}


def test_damaged_results_of_a_grid_are_refused_in_one_line(command, home, tmp_path):
    """Of reproduce.py: which file, and what to do; an undamaged cell is not computed again."""
    grid = ["--table", "main", "--obj", "Brain", "--seeds", 1, "--shots", 1, *SMALL, "--data_path", home.data]
    grid += ["--cache_dir", tmp_path / "store", "--epoch", 1, "--out", tmp_path / "out"]
    fine(command("reproduce.py", *grid))
    path = tmp_path / "out/runs/Brain-1shot-seed1/result.json"
    result = read_json(path)
    for what, damage in RESULTS.items():
        path.write_text("{" if what == "no JSON" else json.dumps(damage(result)))
        refused(command("reproduce.py", *grid), "Brain-1shot-seed1/result.json", "delete it")
    path.write_text(DEEP)
    refused(command("reproduce.py", *grid), "result.json", "delete it")
    path.unlink()
    fine(command("reproduce.py", *grid))
    assert read_json(path)["auc"] == result["auc"]


# --- flags without a bound ---


def test_what_would_take_for_ever_is_bounded(command, home, tmp_path):
    """A billion made-up images, thousands of prompts, an empty path."""
    refused(command("dataset.phantom", "--out", tmp_path, "--test", 1_000_000_000), "--test 1000000000", "at most")
    refused(command("dataset.phantom", "--out", tmp_path, "--valid", 1_000_000_000), "--valid", "at most")
    many = {"normal": ["good {}"], "abnormal": [f"bad {i} {{}}" for i in range(5000)]}
    (tmp_path / "many.json").write_text(json.dumps(many))
    flags = [*home.train(tmp_path), "--prompts", tmp_path / "many.json"]
    refused(command("train.py", *flags), "many.json", "5000 phrases")
    refused(command("train.py", *home.train(tmp_path), "--save_path", ""), "--save_path", "is empty")
    assert not (tmp_path / "Brain_AD").exists()


def test_only_what_is_tested_is_promised():
    """No page promises that a power cut loses nothing: files are renamed whole, but not forced onto the disk."""
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "engine").glob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8").lower()
        for match in re.finditer(r"power (cut|loss|failure)|fsync", text):
            around = text[max(match.start() - 300, 0) : match.end() + 300]
            assert page.name == "robustness.md" or "not" in around, page
