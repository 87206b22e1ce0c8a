"""The MVFA layout, few-shot lists, patients and leaks."""

import csv
import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import layout, notes, phantom
from dataset.layout import FOLDER
from dataset.medical_few import MedicalDataset, equal_images
from dataset.readers import images
from dataset.readers.images import Sample, load_image
from tests.helpers.data import read_shot_list
from tests.unit.test_layout import draw
from utils import InputError


def make(root: Path, obj: str = "Brain", count: int = 4) -> Path:
    """Write a data set of small noise images with masks."""
    for kind, i in product(("good", "Ungood"), range(count)):
        draw(root / f"{obj}_AD", *(f"{split}/{kind}/img/img_{i}.png" for split in ("valid", "test")))
        if kind == "Ungood":
            draw(root / f"{obj}_AD", *(f"{split}/{kind}/anomaly_mask/img_{i}.png" for split in ("valid", "test")))
    return root


def test_samples_are_sorted_normal_first_and_have_masks(tmp_path):
    samples = MedicalDataset.open("Brain", make(tmp_path)).samples("test")
    assert [sample.label for sample in samples] == [0] * 4 + [1] * 4
    assert [sample.name for sample in samples[:2]] == ["test/good/img/img_0.png", "test/good/img/img_1.png"]
    # The published code replaces every `img` in a path to find its mask, which would break these names.
    assert samples[4].masks == (tmp_path / "Brain_AD/test/Ungood/anomaly_mask/img_0.png",)
    assert samples[0].masks == ()


def test_published_lists_are_complete():
    """The shipped lists equal the published table; skipped if the table does not lie beside the project."""
    table = FOLDER.parent.parent / "shared" / "fewshot_published.tsv"
    if not table.is_file():
        pytest.skip("the published table is not beside this checkout")
    with table.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            path = FOLDER / "fewshot_seed" / row["dataset"] / f"my{row['shots']}-shot.txt"
            abnormal, normal = read_shot_list(path, int(row["iterate"]))
            names = abnormal if row["class"] == "abnormal" else normal
            assert " ".join(names) == row["file names in valid/{good,Ungood}/img, in order"]


def test_own_list_wins_and_iterate_picks_the_line(tmp_path, capsys):
    make(tmp_path)
    path = tmp_path / "Brain_AD/fewshot_seed/my2-shot.txt"
    path.parent.mkdir()
    path.write_text(
        "\na-0: img_0.png img_1.png\nn-0: img_2.png img_3.png\n\na-1: img_3.png img_0.png\nn-1: img_1.png img_0.png\n"
    )
    dataset = MedicalDataset.open("Brain", tmp_path)
    assert dataset.shots(2, 2, 0, 1).names == {
        "abnormal": ["img_0.png", "img_1.png"],
        "normal": ["img_2.png", "img_3.png"],
    }
    assert dataset.shots(2, 2, 1, 1).names["abnormal"] == ["img_3.png", "img_0.png"]
    # Stored in checkpoints, so it does not hold the path of the data.
    assert dataset.shots(2, 2, 1, 1).source == "Brain_AD/fewshot_seed/my2-shot.txt"
    with pytest.raises(InputError, match=r"--iterate 7.*it has 0, 1"):
        dataset.shots(2, 2, 7, 1)
    path.write_text("a-0: img_0.png img_0.png img_1.png\nn-0: img_2.png img_3.png\n")
    assert dataset.shots(2, 2, 0, 1).names["abnormal"] == ["img_0.png", "img_0.png", "img_1.png"]  # as published
    said = capsys.readouterr().err
    assert "img_0.png more than once" in said and "3 images" in said


def test_a_class_takes_the_list_for_its_own_number_of_shots(tmp_path):
    phantom.write(tmp_path, ["Brain"], valid=4, test=1, seed=0, size=32)
    shots = MedicalDataset.open("Brain", tmp_path).shots(4, 2, 0, 0)
    assert shots.names["normal"] == [f"valid_good_{i:05d}.png" for i in range(4)]
    assert shots.names["abnormal"] == [f"valid_Ungood_{i:05d}.png" for i in range(2)]
    assert "my2-shot.txt" in shots.source and "my4-shot.txt" in shots.source


@pytest.mark.parametrize("iterate", [0, -1])
def test_without_a_list_shots_are_sampled_by_seed(tmp_path, iterate):
    dataset = MedicalDataset.open("Brain", make(tmp_path))
    one, same, *others = (dataset.shots(3, 3, iterate, seed).names for seed in (5, 5, 6, -5))
    assert one == same and one not in others
    assert "sampled with seed 5" in dataset.shots(3, 3, iterate, 5).source
    with pytest.raises(InputError, match="--shot 9"):
        dataset.shots(9, 9, iterate, 5)


def test_shipped_list_is_used_for_the_data_it_names(tmp_path):
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
        MedicalDataset.open("Brain", tmp_path).shots(2, 2, 0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "a-0: ../secret.png img_1.png\nn-0: img_2.png img_3.png",
        "a-0: img_0.png img_9.png\nn-0: img_2.png img_3.png",
        "a-0: img_0.png img_1.png",
        "",
    ],
)
def test_bad_lists_of_shots_are_refused(tmp_path, text):
    make(tmp_path)
    path = tmp_path / "Brain_AD/fewshot_seed/my2-shot.txt"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=r"my2-shot\.txt"):
        MedicalDataset.open("Brain", tmp_path).shots(2, 2, 0, 1)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10), dtype=np.uint8)).save(path)
    return path


