"""The CUDA backend's operations, one by one, against the CPU backend and NumPy.

On every machine its sources run on the host (tests/cuda_host); where there is a GPU, on it too.
Tolerances: float32 sums of n terms differ by at most n * 2^-24 of the sum of magnitudes between
any two orders; a device's exp, tanh and cos are within 2 units in the last place.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from coreinfer._core import testing
from cuda_host.build import cublas_library
from cuda_host.target import target  # noqa: F401  (a fixture)
from gguf_stream import block_size
from reference.neurons import largest, statistic_scores
from synthetic_blocks import PLAIN_TYPES, TENSOR_TYPES, random_blocks

EPS = 2.0**-24
QUANTISED = [t for t in TENSOR_TYPES if t not in PLAIN_TYPES]
GROUP = {t: 16 if t in ("Q2_K", "Q3_K", "Q6_K") else 32 for t in QUANTISED}


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "f32"])
def f32(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def cuda(target, f32):  # noqa: F811
    return testing.AnyBackend("CUDA", f32_activations=f32)


@pytest.fixture(scope="module")
def fast(target):  # noqa: F811
    """For what float32 activations do not change, but that attention then makes no codes.

    Nor does it where a head is not a multiple of 32, as some are below.
    """
    return testing.AnyBackend("CUDA")


@pytest.fixture
def launches(target):  # noqa: F811
    """How many kernels have been launched."""
    if target != "host":
        pytest.skip("the host's runtime counts launches")
    return ctypes.CDLL(os.environ["COREINFER_CUDA_LIBRARY"]).cuda_host_kernel_launches


@pytest.fixture
def products(target, monkeypatch):  # noqa: F811
    """Batches above 16 rows go to cuBLAS's stand-in."""
    monkeypatch.setenv("COREINFER_CUBLAS_LIBRARY", str(cublas_library()))


@pytest.fixture(scope="module")
def cpu():
    return testing.AnyBackend("CPU", f32_activations=True)


def stored(type_name: str, rows: int, cols: int, seed: int = 0) -> tuple[bytes, np.ndarray]:
    """Bytes of a matrix as a file has it, and its values in float64."""
    rng = np.random.default_rng([seed, rows, cols])
    blocks = random_blocks(rng, type_name, rows * cols // block_size(type_name)[0], 1.0)
    data = np.frombuffer(blocks.tobytes(), np.uint8).reshape(rows, -1)
    values = quants.dequantize(data, GGMLQuantizationType[type_name]).reshape(rows, cols)
    return blocks.tobytes(), values.astype(np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def rounded_to_8_bits(x: np.ndarray) -> np.ndarray:
    """Rows as the integer kernels see them: in every 16, the largest becomes 127."""
    groups = x.reshape(len(x), -1, 16)
    most = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(groups * (np.float32(127) / most))
    return (np.where(most > 0, codes, 0).astype(np.float64) * (most / 127)).reshape(x.shape)


def assert_product(actual: np.ndarray, x: np.ndarray, w: np.ndarray, extra: float = 0.0) -> None:
    expected = x.astype(np.float64) @ w.T + extra
    bound = (np.abs(x) @ np.abs(w).T + abs(extra)) * (x.shape[1] + 8) * EPS
    assert np.all(np.abs(actual - expected) <= bound)


# ---- Rows


@pytest.mark.parametrize("width", [8, 33, 960, 4096])
def test_norm_and_add_equal_the_cpu(fast, cpu, width):
    x, y, weight, bias = normal(3, width), normal(3, width, seed=1), normal(width), normal(width)
    for got, expected in [
        (fast.norm(x, weight), cpu.norm(x, weight)),
        (fast.norm(x + 3, weight, bias), cpu.norm(x + 3, weight, bias)),
        (fast.add(x, y), cpu.add(x, y)),
        (fast.add(x, y, weight), cpu.add(x, y, weight)),
    ]:
        # Sums in double on both sides: one rounding of the factor apart at most.
        np.testing.assert_allclose(got, expected, rtol=4 * EPS, atol=4 * EPS * np.abs(y).max())


# ---- Matrices


@pytest.mark.parametrize("type_name", TENSOR_TYPES)
@pytest.mark.parametrize("n", [1, 5])
def test_products_equal_the_formats_definition(cuda, f32, type_name, n):
    data, w = stored(type_name, 37, 768)
    x = normal(n, 768)
    (got,) = cuda.linear(x, [cuda.load(type_name, data, 37, 768)])
    rounds = type_name in QUANTISED and not f32
    assert_product(got, rounded_to_8_bits(x) if rounds else x, w)


@pytest.mark.parametrize("type_name", TENSOR_TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(37, 768), (700, 2304)])
def test_a_matrix_takes_what_is_said_before_it_is_loaded(target, type_name, rows, cols):  # noqa: F811
    backend = testing.AnyBackend("CUDA")
    small, _ = stored("Q4_0" if type_name in QUANTISED else "F32", 1, 32)
    kept = [backend.load("Q4_0" if type_name in QUANTISED else "F32", small, 1, 32)]
    before = backend.device_peak
    data, _ = stored(type_name, rows, cols)
    kept += [backend.load(type_name, data, rows, cols)]
    assert backend.device_peak - before == backend.loaded_bytes(type_name, rows, cols)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [1, 7, 33, 130])
