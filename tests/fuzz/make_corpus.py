"""Writes the small valid GGUF files that the fuzz entry point starts from.

Usage: python tests/fuzz/make_corpus.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gguf_bytes import valid_files

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in valid_files().items():
        (folder / f"{name}.gguf").write_bytes(content)
