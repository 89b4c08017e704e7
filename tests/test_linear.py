"""Matrix products of the CPU backend, on every instruction set of this machine and every type.

The weights come from the `gguf` package's own dequantisation. Tolerances:

- float activations: float32 rounding, at most one unit in the last place of the sum of magnitudes
  for each addition;
- 8-bit activations: the same around the product of the weights with the activations as a plain
  model of the quantisation rounds them;
- bf16 (more than 16 tokens): activations and weights are rounded by at most 2^-8 each.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from coreinfer._core import testing
from gguf_stream import block_size
from synthetic_blocks import LAYOUTS, PLAIN_TYPES, TENSOR_TYPES, random_blocks

ISAS = testing.available_isas()
PACKED_TYPES = [t for t in TENSOR_TYPES if t not in PLAIN_TYPES]
BLOCK = {t: block_size(t)[0] for t in TENSOR_TYPES}
GROUP = {t: 16 if t in ("Q2_K", "Q3_K", "Q6_K") else 32 for t in PACKED_TYPES}
# One type of each kind of codes and scales, and two that are not packed.
FAMILIES = ["F32", "F16", "Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "IQ4_NL"]
EPS = 2.0**-23


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    return request.param


@cache
def matrix(type_name: str, rows: int, cols: int, seed: int = 0) -> tuple[bytes, np.ndarray]:
    """Stored bytes and the values that they stand for, (rows, cols) float32."""
    rng = np.random.default_rng([seed, rows, cols])
    blocks = random_blocks(rng, type_name, rows * cols // BLOCK[type_name], 1.0)
    return blocks.tobytes(), dequantized(blocks, type_name, rows, cols)


def dequantized(blocks: np.ndarray, type_name: str, rows: int, cols: int) -> np.ndarray:
    data = np.frombuffer(blocks.tobytes(), dtype=np.uint8).reshape(rows, -1)
    return quants.dequantize(data, GGMLQuantizationType[type_name]).reshape(rows, cols)


def activations(n: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, n, cols])
    return rng.standard_normal((n, cols)).astype(np.float32)


def to_8_bits(x: np.ndarray, group: int) -> np.ndarray:
    """Activations as the integer kernels see them: the largest of a group becomes 127."""
    groups = x.reshape(len(x), -1, group)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(groups * (np.float32(127) / largest).astype(np.float32))
    codes = np.where(largest > 0, codes, 0)
    scales = (largest / np.float32(127)).astype(np.float64)
    return (scales * codes).reshape(x.shape)


def in_bf16(isa: str, type_name: str, n_tokens: int, f32: bool) -> bool:
    """Whether the kernels multiply bf16: where they can, many tokens; without AMX float types."""
    if n_tokens <= 16 or f32:
        return False
    return isa == "amx" or (isa == "avx512_bf16" and type_name in PLAIN_TYPES)


def check_product(y, x, w, type_name, isa, f32) -> None:
    """y = x w^T within what the kernels' arithmetic allows."""
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w.astype(np.float64)).T
    if type_name in PACKED_TYPES:
        # The parts of scale * code + minimum may cancel in a weight, but round by themselves.
        magnitude = magnitude + np.abs(x).sum(axis=1)[:, None] * np.abs(w).max()
    bf16 = in_bf16(isa, type_name, len(x), f32)
    exact = type_name in PLAIN_TYPES or f32 or bf16
    seen = x.astype(np.float64) if exact else to_8_bits(x, GROUP[type_name])
    tolerance = 2.01 * 2.0**-8 if bf16 else EPS * (8 + x.shape[1] / 16)
    error = np.abs(y - seen @ w.astype(np.float64).T)
    worst = (error / np.maximum(magnitude, 1e-30)).max()
    where = f"{type_name} on {isa}, {len(x)} tokens"
    assert worst <= tolerance, f"{where}: {worst:.2e} > {tolerance:.2e}"


def shapes(type_name: str) -> list[tuple[int, int]]:
    """Rows and columns: a single row, whole strips, a partial strip; the fewest columns, and more
    than one panel of the float kernels."""
    block = BLOCK[type_name]
    odd = 19 if block == 1 else block
    return [(1, odd), (32, 3 * block if block > 1 else 75), (37, 768)]


@pytest.mark.parametrize("type_name", PACKED_TYPES)
def test_unpacked_weights_are_those_of_the_file(isa, type_name):
    for rows, cols in shapes(type_name):
        data, w = matrix(type_name, rows, cols)
        weight = testing.TestBackend(isa).load(type_name, data, rows, cols)
        np.testing.assert_array_equal(weight.values(isa), w)


