"""Hostile pictures, masks, volumes and folders: refused in a line, or read as they are meant."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from tests.helpers.attacks import CLOSED, PEAK, UNGOOD, Home, driver, fine, read_json, refused, rows

FIRST = "valid_Ungood_00000.png"
TURNED = 0x0112  # the orientation tag


@pytest.fixture
def data(home, tmp_path) -> Path:
    """A copy of the data, to be spoiled."""
    return home.copy_data(tmp_path)


def scores(command, home: Home, out: Path, *images: Path) -> list[float]:
    """What predict.py says of images, in their order."""
    fine(command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", *images, "--out", out))
    return [float(row["score"]) for row in rows(out)]


def predict_refused(command, home: Home, out: Path, *images: object) -> str:
    """What a predict.py says that must name what it cannot read."""
    done = command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", *images, "--out", out)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def write_dicom(path: Path, values: np.ndarray, **elements: object) -> Path:
    """A DICOM file of one grey picture."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID, header.Modality = SecondaryCaptureImageStorage, generate_uid(), "CT"
    header.Rows, header.Columns = values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = values.dtype.itemsize * 8
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(values.dtype.kind == "i")
    header.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    for name, value in elements.items():
        setattr(header, name, value)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A grey picture (64, 64) of 8 bits that uses all of them."""
    grey = np.add.outer(np.arange(64) * 3, np.arange(64)).astype(np.uint8)
    grey[20:30, 30:50] = 255
    grey[0, 0] = 0
    return grey


# --- masks ---


def test_a_mask_in_the_alpha_channel_is_read_from_there_and_said(command, home, data, tmp_path):
    """White RGBA masks give the pixel AUC of the same masks in grey, not a whole image of lesion."""
    for path in (data / "Brain_AD").glob("*/Ungood/anomaly_mask/*.png"):
        alpha = Image.open(path).convert("L")
        white = Image.new("RGBA", alpha.size, "white")
        white.putalpha(alpha)
        white.save(path)
    fine(command("test.py", *home.test(), "--out_json", tmp_path / "grey.json"))
    fine(command("test.py", *home.test(data), "--out_json", tmp_path / "alpha.json"))
    assert read_json(tmp_path / "alpha.json")["pauc"] == read_json(tmp_path / "grey.json")["pauc"]
    assert "alpha" in fine(command("dataset.check", "--obj", "Brain", "--data_path", data))


def test_a_mask_that_marks_nearly_everything_or_is_constant_is_said(command, home, data, tmp_path):
    """By the check, and by training where it is a shot's."""
    full, empty = (data / UNGOOD / "anomaly_mask" / f"valid_Ungood_0000{i}.png" for i in (0, 1))
    Image.new("L", (64, 64), 255).save(full)
    Image.new("L", (64, 64), 0).save(empty)
    checked = command("dataset.check", "--obj", "Brain", "--data_path", data)
    assert "100% of the image is abnormal (a constant mask)" in checked.stdout
    assert "empty" in checked.stdout
    done = command("train.py", *home.train(tmp_path, data), "--epoch", 1)
    fine(done)
    assert "1 abnormal shots have a mask of over 90% of the image" in done.stderr
    assert "1 abnormal shots have an empty mask" in done.stderr


@pytest.mark.parametrize("kind", ["16 bits", "8 bits"])
def test_a_mask_of_labels_0_and_1_is_refused_and_not_taken_for_empty(command, home, data, tmp_path, kind):
    """In the terms of 8-bit masks, for 16-bit ones as well."""
    path = data / UNGOOD / "anomaly_mask" / FIRST
    labels = (np.asarray(Image.open(path).convert("L")) > 127).astype(np.uint16 if kind == "16 bits" else np.uint8)
    Image.fromarray(labels).save(path)
    refused(command("train.py", *home.train(tmp_path, data)), FIRST, "largest value is 1 of 255", "save 0 and 255")
    assert "largest value is 1 of 255" in command("dataset.check", "--obj", "Brain", "--data_path", data).stdout


