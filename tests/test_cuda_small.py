"""One small case of every family of the CUDA backend's kernels: what tells in seconds whether a
device works at all, and what the sanitizers, which slow kernels a hundredfold, can run to its end.

Exact comparisons with the definitions are in test_cuda_kernels.py and test_cuda_engine.py; these
tolerances are wide. Needs no `gguf` package.
"""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import _core
from coreinfer._core import testing
from cuda_host.target import target  # noqa: F401  (a fixture)
from gguf_stream import block_size
from make_synthetic_model import make_tiny_model
from synthetic_blocks import random_blocks

TOKENS = np.random.default_rng(0).integers(0, 320, 24, dtype=np.int32)


@pytest.fixture(scope="module")
def cuda(target):  # noqa: F811
    return testing.AnyBackend("CUDA")


@pytest.fixture(scope="module")
def cpu():
    return testing.AnyBackend("CPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("small") / "tiny.gguf"
    make_tiny_model(path, "llama", "F16", n_layer=2)
    return str(path)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> str:
    """Of which a limit can leave out a part: each matrix takes a page of 2 MiB."""
    path = tmp_path_factory.mktemp("small") / "large.gguf"
    make_tiny_model(path, "llama", "F16", n_ff=1024, n_layer=6)
    return str(path)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def blocks(type_name: str, rows: int, cols: int, seed: int = 0) -> bytes:
    rng = np.random.default_rng([seed, rows, cols])
    n = rows * cols // block_size(type_name)[0]
    return random_blocks(rng, type_name, n, 0.1).tobytes()


def assert_close(got, expected) -> None:
    """Within 2 % of the largest: 8-bit activations round to either side."""
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max(), rtol=0)


def test_norm(cuda, cpu):
    x, weight, bias = normal(3, 320), normal(320), normal(320, seed=1)
    assert_close(cuda.norm(x, weight), cpu.norm(x, weight))
    assert_close(cuda.norm(x, weight, bias), cpu.norm(x, weight, bias))


def test_add(cuda, cpu):
    x, y, weight = normal(3, 320), normal(3, 320, seed=1), normal(320)
    assert_close(cuda.add(x, y), cpu.add(x, y))
    assert_close(cuda.add(x, y, weight), cpu.add(x, y, weight))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_products(cuda, cpu, type_name):
    if type_name == "BF16":  # no quantiser needed: the upper halves of floats
        data = (normal(24, 256).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        data = blocks(type_name, 24, 256)
    for n in (1, 5, 20):
        x = normal(n, 256)
        (got,) = cuda.linear(x, [cuda.load(type_name, data, 24, 256)])
        (expected,) = cpu.linear(x, [cpu.load(type_name, data, 24, 256)])
        assert_close(got, expected)


@pytest.mark.parametrize("type_name", ["F16", "Q4_0"])
def test_hidden(cuda, cpu, type_name):
    gate, up = blocks(type_name, 48, 256, 1), blocks(type_name, 48, 256, 2)
    results = [
        b.ffn_hidden(
            normal(2, 256),
            b.load(type_name, gate, 48, 256),
            b.load(type_name, up, 48, 256),
            "silu",
            None,
        )
        for b in (cuda, cpu)
    ]
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("type_name", ["F16", "Q4_0", "Q6_K"])
def test_gather(cuda, type_name):
    """The picked rows and columns give what the dense matrices do for them."""
    up, down = blocks(type_name, 512, 256, 1), blocks(type_name, 256, 512, 2)
    dense = [cuda.load(type_name, up, 512, 256), cuda.load(type_name, down, 256, 512)]
    neurons = np.sort(np.random.default_rng(5).choice(512, 100, replace=False))
    core = cuda.compact(None, *dense, neurons.tolist())
    x, h = normal(2, 256), normal(2, 512)
    rest = np.setdiff1d(np.arange(512), neurons)
    h[:, rest] = 0
    assert_close(cuda.linear(x, core.weights[:1])[0], cuda.linear(x, dense[:1])[0][:, neurons])
    assert_close(cuda.linear(h[:, neurons], core.weights[1:])[0], cuda.linear(h, dense[1:])[0])


@pytest.mark.parametrize("statistic", ["count", "count_gate", "count_abs", "flock"])
def test_counts(cuda, cpu, statistic):
    h, zeros = normal(5, 1000), np.zeros(1000, np.float32)
    got, bad = cuda.accumulate(statistic, 0.4, h, zeros)
    expected, _ = cpu.accumulate(statistic, 0.4, h, zeros)
    assert bad == -1
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_selection(cuda, cpu):
    scores = normal(3, 600)
    assert cuda.select(scores, 100) == cpu.select(scores, 100)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_attention_and_rope(cuda, cpu, kv):
    results = []
    for backend in (cuda, cpu):
        cache = backend.cache(kv, kv, 1, 200, 2, 64)
        out = []
        for first, n, rope in [(0, 20, "halves"), (20, 130, "interleaved"), (150, 1, "halves")]:
            q, k, v = normal(n, 256), normal(n, 128, seed=1), normal(n, 128, seed=2)
            out.append(backend.attend(cache, 0, first, q, k, v, rope=rope))
        results.append(out)
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


def test_graphs_and_batches(target, model):  # noqa: F811
    """A batch, then steps of which all but the first are one graph launch; dense and core."""
    results = []
    for n_gpu_layers in (-1, 0):
        engine = _core.Engine(model, n_gpu_layers=n_gpu_layers)
        session = _core.Session(engine, n_ctx=64)
        session.prefill(TOKENS[:20], statistic="flock")
        rows = [session.logits()]
        core = session.select(beta=0.5)
        for chosen in (None, core):
            session.set_core(chosen)
            for token in TOKENS[20:]:
                session.decode(int(token))
                if chosen is None:
                    rows.append(session.logits())
        assert np.isfinite(session.logits()).all()
        results.append(np.stack(rows))
    np.testing.assert_allclose(*results, atol=0.1 * results[1].std())


def test_streamed_layers(target, large_model):  # noqa: F811
    """Under a limit below the model, layers come in one after the other and are gathered."""
    resident = _core.Engine(large_model, n_gpu_layers=-1, vram_limit=1 << 30)
    own = (1 << 30) - resident.backend["device_memory"]
    # The file holds an embedding table that stays on the host, and the plan counts it.
    limit = own + resident.weight_bytes
    limited = _core.Engine(large_model, n_gpu_layers=-1, vram_limit=limit)
    assert not limited.ffn_resident
    session = _core.Session(limited, n_ctx=32, n_batch=24)
    session.prefill(TOKENS[:18], statistic="flock", beta=0.1)
    session.set_core(session.select(beta=0.1))
    session.decode(1)
    assert np.isfinite(session.logits()).all()