@pytest.mark.parametrize("type_name", PACKED_TYPES)
def test_packed_bytes_stay_close_to_the_files(type_name):
    rows, cols = 64, 2048
    data, _ = matrix(type_name, rows, cols)
    weight = testing.TestBackend("scalar").load(type_name, data, rows, cols)
    assert 1.0 <= weight.bytes / len(data) <= 1.04  # sub-scales of 6 bits take 8


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_product_equals_numpy(isa, type_name, f32):
    backend = testing.TestBackend(isa, f32, 2)
    for rows, cols in shapes(type_name):
        data, w = matrix(type_name, rows, cols)
        weight = backend.load(type_name, data, rows, cols)
        for n in (1, 2, 3, 8, 16, 17, 33, 64):
            x = activations(n, cols)
            (y,) = backend.linear(x, [weight])
            assert y.shape == (n, rows)
            check_product(y, x, w, type_name, isa, f32)


@pytest.mark.parametrize("type_name", FAMILIES)
def test_product_equals_numpy_for_every_short_number_of_rows(isa, type_name):
    cols = 35 if type_name in PLAIN_TYPES else BLOCK[type_name]
    backend = testing.TestBackend(isa, False, 2)
    for rows in range(1, 34):  # up to two strips and a row
        data, w = matrix(type_name, rows, cols)
        weight = backend.load(type_name, data, rows, cols)
        for n in (1, 2, 5, 17):
            x = activations(n, cols)
            (y,) = backend.linear(x, [weight])
            assert y.shape == (n, rows)
            check_product(y, x, w, type_name, isa, False)


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", FAMILIES)
def test_product_equals_numpy_for_several_blocks_of_tokens(isa, type_name, f32):
    rows, cols = 83, 300 if type_name in PLAIN_TYPES else 512
    data, w = matrix(type_name, rows, cols)
    backend = testing.TestBackend(isa, f32, 2)
    weight = backend.load(type_name, data, rows, cols)
    for n in (129, 513):  # a token more than a block has, of 8-bit or float and of bf16 products
        x = activations(n, cols)
        (y,) = backend.linear(x, [weight])
        check_product(y, x, w, type_name, isa, f32)


