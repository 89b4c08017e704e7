"""The patch: what kept neurons learn to answer for, and that sets, files and states carry it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest

from coreinfer import CoreConfig, CoreSet, Llama, _core
from coreinfer.config import FIELDS_OF_MODES
from coreinfer.patch_prior import PatchPrior, PatchPriorBuilder
from make_synthetic_model import make_tiny_model
from reference.neurons import ridge_patch

SAMPLES = _core.PATCH_SAMPLES
COUNTED = {"statistic": "flock", "samples": SAMPLES}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "tiny.gguf"
    make_tiny_model(path, "llama", "F32")
    return str(path)


@pytest.fixture(scope="module")
def engine(model):
    return _core.Engine(model, f32_activations=True)  # AMX would round to bf16


def ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 320, n, dtype=np.int32)


def read(engine, tokens, beta: float = 0.4, **session) -> _core.Session:
    s = _core.Session(engine, n_ctx=256, **session)
    s.prefill(tokens, **COUNTED)
    s.set_core(s.select(beta=beta))
    return s


def core_logits(s: _core.Session, token: int = 7) -> np.ndarray:
    n = s.n_past
    logits = s.verify(np.array([token], np.int32))[0]
    s.keep(n)
    return logits


def test_kept_neurons_answer_better_for_what_the_prompt_repeats(engine):
    tokens = np.tile(ids(16), 4)
    s = read(engine, tokens[:-1])
    dense = _core.Session(engine, n_ctx=256)
    dense.prefill(tokens)
    wanted = dense.logits()
    without = core_logits(s, int(tokens[-1]))
    s.fit_patch(rank=64)
    patched = core_logits(s, int(tokens[-1]))
    assert np.square(patched - wanted).sum() < 0.5 * np.square(without - wanted).sum()


def random_signs(*shape: int) -> np.ndarray:
    """By the last bits of std::mt19937(1)."""
    bits = np.random.MT19937()
    bits._legacy_seeding(1)
    drawn = bits.random_raw(int(np.prod(shape))) & 1
    return np.where(drawn, 1.0, -1.0).reshape(shape)


@pytest.mark.parametrize("rank", [20, 8])
def test_the_fit_is_the_ridge_regression_of_the_oracle(model, engine, rank):
    m, beta, spec = 20, 0.4, _core.Session(engine, n_ctx=256)
    spec.prefill(ids(m), statistic="flock", samples=m)
    spec.set_core(spec.select(beta=beta))
    spec.fit_patch(rank=rank, ridge=0.3)
    tensors = {t.name: t.data for t in gguf.GGUFReader(model).tensors}
    for i, (neurons, factors) in enumerate(
        zip(spec.core_set.layers, spec.core_set.patch, strict=True)
    ):
        h, y = (a.astype(np.float64) for a in spec.samples(i))
        w_down = tensors[f"blk.{i}.ffn_down.weight"].astype(np.float64)
        np.testing.assert_allclose(h @ w_down.T, y, atol=2e-3 * np.abs(y).max())
        whole, fitted = ridge_patch(h, y, neurons, w_down, 0.3)
        inner, outer = (f.astype(np.float64) for f in factors)
        scaled = h[:, neurons] / np.linalg.norm(h, axis=1, keepdims=True)
        got = scaled @ (outer @ inner).T
        if rank == m:
            np.testing.assert_allclose(got, fitted, atol=4e-3 * np.abs(fitted).max())
        # The directions are those of one step of subspace iteration from random signs ...
        gram = scaled @ scaled.T
        fit = gram @ np.linalg.inv(gram + 0.3 * np.trace(gram) / m * np.eye(m))
        seen = fit @ (y / np.linalg.norm(h, axis=1, keepdims=True))
        step = np.linalg.qr(fit @ seen @ seen.T @ random_signs(rank, m).T)[0]
        np.testing.assert_allclose(got, step @ step.T @ fitted, atol=4e-3 * np.abs(fitted).max())
        # ... and about those in which the fit sees most of all outputs.
        directions = np.linalg.qr(fit @ np.linalg.svd(seen)[0][:, :rank])[0]
        best = np.square(directions.T @ fitted).sum()
        assert np.square(got).sum() > 0.8 * best
        left = np.square(got - fitted).sum()
        assert left < np.square(fitted).sum() - 0.8 * best


@pytest.fixture(scope="module")
def prior(engine) -> PatchPrior:
    """Of another text of 60 tokens, all of which fit."""
    s = _core.Session(engine, n_ctx=256)
    s.prefill(ids(60, seed=8), statistic="flock", samples=60)
    builder = PatchPriorBuilder(engine.n_layer, 64)
    for i in range(engine.n_layer):
        h, y = s.samples(i)
        builder.add(i, h, y)
    return builder.build(s.samples(0)[0].shape[1])


def test_the_fit_with_a_prior_is_the_ridge_regression_of_the_oracle(model, engine, prior):
    s = _core.Session(engine, n_ctx=256)
    s.prefill(ids(20), statistic="flock", samples=20)
    s.set_core(s.select(beta=0.4))
    s.fit_patch(_core.PatchPrior(prior.h, prior.y, prior.weights), rank=84, prior_weight=2.0)
    tensors = {t.name: t.data for t in gguf.GGUFReader(model).tensors}
    for i, (neurons, factors) in enumerate(zip(s.core_set.layers, s.core_set.patch, strict=True)):
        h, y = (a.astype(np.float64) for a in s.samples(i))
        w_down = tensors[f"blk.{i}.ffn_down.weight"].astype(np.float64)
        rows = tuple(a[i].astype(np.float64) for a in (prior.h, prior.y, prior.weights))
        _, fitted = ridge_patch(h, y, neurons, w_down, 0.3, rows, 2.0)
        _, without = ridge_patch(h, y, neurons, w_down, 0.3)
        inner, outer = (f.astype(np.float64) for f in factors)
        got = (h[:, neurons] / np.linalg.norm(h, axis=1, keepdims=True)) @ (outer @ inner).T
        np.testing.assert_allclose(got, fitted[:20], atol=6e-3 * np.abs(fitted).max())
        assert np.abs(without - fitted[:20]).max() > 0.05 * np.abs(fitted).max()


def test_arrays_of_a_prior_lie_row_by_row(prior):
    turned = [np.asfortranarray(h) for h in prior.h]
    with pytest.raises(TypeError, match="incompatible"):  # a copy would be gone too early
        _core.PatchPrior(turned, prior.y, prior.weights)
    copied = PatchPrior(turned, prior.y, prior.weights)
    assert all(h.flags.c_contiguous for h in copied.h)
    _core.PatchPrior(copied.h, copied.y, copied.weights)


def test_a_prior_stands_for_the_tokens_it_is_made_of():
    rng = np.random.default_rng(4)
    w_down = rng.standard_normal((6, 40))
    builder = PatchPriorBuilder(1, 12)
    texts = [rng.standard_normal((30, 5)) @ rng.standard_normal((5, 40)) for _ in range(2)]
    for h in texts:  # of rank 10 together: nothing is lost
        builder.add(0, h.astype(np.float32), (h @ w_down.T).astype(np.float32))
    builder.add(0, np.zeros((4, 40), np.float32), np.zeros((4, 6), np.float32))
    prior = builder.build(40)
    unit = np.concatenate([h / np.linalg.norm(h, axis=1, keepdims=True) for h in texts])
    h, y, weights = (a[0].astype(np.float64) for a in (prior.h, prior.y, prior.weights))
    wanted = unit.T @ unit / 64
    np.testing.assert_allclose((h.T * weights) @ h, wanted, atol=2e-3 * np.abs(wanted).max())
    counted = np.sqrt(weights)[:, None]  # the last two rows are nothing but rounding
    np.testing.assert_allclose(counted * (h @ w_down.T), counted * y, atol=2e-3 * counted.max())


@pytest.mark.parametrize("n_rows", [8, 16])
def test_few_rows_stand_for_most_of_many_tokens(n_rows):
    rng = np.random.default_rng(5)
    strength = 0.8 ** np.arange(40)
    builder = PatchPriorBuilder(1, n_rows)
    texts = [(rng.standard_normal((50, 40)) * strength).astype(np.float32) for _ in range(6)]
    for h in texts:
        builder.add(0, h, h[:, :3])
    prior = builder.build(40)
    unit = np.concatenate([h / np.linalg.norm(h, axis=1, keepdims=True) for h in texts])
    h, weights = prior.h[0].astype(np.float64), prior.weights[0].astype(np.float64)
    wanted, got = unit.T @ unit / len(unit), (h.T * weights) @ h
    best = np.sort(np.linalg.eigvalsh(wanted))[: 40 - n_rows].sum()
    assert best <= np.trace(wanted - got) < 1.3 * best + 0.01


def test_the_set_says_what_it_carries_and_a_step_reads_it(engine):
    s = read(engine, ids(60))
    before = s.decode_weight_bytes
    s.fit_patch(rank=5)
    n_embd, k = engine.config["n_embd"], [len(layer) for layer in s.core_set.layers]
    for (inner, outer), size in zip(s.core_set.patch, k, strict=True):
        assert inner.shape == (5, size) and outer.shape == (n_embd, 5)
        assert inner.dtype == outer.dtype == np.float16
    assert s.patch_bytes == sum(2 * 5 * (size + n_embd) for size in k)
    assert s.decode_weight_bytes == before + s.patch_bytes
    s.set_core(s.select(beta=0.4))
    assert s.patch_bytes == 0 and s.decode_weight_bytes == before


def test_patched_tokens_at_once_are_those_one_by_one(engine):
    s = read(engine, ids(50))
    s.fit_patch(rank=8)
    n, tokens = s.n_past, ids(9, 1)
    at_once = s.verify(tokens)
    s.keep(n)
    one_by_one = []
    for token in tokens:
        s.decode(int(token))
        one_by_one.append(s.logits())
    np.testing.assert_array_equal(at_once, np.array(one_by_one))


@pytest.mark.parametrize("n_batch", [7, 64])
def test_a_reused_prefix_has_the_samples_of_a_fresh_prefill(engine, n_batch):
    whole = ids(180)
    fresh = read(engine, whole, n_batch=n_batch)
    fresh.fit_patch(rank=8)
    again = read(engine, np.concatenate([whole[:150], ids(40, 3)]), n_batch=n_batch)
    again.decode(5)
    reused = again.reusable(whole, **COUNTED)
    assert 0 < reused < 150
    again.keep(reused)
    again.prefill(whole[reused:], **COUNTED)
    again.set_core(again.select(beta=0.4))
    again.fit_patch(rank=8)
    np.testing.assert_allclose(core_logits(again), core_logits(fresh), atol=2e-3)


def test_a_replay_samples_what_was_decoded(engine):
    s = read(engine, ids(30))
    tokens = ids(20, 2)
    for token in tokens:
        s.decode(int(token))
    s.replay(**COUNTED)
    s.set_core(s.select(beta=0.4))
    s.fit_patch(rank=8)
    fresh = read(engine, np.concatenate([ids(30), tokens]))
    fresh.fit_patch(rank=8)
    np.testing.assert_allclose(core_logits(s), core_logits(fresh), atol=2e-3)


def test_a_replay_reads_what_is_dense_but_not_sampled(engine):
    s = _core.Session(engine, n_ctx=256)
    s.prefill(ids(30), statistic="flock")
    s.set_exact(beta=0.4)
    for token in ids(20, 2):
        s.decode(int(token))
    s.end_exact()
    before = s.logits()
    s.replay(**COUNTED)
    assert s.timings["replay_tokens"] == 50 and s.n_dense == s.n_past == 50
    np.testing.assert_allclose(s.logits(), before, atol=2e-3)
    s.replay(**COUNTED)  # nothing is left to do
    assert s.timings["replay_tokens"] == 50
    assert len(s.samples(0)[0]) == 50


def test_a_saved_state_carries_the_patch(engine):
    s = read(engine, ids(40))
    s.fit_patch(rank=8)
    other = _core.Session(engine, n_ctx=256)
    other.load_state(s.save_state())
    assert other.patch_bytes == s.patch_bytes > 0
    np.testing.assert_array_equal(core_logits(other), core_logits(s))
    with pytest.raises(RuntimeError, match="no FFN samples"):
        other.fit_patch(rank=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rank": 0}, "rank is 0, expected 1 to 1024"),
        ({"rank": -3}, "rank is -3, expected 1 to 1024"),
        ({"rank": 1025}, "rank is 1025, expected 1 to 1024"),
        *(
            ({"decay": decay}, f"decay is {decay:g}, expected above 0 and at most 1")
            for decay in (0.0, -0.5, 1.5, np.inf, np.nan)
        ),
        *(
            ({"ridge": ridge}, f"ridge is {ridge:g}, expected above 0 and at most 1e+06")
            for ridge in (0.0, -1.0, 1e7, np.inf, np.nan)
        ),
        *(
            ({"prior_weight": weight}, f"prior counts {weight:g}, expected 0 to 1e+06")
            for weight in (-1.0, 1e7, np.inf, np.nan)
        ),
    ],
)
def test_wrong_settings_are_said_and_leave_the_set(engine, spec, message):
    s = read(engine, ids(20))
    with pytest.raises(ValueError, match=re.escape(message)):
        s.fit_patch(**spec)
    assert s.core_set is not None and s.patch_bytes == 0
    s.fit_patch(rank=4, decay=0.5, ridge=1e6)
    assert s.patch_bytes > 0


@pytest.fixture
def huge(model, tmp_path) -> str:
    """A model whose second layer writes more than a patch's float16 can hold."""
    path = tmp_path / "huge.gguf"
    shutil.copy(model, path)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    tensors["blk.1.ffn_down.weight"] *= np.float32(1e9)
    tensors["blk.1.ffn_down.weight"].base.flush()
    return str(path)


