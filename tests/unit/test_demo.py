"""`make demo`: the images in data/sample, and the closing lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs import demo

SAMPLE = Path(__file__).parents[2] / "data/sample/BreastBUSI_AD"


def test_the_sample_is_small_and_whole():
    counts = {"valid": 12, "test": 40}
    for split, count in counts.items():
        images = {kind: sorted((SAMPLE / split / kind / "img").iterdir()) for kind in ("good", "Ungood")}
        assert [len(paths) for paths in images.values()] == [count, count]
        for path in images["Ungood"]:
            with Image.open(path) as image, Image.open(path.parents[1] / "anomaly_mask" / path.name) as picture:
                assert image.size == picture.size
                mask = np.asarray(picture)
            assert set(np.unique(mask)) == {0, 255}
    assert sum(path.stat().st_size for path in SAMPLE.parent.rglob("*") if path.is_file()) < 3_500_000
    page = (SAMPLE.parent / "README.md").read_text()
    assert all(word in page for word in ("CC BY 4.0", "Al-Dhabyani", "Changes"))


def test_closing_lines(tmp_path, monkeypatch, capsys):
    def figures(auc: float) -> dict:
        return {"auc": auc, "pauc": 0.75, "auc_ci95": [0.5, 1.0], "pauc_ci95": [0.625, 0.875]}

    (tmp_path / "test.json").write_text(json.dumps({**figures(0.9), "n_normal": 3, "n_abnormal": 4}))
    regression = {"baselines": {"logistic regression": figures(0.8)}}
    monkeypatch.setattr(demo, "measure_baselines", lambda options, names: regression)
    demo.main([str(tmp_path), "--shot", "4"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5
    assert "90.0% [50.0%, 100.0%]" in lines[0]
    assert "80.0%" in lines[1]
    assert "75.0% [62.5%, 87.5%]" in lines[1]
    assert "7 images" in lines[4]


@pytest.mark.parametrize("name", ["demo", "demo-offline"])
def test_the_targets_are_there(name):
    assert f"\n{name}:" in (SAMPLE.parents[2] / "Makefile").read_text()
