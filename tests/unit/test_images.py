"""Formats for prediction: files that are written here, the real DICOM files that pydicom ships, NIfTI volumes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
import pytest
from PIL import Image

from dataset import load_image
from dataset.medical_few import to_tensor
from dataset.readers import MissingPackageError, ReadOptions, apply_window, file_kind, frames, list_files, to_rgb
from utils import InputError

DICOM = Path(pydicom.data.__file__).parent / "test_files"
GRADIENT = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)


def pixels(path: Path, index: int = 0, **options) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = frames(path, ReadOptions(**options))[index].read()
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "A.TIFF", "a.jpg", "a.jpeg"])
def test_pictures_are_what_training_reads(tmp_path, name):
    Image.fromarray(GRADIENT).save(tmp_path / name)
    (frame,) = frames(tmp_path / name)
    assert frame.index is None
    assert frame.read().size == (48, 32)
    assert (to_tensor(frame.read(), 28) == load_image(tmp_path / name, 28)).all()


def test_sixteen_bits_are_scaled_or_windowed(tmp_path):
    path = tmp_path / "a.png"
    values = np.array([[0, 1000, 2000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 4, 8, 255]
    assert pixels(path, window=(1000, 2000))[0, :, 0].tolist() == [0, 128, 255, 255]
    assert (to_tensor(frames(path)[0].read(), 28) == load_image(path, 28)).all()


def test_pages_are_images(tmp_path):
    pages = [Image.fromarray(GRADIENT + i) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    found = frames(tmp_path / "a.tif")
    assert [frame.index for frame in found] == [0, 1, 2]
    for page, frame in zip(pages, found, strict=True):
        assert (np.asarray(frame.read())[..., 0] == np.asarray(page)).all()
    assert str(found[2]).endswith("a.tif, frame 2")


def test_arrays():
    assert np.asarray(to_rgb(GRADIENT))[..., 1].tolist() == GRADIENT.tolist()
    assert to_rgb(np.zeros((3, 5, 1), np.uint16)).size == (5, 3)
    assert np.asarray(to_rgb(np.full((2, 2, 3), 0.5))).max() == 128
    for bad in (np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8), np.zeros((0, 2), np.uint8),
                np.full((2, 2), 1.5), np.full((2, 2), np.nan), np.zeros((2, 2), np.int64)):  # fmt: skip
        with pytest.raises(InputError):
            to_rgb(bad)


def test_windows_are_dicoms():
    # PS3.3 C.11.2.1.2.1: c = 2048, w = 4096 maps 0 to the lowest and 4095 to the highest output.
    assert apply_window(np.array([0, 4095]), 2048, 4096, "LINEAR").tolist() == [0.0, 1.0]
    assert apply_window(np.array([-100, 0, 100]), 0, 100, "LINEAR_EXACT").tolist() == [0.0, 0.5, 1.0]
    assert apply_window(np.array([0]), 0, 100, "SIGMOID").tolist() == [0.5]


def test_dicom_window_from_the_header_or_given():
    path = DICOM / "MR_small.dcm"
    stored = pydicom.dcmread(path)
    assert (stored.WindowCenter, stored.WindowWidth) == (600, 1600)
    expected = ((stored.pixel_array - 599.5) / 1599 + 0.5).clip(0, 1) * 255
    assert np.abs(pixels(path)[..., 0] - expected).max() <= 0.5 + 1e-6
    other = pixels(path, window=(300, 100))[..., 0]
    assert other[stored.pixel_array < 250].max() == 0
    assert other[stored.pixel_array > 350].min() == 255


def test_dicom_rescale_comes_before_the_window():
    stored = pydicom.dcmread(DICOM / "CT_small.dcm")
    assert stored.RescaleIntercept == -1024
    hounsfield = stored.pixel_array - 1024.0
    shown = pixels(DICOM / "CT_small.dcm", window=(40, 400))[..., 0]
    assert np.abs(shown - ((hounsfield - 40) / 400 + 0.5).clip(0, 1) * 255).max() <= 0.5 + 1e-6


def test_monochrome1_is_inverted(tmp_path):
    plain = pixels(DICOM / "MR_small.dcm").astype(int)
    stored = pydicom.dcmread(DICOM / "MR_small.dcm")
    stored.PhotometricInterpretation = "MONOCHROME1"
    stored.save_as(tmp_path / "inverted")  # no ending either, as PACS exports have it
    assert file_kind(tmp_path / "inverted") == "dicom"
    assert np.abs(pixels(tmp_path / "inverted") + plain - 255).max() <= 1
    assert pixels(DICOM / "693_J2KI.dcm")[256, 0].tolist() == [0, 0, 0]  # air, as 14-bit MONOCHROME1 stores it as white


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("examples_rgb_color.dcm", 1, (320, 240)),
        ("examples_palette.dcm", 1, (800, 350)),
        ("examples_ybr_color.dcm", 30, (320, 240)),
        ("rtdose.dcm", 15, (10, 10)),
        ("SC_rgb_rle_16bit_2frame.dcm", 2, (100, 100)),
        ("MR_small_RLE.dcm", 1, (64, 64)),
        ("image_dfl.dcm", 1, (512, 512)),
    ],
)
def test_dicom_of_many_kinds(name, count, size):
    found = frames(DICOM / name)
    assert len(found) == count
    images = [np.asarray(frame.read()) for frame in found[:: max(count - 1, 1)]]
    assert images[0].shape == (size[1], size[0], 3)
    assert images[0].std() > 5
    if count == 15:
        assert (images[0] != images[-1]).any()


def test_dicom_without_a_decoder():
    with pytest.raises(InputError, match=r"JPEGLSNearLossless_16\.dcm: no decoder for JPEG-LS.*pip install pylibjpeg"):
        pixels(DICOM / "JPEGLSNearLossless_16.dcm")


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "badVR.dcm", "rtplan.dcm", "no_meta.dcm"])
def test_dicom_without_pixels_or_cut_short(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's of the same
        with pytest.raises(InputError, match=name) as caught:
            pixels(DICOM / name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def volume(tmp_path) -> Path:
    """Voxels (x, y, z) that are brighter to the right, to the front and to the top, in another order on disk."""
    x, y, z = np.indices((5, 7, 9))
    values = (x + 10 * y + 100 * z).astype(np.int16)
    stored = values[::-1].transpose(2, 0, 1)  # z, -x, y
    affine = np.array([[0, -1, 0, 4], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
    nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "v.nii.gz")
    return tmp_path / "v.nii.gz"


def test_nifti_slices_stand_as_radiologists_look_at_them(volume):
    sizes = {"axial": (9, (5, 7)), "coronal": (7, (5, 9)), "sagittal": (5, (7, 9))}
    for plane, (count, size) in sizes.items():
        found = frames(volume, ReadOptions(plane=plane))
        assert len(found) == count
        assert found[0].read().size == size
    axial = pixels(volume, 4, window=(430, 70))[..., 0].astype(int)
    assert axial[0, 0] > axial[-1, 0]  # anterior at the top
    assert axial[0, 0] > axial[0, -1]  # the patient's right at the left
    sagittal = pixels(volume, 2, plane="sagittal")[..., 0].astype(int)
    assert sagittal[0, 0] > sagittal[-1, 0]  # superior at the top
    assert sagittal[0, 0] > sagittal[0, -1]  # anterior at the left


def test_nifti_volumes_share_one_range_of_gray(volume):
    assert pixels(volume, 0).min() == 0
    assert pixels(volume, 8).max() == 255
    assert pixels(volume, 0).max() < 40


def test_nifti_with_four_axes_and_with_nothing(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.int16), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(InputError, match=r"four\.nii: 4 axes"):
        frames(tmp_path / "four.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii")
    with pytest.raises(InputError, match=r"nan\.nii: no voxel holds a finite number"):
        pixels(tmp_path / "nan.nii")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "four.nii").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.nii\.gz"):
        frames(tmp_path / "cut.nii.gz")


@pytest.mark.parametrize(("package", "name"), [("pydicom", "a.dcm"), ("nibabel", "a.nii.gz")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingPackageError, match=rf"pip install '?{package}"):
        frames(tmp_path / name)


def test_a_folder_is_walked(tmp_path):
    for name in ("b.png", "a/c.TIF", "a/DICOMDIR", "a/notes.txt", ".hidden/x.png", "a/.x.png", "out/y.png", "v.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a/pacs").write_bytes(bytes(128) + b"DICM")
    os.mkfifo(tmp_path / "a/pipe")
    found = list(list_files([tmp_path], skip=tmp_path / "out"))
    assert [place for _, place in found] == ["b.png", "v.nii.gz", "a/c.TIF", "a/pacs"]
    assert [path for path, _ in found] == [tmp_path / place for _, place in found]
    assert list(list_files([tmp_path / "gone.png"])) == [(tmp_path / "gone.png", "gone.png")]


@pytest.mark.parametrize("name", ["gone.png", "pipe.png", "notes.txt", "folder.png"])
def test_what_is_no_image_is_named(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=name):
        frames(tmp_path / name)
