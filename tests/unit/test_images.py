"""The image reader: picture files, DICOM files of pydicom and NIfTI volumes; and the mask reader."""

import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
import pytest
from PIL import Image

from dataset.readers import grey, images, masks
from dataset.readers.grey import Frame, NoImageError, ReadOptions
from dataset.readers.images import Sample, file_kind, frames, is_deep, load_image, read, to_tensor
from dataset.readers.masks import load_grey_mask, load_mask
from utils import InputError

DICOM = Path(pydicom.data.__file__).parent / "test_files"
PHOTOMETRIC = 262
GRADIENT = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)


def pixels(path: Path, index: int = 0, **options) -> np.ndarray:
    """Pixels of an image in a file, (H, W, 3) uint8."""
    image = read(frames(path, ReadOptions(**options))[index]).image
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "A.TIFF", "a.jpg", "a.webp", "A.GIF", "a.jfif", "a.jp2"])
def test_every_format_is_read_as_in_training(tmp_path, name):
    kind = {"jfif": "JPEG", "jp2": "JPEG2000"}.get(name.split(".")[1].lower())
    Image.fromarray(GRADIENT).convert("RGB").save(tmp_path / name, kind, quality=95)
    (frame,) = frames(tmp_path / name)
    assert frame.index is None
    assert np.abs(np.asarray(read(frame).image)[..., 0].astype(int) - GRADIENT).max() < 30
    assert (to_tensor(read(frame).image, 28) == load_image(tmp_path / name, 28)).all()


