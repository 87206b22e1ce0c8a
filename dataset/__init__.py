"""Data sets: layouts (layout), images, masks and few-shot lists (medical_few), a made-up data set (phantom).

`python -m dataset.check` examines one before any training.
"""

from .layout import PUBLISHED, described, named_after, object_name
from .medical_few import MedicalDataset, Sample, Shots, check_mask, leaks, load_image, load_mask, some

OBJECTS = described()

__all__ = [
    "OBJECTS",
    "PUBLISHED",
    "MedicalDataset",
    "Sample",
    "Shots",
    "check_mask",
    "leaks",
    "load_image",
    "load_mask",
    "named_after",
    "object_name",
    "some",
]
