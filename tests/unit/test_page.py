"""The HTML pages: cards, counts, figures and escaping. tests/integration/test_report_page.py uses a browser."""

import base64
import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.readers.images import Sample
from engine.metrics import measure
from engine.report import page
from engine.report.figures import plots
from engine.report.page import layers, write, write_page
from tests.helpers.data import small_settings
from tests.helpers.evaluations import METADATA, PICTURE, SIZE, make_evaluation, make_samples, make_world

EVIL = "<img src=x onerror=alert(1)>\"'&{{title}}</script>.png"
LABELS, SCORES = [1, 0, 0, 1], [0.9, 0.2, 0.1, 0.8]


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def names_of(html: str) -> list[str]:
    """Names of the cards, in their order in the file."""
    return [unescape(name) for name in re.findall(r'<li class="card" data-name="(.*?)"', html)]


def written(folder: Path, evaluation, masks, metadata=METADATA, metrics=None, **more: Any) -> str:
    """Write a page; return its HTML."""
    settings = more.pop("settings", small_settings())
    metrics = metrics or measure(evaluation, masks, full=True)
    figures = plots(evaluation, metrics, metadata)
    return write_page(folder, evaluation, masks, metrics, settings, metadata, figures, **more).read_text("utf-8")


def picture_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_a_card_holds_picture_heat_map_and_outline():
    heat = np.linspace(0, 2, 28 * 28, dtype=np.float32).reshape(28, 28)
    mask = np.zeros((28, 28), bool)
    mask[:, :14] = True
    card = layers(Image.new("RGB", (960, 480), (90, 90, 90)), heat, (0.5, 1.5), mask)
    size = (card["width"], card["height"])
    assert picture_of(card["picture"]).size == size == (page.SIDE, page.SIDE // 2)
    alpha = np.asarray(picture_of(card["heat"]).convert("RGBA"))[..., 3]
    assert alpha[0, 0] == 0 < alpha[page.HEAT // 2, 0] < alpha[-1, -1] < 255  # the anatomy stays visible
    edge = np.asarray(picture_of(card["outline"]).convert("RGBA"))[..., 3] > 0
    assert edge.shape == size[::-1]
    assert edge[120, page.SIDE // 2 - 1] and not edge[120, 100]


def test_the_worst_errors_come_first_and_all_images_count(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_CARDS", 3)
    evaluation, masks = make_world(tmp_path, [1, 0, 0, 1, 1], [0.9, 0.7, 0.1, 0.1, 0.3])
    html = written(tmp_path / "page", evaluation, masks)  # METADATA has the threshold 0.4
    data = data_of(html)
    assert names_of(html)[:2] in (["test/00003.png", "test/00001.png"], ["test/00001.png", "test/00003.png"])
    assert names_of(html)[2] == "test/00004.png"
    assert data["labelled"]
    assert data["threshold"] == 0.4
    assert data["scores"] == [pytest.approx([0.7, 0.1]), pytest.approx([0.9, 0.1, 0.3])]
    counts = dict(re.findall(r'data-count="(\w+)">(\d+)<', html))
    assert counts == {"tp": "1", "fn": "2", "tn": "1", "fp": "1"}


def test_names_from_the_data_are_escaped(tmp_path):
    samples = [Sample(s.path, s.label, s.masks, f"{s.label}{EVIL}") for s in make_samples(tmp_path, [0, 1])]
    metadata = {"select": EVIL, "shots": {"normal": [EVIL, "\udcff"]}, "run": EVIL}  # the surrogate is not valid UTF-8
    html = written(tmp_path / "page", make_evaluation(samples, [0.1, 0.9]), None, metadata)
    assert "<img src=x" not in html
    assert html.count("</script>") == 2
    assert set(names_of(html)) == {sample.name for sample in samples}


def test_page_has_no_urls_and_no_local_paths(tmp_path):
    evaluation, masks = make_world(tmp_path, LABELS, SCORES)
    options = {"data_path": "/home/secret/data", "save_path": "secret/ckpt", "shot": 7}
    html = written(tmp_path / "page", evaluation, masks, {**METADATA, "options": options})
    assert "default-src 'none'" in html
    assert not re.findall(r"https?://", html)
    assert "secret" not in html
    assert str(tmp_path) not in html


def test_page_of_predictions(tmp_path):
    heat = np.linspace(0, 2, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    picture = Image.new("RGB", PICTURE, (90, 90, 90))
    of_image = {"label": None, "group": None, **layers(picture, heat, (0, 2))}
    cards = [{**of_image, "name": f"{i}.png", "score": i / 10} for i in range(3)]
    cards += [{**of_image, "name": f"s{i}", "score": i / 10, "group": EVIL} for i in range(2)]
    made = {"a": {"b": [1, 0.5], "none": None}, "model_config": {"width": 1}}
    values = {"title": EVIL, "counts": "0 of 5 images abnormal", "origin": "o", "weak": False, "made": made}
    path = write(
        tmp_path, "predictions.html", cards, scores=[np.array([c["score"] for c in cards])], threshold=None,
        heat_range=(0, 2), **values,
    )  # fmt: skip
    html = path.read_text(encoding="utf-8")
    data = data_of(html)
    assert (data["labelled"], data["threshold"]) == (False, None)
    assert data["scores"] == [[0.0, 0.1, 0.2, 0.0, 0.1], []]
    assert names_of(html) == ["0.png", "1.png", "2.png", "s0", "s1"]
    assert html.count('<li class="group"') == 1
    assert re.findall(r"<dt>(.*?)</dt>", html) == ["a.b"]
    assert "<img src=x" not in html
    empty = write(tmp_path, "predictions.html", [], scores=[np.zeros(0)], threshold=0.5, heat_range=(0, 2), **values)
    assert data_of(empty.read_text(encoding="utf-8"))["scores"] == [[], []]