def test_custom_rule_for_patients(tmp_path):
    for kind in ("normal", "abnormal"):
        for number in range(20):
            picture(tmp_path / kind / f"visit{number % 3}of{number}.png")
    assert "none recognised" in notes.patients_note(MedicalDataset.open("knee", "data", tmp_path))
    dataset = MedicalDataset.open("knee", "data", tmp_path, patient=r"of(\d+)\.")
    assert "20 recognised" in notes.patients_note(dataset)
    (tmp_path / "knee.json").write_text(json.dumps({"patient": r"visit(\d)", "prompt_name": "left knee"}))
    dataset = MedicalDataset.open("knee", "data", tmp_path)
    assert dataset.layout.prompt_name == "left knee"
    assert {sample.patient for sample in dataset.samples("test")} <= {"0", "1", "2"}
    with pytest.raises(InputError, match=r"--patient '\(': not a regular expression"):
        MedicalDataset.open("knee", "data", tmp_path, patient="(")


def test_unreadable_folder_is_reported(tmp_path, monkeypatch):
    make(tmp_path)
    (tmp_path / "Brain_AD/test/good/img/p1").mkdir()
    real = os.scandir, os.listdir

    def refuse(path: object, then: int) -> object:
        if str(path).endswith("/p1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real[then](path)

    monkeypatch.setattr(os, "scandir", lambda path=".": refuse(path, 0))
    monkeypatch.setattr(os, "listdir", lambda path=".": refuse(path, 1))
    with pytest.raises(InputError, match=r"p1: cannot be read: Permission denied"):
        MedicalDataset.open("Brain", tmp_path).samples("test")


def test_leak_check_reads_no_file_twice(tmp_path, monkeypatch):
    make(tmp_path)
    dataset, asked = MedicalDataset.open("Brain", tmp_path), []
    monkeypatch.setattr(images, "sha256_file", lambda path: asked.append(path) or path.name)
    pairs = equal_images(dataset.samples("valid"), dataset.samples("test"), Sample.content_hash)
    assert (len(pairs), len(asked)) == (8, 16)  # test images, even if they equal several images of valid


def test_listed_images_and_their_patients_are_in_valid(tmp_path):
    """Listed images and their patients are in valid for any --shot and --iterate, so the test set stays the same."""
    for kind in ("normal", "abnormal"):
        for number in range(30):
            picture(tmp_path / kind / f"{kind} (#{number}).png", number)
        for number in range(6):
            picture(tmp_path / kind / f"case_{number}_{kind}.png", 40 + number)
    before = {sample.name for sample in MedicalDataset.open("knee", "data", tmp_path).samples("test")}
    listed = sorted(name for name in before if name.startswith("abnormal/abnormal"))[:2]
    patient = next(name for name in sorted(before) if "case_" in name)
    lists = tmp_path / "fewshot_seed"
    lists.mkdir()
    one, two = (name.removeprefix("abnormal/") for name in listed)
    (lists / "my2-shot.txt").write_text(f'a-0: "{one}" \'{two}\'\nn-0: "normal (#1).png" "normal (#2).png"\n')
    (lists / "my1-shot.txt").write_text(f"{patient[0]}-0: {patient.partition('/')[2]}\n")
    dataset = MedicalDataset.open("knee", "data", tmp_path)
    names = dataset.shots(2, 2, 0, 0).names
    assert names == {"abnormal": [one, two], "normal": ["normal (#1).png", "normal (#2).png"]}
    moved = {*listed, "normal/normal (#1).png", "normal/normal (#2).png"}
    moved |= {f"{kind}/case_{patient.split('_')[1]}_{kind}.png" for kind in ("normal", "abnormal")}
    assert {sample.name for sample in dataset.samples("test")} == before - moved


def test_shots_are_drawn_from_different_patients_first(tmp_path):
    for split in ("valid", "test"):
        for kind in ("good", "Ungood"):
            for number in range(24):
                picture(tmp_path / split / kind / "img" / f"case{number % 4}_{number}.png", number)
    dataset = MedicalDataset.open("knee", "data", tmp_path)
    for seed in range(9):
        assert len({sample.patient for sample in dataset.shots(4, 4, -1, seed).abnormal}) == 4
        assert len(set(dataset.shots(6, 6, -1, seed).names["normal"])) == 6  # of 4 patients, then 2 more
    everyone = MedicalDataset.open("knee", "data", tmp_path, patient=r"_(\d+)")
    nobody = MedicalDataset.open("knee", "data", tmp_path, patient="nobody")
    assert everyone.shots(4, 4, -1, 1).names == nobody.shots(4, 4, -1, 1).names  # as before if no patient repeats


def test_benchmarks_are_recognised_by_their_image_counts(tmp_path, monkeypatch):
    make(tmp_path)
    assert not MedicalDataset.open("Brain", tmp_path).is_benchmark
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((8,),), "test": ((3, 5), (4, 4))})
    assert MedicalDataset.open("Brain", tmp_path).is_benchmark
    assert not MedicalDataset.open("knee", "data", tmp_path / "Brain_AD").is_benchmark
    picture(tmp_path / "Brain_AD/test/good/img/one_more.png")
    dataset = MedicalDataset.open("Brain", tmp_path)
    assert not dataset.is_benchmark
    assert "test 5 + 4 (published: 3 + 5 or 4 + 4)" in notes.benchmark_note(dataset)


def test_bit_depth_is_decided_per_data_set(tmp_path):
    """A dark image of a 12-bit data set is not read as 8-bit, even if the bright one is in the other split."""
    make(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "Brain_AD").rglob("img/*.png"))):
        Image.fromarray(np.full((20, 20), 200 if number else 4000, np.uint16)).save(path)
    dataset = MedicalDataset.open("Brain", tmp_path)
    assert all(sample.options.deep for sample in dataset.samples("test"))
    assert dataset.reading["deep"]
    assert load_image(dataset.samples("test")[-1], 8).max() < 0.02
