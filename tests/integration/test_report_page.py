"""The page in a real browser, and as `test.py --report` writes it.

The address holds the view (#filter=fp&sort=score&threshold=1), so headless Chromium prints the page as a visitor would
see it.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.metrics import measure
from engine.report.page import make_card, write, write_page
from tests.helpers.data import SMALL
from tests.helpers.evaluations import METADATA, make_settings, make_world

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
EVIL = "a\"'><img src=x onerror=document.title='owned'>&.png"
VERDICTS = {"tp": "abnormal, found", "tn": "normal, right", "fp": "false alarm", "fn": "missed"}
ORDERS = {
    "worst": lambda row: (-row["wrong"], row["file"]),
    "score": lambda row: (-row["score"], row["file"]),
    "low": lambda row: (row["score"], row["file"]),
    "file": lambda row: row["file"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A page of 28 images, one of which has a name that is HTML; and its images with their verdicts at 0.4."""
    folder = tmp_path_factory.mktemp("world")
    labels = [i % 2 for i in range(28)]
    scores = np.random.default_rng(0).random(28) * 0.7 + 0.15 * np.array(labels)
    evaluation, masks = make_world(folder, labels, scores.tolist())
    evaluation.patch_scores = evaluation.patch_scores + torch.tensor([1, 0.3, 0, -2])  # maps that are not level
    evaluation.samples[3] = replace(evaluation.samples[3], name=EVIL)
    page = write_page(folder, evaluation, masks, measure(evaluation, masks, full=True), make_settings(), METADATA)
    return page, verdicts(evaluation.names, labels, evaluation.image_scores, 0.4)


def verdicts(names: list[str], labels: list[int], scores: np.ndarray, threshold: float) -> list[dict]:
    """Each image, what the threshold makes of it, and how wrong that is."""
    rows = [{"file": n, "label": y, "score": s} for n, y, s in zip(names, labels, scores.tolist(), strict=True)]
    for row in rows:
        row["kind"] = ("t" if (row["score"] >= threshold) == row["label"] else "f") + "np"[row["score"] >= threshold]
        row["wrong"] = (threshold - row["score"]) * (1 if row["label"] else -1)
    return rows


def chromium(page: Path, profile: Path, *flags: str, view: str = "") -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *flags,
               "--virtual-time-budget=5000", "--enable-logging=stderr", f"{page.as_uri()}{view}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # no error of JavaScript
    return done


def browse(page: Path, view: str, profile: Path) -> str:
    """The page's DOM in Chromium, after its script has run."""
    return chromium(page, profile, "--dump-dom", view=view).stdout


def cards(dom: str) -> list[tuple[str, str]]:
    """File and verdict of each card, in the order of the page."""
    shown = dom[dom.index('<ol id="cards">') : dom.index("<dialog")]
    found = re.findall(r'<li class="card[^>]* data-name="(.*?)".*?<span class="verdict">(.*?)</span>', shown, re.DOTALL)
    return [(html.unescape(file), verdict) for file, verdict in found]


@needs_browser
def test_gallery_sorts(world, tmp_path):
    page, rows = world
    for sort, order in ORDERS.items():
        expected = [(row["file"], VERDICTS[row["kind"]]) for row in sorted(rows, key=order)]
        dom = browse(page, f"#sort={sort}", tmp_path)
        assert cards(dom) == expected, sort
    assert "<title>Brain" in dom  # the name that is HTML was not run
    assert cards(browse(page, "#filter=toString&sort=<b>", tmp_path)) == cards(browse(page, "", tmp_path))


@needs_browser
def test_gallery_filters_and_the_threshold_moves_decisions_and_counts(world, tmp_path):
    page, rows = world
    for kind in ("fp", "fn", "normal", "abnormal"):
        label = {"normal": 0, "abnormal": 1}
        kept = [row["file"] for row in rows if (row["label"] == label[kind] if kind in label else row["kind"] == kind)]
        dom = browse(page, f"#filter={kind}&sort=file", tmp_path)
        assert kept
        assert [file for file, _ in cards(dom)] == sorted(kept)
        assert re.search(rf'value="{kind}" aria-pressed="true">[^<]*\({len(kept)}\)', dom)
    names, labels, scores = ([row[key] for row in rows] for key in ("file", "label", "score"))
    threshold = sorted(scores)[20]
    moved = verdicts(names, labels, np.array(scores), threshold)
    dom = browse(page, f"#filter=fp&threshold={threshold}", tmp_path)
    assert {file for file, _ in cards(dom)} == {row["file"] for row in moved if row["kind"] == "fp"}
    for kind in VERDICTS:
        assert f'data-count="{kind}">{sum(row["kind"] == kind for row in moved)}<' in dom


