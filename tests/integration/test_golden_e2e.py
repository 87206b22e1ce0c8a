"""The whole program against what the published training and test programs gave on the same files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from CLIP.model import WeightsInfo
from dataset import MedicalDataset
from engine.checkpoint import Checkpoint
from engine.detector import Detector, Settings
from engine.evaluate import evaluate
from engine.features import Backbone, FeatureStore, Item
from engine.training import TrainingSet, TrainingState, fit
from Prompt import text_similarity
from tests.conftest import TINY_SIZE, load_golden, make_tiny_clip


@pytest.fixture
def data_path(golden, golden_json, tmp_path):
    """The stored PNG files as Brain (with masks) and as Chest (the same images without)."""
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
    return tmp_path


@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_six_epochs_and_the_test_program(golden, golden_json, data_path, tmp_path, obj):
    data, options = golden("e2e"), golden_json("e2e")["options"]
    dataset = MedicalDataset.open(obj, data_path)
    shots = dataset.shots(options["shot"], options["shot"], options["iterate"], seed=111)
    clip = make_tiny_clip(False)
    clip.info = WeightsInfo("openai", "golden", "0" * 64)
    settings = Settings(
        obj=obj,
        model_name="ViT-tiny-14-56",
        pretrain="openai",
        fidelity="released",
        img_size=TINY_SIZE,
        features_list=tuple(options["features_list"]),
        prompt_name=dataset.prompt_name,
        pixel_metrics=dataset.pixel_metrics,
        weights_sha256="0" * 64,
        eval_batch=options["test_batch_size_in_test_py"],
        **{name: options[name] for name in ("text_mood", "contrast_mood", "dec_type", "loss_type", "visionA")},
    )
    detector = Detector(clip, settings)
    stored, contexts = load_golden("adapters"), load_golden("prompts")
    parts = {
        f"{branch}_det_adapters": {
            key.rsplit("/", 1)[1]: torch.from_numpy(value)
            for key, value in stored.items()
            if key.startswith(f"MFCFC/{branch}_det_adapters/") and key.rsplit("/", 1)[1][0] in "01"
        }
        for branch in ("normal", "abnormal")
    }
    for kind in ("normal", "abnormal"):
        parts[f"prompt_maker_{kind}"] = {
            key.removeprefix("ctx/"): torch.from_numpy(value)
            for key, value in contexts.items()
            if key.startswith(f"ctx/prompt_learner.ctx.{kind}")
        }
    detector.load_parts(parts)

    store = FeatureStore(Backbone(clip, settings.features_list, False), mode="ram", dtype="float32")
    views = TrainingSet.build(shots, TINY_SIZE, dataset.pixel_metrics, torch.from_numpy(data[f"{obj}/jitter_rand"]))
    test = dataset.samples("test")
    store.prepare([*views.items, *map(Item, test)])
    reports, best_epochs, path = [], [], tmp_path / f"{obj}.pth"

    def on_epoch(report, best):
        reports.append(report)
        if best:
            best_epochs.append(report.epoch)
            Checkpoint(settings, detector.parts(), {"select": "test"}).save(path)

    state = TrainingState.start(detector, None, options["learning_rate"], seed=111)
    fit(state, store, views, test, epochs=options["epoch"], batch_size=options["batch_size"], on_epoch=on_epoch)

    # 4 soft mask values lie within rounding of the threshold: see the goldens' README.
    tolerance = 2e-4 if obj == "Brain" else 1e-5
    np.testing.assert_allclose([float(r.loss.total) for r in reports], data[f"{obj}/loss"], atol=tolerance, rtol=0)
    assert [r.test.auc for r in reports] == pytest.approx(data[f"{obj}/AUC"].tolist(), abs=1e-6)
    pauc = [r.test.auc if r.test.pauc is None else r.test.pauc for r in reports]
    np.testing.assert_allclose(pauc, data[f"{obj}/pAUC"], atol=1e-4, rtol=0)
    np.testing.assert_allclose([r.similarity for r in reports], data[f"{obj}/sim_texts"], atol=1e-4, rtol=0)
    assert best_epochs == data[f"{obj}/best_epochs"].tolist()

    # What the test program reads back.
    checkpoint = Checkpoint.load(path)
    shapes = golden_json("e2e")["checkpoint_keys_and_shapes"]
    for part, tensors in checkpoint.parts.items():
        for name, tensor in tensors.items():
            assert list(tensor.shape) == shapes[part][name]
            if part.endswith("adapters"):
                norm = float(data[f"{obj}/checkpoint_norm/{part}/{name}"])
                assert float(tensor.norm()) == pytest.approx(norm, rel=1e-4)
    fresh = Detector(clip, settings)
    checkpoint.restore(fresh, path)
    found = evaluate(fresh, store, test)
    total, auc, pixel_auc, similarity = data[f"{obj}/test_py"].tolist()
    assert found.auc == pytest.approx(auc, abs=1e-6)
    assert (found.auc if found.pauc is None else found.pauc) == pytest.approx(pixel_auc, abs=1e-4)
    assert found.selection_score == pytest.approx(total, abs=1e-4)
    assert text_similarity(fresh.prompts()) == pytest.approx(similarity, abs=1e-4)
