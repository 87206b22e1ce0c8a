"""`test.py --report` and `--figures` as a user starts them; the page in a real browser.

The address holds the view (#filter=fp&sort=score&threshold=1), so headless Chromium prints the page as a visitor would
see it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import phantom
from engine.report.page import make_card, write
from tests.helpers.data import SMALL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
EVIL = "a\"'><img src=x onerror=document.title='owned'>&.png"
VERDICTS = {"tp": "abnormal, found", "tn": "normal, right", "fp": "false alarm", "fn": "missed"}


@pytest.fixture(scope="session")
def folder(once, command) -> Path:
    """Two data sets, checkpoints and runs; one of the test images has a name that is HTML."""

    def make(folder: Path) -> None:
        phantom.write(folder, ["Brain", "Chest"], valid=4, test=14, seed=0, size=64)
        for part in ("img", "anomaly_mask"):
            image = folder / "Brain_AD" / "test" / "Ungood" / part / "test_Ungood_00000.png"
            image.rename(image.with_name(EVIL))
        for obj in ("Brain", "Chest"):
            done = command(
                "train.py", *SMALL, "--obj", obj, "--data_path", folder, "--save_path", folder, "--shot", 2,
                "--epoch", 2, "--run_dir", folder / "runs", "--exp_name", obj,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        write_page(command, folder)

    return once("report", make)


@pytest.fixture
def tested(folder) -> Path:
    """Where the page of Brain, its figures and its JSON are."""
    return folder


def write_page(command, folder: Path) -> None:
    """Write page, figures and JSON of Brain; the threshold leaves false positives and negatives."""
    ckpt = folder / "runs" / "Brain" / "best.pth"  # beside the run's history
    paths = ["--obj", "Brain", "--data_path", folder, "--ckpt", ckpt, "--device", "cpu"]
    command("test.py", *paths, "--out_json", folder / "brain.json")
    scores = sorted(row["score"] for row in json.loads((folder / "brain.json").read_text())["per_image"])
    stored = torch.load(ckpt, weights_only=True)
    stored["about"]["threshold"]["value"] = sum(scores[13:15]) / 2
    torch.save(stored, ckpt)
    done = command(
        "test.py", *paths, "--report", folder / "page", "--figures", folder / "figures", "--out_json",
        folder / "brain.json", "--save_scores", folder / "scores.npz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"report: {folder / 'page' / 'index.html'}" in done.stdout


def browse(page: Path, view: str, profile: Path) -> str:
    """The page's DOM in Chromium, after its script has run."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}{view}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def cards(dom: str) -> list[dict[str, str]]:
    """File, verdict and score of each card, in the order of the page."""
    shown = dom[dom.index('<ol id="cards">') : dom.index("<dialog")]
    found = re.findall(
        r'<li class="card[^>]* data-name="(.*?)".*?<span class="verdict">(.*?)</span><span class="score">(.*?)</span>',
        shown, re.DOTALL,
    )  # fmt: skip
    return [{"file": html.unescape(file), "verdict": verdict, "score": score} for file, verdict, score in found]


def rows(folder: Path) -> list[dict]:
    """The images of the JSON file, with their verdict at the checkpoint's threshold and how wrong they are."""
    result = json.loads((folder / "brain.json").read_text())
    threshold = result["decision"]["value"]
    for row in result["per_image"]:
        says = row["score"] >= threshold
        row["kind"] = ("t" if says == row["label"] else "f") + ("p" if says else "n")
        row["wrong"] = (threshold - row["score"]) * (1 if row["label"] else -1)
    return result["per_image"]


ORDERS = {
    "worst": lambda row: (-row["wrong"], row["file"]),
    "score": lambda row: (-row["score"], row["file"]),
    "low": lambda row: (row["score"], row["file"]),
    "file": lambda row: row["file"],
}