@needs_browser
def test_predictions_in_a_browser(tmp_path):
    """Highest scores first, slices of a volume as one strip, decisions that follow the threshold."""
    picture, heat = Image.new("RGB", (64, 32), (90, 90, 90)), np.linspace(0, 2, 64).reshape(8, 8)
    entries = [make_card(f"slice {i}", 0.1 * i, picture, heat, (0, 2), group="head.nii") for i in range(5)]
    entries += [make_card(f"{i}.png", 0.1 * i, picture, heat, (0, 2)) for i in (1, 6, 3)]
    page = write(
        tmp_path, "predictions.html", entries, scores=[np.array([card.score for card in entries])], threshold=0.35,
        heat_range=(0, 2), kind="", title="Brain", lead=[], notes=[], origin="", weak=False, made={}, above=3,
    )  # fmt: skip
    order = ["6.png", *(f"slice {i}" for i in range(5)), "3.png", "1.png"]
    words = ["abnormal", *["normal"] * 4, "abnormal", "normal", "normal"]
    assert cards(browse(page, "", tmp_path / "profile")) == list(zip(order, words, strict=True))
    moved = browse(page, "#threshold=0.25&filter=p", tmp_path / "profile")
    assert [file for file, _ in cards(moved)] == order[:-1]
    assert '<span data-count="p">4</span>' in moved


@needs_browser
def test_a_click_enlarges_a_picture(world, tmp_path):
    page, _ = world
    script = "document.querySelectorAll('.tile')[1].click(); document.getElementById('next').click();"
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))
    dom = browse(clicked, "", tmp_path / "profile")
    viewer = dom[dom.index("<dialog") : dom.index("</dialog>")]
    assert viewer.startswith('<dialog id="viewer" open')
    assert viewer.count('class="tile"') == 2  # alone, and with its heat map
    assert viewer.count('class="heat"') == 1
    assert html.escape(cards(dom)[2][0], quote=False) in viewer


@needs_browser
def test_print_and_phone_hold_every_image_in_its_colours(world, tmp_path):
    page, _ = world
    chromium(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().count(b"/Subtype /Image") >= 2 * 28  # a picture and a heat map each
    chromium(page, tmp_path, "--hide-scrollbars", "--window-size=500,9000", f"--screenshot={tmp_path / 'page.png'}")
    shown = Image.open(tmp_path / "page.png").convert("RGB").crop((0, 3000, 500, 9000))
    assert sum(count for count, (r, g, _) in shown.getcolors(1 << 22) if r > g + 25) > 3_000  # red and orange


def test_kept_scores_give_the_same_page_without_network_or_data(command, phantoms, tmp_path):
    flags = ["--obj", "Brain", "--data_path", phantoms]
    paths = ["--save_path", tmp_path, "--run_dir", tmp_path / "runs", "--exp_name", "one"]
    command("train.py", *SMALL, *flags, *paths, "--shot", 1, "--epoch", 2)
    outputs = ["--report", tmp_path / "page", "--figures", tmp_path / "figures", "--save_scores", tmp_path / "s.npz"]
    done = command("test.py", *flags, "--ckpt", tmp_path / "runs/one/best.pth", "--device", "cpu", *outputs)
    assert done.returncode == 0, done.stderr
    names = {"Brain", *(f"Brain-{name}" for name in ("histogram", "roc", "pr", "auc", "losses", "similarity"))}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == names  # the history lay beside the checkpoint
    page = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    for data, folder in ((phantoms, "again"), (tmp_path / "nowhere", "bare")):
        kept = ["--scores", tmp_path / "s.npz", "--data_path", data, "--report", tmp_path / folder]
        done = command("test.py", "--obj", "Brain", *kept)
        assert done.returncode == 0, done.stderr
    again, bare = ((tmp_path / name / "index.html").read_text(encoding="utf-8") for name in ("again", "bare"))
    cut = re.compile(r'<div class="figures">.*?<section aria-labelledby="images">', re.DOTALL)  # the run's: not kept
    assert cut.sub("", again) == cut.sub("", page)
    assert bare.count('<span class="missing">') == bare.count('class="heat"') == page.count('class="heat"')
