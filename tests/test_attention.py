"""Attention with its KV cache against a plain NumPy attention in float64."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer._core import testing

ISAS = testing.available_isas()
EPS32 = float(np.finfo(np.float32).eps)


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    return request.param


class Case:
    """Random q, k, v of n positions and the attention that a model would ask for."""

    def __init__(self, n, n_head=4, n_head_kv=2, head_dim=32, seed=0, **spec):
        rng = np.random.default_rng(seed)
        self.n, self.n_head, self.n_head_kv, self.head_dim = n, n_head, n_head_kv, head_dim
        self.q = rng.standard_normal((n, n_head * head_dim)).astype(np.float32)
        self.k = rng.standard_normal((n, n_head_kv * head_dim)).astype(np.float32)
        self.v = rng.standard_normal((n, n_head_kv * head_dim)).astype(np.float32)
        self.spec = {"scale": head_dim**-0.5, **spec}

    def run(
        self,
        isa,
        chunks=None,
        threads=1,
        kv="f16",
        kv_v=None,
        n_ctx=None,
        cache=None,
        first=0,
        f32_activations=True,
    ):
        """Rows of [first, n) through the backend, in the given chunks, after those in the cache."""
        backend = testing.TestVectorBackend(isa, threads, f32_activations)
        if cache is None:
            cache = backend.make_cache(
                kv, kv_v or kv, 2, n_ctx or self.n, self.n_head_kv, self.head_dim
            )
        out, at = [], first
        for size in chunks or [self.n - first]:
            rows = slice(at, at + size)
            out.append(
                backend.attend(
                    cache,
                    1,
                    at,
                    self.q[rows],
                    self.k[rows],
                    self.v[rows],
                    n_head=self.n_head,
                    **self.spec,
                )
            )
            at += size
        assert at == self.n
        self.cache = cache
        return np.concatenate(out)

    def expected(self, kv="f16", kv_v=None):
        """The definition, on keys and values rounded as the cache rounds them."""
        q = self._heads(self.q, self.n_head, self.spec.get("q_norm"))
        k = self._heads(self.k, self.n_head_kv, self.spec.get("k_norm"))
        v = self.v.reshape(self.n, self.n_head_kv, self.head_dim).astype(np.float64)
        k, v = round_kv(k, kv), round_kv(v, kv_v or kv)
        group = self.n_head // self.n_head_kv
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        s = np.einsum("ihd,jhd->hij", q, k) * self.spec["scale"]
        if cap := self.spec.get("softcap"):
            s = cap * np.tanh(s / cap)
        i, j = np.arange(self.n)[:, None], np.arange(self.n)[None, :]
        hidden = j > i
        if window := self.spec.get("window"):
            hidden |= j <= i - window
        s = np.where(hidden, -np.inf, s)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return np.einsum("hij,jhd->ihd", p, v).reshape(self.n, -1)

    def _heads(self, x, n_head, norm):
        x = x.reshape(self.n, n_head, self.head_dim).astype(np.float64)
        if norm is not None:
            x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * norm
        kind = self.spec.get("rope", "none")
        if kind == "none":
            return x
        freq = self.spec["freq"].astype(np.float64)
        pairs = len(freq)
        a = np.arange(pairs) * 2 if kind == "interleaved" else np.arange(pairs)
        b = a + 1 if kind == "interleaved" else a + pairs
        angle = np.arange(self.n)[:, None, None] * freq
        scale = self.spec.get("rope_scale", 1.0)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        out = x.copy()
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out


def round_kv(x, kind):
    if kind == "f32":
        return x.astype(np.float32).astype(np.float64)
    if kind == "f16":
        return x.astype(np.float32).astype(np.float16).astype(np.float64)
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)
    scale = scale.astype(np.float64)
    codes = np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -127, 127)
    return (codes * scale).reshape(x.shape)


def assert_attention(actual, expected, kv="f32"):
    # Weighted means of values of about 1. A score is off by some 2^-22 and so is its weight. Where
    # keys or values are rounded, the last bit of a norm or rope may tip one to its other neighbour:
    # a step of 2^-10 (f16) or 1/127 (q8_0) in one of very many terms.
    tolerance = {"f32": 4e-6, "f16": 1e-4, "q8_0": 2e-3}[kv]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def assert_rounded_attention(actual, case, expected, kv):
    """Large batches on tiles: weights and values lose what bf16 does not hold, 2^-9 of each."""
    largest = np.abs(case.v).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2 * 2.0**-9 * largest + 2e-3)
    # Rounding has no direction: on average less is lost, of terms that partly cancel.
    floor = 2e-4 if kv == "q8_0" else 0
    assert np.abs(actual - expected).mean() < 2.0**-8 * np.abs(expected).mean() + floor


def frequencies(pairs: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)


SPECS = {
    "plain": {},
    "window": {"window": 5},
    "wide window": {"window": 70},
    "softcap": {"softcap": 3.0},
    "halves": {"rope": "halves", "freq": frequencies(16)},
    "partial interleaved": {"rope": "interleaved", "freq": frequencies(6), "rope_scale": 1.2},
    "everything": {
        "rope": "halves",
        "freq": frequencies(16),
        "window": 100,
        "softcap": 20.0,
        "q_norm": np.linspace(0.5, 2, 32, dtype=np.float32),
        "k_norm": np.linspace(2, 0.5, 32, dtype=np.float32),
    },
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_attention_follows_the_definition(isa, spec, kv):
    case = Case(150, **SPECS[spec])
    expected = case.expected(kv)
    assert_attention(case.run(isa, kv=kv), expected, kv)
    assert_attention(case.run(isa, [16, 1, 5, *[16] * 8], kv=kv), expected, kv)
    assert_rounded_attention(case.run(isa, kv=kv, f32_activations=False), case, expected, kv)


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize(
    "n_head, n_head_kv, head_dim",
    [
        (1, 1, 8),
        (4, 2, 7),
        (3, 3, 20),
        (9, 3, 64),
        (14, 2, 64),
        (4, 4, 80),
        (8, 1, 128),
        (8, 4, 256),
    ],
)
def test_every_grouping_and_head_size(isa, n_head, n_head_kv, head_dim, kv):
    case = Case(70, n_head, n_head_kv, head_dim)
    expected = case.expected(kv)
    assert_attention(case.run(isa, kv=kv), expected, kv)
    assert_attention(case.run(isa, [1, 2, 3, *[16] * 4], kv=kv), expected, kv)
    assert_rounded_attention(case.run(isa, kv=kv, f32_activations=False), case, expected, kv)


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_every_short_head_at_every_offset(isa, kv):
    """The backend copies what it is given to aligned memory; a head of an odd size puts the heads
    behind it, and the rows below, at every address."""
    for head_dim in range(1, 36):
        rope = {"rope": "halves", "freq": frequencies(head_dim // 2)} if head_dim > 1 else {}
        case = Case(21, n_head=6, n_head_kv=3, head_dim=head_dim, seed=head_dim, **rope)
        expected = case.expected(kv)
        assert_attention(case.run(isa, kv=kv), expected, kv)
        assert_attention(case.run(isa, [1, 3, 16, 1], kv=kv), expected, kv)


@pytest.mark.parametrize("kv, kv_v", [("q8_0", "f16"), ("f16", "q8_0"), ("f32", "f16")])
def test_keys_and_values_may_differ_in_type(isa, kv, kv_v):
    case = Case(90)
    loosest = "q8_0" if "q8_0" in (kv, kv_v) else "f16"
    assert_attention(case.run(isa, kv=kv, kv_v=kv_v), case.expected(kv, kv_v), loosest)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 513])
def test_every_length_around_block_edges(isa, n):
    case = Case(n, n_head=2, n_head_kv=1, head_dim=16)
    whole = case.expected("f32")
    assert_attention(case.run(isa, kv="f32"), whole)
    if n > 1:
        assert_attention(case.run(isa, [n - 1, 1], kv="f32"), whole)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("n", [17, 31, 33, 64, 128, 513])
def test_large_batches_begin_and_end_anywhere(isa, n, window, group):
    case = Case(n, n_head=2 * group, n_head_kv=2, window=window)
    expected = case.expected()
    for chunks in [n], [n // 2, n - n // 2], [1, n - 1]:
        out = case.run(isa, chunks, f32_activations=False)
        assert_rounded_attention(out, case, expected, "f16")


@pytest.mark.parametrize("f32_activations", [False, True])
@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("n", [20, 90])
def test_what_a_longer_text_left_in_the_cache_is_not_seen(isa, n, kv, f32_activations):
    longer, case = Case(128, seed=1), Case(n, seed=2)
    fresh = case.run(isa, kv=kv, f32_activations=f32_activations)
    longer.k[:], longer.v[:] = np.nan, np.inf
    longer.run(isa, kv=kv)
    again = case.run(isa, kv=kv, f32_activations=f32_activations, cache=longer.cache)
    np.testing.assert_array_equal(again, fresh)


@pytest.mark.parametrize("window", [0, 3, 64, 300])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_bits_of_few_rows_do_not_depend_on_chunks_or_threads(isa, kv, window):
    n, prefix = 560, 490  # across the edges of blocks and spans at 512
    case = Case(n, window=window, softcap=10.0, rope="halves", freq=frequencies(16))

    def rest(chunks, threads):
        cache = testing.TestVectorBackend(isa, 1).make_cache(kv, kv, 2, n, 2, 32)
        start = Case.__new__(Case)
        start.__dict__ = {**case.__dict__, "n": prefix}
        start.run(isa, [prefix], cache=cache)
        return case.run(isa, chunks, threads, cache=cache, first=prefix)

    one_by_one = rest([1] * 70, 1)
    for chunks in ([16, 16, 16, 16, 6], [3] * 23 + [1], [7] * 10, [2] * 35):
        np.testing.assert_array_equal(rest(chunks, 1), one_by_one)
        np.testing.assert_array_equal(rest(chunks, 2), one_by_one)
    assert_attention(one_by_one, case.expected(kv)[prefix:], kv)


@pytest.mark.parametrize("f32_activations", [False, True])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_large_batches_do_not_depend_on_threads(isa, kv, f32_activations):
    case = Case(300, n_head=6, n_head_kv=3)
    one, two = (
        case.run(isa, kv=kv, threads=threads, f32_activations=f32_activations) for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("window", [0, 20])
def test_large_keys_keep_their_scores_in_large_batches(isa, window):
    """Keys with an offset of hundreds, as some models have: bf16 alone would be off by whole units
    in every score."""
    case = Case(200, n_head=3, n_head_kv=1, head_dim=64, window=window)
    case.k[:, ::8] += 200
    case.q[:, ::8] *= 0.05
    expected = case.expected("f16")
    assert_rounded_attention(case.run(isa, f32_activations=False), case, expected, "f16")


def test_positions_far_out_keep_their_angle():
    """The angle is a product in double: float32 would be off by 0.004 here."""
    n, first = 3, 100_000
    freq = np.array([1.0, 0.7], np.float32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4)).astype(np.float32)
    backend = testing.TestVectorBackend("scalar")
    cache = backend.make_cache("f32", "f32", 1, first + n, 1, 4)
    backend.attend(cache, 0, first, x, x, x, n_head=1, rope="interleaved", freq=freq, window=1)
    saved = np.frombuffer(cache.save(first + n), np.float32)
    keys = saved[: (first + n) * 4].reshape(-1, 4)[first:]
    angle = np.arange(first, first + n)[:, None] * freq.astype(np.float64)
    expected = x[:, 0::2] * np.cos(angle) - x[:, 1::2] * np.sin(angle)
    np.testing.assert_allclose(keys[:, 0::2], expected, rtol=0, atol=1e-6)


def test_rewritten_positions_replace_what_was_there(isa):
    case, other = Case(40, seed=1), Case(40, seed=2)
    case.run(isa, kv="f32")
    again = other.run(isa, kv="f32", cache=case.cache)
    np.testing.assert_array_equal(again, Case(40, seed=2).run(isa, kv="f32"))


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("n", [1, 64, 100])
def test_saved_positions_continue_elsewhere(isa, kv, n):
    case = Case(120, rope="halves", freq=frequencies(16))
    whole = case.run(isa, [n, *[4] * ((120 - n) // 4), *[1] * ((120 - n) % 4)], kv=kv)
    saved = case.cache.save(n)
    cache = testing.TestVectorBackend(isa).make_cache(kv, kv, 2, 4000, 2, 32)
    cache.restore(saved, n)
    assert cache.committed_bytes > 0
    rest = case.run(isa, [1] * (120 - n), cache=cache, first=n)
    np.testing.assert_array_equal(rest, whole[n:])
    assert cache.save(n) == saved


def test_saved_state_of_another_size_is_refused():
    backend = testing.TestVectorBackend("scalar")
    cache = backend.make_cache("f16", "f16", 1, 100, 1, 32)
    with pytest.raises(ValueError, match="saved KV state of 3 bytes, expected 128"):
        cache.restore(b"abc", 1)
    with pytest.raises(ValueError, match="101 KV positions"):
        cache.save(101)
    with pytest.raises(ValueError, match="-1 KV positions"):
        cache.restore(b"", -1)


def test_cache_memory_is_committed_as_it_fills():
    backend = testing.TestVectorBackend("scalar")
    n_ctx, width = 1 << 20, 4 * 128
    cache = backend.make_cache("f16", "f16", 3, n_ctx, 4, 128)  # 6 GiB of address space
    before = resident_bytes()
    assert cache.committed_bytes == 0
    x = np.ones((64, width), np.float32)
    for position in (0, 64, 128):
        for layer in range(3):
            backend.attend(cache, layer, position, x, x, x, n_head=4)
    written = 3 * 192 * width * 2 * 2
    assert cache.committed_bytes == written
    assert resident_bytes() - before < written + (8 << 20)


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        pytest.skip("no /proc/self/statm here")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("f16", "f16", 1, 0, 1, 32), "all must be positive"),
        (("q8_0", "f16", 1, 10, 1, 48), "q8_0 needs heads of a multiple of 32"),
        (("f16", "f16", 1, 10, 1, 1 << 14), "too large"),
        (("q4_0", "f16", 1, 10, 1, 32), "unknown KV type"),
    ],
)
def test_senseless_caches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        testing.TestVectorBackend("scalar").make_cache(*arguments)


def test_attention_that_does_not_fit_is_refused():
    backend = testing.TestVectorBackend("scalar")
    cache = backend.make_cache("f16", "f16", 2, 10, 2, 8)
    q, kv = np.zeros((4, 32), np.float32), np.zeros((4, 16), np.float32)
    backend.attend(cache, 0, 6, q, kv, kv, n_head=4)
    with pytest.raises(ValueError, match="positions 7 to 10 of layer 0 do not fit"):
        backend.attend(cache, 0, 7, q, kv, kv, n_head=4)
    with pytest.raises(ValueError, match="layer 2"):
        backend.attend(cache, 2, 0, q, kv, kv, n_head=4)
    with pytest.raises(ValueError, match="k's width is 32, expected 16"):
        backend.attend(cache, 0, 0, q, q, kv, n_head=4)
    with pytest.raises(ValueError, match="n_head modulo n_head_kv is 1"):
        backend.attend(cache, 0, 0, q, kv, kv, n_head=3)
    with pytest.raises(ValueError, match="rope frequencies"):
        backend.attend(cache, 0, 0, q, kv, kv, n_head=4, rope="halves")


def test_sessions_share_a_backend():
    """Two callers, one backend: each gets what it would have got alone."""
    import threading

    case = Case(80, n_head=4, n_head_kv=2)
    alone = case.run("scalar", [16] * 5)
    backend = testing.TestVectorBackend("scalar", 2)
    results = {}

    def work(name):
        cache = backend.make_cache("f16", "f16", 2, 80, 2, 32)
        out = [
            backend.attend(
                cache,
                1,
                at,
                case.q[at : at + 16],
                case.k[at : at + 16],
                case.v[at : at + 16],
                n_head=4,
                **case.spec,
            )
            for at in range(0, 80, 16)
        ]
        results[name] = np.concatenate(out)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(3):
        np.testing.assert_array_equal(results[i], alone)