@needs_browser
@pytest.mark.parametrize("sort", ORDERS)
def test_gallery_sorts(tested, tmp_path, sort):
    shown = cards(browse(tested / "page" / "index.html", f"#sort={sort}", tmp_path))
    expected = sorted(rows(tested), key=ORDERS[sort])
    assert [card["file"] for card in shown] == [row["file"] for row in expected]
    assert [card["verdict"] for card in shown] == [VERDICTS[row["kind"]] for row in expected]
    assert [float(card["score"]) for card in shown] == pytest.approx([row["score"] for row in expected], abs=1e-3)


@needs_browser
@pytest.mark.parametrize("kind", ["fp", "fn", "normal", "abnormal"])
def test_gallery_filters(tested, tmp_path, kind):
    dom = browse(tested / "page" / "index.html", f"#filter={kind}&sort=file", tmp_path)
    label = {"normal": 0, "abnormal": 1}
    kept = [row for row in rows(tested) if (row["label"] == label[kind] if kind in label else row["kind"] == kind)]
    assert kept
    assert [card["file"] for card in cards(dom)] == sorted(row["file"] for row in kept)
    assert re.search(rf'value="{kind}" aria-pressed="true">[^<]*\({len(kept)}\)', dom)


@needs_browser
def test_the_threshold_moves_decisions_and_counts(tested, tmp_path):
    found = rows(tested)
    threshold = sorted(row["score"] for row in found)[20]
    dom = browse(tested / "page" / "index.html", f"#filter=fp&sort=file&threshold={threshold}", tmp_path)
    pairs = {"tp": (True, 1), "fn": (False, 1), "tn": (False, 0), "fp": (True, 0)}
    counts = {
        kind: sum((row["score"] >= threshold, row["label"]) == pair for row in found) for kind, pair in pairs.items()
    }
    assert sum(counts.values()) == 28
    for kind, count in counts.items():
        assert f'<span data-count="{kind}">{count}</span>' in dom
    assert [card["file"] for card in cards(dom)] == sorted(
        row["file"] for row in found if not row["label"] and row["score"] >= threshold
    )
    assert {card["verdict"] for card in cards(dom)} <= {"false alarm"}


