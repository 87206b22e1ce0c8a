"""The token store: file names, damaged files, the place of tokens, and the number of passes of the tower."""

import argparse
from dataclasses import replace

import pytest
import torch

from CLIP.clip import create_model
from CLIP.weights import find_weights
from dataset.readers.images import load_image
from dataset.views import JITTER_VIEW, VIEWS, augment_view
from engine import features
from engine.features import TokenStore, choose_cache, free_memory
from tests.helpers.data import draw_samples, small_settings, store_options
from utils import InputError

CPU = torch.device("cpu")


def make_tower(**changes):
    settings = small_settings(**{k: v for k, v in changes.items() if k not in ("autocast", "seed")})
    weights = find_weights(settings.model_name, settings.pretrain, None, changes.get("seed", 1))
    return settings, weights, changes.get("autocast"), CPU


def load(tower):
    settings, weights, *_ = tower
    return create_model(weights, img_size=settings.img_size, fidelity=settings.fidelity)


def filled(tower, items, folder, samples=(), **options):
    """A filled store, and the number of images that passed the tower."""
    store = TokenStore(*tower, store_options(folder, **options))
    store.plan(items, [samples] if samples else ())
    passed = len(store.missing)
    store.fill(load(tower))
    return store, passed


@pytest.fixture
def samples(tmp_path):
    (tmp_path / "data").mkdir()
    return draw_samples(tmp_path / "data")


def views(samples):
    draws = {JITTER_VIEW: (0.2, 0.7)}
    return [replace(s, view=view, jitter=draws.get(view)) for view in range(VIEWS) for s in samples]


@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
def test_tokens_equal_those_of_the_tower(samples, tmp_path, cache):
    tower = make_tower()
    store, _ = filled(tower, views(samples[:2]), tmp_path / "cache", samples, cache=cache)
    clip = load(tower)
    for items in (views(samples[:2])[5:9], samples[1:4]):
        tokens = store.get(store.rows(items))
        images = torch.cat([augment_view(load_image(i, 42)[None], i.view, i.jitter) for i in items])
        expected = [layer[:, 1:] for layer in clip.image_tokens(images, (2, 4))]
        assert [t.dtype for t in tokens] == [torch.float32] * 2
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.equality
def test_tokens_do_not_depend_on_the_batch(samples, tmp_path):
    """Bitwise equal tokens from one pass, single images, a pass over missing files, and --cache off."""
    tower = make_tower()
    whole, _ = filled(tower, views(samples[:1]), tmp_path / "whole", samples, cache="disk")
    expected = whole.get(whole.rows(samples))

    alone = TokenStore(*tower, store_options(tmp_path / "alone", cache="ram"))
    alone.plan([], [[sample] for sample in samples])
    alone.fill(load(tower))
    torch.testing.assert_close(alone.get(alone.rows(samples)), expected, atol=0, rtol=0)

    for path in sorted(whole.folder.glob("layer*/*/*.tokens"))[::3]:
        path.unlink()
    again, passed = filled(tower, views(samples[:1]), tmp_path / "whole", samples, cache="disk")
    assert 0 < passed < VIEWS + len(samples) - 1
    torch.testing.assert_close(again.get(again.rows(samples)), expected, atol=0, rtol=0)

    off, _ = filled(tower, [], tmp_path / "off", samples, cache="off")
    for i, sample in enumerate(samples):
        torch.testing.assert_close(off.get(off.rows([sample])), [x[i : i + 1] for x in expected], atol=0, rtol=0)


def test_second_run_computes_nothing_and_loads_no_tower(samples, tmp_path):
    tower = make_tower()
    first, passed = filled(tower, views(samples[:1]), tmp_path, samples, cache="disk")
    assert passed == VIEWS + len(samples) - 1  # the plain view of the shot is one of its 16
    for cache in ("disk", "auto", "ram"):
        store = TokenStore(*tower, store_options(tmp_path, cache=cache))
        store.plan(views(samples[:1]), [samples])
        assert not store.missing and store.load_clip().visual is None
        rows = store.rows(samples)
        torch.testing.assert_close(store.get(rows), first.get(first.rows(samples)), atol=0, rtol=0)
    path = next(first.folder.rglob("*.tokens"))
    path.unlink()
    filled(tower, [], tmp_path, samples, cache="ram")
    assert not path.exists()  # with --cache ram nothing is written, so a full or read-only disk is no problem


