"""Writes the small model that check_engine runs: several tensor types, all of them quantised.

Usage: python tests/native/make_model.py FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from make_synthetic_model import make_tiny_model

if __name__ == "__main__":
    types = {"ffn_down": "Q6_K", "attn_v": "Q8_0", "blk.1.ffn": "Q4_0", "output.weight": "Q5_0"}
    make_tiny_model(sys.argv[1], "llama", "Q4_K", types=types)
