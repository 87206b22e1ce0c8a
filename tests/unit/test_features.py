"""The feature store: what it keeps, what it reuses, and that it never lies."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from CLIP import create_model
from dataset import Sample
from engine import features
from engine.features import RECORD_BYTES, Backbone, DiskRows, FeatureStore, Item, choose_mode, read_index
from utils import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clip():
    return create_model("ViT-tiny-14-56", "random", 42)


@pytest.fixture
def items(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (42, 42, 3), dtype=np.uint8)).save(path)
        found.append(Item(Sample(path, 0, None, path.name)))
    return found


def make(clip, tmp_path, mode="disk", **options):
    backbone = Backbone(clip, options.pop("layers", [2, 4]), options.pop("class_token", False))
    return FeatureStore(backbone, mode, tmp_path / "store", **{"batch_size": 3, **options})


@pytest.mark.parametrize("mode", ["ram", "disk", "off"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tokens_come_back(clip, items, tmp_path, mode, dtype):
    store = make(clip, tmp_path, mode, dtype=dtype)
    assert store.prepare(items) == (0 if mode == "off" else 7)
    expected = clip.image_tokens(torch.stack([item.image(42) for item in items]), [2, 4])
    got = store.get(items)
    for mine, tokens in zip(got, expected, strict=True):
        assert mine.shape == (7, 9, 128)  # patches only: no adapter reads the class token
        assert mine.dtype == torch.float32
        tolerance = 1e-5 if dtype == "float32" or mode == "off" else 2e-3
        torch.testing.assert_close(mine, tokens[:, 1:], atol=tolerance, rtol=tolerance)


def test_class_token_is_kept_where_it_is_read(clip, items, tmp_path):
    store = make(clip, tmp_path, "ram", class_token=True)
    store.prepare(items)
    assert store.get(items)[0].shape == (7, 10, 128)


def test_second_run_computes_only_what_is_missing(clip, items, tmp_path):
    assert make(clip, tmp_path).prepare(items[:5]) == 5
    assert make(clip, tmp_path).prepare(items) == 2
    store = make(clip, tmp_path)
    assert store.prepare(items) == 0
    fresh = make(clip, tmp_path / "other")
    fresh.prepare(items)
    for mine, tokens in zip(store.get(items), fresh.get(items), strict=True):
        torch.testing.assert_close(mine, tokens, atol=1e-3, rtol=1e-3)


def test_a_changed_file_is_another_image(clip, items, tmp_path):
    make(clip, tmp_path).prepare(items)
    Image.fromarray(np.full((42, 42), 7, dtype=np.uint8)).save(items[0].sample.path)
    store = make(clip, tmp_path)
    assert store.prepare(items) == 1
    expected = clip.image_tokens(items[0].image(42)[None], [2])[0][:, 1:]
    torch.testing.assert_close(store.get(items[:1])[0], expected, atol=2e-3, rtol=2e-3)


def test_views_have_their_own_rows_and_only_the_jitter_depends_on_the_draws(clip, items, tmp_path):
    views = [Item(items[0].sample, view, (0.2, 0.3)) for view in range(16)]
    assert make(clip, tmp_path).prepare(views) == 16
    assert make(clip, tmp_path).prepare([Item(items[0].sample, view, (0.8, 0.1)) for view in range(16)]) == 1
    assert make(clip, tmp_path).prepare(items[:1]) == 0  # view 0 is the image itself


def test_whatever_shapes_the_numbers_is_in_the_key(clip, tmp_path):
    other = create_model("ViT-tiny-14-56", "random", 42, seed=1)
    corrected = create_model("ViT-tiny-14-56", "random", 42, fidelity="corrected")
    larger = create_model("ViT-tiny-14-56", "random", 56)
    folders = {make(model, tmp_path).folder for model in (clip, other, corrected, larger)}
    folders |= {make(clip, tmp_path, **change).folder for change in (
        {"layers": [1, 4]}, {"class_token": True}, {"dtype": "float32"},
    )}  # fmt: skip
    assert len(folders) == 7
    assert make(clip, tmp_path, layers=[4, 2]).folder == make(clip, tmp_path).folder


def rows_on(folder, count=0):
    rows = DiskRows(folder, (1, 2, 3), torch.float16, {})
    for i in range(count):
        with rows.filling():
            rows.add([bytes([i]) * 32], torch.full((1, 1, 2, 3), float(i), dtype=torch.float16))
    return rows


def test_torn_index_records_and_missing_rows_are_dropped(tmp_path):
    rows_on(tmp_path, 4)
    index, data = tmp_path / "index.bin", tmp_path / "rows.bin"
    whole = index.read_bytes()
    for cut in (1, RECORD_BYTES - 1, RECORD_BYTES + 5):
        index.write_bytes(whole[:-cut])
        assert len(rows_on(tmp_path).records) == 4 - 1 - cut // RECORD_BYTES
    index.write_bytes(whole[:50] + b"\xff" + whole[51:])  # inside the second record
    assert len(rows_on(tmp_path).records) == 1
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-5])
    rows = rows_on(tmp_path)
    assert len(rows.records) == 3
    with rows.filling():
        rows.add([b"z" * 32], torch.full((1, 1, 2, 3), 9.0, dtype=torch.float16))
    again = rows_on(tmp_path)
    assert again[b"z" * 32].unique().tolist() == [9.0]
    assert again[bytes([2]) * 32].unique().tolist() == [2.0]


def test_a_damaged_row_is_an_error_not_a_number(tmp_path):
    rows_on(tmp_path, 2)
    data = bytearray((tmp_path / "rows.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "rows.bin").write_bytes(data)
    rows = rows_on(tmp_path)
    assert rows[bytes([0]) * 32].unique().tolist() == [0.0]
    with pytest.raises(InputError, match="damaged"):
        rows[bytes([1]) * 32]


FILL = """
import sys; sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from CLIP import create_model
from dataset import Sample
from engine.features import Backbone, FeatureStore, Item
clip = create_model("ViT-tiny-14-56", "random", 42)
paths = sorted(Path({folder!r}).glob("*.png"))
items = [Item(Sample(path, 0, None, path.name), view, (0.1, 0.2)) for path in paths for view in range(16)]
FeatureStore(Backbone(clip, [2, 4], False), "disk", {store!r}, batch_size=3).prepare(items)
"""


KILLED_FILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch  # once: a child is forked from here, before anything has run
from engine.features import RECORD_BYTES
script, store, kept, moments = sys.argv[1], Path(sys.argv[2]), 0, random.Random(3)
while_it_runs = lambda pid: os.waitpid(pid, os.WNOHANG) == (0, 0)
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        exec(script)
        os._exit(0)
    enough = kept + moments.randint(1, 6)
    while kept < enough and while_it_runs(pid):
        kept = sum(path.stat().st_size for path in store.glob("*/index.bin")) // RECORD_BYTES
    time.sleep(moments.uniform(0, 0.005))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(sum(path.stat().st_size for path in store.glob("*/index.bin")) // RECORD_BYTES)
"""


