"""Reads a Hugging Face model directory: config.json and the tensors of its safetensors files.

Tensors are mapped and turned into float32 one at a time, with NumPy alone (bfloat16 included).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ADVICE = (
    "load the model with transformers once and write it with save_pretrained(), which makes "
    "safetensors and tokenizer.json files"
)


class CheckpointError(ValueError):
    """The directory is not a model that can be converted; says which file and why."""


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offset in the file


def read_json(path: Path) -> Any:
    """A JSON file's value, or CheckpointError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; expected a Hugging Face model directory ({ADVICE})"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


class Checkpoint:
    """Config and tensors of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file; {ADVICE}")
        self._entries: dict[str, _Entry] = {}
        for file in files:
            self._entries |= _read_header(file)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def load(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        entry = self._entries[name]
        data = np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.start, entry.shape)
        if entry.dtype == "BF16":
            return (data.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(data, np.float32)


def _read_header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with open(file, "rb") as f:
        n_header = int.from_bytes(f.read(8), "little")
        if not 2 <= n_header <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{file}: not a safetensors file (header of {n_header} bytes in a file of {size})"
            )
        try:
            header = json.loads(f.read(n_header))
        except (ValueError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: header is not JSON: {error}") from None
    entries = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        shape, (start, end) = tuple(tensor["shape"]), tensor["data_offsets"]
        if tensor["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: {name} has type {tensor['dtype']}, expected one of {', '.join(DTYPES)}"
            )
        n_bytes = int(np.prod(shape)) * np.dtype(DTYPES[tensor["dtype"]]).itemsize
        if end - start != n_bytes or start < 0 or 8 + n_header + end > size:
            raise CheckpointError(
                f"{file}: {name} has {n_bytes} bytes by its shape, but lies at "
                f"{start}..{end} of {size - 8 - n_header} (file cut short?)"
            )
        entries[name] = _Entry(file, tensor["dtype"], shape, 8 + n_header + start)
    return entries
