"""Saved `.npz` files with members taken out or replaced, for tests of what loading refuses."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_of_version(major: int, array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(major, 0))
    return stream.getvalue()


def header_npy(header: dict[str, Any]) -> bytes:
    return npy(np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    """Replace members of a saved file; None removes one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.update({f"{name}.npy": data for name, data in changes.items()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)