def test_float_matrices_of_any_width(cuda, type_name, cols):
    data, w = stored(type_name, 5, cols)
    x = normal(3, cols)
    (got,) = cuda.linear(x, [cuda.load(type_name, data, 5, cols)])
    assert_product(got, x, w)


@pytest.mark.parametrize("types", [["F16", "Q8_0", "Q8_0"], ["Q4_0", "Q4_1", "Q4_K"]])
def test_several_matrices_of_several_types_from_one_normalised_input(cuda, cpu, f32, types):
    made = [stored(t, rows, 256, seed=rows) for t, rows in zip(types, (64, 16, 17), strict=True)]
    x, norm_weight = normal(4, 256), normal(256, seed=2)
    weights = [cuda.load(t, d, len(w), 256) for t, (d, w) in zip(types, made, strict=True)]
    got = cuda.linear(x, weights, norm_weight=norm_weight, accumulate=True)
    normed = cpu.norm(x, norm_weight)
    for actual, type_name, (_, w) in zip(got, types, made, strict=True):
        rounds = type_name in QUANTISED and not f32
        # A code may fall on the other side of a half when the norm differs in its last bit.
        slack = 0.0 if f32 else np.abs(normed).max() / 127 * np.abs(w).max()
        rows = rounded_to_8_bits(normed) if rounds else normed
        bound = (np.abs(rows) @ np.abs(w).T + 1) * 300 * EPS + slack
        assert np.all(np.abs(actual - (rows @ w.T + 1.0)) <= bound)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q4_0", "Q6_K", "IQ4_XS"])
def test_a_rows_bits_do_not_depend_on_the_other_rows(cuda, type_name):
    data, _ = stored(type_name, 24, 512)
    weight = cuda.load(type_name, data, 24, 512)
    x, norm_weight = normal(16, 512), normal(512)
    alone = np.concatenate(
        [cuda.linear(x[i : i + 1], [weight], norm_weight=norm_weight)[0] for i in range(16)]
    )
    for n in (2, 3, 4, 7, 16):
        together = cuda.linear(x[:n], [weight], norm_weight=norm_weight)[0]
        np.testing.assert_array_equal(together, alone[:n])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "drelu", "fatrelu:0.05"])
@pytest.mark.parametrize("types", [("F16", "F16"), ("Q4_K", "Q4_K"), ("Q4_K", "Q6_K")])
@pytest.mark.parametrize("n", [1, 6])
def test_hidden_rows_equal_the_cpu(cuda, cpu, f32, activation, types, n):
    x = normal(n, 256) * 0.1
    made = [stored(t, 48, 256, seed=i) for i, t in enumerate(types)]
    bias = normal(48)
    rows = rounded_to_8_bits(x).astype(np.float32) if not f32 and types[0] != "F16" else x
    for gated in (True, False):
        gate = (types[1], made[1][0], 48, 256) if gated else None
        up = (types[0], made[0][0], 48, 256)
        results = []
        for backend, given in ((cuda, x), (cpu, rows)):
            results.append(
                backend.ffn_hidden(
                    given,
                    backend.load(*gate) if gate else None,
                    backend.load(*up),
                    activation,
                    None if gated else bias,
                )
            )
        for got, expected in zip(*results, strict=True):
            scale = np.abs(expected).max() + 1
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=300 * EPS * scale)


