"""reproduce.py, and test.py on another data set, as a user starts them, with phantoms and the small model."""

import json
import re
import shutil
import signal

import pytest
import torch

from CLIP.clip import create_model
from dataset import phantom
from engine.baselines import NAMES
from tests.helpers.commands import ROOT, Call, fine, read_json, rows
from tests.helpers.data import SMALL


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Flags of train.py: data, the small model, few epochs."""
    folder = tmp_path_factory.mktemp("data")
    phantom.write(folder, ["Brain", "Liver", "Chest"], valid=2, test=4, seed=0, size=64)
    return [*SMALL, "--data_path", str(folder), "--cache_dir", str(folder / "cache"), "--epoch", "2"]


def test_killed_ablation_is_resumed(command, small, tmp_path):
    """A killed table is resumed; its cells equal runs of train.py, which share neither weights nor features."""
    shared = [*small, "--features_list", "2", "--epoch", "1", "--select", "test"]
    grid = ["--table", "ablation", "--obj", "Chest", "--seeds", "111", "--shots", "1", *shared, "--out", tmp_path]
    event = (Call("engine.files.run.RunFolder.save", 3), signal.SIGKILL)  # in the third cell
    assert command("reproduce.py", *grid, on=event).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2
    assert fine(command("reproduce.py", *grid, "--dry_run")).count("done   ") == 2
    fine(command("reproduce.py", *grid))
    assert "10 of 10 cells" in (tmp_path / "ablation.md").read_text()
    assert "epoch 1/1" in (tmp_path / "logs/Chest-1shot-seed111.txt").read_text()

    alone = ["--obj", "Chest", "--shot", "1", "--seed", "111", "--no-save_model", *shared, "--cache", "ram"]
    for cell, flags in (("Chest-1shot-seed111", []), ("Chest-1shot-seed111-fidelity-corrected", ["corrected"])):
        fidelity = ["--fidelity", *flags] if flags else []
        fine(command("train.py", *alone, *fidelity, "--run_dir", tmp_path / "alone", "--exp_name", cell))
        lines = [(tmp_path / folder / cell / "metrics.jsonl").read_bytes() for folder in ("alone", "runs")]
        assert lines[0] == lines[1]


def test_main_table(command, small, tmp_path):
    grid = ["--table", "main", "--seeds", "1", "2", "--shots", "2", "--out", tmp_path, *small, "--select", "test"]
    grid += ["--patient", r"_(\d+)\.png", "--clean"]  # two of four test images per class are of patients of the shots
    both = [*grid, "--obj", "Brain", "Chest"]
    compare = tmp_path / "mine.json"
    mine = {"method": "Mine", "source": "here", "shots": 2, "auc": {"Brain": 99.5}}
    compare.write_text(json.dumps({"results": [mine]}))
    printed = fine(command("reproduce.py", *both, "--compare", compare))
    results = [read_json(tmp_path / f"runs/Brain-2shot-seed{seed}/result.json") for seed in (1, 2)]
    found = {(row["data set"], row["metric"], row["method"]): row for row in rows(tmp_path / "main.csv")}
    for epoch, values in (("selected on test", results), ("last epoch", [result["last"] for result in results])):
        for metric, key in (("image AUROC", "auc"), ("pixel AUROC", "pauc")):
            for rest, name in (("", key), (", without the shots' patients", f"{key}_without_shot_patients")):
                mean = 50 * sum(value[name] for value in values)
                assert float(found["Brain", metric, f"ours, {epoch}{rest}"]["mean"]) == pytest.approx(mean, abs=1e-5)
    assert ("Chest", "pixel AUROC", "ours, last epoch") not in found  # Chest has no masks
    assert not any("MVFA" in method for _, _, method in found)  # published for 4 shots only
    assert float(found["Brain", "image AUROC", "Mine (9)"]["mean"]) == 99.5
    text = (tmp_path / "main.md").read_text()
    assert "Made-up images (Brain, Chest)" in text
    assert "4 of 4 cells" in text
    assert text in printed

    # Finished cells are not computed again.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert command("reproduce.py", *both).returncode == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert not list(tmp_path.glob("*.before-*"))
    # Failed cells are reported, and the others still run.
    failing = command("reproduce.py", *both, "--shots", "3")  # valid/ has two images per class
    assert (failing.returncode, "4 of 4 cells failed" in failing.stderr) == (2, True)
    assert rows(tmp_path / "main.csv")[0]["note"] == "failed"


def test_leave_one_out_table(command, small, tmp_path):
    grid = ["--table", "leave_one_out", "--obj", "Brain", "Liver", "Chest", "--seeds", "1", "--shots", "1", *small]
    fine(command("reproduce.py", *grid, "--out", tmp_path))
    found = {(r["tested on"], r["metric"]): r for r in rows(tmp_path / "leave_one_out.csv")}
    assert {tested for tested, metric in found if metric == "image AUROC"} == {"Brain", "Liver", "Chest"}
    assert {tested for tested, metric in found if metric == "pixel AUROC"} == {"Brain", "Liver"}
    run = read_json(tmp_path / "runs/Chest-from-Brain-Liver-1shot-seed1/result.json")
    assert (run["select"], len(run["shots"]["normal"]), run["n_normal"]) == ("last", 2, 4)
    assert float(found["Chest", "image AUROC"]["mean"]) == pytest.approx(100 * run["auc"], abs=1e-5)
    assert "equal a shot" not in (tmp_path / "logs/Brain-from-Liver-1shot-seed1.txt").read_text()  # Brain is held out


def test_baselines_of_a_custom_tower(command, small, tmp_path):
    """As in docs/results.md: JSON and weights of a tower, custom data, and one command for each fidelity."""
    config, weights, data = tmp_path / "tower.json", tmp_path / "tower.pt", small[small.index("--data_path") + 1]
    shutil.copyfile(ROOT / "CLIP/model_configs/ViT-tiny-14-56.json", config)
    torch.save(create_model("ViT-tiny-14-56", "random", 56).state_dict(), weights)
    grid = ["--table", "baselines", "--obj", "Brain", "Chest", "--seeds", "1", "--shots", "2", "--device", "cpu"]
    grid += ["--model_name", config, "--weights", weights, "--img_size", "84", "--epoch", "1", "--data_path", data]
    grid += ["--cache_dir", tmp_path / "cache", "--select", "test", "--out", tmp_path, "--fidelity"]
    fine(command("reproduce.py", *grid, "corrected"))
    caption = (tmp_path / "baselines.md").read_text().splitlines()[0]
    assert "tower, tower.pt, 84 px, corrected, 1 epoch, 2 shots" in caption  # without local paths
    released = command("reproduce.py", *grid, "released")
    assert (released.returncode, "choose another --out" in released.stderr) == (2, True)
    found = {(r["data set"], r["metric"], r["method"]): r for r in rows(tmp_path / "baselines.csv")}
    methods = ["ours, selected on test", "ours, last epoch", *NAMES]
    assert [method for obj, metric, method in found if (obj, metric) == ("Brain", "pixel AUROC")] == methods
    assert [method for obj, metric, method in found if (obj, metric) == ("Chest", "image AUROC")] == methods
    assert not any((obj, metric) == ("Chest", "pixel AUROC") for obj, metric, _ in found)
    for name in NAMES:
        figures = read_json(tmp_path / "runs/Brain-2shot-seed1-baselines/result.json")["baselines"][name]
        assert float(found["Brain", "image AUROC", name]["mean"]) == pytest.approx(100 * figures["auc"], abs=1e-5)
    log = (tmp_path / "logs/Brain-2shot-seed1-baselines.txt").read_text()
    # The training has already computed the tokens of these images.
    assert re.search(r"tokens: (\d+) images .*; \1 computed before", log)


def test_cross_table(command, small, tmp_path):
    """Pixel metrics only if both data sets have masks (Chest has none); each data set has its own mask_above."""
    data = tmp_path / "data"
    shutil.copytree(small[small.index("--data_path") + 1], data, ignore=shutil.ignore_patterns("cache"))
    (data / "Liver_AD" / "Liver.json").write_text('{"mask_above": 25}')
    flags = [*small, "--data_path", data, "--select", "test"]
    grid = ["--table", "cross", "--obj", "Brain", "Liver", "Chest", "--seeds", "1", "--shots", "1", *flags]
    fine(command("reproduce.py", *grid, "--out", tmp_path))
    last = [row for row in rows(tmp_path / "cross.csv") if row["epoch"] == "last epoch"]
    found = {(r["trained on"], r["tested on"], r["metric"]): r for r in last}
    assert {(a, b) for a, b, metric in found if metric == "pixel AUROC"} == {
        ("Brain", "Brain"), ("Brain", "Liver"), ("Liver", "Liver"), ("Liver", "Brain")
    }  # fmt: skip
    assert len({(a, b) for a, b, _ in found}) == 9
    both = read_json(tmp_path / "runs/Brain-1shot-seed1/on-Liver.json")
    assert (both["trained_on"], both["obj"]) == ("Brain", "Liver")
    assert "trained on Brain" in both["without_shot_patients"]
    assert (both["select"], both["last"]["select"]) == ("test", "last")
    assert float(found["Brain", "Liver", "pixel AUROC"]["mean"]) == pytest.approx(100 * both["last"]["pauc"], abs=1e-5)
    assert (both["mask_above"], read_json(tmp_path / "runs/Liver-1shot-seed1/on-Brain.json")["mask_above"]) == (25, 127)
    assert "127 (Brain), 25 (Liver)" in (tmp_path / "cross.md").read_text()
    # The last checkpoint has a threshold and figures only if its epoch is the selected one.
    run = read_json(tmp_path / "runs/Brain-1shot-seed1/result.json")
    assert ("decision" in both["last"]) == (run["selected_epoch"] == 2)
    stored = torch.load(tmp_path / "runs/Brain-1shot-seed1/last-checkpoint.pth", weights_only=True)["about"]
    assert (stored["figures"] is None) == (run["selected_epoch"] != 2)

    # test.py gives the same results; prompts keep the name of the trained organ unless another is given.
    out, ckpt = tmp_path / "t.json", tmp_path / "runs/Brain-1shot-seed1/last-checkpoint.pth"
    paths = [*SMALL[-2:], "--data_path", data, "--cache_dir", small[small.index("--cache_dir") + 1], "--out_json", out]
    output = command("test.py", "--obj", "Liver", *paths, "--ckpt", ckpt).stdout
    assert "trained on Brain, tested on Liver" in output
    assert "the prompts say 'Brain'" in output
    assert read_json(out) == both["last"]
    renamed = command("test.py", "--obj", "Liver", *paths, "--ckpt", ckpt, "--prompt_name", "liver").stdout
    assert "the prompts say 'liver'" in renamed
    assert read_json(out)["per_image"] != both["last"]["per_image"]

    # Only the training data have masks: images are scored as in training, without pixel metrics.
    output = command("test.py", "--obj", "Chest", *paths, "--ckpt", ckpt).stdout
    assert "Chest pAUC" not in output
    assert read_json(out)["pauc"] is None