def pair(rank: int, k: int, n_embd: int, value: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    return np.full((rank, k), value, np.float16), np.full((n_embd, rank), value, np.float16)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ([None, None], "patches for 2 layers, expected 3 or none"),
        ([pair(4, 3, 256), None, None], "layer 0 has rank 4 with 12 and 1024 values, expected .*2"),
        ([None, None, pair(4, 2, 256)], r"layer 2 has rank 4 .*expected \(rank, 0\) for the layer"),
        ([pair(4, 2, 256, np.nan), None, None], "the patch of layer 0 holds NaN or Inf"),
        ([pair(4, 2, 256, np.inf), None, None], "the patch of layer 0 holds NaN or Inf"),
        ([pair(4, 2, 255), None, None], r"a patch of rank 4 .* expected \(rank, 2\) and \(256, ra"),
    ],
)
def test_a_patch_of_another_shape_or_no_numbers_is_refused(engine, patch, message):
    s = read(engine, ids(20))
    two = np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match=message):
        s.set_core(_core.CoreSet([two, two, None], n_ff=512, patch=patch))
    s.set_core(_core.CoreSet([two, two, None], n_ff=512, patch=[pair(4, 2, 256), None, None]))
    s.decode(3)
    assert np.isfinite(s.logits()).all()


def test_a_patch_of_values_that_do_not_fit_is_said_and_leaves_the_set(huge):
    s = read(_core.Engine(huge), ids(40))
    with pytest.raises(ArithmeticError, match="the patch of layer 1 holds NaN, Inf or values past"):
        s.fit_patch(rank=8)
    assert s.core_set is not None and s.patch_bytes == 0
    s.decode(3)
    assert np.isfinite(s.logits()).all()


