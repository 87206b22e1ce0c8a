"""engine/compare.py: differences between runs on the same images, and results that cannot be compared."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from engine.compare import auc_difference, compare, main, rate, read
from engine.metrics import Metrics, auroc_interval, kind_metrics
from utils import InputError


def scores_of(seed: int, images: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 3 // 2
    shared = rng.standard_normal(images) + labels
    return labels, shared + 0.3 * rng.standard_normal(images), shared + 0.8 * rng.standard_normal(images)


def write(path: Path, labels: np.ndarray, scores: np.ndarray, **values: object) -> Path:
    pairs = zip(labels.tolist(), scores.tolist(), strict=True)
    rows = [{"file": f"{i:03}.png", "label": label, "score": score} for i, (label, score) in enumerate(pairs)]
    auc = {"auc": roc_auc_score(labels, scores), "auc_ci95": auroc_interval(labels, scores)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**auc, "obj": "a", "pauc": None, "settings": {}, "decision": None, "per_image": rows, **values})
    )
    return path


def test_auc_difference_equals_scikit_learn_with_a_paired_interval() -> None:
    labels, one, other = scores_of(0)
    difference, (low, high) = auc_difference(labels, one, other)
    assert difference == pytest.approx(roc_auc_score(labels, other) - roc_auc_score(labels, one), abs=1e-12)
    pairs = [(s[labels == 1][:, None] > s[labels == 0]).astype(float) for s in (one, other)]  # no ties
    parts = [(pairs[1] - pairs[0]).mean(axis=axis) for axis in (1, 0)]
    error = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=1e-5)
    assert auc_difference(labels, one, one) == (0.0, (0.0, 0.0))
    assert auc_difference(np.array([0, 0, 1]), np.arange(3.0), np.array([0, 2, 1.0])) == (-0.5, ())  # 1 abnormal image


def test_rates_have_wilson_intervals() -> None:
    assert rate(np.ones(10, bool)) == (1.0, pytest.approx((0.7225, 1.0), abs=1e-4))
    assert rate(np.arange(20) < 9) == (0.45, pytest.approx((0.2582, 0.6579), abs=1e-4))


def test_comparison_table_in_three_formats(tmp_path: Path, capsys, monkeypatch) -> None:
    labels, one, other = scores_of(0)
    shared = {"decision": {"value": 0.5}, "auc_of_benign": 0.7, "auc_of_benign_ci95": [0.6, 0.8], "n_of_benign": 9}
    write(tmp_path / "a/result.json", labels, one, settings={"visionA": "MFCFC", "img_size": 240}, **shared, seed=1)
    write(tmp_path / "b.json", labels, other, settings={"visionA": "MCNNFC", "img_size": 240}, **shared, seed=2)
    values = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({**values, "per_image": values["per_image"][::-1]}))  # in another order
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b.json"), "--out", str(tmp_path)])
    main()
    table = capsys.readouterr().out
    found = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table.splitlines() if line.startswith("|")}
    for name, place, value in (
        ("image AUC", 0, roc_auc_score(labels, one)),
        ("image AUC, difference", 1, auc_difference(labels, one, other)[0]),
        ("sensitivity at its threshold", 1, (other[labels == 1] >= 0.5).mean()),
        ("specificity at its threshold", 1, (other[labels == 0] < 0.5).mean()),
    ):  # fmt: skip
        assert float(found[name][place]) == pytest.approx(100 * value, abs=0.01)
    assert found["image AUC of benign, 95% interval"] == [" [60.00, 80.00] "] * 2
    assert {"image AUC, 95% interval", "specificity at its threshold, 95% interval"} <= set(found)
    assert "visionA MFCFC / MCNNFC; seed 1 / 2" in table and "img_size" not in table
    assert table.count("Disagreement: ") == 5
    assert all((tmp_path / f"compare{suffix}").is_file() for suffix in (".md", ".csv", ".tex"))


def test_incomparable_results_are_refused(tmp_path: Path) -> None:
    labels, one, other = scores_of(0)
    for others, name in ((labels[:-1], r"059\.png"), (np.append(labels[:-1], 0), r"059\.png")):
        paths = [write(tmp_path / "a.json", labels, one), write(tmp_path / "b.json", others, other[: len(others)])]
        with pytest.raises(InputError, match=name):
            compare([read(path) for path in paths])
    (tmp_path / "b.json").write_text("{}")
    for path in (tmp_path / "b.json", tmp_path / "none"):
        with pytest.raises(InputError):
            read(path)


def test_no_pixel_difference_if_the_order_of_images_differs(tmp_path: Path) -> None:
    labels, one, _ = scores_of(1)
    first = read(write(tmp_path / "a.json", labels, one, pauc=0.9, pauc_draws=[0.9, 0.8]))
    turned = json.loads((tmp_path / "a.json").read_text())
    turned["per_image"].reverse()
    turned["obj"] = "b"
    (tmp_path / "b.json").write_text(json.dumps(turned))
    table = compare([first, read(tmp_path / "b.json")])
    assert not any(metric == "pixel AUC, difference" for metric, _, _ in table.cells)
    assert any("different orders" in note for note in table.notes)
    assert any("a / b" in note for note in table.notes)  # different data sets may have equal file names
    assert not any("Tested on" in note for note in compare([first, first]).notes)


# --- kinds of abnormality ---


def test_metrics_per_kind_of_abnormality() -> None:
    kinds = ["", "", "benign", "malignant", "malignant"]
    evaluation = SimpleNamespace(
        samples=[SimpleNamespace(kind=kind) for kind in kinds], labels=np.array([0, 0, 1, 1, 1]),
        image_scores=np.array([0.1, 0.3, 0.2, 0.4, 0.5]),
    )  # fmt: skip
    found = kind_metrics(evaluation)
    assert (found["auc_of_benign"], found["auc_of_malignant"], found["n_of_malignant"]) == (0.5, 1.0, 2)
    assert "image AUROC of benign: 0.5000" in Metrics({"auc": 0.7, **found}).table()
    evaluation.samples = [SimpleNamespace(kind="Ungood" if kind else "") for kind in kinds]
    assert kind_metrics(evaluation) == {}
