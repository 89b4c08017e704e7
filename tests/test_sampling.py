"""Sampler: each step against its definition, determinism, and refusals that name the parameter."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import _core

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def logits_of(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def draws(logits: np.ndarray, n: int = 4000, **params) -> np.ndarray:
    """Share of each id over n draws."""
    sampler = _core.Sampler(**{**OFF, "temperature": 1.0, "seed": 7, **params})
    ids = [sampler.sample(logits) for _ in range(n)]
    return np.bincount(ids, minlength=len(logits)) / n


def test_temperature_zero_takes_the_likeliest_and_the_lower_of_equals():
    sampler = _core.Sampler(temperature=0.0)
    assert sampler.sample(np.array([1, 5, 5, 2], np.float32)) == 1


@pytest.mark.parametrize("n", [1, 17, 1023, 1024, 1025, 4099])
def test_temperature_zero_takes_the_first_of_the_largest_wherever_it_is(n):
    sampler = _core.Sampler(temperature=0.0)
    rng = np.random.default_rng(n)
    for most in (1, 3, 1000, 10**6):  # from all equal to hardly any
        logits = rng.integers(-most, 1, n).astype(np.float32)
        assert sampler.sample(logits) == np.argmax(logits)
        logits[rng.integers(n)] = np.nan
        with pytest.raises(ArithmeticError, match="NaN"):
            sampler.sample(logits)


def test_draws_follow_the_distribution():
    p = [0.5, 0.25, 0.125, 0.125]
    # Four standard errors of a share over 4000 draws are 0.032.
    np.testing.assert_allclose(draws(logits_of(p)), p, atol=0.032)


def test_temperature_sharpens_and_softens():
    p = np.array([0.6, 0.3, 0.1])
    for temperature in (0.5, 2.0):
        expected = p ** (1 / temperature)
        expected /= expected.sum()
        got = draws(logits_of(p.tolist()), temperature=temperature)
        np.testing.assert_allclose(got, expected, atol=0.032)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.6}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
    ],
)
def test_truncation_keeps_exactly_the_tokens_of_its_definition(params, kept):
    shares = draws(logits_of([0.5, 0.25, 0.16, 0.09]), **params)
    assert np.flatnonzero(shares).tolist() == kept
    p = np.array([0.5, 0.25, 0.16, 0.09])[kept]
    np.testing.assert_allclose(shares[kept], p / p.sum(), atol=0.032)


def test_typical_sampling_prefers_tokens_of_average_surprise():
    # Entropy 1.42 nats = p 0.24: the token of p 0.2 is nearest, the likeliest one furthest.
    p = [0.4, 0.2, 0.14, 0.13, 0.13]
    surprise = np.abs(-np.log(p) + np.sum(np.array(p) * np.log(p)))
    first = int(np.argmin(surprise))
    shares = draws(logits_of(p), typical_p=p[first] - 0.01)
    assert np.flatnonzero(shares).tolist() == [first]


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits():
    for logits, token in (([2.0, 1.9, -5], 0), ([-1.0, -1.2, -5], 0)):
        sampler = _core.Sampler(temperature=0.0, repeat_penalty=1.5)
        assert sampler.sample(np.array(logits, np.float32)) == token
        sampler.accept(token)
        assert sampler.sample(np.array(logits, np.float32)) == 1


def test_frequency_counts_and_presence_does_not():
    logits = np.array([3.0, 2.0, 0.0], np.float32)
    frequency = _core.Sampler(temperature=0.0, frequency_penalty=0.6)
    presence = _core.Sampler(temperature=0.0, presence_penalty=0.6)
    for sampler in (frequency, presence):
        sampler.accept(0)
        assert sampler.sample(logits) == 0  # 3.0 - 0.6 is still the largest
        sampler.accept(0)
    assert frequency.sample(logits) == 1  # 3.0 - 1.2
    assert presence.sample(logits) == 0


def test_penalties_forget_tokens_beyond_their_window():
    sampler = _core.Sampler(temperature=0.0, presence_penalty=5.0, penalty_last_n=2)
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    sampler.accept(0)
    assert sampler.sample(logits) == 1
    sampler.accept(2)
    sampler.accept(3)  # 0 is now three tokens back
    assert sampler.sample(logits) == 0


def test_logit_bias_forbids_and_forces():
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert _core.Sampler(temperature=0.0, logit_bias={0: -100.0}).sample(logits) == 1
    assert _core.Sampler(temperature=0.0, logit_bias={2: 100.0}).sample(logits) == 2
    with pytest.raises(ValueError, match="logit_bias is 3, expected an id of the vocabulary"):
        _core.Sampler(temperature=0.0, logit_bias={3: 1.0}).sample(logits)


def test_the_same_seed_draws_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    runs = []
    for seed in (1, 1, 2):
        sampler = _core.Sampler(temperature=1.0, seed=seed)
        runs.append([sampler.sample(logits) for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0.0),
        ("repeat_penalty", 0.0),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("penalty_last_n", -1),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        _core.Sampler(**{name: value})


@pytest.mark.parametrize("bad", [[1.0, float("nan"), 2.0], [1.0, float("inf")], [-np.inf] * 3])
def test_logits_that_cannot_be_sampled_are_refused(bad):
    for temperature in (0.0, 1.0):
        with pytest.raises(_core.NumericError, match="NaN or \\+Inf, or forbid every token"):
            _core.Sampler(temperature=temperature).sample(np.array(bad, np.float32))


def test_a_bias_may_forbid_but_not_be_infinite():
    assert _core.Sampler(temperature=0.0, logit_bias={0: -np.inf}).sample(
        np.array([3.0, 2.0], np.float32)
    ) == 1  # fmt: skip
    for bias in (np.inf, 1e300):  # 1e300 does not fit float32
        with pytest.raises((ValueError, TypeError), match="logit_bias|incompatible"):
            _core.Sampler(logit_bias={0: bias})