def test_a_fill_killed_ten_times_resumes(clip, items, tmp_path):
    fill = FILL.format(root=str(ROOT), folder=str(tmp_path), store=str(tmp_path / "store"))
    command = [sys.executable, "-c", KILLED_FILLS, fill, str(tmp_path / "store")]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
    kept = [int(line) for line in output.splitlines() if line.isdigit()]
    assert len(kept) == 10
    assert kept == sorted(kept)
    assert 0 < kept[-1] < 7 * 16  # the last one was killed in the middle too
    views = [Item(item.sample, view, (0.1, 0.2)) for item in items for view in range(16)]
    store = make(clip, tmp_path)
    assert store.prepare(views) == 7 * 16 - kept[-1]
    fresh = make(clip, tmp_path / "other")
    fresh.prepare(views)
    for mine, tokens in zip(store.get(views), fresh.get(views), strict=True):
        torch.testing.assert_close(mine, tokens, atol=1e-3, rtol=1e-3)


def test_two_processes_fill_one_store(clip, items, tmp_path):
    script = FILL.format(root=str(ROOT), folder=str(tmp_path), store=str(tmp_path / "store"))
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    store = make(clip, tmp_path)
    records, _ = read_index(store.folder / "index.bin", 10**6)
    assert len(records) == 7 * 16
    assert (store.folder / "rows.bin").stat().st_size == 7 * 16 * store.row_bytes
    assert store.prepare([Item(item.sample) for item in items]) == 0


def test_auto(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "free_memory", lambda: 1000)
    monkeypatch.setattr(features, "free_disk", lambda folder: 5000)
    assert [choose_mode(need, tmp_path / "x") for need in (500, 501, 6000)] == ["ram", "disk", "off"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/meta.json").touch()
    assert choose_mode(500, tmp_path / "x") == "disk"


def test_a_full_disk_is_one_line_and_keeps_what_is_there(clip, items, tmp_path, monkeypatch):
    store = make(clip, tmp_path)
    store.prepare(items[:3])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        store.prepare(items)
    monkeypatch.undo()
    assert make(clip, tmp_path).prepare(items) == 4


def test_info_and_prune(clip, items, tmp_path):
    store = make(clip, tmp_path)
    store.prepare(items)

    def run(action):
        command = [sys.executable, "-m", "engine.features", action, "--cache_dir", str(tmp_path / "store")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert f"{store.folder}  7 images" in run("--info")
    broken = {
        "0" * 16: "{", "1" * 16: "[]", "2" * 16: '{"row_bytes": 0}', "3" * 16: "\xff", "4" * 16: '{"row_bytes": "x"}',
    }  # fmt: skip
    for name, text in broken.items():
        (tmp_path / "store" / name).mkdir()
        (tmp_path / "store" / name / "meta.json").write_text(text, encoding="latin-1")
        if name[0] != "4":
            (tmp_path / "store" / name / "rows.bin").touch()
    (tmp_path / "store" / "project").mkdir()
    (tmp_path / "store" / "project" / "meta.json").write_text("{}")  # no store: nothing to be deleted
    lines = run("--info").splitlines()
    assert [line.split("  ")[1] for line in lines] == ["damaged; --prune removes it"] * 5 + ["7 images"]
    assert run("--prune").count("freed") == 6
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["project"]
    assert not store.folder.exists()
    assert "no stores" in run("--info")


def test_item_keys_are_stable(items):
    digest = hashlib.sha256(items[0].sample.path.read_bytes()).hexdigest()
    assert items[0].key(digest) == hashlib.sha256(f"{digest} 0 ".encode()).digest()
