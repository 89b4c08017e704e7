"""Dequantisation of every tensor type equals the `gguf` package's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from coreinfer import _core
from gguf_bytes import Gguf

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
         "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]  # fmt: skip
# Byte positions of the float16 scales in a block.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
          "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
          "IQ4_NL": [0], "IQ4_XS": [0]}  # fmt: skip


def oracle(data: np.ndarray, type_name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, GGMLQuantizationType[type_name])


def random_rows(type_name: str, rows: int, cols: int, seed: int, scales=None) -> np.ndarray:
    """Random bytes (rows, bytes a row) in which every float16 scale is finite, or is `scales`."""
    rng = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if type_name == "F32":
        return rng.standard_normal((rows, cols)).astype(np.float32).view(np.uint8)
    if type_name == "F16":
        return rng.standard_normal((rows, cols)).astype(np.float16).view(np.uint8)
    if type_name == "BF16":
        exact = rng.standard_normal((rows, cols)).astype(np.float32).view(np.uint32) >> 16
        return exact.astype(np.uint16).view(np.uint8)
    data = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
    for at in SCALES[type_name]:
        if scales is None:
            values = rng.standard_normal(len(data)).astype(np.float16)
        else:
            values = rng.choice(np.asarray(scales, dtype=np.float16), len(data))
        data[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


@pytest.mark.parametrize("type_name", TYPES)
def test_random_blocks_through_a_file_equal_the_gguf_package(tmp_path, type_name):
    rows, cols = 37, 512
    data = random_rows(type_name, rows, cols, seed=1)
    path = Gguf().tensor("other", [3]).tensor("t", [cols, rows], type_name, data.tobytes())
    file = _core.GgufFile(path.write(tmp_path / "model.gguf"))
    assert file.tensors[1].type == type_name
    found = file.dequantize("t")
    assert found.shape == (rows, cols) and found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(oracle(data, type_name)))
    assert len(np.unique(found)) > 100  # random bytes must not collapse to a few values


@pytest.mark.parametrize("type_name", sorted(SCALES))
def test_extreme_scales_equal_the_gguf_package(type_name):
    """Zeros of both signs, subnormals, the largest float16, Inf; NaN where the oracle has it."""
    scales = [0.0, -0.0, 6e-8, -3e-5, 6.1e-5, 65504.0, -65504.0, np.inf, -np.inf, np.nan]
    data = random_rows(type_name, 64, 256, seed=2, scales=scales)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = oracle(data, type_name).ravel()
    found = _core.testing.dequantize(type_name, data.tobytes())
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(found[numbers]), bits(expected[numbers]))


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_equal_the_gguf_package_and_resemble_the_numbers(type_name):
    values = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    data = gguf.quants.quantize(values, GGMLQuantizationType[type_name])
    found = _core.testing.dequantize(type_name, data.tobytes()).reshape(values.shape)
    np.testing.assert_array_equal(bits(found), bits(oracle(data, type_name)))
    # A block of 32 normal numbers spans below 8; four bits leave steps below 8 / 15.
    assert np.abs(found - values).max() < 8 / 15


@pytest.mark.parametrize("type_name", TYPES)
def test_rejects_bytes_that_are_not_whole_blocks(type_name):
    with pytest.raises(ValueError, match=f"{type_name}, expected a multiple of"):
        _core.testing.dequantize(type_name, b"\0" * 1001)


def test_tensor_of_many_dimensions_is_folded_into_rows(tmp_path):
    values = np.arange(2 * 3 * 4 * 5, dtype=np.float32)
    g = Gguf().tensor("t", [5, 4, 3, 2], "F32", values.tobytes())
    file = _core.GgufFile(g.write(tmp_path / "model.gguf"))
    assert file.tensors[0].shape == (5, 4, 3, 2)
    np.testing.assert_array_equal(file.dequantize("t"), values.reshape(24, 5))


# ---- 16-bit floats -------------------------------------------------------------------------------

ALL_16_BITS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


def float32_probes() -> np.ndarray:
    """Every float16 and bfloat16, the points halfway between neighbours, and those beside them."""
    with np.errstate(invalid="ignore"):
        exact = ALL_16_BITS.view(np.float16).astype(np.float32).view(np.uint32)
    brain = ALL_16_BITS.astype(np.uint32) << 16
    near = [base + np.uint32(d) for base in (exact, brain)
            for d in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFFFFFF)]  # fmt: skip
    tiny = np.arange(0x32F00000, 0x38900000, 0x3FF, dtype=np.uint32)  # float16's subnormals
    noise = np.random.default_rng(4).integers(0, 2**32, 200_000, dtype=np.uint32)
    return np.concatenate([*near, tiny, tiny | np.uint32(1 << 31), noise]).view(np.float32)


def test_float16_widens_exactly():
    found = _core.testing.f16_to_f32(ALL_16_BITS)
    with np.errstate(invalid="ignore"):
        expected = ALL_16_BITS.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(found[numbers]), bits(expected[numbers]))
    assert np.isnan(found[~numbers]).all()
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_float32_narrows_to_float16_to_nearest_even():
    probes = float32_probes()
    found = _core.testing.f32_to_f16(probes)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        expected = probes.astype(np.float16)
    numbers = ~np.isnan(probes)
    np.testing.assert_array_equal(found[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(found.view(np.float16)[~numbers]).all()


def test_bfloat16_widens_exactly():
    found = _core.testing.bf16_to_f32(ALL_16_BITS)
    np.testing.assert_array_equal(bits(found), ALL_16_BITS.astype(np.uint32) << 16)


def test_float32_narrows_to_bfloat16_to_nearest_even():
    probes = float32_probes()
    found = _core.testing.f32_to_bf16(probes)
    expected = gguf.quants.quantize(probes, GGMLQuantizationType.BF16).view(np.uint16)
    np.testing.assert_array_equal(found, expected)  # NaN included: made quiet by both
