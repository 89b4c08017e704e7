"""Writes a GGUF file tensor by tensor: metadata and the list of tensors first, then the data as
an iterator gives it. Only one piece of data is in memory at a time. The file appears under its
name when it is complete; until then, and after a failure, there is only NAME.partial or nothing.
Needs no `gguf` package: machines that make models to measure with do not always have it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

ALIGNMENT = 32  # of every tensor's data
VERSION = 3
# A value's number in the file, and its packing; a string and an array have their own.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
PACKED = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
FIELD_TYPES = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
ITEM_TYPES = {int: INT32, float: FLOAT32, str: STRING}


class TensorKind(NamedTuple):
    """A tensor type's number in the file, and the values and bytes of one of its blocks."""

    number: int
    per_block: int
    block_bytes: int


TENSOR_KINDS = {
    "F32": TensorKind(0, 1, 4),
    "F16": TensorKind(1, 1, 2),
    "Q4_0": TensorKind(2, 32, 18),
    "Q4_1": TensorKind(3, 32, 20),
    "Q5_0": TensorKind(6, 32, 22),
    "Q5_1": TensorKind(7, 32, 24),
    "Q8_0": TensorKind(8, 32, 34),
    "Q2_K": TensorKind(10, 256, 84),
    "Q3_K": TensorKind(11, 256, 110),
    "Q4_K": TensorKind(12, 256, 144),
    "Q5_K": TensorKind(13, 256, 176),
    "Q6_K": TensorKind(14, 256, 210),
    "IQ4_NL": TensorKind(20, 32, 18),
    "IQ4_XS": TensorKind(23, 256, 136),
    "BF16": TensorKind(30, 1, 2),
}


@dataclass(frozen=True)
class StoredTensor:
    """Name, shape in NumPy order ((rows, columns) or (n,)) and tensor type of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Bytes of its data, without padding."""
        per_block, block_bytes = block_size(self.dtype)
        return int(np.prod(self.shape)) // per_block * block_bytes


def block_size(dtype: str) -> tuple[int, int]:
    """(values in a block, bytes of a block) of a tensor type; a plain type's block is one value."""
    return TENSOR_KINDS[dtype][1:]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack(PACKED[kind], value)


def _field(key: str, value: Any) -> bytes:
    if not isinstance(value, list):
        kind = FIELD_TYPES[type(value)]
        return _string(key) + struct.pack("<I", kind) + _value(kind, value)
    kind = ITEM_TYPES[type(value[0])]
    items = b"".join(_value(kind, item) for item in value)
    return _string(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + items


def _header(arch: str, fields: Mapping[str, Any], tensors: list[StoredTensor]) -> bytes:
    """Everything before the data, without padding."""
    wanted = {"general.architecture": arch} | {
        key: value for key, value in fields.items() if value is not None and value != []
    }
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(wanted))]
    parts += [_field(key, value) for key, value in wanted.items()]
    offset = 0
    for tensor in tensors:
        n = len(tensor.shape)
        ne = struct.pack(f"<I{n}Q", n, *reversed(tensor.shape))
        number = TENSOR_KINDS[tensor.dtype].number
        parts.append(_string(tensor.name) + ne + struct.pack("<IQ", number, offset))
        offset += tensor.n_bytes + -tensor.n_bytes % ALIGNMENT
    return b"".join(parts)


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def write_gguf(
    path: Path,
    arch: str,
    fields: Mapping[str, Any],
    tensors: list[StoredTensor],
    data: Callable[[StoredTensor], Iterable[np.ndarray]],
) -> None:
    """Write the file.

    Parameters
    ----------
    fields : key -> bool, int (uint32), float (float32), str, a list of one of the latter three
        (ints as int32), or None for a key to leave out
    data : gives the bytes of a tensor in pieces, in file order

    Raises
    ------
    ValueError where a tensor's pieces are not as long as its shape and type say.
    OSError from the file system.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as out:
            out.write(_header(arch, fields, tensors))
            for tensor in tensors:
                _pad(out)
                written = sum(
                    out.write(np.ascontiguousarray(part).view(np.uint8).reshape(-1))
                    for part in data(tensor)
                )
                if written != tensor.n_bytes:
                    raise ValueError(
                        f"{tensor.name}: expected {tensor.n_bytes} bytes of "
                        f"{tensor.dtype} data, got {written}"
                    )
            _pad(out)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
