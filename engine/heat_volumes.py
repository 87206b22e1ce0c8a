"""Heat maps in the scan's own space: of a NIfTI volume as NIfTI, of a DICOM series as a DICOM series."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.readers import Frame, optional
from dataset.readers.volumes import frame_values, numbers, slices_of
from utils import atomic_path

from .scans import MARK

DERIVATION = "Anomaly heat map (MadCLIP), in thousandths of a score. Research use, not a medical device."
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
# Of the source's modules patient, study and frame of reference: what makes viewers file the heat map beside it.
COPIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientAge", "StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID",
    "StudyDescription", "FrameOfReferenceUID", "PositionReferenceIndicator", "Laterality", "SliceThickness",
    "SpacingBetweenSlices",
)  # fmt: skip
REQUIRED = (  # of a secondary capture: empty where they are not known
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "StudyInstanceUID", "Laterality", "PatientOrientation",
)  # fmt: skip
IDENTIFYING = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "AccessionNumber",
    "ReferringPhysicianName", "StudyID", "StudyDescription", "StudyDate", "StudyTime",
)  # fmt: skip


def fit(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heat map (S, S) stretched over a slice: (height, width) float32."""
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


class NiftiHeat:
    """The heat maps of a volume as a NIfTI file with its shape, affine and zooms: it opens over the scan in viewers.

    Values are int16 with the header's slope; they lie in [0, layers].

    Args:
        path: of the result, .nii.gz.
        source: the volume.
        plane: in which it was cut.
        layers: K.
        heat_range: what viewers show as black and white.
    """

    def __init__(self, path: Path, source: Path, plane: str, layers: int, heat_range: tuple[float, float]) -> None:
        nibabel, orientations = optional("nibabel", source), optional("nibabel.orientations", source)
        image = nibabel.squeeze_image(nibabel.load(source))
        self.path, self.layers, self.header = path, layers, image.header.copy()
        self.header.set_data_dtype(np.int16)
        self.header.set_slope_inter(layers / 32767, 0)
        self.header.set_data_offset(self.header.single_vox_offset)
        self.header["magic"] = self.header.single_magic
        self.header["descrip"] = f"{MARK}, {plane}"
        self.header["aux_file"] = self.header["db_name"] = ""  # may name a patient
        self.header["cal_min"], self.header["cal_max"] = heat_range
        self.voxels = np.zeros(image.shape, self.header.get_data_dtype(), order="F")
        turned = orientations.apply_orientation(self.voxels, orientations.io_orientation(image.affine))
        self.slices = slices_of(turned, plane)  # views, not copies

    def add(self, index: int, heat: np.ndarray) -> None:
        """Put in the heat map (S, S) of the slice with this index."""
        self.slices[index][...] = (fit(heat, *self.slices[index].shape) / self.layers * 32767).round()

    def close(self) -> None:
        """Write the file."""
        with atomic_path(self.path, "--out") as path, gzip.open(path, "wb", compresslevel=4) as file:
            file.write(self.header.binaryblock)
            file.write(bytes(int(self.header.single_vox_offset) - len(self.header.binaryblock)))
            file.write(self.voxels.tobytes(order="F"))


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
        self.uid, now = self.pydicom.uid.generate_uid(), time.localtime()
        self.date, self.time = time.strftime("%Y%m%d", now), time.strftime("%H%M%S", now)

    def add(self, frame: Frame, number: int, heat: np.ndarray) -> None:
        """Write the heat map (S, S) of an image as file `number` of the series."""
        source = self.pydicom.dcmread(frame.path, force=True, stop_before_pixels=True)
        result = self._dataset(source, frame.index or 0, number)
        values = fit(heat, source.Rows, source.Columns) / self.layers * 65535
        result.PixelData = values.round().clip(0, 65535).astype("<u2").tobytes()
        with atomic_path(self.folder / f"{number:05d}.dcm", "--out") as path:
            result.save_as(path, enforce_file_format=True)

    def _dataset(self, source: Any, index: int, number: int) -> Any:  # noqa: ANN401 - pydicom's Dataset
        """All but the pixels."""
        generate_uid, result = self.pydicom.uid.generate_uid, self.pydicom.Dataset()
        for name in COPIED:
            if name in source and not (self.anonymous and name in IDENTIFYING):
                result[name] = source[name]
        for name in REQUIRED:
            if name not in result:
                setattr(result, name, "")
        if self.anonymous:
            result.PatientIdentityRemoved = "YES"
            for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
                if result.get(name):
                    setattr(result, name, generate_uid(entropy_srcs=[str(result[name].value)]))
        for sequence, names in (
            ("PlanePositionSequence", ("ImagePositionPatient",)),
            ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
            ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
        ):
            holder = frame_values(source, index, sequence)
            for name in names:
                if holder.get(name) not in (None, ""):
                    result[name] = holder[name]
        low, high = (1000 * end for end in self.heat_range)
        values = {
            "SOPClassUID": SECONDARY_CAPTURE, "SOPInstanceUID": generate_uid(), "SeriesInstanceUID": self.uid,
            "ImageType": ["DERIVED", "SECONDARY"], "Modality": "OT", "ConversionType": "WSD",
            "Manufacturer": "MadCLIP", "SeriesDescription": MARK, "DerivationDescription": DERIVATION,
            "SeriesNumber": int(sum(numbers(source, "SeriesNumber")[:1])) % 100_000 * 1000 + 777,
            "InstanceNumber": number, "SeriesDate": self.date, "SeriesTime": self.time, "ContentDate": self.date,
            "ContentTime": self.time, "InstanceCreationDate": self.date, "InstanceCreationTime": self.time,
            "BurnedInAnnotation": "NO", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
            "Rows": source.Rows, "Columns": source.Columns, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
            "PixelRepresentation": 0, "RescaleIntercept": "0", "RescaleSlope": f"{1000 * self.layers / 65535:.10g}",
            "RescaleType": "US", "WindowCenter": f"{(low + high) / 2:.8g}",
            "WindowWidth": f"{max(high - low, 1.0):.8g}",
        }  # fmt: skip
        for name, value in values.items():
            setattr(result, name, value)
        if source.get("SOPClassUID") and source.get("SOPInstanceUID") and not self.anonymous:
            reference = self.pydicom.Dataset()
            reference.ReferencedSOPClassUID = source.SOPClassUID
            reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
            result.SourceImageSequence = [reference]
        result.file_meta = self.pydicom.dataset.FileMetaDataset()
        result.file_meta.TransferSyntaxUID = self.pydicom.uid.UID(EXPLICIT_LITTLE_ENDIAN)
        return result
