"""train.py and test.py with their defaults against the results of the published programs on the same files."""

import json

import numpy as np
import pytest
import torch

import test as test_script
import train
from engine.detector import Detector
from tests.conftest import TINY_SIZE, load_golden, tiny_state
from tests.helpers.weights import save_torchscript


@pytest.fixture
def folder(golden, golden_json, tmp_path, monkeypatch):
    """The stored PNG files as Brain (with masks) and Chest (the same images without masks), and the tiny weights."""
    data = golden("e2e")
    assert sorted(data["file_names"].tolist()) == sorted(key[6:] for key in data if key.startswith("files/"))
    for obj in ("Brain", "Chest"):
        for name in data["file_names"].tolist():
            if obj == "Brain" or "anomaly_mask" not in name:
                path = tmp_path / f"{obj}_AD" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data[f"files/{name}"].tobytes())
        seeds = tmp_path / f"{obj}_AD" / "fewshot_seed"
        seeds.mkdir()
        (seeds / "my2-shot.txt").write_text(golden_json("e2e")["few_shot_list"])
    save_torchscript(tiny_state(), tmp_path / "clip.pt")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def golden_parts() -> dict[str, dict[str, torch.Tensor]]:
    """The initial adapters and contexts of the published program."""
    parts = {
        f"{branch}_det_adapters": {
            key.rsplit("/", 1)[1]: torch.from_numpy(value)
            for key, value in load_golden("adapters").items()
            if key.startswith(f"MFCFC/{branch}_det_adapters/") and key.rsplit("/", 1)[1][0] in "01"
        }
        for branch in ("normal", "abnormal")
    }
    for branch in ("normal", "abnormal"):
        parts[f"prompt_maker_{branch}"] = {
            key.removeprefix("ctx/"): torch.from_numpy(value)
            for key, value in load_golden("prompts").items()
            if key.startswith(f"ctx/prompt_learner.ctx.{branch}")
        }
    return parts


@pytest.mark.equality
@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_six_epochs_and_test_py_equal_the_published_programs(golden, golden_json, folder, monkeypatch, obj):
    data, published = golden("e2e"), golden_json("e2e")["options"]
    started = []

    def golden_start(*arguments: object) -> Detector:
        detector = Detector(*arguments)
        detector.load_parts(golden_parts())
        started.append(detector)
        return detector

    def golden_jitter(*size: int, generator: torch.Generator) -> torch.Tensor:
        assert size == (2, 2)
        return torch.from_numpy(data[f"{obj}/jitter_rand"])

    def flags(*names: str) -> list[str]:
        return [word for name in names for word in (f"--{name}", str(published[name]))]

    places = ["--obj", obj, "--data_path", folder, "--save_path", folder / "ckpt", "--weights", folder / "clip.pt"]
    places += ["--out_json", folder / "result.json", "--cache_dir", folder / "store", "--device", "cpu"]
    model = ["--model_name", "ViT-tiny-14-56", "--features_list", *published["features_list"]]
    model += flags("img_size", "text_mood", "contrast_mood", "dec_type", "loss_type", "visionA")
    run = [*flags("shot", "iterate", "epoch", "batch_size", "learning_rate"), "--run_dir", folder / "runs"]
    run += ["--select", "test"]  # the default for the paper's own data sets
    assert published["img_size"] == TINY_SIZE
    with monkeypatch.context() as patch:
        patch.setattr(train, "Detector", golden_start)
        patch.setattr(torch, "rand", golden_jitter)
        result = train.train(train.parse(list(map(str, [*places, *model, *run, "--exp_name", "golden"]))))
    assert len(started) == 1

    epochs = [json.loads(line) for line in (folder / "runs/golden/metrics.jsonl").read_text().splitlines()]
    tolerance = 2e-4 if obj == "Brain" else 1e-5  # rounding decides 4 soft mask values, so near are they to 0.5
    np.testing.assert_allclose([epoch["total"] for epoch in epochs], data[f"{obj}/loss"], atol=tolerance, rtol=0)
    assert [epoch["auc"] for epoch in epochs] == pytest.approx(data[f"{obj}/AUC"].tolist(), abs=1e-6)
    pauc = [epoch["auc"] if obj == "Chest" else epoch["pauc"] for epoch in epochs]
    np.testing.assert_allclose(pauc, data[f"{obj}/pAUC"], atol=1e-4, rtol=0)
    np.testing.assert_allclose([e["similarity"] for e in epochs], data[f"{obj}/sim_texts"], atol=1e-4, rtol=0)
    assert [e["epoch"] - 1 for e in epochs if e["best"]] == data[f"{obj}/best_epochs"].tolist()
    assert result["selected_epoch"] == int(data[f"{obj}/best_epochs"][-1]) + 1
    assert ("pixel_value" in result["decision"]) == (obj == "Brain")

    # The checkpoint, and test.py on it.
    checkpoint = torch.load(folder / "ckpt" / f"{obj}.pth", weights_only=True)
    shapes = golden_json("e2e")["checkpoint_keys_and_shapes"]
    assert set(checkpoint) - {"format", "settings", "about"} == set(shapes)
    for part in shapes:
        for name, tensor in checkpoint[part].items():
            assert list(tensor.shape) == shapes[part][name]
            if part.endswith("adapters"):
                norm = float(data[f"{obj}/checkpoint_norm/{part}/{name}"])
                assert float(tensor.norm()) == pytest.approx(norm, rel=1e-4)
    batch = ["--batch_size", published["test_batch_size_in_test_py"], "--shot", published["shot"]]
    tested = test_script.test(test_script.parse(list(map(str, [*places, *batch]))))
    total, auc, pixel_auc, similarity = data[f"{obj}/test_py"].tolist()
    assert tested["auc"] == pytest.approx(auc, abs=1e-6)
    assert (tested["auc"] if obj == "Chest" else tested["pauc"]) == pytest.approx(pixel_auc, abs=1e-4)
    assert tested["auc"] + (tested["pauc"] or 0) == pytest.approx(total, abs=1e-4)
    assert epochs[result["selected_epoch"] - 1]["similarity"] == pytest.approx(similarity, abs=1e-4)
    assert (tested["auc"], tested["pauc"]) == (result["auc"], result["pauc"])
