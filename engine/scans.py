"""DICOM series and NIfTI volumes around a prediction: what a slice is, and heat maps in the scan's own space.

Pictures without a patient's coordinate system (PNG, TIFF, ...) have empty answers. Positions are in millimetres.
"""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dataset.images import PLANES, Frame, file_kind
from dataset.volumes import parse_dicom
from utils import InputError, atomic_path

if TYPE_CHECKING:
    from pydicom import Dataset

MARK = "MadCLIP heat map, research use"  # in the head of every picture that is written, so that none becomes an input
DERIVATION = "Anomaly heat map (MadCLIP), in thousandths of a score. Research use, not a medical device."
POSITIVE = {"dicom": "LPS", "nifti": "RAS"}  # where the coordinates x, y, z grow
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
# Of the source's modules patient, study and frame of reference: what makes viewers file the heat map beside it.
COPIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientAge", "StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID",
    "StudyDescription", "FrameOfReferenceUID", "PositionReferenceIndicator", "Laterality", "SliceThickness",
    "SpacingBetweenSlices",
)  # fmt: skip
IDENTIFYING = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "AccessionNumber",
    "ReferringPhysicianName", "StudyID", "StudyDescription", "StudyDate", "StudyTime",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """What a file says of one of its images."""

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_number: int | None = None
    position: float | None = None  # along the slices' normal (NIfTI: the axis that is cut)
    plane: str = ""
    normal: tuple[float, ...] = ()  # of DICOM slices
    edges: str = ""  # the patient's sides at the left, right, top and bottom edge of the image, such as RLAP

    @property
    def orientation(self) -> str:
        """The edges in words."""
        names = ("left", "right", "top", "bottom")
        return ", ".join(f"{name} {side}" for name, side in zip(names, self.edges, strict=False))


def slices_of(frames: Sequence[Frame]) -> list[Slice]:
    """What a file says of its frames, which are of one file; nothing where its header is odd."""
    kind = file_kind(frames[0].path)
    try:
        if kind == "dicom":
            with frames[0].path.open("rb") as file:
                header = parse_dicom(file, frames[0].path, header_only=True)
            return [_dicom_slice(header, frame.index, len(frames)) for frame in frames]
        if kind == "nifti":
            return _nifti_slices(frames)
    except (OSError, InputError, ValueError, TypeError, AttributeError):  # the reader says what is wrong
        pass
    return [Slice()] * len(frames)


def in_order(slices: Sequence[Slice]) -> list[int]:
    """The order of the slices of one series: by position where all have one along the same normal, else by number."""
    normals = [slice_.normal for slice_ in slices]
    parallel = len({bool(n) for n in normals}) == 1 and all(np.dot(n, normals[0]) > 0.99 for n in normals if n)

    def key(i: int) -> tuple[float, float]:
        position, number = slices[i].position, slices[i].instance_number
        infinite = float("inf")
        place = infinite if position is None else position
        return (place if parallel else 0.0), (infinite if number is None else number)

    return sorted(range(len(slices)), key=key)


def is_own_result(path: Path) -> bool:
    """Whether a file is a picture that prediction has written: it is no input."""
    if not path.name.endswith(("_overlay.png", "_raw.png", "_heat.nii.gz")) and not path.parent.name.endswith("_heat"):
        return False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            return MARK.encode() in file.read(4096)
    except (OSError, EOFError):
        return False


# --- what a slice is ---


def _dicom_slice(header: Dataset, index: int | None, count: int) -> Slice:
    def numbers(sequence: str, keyword: str, size: int) -> np.ndarray | None:
        holder = frame_values(header, index or 0, sequence)
        if holder is header and count > 1:  # one position for many frames is not a frame's
            return None if keyword == "ImagePositionPatient" else vector(header.get(keyword), size)
        return vector(holder.get(keyword), size)

    place = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    directions = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    plane, edges, normal = "", "", None
    if directions is not None:
        across, down = directions[:3], directions[3:]
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        right, bottom = _side(across, "dicom"), _side(down, "dicom")
        edges = OPPOSITE[right] + right + OPPOSITE[bottom] + bottom
    number = None
    with suppress(TypeError, ValueError):
        number = int(header.get("InstanceNumber")) if index is None else index + 1
    return Slice(
        *(str(header.get(name) or "") for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")),
        number,
        None if place is None or normal is None else round(float(np.dot(place, normal)), 3),
        plane,
        () if normal is None else tuple(normal.tolist()),
        edges,
    )


def frame_values(header: Dataset, index: int, sequence: str) -> Dataset:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    for group in (*per_frame[index : index + 1], *shared):
        if group.get(sequence):
            return group[sequence][0]  # type: ignore[no-any-return] - pydicom's values are Any
    return header


def vector(value: Any, size: int) -> np.ndarray | None:  # noqa: ANN401 - whatever an element holds
    """The element as `size` finite numbers; None for anything else."""
    try:
        numbers = np.array([float(number) for number in value or ()])
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (size,) and np.isfinite(numbers).all() else None


def _side(direction: np.ndarray, kind: str) -> str:
    """The patient's side to which a direction mostly points."""
    axis = int(np.abs(direction).argmax())
    side = POSITIVE[kind][axis]
    return side if direction[axis] > 0 else OPPOSITE[side]


@lru_cache(maxsize=64)
def nifti_header(path: Path) -> Any:  # noqa: ANN401 - nibabel has no types
    """The header as it is in the file, unpacked where need be."""
    import nibabel  # noqa: PLC0415 (optional)

    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(1024)
    is_second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    return kind(head[: kind.template_dtype.itemsize])


def nifti_shape(header: Any) -> tuple[int, ...]:  # noqa: ANN401
    """The shape without trailing axes of 1 beyond three, as the reader takes it."""
    shape = tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _nifti_slices(frames: Sequence[Frame]) -> list[Slice]:
    from nibabel import orientations  # noqa: PLC0415 (optional)

    header, plane = nifti_header(frames[0].path), frames[0].options.plane
    shape, axis = nifti_shape(header), PLANES.index(plane)
    affine = header.get_best_affine()
    turned = orientations.io_orientation(affine)
    affine = affine @ orientations.inv_ornt_aff(turned, shape[:3])  # of the axes turned to x right, y anterior, z up
    sides = np.empty(3, dtype=int)
    sides[turned[:, 0].astype(int)] = shape[:3]
    known = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0  # else the axes' directions are a guess
    edges = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}[plane] if known else ""
    slices = []
    for frame in frames:
        center = np.append((sides - 1) / 2, 1.0)
        center[axis] = (frame.index or 0) % sides[axis]
        slices.append(Slice(position=round(float((affine @ center)[axis]), 3), plane=plane, edges=edges))
    return slices


