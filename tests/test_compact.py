"""Compaction of the CPU backend: picked neurons, values exactly kept, in one contiguous buffer."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer._core import testing
from synthetic_blocks import PLAIN_TYPES, TENSOR_TYPES
from test_linear import ISAS, PACKED_TYPES, activations, check_product, matrix

N_EMBD = 256
N_FF = 512


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    return request.param


def picks(name: str, n_ff: int = N_FF) -> np.ndarray:
    """Selections that meet the corners of a column group: empty ones, single columns, whole ones,
    every remainder of 4."""
    rng = np.random.default_rng(7)
    chosen = {
        "one": [n_ff // 2 + 5],
        "first_and_last": [0, n_ff - 1],
        "every_third": range(0, n_ff, 3),
        "far_apart": range(7, n_ff, 101),
        "none_in_some_groups": [*range(3), *range(70, 96), *range(200, 209)],
        "whole_groups": [*range(32, 64), *range(256, 272)],
        "random_fifth": np.sort(rng.choice(n_ff, n_ff // 5, replace=False)),
        "all_but_one": [n for n in range(n_ff) if n != 100],
        "all": range(n_ff),
    }[name]
    return np.array(list(chosen), dtype=np.int32)


SELECTIONS = ["one", "first_and_last", "every_third", "far_apart", "none_in_some_groups",
              "whole_groups", "random_fifth", "all_but_one", "all"]  # fmt: skip


class Ffn:
    """A layer's gate, up and down as stored and as values."""

    def __init__(self, type_name: str, n_ff: int = N_FF, n_embd: int = N_EMBD, seed: int = 0):
        self.type_name = type_name
        self.shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
        self.data, self.values = {}, {}
        for i, (name, shape) in enumerate(self.shapes.items()):
            self.data[name], self.values[name] = matrix(type_name, *shape, seed=seed + i)

    def load(self, backend, name: str, **options):
        return backend.load(self.type_name, self.data[name], *self.shapes[name], **options)

    def layer(self, backend, neurons, gated: bool = True, up_bias=(), zeros: bool = False):
        gate = self.load(backend, "gate") if gated else None
        return testing.TestLayer(gate, self.load(backend, "up"), self.load(backend, "down"),
                                 neurons.tolist(), list(up_bias), zeros)  # fmt: skip


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("type_name", PACKED_TYPES)
def test_picked_weights_are_those_of_the_file(isa, type_name, selection):
    backend = testing.TestBackend(isa, False, 2)
    ffn, neurons = Ffn(type_name), picks(selection)
    made = backend.compact([ffn.layer(backend, neurons)])
    gate, up, down = made.layers[0]
    np.testing.assert_array_equal(gate.values(isa), ffn.values["gate"][neurons])
    np.testing.assert_array_equal(up.values(isa), ffn.values["up"][neurons])
    np.testing.assert_array_equal(down.values(isa), ffn.values["down"][:, neurons])


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_products_with_picked_weights_equal_numpy(isa, type_name, f32):
    backend = testing.TestBackend(isa, f32, 2)
    ffn = Ffn(type_name)
    for selection in ("one", "every_third", "none_in_some_groups", "all_but_one"):
        neurons = picks(selection)
        _, up, down = backend.compact([ffn.layer(backend, neurons)]).layers[0]
        assert (up.rows, up.cols) == (len(neurons), N_EMBD)
        assert (down.rows, down.cols) == (N_EMBD, len(neurons))
        for n in (1, 5, 33):
            x = activations(n, N_EMBD)
            (y,) = backend.linear(x, [up])
            check_product(y, x, ffn.values["up"][neurons], type_name, isa, f32)
            # Down: activations are rounded per source group. Scattered to all neurons, with zeros
            # for the others, they are rounded alike.
            h = activations(n, len(neurons), seed=1)
            (y,) = backend.linear(h, [down])
            scattered = np.zeros((n, N_FF), dtype=np.float32)
            scattered[:, neurons] = h
            check_product(y, scattered, ffn.values["down"], type_name, isa, f32)


@pytest.mark.parametrize("type_name", PLAIN_TYPES)
def test_picked_columns_for_zeros_give_what_all_give_with_zeros_elsewhere(isa, type_name):
    backend = testing.TestBackend(isa, False, 2)
    ffn = Ffn(type_name, n_embd=203)
    dense = ffn.load(backend, "down", zeros=True)
    for selection in SELECTIONS:
        neurons = picks(selection)
        made = backend.compact([ffn.layer(backend, neurons, gated=False, zeros=True)])
        _, down = made.layers[0]
        assert (down.rows, down.cols) == (203, len(neurons))
        for n in (1, 5):
            h = np.maximum(activations(n, len(neurons)), 0)
            scattered = np.zeros((n, N_FF), dtype=np.float32)
            scattered[:, neurons] = h
            np.testing.assert_array_equal(
                backend.linear(h, [down])[0], backend.linear(scattered, [dense])[0]
            )


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_all_neurons_picked_equals_dense_bit_for_bit(isa, type_name, f32):
    backend = testing.TestBackend(isa, f32, 2)
    ffn = Ffn(type_name)
    picked = backend.compact([ffn.layer(backend, picks("all"))]).layers[0]
    for name, weight in zip(("gate", "up", "down"), picked, strict=True):
        dense = ffn.load(backend, name)
        for n in (1, 3, 16):
            x = activations(n, dense.cols)
            np.testing.assert_array_equal(
                backend.linear(x, [weight])[0], backend.linear(x, [dense])[0]
            )