@pytest.mark.parametrize("zeros", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("type_name", PLAIN_TYPES)
def test_product_equals_numpy_for_every_short_input(isa, type_name, zeros):
    backend = testing.TestBackend(isa, False, 2)
    for cols in range(1, 71):
        rows = 1 + cols % 19
        data, w = matrix(type_name, rows, cols)
        weight = backend.load(type_name, data, rows, cols, zeros)
        for n in (1, 3, 17):  # rows after the first stand at odd addresses
            x = activations(n, cols)
            (y,) = backend.linear(x, [weight])
            check_product(y, x, w, type_name, isa, False)


def after_relu(n: int, cols: int) -> np.ndarray:
    """Activations of which about nine in ten are zero, others in each token."""
    return np.maximum(activations(n, cols) - 1.3, 0).astype(np.float32)


@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_product_with_mostly_zeros_equals_numpy(isa, type_name):
    backend = testing.TestBackend(isa, False, 2)
    for rows, cols in shapes(type_name) + [(1100, 256)]:
        data, w = matrix(type_name, rows, cols)
        weight = backend.load(type_name, data, rows, cols, zeros=True)
        bias = activations(1, rows, seed=3)[0]
        for n in (1, 2, 16, 17, 40):
            x = after_relu(n, cols)
            (y,) = backend.linear(x, [weight])
            check_product(y, x, w, type_name, isa, False)
            (added,) = backend.linear(x, [weight], [bias], accumulate=True)
            np.testing.assert_array_equal(added, 1 + (y + bias))


@pytest.mark.parametrize("type_name", PLAIN_TYPES)
def test_columns_that_meet_zeros_are_not_read(isa, type_name):
    rows, cols = 83, 300
    data, _ = matrix(type_name, rows, cols)
    x = after_relu(1, cols)
    stored = np.frombuffer(data, np.uint8).reshape(rows, cols, -1).copy()
    stored[:, x[0] == 0] = 0xFF  # NaN
    backend = testing.TestBackend(isa)
    sound = backend.load(type_name, data, rows, cols, zeros=True)
    holed = backend.load(type_name, stored.tobytes(), rows, cols, zeros=True)
    np.testing.assert_array_equal(*(backend.linear(x, [w])[0] for w in (sound, holed)))
    for n in (1, 3):
        (y,) = backend.linear(np.full((n, cols), np.nan, np.float32), [sound])
        assert np.isnan(y).all()
        (y,) = backend.linear(np.zeros((n, cols), np.float32), [sound])
        assert not y.any()


@pytest.mark.parametrize("type_name", PLAIN_TYPES)
def test_bits_of_a_row_of_mostly_zeros_depend_on_nothing_but_the_row(isa, type_name):
    rows, cols = 1061, 200
    data, _ = matrix(type_name, rows, cols)
    scalar = testing.TestBackend("scalar")
    x = after_relu(16, cols)
    weight = scalar.load(type_name, data, rows, cols, zeros=True)
    alone = np.concatenate([scalar.linear(x[i : i + 1], [weight])[0] for i in range(16)])
    for threads in (1, 2, 3):
        backend = testing.TestBackend(isa, False, threads)
        weight = backend.load(type_name, data, rows, cols, zeros=True)
        for n in (1, 2, 5, 16):
            np.testing.assert_array_equal(backend.linear(x[:n], [weight])[0], alone[:n])


def test_norms_do_not_go_before_a_matrix_for_zeros(isa):
    data, _ = matrix("F16", 16, 64)
    backend = testing.TestBackend(isa)
    weight = backend.load("F16", data, 16, 64, zeros=True)
    with pytest.raises(RuntimeError, match="a norm before a matrix that expects zeros"):
        backend.linear(activations(1, 64), [weight], norm_weight=np.ones(64, np.float32))


@pytest.mark.parametrize("type_name", PACKED_TYPES)
def test_largest_codes_do_not_saturate(isa, type_name):
    rows, cols = 16, 256
    rng = np.random.default_rng(1)
    blocks = random_blocks(rng, type_name, rows * cols // BLOCK[type_name], 1.0)
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        same = np.where(half_float_bytes(type_name), blocks, np.uint8(byte))
        w = dequantized(same, type_name, rows, cols)
        weight = testing.TestBackend(isa).load(type_name, same.tobytes(), rows, cols)
        x = np.concatenate([np.ones((1, cols)), -np.ones((1, cols))]).astype(np.float32)
        (y,) = testing.TestBackend(isa).linear(x, [weight])
        check_product(y, x, w, type_name, isa, False)


def half_float_bytes(type_name: str) -> np.ndarray:
    """Which bytes of a block belong to its half-float scales."""
    keep = np.zeros(block_size(type_name)[1], dtype=bool)
    layout = LAYOUTS[type_name]
    for at in (layout.d_at, layout.min_at):
        if at is not None:
            keep[at : at + 2] = True
    return keep


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_bits_of_a_row_depend_on_nothing_but_the_row(isa, type_name, f32):
    rows, cols = 83, 512
    data, _ = matrix(type_name, rows, cols)
    one = testing.TestBackend(isa, f32, 1)
    weight = one.load(type_name, data, rows, cols)
    x = activations(16, cols)
    alone = np.concatenate([one.linear(x[i : i + 1], [weight])[0] for i in range(16)])
    for threads in (1, 2, 3):
        backend = testing.TestBackend(isa, f32, threads)
        weight = backend.load(type_name, data, rows, cols)
        for n in range(1, 17):
            np.testing.assert_array_equal(backend.linear(x[:n], [weight])[0], alone[:n])


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", FAMILIES)
def test_large_batches_do_not_depend_on_threads(isa, type_name, f32):
    rows, cols, n = 331, 512, 40
    data, _ = matrix(type_name, rows, cols)
    x = activations(n, cols)
    results = []
    for threads in (1, 2, 3):
        backend = testing.TestBackend(isa, f32, threads)
        results.append(backend.linear(x, [backend.load(type_name, data, rows, cols)])[0])
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_instruction_sets_agree_bit_for_bit(isa, type_name, f32):
    for rows, cols in shapes(type_name):
        data, _ = matrix(type_name, rows, cols)
        for n in (1, 4, 7, 15):
            x = activations(n, cols)
            y = []
            for name in ("scalar", isa):
                backend = testing.TestBackend(name, f32)
                y.append(backend.linear(x, [backend.load(type_name, data, rows, cols)])[0])
            np.testing.assert_array_equal(y[0], y[1])


def test_weights_of_one_call_share_their_input(isa):
    cols = 512
    types = ["Q4_K", "Q6_K", "F16"]
    rows = [48, 20, 33]
    norm_weight = activations(1, cols, seed=5)[0]
    for n in (1, 3, 40):
        backend = testing.TestBackend(isa, False, 2)
        x = activations(n, cols)
        mats = [
            matrix(t, r, cols, seed=i) for i, (t, r) in enumerate(zip(types, rows, strict=True))
        ]
        weights = [backend.load(types[i], mats[i][0], rows[i], cols) for i in range(3)]
        biases = [activations(1, r, seed=9)[0] for r in rows]
        together = backend.linear(x, weights, biases, norm_weight, True)
        for i in range(3):
            (alone,) = backend.linear(x, weights[i : i + 1], biases[i : i + 1], norm_weight, True)
            # Beside packed weights, a float one is multiplied in bf16 only where those are, too.
            if in_bf16(isa, types[i], n, False) == in_bf16(isa, types[0], n, False):
                np.testing.assert_array_equal(together[i], alone)
            rms = np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5)
            plain = (x / rms * norm_weight).astype(np.float32)
            # One was there to accumulate to. Rounding activations to 8 bits costs most: on average
            # about a 300th of them, with random signs.
            exact = plain.astype(np.float64) @ mats[i][1].T.astype(np.float64) + biases[i] + 1
            scale = np.abs(plain) @ np.abs(mats[i][1]).T
            assert (np.abs(together[i] - exact) / scale).max() < 2.0**-7


def test_nan_and_infinite_activations_reach_the_result(isa):
    for type_name in ("Q4_0", "Q4_K", "F16"):
        data, _ = matrix(type_name, 16, 256)
        for bad in (np.nan, np.inf, -np.inf):
            for n in (2, 20):
                backend = testing.TestBackend(isa)
                x = activations(n, 256)
                x[1, 100] = bad
                (y,) = backend.linear(x, [backend.load(type_name, data, 16, 256)])
                assert not np.isfinite(y[1]).any()
                assert np.isfinite(y[0]).all()


def test_tiny_and_zero_activations_give_zero(isa):
    data, _ = matrix("Q4_1", 16, 64)
    backend = testing.TestBackend(isa)
    x = np.zeros((3, 64), dtype=np.float32)
    x[1] = 1e-38
    x[2, 0] = 1e-40
    (y,) = backend.linear(x, [backend.load("Q4_1", data, 16, 64)])
    np.testing.assert_array_equal(y, np.zeros((3, 16), dtype=np.float32))


def reference_activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if "relu" in name:
        return np.where(x > float(name.partition(":")[2] or 0), x, 0)
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "drelu", "fatrelu:0.2"])
def test_hidden_vector_equals_numpy(isa, activation, gated):
    n_embd, n_ff = 256, 75
    backend = testing.TestBackend(isa, True, 2)
    for type_name in ("Q4_0", "F32"):
        (up_data, up), (gate_data, gate) = (matrix(type_name, n_ff, n_embd, seed=s) for s in (1, 2))
        up_weight = backend.load(type_name, up_data, n_ff, n_embd)
        gate_weight = backend.load(type_name, gate_data, n_ff, n_embd) if gated else None
        bias = None if gated else activations(1, n_ff)[0]
        for n in (1, 5, 20):
            x = activations(n, n_embd) / 16
            h, act_gate = backend.ffn_hidden(x, gate_weight, up_weight, activation, bias)
            u = x.astype(np.float64) @ up.T.astype(np.float64)
            if gated:
                a = reference_activation(activation, x.astype(np.float64) @ gate.T)
                expected = a * (reference_activation(activation, u) if activation == "drelu" else u)
            else:
                expected = a = reference_activation(activation, u + bias)
            # Sums of 256 products of size 1/16, then an activation with slope about 1.
            np.testing.assert_allclose(h, expected, rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(act_gate, a, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_embedding_rows_are_those_of_the_file(type_name):
    rows, cols = 11, 256
    data, w = matrix(type_name, rows, cols)
    position_data, p = matrix("F16", 9, cols, seed=4)
    backend = testing.TestBackend("scalar")
    table = backend.load(type_name, data, rows, cols)
    positions = backend.load("F16", position_data, 9, cols)
    tokens = np.array([3, 10, 0, 3], dtype=np.int32)
    np.testing.assert_array_equal(backend.embed(tokens, table), w[tokens])
    scaled = backend.embed(tokens, table, 2.0, positions, 5)
    np.testing.assert_array_equal(scaled, 2 * w[tokens] + p[5:9])


def test_embedding_refuses_what_is_not_there():
    data, _ = matrix("F32", 4, 8)
    backend = testing.TestBackend("scalar")
    table = backend.load("F32", data, 4, 8)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=f"token id {bad}, expected 0 to 3"):
            backend.embed(np.array([bad], dtype=np.int32), table)
    with pytest.raises(ValueError, match="positions 3 to 4"):
        backend.embed(np.array([0, 1], dtype=np.int32), table, 1.0, table, 3)