def test_images_missing_in_one_process_are_missing_in_all(samples, tmp_path, monkeypatch):
    """All processes divide the same list of missing images, even if another run writes files meanwhile."""
    filled(make_tower(), samples, tmp_path, cache="disk")
    monkeypatch.setattr("engine.distributed.all_gather", lambda value: [value, {2}])
    store = TokenStore(*make_tower(), store_options(tmp_path, cache="disk"))
    store.plan(samples)
    assert store.missing == [2]


KEY_CHANGES = {
    "weights": {"seed": 2},
    "fidelity": {"fidelity": "corrected"},
    "img_size": {"img_size": 56},
    "precision": {"autocast": torch.bfloat16},
    "model": {"model_name": "ViT-B-32"},
}


@pytest.mark.parametrize("change", KEY_CHANGES.values(), ids=KEY_CHANGES)
def test_folder_name_depends_on_all_that_changes_tokens(tmp_path, change):
    folders = {TokenStore(*tower, store_options(tmp_path)).folder for tower in (make_tower(), make_tower(**change))}
    assert len(folders) == 2
    assert TokenStore(*make_tower(), store_options(tmp_path, cache_dtype="float16")).folder not in folders


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_damaged_files_are_computed_again(samples, tmp_path, damage):
    tower = make_tower()
    first, _ = filled(tower, [], tmp_path, samples, cache="disk")
    path = sorted(tmp_path.glob("*/layer4-patches/*/*.tokens"))[0]
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[100] ^= 1
        path.write_bytes({"truncate": bytes(data[:-9]), "flip": bytes(data), "empty": b""}[damage])
    store, passed = filled(tower, [], tmp_path, samples, cache="disk")
    assert passed == 1
    torch.testing.assert_close(store.get(store.rows(samples)), first.get(first.rows(samples)), atol=1e-6, rtol=0)


def test_files_damaged_after_the_pass_are_noticed(samples, tmp_path):
    store, _ = filled(make_tower(), views(samples[:2]), tmp_path / "cache", cache="disk")
    path = store._path(3, 4)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    store.get(torch.tensor([2, 4]))
    with pytest.raises(InputError, match="gone or damaged"):
        store.get(torch.tensor([2, 3]))


def test_a_file_that_changes_between_hash_and_decoding_is_refused(samples, tmp_path):
    """An image changed after it was hashed is refused: its tokens would be stored under the hash of another one."""
    tower = make_tower()
    filled(tower, [], tmp_path, samples[:1], cache="disk")  # with files in the store, each image is hashed before
    store = TokenStore(*tower, store_options(tmp_path, cache="disk"))
    store.plan([], [samples])
    samples[2].path.write_bytes(samples[3].path.read_bytes())
    with pytest.raises(InputError, match=r"2\.png: changed while it was read"):
        store.fill(load(tower))


def test_overflow_is_noticed_when_tokens_are_computed(samples, tmp_path):
    tower = make_tower()
    clip = load(tower)
    clip.visual.transformer.resblocks[0].mlp.c_proj.bias.data += 1e6
    store = TokenStore(*tower, store_options(tmp_path, cache_dtype="float16"))
    store.plan([], [samples])
    with pytest.raises(InputError, match=r"0\.png: its tokens are not finite in float16; use --cache_dtype float32"):
        store.fill(clip)


def fake_root(folder, available_mb, limit_mb, used_mb):
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_mb * 1024} kB\n")
    (folder / "proc/self/cgroup").write_text("0::/user/job/step\n")
    group = folder / "sys/fs/cgroup/user/job"  # a parent of the process's own group
    group.mkdir(parents=True)
    for name, value in (("memory.max", limit_mb), ("memory.current", used_mb)):
        (group / name).write_text("max\n" if value is None else f"{value * 2**20}\n")
    return folder


def test_free_memory_respects_control_groups(tmp_path):
    assert free_memory(fake_root(tmp_path / "a", 8000, 3000, 1000)) == 2000 * 2**20
    assert free_memory(fake_root(tmp_path / "b", 8000, None, 1000)) == 8000 * 2**20


def test_auto_prefers_memory_then_files_then_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=5000))
    assert [choose_cache("auto", need, tmp_path, CPU) for need in (500, 501, 5000)] == ["ram", "disk", "off"]
