"""Heat maps in the scan's own space: of a NIfTI volume as NIfTI, of a DICOM series as a DICOM series."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.readers.grey import Frame, optional
from dataset.readers.volumes import frame_values, numbers, slices_of
from utils import atomic_path

from .scans import MARK

DERIVATION = "Anomaly heat map (MadCLIP), in thousandths of a score. Research use, not a medical device."
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Copied from the source's header, so that viewers file the heat map beside it; the latter tell who the patient is.
SPACE = ("SpecificCharacterSet", "StudyInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator")
IDENTIFYING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
PLACE = {  # of a frame: the group of a multi-frame file that holds it, and its elements
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
}


def fit(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heat map (S, S) stretched over a slice: (height, width) float32."""
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


class NiftiHeat:
    """The heat maps of a volume as a NIfTI file with its shape, affine and zooms: it opens over the scan in viewers.

    Values are int16 with the header's slope; they lie in [0, K], K layers.

    Args:
        path: of the result, .nii.gz.
        frame: a slice of the volume.
        heat_range: what viewers show as black and white.
    """

    def __init__(self, path: Path, frame: Frame, heat_range: tuple[float, float]) -> None:
        source, plane = frame.path, frame.options.plane
        nibabel, orientations = optional("nibabel", source), optional("nibabel.orientations", source)
        image = nibabel.squeeze_image(nibabel.load(source))
        header, values = image.header.copy(), np.zeros(image.shape, np.float32)
        header.set_data_dtype(np.int16)
        header["descrip"] = f"{MARK}, {plane}"
        header["aux_file"] = header["db_name"] = ""  # they may name a patient, and so may extensions
        header.extensions.clear()
        header.set_data_offset(0)  # right behind the header
        header["cal_min"], header["cal_max"] = heat_range
        self.path, self.image = path, type(image)(values, image.affine, header)
        turned = orientations.apply_orientation(values, orientations.io_orientation(image.affine))
        self.slices = slices_of(turned, plane)  # views, not copies

    def add(self, frame: Frame, _number: int, heat: np.ndarray) -> str:
        """Put in the heat map (S, S) of a slice; the name of the file that will hold it."""
        target = self.slices[frame.index or 0]
        target[...] = fit(heat, *target.shape)
        return self.path.name

    def close(self) -> None:
        """Write the file."""
        with atomic_path(self.path, "--out") as path, gzip.open(path, "wb", compresslevel=4) as file:
            self.image.to_stream(file)


class DicomHeat:
    """The heat maps of a series as a DICOM series: secondary captures with new UIDs, in the same study and space.

    Values are unsigned 16 bits with a rescale slope. Rescaled they are thousandths of a score, in [0, 1000 layers], as
    DICOM's linear windows are at least 1 wide.

    Args:
        folder: of the files, one an image; made if need be.
        layers: K.
        heat_range: the window in the header.
        anonymous: leave out who the patient is; the UIDs of study and space are hashes of the true ones.
    """

    def __init__(self, folder: Path, layers: int, heat_range: tuple[float, float], anonymous: bool) -> None:
        self.pydicom = optional("pydicom", folder)
        self.folder, self.layers, self.heat_range, self.anonymous = folder, layers, heat_range, anonymous
        self.uid = self.pydicom.uid.generate_uid()

    def add(self, frame: Frame, number: int, heat: np.ndarray) -> str:
        """Write the heat map (S, S) of an image as file `number` of the series; its name."""
        source = self.pydicom.dcmread(frame.path, force=True, stop_before_pixels=True)
        result = self._copied(source, frame.index or 0)
        low, high = (1000 * end for end in self.heat_range)
        values = {
            "SOPClassUID": SECONDARY_CAPTURE, "SOPInstanceUID": self.pydicom.uid.generate_uid(),
            "SeriesInstanceUID": self.uid, "SeriesDescription": MARK, "DerivationDescription": DERIVATION,
            "SeriesNumber": int(sum(numbers(source, "SeriesNumber")[:1])) % 100_000 * 1000 + 777,
            "InstanceNumber": number, "ImageType": ["DERIVED", "SECONDARY"], "Modality": "OT", "ConversionType": "WSD",
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": source.Rows,
            "Columns": source.Columns, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0,
            "RescaleIntercept": "0", "RescaleSlope": f"{1000 * self.layers / 65535:.10g}", "RescaleType": "US",
            "WindowCenter": f"{(low + high) / 2:.8g}", "WindowWidth": f"{max(high - low, 1.0):.8g}",
        }  # fmt: skip
        for name, value in values.items():
            setattr(result, name, value)
        pixels = fit(heat, source.Rows, source.Columns) / self.layers * 65535
        result.PixelData = pixels.round().clip(0, 65535).astype("<u2").tobytes()
        result.file_meta = self.pydicom.dataset.FileMetaDataset()
        result.file_meta.TransferSyntaxUID = self.pydicom.uid.ExplicitVRLittleEndian
        name = f"{number:05d}.dcm"
        with atomic_path(self.folder / name, "--out") as path:
            result.save_as(path, enforce_file_format=True)
        return f"{self.folder.name}/{name}"

    def _copied(self, source: Any, index: int) -> Any:  # noqa: ANN401 - pydicom's Datasets
        """A header with the patient, study and place of a frame of the source."""
        result = self.pydicom.Dataset()
        for name in (*SPACE, *IDENTIFYING):
            if name in source and not (self.anonymous and name in IDENTIFYING):
                result[name] = source[name]
            elif name in IDENTIFYING:  # these may be empty, but not missing
                setattr(result, name, "")
        if self.anonymous:
            result.PatientIdentityRemoved = "YES"
            for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
                if result.get(name):
                    setattr(result, name, self.pydicom.uid.generate_uid(entropy_srcs=[str(result[name].value)]))
        for sequence, names in PLACE.items():
            holder = frame_values(source, index, sequence)
            for name in names:
                if holder.get(name) not in (None, ""):
                    result[name] = holder[name]
        return result
