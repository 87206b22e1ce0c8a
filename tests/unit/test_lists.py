"""Lists of images instead of folders: all formats (also from Excel), lists written from folders, bad lists."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import check, notes
from dataset.medical_few import MedicalDataset
from dataset.readers.images import read
from tests.unit.test_layout import draw, opened, volume
from utils import InputError, run_cli


def listed(root: Path, text: str, name: str = "images.csv") -> MedicalDataset:
    (root / name).write_bytes(text.encode())
    return opened(root)


def found(dataset: MedicalDataset) -> dict[str, list[tuple[object, ...]]]:
    return {
        split: [(s.name, s.label, [mask.name for mask in s.masks], s.patient, s.index) for s in dataset.samples(split)]
        for split in ("valid", "test")
    }


@pytest.fixture
def pictures(tmp_path) -> Path:
    return draw(tmp_path, *(f"scans/{i}.png" for i in range(8)), "masks/4.png", "masks/6.png", "scans/a, b.png")


ROWS = """image,label,mask,patient,split,shot
scans/0.png,0,,p0,train,1
scans/1.png,normal,,p1,test,
scans/4.png,1,masks/4.png,p4,valid,1
scans/6.png,Ungood,masks/6.png,p6,test,0
"""


@pytest.mark.parametrize("form", ["csv", "excel", "tsv", "jsonl"])
def test_all_formats_of_a_list_are_equivalent(pictures, form):
    name, text = "images.csv", ROWS
    if form == "excel":
        text = "\ufeffsep=;\r\n" + ROWS.replace(",", ";").replace("/", "\\").replace("\n", "\r\n") + ";;;;;\r\n\r\n"
        text = text.replace("label", " Label ").replace(";0;;", ";0.0;;")
    elif form == "tsv":
        name, text = "images.tsv", ROWS.replace(",", "\t")
    elif form == "jsonl":
        head, *rows = (line.split(",") for line in ROWS.splitlines())
        name, text = "images.jsonl", "\n".join(json.dumps(dict(zip(head, row, strict=True))) for row in rows)
        text = text.replace('"label": "0"', '"label": 0').replace('"mask": ""', '"mask": null')
    dataset = listed(pictures, text, name)
    assert found(dataset) == {
        "valid": [("scans/0.png", 0, [], "p0", None), ("scans/4.png", 1, ["4.png"], "p4", None)],
        "test": [("scans/1.png", 0, [], "p1", None), ("scans/6.png", 1, ["6.png"], "p6", None)],
    }
    assert dataset.shots(1, 1, 0, 0).names == {"abnormal": ["4.png"], "normal": ["0.png"]}
    assert dataset.shots(1, 1, 0, 0).source.endswith(name)


def test_missing_columns_follow_the_rules_of_folders(tmp_path):
    names = [f"{kind}{i} ({j}).png" for kind in "ab" for i in range(9) for j in range(2)]
    draw(tmp_path, *names, *(f"{name[:-4]}_mask.png" for name in names if name[0] == "b"))
    rows = "".join(f"{name},{int(name[0] == 'b')},{name[:2]},{int(name.startswith('b3 (0'))}\n" for name in names)
    dataset = listed(tmp_path, "image,label,patient,shot\n" + rows)
    assert dataset.pixel_metrics
    valid, test = (set(dataset.samples(split)) for split in ("valid", "test"))
    assert len(valid | test) == 36
    assert not {s.patient for s in valid} & {s.patient for s in test}
    assert "b3" in {s.patient for s in valid}  # all images of a shot's patient are in valid
    assert all(s.masks[0].name == f"{s.path.stem}_mask.png" for s in valid | test if s.label)


def test_list_assigns_the_masks(pictures):
    """An image may have two masks of the same name, and two images may share a mask, unlike in folders."""
    draw(pictures, "other/masks/4.png", "Doe/4_mask.png")
    rows = "scans/4.png,1,masks/4.png|other/masks/4.png,test\nscans/6.png,1,masks/4.png,test\n"
    rows += "scans/7.png,1,Doe/4_mask.png,test\n"
    dataset = listed(pictures, f"image,label,mask,split\nscans/0.png,0,,test\n{rows}")
    assert [len(sample.masks) for sample in dataset.samples("test")] == [0, 2, 1, 1]
    assert notes.masks_note(dataset) == "masks: 2 in folders called masks, 1 in other folders"  # Doe is not named


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("scans/5.png,ill,", "ill"),
        ("scans/5.png,,", "label"),
        ("scans/0.png,1,", "line 2"),
        ("../x.png,0,", "leads out"),
        ("scans/a, b.png,0,test", "quotes"),
        ('"scans/a, b.png,0,test', "quotation mark"),
        ("scans/notes.txt,0,test", "extension"),
    ],
)
def test_bad_lines_are_reported(pictures, line, words):
    text = f"image,label,split\nscans/0.png,0,valid\n\n{line}\n"
    (pictures / "scans/notes.txt").touch()
    with pytest.raises(InputError, match=r"images\.csv") as error:
        listed(pictures, text)
    assert words in str(error.value)
    assert "line 4" in str(error.value)
    listed(pictures, text.replace(line, '"scans/a, b.png",0,test'))


def test_labels_other_than_normal_are_kinds_of_abnormality(tmp_path):
    """With "0" as the normal label, the grades 1 to 4 are kinds of abnormality; "1" is no exception."""
    draw(tmp_path, *(f"{grade}.png" for grade in range(5)))
    (tmp_path / "knee.json").write_text('{"normal": ["0"]}')
    dataset = listed(tmp_path, "image,label,split\n" + "".join(f"{grade}.png,{grade},test\n" for grade in range(5)))
    assert [(sample.label, sample.kind) for sample in dataset.samples("test")] == [
        (0, ""), (1, "1"), (1, "2"), (1, "3"), (1, "4"),
    ]  # fmt: skip


def test_slice_column_selects_a_page(tmp_path):
    pages = [Image.fromarray(np.full((20, 24), value, np.uint8)) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    dataset = listed(tmp_path, "image,label,slice,split\na.tif,0,2,test\na.tif,1,1,test\n")
    assert [read(sample).image.getpixel((0, 0))[0] for sample in dataset.samples("test")] == [30, 20]


def call_check(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run_cli(check.main)
    return left.value.code


def numbered(*forms: str, count: int = 9) -> list[str]:
    return [form.format(i=i, j=i // 2) for form in forms for i in range(count)]


FOLDERS = {
    "kinds": numbered("benign/{i}.png", "cyst/{i}.png", "normal/{i}.png", "benign/{i}_mask.png", "cyst/{i}_mask.png",
                      "cyst/{i}_mask_1.png"),
    "defects": numbered("train/good/{i}.png", "test/good/{i}.png", "test/cut/{i}.png", "test/hole/{i}.png",
                        "ground_truth/cut/{i}_mask.png", "ground_truth/hole/{i}_mask.png"),
    "the paper's": numbered(*(f"{split}/{kind}/img/{{j:05}}_{{i}}.png" for split in ("valid", "test")
                              for kind in ("good", "Ungood")), "valid/Ungood/anomaly_mask/{j:05}_{i}.png",
                            "test/Ungood/anomaly_mask/{j:05}_{i}.png"),
    "patients": numbered("normal/patient{j}/{i}.png", "abnormal/patient{j}/{i}.png"),
}  # fmt: skip


WRITTEN = [("kinds", "csv"), ("defects", "tsv"), ("the paper's", "jsonl"), ("patients", "csv"), ("volumes", "csv")]


@pytest.mark.parametrize(("layout", "form"), WRITTEN)
def test_written_list_is_equivalent_to_the_folders(tmp_path, monkeypatch, layout, form):
    """Samples, masks, patients, kinds and shots (drawn or listed) are the same as those of the folders."""
    root = draw(tmp_path / "knee", *FOLDERS.get(layout, ()))
    if layout == "volumes":
        for name in ("valid/normal/a", "valid/abnormal/b", "test/normal/c", "test/abnormal/d"):
            volume(root / f"{name}.nii.gz")
    elif layout == "the paper's":
        (root / "fewshot_seed").mkdir()
        (root / "fewshot_seed" / "my2-shot.txt").write_text(
            "a-0: 00000_1.png 00001_2.png\nn-0: 00003_6.png 00000_0.png"
        )

    def shown() -> list[object]:
        dataset = opened(root)
        samples = dataset.samples("valid"), dataset.samples("test")
        kinds = [[sample.kind for sample in part] for part in samples]  # == does not compare kinds
        return [samples, kinds, *(dataset.shots(n, n, 0, 0).names for n in (1, 2)), dataset.pixel_metrics]

    before = shown()
    assert call_check(monkeypatch, "--data_root", root, "--write_list", f"images.{form}") in (0, 1)
    assert opened(root).listing == root / f"images.{form}"
    assert shown() == before
    assert call_check(monkeypatch, "--data_root", root, "--write_list", f"images.{form}") == 2  # not overwritten
    call_check(monkeypatch, "--data_root", root, "--write_list", tmp_path / f"above.{form}")
    above = MedicalDataset.open("knee", "", listing=tmp_path / f"above.{form}")
    paths = [sample.path for sample in above.samples("test")]
    assert paths == [sample.path for sample in opened(root).samples("test")]
    (root / f"images.{form}").rename(root / f"mine.{form}")
    call_check(monkeypatch, "--list", root / f"mine.{form}", "--write_list", "images.csv")
    assert shown() == before


def test_names_that_are_not_utf8_are_refused(tmp_path, monkeypatch, capsys):
    """A file name with bytes that are not UTF-8, as from an archive packed on Windows, is refused."""
    draw(tmp_path, *numbered("normal/{i}.png", "abnormal/{i}.png"))
    (tmp_path / "normal/0.png").rename(tmp_path / "normal" / os.fsdecode(b"Gr\xf6\xdfe.png"))
    for form in ("csv", "jsonl"):
        assert call_check(monkeypatch, "--data_root", tmp_path, "--obj", "knee", "--write_list", f"images.{form}") == 2
        assert "rename" in capsys.readouterr().err
        assert not list(tmp_path.glob("*images*"))


def test_written_list_keeps_slices_and_shots(tmp_path, monkeypatch):
    draw(tmp_path, *numbered("{i}.png"))
    volume(tmp_path / "v.nii.gz")
    rows = ["0.png,0,valid,,1", "1.png,0,test,,", "2.png,1,valid,,1", "v.nii.gz,1,test,3,", "v.nii.gz,1,test,1,"]
    (tmp_path / "mine.csv").write_text("\n".join(["image,label,split,slice,shot", *rows]))
    assert call_check(monkeypatch, "--list", tmp_path / "mine.csv", "--obj", "knee", "--write_list", "images.csv") == 0
    before, after = MedicalDataset.open("knee", "", listing=tmp_path / "mine.csv"), opened(tmp_path)
    assert found(before) == found(after)
    assert [sample.name for sample in after.samples("test")] == ["1.png", "v.nii.gz#3", "v.nii.gz#1"]
    assert after.shots(1, 1, 0, 0).names == {"abnormal": ["2.png"], "normal": ["0.png"]}


def test_check_examines_a_list_like_folders(tmp_path, monkeypatch, capsys):
    draw(tmp_path, *numbered("{i}.png", count=6))
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    (tmp_path / "4.png").write_bytes((tmp_path / "3.png").read_bytes())
    rows = [f"{i}.png,{i % 2},{'valid' if i < 2 else 'test'}" for i in range(6)]
    (tmp_path / "images.csv").write_text("\n".join(["image,label,split", *rows]))
    (tmp_path / "knee.json").write_text('{"prompt_name": "knee"}')
    (tmp_path / "notes.txt").touch()
    assert call_check(monkeypatch, "--data_root", tmp_path, "--obj", "knee") == 1
    said = capsys.readouterr().out
    assert "5.png" in said.split("cannot be used")[1] and "4.png = 3.png" in said
    assert "left out: 1\n" in said and "notes.txt" in said  # the list and the description are not counted
    assert [line.split()[2] for line in said.splitlines()[2:6]] == ["1", "1", "2", "2"]


@pytest.mark.filterwarnings("error")  # fails on unclosed files, too
def test_documented_coco_conversion(tmp_path, monkeypatch):
    draw(tmp_path, "scans/a.png", "scans/b.png", "scans/c.png", "scans/d.png")
    names = [f"scans/{name}.png" for name in "abcd"]
    images = [{"id": i, "file_name": name, "width": 24, "height": 20} for i, name in enumerate(names)]
    shapes = [{"image_id": 1, "segmentation": [[2, 2, 9, 2, 9, 9, 2, 9]], "bbox": [2, 2, 7, 7]},
              {"image_id": 3, "bbox": [2, 2, 7, 7]}]  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": shapes}))
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    lines = text[text.index("    import csv, json") :].split("\n\n")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in lines), {})
    entries = opened(tmp_path).files
    assert [(entry.name, len(entry.masks)) for entry in entries] == [
        (names[0], 0), (names[2], 0), (names[1], 1), (names[3], 1),
    ]  # fmt: skip
    assert [np.asarray(Image.open(tmp_path / f"masks/{i}.png")).sum() for i in (1, 3)] == [64 * 255] * 2