@needs_browser
def test_print_holds_every_image(tested, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", f"--print-to-pdf={tmp_path / 'page.pdf'}",
        (tested / "page" / "index.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pictures = (tmp_path / "page.pdf").read_bytes().count(b"/Subtype /Image")
    assert pictures >= 2 * 28  # a picture and a heat map each


@needs_browser
def test_predictions_in_a_browser(tmp_path):
    """Highest scores first, slices of a volume as one strip, decisions that follow the threshold."""
    picture = Image.new("RGB", (64, 32), (90, 90, 90))
    heat = torch.linspace(0, 2, 64).reshape(8, 8).numpy()
    entries = [make_card(f"slice {i}", 0.1 * i, picture, heat, (0, 2), group="head.nii") for i in range(5)]
    entries += [make_card(f"{i}.png", 0.1 * i, picture, heat, (0, 2)) for i in (1, 6, 3)]
    page = write(
        tmp_path, "predictions.html", entries, scores=[np.array([card.score for card in entries])], threshold=0.35,
        heat_range=(0, 2), kind="", title="Brain", lead=[], notes=[], origin="", weak=False, made={}, above=3,
    )  # fmt: skip
    order = ["6.png", *(f"slice {i}" for i in range(5)), "3.png", "1.png"]
    shown = cards(browse(page, "", tmp_path / "profile"))
    assert [card["file"] for card in shown] == order
    assert [card["verdict"] for card in shown] == ["abnormal", *["normal"] * 4, "abnormal", "normal", "normal"]
    moved = browse(page, "#threshold=0.25&filter=p", tmp_path / "profile")
    assert [card["file"] for card in cards(moved)] == order[:-1]
    assert '<span data-count="p">4</span>' in moved


@needs_browser
def test_an_unknown_view_is_the_default_one(tested, tmp_path):
    dom = browse(tested / "page" / "index.html", "#filter=toString&sort=<b>", tmp_path)
    expected = sorted(rows(tested), key=ORDERS["worst"])
    assert [card["file"] for card in cards(dom)] == [row["file"] for row in expected]


@needs_browser
def test_names_of_files_are_not_run(tested, tmp_path):
    dom = browse(tested / "page" / "index.html", "#sort=file&filter=abnormal", tmp_path)
    assert "<title>Brain: MadCLIP test report</title>" in dom
    assert f"test/Ungood/img/{EVIL}" in [card["file"] for card in cards(dom)]


@needs_browser
def test_the_page_is_drawn_without_javascript_errors(tested, tmp_path):
    """Heat maps have their colours, at a phone's width."""
    picture = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}",
        "--window-size=390,9000", "--virtual-time-budget=5000", "--enable-logging=stderr", f"--screenshot={picture}",
        (tested / "page" / "index.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    shown = Image.open(picture).convert("RGB").crop((0, 3000, 390, 9000))  # the gallery, below the colour bar
    heat = sum(count for count, (r, g, _) in shown.getcolors(1 << 22) if r > g + 25)  # purple, red and orange
    assert heat > 20_000


def test_page_shows_the_run_and_the_checkpoints_threshold(tested):
    page = (tested / "page" / "index.html").read_text(encoding="utf-8")
    result = json.loads((tested / "brain.json").read_text())
    assert page.count('<figure class="plot">') == 6  # three of the run: its history was found beside the checkpoint
    assert str(tested) not in page
    assert f"{result['auc']:.3f}" in page
    assert json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["threshold"] == result["decision"]["value"]


def test_figures_for_papers(tested):
    names = ("Brain", *(f"Brain-{name}" for name in ("histogram", "roc", "pr", "auc", "losses", "similarity")))
    written = tested / "figures"
    assert {path.name for path in written.iterdir()} == {f"{name}.png" for name in names}
    with Image.open(written / "Brain-roc.png") as picture:
        assert picture.size == (1080, 810)


def test_kept_scores_give_the_same_page_without_network_or_data(tested, command, tmp_path):
    kept = ["--obj", "Brain", "--scores", tested / "scores.npz"]
    done = command(
        "test.py", *kept, "--data_path", tested, "--report", tmp_path / "page", "--figures", tmp_path / "figures"
    )
    assert done.returncode == 0, done.stderr
    with_data, again = ((folder / "page" / "index.html").read_text(encoding="utf-8") for folder in (tested, tmp_path))
    cut = re.compile(r'<div class="figures">.*?<section aria-labelledby="images">', re.DOTALL)  # the run's: not kept
    assert cut.sub("", again) == cut.sub("", with_data)
    for name in ("Brain", "Brain-roc", "Brain-pr", "Brain-histogram"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes() == (tested / "figures" / f"{name}.png").read_bytes()

    done = command("test.py", *kept, "--data_path", tmp_path / "nowhere", "--report", tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    bare = (tmp_path / "bare" / "index.html").read_text(encoding="utf-8")
    assert bare.count('<span class="missing">') == bare.count('class="heat"') == 28


def test_image_only_data_and_a_checkpoint_without_notes(folder, command, tmp_path):
    stored = torch.load(folder / "Chest.pth", weights_only=True)
    for name in ("threshold", "run"):
        stored["about"].pop(name)
    torch.save(stored, tmp_path / "Chest.pth")
    paths = ["--obj", "Chest", "--data_path", folder, "--ckpt", tmp_path / "Chest.pth", "--device", "cpu"]
    done = command("test.py", *paths, "--report", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert page.count('<figure class="plot">') == 3  # no history lies beside this checkpoint
    assert 'class="outline"' not in page


@pytest.mark.parametrize("flag", ["--report", "--figures"])
def test_a_folder_that_cannot_be(folder, command, tmp_path, flag):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "folder"
    done = command("test.py", "--obj", "Brain", "--data_path", folder, "--save_path", folder, flag, path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {flag}")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"
