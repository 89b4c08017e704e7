"""Shapes for models whose every step is simulated: as small as still tells right from wrong."""

from __future__ import annotations

from typing import Any


def small(arch: str = "llama") -> dict[str, Any]:
    """Fields for make_tiny_model; a row is no whole number of a warp's loads."""
    shape = {"n_embd": 160, "n_ff": 320}
    if arch == "opt":  # heads of these three are together as wide as the embedding
        shape |= {"n_head": 5, "n_head_kv": 5, "head_dim": 32}
    if arch == "qwen2":
        shape |= {"n_head": 5, "n_head_kv": 1}
    if arch == "phi3":  # turns 48 elements of a head
        shape |= {"n_embd": 192, "n_head": 3, "n_head_kv": 1}
    return shape
