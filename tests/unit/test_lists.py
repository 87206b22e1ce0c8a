"""A list of images instead of folders, also as Excel writes it; written from folders, and wrong in many ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset import notes
from dataset.medical_few import MedicalDataset
from tests.unit.test_layout import draw, opened
from utils import InputError


def listed(root: Path, text: str, name: str = "images.csv") -> MedicalDataset:
    (root / name).write_bytes(text.encode())
    return opened(root)


def found(dataset: MedicalDataset) -> dict[str, list[tuple[object, ...]]]:
    return {
        split: [(s.name, s.label, s.mask and s.mask.name, s.patient, s.index) for s in dataset.samples(split)]
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
def test_all_forms_of_a_list_mean_the_same(pictures, form):
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
        "valid": [("scans/0.png", 0, None, "p0", None), ("scans/4.png", 1, "4.png", "p4", None)],
        "test": [("scans/1.png", 0, None, "p1", None), ("scans/6.png", 1, "6.png", "p6", None)],
    }
    assert dataset.shots(1, 1, 0, 0).names() == {"abnormal": ["4.png"], "normal": ["0.png"]}
    assert dataset.shots(1, 1, 0, 0).source.endswith(name)


def test_what_is_not_given_follows_the_rules_of_folders(tmp_path):
    names = [f"{kind}{i} ({j}).png" for kind in "ab" for i in range(9) for j in range(2)]
    draw(tmp_path, *names, *(f"{name[:-4]}_mask.png" for name in names if name[0] == "b"))
    rows = "".join(f"{name},{int(name[0] == 'b')},{name[:2]},{int(name.startswith('b3 (0'))}\n" for name in names)
    dataset = listed(tmp_path, "image,label,patient,shot\n" + rows)
    assert dataset.pixel_metrics
    valid, test = (set(dataset.samples(split)) for split in ("valid", "test"))
    assert len(valid | test) == 36
    assert not {s.patient for s in valid} & {s.patient for s in test}
    assert "b3" in {s.patient for s in valid}  # a shot is in valid, and so is its patient
    assert all(s.mask.name == f"{s.path.stem}_mask.png" for s in valid | test if s.label)


def test_masks_are_whose_the_list_says(pictures):
    """Two of one image with the same name, and one of two images: folders would not be so clear."""
    draw(pictures, "other/masks/4.png", "Doe/4_mask.png")
    rows = "scans/4.png,1,masks/4.png|other/masks/4.png,test\nscans/6.png,1,masks/4.png,test\n"
    rows += "scans/7.png,1,Doe/4_mask.png,test\n"
    dataset = listed(pictures, f"image,label,mask,split\nscans/0.png,0,,test\n{rows}")
    assert [len(sample.more_masks) for sample in dataset.samples("test")] == [0, 1, 0, 0]
    assert notes.masks_note(dataset) == "masks: 2 in folders called masks, 1 in other folders"  # names no patient


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("scans/5.png,ill,", "ill"),
        ("scans/5.png,,", "label"),
        ("scans/0.png,1,", "line 2"),
        ("../x.png,0,", "leads out"),
        ("scans/a, b.png,0,test", "quotes"),
        ('"scans/a, b.png,0,test', "csv"),
    ],
)
def test_a_wrong_line_is_named(pictures, line, words):
    text = f"image,label,split\nscans/0.png,0,valid\n\n{line}\n"
    with pytest.raises(InputError, match=r"images\.csv") as error:
        listed(pictures, text)
    assert words in str(error.value)
    assert "line 4" in str(error.value) or words == "csv"
    listed(pictures, text.replace(line, '"scans/a, b.png",0,test'))
