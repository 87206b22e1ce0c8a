"""reproduce.py and test.py on another data set, as a user starts them, on the phantom and the small model."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from CLIP.clip import create_model
from dataset import phantom
from engine.baselines import NAMES
from engine.study.jobs import run_jobs
from tests.helpers.commands import Call
from tests.helpers.data import SMALL

ROOT = Path(__file__).parents[2]
TABLES = ("md", "csv", "tex")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Flags of train.py: data, a small model, few epochs."""
    folder = tmp_path_factory.mktemp("data")
    phantom.write(folder, ["Brain", "Liver", "Chest"], valid=2, test=4, seed=0, size=64)
    return [*SMALL, "--data_path", str(folder), "--cache_dir", str(folder / "cache"), "--epoch", "2"]


def same_tables(one: Path, two: Path, name: str) -> None:
    for suffix in TABLES:
        assert (one / f"{name}.{suffix}").read_bytes() == (two / f"{name}.{suffix}").read_bytes()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_killed_ablation(command, small, tmp_path):
    """The tables and every epoch's losses are those of an undisturbed grid."""
    grid = ["--table", "ablation", "--obj", "Brain", "--seeds", "111", "--shots", "1", "--select", "test"]
    grid += [*small, "--features_list", "2"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    result = command("reproduce.py", *grid, "--out", undisturbed)
    assert result.returncode == 0, result.stderr
    assert "features" not in result.stderr  # one bar only; the cells' output is in their logs
    assert "epoch 2/2" in (undisturbed / "logs/Brain-1shot-seed111.txt").read_text()
    event = (Call("engine.files.run.RunFolder.save", 6), signal.SIGKILL)  # two epochs a cell: in the third one
    assert command("reproduce.py", *grid, "--out", killed, on=event).returncode == -signal.SIGKILL
    assert len(list(killed.glob("runs/*/result.json"))) == 2
    assert "2 of 10 cells" in (killed / "ablation.md").read_text()
    listed = command("reproduce.py", *grid, "--out", killed, "--dry_run").stdout
    assert listed.count("done   ") == 2
    assert command("reproduce.py", *grid, "--out", killed).returncode == 0
    same_tables(undisturbed, killed, "ablation")
    for run in undisturbed.glob("runs/*"):
        assert (run / "metrics.jsonl").read_bytes() == (killed / "runs" / run.name / "metrics.jsonl").read_bytes()

    # A cell of the grid is what train.py alone gives, though that shares neither weights nor features.
    alone = ["--obj", "Brain", "--shot", "1", "--seed", "111", "--fidelity", "corrected", "--no-save_model"]
    alone += [*small, "--features_list", "2", "--cache", "ram", "--run_dir", tmp_path, "--exp_name", "alone"]
    assert command("train.py", *alone).returncode == 0
    cell = undisturbed / "runs" / "Brain-1shot-seed111-fidelity-corrected"
    assert (tmp_path / "alone" / "metrics.jsonl").read_bytes() == (cell / "metrics.jsonl").read_bytes()


def test_main_table(command, small, tmp_path):
    grid = ["--table", "main", "--seeds", "1", "2", "--shots", "2", "--out", tmp_path, *small, "--select", "test"]
    grid += ["--patient", r"_(\d+)\.png", "--clean"]  # two of four test images a class are of shot patients
    both = [*grid, "--obj", "Brain", "Chest"]
    compare = tmp_path / "mine.json"
    mine = {"method": "Mine", "source": "here", "shots": 2, "auc": {"Brain": 99.5}}
    compare.write_text(json.dumps({"results": [mine]}))
    result = command("reproduce.py", *both, "--compare", compare)
    assert result.returncode == 0, result.stderr
    results = [read(tmp_path / f"runs/Brain-2shot-seed{seed}/result.json") for seed in (1, 2)]
    found = {(row["data set"], row["metric"], row["method"]): row for row in rows(tmp_path / "main.csv")}
    for epoch, values in (("selected on test", results), ("last epoch", [result["last"] for result in results])):
        for metric, key in (("image AUROC", "auc"), ("pixel AUROC", "pauc")):
            row = found["Brain", metric, f"ours, {epoch}"]
            assert float(row["mean"]) == pytest.approx(50 * sum(value[key] for value in values), abs=1e-5)
            low = 50 * sum(value[f"{key}_ci95"][0] for value in values)
            assert float(row["ci95_low"]) == pytest.approx(low, abs=1e-5)
            assert row["seeds"] == "2"
            clean = 50 * sum(value[f"{key}_without_shot_patients"] for value in values)
            assert float(
                found["Brain", metric, f"ours, {epoch}, without the shots' patients"]["mean"]
            ) == pytest.approx(clean, abs=1e-5)
    assert ("Chest", "pixel AUROC", "ours, last epoch") not in found  # it has no masks
    assert not any("MVFA" in method for _, _, method in found)  # on record for 4 shots only
    assert float(found["Brain", "image AUROC", "Mine (9)"]["mean"]) == 99.5
    text = (tmp_path / "main.md").read_text()
    assert "Made-up images (Brain, Chest)" in text
    assert "4 of 4 cells" in text
    assert text in result.stdout

    # Done is done: nothing is computed again.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert command("reproduce.py", *both).returncode == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert not list(tmp_path.glob("*.before-*"))
    # A table of other data sets replaces none, and of what the run itself chose to select there is no word on test.
    mine = [*[word for word in grid if word not in ("--select", "test")], "--obj", "Liver", "--epoch", "1"]
    other = command("reproduce.py", *mine)
    assert other.returncode == 0, other.stderr
    assert "main.before-" in other.stdout
    assert any("Brain" in path.read_text() for path in tmp_path.glob("main.before-*.md"))
    chosen = read(tmp_path / "runs/Liver-2shot-seed1/result.json")["select"]
    methods = {row["method"] for row in rows(tmp_path / "main.csv")}
    assert ("ours, selected on test" in methods) == (chosen == "test")
    # A cell that fails is named, and the others go on.
    failing = command("reproduce.py", *both, "--shots", "3")  # valid/ has two images a class
    assert failing.returncode == 2
    assert "--shot 3: valid holds only 2" in failing.stderr
    assert "4 of 4 cells failed" in failing.stderr
    assert "Traceback" not in failing.stderr
    assert rows(tmp_path / "main.csv")[0]["note"] == "failed"


def test_leave_one_out_table(command, small, tmp_path):
    grid = ["--table", "leave_one_out", "--obj", "Brain", "Liver", "Chest", "--seeds", "1", "--shots", "1", *small]
    result = command("reproduce.py", *grid, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    found = {(r["tested on"], r["metric"]): r for r in rows(tmp_path / "leave_one_out.csv")}
    assert {tested for tested, metric in found if metric == "image AUROC"} == {"Brain", "Liver", "Chest"}
    assert {tested for tested, metric in found if metric == "pixel AUROC"} == {"Brain", "Liver"}
    run = read(tmp_path / "runs/Chest-from-Brain-Liver-1shot-seed1/result.json")
    assert (run["select"], len(run["shots"]["normal"]), run["n_normal"]) == ("last", 2, 4)
    assert float(found["Chest", "image AUROC"]["mean"]) == pytest.approx(100 * run["auc"], abs=1e-5)
    assert "equal a shot" not in (tmp_path / "logs/Brain-from-Liver-1shot-seed1.txt").read_text()  # it is held out


def test_baselines_of_a_tower_of_ones_own(command, small, tmp_path):
    """As docs/results.md has it: a tower's JSON and weights, own data, and a command for each fidelity."""
    config, weights, data = tmp_path / "tower.json", tmp_path / "tower.pt", small[small.index("--data_path") + 1]
    shutil.copyfile(ROOT / "CLIP/model_configs/ViT-tiny-14-56.json", config)
    torch.save(create_model("ViT-tiny-14-56", "random", 56).state_dict(), weights)
    grid = ["--table", "baselines", "--obj", "Brain", "Chest", "--seeds", "1", "--shots", "2", "--device", "cpu"]
    grid += ["--model_name", config, "--weights", weights, "--img_size", "84", "--epoch", "1", "--data_path", data]
    grid += ["--cache_dir", tmp_path / "cache", "--select", "test", "--out", tmp_path, "--fidelity"]
    result = command("reproduce.py", *grid, "corrected")
    assert result.returncode == 0, result.stderr
    caption = (tmp_path / "baselines.md").read_text().splitlines()[0]
    assert "tower, tower.pt, 84 px, corrected, 1 epoch, 2 shots" in caption  # and no folder of this machine
    released = command("reproduce.py", *grid, "released")
    assert (released.returncode, "choose another --out" in released.stderr) == (2, True)
    found = {(r["data set"], r["metric"], r["method"]): r for r in rows(tmp_path / "baselines.csv")}
    methods = ["ours, selected on test", "ours, last epoch", *NAMES]
    assert [method for obj, metric, method in found if (obj, metric) == ("Brain", "pixel AUROC")] == methods
    assert [method for obj, metric, method in found if (obj, metric) == ("Chest", "image AUROC")] == methods
    assert not any((obj, metric) == ("Chest", "pixel AUROC") for obj, metric, _ in found)
    measured, trained = (read(tmp_path / f"runs/Brain-2shot-seed1{end}/result.json") for end in ("-baselines", ""))
    assert (measured["shots"], measured["mask_above"]) == (trained["shots"], trained["mask_above"])
    for name in NAMES:
        figures = measured["baselines"][name]
        assert float(found["Brain", "image AUROC", name]["mean"]) == pytest.approx(100 * figures["auc"], abs=1e-5)
        assert figures["auc_ci95"][0] <= figures["auc"] <= figures["auc_ci95"][1]
    log = (tmp_path / "logs/Brain-2shot-seed1-baselines.txt").read_text()
    # The tower saw these images for MadCLIP already.
    assert re.search(r"tokens: (\d+) images .*; \1 of them computed before", log)


def test_a_dry_run_without_data(command, tmp_path):
    grid = ["--table", "main", "--data_path", tmp_path / "none", "--out", tmp_path]
    result = command("reproduce.py", *grid, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("to do  ") == 18
    assert "18 of 18 to do" in result.stdout
    assert "2.37 MB" in result.stdout
    assert not list(tmp_path.iterdir())
    missing = command("reproduce.py", *grid)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


def test_cross_table(command, small, tmp_path):
    """Brain and Liver have masks, Chest has none; the grey of a mask is each data set's own."""
    data = tmp_path / "data"
    shutil.copytree(small[small.index("--data_path") + 1], data, ignore=shutil.ignore_patterns("cache"))
    (data / "Liver_AD" / "Liver.json").write_text('{"mask_above": 25}')
    flags = [*small, "--data_path", data, "--select", "test"]
    grid = ["--table", "cross", "--obj", "Brain", "Liver", "Chest", "--seeds", "1", "--shots", "1", *flags]
    result = command("reproduce.py", *grid, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    last = [row for row in rows(tmp_path / "cross.csv") if row["epoch"] == "last epoch"]
    found = {(r["trained on"], r["tested on"], r["metric"]): r for r in last}
    assert {(a, b) for a, b, metric in found if metric == "pixel AUROC"} == {
        ("Brain", "Brain"), ("Brain", "Liver"), ("Liver", "Liver"), ("Liver", "Brain")
    }  # fmt: skip
    assert len({(a, b) for a, b, _ in found}) == 9
    both = read(tmp_path / "runs/Brain-1shot-seed1/on-Liver.json")
    assert (both["trained_on"], both["obj"]) == ("Brain", "Liver")
    assert (both["select"], both["last"]["select"]) == ("test", "last")
    assert float(found["Brain", "Liver", "pixel AUROC"]["mean"]) == pytest.approx(100 * both["last"]["pauc"], abs=1e-5)
    assert (both["mask_above"], read(tmp_path / "runs/Liver-1shot-seed1/on-Brain.json")["mask_above"]) == (25, 127)
    assert "127 (Brain), 25 (Liver)" in (tmp_path / "cross.md").read_text()
    # A threshold belongs to the epoch that it was set for.
    run = read(tmp_path / "runs/Brain-1shot-seed1/result.json")
    assert ("decision" in both["last"]) == (run["selected_epoch"] == 2)

    # test.py gives the same; the prompts keep the name unless another is given.
    out, ckpt = tmp_path / "t.json", tmp_path / "runs/Brain-1shot-seed1/last-checkpoint.pth"
    paths = [*SMALL[-2:], "--data_path", data, "--cache_dir", small[small.index("--cache_dir") + 1], "--out_json", out]
    output = command("test.py", "--obj", "Liver", *paths, "--ckpt", ckpt).stdout
    assert "trained on Brain, tested on Liver" in output
    assert "the prompts say 'Brain'" in output
    assert read(out) == both["last"]
    renamed = command("test.py", "--obj", "Liver", *paths, "--ckpt", ckpt, "--prompt_name", "liver").stdout
    assert "the prompts say 'liver'" in renamed
    assert read(out)["per_image"] != both["last"]["per_image"]

    # Only one of the two has masks: images score as the checkpoint was trained, and nothing is said of pixels.
    output = command("test.py", "--obj", "Chest", *paths, "--ckpt", ckpt).stdout
    assert "by their highest pixel" in output
    assert "Chest pAUC" not in output
    assert read(out)["pauc"] is None
    output = command("test.py", "--obj", "Brain", *paths, "--ckpt", tmp_path / "runs/Chest-1shot-seed1/best.pth").stdout
    assert "by the detection heads" in output


def wait_once(folder: Path) -> None:
    """A job that takes ten minutes, but not when it is called again."""
    with (folder / "calls.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if (folder / "calls.txt").read_text().count("\n") == 1:
        time.sleep(600)


def test_a_preempted_job_is_called_again(tmp_path):
    pytest.importorskip("submitit")
    jobs, calls, found = run_jobs(wait_once, [tmp_path], "local", tmp_path, 1), tmp_path / "calls.txt", []
    waiting = threading.Thread(target=lambda: found.extend(jobs))
    waiting.start()
    while not calls.is_file() or not calls.read_text():
        time.sleep(0.05)
    os.kill(int(calls.read_text()), signal.SIGUSR2)  # as Slurm does, the way submitit asks it to
    waiting.join(500)
    assert found == [(tmp_path, None)]
    assert calls.read_text().count("\n") == 2


def cluster() -> str:
    """A reason not to use Slurm here, if there is one."""
    if shutil.which("sbatch") is None:
        return "no Slurm here"
    try:
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return "Slurm does not answer"
    return "" if "idle" in state.stdout else "no idle node"


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_jobs(command, small, tmp_path, executor):
    """Cells as jobs give the same tables."""
    pytest.importorskip("submitit")
    if executor == "slurm" and (reason := cluster()):
        pytest.skip(reason)
    grid = ["--table", "main", "--obj", "Chest", "--seeds", "1", "2", "--shots", "1", *small]
    jobs = command("reproduce.py", *grid, "--out", tmp_path / "jobs", "--executor", executor, "--jobs", 2)
    assert jobs.returncode == 0, jobs.stderr
    assert len(list((tmp_path / "jobs/jobs").glob("*_submitted.pkl"))) == 2
    assert command("reproduce.py", *grid, "--out", tmp_path / "here").returncode == 0
    same_tables(tmp_path / "jobs", tmp_path / "here", "main")
