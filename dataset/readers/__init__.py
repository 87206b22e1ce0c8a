"""The one reader of pictures, for training and prediction: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000, DICOM, NIfTI.

Each format's reader describes and reads the images of a file; masks are read here too. No folder is walked by a data
set's layout here, and nothing of a data set but `Sample` is known.
"""

from .grey import (
    AS_STORED,
    PLANES,
    Ends,
    Frame,
    MissingPackageError,
    NoImageError,
    Picture,
    ReadOptions,
    Slice,
    check_file,
    optional,
    to_rgb,
    warn_once,
)
from .images import (
    EXTENSIONS,
    READER,
    Sample,
    as_frame,
    describe,
    file_kind,
    frames,
    is_deep,
    list_files,
    load_image,
    load_image_with_hash,
    mask_sizes,
    parse_window,
    picture_notes,
    pillow_to_rgb,
    read,
    stem,
    to_tensor,
)
from .masks import (
    ABNORMAL_ABOVE,
    FULL_MASK,
    Levels,
    Mask,
    check_mask,
    levels_note,
    load_grey_mask,
    load_mask,
    mask_notes,
    read_mask,
)

__all__ = [
    "ABNORMAL_ABOVE", "AS_STORED", "EXTENSIONS", "FULL_MASK", "PLANES", "READER", "Ends", "Frame", "Levels", "Mask",
    "MissingPackageError", "NoImageError", "Picture", "ReadOptions", "Sample", "Slice", "as_frame", "check_file",
    "check_mask", "describe", "file_kind", "frames", "is_deep", "levels_note", "list_files", "load_grey_mask",
    "load_image", "load_image_with_hash", "load_mask", "mask_notes", "mask_sizes", "optional", "parse_window",
    "picture_notes", "pillow_to_rgb", "read", "read_mask", "stem", "to_rgb", "to_tensor", "warn_once",
]  # fmt: skip
