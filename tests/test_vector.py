"""Row functions of every instruction set against NumPy in float64, at every short length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coreinfer._core import testing

ISAS = testing.available_isas()
# Two vectors of the widest set and one more; then what a model really has.
LENGTHS = [*range(34), 63, 64, 65, 576, 1001]
EPS32 = float(np.finfo(np.float32).eps)  # 2^-23: one unit in the last place of 1.0


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    return request.param


def misaligned(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy of values that starts `offset` elements after an aligned address."""
    room = np.empty(len(values) + offset + 32, values.dtype)
    start = (-(room.ctypes.data // values.itemsize)) % 16 + offset
    view = room[start : start + len(values)]
    view[:] = values
    return view


def normal(rng: np.random.Generator, n: int, offset: int = 0, scale: float = 1.0) -> np.ndarray:
    return misaligned((rng.standard_normal(n) * scale).astype(np.float32), offset)


def assert_close(actual, expected, ulps: float, floor: float = 0.0) -> None:
    """|actual - expected| <= ulps units in the last place of expected, plus an absolute floor."""
    expected = np.asarray(expected, np.float64)
    bound = ulps * EPS32 * np.abs(expected) + floor
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert np.all(error <= bound), f"worst {np.max(error - bound)} over the bound"


def test_rms_norm_equals_float64(isa):
    for n, offset in itertools.product(LENGTHS[1:], (0, 1, 3)):
        rng = np.random.default_rng(n)
        x, w = normal(rng, n, offset, 3.0), normal(rng, n, offset + 1)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt(np.mean(wide**2) + 1e-5) * w
        # Sums are double; then one rounding for the factor and two products.
        assert_close(testing.rms_norm(isa, x, w, 1e-5), expected, ulps=2)


@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_equals_float64(isa, with_bias):
    for n, offset in itertools.product(LENGTHS[1:], (0, 3)):
        rng = np.random.default_rng(n)
        x, w = normal(rng, n, offset) + np.float32(5), normal(rng, n, 1)
        b = normal(rng, n, 2) if with_bias else None
        wide = x.astype(np.float64)
        centred = wide - wide.mean()
        normed = centred / np.sqrt(np.mean(centred**2) + 1e-5) * w
        # The mean (about 5) is rounded to float32: an error of 5 * 2^-24 before dividing.
        # With the bias the sum may cancel, so a unit of each term is allowed.
        floor = 5 * EPS32 * np.abs(w) / np.sqrt(np.mean(centred**2) + 1e-5) + 3 * EPS32 * np.abs(
            normed
        )
        expected = normed + (b if with_bias else 0)
        assert_close(testing.layer_norm(isa, x, w, b, 1e-5), expected, ulps=2, floor=floor)


ACTIVATIONS = ["silu", "gelu_tanh", "relu", "drelu", "fatrelu:0.3"]


def reference_activation(name: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "gelu_tanh":
            return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np.where(x > np.float32(name.partition(":")[2] or 0), x, 0)


def activation_inputs() -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.concatenate(
        [
            np.linspace(-110, 110, 4001),
            rng.standard_normal(3000),
            rng.standard_normal(500) * 1e-3,
            [0.0, -0.0, 1e-38, -1e-38, 1e-45, 3e38, -3e38, 1e4, -1e4, 88.7, -88.7, 103.9, -103.9],
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_accurate_over_their_whole_range(isa, name):
    x = activation_inputs()
    h, act = testing.activate(isa, name, x, None)
    expected = reference_activation(name, x)
    # exp is good to 2 units, the quotient and products add 3. The exponent of GELU is itself
    # rounded: a relative error of 4 units in u becomes one of 4 |u| units in exp(u).
    ulps = np.full(len(x), 0.0 if "relu" in name else 5.0)
    if name == "gelu_tanh":
        u = 1.6 * (np.abs(x.astype(np.float64)) + 0.045 * np.abs(x.astype(np.float64)) ** 3)
        ulps += 4 * np.where(x < 0, np.minimum(u, 110), 0)
    floor = 0.0 if "relu" in name else 2 * float(np.finfo(np.float32).smallest_subnormal)
    bound = ulps * EPS32 * np.abs(expected) + floor * np.maximum(1, np.abs(x))
    error = np.abs(h.astype(np.float64) - expected)
    worst = int(np.argmax(error - bound))
    assert error[worst] <= bound[worst], (x[worst], h[worst], expected[worst])
    np.testing.assert_array_equal(h, act)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_times_up_at_every_length(isa, name):
    for n in LENGTHS:
        rng = np.random.default_rng(n)
        gate, up = normal(rng, n, 1, 2.0), normal(rng, n, 2)
        h, act = testing.activate(isa, name, gate, up)
        alone, same = testing.activate(isa, name, gate, None)
        np.testing.assert_array_equal(act, alone)
        np.testing.assert_array_equal(alone, same)
        factor = testing.activate(isa, name, up, None)[0] if name == "drelu" else up
        np.testing.assert_array_equal(h, act * factor)
        assert_close(act, reference_activation(name, gate), ulps=30)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_do_not_hide_what_is_not_a_number(isa, name):
    gate = np.ones(37, np.float32)
    gate[[0, 17, 36]] = np.nan
    gate[5] = np.inf
    h, _ = testing.activate(isa, name, gate, None)
    assert list(np.flatnonzero(np.isnan(h))) == [0, 17, 36]
    assert h[5] == np.inf


def test_sums_and_products_of_rows(isa):
    for n in LENGTHS:
        rng = np.random.default_rng(n)
        x, y = normal(rng, n, 1), normal(rng, n, 3)
        np.testing.assert_array_equal(testing.add(isa, x, y), x + y)
        np.testing.assert_array_equal(testing.scale(isa, x, 0.3), x * np.float32(0.3))
        expected = x.astype(np.float64) * np.float32(0.7) + y.astype(np.float64) * np.float32(-1.3)
        floor = 2 * EPS32 * (np.abs(x) + 2 * np.abs(y))  # the two products may cancel
        assert_close(testing.blend(isa, x, 0.7, y, -1.3), expected, ulps=1, floor=floor)


@pytest.mark.parametrize("kind", ["interleaved", "halves"])
def test_rope_turns_each_pair(isa, kind):
    for pairs in LENGTHS[:40]:
        rng = np.random.default_rng(pairs)
        tail = 3  # elements of the head that are not rotated
        x = normal(rng, 2 * pairs + tail, 1)
        angle = rng.uniform(-np.pi, np.pi, pairs)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first = np.arange(pairs) * 2 if kind == "interleaved" else np.arange(pairs)
        second = first + (1 if kind == "interleaved" else pairs)
        expected = x.astype(np.float64)
        a, b = expected[first].copy(), expected[second].copy()
        expected[first], expected[second] = a * cos - b * sin, a * sin + b * cos
        out = testing.rope(isa, kind, x, cos, sin)
        # Two products and a difference, each rounded; they may cancel.
        assert_close(out, expected, ulps=0, floor=2 * EPS32 * np.max(np.abs(x), initial=0) * 1.5)
        np.testing.assert_array_equal(out[2 * pairs :], x[2 * pairs :])


def test_half_precision_is_widened_exactly_for_all_values(isa):
    halves = np.arange(65536, dtype=np.uint16)
    out = testing.f16_to_f32(isa, halves)
    np.testing.assert_array_equal(out, halves.view(np.float16).astype(np.float32))


def test_half_precision_is_rounded_to_nearest_even(isa):
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1].astype(np.float64) + halves[1:]) / 2
    x = np.concatenate(
        [
            halves,
            between,
            np.nextafter(between, 0),
            np.nextafter(between, 1e9),
            [65519.0, 65520.0, 1e9, np.inf, 1e-30],
        ]
    ).astype(np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(testing.f32_to_f16(isa, x), expected)
    assert np.isnan(testing.f32_to_f16(isa, np.full(17, np.nan, np.float32)).view(np.float16)).all()


def test_half_precision_conversions_at_every_length(isa):
    for n in LENGTHS:
        x = normal(np.random.default_rng(n), n, 1)
        halves = testing.f32_to_f16(isa, x)
        np.testing.assert_array_equal(halves.view(np.float16), x.astype(np.float16))
        wide = testing.f16_to_f32(isa, misaligned(halves, 3))
        np.testing.assert_array_equal(wide, x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("groups", [0, 1, 2, 5])
def test_quantised_groups_are_within_half_a_step(isa, groups):
    sizes = np.repeat(10.0 ** np.arange(-2, groups - 2), 32).astype(np.float32)
    x = normal(np.random.default_rng(groups), 32 * groups, 1) * sizes
    codes, scales = testing.kv_quantize(isa, x)
    scale = scales.view(np.float16).astype(np.float64)
    largest = np.abs(x.reshape(-1, 32)).max(axis=1, initial=0)
    np.testing.assert_allclose(scale, largest / 127, rtol=2**-11, atol=2**-25)
    back = testing.kv_unpack(isa, codes, scales)
    np.testing.assert_array_equal(back, codes * np.repeat(scale, 32).astype(np.float32))
    # Half a step; the largest may be cut at 127 since the scale is rounded to float16.
    assert np.all(np.abs(back - x) <= np.repeat(scale, 32) * (0.5 + 127 * 2**-11))


def test_quantising_keeps_zeros_and_shows_infinity(isa):
    codes, scales = testing.kv_quantize(isa, np.zeros(32, np.float32))
    assert not codes.any() and not scales.any()
    x = np.ones(32, np.float32)
    x[3] = np.inf
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(testing.kv_unpack(isa, *testing.kv_quantize(isa, x))).all()


@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_blocks_of_keys_are_unpacked_by_column(isa, head_dim):
    rng = np.random.default_rng(head_dim)
    block = testing.KV_BLOCK
    codes = rng.integers(-127, 128, (head_dim, block)).astype(np.int8)
    scales = rng.uniform(0, 1, (head_dim // 32, block)).astype(np.float16)
    out = testing.kv_unpack(isa, codes.ravel(), scales.view(np.uint16).ravel(), block=True)
    expected = codes * np.repeat(scales.astype(np.float32), 32, axis=0)
    np.testing.assert_array_equal(out.reshape(head_dim, block), expected)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_small_products_equal_float64(isa, rows, kind):
    rng = np.random.default_rng(rows)
    multiply = getattr(testing, f"multiply_{kind}")
    for depth in (0, 1, 5, 64):
        for cols in (*range(1, 18), 31, 32, 33, 63, 64, 65, 80, 128, 131):
            a = rng.standard_normal((rows, depth)).astype(np.float32)
            b = rng.standard_normal((depth, cols)).astype(np.float16)
            c = rng.standard_normal((rows, cols)).astype(np.float32)
            b32 = b.astype(np.float32)
            given = b32 if kind == "f32" else b.view(np.uint16)
            exact = a.astype(np.float64) @ b32
            # A chain of `depth` fused (or twice rounded) sums.
            bound = 2 * EPS32 * (depth + 1) * (np.abs(a) @ np.abs(b32) + np.abs(c) + 1e-30)
            assert np.all(np.abs(multiply(isa, a, given) - exact) <= bound)
            assert np.all(np.abs(multiply(isa, a, given, c) - (c + exact)) <= bound)


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_rows_of_a_product_do_not_depend_on_their_neighbours(isa, kind):
    rng = np.random.default_rng(3)
    multiply = getattr(testing, f"multiply_{kind}")
    b = rng.standard_normal((64, 80)).astype(np.float16)
    given = b.astype(np.float32) if kind == "f32" else b.view(np.uint16)
    a = rng.standard_normal((16, 64)).astype(np.float32)
    whole = multiply(isa, a, given)
    for rows in range(1, 16):
        np.testing.assert_array_equal(multiply(isa, a[:rows].copy(), given), whole[:rows])
    np.testing.assert_array_equal(testing.multiply_f32(isa, a, b.astype(np.float32)), whole)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 33, 64])
def test_softmax_weighs_only_what_is_visible(isa, cols, softcap):
    rng = np.random.default_rng(cols)
    third = cols // 3
    for begin, end in ((0, cols), (0, 1), (cols // 2, cols), (cols - 1, cols), (third, third + 1)):
        s = (rng.standard_normal(cols) * 10).astype(np.float32)
        s[:begin] = np.nan  # whatever lies outside must not matter
        s[end:] = np.inf
        weights, correction, largest, total = testing.softmax(
            isa, s, begin, end, softcap, -np.inf, 0.0
        )
        seen = s[begin:end].astype(np.float64)
        if softcap:
            seen = softcap * np.tanh(seen / softcap)
        expected = np.zeros(cols)
        expected[begin:end] = np.exp(seen - seen.max())
        # exp is good to 2 units; its argument is a rounded difference, and with a softcap a rounded
        # product of tanh, itself good to 3 units.
        argument = np.abs(s - seen.max()) / 2 + (3 * softcap if softcap else 0)
        bound = EPS32 * (2 + argument[begin:end]) * expected[begin:end] + 2e-38
        assert np.all(np.abs(weights[begin:end] - expected[begin:end]) <= bound)
        assert (weights[:begin] == 0).all() and (weights[end:] == 0).all()
        assert correction == 0
        np.testing.assert_allclose(largest, seen.max(), rtol=1e-6)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("before", [-3.0, 50.0])
def test_softmax_goes_on_from_earlier_blocks(isa, before):
    s = np.linspace(-2, 7, 40, dtype=np.float32)
    weights, correction, largest, total = testing.softmax(isa, s, 0, 40, 0.0, before, 2.5)
    expected_max = max(7.0, before)
    assert largest == expected_max
    np.testing.assert_allclose(correction, np.exp(before - expected_max), rtol=1e-6)
    # exp is good to 2 units and its argument, down to -52, is a rounded difference.
    assert_close(weights, np.exp(s.astype(np.float64) - expected_max), ulps=2 + 52 / 2)
    np.testing.assert_allclose(total, 2.5 * correction + weights.sum(dtype=np.float64), rtol=1e-6)
    if before > 7:
        assert correction == 1.0  # exactly: nothing needs scaling then


def test_softcap_is_accurate_for_small_scores(isa):
    s = np.array([0.0, 1e-4, -1e-4, 3e-3], np.float32)
    weights, _, largest, _ = testing.softmax(isa, s, 0, 4, 50.0, -np.inf, 0.0)
    np.testing.assert_allclose(largest, 50 * np.tanh(3e-3 / 50), rtol=2e-7)
    np.testing.assert_allclose(weights, np.exp(s.astype(np.float64) - 3e-3), rtol=3e-7)


def test_norms_and_sums_of_many_rows_on_two_threads(isa):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 576)).astype(np.float32)
    y = rng.standard_normal((40, 576)).astype(np.float32)
    w = rng.standard_normal(576).astype(np.float32)
    results = []
    for threads in (1, 2):
        backend = testing.TestVectorBackend(isa, threads)
        results.append((backend.norm(x, w), backend.add(x, y, w), backend.add(x, y)))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
    normed, added, plain = results[0]
    np.testing.assert_array_equal(normed[3], testing.rms_norm(isa, x[3], w, 1e-5))
    np.testing.assert_array_equal(added[39], x[39] + testing.rms_norm(isa, y[39], w, 1e-5))
    np.testing.assert_array_equal(plain, x + y)


def test_mismatched_shapes_are_refused():
    backend = testing.TestVectorBackend("scalar")
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="equal shapes"):
        backend.add(x, np.zeros((2, 9), np.float32))
    with pytest.raises(ValueError, match="a norm of 7 elements on rows of 8"):
        backend.norm(x, np.zeros(7, np.float32))