@pytest.mark.parametrize("f32", [False, True], ids=["fast", "f32"])
@pytest.mark.parametrize("type_name", TENSOR_TYPES)
def test_bits_with_picked_weights_depend_on_nothing_but_the_row(isa, type_name, f32):
    ffn, neurons = Ffn(type_name), picks("random_fifth")
    h = activations(16, len(neurons))
    expected = None
    for name, threads in (("scalar", 1), (isa, 1), (isa, 3)):
        backend = testing.TestBackend(name, f32, threads)
        down = backend.compact([ffn.layer(backend, neurons)]).layers[0][2]
        (y,) = backend.linear(h, [down])
        expected = y if expected is None else expected
        np.testing.assert_array_equal(y, expected)
        for n in (1, 2, 3, 7, 15):
            np.testing.assert_array_equal(backend.linear(h[:n], [down])[0], expected[:n])


def test_layers_of_all_types_lie_in_one_buffer():
    backend = testing.TestBackend("scalar", False, 2)
    neurons = picks("random_fifth")
    layers = [Ffn(t, seed=i).layer(backend, neurons) for i, t in enumerate(TENSOR_TYPES)]
    made = backend.compact(layers)
    spans = sorted((w.address, w.bytes) for layer in made.layers for w in layer)
    for (begin, size), (following, _) in zip(spans, spans[1:], strict=False):
        assert begin % 64 == 0
        assert 0 <= following - (begin + size) < 64
    last, size = spans[-1]
    assert last + size - spans[0][0] <= made.buffer_bytes < last + size - spans[0][0] + 64
    read = sum(
        2 * len(neurons) * ffn_row_bytes(t, N_EMBD) + N_EMBD * ffn_row_bytes(t, N_FF)
        for t in TENSOR_TYPES
    )
    assert made.source_bytes == read


def ffn_row_bytes(type_name: str, cols: int) -> int:
    return len(matrix(type_name, 1, cols)[0])


@pytest.mark.parametrize(("beta", "bound"), [(0.2, 1.16), (0.4, 1.07)])
def test_bytes_of_core_weights_stay_close_to_their_share(beta, bound):
    n_ff, n_embd = 5504, 1024
    backend = testing.TestBackend("scalar", False, 2)
    ffn = Ffn("Q4_0", n_ff, n_embd)
    rng = np.random.default_rng(3)
    neurons = np.sort(rng.choice(n_ff, round(beta * n_ff), replace=False)).astype(np.int32)
    made = backend.compact([ffn.layer(backend, neurons)])
    dense = sum(len(data) for data in ffn.data.values())
    assert beta < made.buffer_bytes / dense <= bound * beta


def test_ungated_layers_keep_their_bias():
    backend = testing.TestBackend("scalar")
    neurons = picks("every_third")
    bias = activations(1, N_FF)[0]
    for type_name in ("F32", "Q8_0"):
        ffn = Ffn(type_name)
        made = backend.compact([ffn.layer(backend, neurons, gated=False, up_bias=bias)])
        assert len(made.layers[0]) == 2
        np.testing.assert_array_equal(made.up_bias[0], bias[neurons])


def test_float_weights_are_copied_bit_for_bit():
    backend = testing.TestBackend("scalar", True)
    for type_name in PLAIN_TYPES:
        ffn, neurons = Ffn(type_name), picks("random_fifth")
        _, up, down = backend.compact([ffn.layer(backend, neurons)]).layers[0]
        unit = np.eye(N_EMBD, dtype=np.float32)
        (columns,) = backend.linear(unit, [up])
        np.testing.assert_array_equal(columns.T, ffn.values["up"][neurons])
        unit = np.eye(len(neurons), dtype=np.float32)
        (columns,) = backend.linear(unit, [down])
        np.testing.assert_array_equal(columns.T, ffn.values["down"][:, neurons])


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([], "without neurons"),
        ([3, 3], "must ascend"),
        ([4, 2], "must ascend"),
        ([-1, 2], "entry 0 is -1"),
        ([5, N_FF], f"entry 1 is {N_FF}"),
    ],
)
def test_refuses_sets_that_are_not_sets(neurons, message):
    backend = testing.TestBackend("scalar")
    ffn = Ffn("Q4_0")
    with pytest.raises(ValueError, match=message):
        backend.compact([ffn.layer(backend, np.array(neurons, dtype=np.int32))])
