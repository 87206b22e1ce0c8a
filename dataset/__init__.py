"""Data sets: layouts (layout), images, masks and few-shot lists (medical_few), a made-up data set (phantom).

`python -m dataset.check` examines one before any training.
"""

from pathlib import Path

from .layout import named_after, object_name
from .medical_few import MedicalDataset, Sample, Shots, leaks, load_image, load_mask

OBJECTS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))

__all__ = [
    "OBJECTS",
    "MedicalDataset",
    "Sample",
    "Shots",
    "leaks",
    "load_image",
    "load_mask",
    "named_after",
    "object_name",
]