@pytest.mark.parametrize("types", [("F16", "F16"), ("Q8_0", "F32"), ("Q4_0", "BF16")])
@pytest.mark.parametrize("n", [1, 6])
def test_what_lies_behind_hidden_rows_is_not_read(cuda, cpu, types, n):
    """Core neurons are of any number, and a matrix of floats is read 16 bytes at a time."""
    n_ff, n_embd = 37, 64
    x = rounded_to_8_bits(normal(n, n_embd) * 0.1).astype(np.float32)
    shapes = [(types[0], n_ff, n_embd)] * 2 + [(types[1], n_embd, n_ff)]
    made = [(t, stored(t, *shape, seed=i)[0], *shape) for i, (t, *shape) in enumerate(shapes)]
    got, expected = (b.feed_forward(x, *(b.load(*m) for m in made)) for b in (cuda, cpu))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=300 * EPS * scale)


@pytest.mark.parametrize(
    ("type_name", "cols"), [(t, 512) for t in TENSOR_TYPES] + [("F16", 33), ("BF16", 33)]
)
def test_products_of_large_batches_equal_the_formats_definition(products, f32, type_name, cols):
    cuda = testing.AnyBackend("CUDA", f32_activations=f32)
    data, w = stored(type_name, 13, cols)
    x = normal(17, cols)
    (got,) = cuda.linear(x, [cuda.load(type_name, data, 13, cols)])
    # Rows have 8 bits beside BF16, else both sides have 11; rounded once each.
    rounding = 0 if f32 or type_name == "F32" else 2.0**-9 if type_name == "BF16" else 2.0**-10
    bound = (np.abs(x) @ np.abs(w).T) * (rounding + (cols + 8) * EPS)
    assert np.all(np.abs(got - x @ w.T) <= bound)


def test_an_input_is_narrowed_once_for_all_its_matrices(launches, products):
    cuda = testing.AnyBackend("CUDA")
    x = normal(19, 256) * 1e-3

    def count(*types: str) -> int:
        made = [stored(t, 24, 256, seed=i) for i, t in enumerate(types)]
        weights = [cuda.load(t, d, 24, 256) for t, (d, _) in zip(types, made, strict=True)]
        before = launches()
        got = cuda.linear(x, weights)
        count = launches() - before
        for rows, (_, w) in zip(got, made, strict=True):
            bound = (np.abs(x) @ np.abs(w).T) * 2.0**-7  # rows or weights have 8 bits at least
            assert np.all(np.abs(rows - x @ w.T) <= bound)
        return count

    assert count("F16") == 2  # the largest, the rows
    assert count("F16", "F16", "F16") == 2
    assert count("BF16", "F16", "BF16") == 3
    assert count("Q4_K", "Q6_K", "F16") == 4  # and a dequantisation each
    gate, up = (cuda.load("F16", stored("F16", 24, 256, seed=i)[0], 24, 256) for i in (1, 2))
    before = launches()
    cuda.ffn_hidden(x, gate, up, "silu")
    assert launches() - before == 3


# ---- Compaction


