"""Folder layouts: splits and classes, pairing of masks, skipped files, patients, and the notes printed on them."""

import json
import unicodedata
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from dataset import notes
from dataset.medical_few import MedicalDataset
from dataset.pairing import named_masks, pair
from dataset.patients import patient, spelled_alike
from dataset.readers.images import Sample
from dataset.readers.masks import load_mask
from tests.unit.test_images import dicom
from utils import InputError


def draw(root: Path, *names: str, marked: bool = True) -> Path:
    """Write images below `root`: a rectangle if the path has a word for masks, else noise that depends on the name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.integers(0, 255, (20, 24), dtype=np.uint8)
        if any(word in name.lower() for word in ("mask", "seg", "ground_truth", "label", "_gt")):
            values = np.zeros((20, 24), np.uint8)
            values[4:8, 4 : 4 + len(Path(name).stem)] = 255 * marked
        Image.fromarray(values).save(path)
    return root


def draw_classes(root: Path, form: str, splits: tuple[str, ...] = ("valid", "test"), count: int = 2) -> None:
    """Write images of each class and split; the path `form` contains {split}, {kind} and {i}."""
    for split, kind in product(splits, ("normal", "abnormal")):
        draw(root, *(form.format(split=split, kind=kind, i=i) for i in range(count)))


def opened(root: Path, **given: object) -> MedicalDataset:
    return MedicalDataset.open("knee", "data", root, **given)


def by_name(root: Path, split: str = "test") -> dict[str, tuple[int, str | None]]:
    """Label and name of the mask of each sample, by its name."""
    samples = opened(root).samples(split)
    return {sample.name: (sample.label, sample.masks[0].name if sample.masks else None) for sample in samples}


def every(root: Path) -> dict[str, tuple[int, str | None]]:
    return by_name(root, "valid") | by_name(root)


def said(root: Path, **given: object) -> str:
    dataset = opened(root, **given)
    for split in ("valid", "test"):
        dataset.samples(split)
    return "\n".join(notes.describe(dataset))


# --- classes ---

CLASSES = [("good", "Ungood"), ("normal", "abnormal"), ("0", "1"), ("NORMAL", "Abnormal")]


@pytest.mark.parametrize("form", ["{split}/{kind}/img/{i}", "{split}/{kind}/{i}", "deeper/{split}/{kind}/{i}"])
@pytest.mark.parametrize("support", ["valid", "val", "train", "Valid"])
@pytest.mark.parametrize("kinds", CLASSES)
def test_names_of_splits_and_classes(tmp_path, form, support, kinds):
    for split in (support, "test"):
        draw(tmp_path, *(f"{form}.png".format(split=split, kind=kind, i=i) for kind in kinds for i in range(2)))
    for split, folder in (("valid", support), ("test", "test")):
        samples = opened(tmp_path).samples(split)
        assert [sample.label for sample in samples] == [0, 0, 1, 1]
        assert all(f"{folder}/" in sample.name for sample in samples)


# Folder trees of BMAD's archives: paths of the images and masks of each split and class.
TREES = {
    "label": ("{split}/{kind}/img/{name}", "{split}/{kind}/label/{name}"),
    "val": ("{val}/{kind}/img/{name}", "{val}/{kind}/label/{name}"),
    "without img, masks beside": ("{split}/{kind}/{name}", "{split}/label/{kind}/{name}"),
    "deeper": ("BraTS2021_slice/{split}/{kind}/img/{name}", "BraTS2021_slice/{split}/{kind}/label/{name}"),
    "Masks": ("{split}/{kind}/{name}", "{split}/{kind}/Masks/{name}"),
    "seg": ("{split}/{kind}/img/{name}", "{split}/{kind}/seg/{name}"),
}


@pytest.mark.parametrize("tree", TREES)
def test_bmad_trees(tmp_path, tree):
    for split, val in (("valid", "val"), ("test", "test")):
        for kind in ("good", "Ungood"):
            for index in range(3):
                words = {"split": split, "val": val, "kind": kind, "name": f"{index}.png"}
                draw(tmp_path / "Brain_AD", *(place.format(**words) for place in TREES[tree]))
    draw(tmp_path / "Brain_AD", "train/good/9.png")
    dataset = MedicalDataset.open("Brain", tmp_path, mask_above=25)
    assert (dataset.layout.prompt_name, dataset.pixel_metrics, dataset.layout.mask_above) == ("Brain", True, 25)
    for split in ("valid", "test"):
        samples = dataset.samples(split)
        assert [sample.path.name for sample in samples] == ["0.png", "1.png", "2.png"] * 2
        assert [sample.label for sample in samples] == [0] * 3 + [1] * 3
        assert [sample.masks[0].name for sample in samples[3:]] == ["0.png", "1.png", "2.png"]
    assert any("fewshot_seed/Brain" in str(path) for path in dataset.shot_lists().values())


@pytest.mark.parametrize("top", ["", "bottle/"])
def test_mvtec_tree_and_folders_that_are_not_defects(tmp_path, top):
    draw(tmp_path, *(f"{top}train/good/{i}.png" for i in range(4)), f"{top}test/good/0.png")
    for kind in ("crack", "hole"):
        draw(tmp_path, *(f"{top}test/{kind}/{i}.png" for i in range(9)))
        draw(tmp_path, *(f"{top}ground_truth/{kind}/{i}_mask.png" for i in range(9)))
    draw(tmp_path, f"{top}ground_truth/crack/0_mask_1.png", f"{top}test/masks/0.png", f"{top}test/ground_truth/0.png")
    draw(tmp_path, f"{top}test/.thumbs/0.png", f"{top}test/@eaDir/0.png", f"{top}test/crack/@eaDir/0.png")
    found = {name: value for name, value in every(tmp_path).items() if value[0]}
    assert len(found) == 18
    assert {Path(name).parent.name for name in found} == {"crack", "hole"}
    assert all(mask == f"{Path(name).stem}_mask.png" for name, (_, mask) in found.items())
    every_sample = (sample for split in ("valid", "test") for sample in opened(tmp_path).samples(split))
    first = next(sample for sample in every_sample if sample.name == f"{top}test/crack/0.png")
    assert [path.name for path in first.masks] == ["0_mask.png", "0_mask_1.png"]
    one = replace(first, masks=first.masks[:1])
    assert load_mask(first, 24).sum() > load_mask(one, 24).sum()  # the union of both masks
    assert "2 folders are abnormal: " in said(tmp_path)


def test_classes_beside_test_are_the_valid_split(tmp_path):
    draw_classes(tmp_path, "{split}{kind}/{i}.png", ("", "test/"), count=5)
    assert set(by_name(tmp_path, "valid")) == {f"{kind}/{i}.png" for kind in ("normal", "abnormal") for i in range(5)}
    assert set(by_name(tmp_path)) == {f"test/{kind}/{i}.png" for kind in ("normal", "abnormal") for i in range(5)}


@pytest.mark.parametrize(
    ("stray", "where"),
    [
        ("benign/{i}.png", "benign (3)"),
        ("train/normal/{i}.png", "train/normal (3)"),
        ("valid/normal/x{i}.png", "valid/normal (3)"),
    ],
)
def test_unused_folders_are_reported(tmp_path, stray, where):
    draw_classes(tmp_path, "{split}/{kind}/img/{i}.png")
    assert "not used" not in said(tmp_path)
    draw(tmp_path, *(stray.format(i=i) for i in range(3)))
    assert f"warning: not used: pictures in {where}" in said(tmp_path)


# --- masks ---


def test_busi_as_it_is_distributed(tmp_path):
    """Masks lie beside the images; some images have several, normal ones have empty masks, and names contain spaces."""
    for kind in ("benign", "malignant", "normal"):
        draw(tmp_path, *(f"{kind}/{kind} ({i}).png" for i in range(1, 20)))
        draw(tmp_path, *(f"{kind}/{kind} ({i})_mask.png" for i in range(1, 20)), marked=kind != "normal")
    draw(tmp_path, "benign/benign (4)_mask_1.png", "benign/benign (4)_mask_2.png")
    found = every(tmp_path)
    assert len(found) == 57
    assert not any("mask" in name for name in found)
    assert {label for name, (label, _) in found.items() if "normal" in name} == {0}
    assert all(mask == f"{Path(name).stem}_mask.png" for name, (label, mask) in found.items() if label)
    lines = said(tmp_path)
    assert "masks: 38 beside the images" in lines
    assert "normal images have a mask" not in lines
    assert "not used" not in lines


@pytest.mark.parametrize("word", ["-mask", "_seg", "_label", "_gt", "_Mask", "_ground_truth"])
@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_words_for_masks(tmp_path, word, ending):
    image, mask, lost = (tmp_path / name for name in (f"X{ending}", f"X{word}{ending}", f"Y{word}_1{ending}"))
    assert named_masks([image, mask, lost]) == ({mask}, {lost})
    assert pair(tmp_path, [Sample(image, 1, (), image.name)], [mask, lost])[0].masks == (mask,)


@pytest.mark.parametrize(
    ("image", "masks", "fitting"),
    [
        ("test/Ungood/img/1", ["test/Ungood/anomaly_mask/1", "valid/Ungood/anomaly_mask/1"], [0]),
        ("test/crack/1", ["ground_truth/crack/1_mask", "ground_truth/hole/1_mask"], [0]),
        ("test/crack/img/1", ["ground_truth/crack/img/1_mask", "ground_truth/crack/img/1_mask_1"], [0, 1]),
        ("test/crack/images/1", ["ground_truth/crack/1_mask", "ground_truth/1_mask"], [0]),
        ("abnormal/case09/CT/1", ["abnormal/case09/Masks/1", "abnormal/case08/Masks/1"], [0]),
        ("abnormal/case09/CT/1", ["seg/abnormal/case09/1", "seg/case09/abnormal/1"], [0]),
        ("abnormal/1", ["Ground Truth/1", "masks/11", "masks/other/1"], [0]),
        ("COVID-19/images/1", ["COVID-19/infection masks/1"], [0]),
        ("abnormal/1", ["abnormal/1_seg", "abnormal/deeper/1_seg", "abnormal/11_seg"], [0]),
    ],
)
def test_pairing_of_masks_with_images(tmp_path, image, masks, fitting):
    paths = [tmp_path / f"{mask}.png" for mask in masks]
    file = Sample(tmp_path / f"{image}.dcm", 1, (), image)
    assert pair(tmp_path, [file], paths)[0].masks == tuple(paths[i] for i in fitting)


def test_ambiguous_masks_are_refused(tmp_path):
    draw(tmp_path, *(f"{split}/{kind}/1.png" for split in ("valid", "test") for kind in ("good", "crack", "hole")))
    draw(tmp_path, "test/masks/1.png", "valid/masks/1.png")
    images = [f"{kind}/{i}.png" for kind in ("normal", "abnormal") for i in range(9)]
    draw(tmp_path / "twice", *images, "abnormal/masks/0.png", "abnormal/masks/0.bmp")
    for root in (tmp_path, tmp_path / "twice"):
        with pytest.raises(InputError, match="a name of its own"):
            opened(root).samples("test")


def test_masks_that_fit_no_image_are_reported(tmp_path):
    draw_classes(tmp_path, "{split}/{kind}/{i}.png")
    draw(tmp_path, "ground_truth/other/0.png", "ground_truth/other/1.png")
    assert "warning: masks that fit no image by name and folder, in ground_truth/other (2)" in said(tmp_path)


def test_a_mask_without_its_image_is_refused(tmp_path):
    draw(tmp_path, *(f"{kind}/{i}.png" for kind in ("normal", "abnormal") for i in range(9)), "abnormal/77_mask.png")
    with pytest.raises(InputError, match=r"77_mask\.png"):
        opened(tmp_path).samples("test")


def test_masks_in_folders_of_patients(tmp_path):
    for kind in ("normal", "abnormal"):
        draw(tmp_path, *(f"{kind}/case{i:02d}/CT/IM1.png" for i in range(12)))
    draw(tmp_path, *(f"abnormal/case{i:02d}/anomaly_mask/IM1.png" for i in range(12)))
    found = [path for path, (label, _) in every(tmp_path).items() if label]
    assert sorted(found) == [f"abnormal/case{i:02d}/CT/IM1.png" for i in range(12)]
    (tmp_path / "abnormal/case03/anomaly_mask/IM1.png").unlink()
    split = "valid" if "case03" in str(by_name(tmp_path, "valid")) else "test"
    files = opened(tmp_path).image_files(split, 1)
    assert [file.path.parts[-3] for file in files if not file.masks] == ["case03"]


def test_names_in_nfc_and_nfd_match(tmp_path):
    for split in ("valid", "test"):
        draw(tmp_path, f"{split}/good/1.png", unicodedata.normalize("NFC", f"{split}/Ungood/é.png"))
        draw(tmp_path, unicodedata.normalize("NFD", f"{split}/masks/Ungood/é.png"))
    assert [mask for label, mask in by_name(tmp_path).values() if label] == [unicodedata.normalize("NFD", "é.png")]


def test_normal_images_with_marks_are_reported(tmp_path):
    for folder in ("img", "masks"):
        draw_classes(tmp_path, f"{{split}}/{{kind}}/{folder}/{{i}}.png", count=1)
    assert "2 normal images have a mask that marks something" in said(tmp_path)


def levels(root: Path, *values: int, **options: object) -> None:
    """Write valid and test sets with masks of four equal stripes of these grey levels."""
    for split in ("valid", "test"):
        draw(root, f"{split}/good/img/1.png", f"{split}/Ungood/img/1.png", f"{split}/Ungood/masks/1.png")
        mask = Image.fromarray(np.repeat(np.array(values, np.uint8), 120).reshape(20, 24))
        if options:
            mask.putpalette(list(options["palette"]))
        mask.save(root / split / "Ungood/masks/1.png")


def test_mask_levels_are_reported_and_selectable(tmp_path):
    levels(tmp_path, 0, 0, 128, 255)
    assert "3 levels: 0 (50.00%), 128 (25.00%), 255 (25.00%); abnormal: levels above 127" in said(tmp_path)
    assert load_mask(opened(tmp_path).samples("test")[1], 24).float().mean() == pytest.approx(0.5, abs=0.03)
    (tmp_path / "knee.json").write_text(json.dumps({"mask_labels": 128}))
    assert load_mask(opened(tmp_path).samples("test")[1], 24).float().mean() == pytest.approx(0.25, abs=0.03)
    assert "abnormal: 255, " in said(tmp_path, mask_labels=(255,))
    levels(tmp_path / "two", 0, 0, 255, 255)
    assert "levels" not in said(tmp_path / "two")


def test_palette_masks_are_read_by_index(tmp_path):
    """Palette masks are read by index: as grey levels, red and dark red would be below the threshold."""
    levels(tmp_path, 0, 1, 2, 2, palette=bytes([0, 0, 0, 128, 0, 0, 255, 0, 0]))
    sample = opened(tmp_path).samples("test")[1]
    assert load_mask(sample, 24).float().mean() == pytest.approx(0.75, abs=0.03)
    sample = opened(tmp_path, mask_labels=(1,)).samples("test")[1]
    assert load_mask(sample, 24).float().mean() == pytest.approx(0.25, abs=0.03)


# --- skipped files and slices ---


def volume(path: Path, slices: int = 6, marks: tuple[int, ...] = (), empty: tuple[int, ...] = ()) -> None:
    """Write a volume, or a label volume if `marks` is given: label 2 in these slices, label 1 in the next ones."""
    values = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 99, (20, 24, slices)).astype(np.int16)
    values[..., list(empty)] = 0
    if marks:
        values = np.zeros_like(values)
        for index in marks:
            values[4:9, 4:9, index], values[4:9, 4:9, index + 1] = 2, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


@pytest.fixture
def scans(tmp_path) -> Path:
    for split in ("valid", "test"):
        volume(tmp_path / split / "normal" / "a.nii.gz", empty=(0, 5))
        volume(tmp_path / split / "abnormal" / "b.nii.gz")
        volume(tmp_path / split / "abnormal" / "b_seg.nii.gz", marks=(2,))
    return tmp_path


@pytest.mark.parametrize(("labels", "abnormal"), [(None, [2, 3]), ((2,), [2]), ((1, 2), [2, 3])])
def test_unmarked_and_blank_slices_are_left_out(scans, labels, abnormal):
    dataset = opened(scans, mask_labels=labels)
    samples = dataset.samples("test")
    assert [(s.label, s.index) for s in samples] == [(0, i) for i in (1, 2, 3, 4)] + [(1, i) for i in abnormal]
    lines = "\n".join(notes.describe(dataset))
    assert "2 slices that show nothing" in lines
    assert f"{6 - len(abnormal)} abnormal images whose mask marks nothing: --unmarked out" in lines


def test_mask_with_more_slices_is_resampled_to_its_volume(scans):
    for path in scans.glob("*/*/b_seg.nii.gz"):
        values = np.zeros((20, 24, 12), np.int16)
        values[4:9, 4:9, 4:8] = 1
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 0.5, 1])), path)
    assert [sample.index for sample in opened(scans).samples("test") if sample.label] == [2, 3]


def test_unmarked_option(tmp_path, scans):
    for split in ("valid", "test"):
        draw(tmp_path / "flat", *(f"{split}/{kind}/img/{i}.png" for kind in ("good", "Ungood") for i in "12"))
        draw(tmp_path / "flat", f"{split}/Ungood/masks/1.png")
        draw(tmp_path / "flat", f"{split}/Ungood/masks/2.png", marked=False)
    for root, total, marked in ((tmp_path / "flat", 2, 1), (scans, 6, 2)):
        for unmarked, labels in ((None, marked), ("out", marked), ("normal", marked), ("abnormal", total)):
            samples = opened(root, unmarked=unmarked).samples("test")
            assert sum(sample.label for sample in samples) == labels
            more = total - marked if unmarked == "normal" else 0
            assert sum(not sample.label for sample in samples) == (2 if root != scans else 4) + more


def test_without_masks_slice_labels_are_reported(scans):
    for path in scans.glob("*/*/b_seg.nii.gz"):
        path.unlink()
    assert "labels are per slice" in said(scans)


def series(root: Path, kind: str, patients: int, slices: int) -> None:
    """Write a flat export: single-frame DICOM files without patients in their names."""
    rng = np.random.default_rng(len(kind))
    (root / kind).mkdir(parents=True)
    for number in range(patients * slices):
        values, patient = rng.integers(0, 900, (20, 24)).astype(np.int16), number % patients
        names = {"PatientID": f"{kind}-{patient}", "SeriesInstanceUID": f"1.2.{len(kind)}.{patient}"}
        dicom(root / kind / f"{number:04d}.dcm", values, **names)


def test_split_by_patients_of_dicom_headers(tmp_path):
    for kind in ("normal", "abnormal"):
        series(tmp_path, kind, patients=12, slices=3)
    dataset = opened(tmp_path)
    valid, test = ({sample.patient for sample in dataset.samples(split)} for split in ("valid", "test"))
    assert len(valid | test) == 24
    assert not valid & test
    assert "24 recognised in 72 PatientIDs" in notes.patients_note(dataset)
    assert len({sample.patient for sample in dataset.shots(3, 3, -1, 0).normal}) == 3


def test_copies_within_a_series_count_once(tmp_path):
    for kind in ("normal", "abnormal"):
        series(tmp_path, kind, patients=12, slices=2)
    first = tmp_path / "normal/0000.dcm"
    (tmp_path / "normal/copy.dcm").write_bytes(first.read_bytes())
    assert len(every(tmp_path)) == 48
    assert "1 copies of another slice" in said(tmp_path)


# --- patients ---


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("00124_80.png", "00124"), ("CNV-6294785-2.jpeg", "6294785"), ("10_340.png", "10"),
        ("test/good/img/3_1.png", "3"),
        ("sub-01_T1w_slice003.jpg", "sub-01"), ("sub-01_ses-20240105_T1w.nii.gz", "sub-01"), ("P012_S03.png", "P012"),
        ("patient12_slice3.png", "patient12"), ("Patient12_slice3.png", "Patient12"), ("A001-0012.png", "A001"),
        ("pat_0001_ax_12.png", "pat_0001"), ("BraTS2021_00124_80.png", "BraTS2021_00124"), ("case_7_2.png", "case_7"),
        ("person1847_bacteria_4716.jpeg", "person1847"), ("IM-0170-0001.jpeg", "0170"), ("10003_left.jpeg", "10003"),
        ("NORMAL2-IM-0390-0001.jpeg", "NORMAL2-IM-0390"), ("eye-77-OD.png", "77"),
        ("TCGA_CS_4941_19960909_1.tif", "TCGA_CS_4941"), ("LIDC-IDRI-0012_slice_045.png", "LIDC-IDRI-0012"),
        ("Mass-Training_P_00001_LEFT_CC.png", "P_00001"),
        *((name, None) for name in (
            "tile_12_40.png", "cell_4_7.png", "roi_3_5.png", "knee_12_3.png", "IMG_0012_L.jpg", "10003_lesion.png",
            "IMG_20240105_101530.jpg", "20240105_3.png", "DSC_0012.jpg", "valid_good_00001.png", "1032.png",
        )),
    ],
)  # fmt: skip
def test_patient_from_a_file_name(name, number):
    assert patient(name) == number


@pytest.mark.parametrize(
    ("below", "number"),
    [("patient01/x.jpg", "patient01"), ("17/x.jpg", "17"), ("sub-02/anat/x.jpg", "sub-02"), ("2024-01-05/x.jpg", None),
     ("axial/00124_80.png", "00124"), ("axial/x.png", None)],
)  # fmt: skip
def test_patient_from_a_folder_name(below, number):
    assert patient(f"normal/{below}", below=below) == number


def test_spellings_of_one_patient(tmp_path):
    assert len({spelled_alike(name) for name in ("Patient12", "patient12", "patient_12", "patient-012")}) == 1
    assert spelled_alike("sub-01") == spelled_alike("sub-1") != spelled_alike("sub-10")
    assert spelled_alike("1-23") != spelled_alike("12-3")
    for kind, form in (("normal", "Patient{i}"), ("abnormal", "patient_{i:02d}")):
        draw(tmp_path, *(f"{kind}/{form.format(i=i)}/{j}.png" for i in range(12) for j in range(2)))
    dataset = opened(tmp_path)
    valid, test = ({sample.patient for sample in dataset.samples(split)} for split in ("valid", "test"))
    assert len(valid | test) == 12
    assert not valid & test
