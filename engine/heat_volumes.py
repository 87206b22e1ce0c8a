"""Heat maps in the scan's own space: NIfTI for a NIfTI volume, a DICOM series for a DICOM series."""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.readers.grey import optional
from dataset.readers.images import file_kind
from dataset.readers.volumes import frame_values, numbers, slices_of
from utils import atomic_path

from .predictor import Prediction, Predictor
from .scans import MARK, Entry

DERIVATION = "Anomaly heat map (MadCLIP), in thousandths of a score. Research use, not a medical device."
Slices = Sequence[tuple[Entry, Prediction]]  # of a volume or series
# Copied from the source's header, so that viewers list the heat map with the scan; IDENTIFYING names the patient.
SPACE = ("SpecificCharacterSet", "StudyInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator")
IDENTIFYING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
PLACE = {  # position and size of a frame: the sequence that holds them in a multi-frame file, and its elements
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
}


def write_volume(out: Path, slices: Slices, model: Predictor, anonymous: bool) -> list[str | None]:
    """Write the heat maps of a NIfTI volume or a DICOM series; returns for each slice the file that holds its map.

    For plain pictures and single DICOM images nothing is written, and the names are None.

    Args:
        out: the folder of the results.
        slices: the slices that could be read.
        model: the model that predicted them; viewers show its `heat_range` from black to white.
        anonymous: leave out the patient's identity, and replace the UIDs of study and frame of reference by hashes.
    """
    first = slices[0][0]
    name = f"{first.volume}_heat"
    if file_kind(first.path) == "nifti":
        write_nifti(out / f"{name}.nii.gz", slices, model.heat_range)
        return [f"{name}.nii.gz"] * len(slices)
    if file_kind(first.path) == "dicom" and first.count > 1:
        return [f"{name}/{file}" for file in write_dicom(out / name, slices, model, anonymous)]
    return [None] * len(slices)


def write_nifti(path: Path, slices: Slices, heat_range: Sequence[float]) -> None:
    """Write a NIfTI file with the volume's shape, affine and zooms, which viewers can overlay on the scan.

    Values are stored as int16 with the header's slope; they lie in [0, K], K layers, and are 0 in unreadable slices.
    """
    source, plane = slices[0][0].path, slices[0][0].options.plane
    nibabel, orientations = optional("nibabel", source), optional("nibabel.orientations", source)
    image = nibabel.squeeze_image(nibabel.load(source))
    header, values = image.header.copy(), np.zeros(image.shape, np.float32)
    header.set_data_dtype(np.int16)
    header["descrip"] = f"{MARK}, {plane}"
    for name in {"aux_file", "data_type", "db_name", "intent_name"} & set(header):  # NIfTI-2 lacks two of these
        header[name] = ""  # they may name a patient, and so may extensions
    header.extensions.clear()
    header.set_data_offset(0)  # directly after the header
    header["cal_min"], header["cal_max"] = heat_range
    turned = orientations.apply_orientation(np.atleast_3d(values), orientations.io_orientation(image.affine))
    places = slices_of(turned, plane)  # views of `values`, not copies
    for entry, prediction in slices:
        places[entry.index or 0][...] = prediction.map
    with (
        atomic_path(path, "--out") as temporary,
        temporary.open("wb") as target,
        gzip.GzipFile("", "wb", 4, target, mtime=0) as file,  # equal heat gives equal bytes
    ):
        type(image)(values, image.affine, header).to_stream(file)


def write_dicom(folder: Path, slices: Slices, model: Predictor, anonymous: bool) -> Iterator[str]:
    """Write secondary captures with new UIDs, in the same study and frame of reference; yields their file names.

    Values are unsigned 16 bits with a rescale slope. Rescaled, they are thousandths of a score, in [0, 1000 K],
    because the width of a linear window in DICOM is at least 1.
    """
    pydicom = optional("pydicom", folder)
    series, (low, high) = pydicom.uid.generate_uid(), (1000 * end for end in model.heat_range)
    for entry, prediction in slices:
        source = pydicom.dcmread(entry.path, force=True, stop_before_pixels=True)
        result = copied_header(pydicom, source, entry.index or 0, anonymous)
        values = {
            "SOPClassUID": pydicom.uid.SecondaryCaptureImageStorage, "SeriesInstanceUID": series,
            "SeriesDescription": MARK, "DerivationDescription": DERIVATION, "Modality": "OT", "ConversionType": "WSD",
            "SeriesNumber": int(sum(numbers(source, "SeriesNumber")[:1])) % 100_000 * 1000 + 777,
            "InstanceNumber": entry.number, "ImageType": ["DERIVED", "SECONDARY"], "RescaleType": "US",
            "RescaleIntercept": "0", "RescaleSlope": f"{1000 * model.layers / 65535:.10g}",
            "WindowCenter": f"{(low + high) / 2:.8g}", "WindowWidth": f"{max(high - low, 1.0):.8g}",
        }  # fmt: skip
        for name, value in values.items():
            setattr(result, name, value)
        pixels = (prediction.map / model.layers * 65535).round().clip(0, 65535).astype(np.uint16)
        result.set_pixel_data(pixels, "MONOCHROME2", 16)  # also sets a new SOPInstanceUID
        with atomic_path(folder / f"{entry.number:05d}.dcm", "--out") as path:
            result.save_as(path, enforce_file_format=True)
        yield f"{entry.number:05d}.dcm"


def copied_header(pydicom: Any, source: Any, index: int, anonymous: bool) -> Any:  # noqa: ANN401 - pydicom's
    """A header with the patient, study and position of one frame of the source; `anonymous` as in `write_volume`."""
    result = pydicom.Dataset()
    for name in IDENTIFYING:  # DICOM wants these present, even if empty
        setattr(result, name, "")
    for name in SPACE if anonymous else (*SPACE, *IDENTIFYING):
        if name in source:
            result[name] = source[name]
    if anonymous:
        result.PatientIdentityRemoved = "YES"
        for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
            if result.get(name):
                setattr(result, name, pydicom.uid.generate_uid(entropy_srcs=[str(result[name].value)]))
    for sequence, names in PLACE.items():
        holder = frame_values(source, index, sequence)
        for name in names:
            if holder.get(name) not in (None, ""):
                result[name] = holder[name]
    return result
