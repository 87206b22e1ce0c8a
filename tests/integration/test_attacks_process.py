"""What happens around a command: several processes, patients' names, passwords, too little memory."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.helpers.attacks import UNGOOD, driver, fine, read_json, refused
from tests.helpers.commands import ROOT

ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


# --- names and passwords ---


def contents(folder: Path) -> bytes:
    """All files below a folder, packed members of archives too."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parts.append(path.read_bytes())
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    parts += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(parts)


def test_anonymous_results_hold_no_file_name(command, home, tmp_path):
    """Checkpoint, results, page and figures of train.py and test.py, tables and pictures of predict.py."""
    data = home.copy_data(tmp_path)
    for path in list((data / "Brain_AD").rglob("*Ungood_0000*.png")):
        path.rename(path.with_name(path.name.replace("Ungood_", "Miller_Ann_")))
    lists = data / "Brain_AD/fewshot_seed/my2-shot.txt"
    lists.write_text(lists.read_text().replace("Ungood_", "Miller_Ann_"))
    train = command("train.py", *home.train(tmp_path, data), "--anonymous", "--out_json", tmp_path / "train.json")
    fine(train)
    results = ["--out_json", tmp_path / "test.json", "--figures", tmp_path / "figures", "--report", tmp_path / "page"]
    ckpt = ["--ckpt", tmp_path / "ckpt/Brain.pth"]
    test = command("test.py", *home.flags(data), *ckpt, "--anonymous", *results)
    fine(test)
    images = data / UNGOOD / "img"
    flags = [*ckpt, "--device", "cpu", "--anonymous", "--report", tmp_path / "out/page", "--out", tmp_path / "out"]
    fine(command("predict.py", *flags, images))
    run = [f"runs/one/{name}" for name in ("index.html", "result.json", "best.pth")]
    for name in ("ckpt", "train.json", "test.json", "figures", "page", "out", *run):
        path = tmp_path / name
        assert b"Miller" not in (contents(path) if path.is_dir() else path.read_bytes()), name
    assert "Miller" not in train.stdout + train.stderr + test.stdout + test.stderr
    assert "--anonymous" in "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))


def test_the_shots_patients_are_left_out_or_said_to_be_unknown(command, home, tmp_path):
    """Whichever of train.py and test.py is anonymous; --patient and --mask_above of the training hold in the test."""
    data = home.copy_data(tmp_path)
    for path in sorted((data / "Brain_AD").rglob("*_000*.png")):  # of a patient two in valid, and one in test
        kind, number = ("a" if "Ungood" in path.name else "n"), int(path.stem[-2:])
        path.rename(path.with_name(f"{kind}{number // (2 if 'valid' in path.name else 1)}x{number}.png"))
    shutil.rmtree(data / "Brain_AD/fewshot_seed")
    own = ["--patient", r"([an]\d)x", "--mask_above", 0]
    results = {}
    for training, testing in (([], []), ([], ["--anonymous"]), (["--anonymous"], [])):
        run = [*home.train(tmp_path, data), "--epoch", 1, "--out_json", tmp_path / "train.json", *own, *training]
        trained = fine(command("train.py", *run))
        flags = [*home.flags(data), "--ckpt", tmp_path / "ckpt/Brain.pth", "--out_json", tmp_path / "test.json"]
        results[bool(training), bool(testing)] = (
            fine(command("test.py", *flags, *testing)),
            read_json(tmp_path / "test.json"),
        )
        assert not training or not re.search(r"[an]\dx", trained)
    whole = read_json(tmp_path / "train.json")
    keys = ("pauc", "auc_without_shot_patients", "n_normal_without_shot_patients", "n_abnormal_without_shot_patients")
    for (training, _), (said, result) in results.items():
        assert result["pauc"] == whole["pauc"]
        assert ("not known (trained with --anonymous" in said) == training
        if not training:
            assert [result[key] for key in keys] == [whole[key] for key in keys]
    assert whole["n_normal_without_shot_patients"] < whole["n_normal"]


def test_the_password_in_an_address_is_never_printed(command, home, tmp_path):
    """Of WANDB_BASE_URL, and of `--url`, whatever characters it holds; nor is it in the run's files."""
    address = "http://ann:s3cr@et@127.0.0.1:9"
    env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "1",
           "HOME": str(tmp_path)}  # fmt: skip
    done = command("train.py", *home.train(tmp_path), "--epoch", 1, "--log_images_every", 0, env=env)
    refused(done, "W&B's settings", "WANDB_BASE_URL")
    assert not re.search(r"s3cr|et@127", done.stdout + done.stderr)
    assert b"s3cr" not in contents(tmp_path / "runs")
    for url in (f"{address}/{'0' * 64}/x.pt", f"{address.replace('http', 'ftp')}/x.pt"):
        done = command("CLIP.download", "ViT-B-16", "--url", url, "--out", tmp_path / "x.pt")
        assert done.returncode == 2
        assert not re.search(r"s3cr|et@127", done.stdout + done.stderr), done.stderr


# A step, the scoring and the pass through the tower need more memory than there is.
NO_MEMORY = """
import torch
def none(*_, **__):
    raise {error}
import {module}
{module}.{name} = none
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')", "CUDA out of memory"),
     ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes')", "DefaultCPUAllocator"),
     ("MemoryError()", "MemoryError")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("module", "name"),
    [("engine.training", "TrainingState.step"), ("engine.detector", "Detector.patch_scores"),
     ("engine.features", "TokenStore._tokens")],
)  # fmt: skip
def test_too_little_memory_is_one_line(command, home, tmp_path, error, words, module, name):
    script = driver(tmp_path, NO_MEMORY.format(error=error, module=module, name=name))
    done = command(script, "train.py", *home.train(tmp_path))
    refused(done, f"out of memory ({error.partition('(')[0].rpartition('.')[2]}", words, "smaller --batch_size")