def test_llama_goes_on_after_a_patch_that_failed(huge):
    with_patch, without = CoreConfig(beta=0.4, patch=8), CoreConfig(beta=0.4, patch=False)
    with Llama(huge, core=without, verbose=False) as llm:
        wanted = llm.score(ids(40), ids(8, 1))
    with Llama(huge, core=with_patch, verbose=False) as llm:
        for call in (lambda: llm("ab" * 20, max_tokens=4), lambda: llm.score(ids(40), ids(8, 1))):
            with pytest.raises(ArithmeticError, match="the patch of layer 1 holds NaN, Inf or"):
                call()
        llm.core = without
        np.testing.assert_array_equal(llm.score(ids(40), ids(8, 1)), wanted)
        assert llm.core_set.patch_rank == 0
        llm.core = "off"
        assert llm("ab" * 20, max_tokens=4)["usage"]["completion_tokens"] > 0


def test_a_regression_without_a_solution_is_said_and_leaves_the_set(engine):
    s = read(engine, np.full(40, 7, np.int32))  # the same token again and again: one direction
    with pytest.raises(ArithmeticError, match="the patch of layer 0 has no solution"):
        s.fit_patch(rank=8, ridge=1e-30)
    assert s.core_set is not None and s.patch_bytes == 0
    s.fit_patch(rank=8)
    assert s.patch_bytes > 0