def test_an_unreadable_test_mask_is_found_before_training(command, home, data, tmp_path):
    """Not after the first epoch."""
    mask = data / "Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"
    mask.write_bytes(mask.read_bytes()[:60])
    result = command("train.py", *home.train(tmp_path, data))
    refused(result, "test_Ungood_00002.png")
    assert "epoch 1" not in result.stdout
    assert not list(tmp_path.glob("runs/*/last.pth"))


# --- pictures ---


def test_orientation_tags_are_ignored_in_every_format_and_said(command, home, data, tmp_path, picture):
    """One rule for images and masks: PNG, JPEG and TIFF with a tag score as those without."""
    tagged, plain = tmp_path / "tagged", tmp_path / "plain"
    for folder in (tagged, plain):
        folder.mkdir()
    for name, options in (("a.png", {}), ("b.jpg", {"quality": 95}), ("c.tif", {})):
        image, exif = Image.fromarray(picture), Image.Exif()
        exif[TURNED] = 6
        image.save(plain / name, **options)
        if name == "c.tif":
            image.save(tagged / name, tiffinfo={TURNED: 6})
        else:
            image.save(tagged / name, exif=exif, **options)
    assert scores(command, home, tmp_path / "1", tagged) == scores(command, home, tmp_path / "2", plain)

    image = data / UNGOOD / "img" / FIRST
    exif = Image.Exif()
    exif[TURNED] = 6
    Image.open(image).save(image, exif=exif)
    assert "orientation" in fine(command("dataset.check", "--obj", "Brain", "--data_path", data))


def test_an_eps_file_named_png_starts_no_ghostscript(command, home, tmp_path):
    """No other program is started, whatever a file is called."""
    Image.new("L", (20, 20), 80).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    marker = tmp_path / "started"
    code = f"sys.addaudithook(lambda event, args: open({str(marker)!r}, 'a').write(event) if event in "
    script = driver(tmp_path, code + "('subprocess.Popen', 'os.system', 'os.posix_spawn') else None)")
    flags = ["--ckpt", home.ckpt, "--device", "cpu", tmp_path / "x.png", "--out", tmp_path / "out"]
    done = command(script, "predict.py", *flags)
    refused(done)
    assert "x.png: not a readable image" in done.stderr
    assert not marker.exists()


def test_an_image_that_changes_while_it_is_read_is_never_kept_under_its_old_name(command, home, data, tmp_path):
    """Neither in files nor in memory: the run is refused, and the next one has the right tokens."""
    image = data / "Brain_AD/test/good/img/test_good_00001.png"
    other = data / "Brain_AD/test/Ungood/img/test_Ungood_00003.png"
    kept = image.read_bytes()
    code = f"""
import shutil, engine.features as features
load = features.Item.load
def swapped(item, size):
    if item.sample.path.name == "test_good_00001.png":
        shutil.copy({str(other)!r}, item.sample.path)
    return load(item, size)
features.Item.load = swapped
"""
    script = driver(tmp_path, code)
    for cache in ("disk", "ram", "off"):
        image.write_bytes(kept)
        result = command(script, "train.py", *home.train(tmp_path, data), "--cache", cache)
        refused(result, "test_good_00001.png", "changed while it was read")
    image.write_bytes(kept)
    fine(command("train.py", *home.train(tmp_path, data), "--cache", "disk", "--out_json", tmp_path / "out.json"))
    assert read_json(tmp_path / "out.json")["per_image"] == read_json(home.run / "result.json")["per_image"]


