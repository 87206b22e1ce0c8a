"""The MVFA layout, few-shot lists, and images of every kind."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import OBJECTS, MedicalDataset, check_mask, load_image, load_mask
from dataset.medical_few import FOLDER, Sample, read_shot_list
from utils import InputError


def make(root: Path, obj: str = "Brain", count: int = 4, masks: bool = True) -> Path:
    """A data set of small noise images."""
    rng = np.random.default_rng(0)
    for split in ("valid", "test"):
        for kind in ("good", "Ungood"):
            for index in range(count):
                path = root / f"{obj}_AD" / split / kind / "img" / f"img_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
                if masks and kind == "Ungood":
                    mask = path.parent.parent / "anomaly_mask" / path.name
                    mask.parent.mkdir(exist_ok=True)
                    Image.fromarray((rng.random((20, 30)) > 0.8).astype(np.uint8) * 255).save(mask)
    return root


def test_normal_first_sorted_with_masks(tmp_path):
    samples = MedicalDataset.open("Brain", make(tmp_path)).samples("test")
    assert [sample.label for sample in samples] == [0] * 4 + [1] * 4
    assert [sample.name for sample in samples[:2]] == ["test/good/img/img_0.png", "test/good/img/img_1.png"]
    # The published path of a mask replaces every `img`, and would break these names.
    assert samples[4].mask == tmp_path / "Brain_AD/test/Ungood/anomaly_mask/img_0.png"
    assert samples[0].mask is None


def test_stray_files_are_not_images(tmp_path):
    make(tmp_path)
    (tmp_path / "Brain_AD/test/good/img/Thumbs.db").write_bytes(b"x")
    assert len(MedicalDataset.open("Brain", tmp_path).samples("test")) == 8


def test_image_only_sets_have_no_masks(tmp_path):
    dataset = MedicalDataset.open("Chest", make(tmp_path, "Chest", masks=False))
    assert not dataset.pixel_metrics
    assert all(sample.mask is None for sample in dataset.samples("test"))


def test_six_data_sets_and_their_names():
    names = {"Brain": "Brain", "Liver": "Liver", "Retina_RESC": "retinal OCT", "Retina_OCT2017": "retinal OCT"}
    names |= {"Chest": "Chest X-ray film", "Histopathology": "histopathological image"}
    assert set(OBJECTS) == set(names)


def test_published_lists_are_complete():
    """Every line of the published table, where it lies beside the project (it does in development)."""
    table = FOLDER.parent.parent / "shared" / "fewshot_published.tsv"
    if not table.is_file():
        pytest.skip("the published table is not beside this checkout")
    with table.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            path = FOLDER / "fewshot_seed" / row["dataset"] / f"my{row['shots']}-shot.txt"
            abnormal, normal = read_shot_list(path, int(row["iterate"]))
            names = abnormal if row["class"] == "abnormal" else normal
            assert " ".join(names) == row["file names in valid/{good,Ungood}/img, in order"]


@pytest.mark.parametrize("obj", OBJECTS)
@pytest.mark.parametrize("shot", [2, 4, 8, 16])
def test_lists_of_the_six_data_sets(obj, shot):
    abnormal, normal = read_shot_list(FOLDER / "fewshot_seed" / obj / f"my{shot}-shot.txt", 0)
    assert (len(abnormal), len(normal)) == (shot, shot)


def test_own_list_wins_and_iterate_picks_the_line(tmp_path):
    make(tmp_path)
    path = tmp_path / "Brain_AD/fewshot_seed/my2-shot.txt"
    path.parent.mkdir()
    path.write_text(
        "\na-0: img_0.png img_1.png\nn-0: img_2.png img_3.png\n\na-1: img_3.png img_0.png\nn-1: img_1.png img_0.png\n"
    )
    dataset = MedicalDataset.open("Brain", tmp_path)
    assert dataset.shots(2, 2, 0, 1).names() == {
        "abnormal": ["img_0.png", "img_1.png"],
        "normal": ["img_2.png", "img_3.png"],
    }
    assert dataset.shots(2, 2, 1, 1).names()["abnormal"] == ["img_3.png", "img_0.png"]
    assert dataset.shots(2, 2, 1, 1).source == str(path)
    with pytest.raises(InputError, match=r"--iterate 7.*it has 0, 1"):
        dataset.shots(2, 2, 7, 1)


@pytest.mark.parametrize("iterate", [0, -1])
def test_without_a_list_the_seed_samples(tmp_path, iterate):
    dataset = MedicalDataset.open("Brain", make(tmp_path))
    one, same, other = (dataset.shots(3, 3, iterate, seed).names() for seed in (5, 5, 6))
    assert one == same != other
    assert "sampled with seed 5" in dataset.shots(3, 3, iterate, 5).source
    with pytest.raises(InputError, match="--shot 9"):
        dataset.shots(9, 9, iterate, 5)


def test_the_projects_list_is_used_for_the_data_it_names(tmp_path):
    make(tmp_path)
    names = read_shot_list(FOLDER / "fewshot_seed/Brain/my2-shot.txt", 0)
    for kind, listed in zip(("Ungood", "good"), names, strict=True):
        for name in listed:
            source = tmp_path / f"Brain_AD/valid/{kind}/img/img_0.png"
            source.with_name(name).write_bytes(source.read_bytes())
            if kind == "Ungood":
                mask = tmp_path / "Brain_AD/valid/Ungood/anomaly_mask/img_0.png"
                mask.with_name(name).write_bytes(mask.read_bytes())
    dataset = MedicalDataset.open("Brain", tmp_path)
    assert dataset.shots(2, 2, 0, 1).source == "dataset/fewshot_seed/Brain/my2-shot.txt"
    (tmp_path / "Brain_AD/valid/good/img" / names[1][0]).unlink()
    with pytest.raises(InputError, match=names[1][0]):
        dataset.shots(2, 2, 0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "a-0: ../secret.png img_1.png\nn-0: img_2.png img_3.png",
        "a-0: /etc/x.png img_1.png\nn-0: img_2.png img_3.png",
        "a-0: img_0.png img_9.png\nn-0: img_2.png img_3.png",
        "a-0: img_0.png\na-0: img_1.png\nn-0: img_2.png",
        "a-0: img_0.png img_1.png",
        "hello",
        "a-0:\nn-0:",
        "",
    ],
)
def test_lists_that_are_refused(tmp_path, text):
    make(tmp_path)
    path = tmp_path / "Brain_AD/fewshot_seed/my2-shot.txt"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=r"my2-shot\.txt"):
        MedicalDataset.open("Brain", tmp_path).shots(2, 2, 0, 1)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(InputError, match=r"Brain_AD not found.*phantom"):
        MedicalDataset.open("Brain", tmp_path)
    make(tmp_path)
    (tmp_path / "Brain_AD/test/Ungood/anomaly_mask/img_2.png").unlink()
    with pytest.raises(InputError, match=r"img_2.png.*no mask"):
        MedicalDataset.open("Brain", tmp_path).samples("test")


def gradient() -> np.ndarray:
    return (np.add.outer(np.arange(40), np.arange(60)) * 2).astype(np.uint8)


@pytest.mark.parametrize("form", ["png16", "tiff16", "gray", "cmyk", "palette", "jpeg", "bmp", "rgba", "one pixel"])
def test_every_kind_of_image(tmp_path, form):
    gray = Image.fromarray(gradient())
    path = tmp_path / f"x.{ {'tiff16': 'tif', 'cmyk': 'tif', 'jpeg': 'jpg', 'bmp': 'bmp'}.get(form, 'png') }"
    if form in ("png16", "tiff16"):
        Image.fromarray(gradient().astype(np.uint16) * 257).save(path)
    elif form == "one pixel":
        gray.resize((1, 1)).save(path)
    else:
        gray.convert({"gray": "L", "cmyk": "CMYK", "palette": "P", "rgba": "RGBA"}.get(form, "RGB")).save(path)
    image = load_image(path, 32)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    if form != "one pixel":
        gray.save(tmp_path / "gray.png")
        assert (image - load_image(tmp_path / "gray.png", 32)).abs().max() < 0.06


def test_cut_files_and_unequal_masks_are_errors(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    for length in (0, 5, 60, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x\.png"):
            load_image(path, 32)
    path.write_bytes(data)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.zeros((90, 80), dtype=np.uint8)).save(mask)
    with pytest.raises(InputError, match=r"mask\.png.*80, 90.*90, 90"):
        load_mask(Sample(path, 1, mask, "x"), 32)


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 1), (np.uint16, 1), (np.int32, 1)])
def test_a_shot_with_a_mask_of_labels_is_refused(tmp_path, dtype, value):
    image, mask = tmp_path / "x.png", tmp_path / "mask.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(image)
    Image.fromarray(np.eye(9, dtype=dtype) * dtype(value)).save(mask)
    sample = Sample(image, 1, mask, "x")
    with pytest.raises(InputError, match=r"mask\.png: its largest value is 1 of 255"):
        check_mask(sample)
    assert not load_mask(sample, 9).any()  # as published
