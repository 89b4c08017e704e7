"""The oracle itself: definitions on cases worked out by hand, and its forward pass against what
`transformers` computed on the same weights (committed; tools/update_goldens.py makes it)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from make_synthetic_model import make_tiny_model
from model_shape import ARCHITECTURES
from reference import neurons, quant
from reference.model import KvCache, ReferenceModel, gelu_tanh, silu

GOLDEN = np.load(Path(__file__).parent / "golden" / "transformers_logits.npz")
CASES = json.loads(str(GOLDEN["cases"]))
# transformers runs in float64 here but computes rotary angles, softmax and RMSNorm in float32:
# relative 1e-7 each, a few hundred of them, on logits of size up to 12. Measured: 5e-6 (up to 7
# layers), 2.7e-5 (46 layers).
TRANSFORMERS_TOLERANCE = 2e-5
# Two orders of summation in float64 on values of size 10.
FLOAT64_TOLERANCE = 1e-11


# --- core neurons of a token -----------------------------------------------------------------


def test_token_core_takes_the_top_share_of_positive_entries():
    row = np.array([3.0, -9.0, 0.0, 2.0, 5.0, 1.0])  # four positive
    assert neurons.token_core(row, 0.5).tolist() == [0, 4]
    assert neurons.token_core(row, 1.0).tolist() == [0, 3, 4, 5]


def test_token_core_prefers_the_lower_index_among_equal_values():
    row = np.array([1.0, 2.0, 2.0, 2.0])
    assert neurons.token_core(row, 0.5).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("n_positive", "alpha", "size"),
    [
        (5, 0.5, 3),  # 2.5 rounds up
        (5, 0.3, 2),  # 1.5 rounds up
        (3, 0.4, 1),  # 1.2 rounds down
        (4, 0.4, 2),  # 1.6 rounds up
        (2, 0.1, 1),  # 0.2 rounds to none, but one is always taken
        (0, 0.4, 0),
    ],
)
def test_token_core_rounds_half_up_and_takes_at_least_one(n_positive, alpha, size):
    row = np.concatenate([np.arange(1, n_positive + 1.0), -np.ones(3)])
    assert len(neurons.token_core(row, alpha)) == size


# --- statistics ------------------------------------------------------------------------------

H = np.array(
    [
        [4.0, -5.0, 1.0, 0.0],  # positive: 0, 2; non-zero: 0, 1, 2
        [0.0, 2.0, 2.0, -3.0],  # positive: 1, 2; non-zero: 1, 2, 3
        [0.0, 0.0, 0.0, 0.0],
    ]
)  # nothing


def test_count_counts_the_tokens_that_have_a_neuron_in_their_core():
    # alpha 0.5 of two positives is one: neuron 0 for token 0, neuron 1 (tie with 2) for token 1
    assert neurons.count(H, 0.5).tolist() == [1, 1, 0, 0]
    assert neurons.count(H, 1.0).tolist() == [1, 1, 2, 0]


def test_statistics_look_at_the_right_activations():
    act = -H
    scores = {name: neurons.statistic_scores(name, H, act, 0.5) for name in neurons.STATISTICS}
    assert scores["count"].tolist() == [1, 1, 0, 0]
    # -H: token 0 has one positive (neuron 1), token 1 one (neuron 3)
    assert scores["count_gate"].tolist() == [0, 1, 0, 1]
    # |H|: half of three, rounded up, is two: {1, 0} and {3, 1}
    assert scores["count_abs"].tolist() == [1, 2, 0, 1]
    # token 0: squares 16, 25, 1, 0 of 42; token 1: 0, 4, 4, 9 of 17; token 2 is skipped
    assert scores["flock"] == pytest.approx([16 / 42, 25 / 42 + 4 / 17, 1 / 42 + 4 / 17, 9 / 17])


def test_weights_multiply_the_activations_before_they_are_judged():
    weight = np.array([0.1, 1.0, 9.0, 1.0])
    # token 0: 0.4, -, 9, -; token 1: -, 2, 18, -
    assert neurons.statistic_scores("count", H, H, 0.5, weight).tolist() == [0, 0, 2, 0]


def test_unknown_statistic_is_refused_by_name():
    with pytest.raises(ValueError, match="'median'"):
        neurons.statistic_scores("median", H, H, 0.5)


@pytest.mark.parametrize("statistic", neurons.STATISTICS)
def test_scores_of_a_text_are_the_sum_over_its_parts(statistic):
    h = np.random.default_rng(0).standard_normal((9, 40))
    whole = neurons.statistic_scores(statistic, h, h, 0.4)
    parts = [neurons.statistic_scores(statistic, part, part, 0.4) for part in (h[:4], h[4:])]
    assert whole == pytest.approx(parts[0] + parts[1], abs=1e-13)


@pytest.mark.parametrize("statistic", neurons.STATISTICS)
def test_scores_do_not_depend_on_how_loud_a_token_is(statistic):
    rng = np.random.default_rng(1)
    h = rng.standard_normal((9, 40))
    louder = h * 2.0 ** rng.integers(-8, 8, (9, 1))  # powers of two keep every bit
    assert np.array_equal(
        neurons.statistic_scores(statistic, h, h, 0.4),
        neurons.statistic_scores(statistic, louder, louder, 0.4),
    )


# --- core sets -------------------------------------------------------------------------------


def test_core_set_takes_the_top_share_ascending_with_ties_to_the_lower_index():
    scores = np.array([1, 7, 3, 3, 0, 3, 2, 1, 1, 1])
    assert neurons.core_set(scores, 0.2).tolist() == [1, 2]
    assert neurons.core_set(scores, 0.25).tolist() == [1, 2, 3]  # 2.5 rounds up
    assert neurons.core_set(scores, 0.01).tolist() == [1]  # at least one


def test_core_set_never_has_a_neuron_of_score_zero():
    assert neurons.core_set(np.array([0, 2, 0, 1]), 1.0).tolist() == [1, 3]
    assert neurons.core_set(np.zeros(4), 0.5).tolist() == []


def test_layers_outside_the_range_stay_dense():
    h = np.abs(np.random.default_rng(2).standard_normal((4, 6, 20)))
    sets = neurons.core_sets("flock", h, h, 0.4, 0.2, layers=(1, 3))
    assert [s is None for s in sets] == [True, False, False, True]
    assert [len(s) for s in sets[1:3]] == [4, 4]


def test_overlap_and_jaccard_of_small_sets():
    a, b, none = np.array([1, 2, 3, 4]), np.array([3, 4, 5]), np.array([], int)
    assert neurons.overlap(a, b) == 2 / 4
    assert neurons.jaccard(a, b) == 2 / 5
    assert neurons.overlap(a, none) == neurons.jaccard(a, none) == 0.0
    assert neurons.overlap(none, none) == neurons.jaccard(none, none) == 1.0


# --- stability -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "prefix"), [(2, 1), (3, 1), (4, 2), (7, 2), (8, 4), (15, 4), (16, 8), (255, 64)]
)
def test_stability_prefix_is_the_largest_power_of_two_up_to_half(n_tokens, prefix):
    assert neurons.stability_prefix(n_tokens) == prefix


def test_stability_by_hand():
    # 4 tokens, so a prefix of 2; beta 0.5 keeps 2 of 4 neurons. The prefix counts (2, 2, 0, 0).
    h = np.array([[[2, 1, 0, 0], [1, 2, 0, 0], [1, 0, 0, 3], [0, 0, 0, 1]]], float)
    assert neurons.count(h[0], 1.0).tolist() == [3, 2, 0, 2]
    assert neurons.stability("count", h, h, 1.0, 0.5) == (1.0 - 0.5) / 0.5  # {0, 1} twice
    h[0, 2, 0] = 0
    assert neurons.count(h[0], 1.0).tolist() == [2, 2, 0, 2]  # a tie: still {0, 1}
    assert neurons.stability("count", h, h, 1.0, 0.5) == 1.0
    h[0, 1] = [0, 0, 1, 1]  # prefix (1, 1, 1, 1): {0, 1}; whole (1, 1, 1, 3): {0, 3}
    assert neurons.count(h[0], 1.0).tolist() == [1, 1, 1, 3]
    assert neurons.stability("count", h, h, 1.0, 0.5) == (0.5 - 0.5) / 0.5


def test_stability_of_neurons_that_are_mostly_silent():
    # Of 4 neurons beta 0.75 would keep 3, but 2 answer to the prefix and 3 to the whole.
    h = np.array([[[2, 1, 0, 0], [1, 2, 0, 0], [1, 0, 0, 3], [0, 0, 0, 1]]], float)
    chance = 2 / 4
    assert neurons.stability("count", h, h, 1.0, 0.75) == (2 / 3 - chance) / (1 - chance)


def test_stability_is_one_when_all_tokens_are_alike():
    alike = np.repeat(np.random.default_rng(3).standard_normal((2, 1, 50)), 8, axis=1)
    assert neurons.stability("count", alike, alike, 0.4, 0.2) == 1.0


def test_stability_is_zero_by_chance():
    # The second token is far from the first in what flock sees: one neuron has nearly all of its
    # norm in token 0, so token 1 alone decides the order of the others in the whole text.
    rng = np.random.default_rng(3)
    h = rng.random((40, 2, 500))
    h[:, 0, 0] = 1e6
    # 40 layers of hypergeometric overlap of 100 in 500: (0.036 / sqrt(40)) / 0.8 = 0.007
    assert abs(neurons.stability("flock", h, h, 0.4, 0.2)) < 5 * 0.007


def test_stability_is_undefined_for_one_token_and_for_everything_kept():
    h = np.ones((1, 1, 4))
    assert neurons.stability("count", h, h, 0.4, 0.5) is None
    h = np.ones((1, 8, 4))
    assert neurons.stability("count", h, h, 0.4, 1.0) is None


# --- distances between distributions ---------------------------------------------------------


def test_log_softmax_sums_to_one_and_survives_large_logits():
    logits = np.array([[1000.0, 1001.0, 999.0], [0.0, 0.0, 0.0]])
    log_p = quant.log_softmax(logits)
    assert np.exp(log_p).sum(axis=-1) == pytest.approx([1.0, 1.0])
    assert log_p[0] == pytest.approx(quant.log_softmax(logits - 1000)[0])


def test_kl20_by_hand():
    # p = (1/2, 1/4, rest 1/4), q = (1/4, 1/4, rest 1/2) over a vocabulary of four
    q = np.log([[0.25, 0.25, 0.125, 0.375]])
    expected = 0.5 * np.log(2) + 0 + 0.25 * np.log(0.5)
    ids, log_p = np.array([[0, 1]]), np.log([[0.5, 0.25]])
    assert quant.kl20(ids, log_p, q) == pytest.approx(expected)
    assert quant.kl20(np.array([[3, 0]]), q[:, [3, 0]], q) == pytest.approx(0, abs=1e-15)


def test_kl20_of_the_whole_vocabulary_is_the_kl_divergence():
    rng = np.random.default_rng(4)
    p, q = quant.log_softmax(rng.standard_normal((2, 5, 7)))
    order = np.argsort(-p, axis=-1)
    listed = np.take_along_axis(p, order, axis=-1)
    assert quant.kl20(order, listed, q) == pytest.approx(quant.kl_divergence(p, q).mean())


def test_top1_agreement_counts_equal_arg_maxes():
    log_q = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
    assert quant.top1_agreement(np.array([1, 1, 0]), log_q) == pytest.approx(2 / 3)


# --- the forward pass ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_transformers(case, tmp_path):
    make_tiny_model(tmp_path / "m.gguf", **CASES[case])
    result = ReferenceModel(tmp_path / "m.gguf").forward(GOLDEN[f"{case}.tokens"])
    at = GOLDEN[f"{case}.positions"]
    tolerance = TRANSFORMERS_TOLERANCE * max(1, CASES[case]["n_layer"] / 8)
    np.testing.assert_allclose(result.logits[at], GOLDEN[f"{case}.logits"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(result.h[:, at], GOLDEN[f"{case}.h"], rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory) -> ReferenceModel:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    make_tiny_model(path, request.param)
    return ReferenceModel(path)


TOKENS = np.random.default_rng(5).integers(0, 300, 20).tolist()


def test_chunks_give_what_one_pass_gives(model):
    whole = model.forward(TOKENS)
    cache = KvCache()
    parts = [model.forward(part, cache) for part in (TOKENS[:1], TOKENS[1:13], TOKENS[13:])]
    np.testing.assert_allclose(
        np.concatenate([p.logits for p in parts]), whole.logits, rtol=0, atol=FLOAT64_TOLERANCE
    )
    np.testing.assert_allclose(
        np.concatenate([p.h for p in parts], axis=1), whole.h, rtol=0, atol=FLOAT64_TOLERANCE
    )


def test_a_token_does_not_see_later_ones(model):
    changed = TOKENS[:10] + [(t + 1) % 300 for t in TOKENS[10:]]
    a, b = model.forward(TOKENS).logits, model.forward(changed).logits
    np.testing.assert_allclose(a[:10], b[:10], rtol=0, atol=FLOAT64_TOLERANCE)
    assert np.abs(a[10:] - b[10:]).max() > 0.1


def test_positions_matter(model):
    """The same earlier tokens in another order: a model without positions could not tell."""
    swapped = TOKENS[:15][::-1] + TOKENS[15:]
    a, b = model.forward(TOKENS).logits, model.forward(swapped).logits
    assert np.abs(a[-1] - b[-1]).max() > 0.05


def test_core_sets_of_all_neurons_change_nothing(model):
    n_layer, n_ff = model.config.n_layer, model.config.n_ff
    every = [np.arange(n_ff) if i % 2 else None for i in range(n_layer)]
    np.testing.assert_array_equal(
        model.forward(TOKENS, core_layers=every).logits, model.forward(TOKENS).logits
    )


def test_core_sets_act_like_a_model_without_the_other_neurons(tmp_path):
    kept = [np.arange(0, 512, 3), None, np.arange(5, 200)]

    def cut(name: str, values: np.ndarray) -> np.ndarray:
        layer = name.split(".")[1]
        if name.endswith("ffn_down.weight") and kept[int(layer)] is not None:
            mask = np.isin(np.arange(values.shape[1]), kept[int(layer)])
            return values * mask
        return values

    make_tiny_model(tmp_path / "whole.gguf", "llama")
    make_tiny_model(tmp_path / "cut.gguf", "llama", edit=cut)
    restricted = ReferenceModel(tmp_path / "whole.gguf").forward(TOKENS, core_layers=kept).logits
    np.testing.assert_allclose(
        restricted,
        ReferenceModel(tmp_path / "cut.gguf").forward(TOKENS).logits,
        rtol=0,
        atol=FLOAT64_TOLERANCE,
    )


def test_score_starts_dense_and_continues_through_the_core_sets(model):
    prompt, continuation = TOKENS[:12], TOKENS[12:]
    result = model.forward(prompt)
    sets = neurons.core_sets("flock", result.h, result.act, 0.4, 0.3)
    dense = quant.log_softmax(model.forward(TOKENS).logits[11:-1])
    np.testing.assert_allclose(
        model.score(prompt, continuation), dense, rtol=0, atol=FLOAT64_TOLERANCE
    )
    core = model.score(prompt, continuation, sets)
    np.testing.assert_allclose(core[0], dense[0], rtol=0, atol=FLOAT64_TOLERANCE)
    assert np.abs(core[1:] - dense[1:]).max(axis=-1).min() > 0.01
    assert np.exp(core).sum(axis=-1) == pytest.approx(np.ones(len(continuation)))


def test_greedy_text_is_the_arg_max_of_score(model):
    prompt = TOKENS[:6]
    text = model.generate(prompt, 5)
    assert model.score(prompt, text).argmax(axis=-1).tolist() == text


def test_activations_of_ungated_models_are_relu(tmp_path):
    make_tiny_model(tmp_path / "m.gguf", "opt")
    result = ReferenceModel(tmp_path / "m.gguf").forward(TOKENS)
    assert (result.h >= 0).all() and 0.2 < (result.h == 0).mean() < 0.8
    assert np.array_equal(result.h, result.act)


def test_activation_functions_at_known_points():
    assert silu(np.array([0.0, 1.0, -800.0])) == pytest.approx([0.0, 0.7310585786300049, 0.0])
    assert gelu_tanh(np.array([0.0, 1.0, -1.0])) == pytest.approx(
        [0.0, 0.8411919906082768, -0.15880800939172324]
    )


def test_unknown_architecture_and_rope_scaling_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    make_tiny_model(path, "llama", extra_metadata={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ValueError, match="'longrope'"):
        ReferenceModel(path)
    make_tiny_model(path, "llama", extra_metadata={"general.architecture": "mamba"})
    with pytest.raises(ValueError, match="'mamba'"):
        ReferenceModel(path)
