"""Data sets: where they lie (layout), samples and shots (medical_few, fewshot), the one reader of pictures (images).

`python -m dataset.check` examines one before any training, `python -m dataset.phantom` draws one. Nothing is imported
before it is used, torch least of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import utils  # noqa: F401 - before what takes long, so that Ctrl-C meanwhile gives no traceback

_HOMES = {
    "readers": (
        "Frame Picture check_mask frames list_files load_grey_mask load_image load_image_with_hash load_mask "
        "NoImageError ReadOptions parse_window picture_notes read to_tensor"
    ),
    "layout": "BENCHMARKS PUBLISHED described named_after object_name",
    "medical_few": "MedicalDataset Sample Shots equal_images",
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["OBJECTS", *sorted(_WHERE)]  # noqa: PLE0604 (strings, all of them)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the name stands for)
    if name == "OBJECTS":
        from .layout import described  # noqa: PLC0415

        return described()
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
