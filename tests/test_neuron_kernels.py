"""Accumulating neuron statistics and selecting neurons, against the definitions in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer._core import testing
from reference.neurons import core_set, statistic_scores

ISAS = testing.available_isas()
STATISTICS = ["count", "count_gate", "count_abs", "flock"]
COUNTS = STATISTICS[:3]


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    return request.param


@pytest.fixture(params=[1, 2])
def backend(request, isa):
    return testing.TestVectorBackend(isa, request.param)


def accumulate(backend, statistic: str, alpha: float, h: np.ndarray) -> np.ndarray:
    scores, bad = backend.accumulate(statistic, alpha, h, np.zeros(h.shape[1], np.float32))
    assert bad == -1
    return scores


def assert_equal_scores(statistic: str, actual: np.ndarray, h: np.ndarray, alpha: float) -> None:
    expected = statistic_scores(statistic, h, h, alpha)
    if statistic == "flock":
        # Each term is rounded to float32 once, and so is each of the n sums.
        np.testing.assert_allclose(actual, expected, rtol=(len(h) + 1) * 2.0**-24, atol=1e-44)
    else:
        np.testing.assert_array_equal(actual, expected)


def tied(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Few distinct values, zeros of both signs among them: nearly every threshold is a tie."""
    values = np.array([-2, -1, -0.0, 0.0, 0.5, 1, 1, 2, 3], np.float32)
    return rng.choice(values, shape)


def spread(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Every magnitude that float32 has, denormals too."""
    sign = rng.choice(np.array([-1, 1], np.float32), shape)
    with np.errstate(under="ignore"):
        return sign * (2.0 ** rng.uniform(-149, 60, shape)).astype(np.float32)


KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    "tied": tied,
    "spread": spread,
    "equal": lambda rng, shape: np.full(shape, 0.25, np.float32),
    "sparse": lambda rng, shape: np.maximum(rng.standard_normal(shape) - 1.5, 0).astype(np.float32),
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)).astype(np.float32),
    "zero": lambda rng, shape: np.zeros(shape, np.float32),
    "denormal": lambda rng, shape: (rng.integers(-9, 10, shape) * 1.4e-45).astype(np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("alpha", [0.4, 0.05, 1.0])
def test_scores_follow_the_definition(backend, statistic, kind, alpha):
    h = KINDS[kind](np.random.default_rng(1), (9, 700))
    assert_equal_scores(statistic, accumulate(backend, statistic, alpha, h), h, alpha)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_scores_follow_the_definition_at_every_width(isa, statistic):
    backend = testing.TestVectorBackend(isa, 1)
    for n in [*range(1, 70), 127, 128, 129, 1023, 1025, 2049]:
        rng = np.random.default_rng(n)
        for h in (rng.standard_normal((3, n)).astype(np.float32), tied(rng, (3, n))):
            assert_equal_scores(statistic, accumulate(backend, statistic, 0.4, h), h, 0.4)


@pytest.mark.parametrize("statistic", COUNTS)
@pytest.mark.parametrize(
    "alpha, positive",
    [
        (0.5, 3),
        (0.5, 5),
        (0.5, 1),
        (0.1, 15),
        (0.3, 5),
        (0.7, 5),
        (0.7, 15),
        (0.9, 5),
        (0.25, 2),
        (0.001, 4),
        (0.45, 10),
        (0.55, 10),
        (0.35, 10),
    ],
)
def test_half_a_neuron_is_rounded_up_as_python_does(isa, statistic, alpha, positive):
    h = np.zeros((1, 40), np.float32)
    h[0, 7 : 7 + positive] = np.arange(1, positive + 1)
    scores = accumulate(testing.TestVectorBackend(isa, 1), statistic, alpha, h)
    assert_equal_scores(statistic, scores, h, alpha)
    assert scores.sum() == max(1, int(np.floor(alpha * positive + 0.5)))


@pytest.mark.parametrize("statistic", COUNTS)
def test_ties_go_to_the_lower_index(isa, statistic):
    h = np.array([[1, 2, 1, 2, 2, 1, 0, 2, 1, 1]], np.float32)
    scores = accumulate(testing.TestVectorBackend(isa, 1), statistic, 0.3, h)  # 3 of 9
    np.testing.assert_array_equal(np.flatnonzero(scores), [1, 3, 4])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_scores_do_not_depend_on_chunks_or_threads(isa, statistic):
    h = np.random.default_rng(5).standard_normal((37, 1536)).astype(np.float32)
    whole = accumulate(testing.TestVectorBackend(isa, 2), statistic, 0.4, h)
    backend = testing.TestVectorBackend(isa, 1)
    for chunk in (1, 7, 16):
        scores = np.zeros(1536, np.float32)
        for at in range(0, len(h), chunk):
            scores, bad = backend.accumulate(statistic, 0.4, h[at : at + chunk], scores)
            assert bad == -1
        np.testing.assert_array_equal(scores, whole)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("column", [0, 16, 699])
def test_the_first_row_that_is_not_finite_is_named_and_nothing_added(
    backend, statistic, value, column
):
    h = np.random.default_rng(2).standard_normal((12, 700)).astype(np.float32)
    h[10, 5] = np.nan
    h[4, column] = value
    before = np.full(700, 3, np.float32)
    scores, bad = backend.accumulate(statistic, 0.4, h, before)
    assert bad == 4
    np.testing.assert_array_equal(scores, before)


def test_large_activations_do_not_overflow(isa):
    h = np.full((2, 50), 3e38, np.float32)
    scores = accumulate(testing.TestVectorBackend(isa, 1), "flock", 0.4, h)
    np.testing.assert_allclose(scores, 2 / 50, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5, np.nan])
def test_senseless_alpha_is_refused(alpha):
    backend = testing.TestVectorBackend("scalar")
    with pytest.raises(ValueError, match="alpha is .* expected a share"):
        backend.accumulate("count", alpha, np.ones((1, 4), np.float32), np.zeros(4, np.float32))


def plain_select(scores: np.ndarray, k: int) -> np.ndarray:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return np.array(sorted(i for i in order[:k] if scores[i] > 0), np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_the_highest_scores_in_order(isa, kind):
    backend = testing.TestVectorBackend(isa)
    for n in (1, 2, 15, 33, 700):
        scores = KINDS[kind](np.random.default_rng(n), (1, n))[0]
        for k in sorted({1, 2, n // 5 + 1, n // 2, n, n + 3}):
            np.testing.assert_array_equal(backend.select(scores, k), plain_select(scores, k))


def test_select_agrees_with_core_set_on_counts(isa):
    counts = np.random.default_rng(0).integers(0, 12, 1536).astype(np.float32)
    chosen = testing.TestVectorBackend(isa).select(counts, round(0.4 * 1536))
    np.testing.assert_array_equal(chosen, core_set(counts, 0.4))
    assert chosen.dtype == np.int32


def test_select_of_nothing_is_empty(isa):
    backend = testing.TestVectorBackend(isa)
    assert backend.select(np.zeros(0, np.float32), 3).size == 0
    assert backend.select(np.ones(4, np.float32), 0).size == 0
    assert backend.select(np.array([0, -1, -0.0], np.float32), 2).size == 0


def test_select_takes_infinite_scores_and_refuses_nan(isa):
    backend = testing.TestVectorBackend(isa)
    scores = np.array([1, np.inf, 2, -np.inf], np.float32)
    np.testing.assert_array_equal(backend.select(scores, 2), [1, 2])
    scores[3] = np.nan
    with pytest.raises(ArithmeticError, match="neuron 3 of 4 is NaN"):
        backend.select(scores, 2)