def test_without_samples_or_a_set_there_is_nothing_to_fit(engine):
    s = _core.Session(engine, n_ctx=256)
    s.prefill(ids(20), statistic="flock")
    s.set_core(s.select(beta=0.4))
    with pytest.raises(RuntimeError, match="no FFN samples"):
        s.fit_patch(rank=4)
    s = _core.Session(engine, n_ctx=256)
    s.prefill(ids(20), **COUNTED)
    with pytest.raises(RuntimeError, match="no core set to patch"):
        s.fit_patch(rank=4)


@pytest.mark.parametrize("statistic", ["count", "count_gate", "count_abs", "flock"])
def test_a_weighted_statistic_ranks_by_what_neurons_write(engine, statistic):
    plain, weighted = (_core.Session(engine, n_ctx=256) for _ in range(2))
    plain.prefill(ids(40), statistic=statistic)
    weighted.prefill(ids(40), statistic=statistic, weighted=True)
    a, b = plain.select(beta=0.4), weighted.select(beta=0.4)
    assert not a.same_neurons(b)
    assert b.weighted and not a.weighted
    assert plain.reusable(ids(40), statistic=statistic, weighted=True) == 0


def test_llama_patches_and_files_what_it_found(model, tmp_path):
    with Llama(model, core=CoreConfig(beta=0.4, patch=6, weighted=True), verbose=False) as llm:
        first = llm.score(ids(40), ids(8, 1))
        found = llm.core_set
        assert found.patch_rank == 6 and found.weighted
        assert llm.timings.patch_seconds > 0 and llm.timings.patch_bytes > 0
        found.save(tmp_path / "set.npz")
        llm.core = CoreSet.load(tmp_path / "set.npz")
        llm.reset()  # a reused prefix would be read in other batches
        np.testing.assert_array_equal(llm.score(ids(40), ids(8, 1)), first)
        llm.core = CoreConfig(beta=0.4, patch=False)
        assert not np.array_equal(llm.score(ids(40), ids(8, 1)), first)
        assert llm.core_set.patch == [] and llm.core_set.patch_rank == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": [(np.zeros((2, 3), np.float16), np.zeros((4, 2), np.float16))]},
        {"patch": [(np.zeros((2, 2), np.float32), np.zeros((4, 2), np.float16))]},
        {"patch": [(np.full((2, 2), np.nan, np.float16), np.zeros((4, 2), np.float16))]},
        {"patch": [None, None]},
        {"weighted": 1},
    ],
)
def test_a_set_with_a_wrong_patch_cannot_be_made(changes):
    with pytest.raises(ValueError, match="patch|weighted"):
        CoreSet(layers=[np.array([0, 5])], n_ff=8, **changes)


