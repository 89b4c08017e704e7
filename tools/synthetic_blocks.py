"""Random but valid quantisation blocks of every GGUF tensor type that the project reads.

Scales are finite half floats of a size that gives the dequantised values a wanted standard
deviation; every code bit is random. No quantiser is needed, so it also serves the types for
which the `gguf` package has none, and it is as fast as the random number generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gguf_stream import block_size

PLAIN_TYPES = ("F32", "F16", "BF16")
# What the gguf package can make from float values.
QUANTISABLE = (*PLAIN_TYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class BlockLayout:
    """Where a block keeps its half-float scales, and how large its values are.

    A value is d * x - dmin * y with random x, y; `unit_std` is its standard deviation for d = 1
    and the minimum's ratio `min_ratio` = dmin / d, chosen so that the mean is zero.
    """

    d_at: int
    unit_std: float
    min_at: int | None = None
    min_ratio: float = 0.0


# Standard deviations follow from uniform codes: variance of the codes, times the mean square of
# 4-, 6- or 8-bit sub-scales where there are any, plus the spread of the sub-minima.
LAYOUTS = {
    "Q4_0": BlockLayout(0, 4.64),
    "Q4_1": BlockLayout(0, 4.61, 2, -7.5),
    "Q5_0": BlockLayout(0, 9.25),
    "Q5_1": BlockLayout(0, 9.23, 2, -15.5),
    "Q8_0": BlockLayout(0, 73.9),
    "Q2_K": BlockLayout(80, 13.9, 82, 1.5),
    "Q3_K": BlockLayout(108, 43.3),
    "Q4_K": BlockLayout(0, 258.0, 2, 7.5),
    "Q5_K": BlockLayout(0, 527.0, 2, 15.5),
    "Q6_K": BlockLayout(208, 1366.0),
    "IQ4_NL": BlockLayout(0, 67.4),
    "IQ4_XS": BlockLayout(0, 1246.0),
}
TENSOR_TYPES = (*PLAIN_TYPES, *LAYOUTS)


def random_blocks(rng: np.random.Generator, dtype: str, n_blocks: int, std: float) -> np.ndarray:
    """Random blocks whose values have mean about 0 and standard deviation about `std`.

    Returns
    -------
    uint8 array (n_blocks, bytes of a block)
    """
    if dtype in PLAIN_TYPES:
        values = rng.standard_normal(n_blocks, dtype=np.float32) * np.float32(std)
        return stored_bytes(values, dtype).reshape(n_blocks, -1)
    layout = LAYOUTS[dtype]
    blocks = rng.integers(0, 256, (n_blocks, block_size(dtype)[1]), dtype=np.uint8)
    d = (std / layout.unit_std) * rng.uniform(0.6, 1.4, n_blocks)
    if layout.min_at is None:
        d *= rng.choice((-1.0, 1.0), n_blocks)  # code ranges are lopsided: cancels their mean
    blocks[:, layout.d_at : layout.d_at + 2] = half_bytes(d)
    if layout.min_at is not None:
        blocks[:, layout.min_at : layout.min_at + 2] = half_bytes(d * layout.min_ratio)
    return blocks


def half_bytes(values: np.ndarray) -> np.ndarray:
    """Half floats as bytes: (n,) -> uint8 (n, 2)."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def stored_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the bytes of a type in QUANTISABLE, uint8 of any shape.

    Beyond F32 and F16 it takes the `gguf` package's quantisers.
    """
    if dtype in ("F32", "F16"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype], copy=False).view(np.uint8)
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(values, GGMLQuantizationType[dtype]).view(np.uint8)
