"""`coreinfer-bench`: finds the compiled benchmark beside the extension, and becomes it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def binary_path() -> Path:
    """Where the compiled `coreinfer-bench` of this installation lies.

    Raises
    ------
    FileNotFoundError if the package was installed without it.
    """
    spec = importlib.util.find_spec("coreinfer._core")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("coreinfer._core is not installed: build the package with pip")
    path = Path(spec.origin).parent / "bin" / "coreinfer-bench"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall the package")
    return path


def main() -> int:
    """Run the binary with this process's arguments and streams; returns only where it cannot."""
    try:
        path = binary_path()
    except FileNotFoundError as error:
        print(f"coreinfer-bench: error: {error}", file=sys.stderr)
        return 1
    os.execv(path, [str(path), *sys.argv[1:]])
