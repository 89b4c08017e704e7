"""Writes a GGUF file tensor by tensor: metadata and the list of tensors first, then the data as
an iterator gives it. Only one piece of data is in memory at a time. The file appears under its
name when it is complete; until then, and after a failure, there is only NAME.partial or nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

FIELD_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
ITEM_TYPES = {int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


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
    return GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]


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
    writer = GGUFWriter(None, arch)
    for key, value in fields.items():
        if value is None or value == []:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, ITEM_TYPES[type(value[0])])
        else:
            writer.add_key_value(key, value, FIELD_TYPES[type(value)])
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.n_bytes,
            GGMLQuantizationType[tensor.dtype],
        )
    partial = path.with_name(f"{path.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(out, out.tell())
            written = sum(
                out.write(np.ascontiguousarray(part).view(np.uint8).reshape(-1))
                for part in data(tensor)
            )
            if written != tensor.n_bytes:
                raise ValueError(
                    f"{tensor.name}: expected {tensor.n_bytes} bytes of "
                    f"{tensor.dtype} data, got {written}"
                )
        writer.write_padding(out, out.tell())
        writer.close()
        os.replace(partial, path)
    except BaseException:
        for file in writer.fout or []:
            file.close()
        partial.unlink(missing_ok=True)
        raise