def test_memory_stays_small_with_large_pictures(command, home, tmp_path):
    """Only a few decoded pictures are held at a time, however many there are."""
    Image.effect_noise((300, 300), 60).resize((1600, 1600)).save(tmp_path / "large.jpg")  # 8 MB when decoded
    peaks = []
    for many in (3, 30):
        (tmp_path / str(many)).mkdir()
        for i in range(many):
            (tmp_path / str(many) / f"{i}.jpg").symlink_to(tmp_path / "large.jpg")
        flags = ["--ckpt", home.ckpt, "--device", "cpu", "--batch_size", 32, "--no-pictures", tmp_path / str(many)]
        done = command(driver(tmp_path, PEAK), "predict.py", *flags, "--out", tmp_path / "out")
        peaks.append(int(fine(done).split("peak ")[1]))
    assert peaks[1] - peaks[0] < 60_000  # kB; 27 pictures more take 210 MB


# --- DICOM and NIfTI ---


@pytest.mark.parametrize("frames", [2147483647, -1, 20000, 0])
def test_a_false_number_of_frames_is_refused(command, home, tmp_path, picture, frames):
    """Bounded by what the file holds, at once."""
    path = write_dicom(tmp_path / "a.dcm", picture, NumberOfFrames=frames)
    assert f"NumberOfFrames is {frames}" in predict_refused(command, home, tmp_path / "out", path)


def test_a_tiny_volume_that_claims_thousands_of_slices_is_refused(command, home, tmp_path):
    """In one line, and not a slice at a time."""
    nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4)).to_filename(tmp_path / "v.nii")
    content = bytearray((tmp_path / "v.nii").read_bytes())
    content[46:48] = struct.pack("<h", 32767)  # the third side
    (tmp_path / "v.nii").write_bytes(content)
    error = predict_refused(command, home, tmp_path / "out", tmp_path / "v.nii")
    assert error.count("cut short") == 1 + error.count("error: ")  # once in the listing, once as the end


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_says(command, home, tmp_path):
    """A volume of 3 slices with ten gigabytes of zeros behind it is read; one that claims them is refused."""
    values = np.arange(48 * 48 * 2, dtype=np.int16).reshape(48, 48, 2)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "v.nii")
    content = (tmp_path / "v.nii").read_bytes()
    zeros = gzip.compress(bytes(2**26))
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(content) + zeros * 160)
    assert len(scores(command, home, tmp_path / "out", tmp_path / "bomb.nii.gz")) == 2
    claims = bytearray(content)
    claims[42:48] = struct.pack("<3h", 32767, 32767, 5)
    (tmp_path / "claims.nii.gz").write_bytes(gzip.compress(bytes(claims)) + zeros * 160)
    assert "claims.nii.gz" in predict_refused(command, home, tmp_path / "out2", tmp_path / "claims.nii.gz")


def test_signed_and_rescaled_8_bit_dicom_files_are_read_as_their_header_says(command, home, tmp_path, picture):
    """Not clipped to black, slope and intercept not left out: they score as the same picture in PNG."""
    Image.fromarray(picture).save(tmp_path / "a.png")
    signed = (picture.astype(np.int16) - 128).astype(np.int8)
    write_dicom(tmp_path / "b.dcm", signed)
    window = {"WindowCenter": -100 + 2 * 127.5, "WindowWidth": 2 * 255, "VOILUTFunction": "LINEAR_EXACT"}
    write_dicom(tmp_path / "c.dcm", picture, RescaleSlope=2, RescaleIntercept=-100, **window)
    write_dicom(tmp_path / "d.dcm", picture, RescaleSlope=1, RescaleIntercept=-60, WindowCenter=0, WindowWidth=50)
    png, as_signed, rescaled, other = (
        scores(command, home, tmp_path / "out", tmp_path / name)[0] for name in ("a.png", "b.dcm", "c.dcm", "d.dcm")
    )
    assert as_signed == pytest.approx(png, abs=1e-6)
    assert rescaled == pytest.approx(png, abs=1e-3)
    assert other != pytest.approx(png, abs=1e-3)


