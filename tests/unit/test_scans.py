"""Slices of scans and their metadata, heat volumes in the space of the scan, and masks of volumes."""

import gzip
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydicom import dcmread

from dataset.readers.grey import ReadOptions, warn_once
from dataset.readers.images import Sample, frames, read
from dataset.readers.masks import read_mask
from engine.heat_volumes import write_volume
from engine.predictor import Prediction
from engine.scans import MARK, is_own_result, list_entries, picture_name
from tests.helpers.scans import dicom_series, save_turned
from utils import InputError

SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
# The sides of the patient (right, left, anterior, posterior, superior, inferior) at the top left corner of an image.
TOP_LEFT = {"axial": "RA", "coronal": "RS", "sagittal": "AS"}


def listed(*paths, plane="axial"):
    return list_entries(list(map(str, paths)), ReadOptions(None, plane), hidden=False)


def written(out, entries, heat, heat_range=(0.0, 4.0), anonymous=False):
    """Names returned by `write_volume` for these slices, with the heat maps `heat(entry)`."""
    slices = [(e, Prediction(0.0, None, heat(e), read(e).stored)) for e in entries]
    return write_volume(out, slices, SimpleNamespace(layers=4, heat_range=heat_range), anonymous)


def volume(path, axes="RAS", shape=(6, 8, 5), zooms=(2.0, 3.0, 4.0)):
    """Write a volume with these stored axes and an affine; return it as a nibabel image."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = (-5, -7, -9)
    save_turned(path, nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine), axes)
    return nibabel.load(path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("plane", list(SIDES))
def test_heat_volume_has_the_orientation_of_the_scan(tmp_path, axes, plane):
    source = volume(tmp_path / "v.nii.gz", axes)
    inside = frames(tmp_path / "v.nii.gz", ReadOptions(None, plane))
    heat = np.zeros((16, 16), np.float32)
    heat[:1, :1] = 3.0  # top left
    (second,) = (entry for entry in listed(tmp_path / "v.nii.gz", plane=plane).entries if entry.index == 1)
    assert written(tmp_path, [second], lambda _: heat) == ["v_heat.nii.gz"]
    result = nibabel.load(tmp_path / "v_heat.nii.gz")
    assert result.shape == source.shape
    np.testing.assert_allclose(result.affine, source.affine)
    assert result.header.get_zooms() == source.header.get_zooms()
    values = result.get_fdata()
    place = np.unravel_index(values.argmax(), values.shape)
    world = (result.affine @ [*place, 1])[:3]
    low, high = (5, 7, 9), (2 * 5 - 5, 3 * 7 - 7, 4 * 4 - 9)
    for axis, side in zip("RAS", range(3), strict=True):
        if axis in TOP_LEFT[plane]:
            assert world[side] == pytest.approx(high[side])
        else:  # the slicing axis: the second slice
            assert world[side] == pytest.approx(-low[side] + (2, 3, 4)[side])
    says = [frame.slice for frame in inside]
    assert {slice_.edges for slice_ in says} == {SIDES[plane]}
    axis = ("sagittal", "coronal", "axial").index(plane)
    steps = np.diff([slice_.position for slice_ in says])
    np.testing.assert_allclose(steps, (2, 3, 4)[axis])
    assert says[1].position == pytest.approx(world[axis])


def test_volumes_with_time_points_and_without_orientation(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 3, 2), np.int16), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    image.to_filename(tmp_path / "v.nii")
    inside = frames(tmp_path / "v.nii")
    says = [frame.slice for frame in inside]
    assert len(says) == 6
    assert {slice_.edges for slice_ in says} == {""}  # the sides are unknown
    assert [slice_.position for slice_ in says[:3]] == [slice_.position for slice_ in says[3:]]
    entries = listed(tmp_path / "v.nii").entries
    (name,) = set(written(tmp_path, entries, lambda entry: np.full((3, 3), entry.index / 2, np.float32)))
    values = nibabel.load(tmp_path / name).get_fdata()
    np.testing.assert_allclose(values[0, 0].T.ravel(), np.arange(6) / 2, atol=1e-3)


def test_dicom_slices_are_sorted_by_position_and_know_their_sides(tmp_path):
    paths = dicom_series(tmp_path / "series", volume(tmp_path / "v.nii.gz"), shuffle=3)
    entries = listed(tmp_path / "series").entries
    assert [entry.path for entry in entries] == paths  # sorted from foot to head, not by name
    assert sorted(paths) != paths
    assert [entry.slice.instance_number for entry in entries] == [1, 2, 3, 4, 5]
    assert np.diff([entry.slice.position for entry in entries]).tolist() == [4.0] * 4
    assert {(entry.slice.plane, entry.slice.edges, entry.slice.patient_id) for entry in entries} == {
        ("axial", "RLAP", "P1")
    }
    assert {(entry.number, entry.count) for entry in entries} == {(i, 5) for i in range(1, 6)}


def test_gaps_and_localizers_are_reported(tmp_path):
    paths = dicom_series(tmp_path / "series", volume(tmp_path / "v.nii.gz"))
    for kept, gaps in ((paths[:3], 0), ([*paths[:2], paths[3]], 1)):
        notes = listed(*kept).remarks
        assert len(notes) == gaps
    assert notes[0].startswith("series ")
    assert "8 mm" in notes[0] and "4 mm" in notes[0]
    overview = dcmread(paths[4])
    overview.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    overview.save_as(paths[4])
    (note,) = listed(*paths).remarks
    assert "1 of 5 images" in note and "localizer" in note


def test_rotating_projections_have_no_gaps_and_clips_stay_together(tmp_path):
    paths = dicom_series(tmp_path / "series", volume(tmp_path / "v.nii.gz"))
    for number, path in enumerate(paths):
        header = dcmread(path)
        turn = 0.04 * number**2
        header.ImageOrientationPatient = [float(np.cos(turn)), float(np.sin(turn)), 0, 0, 0, -1]
        header.save_as(path)
    assert listed(*paths).remarks == []
    header.NumberOfFrames, header.PixelData = 3, bytes(3 * 2 * header.Rows * header.Columns)
    for path in paths:
        header.save_as(path)
    assert [entry.index for entry in listed(*paths).entries] == [0, 1, 2] * 5


def test_bit_depth_is_decided_for_all_inputs(tmp_path):
    for name, high in (("dark", 200), ("bright", 4000)):
        Image.fromarray(np.full((4, 4), high, np.uint16)).save(tmp_path / f"{name}.png")
    assert {entry.options.deep for entry in listed(tmp_path).entries} == {True}
    (tmp_path / "bright.png").unlink()
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)  # a 16-bit map of an earlier run is not an input
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(tmp_path / "dark_raw.png", pnginfo=mark)
    assert [entry.options.deep for entry in listed(tmp_path).entries] == [False]


def test_heat_series_has_new_uids_and_the_heat_values(tmp_path):
    paths = dicom_series(tmp_path / "series", volume(tmp_path / "v.nii.gz"))
    heat = np.linspace(0, 4, 64, dtype=np.float32).reshape(8, 8)
    for hidden in (False, True):
        names = written(tmp_path / f"h{hidden}", listed(*paths).entries, lambda _: heat, (1.0, 3.0), hidden)
        results = [dcmread(tmp_path / f"h{hidden}" / name) for name in sorted(names)]
        sources = [dcmread(path) for path in paths]
        assert len({result.SOPInstanceUID for result in results} | {s.SOPInstanceUID for s in sources}) == 10
        assert {result.SeriesInstanceUID for result in results}.isdisjoint({s.SeriesInstanceUID for s in sources})
        assert {result.StudyInstanceUID == sources[0].StudyInstanceUID for result in results} == {not hidden}
        assert ("Doe" in str(results[0])) != hidden
        for result, source in zip(results, sources, strict=True):
            assert result.ImagePositionPatient == source.ImagePositionPatient
            assert "research use" in result.SeriesDescription
            assert "Research use" in result.DerivationDescription
            values = result.pixel_array * float(result.RescaleSlope) / 1000
            assert values.shape == (source.Rows, source.Columns)
            expected = Image.fromarray(heat).resize((source.Columns, source.Rows), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(values, np.asarray(expected), atol=1e-4)
            assert (float(result.WindowCenter), float(result.WindowWidth)) == (2000.0, 2000.0)


def test_picture_names_are_unique_and_not_too_long(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "one.png")
    (frame,) = frames(tmp_path / "one.png")
    places = ("病" * 83 + ".png", "病" * 83 + ".png", "e" * 400 + "/a.png", "a/b.png", "a__b.png", "-x.png")
    used = set[str]()
    drawn = [picture_name(frame, place, used)[1] for place in places]
    assert len(set(drawn)) == len(drawn)
    assert all(len(f".{name}_contours.json.4194304.tmp".encode()) <= 255 for name in drawn)


def test_own_results_are_recognised(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "mine_overlay.png")  # not written by this project
    assert not is_own_result(tmp_path / "mine_overlay.png")
    (tmp_path / "cut_heat.nii.gz").write_bytes(gzip.compress(b"x" * 900)[:-9])
    assert not is_own_result(tmp_path / "cut_heat.nii.gz")
    volume(tmp_path / "v.nii.gz")
    written(tmp_path, listed(tmp_path / "v.nii.gz").entries[:1], lambda _: np.zeros((4, 4), np.float32))
    assert is_own_result(tmp_path / "v_heat.nii.gz")
    assert not is_own_result(tmp_path / "v.nii.gz")


@pytest.mark.parametrize(("kind", "shape"), [("Nifti1Image", (6, 8)), ("Nifti2Image", (6, 8, 5))])
def test_heat_volume_copies_no_names_from_the_header(tmp_path, kind, shape):
    source = getattr(nibabel, kind)(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4))
    source.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane" * 50))
    for name in {"aux_file", "intent_name", "db_name"} & set(source.header):
        source.header[name] = "Doe^Jane"
    source.to_filename(tmp_path / "named.nii.gz")
    (name,) = written(tmp_path, listed(tmp_path / "named.nii.gz").entries[:1], lambda _: np.full((4, 4), 3, np.float32))
    assert b"Doe" not in gzip.decompress((tmp_path / name).read_bytes())
    heat = nibabel.load(tmp_path / name)
    assert (type(heat).__name__, heat.shape) == (kind, shape)
    np.testing.assert_allclose(heat.get_fdata().reshape(6, 8, -1)[..., 0], 3.0, atol=1e-3)


# --- masks of volumes ---


def labels_and(folder, image_affine, mask_affine, mask_shape=(6, 8, 5)):
    """Samples of a volume (6, 8, 5); its mask has the labels 1 and 2 at the front left corner of slice 1."""
    nibabel.Nifti1Image(np.arange(240, dtype=np.int16).reshape(6, 8, 5), image_affine).to_filename(folder / "v.nii")
    labels = np.zeros(mask_shape, np.uint8)
    labels[0, -1, 1], labels[1, -1, 1] = 1, 2
    nibabel.Nifti1Image(labels, mask_affine).to_filename(folder / "m.nii")
    return [Sample(folder / "v.nii", 1, (folder / "m.nii",), "v", index=i) for i in range(5)]


def marked(sample, **options):
    mask = read_mask(replace(sample, options=ReadOptions(**options))).image
    return {(x, y) for y, x in np.argwhere(np.asarray(mask) > 0)}


def test_mask_labels_of_a_volume(tmp_path):
    samples = labels_and(tmp_path, np.eye(4), np.eye(4))
    assert [marked(sample) for sample in samples[:2]] == [set(), {(5, 0), (4, 0)}]
    assert marked(samples[1], mask_labels=(2,)) == {(4, 0)}


def test_volume_masks_are_aligned_by_their_headers(tmp_path, capsys):
    """A mask with reversed axes is turned; a mask on another grid is resampled, with a warning."""
    turned = np.diag([-1.0, -1, 1, 1])
    turned[:2, 3] = 5, 7
    samples = labels_and(tmp_path, np.eye(4), turned)
    assert [marked(sample) for sample in samples[:2]] == [set(), {(0, 7), (1, 7)}]
    assert capsys.readouterr().err == ""
    for step, slices, place, hit in ((0.5, 12, slice(6, 8), 3), (2, 3, slice(2, 3), 4)):
        samples = labels_and(tmp_path, np.eye(4), grid := np.diag([1.0, 1, step, 1]))
        labels = np.zeros((6, 8, slices), np.uint8)
        labels[2, 3, place] = 1
        nibabel.Nifti1Image(labels, grid).to_filename(tmp_path / "m.nii")
        assert len(marked(samples[hit])) == 1
        assert "resampled" in capsys.readouterr().err
        warn_once.cache_clear()


def test_masks_that_cannot_belong_to_their_image_are_refused(tmp_path):
    far, unknown = np.eye(4), nibabel.Nifti1Image(np.ones((6, 8, 12), np.uint8), np.eye(4))
    far[:3, 3] = 1000
    samples = labels_and(tmp_path, np.eye(4), far)
    with pytest.raises(InputError, match=r"m\.nii: nothing .* lies in its image"):
        read_mask(samples[1])
    unknown.set_sform(None, 0)
    unknown.set_qform(None, 0)
    unknown.to_filename(tmp_path / "m.nii")
    with pytest.raises(InputError, match=r"m\.nii: .*headers do not say"):
        read_mask(samples[1])
    Image.new("L", (8, 6)).save(tmp_path / "single.png")
    with pytest.raises(InputError, match=r"^[^:]*m\.nii: "):  # a volume as the mask of a 2-D image
        read_mask(Sample(tmp_path / "single.png", 1, (tmp_path / "m.nii",), "x"))
    pages = [Image.new("L", (6, 8), 255)] * 3
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"m\.tif: 3 pictures, but its image's file has 5"):
        read_mask(replace(samples[1], masks=(tmp_path / "m.tif",)))


@pytest.mark.parametrize("frames_of_mask", [1, 3])
def test_multi_frame_dicom_masks_are_read_frame_by_frame_without_the_window(tmp_path, frames_of_mask):
    paths = dicom_series(tmp_path / "series", volume(tmp_path / "v.nii.gz"))
    header, size = dcmread(paths[0]), dcmread(paths[0]).pixel_array.shape
    for name, count in (("image", 3), ("mask", frames_of_mask)):
        values = np.zeros((count, *size), np.uint16)
        values[-1, 2, 3] = 1
        header.NumberOfFrames, header.PixelData = count, values.tobytes()
        header.WindowCenter, header.WindowWidth, header.PixelSpacing = 5000, 1, [1, 1]
        header.save_as(tmp_path / f"{name}.dcm")
    last = Sample(tmp_path / "image.dcm", 1, (tmp_path / "mask.dcm",), "x", index=2)
    if frames_of_mask == 1:
        with pytest.raises(InputError, match=r"mask\.dcm: 1 frames, but its image has 3"):
            read_mask(last)
        return
    assert np.asarray(read_mask(replace(last, index=0, options=ReadOptions((0, 1)))).image).max() == 0
    assert np.argwhere(np.asarray(read_mask(last).image) == 255).tolist() == [[2, 3]]
