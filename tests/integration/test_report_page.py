"""The report page in a real browser.

The URL sets the view (#filter=fp&sort=score&threshold=1), so headless Chromium prints the page as a visitor would see
it.
"""

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.metrics import measure
from engine.report.figures import plots
from engine.report.page import write_page
from tests.helpers.data import small_settings
from tests.helpers.evaluations import METADATA, make_world

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
EVIL = "a\"'><img src=x onerror=document.title='owned'>&.png"
VERDICTS = {"tp": "abnormal, found", "tn": "normal, right", "fp": "false alarm", "fn": "missed"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A page of 28 images, one with HTML as its name, and the verdicts on its images at threshold 0.4."""
    folder = tmp_path_factory.mktemp("world")
    labels = [i % 2 for i in range(28)]
    scores = np.random.default_rng(0).random(28) * 0.7 + 0.15 * np.array(labels)
    evaluation, masks = make_world(folder, labels, scores.tolist())
    evaluation.patch_scores = evaluation.patch_scores + torch.tensor([1, 0.3, 0, -2])  # maps that are not constant
    evaluation.samples[3] = replace(evaluation.samples[3], name=EVIL)
    metrics = measure(evaluation, masks, full=True)
    figures = plots(evaluation, metrics, METADATA)
    page = write_page(folder, evaluation, masks, metrics, small_settings(), METADATA, figures)
    return page, verdicts(evaluation.names, labels, evaluation.image_scores, 0.4)


def verdicts(names: list[str], labels: list[int], scores: np.ndarray, threshold: float) -> list[dict]:
    """File, label, score, verdict at the threshold (tp, tn, fp, fn) and size of the error of each image."""
    rows = [{"file": n, "label": y, "score": s} for n, y, s in zip(names, labels, scores.tolist(), strict=True)]
    for row in rows:
        row["kind"] = ("t" if (row["score"] >= threshold) == row["label"] else "f") + "np"[row["score"] >= threshold]
        row["wrong"] = (threshold - row["score"]) * (1 if row["label"] else -1)
    return rows


def browse(page: Path, view: str, profile: Path) -> str:
    """The page's DOM in Chromium, after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom",
               "--virtual-time-budget=5000", "--enable-logging=stderr", f"{page.as_uri()}{view}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # no JavaScript error
    return done.stdout


def cards(dom: str) -> list[tuple[str, str]]:
    """File and verdict of each card, in page order."""
    shown = dom[dom.index('<ol id="cards">') : dom.index("<dialog")]
    found = re.findall(r'<li class="card[^>]* data-name="(.*?)".*?<span class="verdict">(.*?)</span>', shown, re.DOTALL)
    return [(html.unescape(file), verdict) for file, verdict in found]


@needs_browser
def test_gallery_sorts(world, tmp_path):
    """Cards are sorted by file, or by the size of the error, also if the URL holds an unknown order."""
    page, rows = world
    for view, order in (("#sort=file", lambda row: row["file"]),
                        ("#filter=toString&sort=<b>", lambda row: (-row["wrong"], row["file"]))):  # fmt: skip
        dom = browse(page, view, tmp_path)
        assert cards(dom) == [(row["file"], VERDICTS[row["kind"]]) for row in sorted(rows, key=order)]
    assert "<title>Brain" in dom  # the HTML in the name was not executed


@needs_browser
def test_filter_and_threshold_change_cards_and_counts(world, tmp_path):
    page, rows = world
    names, labels, scores = ([row[key] for row in rows] for key in ("file", "label", "score"))
    threshold = sorted(scores)[20]
    moved = verdicts(names, labels, np.array(scores), threshold)
    dom = browse(page, f"#filter=fp&threshold={threshold}", tmp_path)
    assert {file for file, _ in cards(dom)} == {row["file"] for row in moved if row["kind"] == "fp"}
    for kind in VERDICTS:
        assert f'data-count="{kind}">{sum(row["kind"] == kind for row in moved)}<' in dom


@needs_browser
def test_click_enlarges_an_image(world, tmp_path):
    page, _ = world
    script = "document.querySelectorAll('.tile')[1].click(); document.getElementById('next').click();"
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))
    dom = browse(clicked, "", tmp_path / "profile")
    viewer = dom[dom.index("<dialog") : dom.index("</dialog>")]
    assert viewer.startswith('<dialog id="viewer" open')
    assert viewer.count('class="tile"') == 2  # the image alone, and with its heat map
    assert viewer.count('class="heat"') == 1
    assert html.escape(cards(dom)[2][0], quote=False) in viewer
