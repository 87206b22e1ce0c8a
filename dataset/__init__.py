"""Data sets: the MVFA layout and few-shot lists (medical_few), and a made-up data set (phantom)."""

from pathlib import Path

from .medical_few import MedicalDataset, Sample, Shots, load_image, load_mask

OBJECTS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))

__all__ = ["OBJECTS", "MedicalDataset", "Sample", "Shots", "load_image", "load_mask"]