def test_the_paper_s_settings_have_a_name_and_hang_on_no_default():
    pinned = {"mode": "stable", "alpha": 0.4, "beta": 0.4, "gamma": 0.4, "statistic": "count"}
    pinned |= {"weighted": False, "patch": 0, "prior": False, "layers": None, "first_layer": 1.0}
    pinned |= {"blend": 0.0, "start": 0, "refresh": None}
    looked_at = {name for modes, names in FIELDS_OF_MODES.items() for name in names
                 if {"stable", "similar"} & set(modes)}  # fmt: skip
    assert set(pinned) == looked_at | {"mode"}
    given = {}

    class Spied(CoreConfig):
        def __init__(self, **fields):
            given.update(fields)
            super().__init__(**fields)

    for mode in ("similar", "stable"):
        paper = Spied.paper(mode=mode)
        wanted = CoreConfig.of_fields({**pinned, "mode": mode})
        assert vars(paper) == vars(wanted) and CoreConfig.preset("paper", mode) == wanted
    assert given == {**pinned, "mode": "stable"}
    assert CoreConfig.of("paper") == CoreConfig.paper()
    assert CoreConfig.paper(0.2).beta == CoreConfig.paper(0.2, "similar").gamma == 0.2


def test_llama_takes_the_paper_s_settings_by_name(model):
    with Llama(model, preset="paper", verbose=False) as llm:
        assert llm.core == CoreConfig.paper()
        llm("ab" * 20, max_tokens=1)
        assert (llm.core_set.statistic, llm.core_set.patch_rank) == ("count", 0)
        assert len(set(llm.core_set.sizes)) == 1
    with Llama(model, preset="paper", core="stable", beta=0.2, verbose=False) as llm:
        assert llm.core == replace(CoreConfig.paper(), beta=0.2)
    for options, message in (
        ({"preset": "papers"}, "preset is 'papers'; expected one of paper"),
        ({"preset": "paper", "core": "exact"}, "preset is 'paper'; it needs core='stable' or"),
        ({"preset": "paper", "core": CoreConfig()}, "preset is 'paper'; it needs core='stable'"),
        ({"preset": "paper", "gamma": 0.2}, "gamma is 0.2; it needs core='similar'"),
        ({"preset": "paper", "core": "similar"}, "core is 'similar'.*there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            Llama(model, verbose=False, **options)


@pytest.mark.parametrize(
    ("given", "rank"), [(True, 64), (False, 0), ("on", 64), ("off", 0), ("16", 16), (8, 8)]
)
def test_patch_is_on_off_or_a_rank(given, rank):
    assert CoreConfig(patch=given).patch == rank


@pytest.mark.parametrize("wrong", [-1, 1025, "much", 1.5, None])
def test_another_patch_is_said_to_be_wrong(wrong):
    with pytest.raises(ValueError, match="patch is .*; expected on, off or a rank"):
        CoreConfig(patch=wrong)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (64, 128), (9, 5)])
def test_rows_become_orthonormal_in_their_order(shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    x[1:] += 30 * x[:1]  # nearly parallel
    if shape[0] > 3:
        x[3] = x[1] - 2 * x[0]  # dependent
    rows = _core.testing.orthonormalise(x).astype(np.float64)
    gram = rows @ rows.T
    kept = np.diag(gram) > 0.5
    assert kept.sum() == min(np.linalg.matrix_rank(x), *shape)
    np.testing.assert_allclose(gram, np.diag(kept.astype(float)), atol=2e-4)
    within = x - (x @ rows.T) @ rows  # nothing of x is lost
    np.testing.assert_allclose(within, 0, atol=2e-3 * np.abs(x).max())
    if shape[0] > 3:
        assert not rows[3].any()
