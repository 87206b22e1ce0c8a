"""A data set whose shots' patients are in the test set, through the real commands: what the second figure is for."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import phantom
from tests.helpers.data import SMALL


def write_leaky(root: Path) -> None:
    """Brain, where patients of the shots are in the test set, on slices like the shots, and other patients are hard."""

    def save(split: str, label: str, name: str, image: np.ndarray, mask: np.ndarray | None) -> None:
        for part, picture in (("img", image), ("anomaly_mask", None if mask is None else mask.astype(np.uint8) * 255)):
            if picture is not None:
                path = root / split / label / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)

    noise = np.random.default_rng(0)
    for i, (label, first) in product(range(4), (("good", 1), ("Ungood", 11))):
        image, drawn = phantom.draw("Brain", "valid", label, i, 0, 96)
        mask = drawn if label == "Ungood" else None
        save("valid", label, f"{first + i:05d}_60.png", image, mask)
        for number in (61, 62, 63):
            near = np.clip(image + noise.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
            save("test", label, f"{first + i:05d}_{number}.png", near, mask)
    for i in range(12):
        save("test", "good", f"{100 + i:05d}_70.png", phantom.draw("Brain", "test", "good", i, 0, 96)[0], None)
        healthy, _ = phantom.draw("Brain", "test", "good", 100 + i, 0, 96)
        _, mask = phantom.draw("Brain", "test", "Ungood", i, 0, 96)
        faint = np.where(mask, np.clip(healthy.astype(int) + 4, 0, 255), healthy).astype(np.uint8)
        save("test", "Ungood", f"{200 + i:05d}_70.png", faint, mask)


def test_a_leaky_data_set_scores_lower_without_the_shots_patients(command, tmp_path):
    write_leaky(tmp_path / "data" / "Brain_AD")
    paths = ["--data_path", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--out", tmp_path]
    flags = [*SMALL, "--img_size", 84, "--epoch", 25, "--shots", 4, "--seeds", 1, "--clean"]
    result = command("reproduce.py", "--table", "main", "--obj", "Brain", *paths, *flags)
    assert result.returncode == 0, result.stderr
    found = {
        (row["metric"], row["method"]): float(row["mean"])
        for row in csv.DictReader((tmp_path / "main.csv").read_text().splitlines())
        if row["mean"]
    }
    for metric in ("image AUROC", "pixel AUROC"):
        assert found[metric, "ours, last epoch, without the shots' patients"] < found[metric, "ours, last epoch"] - 5
    run = json.loads((tmp_path / "runs/Brain-4shot-seed1/result.json").read_text())
    assert (run["n_normal_without_shot_patients"], run["n_abnormal_without_shot_patients"]) == (12, 12)
    checked = command("dataset.check", "--obj", "Brain", "--data_path", tmp_path / "data")
    assert checked.returncode == 1
    assert "error: patients in valid and in test: 8" in checked.stdout
