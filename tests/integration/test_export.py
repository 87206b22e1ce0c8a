"""python -m engine.export: the ONNX file gives the same numbers, through the command and without PyTorch."""

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from CLIP.clip import create_model
from engine.detector import Detector
from engine.export import export
from engine.files.checkpoint import Checkpoint
from engine.predictor import Predictor
from tests.helpers.commands import ROOT, fine, rows
from tests.helpers.data import small_settings
from utils import InputError


def example() -> str:
    """The example of docs/predict.md that needs no PyTorch."""
    text = (ROOT / "docs/predict.md").read_text(encoding="utf-8")
    block = re.search(r"^    import sys\n(?:(?:    .*)?\n)+", text, re.MULTILINE)
    return textwrap.dedent(block[0])


def test_documented_example_gives_the_scores_of_predict_without_torch(command, trained, tmp_path):
    images, ckpt = trained.data / "Brain_AD/test/Ungood/img", trained.ckpt / "Brain.pth"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 9000), np.uint8)).save(tmp_path / "wide.png")
    said = fine(command("engine.export", ckpt, "--out", tmp_path / "brain.onnx", "--check", tmp_path))
    assert "1 images" in said and "0 decisions differ" in said
    card = (tmp_path / "brain.md").read_text()
    assert "Not a medical device" in card and "image AUROC: 0." in card
    out = ["--out", tmp_path / "out", "--no-pictures"]
    fine(command("predict.py", "--ckpt", ckpt, "--device", "cpu", images, *out))
    expected = {row["file"]: row for row in rows(tmp_path / "out")}

    program = "import sys\nsys.modules['torch'] = None  # importing it fails\n" + example()
    paths = sorted(map(str, images.iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(lines) == len(expected) == 7
    for path, score, decision in lines:
        row = next(row for name, row in expected.items() if path.endswith(name))
        assert float(score) == pytest.approx(float(row["score"]), abs=1e-4)
        assert (decision == "abnormal") == (row["abnormal"] == "True")
    assert (tmp_path / "heat-0.png").is_file()


@pytest.mark.parametrize("kind", ["MCNNFC", "MViTFC"])
def test_corrected_fidelity_and_other_adapters(command, trained, tmp_path, kind):
    """--check passes: no score and no pixel differs by more than 1e-4. Half precision can be exported."""
    changes = ["--epoch", 1, "--visionA", kind, "--fidelity", "corrected", "--text_mood", "fix"]
    fine(command("train.py", *trained.flags("Brain", tmp_path), *changes, "--features_list", 1))  # one layer is quick
    ckpt = tmp_path / "ckpt/Brain.pth"
    flags = ["--out", tmp_path / "x.onnx", "--check", trained.data / "Brain_AD/test/good"]
    assert "7 images" in fine(command("engine.export", ckpt, *flags))
    if kind == "MCNNFC":
        said = fine(command("engine.export", ckpt, "--out", tmp_path / "half.onnx", "--precision", "fp16"))
        assert "opset 18, fp16" in said
        check_onnx_metadata(tmp_path / "half.onnx")


def check_onnx_metadata(path):
    import onnxruntime  # noqa: PLC0415 - optional

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["img_size"], about["highest_score"], about["labels"]) == ("42", "1", "normal abnormal")
    assert json.loads(about["settings"])["model_name"] == "ViT-tiny-14-56"
    assert 0 < float(about["threshold"]) < 1 and "not a medical device" in about["note"] and about["licence"]


def test_scores_that_depend_on_the_batch_are_refused(tmp_path):
    settings, clip = small_settings(visionA="MViTFC"), create_model("ViT-tiny-14-56", "random", 42)
    model = Predictor(Checkpoint(settings, {}, {}), Detector(clip, settings), clip, None)
    with pytest.raises(InputError, match="MViTFC"):
        export(model, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
