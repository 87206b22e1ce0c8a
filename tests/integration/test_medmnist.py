"""From a MedMNIST archive to a result, as a user types it."""

from __future__ import annotations

import json

from tests.unit.test_medmnist import write_npz


def test_converted_trained_and_tested(command, tmp_path):
    write_npz(tmp_path / "breastmnist.npz")
    data = ["--data_path", tmp_path / "data"]
    written = command("dataset.medmnist", "breastmnist", "--npz", tmp_path / "breastmnist.npz", "--out", data[1])
    assert written.returncode == 0, written.stderr
    assert "test 6 normal, 6 abnormal" in written.stdout
    checked = command("dataset.check", "--obj", "breastmnist", *data)
    assert checked.returncode == 0, checked.stdout
    paths = [*data, "--save_path", tmp_path / "ckpt", "--cache", "ram", "--device", "cpu"]
    model = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", "42"]
    trained = command("train.py", "--obj", "breastmnist", "--shot", 4, "--epoch", 1, *model, *paths)
    assert trained.returncode == 0, trained.stderr
    assert "breastmnist_AD/fewshot_seed/my4-shot.txt" in trained.stdout
    tested = command("test.py", "--obj", "breastmnist", *paths, "--out_json", tmp_path / "result.json")
    assert tested.returncode == 0, tested.stderr
    assert 0 <= json.loads((tmp_path / "result.json").read_text())["auc"] <= 1
    refused = command("dataset.medmnist", "tissuemnist", *["--out", data[1]])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
