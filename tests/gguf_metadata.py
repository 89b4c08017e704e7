"""A GGUF file's metadata as a dict, read with nothing but ``struct``: for tests only.

The ``gguf`` package's reader gives the same values (``test_tokenizer.py`` checks it on a small
file) but takes about 8 s for a vocabulary of 128,000 tokens; this takes half a second.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the key-value section of the GGUF file at `path` (versions 2 and 3).

    Returns
    -------
    dict
        Python scalars, ``str`` (``bytes`` where not UTF-8), lists of strings, and numpy arrays
        for arrays of numbers.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, _version, _n_tensors, n_kv = struct.unpack_from("<4sIQQ", data, 0)
        assert magic == b"GGUF", magic
        reader = _Reader(data, 24)
        return {reader.string(): reader.value(reader.scalar(4)) for _ in range(n_kv)}


class _Reader:
    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def scalar(self, kind: int) -> Any:
        (value,) = struct.unpack_from(_SCALARS[kind], self.data, self.position)
        self.position += struct.calcsize(_SCALARS[kind])
        return value

    def string(self) -> Any:
        (length,) = struct.unpack_from("<Q", self.data, self.position)
        start = self.position + 8
        self.position = start + length
        raw = self.data[start : self.position]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        item, count = self.scalar(4), self.scalar(10)
        if item == _STRING:
            return [self.string() for _ in range(count)]
        dtype = np.dtype(_SCALARS[item])
        values = np.frombuffer(self.data, dtype, count, self.position).copy()
        self.position += values.nbytes
        return values
