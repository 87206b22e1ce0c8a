"""Scans for tests: the MNI template that nilearn ships, as NIfTI and as a DICOM series made of it."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel import orientations
from nilearn.datasets import load_mni152_template
from nilearn.image import resample_img
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def mni(path: Path, zooms: tuple[float, float, float] = (4.0, 4.0, 4.0), axes: str = "RAS") -> Any:
    """Write the template with these voxel sizes (mm) and stored axes; return the nibabel image."""
    template = load_mni152_template(resolution=2)
    image = resample_img(
        template, target_affine=np.diag(zooms), interpolation="linear", force_resample=True, copy_header=True
    )
    return save_turned(path, nibabel.Nifti1Image((image.get_fdata() * 1000).astype(np.int16), image.affine), axes)


def save_turned(path: Path, image: Any, axes: str) -> Any:
    """Write a nibabel image with these stored axes; return the reoriented image."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(axes))
    )
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, 1)
    image.to_filename(path)
    return image


def dicom_series(folder: Path, volume: Any, patient: str = "P1", shuffle: int = 0, window: bool = False) -> list[Path]:
    """Write axial slices of a nibabel image as CT files; return the paths from foot to head, with shuffled names."""
    volume = nibabel.as_closest_canonical(volume)
    values, affine = volume.get_fdata(), volume.affine
    study, series, space = generate_uid(), generate_uid(), generate_uid()
    names = np.random.default_rng(shuffle).permutation(values.shape[2])
    folder.mkdir(parents=True)
    paths = []
    for z in range(values.shape[2]):
        header = Dataset()
        header.PatientName, header.PatientID, header.PatientSex, header.PatientBirthDate = "Doe^Jane", patient, "F", ""
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, space
        header.SOPClassUID, header.SOPInstanceUID, header.Modality = CTImageStorage, generate_uid(), "CT"
        header.StudyID, header.AccessionNumber, header.ReferringPhysicianName = "1", "A1", ""
        header.SeriesDescription = "head of Jane"
        header.StudyDate, header.StudyTime, header.SeriesNumber, header.InstanceNumber = "20240102", "", 3, z + 1
        # Rows run from front to back, columns from the patient's right to left: the radiological axial view.
        pixels = np.ascontiguousarray(values[::-1, ::-1, z].T)
        corner = affine @ [values.shape[0] - 1, values.shape[1] - 1, z, 1]
        header.ImagePositionPatient = [float(-corner[0]), float(-corner[1]), float(corner[2])]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.PixelSpacing = [float(abs(affine[1, 1])), float(abs(affine[0, 0]))]
        header.SliceThickness = float(abs(affine[2, 2]))
        header.Rows, header.Columns = pixels.shape
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
        header.RescaleSlope, header.RescaleIntercept = 1, -24
        if window:
            header.WindowCenter, header.WindowWidth = 500, 1000
        header.PixelData = pixels.clip(0, 4095).astype("<u2").tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"IM{names[z]:04d}.dcm")
        header.save_as(paths[-1], enforce_file_format=True)
    return paths
