"""Memory of weights on the CPU: pieces of shared mappings, never overlapping, taken again."""

from __future__ import annotations

import numpy as np

from coreinfer._core import testing

CACHE_LINE = 64


def load(backend, values: np.ndarray):
    return backend.load("F32", values.astype("<f4").tobytes(), *values.shape)


def test_weights_lie_side_by_side_and_do_not_overlap():
    rng = np.random.default_rng(1)
    backend = testing.TestBackend("scalar")
    held = {}
    for i in range(300):
        rows, cols = (int(n) for n in rng.integers(1, 200, 2))
        held[i] = load(backend, np.full((rows, cols), i, np.float32))
        if i % 3 == 2:
            del held[rng.choice(list(held))]
        places = sorted((w.address, w.address + w.bytes) for w in held.values())
        assert all(a % CACHE_LINE == 0 for a, _ in places)
        assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:], strict=False))
    for i, weight in held.items():
        y = backend.linear(np.ones((1, weight.cols), np.float32), [weight])[0]
        assert (y == i * weight.cols).all()


def test_freed_memory_is_taken_again_and_neighbours_become_one():
    backend = testing.TestBackend("scalar")
    square = np.zeros((64, 64), np.float32)
    first, second, third, last = (load(backend, square) for _ in range(4))
    a, b, c, d = (w.address for w in (first, second, third, last))
    assert [b - a, c - b, d - c] == [square.nbytes] * 3
    del second
    assert load(backend, square).address == b
    del first, third  # on both sides of a free piece
    assert load(backend, np.zeros((3 * 64, 64), np.float32)).address == a


def test_weights_outlive_their_backend():
    backend = testing.TestBackend("scalar")
    weight = load(backend, np.arange(64, dtype=np.float32).reshape(1, 64))
    del backend
    other = testing.TestBackend("scalar")
    y = other.linear(np.ones((1, 64), np.float32), [weight])[0]
    assert y[0, 0] == 63 * 32
