"""The report page's text: what stands in it, what is escaped, how large it gets. Browsers: tests/integration."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import Sample
from engine import page
from engine.detector import Settings
from engine.evaluate import Evaluation
from engine.page import HEAT, Report

SETTINGS = Settings(
    obj="Brain", model_name="ViT-tiny-14-56", pretrain="openai", fidelity="released", img_size=56, features_list=(1, 2),
    visionA="MFCFC", text_mood="fix", contrast_mood="yes", dec_type="mean", loss_type="sigmoid", prompt_name="Brain",
    pixel_metrics=True, weights_sha256="", eval_batch=32,
)  # fmt: skip
EVIL = "<img src=x onerror=alert(1)>\"'&{{obj}}</script>.png"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Ten images of noise, which take the most bytes, and a mask."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (192, 192, 3), np.uint8)).save(folder / f"{i}.png")
    mask = np.zeros((192, 192), np.uint8)
    mask[50:100, 50:100] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def make_samples(files: Path, count: int) -> list[Sample]:
    masks = (None, files / "mask.png")
    return [Sample(files / f"{i % 10}.png", i % 2, masks[i % 2], f"test/{i:05}.png") for i in range(count)]


def evaluation(samples: list[Sample], scores: torch.Tensor) -> Evaluation:
    labels = np.array([sample.label for sample in samples])
    more = {"ap": 0.8, "f1_max": 0.8, "threshold": 0.5, "pixel_ap": 0.1, "auc_ci95": [0.61, 0.83]}
    return Evaluation(0.7, 0.9, [sample.name for sample in samples], labels, scores.double().numpy(), more)


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_cards_hold_pictures_scores_and_maps(files):
    samples = make_samples(files, 4)
    maps = torch.arange(4.0)[:, None, None] + torch.linspace(0, 0.5, 96).expand(4, 96, 96)
    scores = torch.tensor([0.9, 0.2, 0.1, 0.8])
    report = Report(SETTINGS)
    report(samples[:2], scores[:2], maps[:2])
    report(samples[2:], scores[2:], maps[2:])
    html = report.html(evaluation(samples, scores), {"select": "last", "metrics": {"epoch": 7}})
    data = data_of(html)
    assert data["scale"] == [0.0, 3.5]  # over both batches
    cards = {card[0]: card for card in data["cards"]}
    assert [cards[sample.name][1:3] for sample in samples] == [
        [sample.label, pytest.approx(score)] for sample, score in zip(samples, scores.tolist(), strict=True)
    ]
    _, _, _, image, edge, heat, low, high = cards["test/00003.png"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (page.THUMB, page.THUMB)
    line = np.asarray(Image.open(io.BytesIO(base64.b64decode(edge))).convert("RGBA"))[..., 3] > 0
    assert line[50, 50:100].all()
    assert not line[60, 60:90].any()
    levels = np.frombuffer(base64.b64decode(heat), np.uint8).reshape(HEAT, HEAT)
    expected = maps[3].reshape(HEAT, 2, HEAT, 2).mean((1, 3)).numpy()
    np.testing.assert_allclose(low + levels / 255 * (high - low), expected, atol=0.002)
    assert cards["test/00002.png"][4] is None  # a normal image has no outline


def test_head_says_what_was_measured_and_how(files):
    samples = make_samples(files, 4)
    scores = torch.tensor([0.9, 0.2, 0.1, 0.8])
    found = evaluation(samples, scores)
    report = Report(SETTINGS)
    report(samples, scores, torch.rand(4, 56, 56))
    html = report.html(found, {"select": "test", "metrics": {"epoch": 7}})
    assert "4 images: 2 normal, 2 abnormal." in html
    assert "Epoch 7: the best of the run on Brain&#x27;s test set" in html
    assert "so these numbers are optimistic" in html
    assert "95% CI 0.610 to 0.830" in html
    assert "At threshold 0.5000, chosen on this test set" in html
    assert '<a href="#filter=fn">1 false negative</a>' in html
    assert '<a href="#filter=fp">1 false positive</a>' in html

    stored = {"value": 0.15, "rule": "the largest F1", "from": "images of valid/ that are no shots"}
    html = report.html(found, {"select": "valid", "threshold": stored})
    assert "At threshold 0.1500, the checkpoint&#x27;s, set for the largest F1 on images of valid/" in html
    assert data_of(html)["threshold"] == 0.15
    assert data_of(html)["range"] == pytest.approx([0.1, 0.9])
    above = data_of(report.html(found, {"threshold": {**stored, "value": 2.0}}))
    assert above["range"] == pytest.approx([0.1, 2.0])  # the tick stays on the track
    assert '<a href="#filter=fn">0 false negative</a>' in html
    assert "optimistic" not in html
    assert "selected by: unknown (published checkpoint)" in report.html(
        found, {"select": "unknown (published checkpoint)"}
    )


def test_a_page_of_another_data_set(files):
    samples, scores = make_samples(files, 2), torch.tensor([0.1, 0.9])
    report = Report(SETTINGS, "Liver")
    report(samples, scores, None)
    html = report.html(evaluation(samples, scores), {"select": "test"})
    assert "<h1>Liver</h1>" in html
    assert "The model was trained on Brain; curves" in html
    assert "optimistic." not in html
    assert '<body class="plain">' in html  # no maps
    assert data_of(html)["cards"][0][5] is None


def test_names_from_the_data_are_text(files):
    samples = [Sample(files / "0.png", label, None, f"{label}{EVIL}") for label in (0, 1)]
    scores = torch.tensor([0.1, 0.9])
    report = Report(SETTINGS)
    report(samples, scores, None)
    html = report.html(evaluation(samples, scores), {"select": EVIL, "shots": {"normal": [EVIL]}, "checkpoint": EVIL})
    assert "<img src=x" not in html
    assert html.count("</script>") == 2
    assert {card[0] for card in data_of(html)["cards"]} == {sample.name for sample in samples}


def test_a_name_that_is_no_utf8(files, tmp_path):
    samples = [Sample(files / "0.png", label, None, f"{label}\udcff.png") for label in (0, 1)]
    scores = torch.tensor([0.1, 0.9])
    report = Report(SETTINGS)
    report(samples, scores, None)
    written = report.save(tmp_path, evaluation(samples, scores), {"shots": {"normal": ["\udcff"]}})
    assert written == tmp_path / "index.html"
    assert "\\udcff" in written.read_text(encoding="utf-8")


def test_nothing_from_a_network(files):
    samples, scores = make_samples(files, 2), torch.tensor([0.1, 0.9])
    report = Report(SETTINGS)
    report(samples, scores, torch.rand(2, 56, 56))
    html = report.html(evaluation(samples, scores), {})
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in html


def test_two_thousand_images_of_noise_stay_under_50_mb(files, monkeypatch):
    encode = cache(lambda path, mask: page_pictures(Sample(path, 0, mask, "")))
    page_pictures = page._pictures
    monkeypatch.setattr(page, "_pictures", lambda sample: encode(sample.path, sample.mask))
    samples, scores = make_samples(files, 2000), torch.rand(2000)
    report = Report(SETTINGS)
    for i in range(0, 2000, 50):
        report(samples[i : i + 50], scores[i : i + 50], torch.rand(50, 56, 56))
    html = report.html(evaluation(samples, scores), {})
    assert len(data_of(html)["cards"]) == 2000
    assert "The gallery holds" not in html
    assert 20e6 < len(html) < 50e6


def test_of_more_images_the_extremes_of_each_class_are_kept(files, monkeypatch):
    monkeypatch.setattr(page, "KEPT", 9)
    samples = [sample for sample in make_samples(files, 40) if not sample.label or sample.name < "test/00010"]
    scores = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)) / 40
    report = Report(SETTINGS)
    for i in range(0, len(samples), 5):
        report(samples[i : i + 5], scores[i : i + 5], None)
    html = report.html(evaluation(samples, scores), {})
    assert f"The gallery holds 9 of {len(samples)} images" in html
    kept = {card[0]: card[1] for card in data_of(html)["cards"]}
    assert sum(kept.values()) in (4, 5)
    for label in (0, 1):
        order = sorted((i for i in range(len(samples)) if samples[i].label == label), key=lambda i: float(scores[i]))
        assert {samples[i].name for i in (*order[:2], *order[-2:])} <= kept.keys()


def test_quality_falls_only_where_a_picture_is_large(files, tmp_path):
    Image.new("RGB", (192, 192), (50, 60, 70)).save(tmp_path / "plain.png")
    small, _ = page._pictures(Sample(tmp_path / "plain.png", 0, None, ""))
    large, _ = page._pictures(Sample(files / "0.png", 0, None, ""))
    assert len(small) < 1000
    assert len(large) <= page.THUMB_CHARS