@pytest.mark.parametrize("type_name", TENSOR_TYPES)
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_compaction_keeps_every_value(cuda, f32, type_name, share):
    """A product with the picked columns is the dense one with the other inputs at zero."""
    n_ff, n_embd = 1024, 256
    rng = np.random.default_rng(5)
    neurons = np.sort(rng.choice(n_ff, int(share * n_ff), replace=False)).astype(np.int32)
    up, up_values = stored(type_name, n_ff, n_embd, seed=1)
    down, down_values = stored(type_name, n_embd, n_ff, seed=2)
    bias = normal(n_ff)
    core = cuda.compact(
        None,
        cuda.load(type_name, up, n_ff, n_embd),
        cuda.load(type_name, down, n_embd, n_ff),
        neurons.tolist(),
        bias,
    )
    assert [(w.rows, w.cols) for w in core.weights] == [
        (len(neurons), n_embd),
        (n_embd, len(neurons)),
    ]
    np.testing.assert_array_equal(np.float32(core.up_bias), bias[neurons])
    rounds = type_name in QUANTISED and not f32
    x, h = normal(2, n_embd), normal(2, len(neurons))
    (got,) = cuda.linear(x, core.weights[:1])
    assert_product(got, rounded_to_8_bits(x) if rounds else x, up_values[neurons])
    (got,) = cuda.linear(h, core.weights[1:])
    picked = down_values[:, neurons]
    if rounds:
        # Rounded in the order in which the columns are stored.
        order = stored_order(neurons, GROUP[type_name])
        padded = np.where(order >= 0, h[:, order], 0).astype(np.float32)
        columns = np.where(order >= 0, picked[:, order], 0)
        assert_product(got, rounded_to_8_bits(padded), columns)
    else:
        assert_product(got, h, picked)
    if type_name == "Q4_0" and share == 0.2:
        bytes_of = core.weights[1].bytes / (n_embd * n_ff // 32 * 18)
        assert bytes_of <= 1.75 * share  # codes in steps of 4, scales of all groups


def test_picked_columns_take_batches_of_any_size(cuda):
    up, _ = stored("Q4_K", 512, 256, seed=1)
    down, _ = stored("Q4_K", 256, 512, seed=2)
    loaded = [cuda.load("Q4_K", up, 512, 256), cuda.load("Q4_K", down, 256, 512)]
    core = cuda.compact(None, *loaded, list(range(0, 512, 5)))
    h = normal(37, 103)
    (together,) = cuda.linear(h, core.weights[1:])
    alone = np.concatenate([cuda.linear(row[None], core.weights[1:])[0] for row in h])
    np.testing.assert_array_equal(together, alone)


def stored_order(neurons: np.ndarray, group: int) -> np.ndarray:
    """Which pick stands in each stored column: groups in steps of 4, chunks of 32; -1: none."""
    order: list[int] = []
    for g in np.unique(neurons // group):
        picks = np.flatnonzero(neurons // group == g).tolist()
        order += picks + [-1] * (-len(picks) % 4)
    return np.array(order + [-1] * (-len(order) % 32))


def test_compaction_takes_weights_that_are_not_on_the_device(cuda):
    up, _ = stored("Q8_0", 64, 64, seed=1)
    down, values = stored("Q8_0", 64, 64, seed=2)
    loaded = [cuda.load("Q8_0", up, 64, 64), cuda.load("Q8_0", down, 64, 64)]
    neurons = [1, 2, 40, 63]
    from_device = cuda.compact(None, *loaded, neurons)
    h = normal(1, 4)
    (expected,) = cuda.linear(h, from_device.weights[1:])
    fresh = testing.AnyBackend("CUDA")
    other = [fresh.load("Q8_0", up, 64, 64), cuda.load("Q8_0", down, 64, 64)]
    (got,) = fresh.linear(h, fresh.compact(None, *other, neurons).weights[1:])
    assert np.abs(got - h @ values[:, neurons].T).max() < 0.5
    assert np.abs(got - expected).max() < 0.5


# ---- Neurons

SHAPES = [(1, 1), (3, 31), (5, 1000), (21, 2049)]


def rows_of(kind: str, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng([7, *shape])
    if kind == "tied":
        return rng.choice(np.array([-2, -1, -0.0, 0.0, 0.5, 1, 1, 2, 3], np.float32), shape)
    if kind == "spread":
        sign = rng.choice(np.array([-1, 1], np.float32), shape)
        with np.errstate(under="ignore"):
            return sign * (2.0 ** rng.uniform(-149, 60, shape)).astype(np.float32)
    if kind == "negative":
        return -np.abs(rng.standard_normal(shape)).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "tied", "spread", "negative"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistic", ["count", "count_gate", "count_abs", "flock"])
def test_scores_equal_the_definition_and_the_cpu(fast, cpu, statistic, shape, kind):
    h = rows_of(kind, shape)
    zeros = np.zeros(shape[1], np.float32)
    for alpha in (0.01, 0.4, 1.0):
        got, bad = fast.accumulate(statistic, alpha, h, zeros)
        assert bad == -1
        if statistic == "flock":
            # Norms are summed in another order, in double: a term may round the other way.
            expected, _ = cpu.accumulate(statistic, alpha, h, zeros)
            np.testing.assert_allclose(got, expected, rtol=len(h) * 2 * EPS, atol=1e-44)
        else:
            np.testing.assert_array_equal(got[0], statistic_scores(statistic, h, h, alpha))


def test_scores_do_not_depend_on_how_the_rows_are_cut(fast):
    h = rows_of("normal", (29, 700))
    for statistic in ("count", "flock"):
        scores = np.zeros(700, np.float32)
        whole, _ = fast.accumulate(statistic, 0.3, h, scores)
        for begin, end in [(0, 1), (1, 17), (17, 29)]:
            scores = fast.accumulate(statistic, 0.3, h[begin:end], scores)[0][0]
        np.testing.assert_array_equal(scores, whole[0])


@pytest.mark.parametrize("statistic", ["count", "flock"])
@pytest.mark.parametrize("shape", [(1, 5), (16, 33), (150, 70)])
def test_marks_get_the_scores_of_their_rows(fast, cpu, statistic, shape):
    """One call gives, at every mark, the bits of a call that ends there."""
    h = rows_of("normal", shape)
    marks = sorted({1, 2, 4, 8, shape[0] // 2, 63, 64, 65, 128, shape[0]})
    marks = [m for m in marks if 0 < m <= shape[0]]
    start = np.full(shape[1], 3.0, np.float32)
    both = []
    for backend in (fast, cpu):
        got, _ = backend.accumulate(statistic, 0.4, h, start, marks=marks)
        for mark, scores in zip([shape[0], *marks], got, strict=True):
            expected, _ = backend.accumulate(statistic, 0.4, h[:mark], start)
            np.testing.assert_array_equal(scores, expected[0])
        both.append(got)
    # Counts are whole numbers; of the other, a term may round the other way.
    np.testing.assert_allclose(*both, rtol=0 if statistic == "count" else len(h) * 2 * EPS)


def test_a_batch_is_counted_in_two_launches(fast, launches):
    h = rows_of("normal", (150, 70))
    for statistic in ("count", "flock"):
        before = launches()
        fast.accumulate(statistic, 0.4, h, np.zeros(70, np.float32), marks=[1, 2, 4, 64, 128])
        assert launches() - before == 2


@pytest.mark.parametrize("statistic", ["count", "flock"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_and_nothing_is_added(fast, statistic, value):
    h = rows_of("normal", (6, 100))
    h[2, 50] = h[4, 3] = value
    scores, bad = fast.accumulate(statistic, 0.4, h, np.full(100, 2.0, np.float32))
    assert bad == 2
    np.testing.assert_array_equal(scores[0], np.full(100, 2.0, np.float32))


@pytest.mark.parametrize("statistic", ["count", "flock"])
def test_a_bad_row_is_looked_up_after_many_calls(fast, cpu, statistic):
    """Rows before it count, it and what follows do not; the first one is named."""
    h = rows_of("normal", (9, 70))
    h[5, 3] = h[7, 0] = np.nan
    zeros = np.zeros(70, np.float32)
    expected, _ = cpu.accumulate(statistic, 0.4, h[:4], zeros)
    for backend in (fast, cpu):
        scores, bad = backend.accumulate(statistic, 0.4, h, zeros, cuts=[0, 4, 6, 8])
        assert bad == 5
        np.testing.assert_allclose(scores, expected, rtol=8 * EPS)


@pytest.mark.parametrize("kind", ["normal", "tied", "spread", "negative"])
@pytest.mark.parametrize("n", [1, 33, 512, 513, 5000])
def test_selection_equals_the_definition(fast, kind, n):
    scores = rows_of(kind, (1, n))[0]
    positive = int((scores > 0).sum())
    for k in {1, n // 5, n // 2, n}:
        expected = largest(scores, min(k, positive)) if positive else []
        assert fast.select(scores[None], k) == [list(expected)]


def test_all_layers_are_selected_at_once(fast, cpu):
    """As one by one, with a layer of few and one of no positive entries among them."""
    scores = rows_of("normal", (7, 600))
    scores[2] = np.minimum(scores[2], 0)
    scores[4, 5:] = -1
    together = fast.select(scores, 100)
    assert together == [fast.select(row[None], 100)[0] for row in scores] == cpu.select(scores, 100)
    assert [len(chosen) for chosen in together] == [
        100,
        100,
        0,
        100,
        (scores[4] > 0).sum(),
        100,
        100,
    ]


def test_selection_refuses_nan(fast, cpu):
    scores = rows_of("normal", (3, 50))
    scores[1, 7] = scores[1, 30] = np.nan
    for backend in (fast, cpu):
        with pytest.raises(ArithmeticError, match="neuron 7 of 50 is NaN"):
            backend.select(scores, 3)


def test_a_copy_within_the_device_is_equal(fast):
    x = normal(3, 41)
    np.testing.assert_array_equal(fast.copy(x), x)


# ---- Attention


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim"), [(2, 2, 64), (6, 2, 32), (8, 1, 96), (10, 1, 128)]
)
def test_attention_equals_the_cpu(fast, cpu, kv, n_head, n_head_kv, head_dim):
    results = []
    for backend in (fast, cpu):
        cache = backend.cache(kv, kv, 2, 400, n_head_kv, head_dim)
        out = []
        for first, n, options in [
            (0, 20, {"rope": "halves"}),
            (20, 230, {"rope": "halves", "head_norm": np.abs(normal(head_dim))}),
            (250, 1, {"rope": "interleaved", "softcap": 20.0}),
            (251, 3, {"rope": "halves", "window": 130}),
            (254, 2, {}),
        ]:
            q = normal(n, n_head * head_dim, seed=first)
            k, v = (normal(n, n_head_kv * head_dim, seed=first + s) for s in (1, 2))
            out.append(backend.attend(cache, 1, first, q, k, v, **options))
        results.append((out, cache.save(256)))
    for got, expected in zip(results[0][0], results[1][0], strict=True):
        # Rotated keys may differ in their last bit before they are rounded to the cache's type.
        step = {"f32": 0.0, "f16": 2.0**-11, "q8_0": 2.0**-7}[kv]
        np.testing.assert_allclose(got, expected, atol=2e-5 + step * 0.2)
    assert len(results[0][1]) == len(results[1][1])


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim"), [(3, 3, 8), (4, 2, 80), (7, 1, 64), (2, 1, 256)]
)
def test_tiles_of_many_rows_equal_the_cpu(fast, cpu, n_head, n_head_kv, head_dim):
    """Alone over all positions and in spans, with windows that end within tiles and spans."""
    caches = [(b, b.cache("f16", "f16", 1, 400, n_head_kv, head_dim)) for b in (fast, cpu)]
    first = 0
    for n, options in [
        (17, {}),
        (70, {"window": 50}),
        (17, {"softcap": 5.0}),
        (131, {"window": 30, "softcap": 5.0}),
        (18, {"window": 150}),
        (140, {}),
    ]:
        q = normal(n, n_head * head_dim, seed=first)
        k, v = (normal(n, n_head_kv * head_dim, seed=first + s) for s in (1, 2))
        got, expected = (b.attend(c, 0, first, q, k, v, **options) for b, c in caches)
        np.testing.assert_allclose(got, expected, atol=2e-5)
        first += n


@pytest.mark.parametrize("dim", [8, 80, 256])
def test_many_spans_are_merged(fast, cpu, dim):
    """More spans than the block that merges them has threads, and some in a window."""
    n_ctx = 40_000 if dim == 8 else 2_000
    state = normal(2 * n_ctx, dim).tobytes()
    q, k, v = normal(2, 2 * dim), normal(2, dim, seed=1), normal(2, dim, seed=2)
    for window in (0, 700):
        results = []
        for backend in (fast, cpu):
            cache = backend.cache("f32", "f32", 1, n_ctx, 1, dim)
            cache.restore(state, n_ctx)
            results.append(backend.attend(cache, 0, n_ctx - 2, q, k, v, window=window))
        np.testing.assert_allclose(*results, atol=2e-5)


@pytest.mark.parametrize(
    ("kv", "n_head", "n_head_kv", "head_dim"),
    [("f16", 5, 1, 80)]  # blocks of 8 bits do not lie across heads
    + [(kv, *shape) for kv in ("f16", "q8_0") for shape in [(2, 2, 64), (6, 2, 32), (16, 2, 256)]],
)
def test_attentions_bits_depend_neither_on_other_rows_nor_on_the_order_of_blocks(
    target,  # noqa: F811
    fast,
    cpu,
    monkeypatch,
    kv,
    n_head,
    n_head_kv,
    head_dim,
):
    """Over a border of spans; what a row leaves in the cache is the same, too."""
    n, first, n_ctx = 9, 252, 300
    start = cpu.cache(kv, kv, 1, n_ctx, n_head_kv, head_dim)
    rows = (normal(first, h * head_dim, seed=h) for h in (n_head, n_head_kv, n_head_kv))
    cpu.attend(start, 0, 0, *rows, rope="halves")
    state = start.save(first)
    q, k, v = (
        normal(n, h * head_dim, seed=100 + i) for i, h in enumerate((n_head, n_head_kv, n_head_kv))
    )
    norm = np.abs(normal(head_dim))
    for options in ({"rope": "interleaved"}, {"rope": "halves", "head_norm": norm, "window": 130}):
        results = []
        for step, backwards in [(n, False), (1, False), (4, False), (n, target == "host")]:
            if backwards:
                monkeypatch.setenv("CUDA_HOST_ORDER", "backwards")
            cache = fast.cache(kv, kv, 1, n_ctx, n_head_kv, head_dim)
            cache.restore(state, first)
            out = [
                fast.attend(
                    cache,
                    0,
                    first + i,
                    q[i : i + step],
                    k[i : i + step],
                    v[i : i + step],
                    **options,
                )
                for i in range(0, n, step)
            ]
            results.append((np.concatenate(out), cache.save(first + n)))
            monkeypatch.delenv("CUDA_HOST_ORDER", raising=False)
        for got, saved in results[1:]:
            np.testing.assert_array_equal(got, results[0][0])
            assert saved == results[0][1]


def test_rows_that_follow_attention_in_its_memory_are_read_anew(cuda, f32):
    """Attention leaves codes of its result for the next matrix, which may get other rows."""
    data, w = stored("Q8_0", 24, 64)
    weight = cuda.load("Q8_0", data, 24, 64)
    cache = cuda.cache("f16", "f16", 1, 64, 1, 32)
    for i in range(4):
        cuda.attend(cache, 0, i, normal(1, 64), normal(1, 32), normal(1, 32))
        x = normal(1, 64, seed=i)  # where one of the freed buffers was
        (got,) = cuda.linear(x, [weight])
        assert_product(got, x if f32 else rounded_to_8_bits(x), w)


@pytest.mark.parametrize(
    ("n_ctx", "n_head_kv", "n"), [(32768, 1, 7), (160_000, 1, 2), (160_000, 2, 1)]
)
def test_sums_over_a_long_context_stay_within_their_memory(fast, cpu, n_ctx, n_head_kv, n):
    """Up to 60 heads of 256: 16 MiB of partial sums a row, so 4 rows at a time, or above 64 MiB."""
    n_head, dim = 60, 256
    caches = [(b, b.cache("q8_0", "q8_0", 1, n_ctx, n_head_kv, dim)) for b in (fast, cpu)]
    q = normal(n, n_head * dim)
    k, v = (normal(n, n_head_kv * dim, seed=s) for s in (1, 2))
    before = fast.device_peak
    got, expected = (b.attend(c, 0, n_ctx - n, q, k, v, window=1) for b, c in caches)
    np.testing.assert_array_equal(got, expected)
    others = 4 << 20  # q, k, v and the result
    assert fast.device_peak - before <= (64 << 20) + others


@pytest.mark.parametrize("side", ["k", "v"])
def test_rows_do_not_see_a_nan_behind_them(fast, side):
    rows = {"q": normal(40, 128), "k": normal(40, 64, seed=1), "v": normal(40, 64, seed=2)}
    rows[side][29, 3] = np.nan
    cache = fast.cache("f16", "f16", 1, 64, 1, 64)
    finite = np.isfinite(fast.attend(cache, 0, 0, rows["q"], rows["k"], rows["v"]))
    assert finite[:29].all()
    assert not finite[29:, 3 :: 64 if side == "v" else 1].any()


def test_a_restored_cache_attends_like_the_saved_one(fast):
    for kv in ("f16", "q8_0"):
        cache = fast.cache(kv, kv, 1, 64, 2, 32)
        fast.attend(cache, 0, 0, normal(10, 128), normal(10, 64), normal(10, 64, seed=3))
        copy = fast.cache(kv, kv, 1, 64, 2, 32)
        copy.restore(cache.save(10), 10)
        q, k = normal(1, 128, seed=4), normal(1, 64, seed=5)
        np.testing.assert_array_equal(
            fast.attend(copy, 0, 10, q, k, k), fast.attend(cache, 0, 10, q, k, k)
        )
        assert copy.save(11) == cache.save(11)