# --- heat maps in the scan's own space ---


def fit(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heat map (S, S) stretched over a slice: (height, width) float32."""
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


class NiftiHeat:
    """The heat maps of a volume as a NIfTI file with its shape, affine and zooms: it opens over the scan in viewers.

    Values are int16 with the header's slope; they lie in [0, layers]. Slices are collected in a file, not in memory.

    Args:
        path: of the result, .nii.gz.
        source: the volume.
        plane: in which it was cut.
        layers: K.
        heat_range: what viewers show as black and white.
    """

    def __init__(self, path: Path, source: Path, plane: str, layers: int, heat_range: tuple[float, float]) -> None:
        from nibabel import orientations  # noqa: PLC0415 (optional)

        self.path, self.layers, self.axis = path, layers, PLANES.index(plane)
        original = nifti_header(source)
        self.header, shape = original.copy(), nifti_shape(original)
        self.header.set_data_shape(shape)
        self.header.set_data_dtype(np.int16)
        self.header.set_slope_inter(layers / 32767, 0)
        self.header.set_data_offset(self.header.single_vox_offset)
        self.header["magic"] = self.header.single_magic
        self.header["descrip"] = f"{MARK}, {plane}"
        self.header["cal_min"], self.header["cal_max"] = heat_range
        self.collected = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.voxels = np.memmap(self.collected, self.header.get_data_dtype(), "w+", shape=shape, order="F")
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from error
        turn = orientations.io_orientation(original.get_best_affine())
        view = orientations.apply_orientation(self.voxels, turn)  # a view, not a copy
        self.turned = view if view.ndim == 4 else view[..., None]

    def add(self, index: int, heat: np.ndarray) -> None:
        """Put in the heat map (S, S) of the slice with this index."""
        time_point, place = divmod(index, self.turned.shape[self.axis])
        where: list[Any] = [slice(None)] * 3
        where[self.axis] = place
        target = self.turned[(*where, time_point)][::-1, ::-1].T  # as the reader shows it
        target[...] = (fit(heat, *target.shape) / self.layers * 32767).round()

    def close(self, keep: bool = True) -> None:
        """Write the file; without `keep` drop what was collected."""
        try:
            if keep:
                self.voxels.flush()
                with atomic_path(self.path, "--out") as path, gzip.open(path, "wb", compresslevel=4) as file:
                    file.write(self.header.binaryblock)
                    file.write(bytes(int(self.header.single_vox_offset) - len(self.header.binaryblock)))
                    with self.collected.open("rb") as voxels:
                        shutil.copyfileobj(voxels, file, 2**20)
        finally:
            self.collected.unlink(missing_ok=True)


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
        from pydicom.uid import generate_uid  # noqa: PLC0415 (optional)

        self.folder, self.layers, self.heat_range, self.anonymous = folder, layers, heat_range, anonymous
        self.uid, self.date, self.time = generate_uid(), time.strftime("%Y%m%d"), time.strftime("%H%M%S")

    def add(self, frame: Frame, number: int, heat: np.ndarray) -> None:
        """Write the heat map (S, S) of an image as file `number` of the series."""
        with frame.path.open("rb") as file:
            source = parse_dicom(file, frame.path, header_only=True)
        result = self._dataset(source, frame.index or 0, number)
        values = fit(heat, source.Rows, source.Columns) / self.layers * 65535
        result.PixelData = values.round().clip(0, 65535).astype("<u2").tobytes()
        with atomic_path(self.folder / f"{number:05d}.dcm", "--out") as path:
            result.save_as(path, enforce_file_format=True)

    def _dataset(self, source: Dataset, index: int, number: int) -> Dataset:
        """All but the pixels."""
        from pydicom.dataset import Dataset, FileMetaDataset  # noqa: PLC0415 (optional)
        from pydicom.uid import UID, generate_uid  # noqa: PLC0415 (optional)

        result = Dataset()
        for name in COPIED:
            if name in source and not (self.anonymous and name in IDENTIFYING):
                result[name] = source[name]
        for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                     "AccessionNumber", "ReferringPhysicianName", "StudyInstanceUID"):  # fmt: skip
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
            "SeriesNumber": (_integer(source.get("SeriesNumber")) or 0) % 100_000 * 1000 + 777,
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
            reference = Dataset()
            reference.ReferencedSOPClassUID = source.SOPClassUID
            reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
            result.SourceImageSequence = [reference]
        result.file_meta = FileMetaDataset()
        result.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
        return result


def _integer(value: Any) -> int | None:  # noqa: ANN401 - whatever an element holds
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
