"""Files of our own beside a model: `.npz` without pickle, with a JSON header; core sets, clusters.

Flows in: a header and named arrays, or whatever `write_replacing` is to write. Flows out: a file
that is whole or not there. What is read is hostile until checked: sizes before anything is
allocated, types, shapes and every header field.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

MAX_LAYERS = 4096
MAX_FF = 1 << 24
MAX_CLUSTERS = 1 << 16
_MAX_HEADER_BYTES = 1 << 20
_ZIP_MARK = b"PK"  # an .npz file begins so

Value = TypeVar("Value")

# What zipfile, zlib, json and our own checks raise on bytes that are not what they should be.
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    RecursionError,
)


def save(
    path: str | os.PathLike[str],
    noun: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write to a temporary file first, then rename it over `path`.

    Raises OSError if the system refuses (disk full, no permission); the old file then stays.
    """
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    write_replacing(path, noun, lambda file: np.savez(file, header=text, **arrays))


def write_replacing(
    path: str | os.PathLike[str], noun: str, write: Callable[[BinaryIO], object]
) -> None:
    """`write(file)` to a temporary file, then rename it over `path`.

    The file is as readable as the umask makes any other: what lies beside a shared model is shared.
    Raises OSError that names the `noun` if the system refuses; the old file then stays.
    """
    path = Path(path)
    if is_special(path):
        reason = f"cannot save the {noun}: expected a new file or a regular one to replace"
        raise OSError(errno.EEXIST, reason, str(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        file = open(temporary, "xb")
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        kept = "; the file that was there is unchanged" if path.exists() else ""
        reason = f"cannot save the {noun}: {error.strerror or error}{kept}"
        raise OSError(error.errno, reason, str(path)) from error


def is_special(path: Path) -> bool:
    """Whether there is a folder, a device or a pipe: renaming a file over /dev/null removes it."""
    return path.exists() and not path.is_file()


def open_regular(path: str | os.PathLike[str], noun: str) -> BinaryIO:
    """Opens a file of our own to read; ValueError for a folder, a device or a pipe.

    A pipe that nobody writes to would be waited for without end.
    """
    path = os.fspath(path)  # not a number, which is an open file's
    if is_special(Path(os.fsdecode(path))):
        raise ValueError(f"{path}: not a valid {noun}: it is no regular file")
    return open(path, "rb")


def load(
    path: str | os.PathLike[str], noun: str, read: Callable[[Archive], Value], *, max_bytes: int
) -> Value:
    """`read(archive)` of a file of at most `max_bytes`; whatever is wrong in it is a ValueError."""
    with open_regular(path, noun) as file:
        # Not all of a model that was given by mistake.
        data = file.read(len(_ZIP_MARK))
        if data == _ZIP_MARK:
            data += file.read(max_bytes + 1 - len(data))
    try:
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        try:
            archive = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile:
            raise ValueError(
                "it is another kind of file, or was cut short: make it again"
            ) from None
        with archive:
            return read(Archive(archive))
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: not a valid {noun}: {error}") from error


class Archive:
    """The members of an opened file, checked as they are read."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._names = set(archive.namelist())

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._names

    def header(self, format_name: str, version: int) -> dict[str, Any]:
        """The JSON header; ValueError unless it says this format and version."""
        text = self.array("header", np.uint8, _MAX_HEADER_BYTES).tobytes()
        header = json.loads(text.decode("utf-8"))
        if not isinstance(header, dict) or header.get("format") != format_name:
            raise ValueError(f"the header does not say {format_name!r}")
        if header.get("version") != version:
            raise ValueError(
                f"version {header.get('version')!r}; this build reads {version}: make it again"
            )
        return header

    def array(self, name: str, dtype: type, max_count: int) -> np.ndarray:
        """One array (k,), k at most `max_count`, its size checked before it is allocated."""
        shape, data = self._member(name, dtype, max_count, "(k,)", lambda shape: len(shape) == 1)
        return np.frombuffer(data, dtype=dtype)

    def matrix(self, name: str, dtype: type, shape: tuple[int, int]) -> np.ndarray:
        """One array of exactly this shape."""
        _, data = self._member(name, dtype, shape[0] * shape[1], str(shape), shape.__eq__)
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def rows(self, name: str, dtype: type, n_columns: int, max_rows: int) -> np.ndarray:
        """One array (n, n_columns), n at most `max_rows`."""
        shape, data = self._member(
            name,
            dtype,
            max_rows * n_columns,
            f"(n, {n_columns})",
            lambda shape: len(shape) == 2 and shape[1] == n_columns,
        )
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def _member(
        self,
        name: str,
        dtype: type,
        max_count: int,
        expected: str,
        fits: Callable[[tuple[int, ...]], bool],
    ) -> tuple[tuple[int, ...], bytes]:
        kind = np.dtype(dtype)
        try:
            info = self._archive.getinfo(f"{name}.npy")
        except KeyError:
            raise ValueError(f"the array {name} is missing") from None
        limit = max_count * kind.itemsize
        if info.file_size > limit + 4096:
            raise ValueError(
                f"the array {name} has {info.file_size} bytes; expected at most {limit}"
            )
        stream = io.BytesIO(self._archive.read(info))
        major, _ = np.lib.format.read_magic(stream)
        if major != 1:
            raise ValueError(f"the array {name} has npy version {major}; expected 1")
        shape, columns_first, found = np.lib.format.read_array_header_1_0(stream)
        if (
            not fits(shape)
            or found != kind
            or found.hasobject
            or (columns_first and len(shape) > 1)
        ):
            raise ValueError(
                f"the array {name} is {found} of shape {shape}; expected {kind} {expected}"
            )
        data = stream.read()
        n_bytes = int(np.prod(shape, dtype=object)) * kind.itemsize
        if len(data) != n_bytes:
            raise ValueError(
                f"the array {name} has {len(data)} bytes; its shape {shape} needs {n_bytes}"
            )
        return shape, data


# --- header fields ---


def whole(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An integer of the header in [low, high]."""
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected an integer from {low} to {high}")
    return value


def number(header: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """A number of the header in [low, high]."""
    value = header.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
    return float(value)


def fingerprint_of(header: Mapping[str, Any]) -> int | None:
    """The model file's fingerprint, written as hexadecimal digits; None if there is none."""
    value = header.get("fingerprint")
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{1,16}", value):
        raise ValueError(f"fingerprint is {value!r}; expected up to 16 hexadecimal digits")
    return int(value, 16)