@pytest.mark.parametrize("elements", [
    {"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": 40, "WindowWidth": -5},
    {"WindowCenter": "", "WindowWidth": ""}, {"RescaleSlope": "", "RescaleIntercept": ""},
])  # fmt: skip
def test_empty_or_impossible_windows_and_slopes_count_as_none(command, home, tmp_path, picture, elements):
    """No traceback, no black picture: they score as the file without them."""
    wide = picture.astype(np.uint16) * 16
    write_dicom(tmp_path / "plain.dcm", wide)
    write_dicom(tmp_path / "odd.dcm", wide, **elements)
    plain = scores(command, home, tmp_path / "1", tmp_path / "plain.dcm")
    assert scores(command, home, tmp_path / "2", tmp_path / "odd.dcm") == plain


def test_the_order_of_a_volume_in_memory_does_not_matter(command, home, tmp_path):
    """A slice of a volume stored x first is a view, not a copy of the whole: the same scores in every plane."""
    values = np.random.default_rng(0).integers(0, 4000, (30, 31, 3)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "v.nii")
    nibabel.Nifti1Image(values[::-1], np.diag([-1, 1, 1, 1])).to_filename(tmp_path / "w.nii")
    for i, plane in enumerate(("axial", "coronal")):
        flags = ["--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", "--plane", plane]
        for name in ("v", "w"):
            fine(command("predict.py", *flags, tmp_path / f"{name}.nii", "--out", tmp_path / f"{name}{i}"))
        one, two = ([row["score"] for row in rows(tmp_path / f"{name}{i}")] for name in ("v", "w"))
        assert one == two


# --- folders and names ---


def test_a_folder_that_cannot_be_read_is_never_left_out(command, home, data, tmp_path):
    """By training, check and prediction alike; exit code 0 is for whole answers only."""
    folder = data / UNGOOD / "img/closed"
    folder.mkdir()
    shutil.copy(data / UNGOOD / "img" / FIRST, folder)
    script = driver(tmp_path, CLOSED)
    refused(command(script, "train.py", *home.train(tmp_path, data)), "closed", "cannot be read")
    checked = command(script, "dataset.check", "--obj", "Brain", "--data_path", data)
    assert checked.returncode == 1
    assert "closed" in checked.stdout
    flags = ["--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", data / UNGOOD / "img", "--out", tmp_path / "out"]
    done = command(script, "predict.py", *flags)
    assert done.returncode == 1
    assert "closed: cannot be read" in done.stderr
    assert len(rows(tmp_path / "out")) == 4


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
def test_a_pipe_or_socket_named_png_is_refused(command, home, data, tmp_path, make: Callable[[Path], None]):
    """In training, check and prediction: neither waited for nor left out without a word."""
    make(data / UNGOOD / "img/x.png")
    refused(command("train.py", *home.train(tmp_path, data)), "x.png", "a pipe, a socket or a device")
    assert command("dataset.check", "--obj", "Brain", "--data_path", data).returncode == 1
    assert "x.png" in predict_refused(command, home, tmp_path / "out", data / UNGOOD / "img")


def test_a_name_of_253_bytes_is_predicted(command, home, data, tmp_path):
    """With overlay, heat map and contours, whose names are cut to what file systems take."""
    path = data / UNGOOD / "img" / f"{'医' * 83}.png"
    shutil.copy(data / UNGOOD / "img" / FIRST, path)
    assert len(os.fsencode(path.name)) == 253
    fine(command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", path, "--out", tmp_path / "out"))
    (row,) = rows(tmp_path / "out")
    assert (tmp_path / "out" / row["overlay"]).is_file()


def test_results_are_no_inputs_of_the_next_prediction(command, home, data, tmp_path):
    """`predict.py in --out in`, twice: the same images, and the same table."""
    folder = data / UNGOOD / "img"
    for _ in range(2):
        fine(command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", folder, "--out", folder))
        assert [Path(row["file"]).name for row in rows(folder)] == [f"valid_Ungood_0000{i}.png" for i in range(4)]
