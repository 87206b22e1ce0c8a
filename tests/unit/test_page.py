"""The report page's text: what stands in it, what is escaped, how large it gets. Browsers: tests/integration."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.medical_few import Sample
from engine.metrics import Metrics, measure
from engine.report import page
from engine.report.page import HEAT, make_card, write_page, write_prediction_page
from tests.helpers.evaluations import (
    METADATA,
    PICTURE,
    SIZE,
    make_evaluation,
    make_samples,
    make_settings,
    make_world,
)
from utils import InputError

EVIL = "<img src=x onerror=alert(1)>\"'&{{title}}</script>.png"
LABELS, SCORES = [1, 0, 0, 1], [0.9, 0.2, 0.1, 0.8]


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def cards_of(html: str) -> dict[str, page.Card]:
    return {card[0]: page.Card(*card) for card in data_of(html)["cards"]}


def written(folder: Path, evaluation, masks, metadata=METADATA, metrics=None, **more: Any) -> str:
    """The page's text."""
    settings = more.pop("settings", make_settings())
    metrics = metrics or measure(evaluation, masks, full=True)
    return write_page(folder, evaluation, masks, metrics, settings, metadata, **more).read_text(encoding="utf-8")


def test_cards_hold_pictures_scores_and_maps(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    evaluation.patch_scores = evaluation.patch_scores + torch.tensor([0.0, 0.3, 0.6, -0.6])  # maps that are not level
    html = written(tmp_path / "page", evaluation, masks)
    cards = cards_of(html)
    assert data_of(html)["scale"] == METADATA["threshold"]["heat_range"]  # as predict.py colours
    assert [cards[name].label for name in evaluation.names] == LABELS
    assert [cards[name].score for name in evaluation.names] == evaluation.image_scores.tolist()
    card = cards["test/00003.png"]
    size = (card.width, card.height)
    assert Image.open(io.BytesIO(base64.b64decode(card.image))).size == size == (page.THUMB, page.THUMB // 2)
    edge = np.asarray(Image.open(io.BytesIO(base64.b64decode(card.outline))).convert("RGBA"))[..., 3] > 0
    assert edge.shape == size[::-1]
    assert edge[5, page.THUMB // 2 - 1]  # the mask's border is in the middle
    assert not edge[50, 20]
    assert not edge[5, page.THUMB // 2 + 1]
    assert cards["test/00002.png"].outline is None  # a normal image
    levels = np.frombuffer(base64.b64decode(card.heat), np.uint8).reshape(HEAT, HEAT)
    pooled = torch.nn.functional.adaptive_avg_pool2d(evaluation.maps([3]), HEAT)[0].numpy()
    np.testing.assert_allclose(card.low + levels / 255 * (card.high - card.low), pooled, atol=0.002)


def test_without_a_calibrated_range_the_scale_spans_all_maps(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    maps = evaluation.maps(slice(None))
    assert data_of(written(tmp_path / "page", evaluation, masks, {}))["scale"] == [float(maps.min()), float(maps.max())]


def test_head_says_what_was_measured_and_how(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    metrics = measure(evaluation, masks, full=True)
    metrics = Metrics({**metrics.values, "auc": 0.7, "auc_ci95": [0.61, 0.83]}, metrics.curves)
    html = written(tmp_path / "page", evaluation, masks, {"select": "test", "metrics": {"epoch": 7}}, metrics)
    assert "4 images: 2 normal, 2 abnormal." in html
    assert "Epoch 7: the best of the run on Brain&#x27;s test set" in html
    assert "the published protocol" in html
    assert "so these numbers are optimistic" in html
    assert "0.700<small>95% CI 0.610 to 0.830" in html
    assert '<caption id="origin">the F1-max threshold on this test set: optimistic' in html
    assert "Pixel threshold of the checkpoint" not in html
    own = written(tmp_path / "page", evaluation, masks, {"select": "test"}, settings=make_settings(obj="Mine"))
    assert "the published protocol" not in own  # which has six data sets


def test_the_checkpoints_threshold_is_the_one_of_predict(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    metadata = {**METADATA, "threshold": {**METADATA["threshold"], "value": 0.15}}
    html = written(tmp_path / "page", evaluation, masks, metadata)
    assert '<output id="at" for="threshold">0.1500' in html
    assert "the checkpoint&#x27;s, set for the largest F1 on images of valid/" in html
    assert data_of(html)["threshold"] == 0.15
    assert data_of(html)["range"] == pytest.approx([0.1, 0.9])
    assert '<span data-count="fp">1</span> false positive' in html
    assert '<span data-count="fn">0</span> false negative' in html
    assert '<span data-rate="tp">1.000' in html
    assert '<span data-rate="tn">0.500' in html
    assert "Pixel threshold of the checkpoint, as in predict.py</dt><dd>0.350" in html
    assert "optimistic" not in html
    metadata["threshold"]["value"] = 2.0
    assert data_of(written(tmp_path / "page", evaluation, masks, metadata))["range"][1] == 2.0  # the tick stays inside


def test_numbers_without_the_shots_patients_stand_beside_the_others(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    metrics = measure(evaluation, masks, full=True)
    metrics.values.update({"auc_without_shot_patients": 0.625, "pauc_without_shot_patients": None})
    html = written(tmp_path / "page", evaluation, masks, metrics=metrics)
    assert html.count("without the patients of the shots") == 1
    assert "<small>0.625 without the patients of the shots" in html


def test_a_page_of_another_data_set_without_masks(tmp_path):
    evaluation, _ = make_world(tmp_path, LABELS, SCORES, masks=False)
    html = written(tmp_path / "page", evaluation, None, {"select": "test"}, obj="Liver")
    assert "<h1>Liver</h1>" in html
    assert "The model was trained on Brain; curves" in html
    assert "so these numbers are optimistic" not in html
    assert "weak localisation from the detection heads, not measured" in html
    assert "Pixel AUROC" not in html
    assert all(card.heat and not card.outline for card in cards_of(html).values())


def test_pictures_that_are_not_there_have_a_place_holder(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    evaluation.samples[0].path.unlink()
    cards = cards_of(written(tmp_path / "page", evaluation, masks))
    assert cards["test/00000.png"].image is None
    assert cards["test/00000.png"].heat
    assert cards["test/00000.png"].outline
    assert cards["test/00001.png"].image


def test_names_from_the_data_are_text(tmp_path):
    samples = [Sample(s.path, s.label, s.mask, f"{s.label}{EVIL}") for s in make_samples(tmp_path, [0, 1])]
    metadata = {"select": EVIL, "shots": {"normal": [EVIL]}, "checkpoint": EVIL}
    html = written(tmp_path / "page", make_evaluation(samples, [0.1, 0.9]), None, metadata)
    assert "<img src=x" not in html
    assert html.count("</script>") == 2
    assert set(cards_of(html)) == {sample.name for sample in samples}


def test_a_name_that_is_no_utf8(tmp_path):
    samples = [Sample(s.path, s.label, s.mask, f"{s.label}\udcff.png") for s in make_samples(tmp_path, [0, 1])]
    html = written(tmp_path / "page", make_evaluation(samples, [0.1, 0.9]), None, {"shots": {"normal": ["\udcff"]}})
    assert "\\udcff" in html


def test_nothing_from_a_network(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    html = written(tmp_path / "page", evaluation, masks)
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in html


def test_no_path_host_or_user_is_on_the_page(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    metadata = {
        **METADATA, "host": "secret-host", "device_name": "secret-device", "command": "python secret.py",
        "options": {"data_path": "/home/secret/data", "save_path": "secret/ckpt", "shot": 7},
        "checkpoint": "/home/secret/Brain.pth", "shots_from": "/srv/secret dir/lists/my4.txt, line 1",
        "config": "~/secret/x.json", "windows": "C:\\secret\\y.json", "weights": "ViT.pt",
        "shots": {"normal": ["valid/good/1.png"]},
    }  # fmt: skip
    html = written(
        tmp_path / "page", evaluation, masks, metadata, settings=make_settings(model_name="/opt/secret/m.json")
    )
    for shown in ("Brain.pth", "my4.txt, line 1", "x.json", "y.json", "m.json", "valid/good/1.png", "options.shot"):
        assert shown in html
    assert "secret" not in html.replace("secret dir", "")
    assert str(tmp_path) not in html


def test_of_many_images_the_extremes_of_each_class_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_CARDS", 10)
    labels = [1] * 5 + [0] * 31
    scores = (torch.randperm(36, generator=torch.Generator().manual_seed(0)) / 40 + 0.05).tolist()
    evaluation, masks = make_world(tmp_path, labels, scores)
    html = written(tmp_path / "page", evaluation, masks)
    assert "The gallery holds 10 of 36 images" in html
    data, kept = data_of(html), cards_of(html)
    assert [len(of_class) for of_class in data["scores"]] == [31, 5]  # all count where the threshold is moved
    assert sum(card.label for card in kept.values()) == 5
    assert len(kept) == 10
    for label in (0, 1):
        order = sorted((i for i in range(36) if labels[i] == label), key=lambda i: scores[i])
        assert {evaluation.names[i] for i in (*order[:2], *order[-2:])} <= kept.keys()


def test_the_smaller_class_leaves_its_room_to_the_larger(monkeypatch):
    monkeypatch.setattr(page, "MAX_CARDS", 10)
    labels = np.array([0] * 20 + [1] * 3)
    kept = page._kept(np.arange(23.0), labels)
    assert sorted(kept) == [0, 1, 2, 16, 17, 18, 19, 20, 21, 22]


def test_pages_of_noise_stay_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (page.THUMB, page.THUMB, 3), np.uint8)
    thumbnail = page._thumbnail(Image.fromarray(noise))
    assert 1000 < len(thumbnail) <= page.THUMB_CHARS
    assert len(page._thumbnail(Image.new("RGB", (page.THUMB, page.THUMB), (50, 60, 70)))) < 1000
    assert page.MAX_CARDS * (page.THUMB_CHARS + 2 * HEAT * HEAT) < 50e6


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    evaluation, masks = make_world(tmp_path / "images", LABELS, SCORES)
    with pytest.raises(InputError, match=r"^--report"):
        written(tmp_path / "file" / "folder", evaluation, masks)


# --- predictions ---


def predictions(count: int, group: str | None = None) -> list[page.Card]:
    heat = np.linspace(0, 2, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    picture = Image.new("RGB", PICTURE, (90, 90, 90))
    return [make_card(f"{group}{i}.png", i / 10, picture, heat, group=group) for i in range(count)]


def test_predictions_share_the_page(tmp_path):
    rows = [*predictions(3), *predictions(2, "head.nii"), make_card("none.png", 0.05, None, None)]
    path = write_prediction_page(
        tmp_path, rows, title=EVIL, threshold=0.15, origin="the checkpoint's", heat_range=(0.5, 1.5),
        metadata={"checkpoint": "/home/secret/Brain.pth", "host": "secret"},
    )  # fmt: skip
    html = path.read_text(encoding="utf-8")
    data, cards = data_of(html), cards_of(html)
    assert (data["labelled"], data["sort"], data["scale"], data["threshold"]) == (False, "score", [0.5, 1.5], 0.15)
    assert data["scores"] == [[0.0, 0.1, 0.2, 0.0, 0.1, 0.05]]
    assert cards["head.nii1.png"].group == "head.nii"
    assert (cards["none.png"].image, cards["none.png"].heat, cards["none.png"].label) == (None, None, None)
    assert (cards["None0.png"].width, cards["None0.png"].height) == PICTURE
    assert (cards["None0.png"].low, cards["None0.png"].high) == pytest.approx((0, 2), abs=0.05)
    assert "6 images, 2 of them slices" in html
    assert '<span data-count="p">1</span> of 6 images abnormal' in html
    assert "Brain.pth" in html
    assert "secret" not in html
    assert "<img src=x" not in html
    assert not re.findall(r"\{\{(?!title\}\}&lt;)", html)


def test_predictions_without_a_threshold_and_without_maps(tmp_path):
    rows = [make_card("a.png", 0.3, Image.new("RGB", (9, 9)), None)]
    path = write_prediction_page(
        tmp_path, rows, title="Chest", threshold=None, origin="none", heat_range=(0, 2), weak=True
    )
    html = path.read_text(encoding="utf-8")
    assert data_of(html)["threshold"] is None
    assert '<body class="plain">' in html
    assert "weak localisation" in html


def test_of_many_predictions_the_highest_scores_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_CARDS", 3)
    path = write_prediction_page(tmp_path, predictions(8), title="a", threshold=0.5, origin="b", heat_range=(0, 2))
    html = path.read_text(encoding="utf-8")
    assert list(cards_of(html)) == ["None5.png", "None6.png", "None7.png"]
    assert "The gallery holds the 3 highest scores of 8 images." in html
    assert '<span data-count="p">3</span> of 8' in html