def test_sixteen_bits_are_scaled_or_windowed(tmp_path):
    path = tmp_path / "a.png"
    values = np.array([[0, 1000, 2000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 4, 8, 255]
    assert pixels(path, window=(1000, 2000))[0, :, 0].tolist() == [0, 128, 255, 255]
    Image.fromarray(GRADIENT.astype(np.uint16) * 16).save(path)
    assert "a 12-bit picture in a 16-bit file" in read(path).notes["dark"]
    assert "dark" not in read(frames(path, ReadOptions("full"))[0]).notes
    assert (to_tensor(read(frames(path)[0]).image, 28) == load_image(path, 28)).all()


def test_each_page_is_an_image(tmp_path):
    pages = [Image.fromarray(GRADIENT + i) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    found = frames(tmp_path / "a.tif")
    assert [frame.index for frame in found] == [0, 1, 2]
    for page, frame in zip(pages, found, strict=True):
        assert (np.asarray(read(frame).image)[..., 0] == np.asarray(page)).all()
    assert str(found[2]).endswith("a.tif, frame 2")


def test_dicom_window_from_the_header_or_given(tmp_path):
    path = DICOM / "MR_small.dcm"
    stored = pydicom.dcmread(path)
    assert (stored.WindowCenter, stored.WindowWidth) == (600, 1600)
    expected = ((stored.pixel_array - 599.5) / 1599 + 0.5).clip(0, 1) * 255
    assert np.abs(pixels(path)[..., 0] - expected).max() <= 0.5 + 1e-6
    hounsfield = pydicom.dcmread(DICOM / "CT_small.dcm").pixel_array - 1024.0  # its RescaleIntercept
    shown = pixels(DICOM / "CT_small.dcm", window=(40, 400))[..., 0]
    assert np.abs(shown - ((hounsfield - 40) / 400 + 0.5).clip(0, 1) * 255).max() <= 0.5 + 1e-6
    narrow = dicom(tmp_path / "a.dcm", GRADIENT, RescaleSlope="0.001", WindowCenter="0.1", WindowWidth="0.2")
    assert np.abs(pixels(narrow)[..., 0] - (GRADIENT * 0.001 / 0.2).clip(0, 1) * 255).max() <= 1


def test_monochrome1_is_inverted(tmp_path):
    plain = pixels(DICOM / "MR_small.dcm").astype(int)
    stored = pydicom.dcmread(DICOM / "MR_small.dcm")
    stored.PhotometricInterpretation = "MONOCHROME1"
    stored.save_as(tmp_path / "inverted")  # without an extension, as in PACS exports
    assert file_kind(tmp_path / "inverted") == "dicom"
    assert np.abs(pixels(tmp_path / "inverted") + plain - 255).max() <= 1
    assert pixels(DICOM / "693_J2KI.dcm")[256, 0].tolist() == [0, 0, 0]  # air, stored as white: 14-bit MONOCHROME1


def test_voi_lut_of_the_header_is_applied(tmp_path):
    table, values = pydicom.Dataset(), GRADIENT.astype(np.uint16) * 16
    table.add_new("LUTDescriptor", "US", [4096, 40, 8])
    elements = {"WindowCenter": None, "WindowWidth": None, "VOILUTSequence": [table]}
    for kind in ("u1", "<u2"):  # 8-bit entries may be packed
        table.add_new("LUTData", "OW", (np.arange(4096) // 16).astype(kind).tobytes())
        shown = pixels(dicom(tmp_path / "a.dcm", values, **elements))[..., 0]
        assert np.array_equal(shown, (values.astype(int) - 40).clip(0) // 16)
    table.LUTData = b""
    with pytest.raises(InputError, match=r"a\.dcm"):
        frames(dicom(tmp_path / "a.dcm", values, **elements))


@pytest.fixture
def volume(tmp_path) -> Path:
    """A volume (x, y, z) that is brighter to the right, front and top; its axes are stored in another order."""
    x, y, z = np.indices((5, 7, 9))
    values = (x + 10 * y + 100 * z).astype(np.int16)
    stored = values[::-1].transpose(2, 0, 1)  # z, -x, y
    affine = np.array([[0, -1, 0, 4], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
    nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "v.nii.gz")
    return tmp_path / "v.nii.gz"


def test_nifti_slices_have_radiological_orientation(volume):
    sizes = {"axial": (9, (5, 7)), "coronal": (7, (5, 9)), "sagittal": (5, (7, 9))}
    for plane, (count, size) in sizes.items():
        found = frames(volume, ReadOptions(plane=plane))
        assert len(found) == count
        assert read(found[0]).image.size == size
    axial = pixels(volume, 4, window=(430, 70))[..., 0].astype(int)
    assert axial[0, 0] > axial[-1, 0]  # anterior at the top
    assert axial[0, 0] > axial[0, -1]  # the patient's right at the left
    sagittal = pixels(volume, 2, plane="sagittal")[..., 0].astype(int)
    assert sagittal[0, 0] > sagittal[-1, 0]  # superior at the top
    assert sagittal[0, 0] > sagittal[0, -1]  # anterior at the left


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


# --- formats ---


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("name", ["x.tif", "x.jpg", "x.png", "x.webp"])
def test_orientation_is_ignored_in_every_format(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "x.webp" else {"quality": 100} if name == "x.jpg" else {}
    Image.fromarray(GRADIENT).save(tmp_path / name, exif=exif, **options)
    picture = read(tmp_path / name)
    assert picture.orientation == orientation
    assert picture.image.size == (48, 32)
    assert images.reader_of(tmp_path / name).sizes(Frame(tmp_path / name)) == {(48, 32)}
    assert np.abs(np.asarray(picture.image)[..., 0].astype(int) - GRADIENT).max() <= 2
    sample = Sample(tmp_path / name, 1, (tmp_path / name,), "x")
    assert (masks.read_mask(sample).image.size) == (48, 32)


@pytest.mark.parametrize(("kind", "bits"), [(np.uint16, 16), (np.int32, 32), (np.float32, 32)])
def test_eight_bit_values_in_wider_files_are_read_as_published(tmp_path, kind, bits):
    path, plain = tmp_path / "x.tif", tmp_path / "plain.png"
    Image.fromarray(GRADIENT.astype(kind)).save(path)
    Image.fromarray(GRADIENT).save(plain)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image.convert("L")), GRADIENT)  # the conversion of the published program
    assert load_image(path, 16).equal(load_image(plain, 16))
    assert f"8-bit values in a {bits}-bit file" in read(path).notes["wide"]
    assert load_mask(Sample(plain, 1, (path,), "x"), 16).equal(load_mask(Sample(plain, 1, (plain,), "x"), 16))


def sixteen_bit_png(path: Path, values: np.ndarray) -> Path:
    """Write (H, W, C) uint16 values (grey and alpha, RGB or RGBA) as PNG, which Pillow cannot do."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_twelve_bit_colours_or_alpha_follow_the_window_and_are_noted(tmp_path, channels):
    grey = GRADIENT.astype(np.uint16) * 16 + 7
    alpha = np.full_like(grey, 65535)
    path = sixteen_bit_png(
        tmp_path / "x.png", np.stack({2: [grey, alpha], 3: [grey] * 3, 4: [*[grey] * 3, alpha]}[channels], -1)
    )
    assert "12-bit" in read(path).notes["dark"]
    shown = pixels(path, window=(2048, 4096))[..., 0]
    assert np.abs(shown - grey / 4096 * 255).max() <= 0.5 + 1e-6
    full = sixteen_bit_png(tmp_path / "full.png", np.stack([grey * 16] * 3, -1))
    assert np.abs(pixels(full)[..., 1] - grey * 16 / 257).max() <= 0.5 + 1e-6


def test_mask_labels_of_a_16_bit_rgb_mask(tmp_path):
    values = np.repeat(np.kron([[0, 514], [257 * 9, 0]], np.ones((4, 4)))[..., None], 3, axis=2).astype(np.uint16)
    path = sixteen_bit_png(tmp_path / "x.png", values)
    sample = Sample(path, 1, (path,), "x", options=ReadOptions(mask_labels=(9,)))
    assert np.argwhere(load_mask(sample, 8).numpy()).tolist() == [[y, x] for y in range(4, 8) for x in range(4)]


def test_16_bit_tiff_with_white_is_zero(tmp_path):
    values, path = GRADIENT.astype(np.uint16) * 257, tmp_path / "x.tif"
    Image.fromarray(values).save(path, tiffinfo={PHOTOMETRIC: 1})
    assert np.array_equal(pixels(path)[..., 0], GRADIENT)
    data = path.read_bytes()
    entry = struct.pack("<HHI", PHOTOMETRIC, 3, 1)
    assert data.count(entry) == 1
    path.write_bytes(data.replace(entry + b"\1\0", entry + b"\0\0"))
    assert np.array_equal(pixels(path)[..., 0], 255 - GRADIENT)
    assert np.array_equal(pixels(path, window=(32767.5, 65535))[..., 0], 255 - GRADIENT)


@pytest.mark.parametrize("highest", [1, 2, 255])
def test_fractional_values_need_a_window(tmp_path, highest):
    Image.fromarray(np.linspace(0, highest, 99, dtype=np.float32).reshape(9, 11)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: .*--window"):
        read(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif", window="full").max() == 255


def test_dark_image_of_a_deep_data_set_is_not_read_as_8_bit(tmp_path):
    """The bit depth is decided for all images of a data set, and is part of the hash of an image."""
    for name, factor in (("dark", 1), ("bright", 16)):
        Image.fromarray(GRADIENT.astype(np.uint16) * factor).save(tmp_path / f"{name}.png")
    dark, bright = (tmp_path / f"{name}.png" for name in ("dark", "bright"))
    assert (is_deep([dark]), is_deep([dark, bright]), is_deep([])) == (False, True, False)
    alone, beside = (Frame(dark, options=ReadOptions(deep=deep)) for deep in (False, True))
    assert np.array_equal(np.asarray(read(alone).image)[..., 0], GRADIENT)
    assert np.asarray(read(beside).image).max() == 1
    assert read(alone).sha256 != read(beside).sha256


def test_slices_without_content_are_recognised(tmp_path):
    values = np.zeros((20, 20, 3), np.int16)
    values[5:9, 5:9, 1] = 900
    values[..., 2] = np.random.default_rng(0).integers(0, 20, (20, 20))  # weak noise, relative to the volume
    path = save_nifti(tmp_path / "v.nii", values)
    assert [read(frame).is_blank for frame in frames(path)] == [True, False, True]


def test_grey_levels_are_stretched_over_their_range():
    values = np.append(np.nan, np.arange(1.0, 1001.0))
    assert grey.stretch(values, 1, 1000)[[0, 1, -1]].tolist() == [0, 0, 1]
    whole, robust, _ = grey.Range.measure([values], "it", "x.tif")
    assert whole == (1, 1000) and robust == pytest.approx(np.nanpercentile(values, (0.5, 99.5)))


# --- masks ---


def test_grey_masks_of_the_published_program(tmp_path, golden):
    data = golden("grey_masks")
    for index, values in enumerate(data["raw"]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(values).save(path)
        sample = Sample(path, 1, (path,), "x")
        grey = load_grey_mask(sample, 48)
        assert grey.shape == (1, 48, 48)
        assert np.array_equal(grey.numpy() > 0.5, data["test_masks"][index])
        assert np.array_equal(load_mask(sample, 48).numpy(), data["test_masks"][index, 0])
        for above in (0, 25, 127):
            assert np.array_equal(
                load_mask(sample, 75, above).numpy(), np.array(Image.fromarray(values).resize((75, 75), 0)) > above
            )
    assert not load_grey_mask(Sample(path, 0, (), "x"), 48).any()


@pytest.mark.parametrize("colour", [0, 255])
def test_masks_in_the_alpha_channel(tmp_path, colour):
    lesion = (np.add.outer(np.arange(20), np.arange(20)) > 25).astype(np.uint8) * 255
    rgba = np.dstack([*[np.full_like(lesion, colour)] * 3, lesion])
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "mask.png", 1, (tmp_path / "mask.png",), "x")
    assert np.array_equal(load_mask(sample, 20).numpy(), lesion > 0)
    assert "alpha channel" in masks.read_mask(sample).notes["alpha"]
    # If the colours hold the mask, the alpha channel is ignored, as usual.
    Image.fromarray(np.dstack([*[lesion] * 3, 255 - lesion // 2])).save(tmp_path / "mask.png")
    assert np.array_equal(load_mask(sample, 20).numpy(), lesion > 0)


def test_masks_of_another_size_are_resized_in_published_data(tmp_path, capsys):
    Image.fromarray(GRADIENT).save(tmp_path / "x.png")
    Image.fromarray(GRADIENT).resize((20, 20)).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "x.png", 1, (tmp_path / "mask.png",), "x", published=True)
    grey.warn_once.cache_clear()
    assert load_mask(sample, 16).any()
    assert load_mask(sample, 32).any()
    assert capsys.readouterr().err.count("masks of another size than their images") == 1


# --- DICOM ---


def dicom(path: Path, values: np.ndarray, **elements: object) -> Path:
    """Write a CT file of pydicom with other pixels and elements; None removes an element."""
    header = pydicom.dcmread(DICOM / "CT_small.dcm")
    header.Rows, header.Columns = values.shape[-2:]
    header.BitsAllocated = header.BitsStored = values.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(values.dtype.kind == "i")
    header.RescaleSlope, header.RescaleIntercept = 1, 0
    header.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    for name, value in elements.items():
        if value is None:
            delattr(header, name) if name in header else None
        else:
            setattr(header, name, value)
    header.save_as(path)
    return path


def test_empty_dicom_elements_count_as_absent(tmp_path):
    values = GRADIENT.astype(np.uint16) * 3
    names = ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept")
    empty, absent = (
        pixels(dicom(tmp_path / f"{value!r}.dcm", values, SeriesInstanceUID=None, **dict.fromkeys(names, value)))
        for value in ("", None)
    )
    assert np.array_equal(empty, absent)


@pytest.mark.parametrize("count", [2_147_483_647, 0])
def test_impossible_number_of_frames_is_refused(tmp_path, count):
    path = dicom(tmp_path / "a.dcm", GRADIENT, NumberOfFrames=count)
    with pytest.raises(InputError, match=rf"NumberOfFrames is {count}, but the file holds at most \d+$"):
        frames(path)


def test_series_has_one_intensity_range(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        values = rng.integers(100 * index, 100 * index + 50, (16, 16)).astype(np.uint16)
        dicom(tmp_path / f"{index}.dcm", values, SeriesInstanceUID="1.2.3")
    dicom(tmp_path / "other.dcm", np.full((16, 16), 9999, np.uint16), SeriesInstanceUID="1.2.4")
    (tmp_path / "damaged.dcm").write_bytes(bytes(128) + b"DICM" + b"x" * 50)
    first, last = (read(tmp_path / f"{index}.dcm") for index in (0, 3))
    assert np.asarray(first.image).max() < 50
    assert np.asarray(last.image).max() == 255
    assert "the whole range of its series (4 files)" in last.notes["window"]
    assert Sample(tmp_path / "3.dcm", 0, (), "x").content_hash() == last.sha256
    # The image depends on the other files of its series, and so does its hash.
    (tmp_path / "0.dcm").unlink()
    again = read(tmp_path / "3.dcm")
    assert again.sha256 != last.sha256
    assert np.asarray(again.image).mean() != np.asarray(last.image).mean()


@pytest.mark.parametrize(
    ("elements", "size", "said"),
    [
        ({"PixelSpacing": [2.5, 0.5]}, (48, 160), "pixels 5 times as high as wide"),
        ({"PixelSpacing": [0.5, 1.0]}, (96, 32), ""),
        ({"PixelSpacing": None, "PixelAspectRatio": ["1", "4"]}, (192, 32), "pixels 4 times as wide as high"),
        ({"PixelSpacing": ["", ""]}, (48, 32), ""),
        ({"PixelSpacing": [0, 1]}, (48, 32), ""),
    ],
)
def test_dicom_slices_get_square_pixels(tmp_path, elements, size, said):
    path = dicom(tmp_path / "a.dcm", GRADIENT, **elements)
    picture = read(path)
    assert (picture.image.size, picture.stored) == (size, (48, 32))
    assert picture.notes.get("pixels", "").startswith(said)
    assert ("pixels" in picture.notes) == bool(said)
    expected = Image.fromarray(GRADIENT).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected))
    for fits in {size, (48, 32)}:  # a mask may have either size
        Image.new("L", fits, 255).save(tmp_path / "mask.png")
        assert load_mask(Sample(path, 1, (tmp_path / "mask.png",), "x"), 8).all()
    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="but its image has"):
        load_mask(Sample(path, 1, (tmp_path / "mask.png",), "x"), 8)


def test_dicom_file_cut_before_rows_counts_as_damaged(tmp_path):
    data = dicom(tmp_path / "a.dcm", GRADIENT).read_bytes()
    (tmp_path / "a.dcm").write_bytes(data[: data.index(struct.pack("<HH", 0x28, 0x10))])
    with pytest.raises(InputError, match=r"a\.dcm: .*no Rows") as caught:
        frames(tmp_path / "a.dcm")
    assert not isinstance(caught.value, NoImageError)


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    Image.fromarray(GRADIENT.astype(np.uint16) * 9).save(tmp_path / "a.png")
    monkeypatch.setattr(grey, "to_rgb", lambda values: values.no_such_attribute)
    for path in (tmp_path / "a.png", dicom(tmp_path / "a.dcm", GRADIENT)):
        with pytest.raises(AttributeError):
            read(path)


# --- notes on masks ---


@pytest.mark.parametrize(
    ("greys", "kind"),
    [((0,), "empty"), ((0, 1), "labels"), ((0, 127), "labels"), ((0, 128), None), ((0, 255), None), ((255,), "full")],
)
def test_notes_on_unusual_masks(tmp_path, greys, kind):
    """Abnormal pixels are above 127, so a mask whose maximum is 127 marks nothing and is reported."""
    values = np.full((20, 20), greys[0], np.uint8)
    values[5:9, 5:9] = greys[-1]
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = masks.read_mask(Sample(tmp_path / "mask.png", 1, (tmp_path / "mask.png",), "x"))
    assert list(masks.mask_notes(mask)) == ([kind] if kind else [])
